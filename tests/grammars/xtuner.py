"""How XTuner V1 takes ``DatasetConfig``, and how many rows ``sample_ratio`` draws.

Sources: xtuner/v1/datasets/config.py at 0404287 and jsonl.py at 00e22cc of the repository (the releases of the package
index are older).
"""

import ast


def rows_of(size, ratio):
    """Whole passes, and the rest without repeats."""
    target = int(size * ratio)
    if target <= 0:
        return 0
    repeated = size * int(ratio)
    if target - repeated <= 0:
        return min(repeated, target)
    if target - repeated > size:
        raise ValueError("Sample larger than population")
    return target


def read(files, sizes):
    load, assignment = ast.parse(files["xtuner_datasets.py"]).body
    assert (load.module, load.names[0].name) == ("xtuner.v1.datasets.config", "DatasetConfig")
    assert assignment.targets[0].id == "DATASETS"
    drawn = {}
    for call in assignment.value.elts:
        assert call.func.id == "DatasetConfig"
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        # It forbids keys that it does not know.
        assert set(given) <= {"anno_path", "cache_dir", "cache_tag", "name", "class_name", "sample_ratio"}
        path = given["anno_path"]
        if path not in sizes or not path.endswith(".jsonl"):
            raise FileNotFoundError(path)
        assert path not in drawn
        ratio = given.get("sample_ratio", 1.0)
        drawn[path] = rows_of(sizes[path], ratio) if ratio != 1 else sizes[path]
    return drawn


READERS = {"xtuner": read}

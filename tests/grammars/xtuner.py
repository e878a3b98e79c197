"""How XTuner V1 takes ``DatasetConfig``, and how many rows ``sample_ratio`` draws.

Sources: xtuner/v1/datasets/config.py at 0404287 and jsonl.py at 00e22cc of the repository (the releases of the package
index are older).
"""

from .streaming import make_module, run


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
    drawn = {}

    # It forbids keys that it does not know.
    def make_config(*, anno_path, name="default", sample_ratio=1.0, class_name="", cache_dir=None, cache_tag=None):
        if anno_path not in sizes or not anno_path.endswith(".jsonl"):
            raise FileNotFoundError(anno_path)
        assert isinstance(name, str)
        size = sizes[anno_path]
        return anno_path, rows_of(size, sample_ratio) if sample_ratio != 1 else size

    module = make_module("xtuner.v1.datasets.config", DatasetConfig=make_config)
    for path, rows in run(files["xtuner_datasets.py"], **{module.__name__: module})["DATASETS"]:
        assert path not in drawn
        drawn[path] = rows
    return drawn


READERS = {"xtuner": read}

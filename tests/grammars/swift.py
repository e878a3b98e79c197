"""How ms-swift 4.6.0 reads the YAML of ``swift sft``, and the syntax of ``--dataset``.

Sources: cli/main.py (the YAML becomes arguments), dataset/dataset_syntax.py, dataset/utils.py, dataset/loader.py.
"""

import posixpath

import yaml

from .huggingface import load

KINDS = {"jsonl": "json", "json": "json", "parquet": "parquet", "csv": "csv", "arrow": "arrow"}


def arguments_of(text):
    """The command line that the YAML becomes, as argparse takes it: by option, a list of texts."""
    found = {}
    for option, value in yaml.safe_load(text).items():
        values = [str(one) for one in value] if isinstance(value, list) else [str(value)]
        if any(one.startswith("-") for one in values):
            raise ValueError(f"{values} would be an option")
        found[option] = values
    return found


def parse(dataset, sizes):
    """The path and the number of a dataset; a path that exists is taken as it is."""
    path, count = dataset, None
    if path not in sizes:
        path = path.split("::", 1)[-1]
    if path not in sizes:
        path, _, count = path.rpartition("#") if "#" in path else (path, "", None)
    if path not in sizes:
        path = path.split(":", 1)[0]
    return path.strip(), None if count is None else int(count)


def read(files, sizes):
    arguments = arguments_of(files["ms_swift.yaml"])
    assert set(arguments) == {"dataset", "dataset_shuffle", "data_seed"}
    assert arguments["dataset_shuffle"] == ["True"]
    int(*arguments["data_seed"])
    drawn = {}
    for dataset in arguments["dataset"]:
        path, count = parse(dataset, sizes)
        file, size = load(sizes, KINDS[posixpath.splitext(path)[1].lstrip(".")], path)
        if count is not None and count <= 0:
            raise ValueError(f"{count} is not above 0")
        assert file not in drawn
        drawn[file] = size if count is None else count
    return drawn


READERS = {"ms-swift": read}

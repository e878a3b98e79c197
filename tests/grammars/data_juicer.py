"""How Data-Juicer 1.6.1 draws: dataset_builder.py (DatasetBuilder, get_sample_numbers), sample.py (random_sample)."""

import math

from grammars.huggingface import BUILDERS, load
from grammars.streaming import load_yaml


def found(sizes, path):
    """What it hands to load_dataset: the file, or of a folder the files in it."""
    builder = next((builder for builder, suffixes in BUILDERS.items() if path.lower().endswith(suffixes)), None)
    if builder is not None:
        return load(sizes, builder, path)[0]
    inside = f"{path}/rows.jsonl"
    assert load({inside: sizes[path]}, "json", inside)[0] == inside
    return path


def read(files, sizes):
    config = load_yaml(files["data_juicer.yaml"])
    assert set(config) == {"project_name", "dataset", "export_path", "process"}
    limit, entries = config["dataset"]["max_sample_num"], config["dataset"]["configs"]
    assert type(limit) is int
    assert limit > 0
    assert {entry["type"] for entry in entries} == {"local"}
    for entry in entries:
        assert type(entry["path"]) is str
        assert type(entry["weight"]) is float
    total = sum(entry["weight"] for entry in entries)
    assert total > 0
    drawn, so_far = {}, 0
    for entry in entries:
        number = min(math.ceil(limit * (entry["weight"] / total)), limit - so_far)
        so_far += number
        path = found(sizes, entry["path"])
        assert path not in drawn
        # It repeats a file as often as it takes.
        drawn[path] = number
    return drawn


READERS = {"data-juicer": read}

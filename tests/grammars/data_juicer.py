"""How Data-Juicer 1.6.1 draws: dataset_builder.py (DatasetBuilder, get_sample_numbers), sample.py (random_sample)."""

import math

from grammars.streaming import load_yaml

MAGIC = ("*", "?", "[", "::", "://")  # what the reader of data files takes for a pattern or a protocol


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
        if any(sign in entry["path"] for sign in MAGIC):
            raise ValueError(f"{entry['path']} is not read as it is")
    total = sum(entry["weight"] for entry in entries)
    assert total > 0
    drawn, so_far = {}, 0
    for entry in entries:
        number = min(math.ceil(limit * (entry["weight"] / total)), limit - so_far)
        so_far += number
        assert entry["path"] not in drawn
        # It repeats a file as often as it takes.
        drawn[entry["path"]] = number
    return drawn


READERS = {"data-juicer": read}

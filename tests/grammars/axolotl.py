"""How axolotl 0.21.0 reads ``datasets:``, and how many rows of each entry it draws.

Sources: utils/schemas/datasets.py (SFTDataset), utils/data/sft.py, utils/data/shared.py.
"""

import yaml

from .huggingface import load


def read(files, sizes):
    config = yaml.safe_load(files["axolotl.yaml"])
    assert set(config) == {"datasets", "shuffle_merged_datasets", "seed"}
    drawn = {}
    for entry in config["datasets"]:
        assert set(entry) == {"path", "ds_type", "type", "weight"}
        weight = entry["weight"]
        assert type(weight) is float
        if not 0 < weight <= 1:
            raise ValueError(f"{weight} is not above 0 and at most 1")
        file, size = load(sizes, entry["ds_type"], entry["path"])
        rows = min(size, max(1, int(size * weight))) if weight < 1 else size
        drawn[file] = drawn.get(file, 0) + rows
    return drawn


READERS = {"axolotl": read}

"""How nanotron reads a data stage: src/nanotron/config/config.py and data/nanoset.py.

https://github.com/huggingface/nanotron
"""

import glob

import yaml


def read(files, sizes):
    (text,) = files.values()
    config = yaml.safe_load(text)
    (stage,) = config["data_stages"]
    assert set(stage) == {"name", "start_training_step", "data"}
    assert stage["start_training_step"] == 1, "You must have a training stage starting at 1"
    assert set(stage["data"]) == {"seed", "num_loading_workers", "dataset"}
    dataset = stage["data"]["dataset"]
    assert set(dataset) == {"dataset_folder", "dataset_weights"}
    folders, weights = dataset["dataset_folder"], dataset["dataset_weights"]
    assert len(folders) == len(weights) == len(set(folders))
    assert all(isinstance(folder, str) and not glob.has_magic(folder) for folder in folders)
    assert all(isinstance(weight, float) and weight > 0 for weight in weights)
    total = sum(weights)
    return {folder: weight / total for folder, weight in zip(folders, weights, strict=True)}


def schedule(weights, lengths):
    """Returns the folder and the sequence of each sample of a pass: always the one that is behind most."""
    drawn = [0] * len(weights)
    order = []
    for number in range(sum(lengths)):
        behind = [weight * max(number, 1.0) - done for weight, done in zip(weights, drawn, strict=True)]
        chosen = behind.index(max(behind))
        order.append((chosen, drawn[chosen] % lengths[chosen]))
        drawn[chosen] += 1
    return order


READERS = {"nanotron": read}

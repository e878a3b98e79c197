"""How TRL 1.16 reads the datasets: of its config (scripts/utils.py: DatasetConfig, get_dataset)."""

import yaml

from grammars.huggingface import load

FIELDS = {"path", "name", "data_dir", "data_files", "split", "columns", "fraction"}


def read(files, sizes):
    config = yaml.safe_load(files["trl.yaml"])
    if set(config) != {"datasets", "streaming"}:
        raise ValueError("Unknown arguments from config file")
    assert config["streaming"] is False
    loaded = []
    for entry in config["datasets"]:
        if not set(entry) <= FIELDS:
            raise TypeError("unexpected keyword argument")
        loaded.append(load(sizes, entry["path"], entry["data_files"], entry["split"]))
    fractions = [entry.get("fraction") for entry in config["datasets"]]
    if any(fraction is not None for fraction in fractions):
        if None in fractions:
            raise ValueError("`fraction` must be set for either all datasets in the mixture or none of them.")
        weights = [fraction / sum(fractions) for fraction in fractions]
        total = min(size / weight for (_, size), weight in zip(loaded, weights, strict=True) if weight > 0)
        loaded = [(file, round(weight * total)) for (file, _), weight in zip(loaded, weights, strict=True)]
        if any(num_rows > sizes[file] for file, num_rows in loaded):
            raise IndexError("select")
    drawn = {}
    for file, num_rows in loaded:
        drawn[file] = drawn.get(file, 0) + num_rows
    return drawn


READERS = {"trl": read}

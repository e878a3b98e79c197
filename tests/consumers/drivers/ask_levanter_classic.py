"""Asks the package levanter: what it parses, which files it opens, and what its mixture draws."""

import dataclasses

import draccus
from asked import main
from levanter.data import ListAsyncDataset, MixtureDataset
from levanter.data.text import LMMixtureDatasetConfig


@dataclasses.dataclass
class Training:
    """A training config, as far as data are concerned."""

    data: LMMixtureDatasetConfig


def read(request):
    """Returns what the training program would have after parsing the file."""
    data = draccus.parse(Training, request["file"], args=[]).data
    return {
        "urls": {name: list(config.train_urls) for name, config in data.configs.items()},
        "packs": {name: config.format.pack for name, config in data.configs.items()},
        "weights": data.train_weights,
        "block": data.mixture_block_size,
    }


def draw(request):
    """Returns how many of the first sequences come from each domain, when each row is a sequence."""
    data = draccus.parse(Training, request["file"], args=[]).data
    datasets = {name: ListAsyncDataset(rows_of(config), is_complete=True) for name, config in data.configs.items()}
    mixed = MixtureDataset(
        datasets, data.train_weights, block_size=data.mixture_block_size, key=0, stop_strategy=data.stop_strategy
    ).as_sync_dataset()
    drawn = {}
    for start in range(0, request["number"], 2048):
        for row in mixed.get_batch(list(range(start, min(start + 2048, request["number"])))):
            drawn[row["domain"]] = drawn.get(row["domain"], 0) + 1
    return drawn


def rows_of(source):
    """Returns the rows that a source reads for training."""
    shards = source.get_shard_source("train")
    return [row for shard in shards.shard_names for row in shards.open_shard_at_row(shard, 0)]


if __name__ == "__main__":
    main({"read": read, "draw": draw})

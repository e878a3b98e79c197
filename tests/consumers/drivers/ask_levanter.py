"""Asks Marin's Levanter: what it parses, which files it opens, and what its mixture draws."""

import dataclasses
import warnings

import draccus
from asked import main
from levanter.data import ListAsyncDataset, MixtureDataset
from levanter.data.text import LmDataConfig


@dataclasses.dataclass
class Training:
    """A training config, as far as data are concerned."""

    data: LmDataConfig = dataclasses.field(default_factory=LmDataConfig)


def read(request):
    """Returns what the training program would have after parsing the file."""
    data = draccus.parse(Training, request["file"], args=[]).data
    return {
        "urls": {name: component.source.train_urls for name, component in data.components.items()},
        "packs": {name: component.pack for name, component in data.components.items()},
        "weights": data.train_weights,
        "block": data.mixture_block_size,
    }


def rows_of(source):
    """Returns the rows that a source reads for training."""
    shards = source.get_shard_source("train")
    return [row for shard in shards.shard_names for row in shards.open_shard_at_row(shard, 0)]


def draw(request):
    """Returns how many of the first sequences come from each domain, when each row is a sequence."""
    data = draccus.parse(Training, request["file"], args=[]).data
    rows = {name: rows_of(component.source) for name, component in data.components.items()}
    return count(mixture(rows, data.train_weights, data.mixture_block_size, data.stop_strategy), request["number"])


def mixture(rows, weights, block, stop_strategy="restart"):
    """Returns the mixed dataset, as LmDataConfig.train_set makes it."""
    datasets = {name: ListAsyncDataset(values) for name, values in rows.items()}
    return MixtureDataset(datasets, weights, block_size=block, key=0, stop_strategy=stop_strategy)


def count(mixed, number):
    """Draws from a mixture, in batches."""
    drawn = {}
    dataset = mixed.as_sync_dataset()
    for start in range(0, number, 2048):
        for row in dataset.get_batch(list(range(start, min(start + 2048, number)))):
            drawn[row["domain"]] = drawn.get(row["domain"], 0) + 1
    return drawn


def draw_naive(request):
    """Draws with weights written by hand; returns the counts and the warnings."""
    rows = {name: [{"domain": name}] * 10 for name in request["weights"]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mixed = mixture(rows, request["weights"], request["block"])
    return {"drawn": count(mixed, request["number"]), "warnings": [str(warning.message) for warning in caught]}


if __name__ == "__main__":
    main({"read": read, "draw": draw, "draw_naive": draw_naive})

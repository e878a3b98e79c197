"""How torchtitan takes its mixtures: hf_datasets/interleaved.py of 0.3.0, components/data of what follows it.

The files are run against stand-ins of its classes.  https://github.com/pytorch/torchtitan
"""

import fnmatch
import math
from types import SimpleNamespace

from grammars.huggingface import load
from grammars.streaming import make_module, run

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def read_released(files, sizes):
    def make_source(*, dataset_path, load_dataset_kwargs, sample_processor, infinite=True, weight=1):
        assert sample_processor({"messages": CHAT}) == CHAT
        assert infinite, "it would end with the first domain that runs out"
        return load(sizes, dataset_path, **load_dataset_kwargs)[0], weight

    def make_loader(*, sources, seed=42, stopping_strategy="on_first_exhausted"):
        assert sources, "At least one source should be defined."
        assert type(seed) is int
        drawn = {}
        for path, weight in sources:
            assert path not in drawn
            assert weight >= 0, "All weights must be non-negative."
            drawn[path] = weight
        total = sum(drawn.values())
        assert total > 0, "Sum of weights must be positive."
        return {path: weight / total for path, weight in drawn.items()}

    module = make_module(
        "torchtitan.hf_datasets.text_datasets",
        ChatDataSource=make_source,
        InterleavedChatDataLoader=SimpleNamespace(Config=make_loader),
    )
    return run(files["torchtitan_mixture.py"], **{module.__name__: module})["dataloader"]()


def found_by(pattern, path):
    """Whether Python's glob finds a file: it compares part by part, and hidden ones only with a leading point."""
    patterns, parts = pattern.split("/"), path.split("/")
    return len(patterns) == len(parts) and all(
        fnmatch.fnmatchcase(part, wanted) and (not part.startswith(".") or wanted.startswith("."))
        for wanted, part in zip(patterns, parts, strict=True)
    )


def read_grain(files, sizes):
    def make_processor(*, messages_fn):
        assert messages_fn({"messages": CHAT}) == CHAT

    def make_source(*, patterns):
        (pattern,) = patterns
        (path,) = [path for path in sizes if found_by(pattern, path)]
        assert not path.endswith((".parquet", ".json"))
        return path

    def make_single(*, source, processor, post_filters=()):
        # The processor gives None for rows that it cannot use.
        assert not all(keep(None) for keep in post_filters)
        assert all(keep({"input": []}) for keep in post_filters)
        return SimpleNamespace(path=source, packed=False)

    def pack(*, dataset):
        return SimpleNamespace(path=dataset.path, packed=True)

    def weigh(*, dataset, weight):
        assert dataset.packed, "weights would count rows"
        return dataset.path, weight

    def mix(*, datasets):
        drawn = {}
        for path, weight in datasets:
            assert path not in drawn
            assert math.isfinite(weight)
            assert weight > 0, "DatasetMixConfig requires positive-weight datasets"
            drawn[path] = weight
        return {path: weight / sum(drawn.values()) for path, weight in drawn.items()}

    def make_loader(*, dataset, seed, repeat=False):
        assert type(seed) is int
        assert repeat, "it would end with the first domain that runs out"
        return dataset

    data = make_module(
        "torchtitan.components.data",
        DatasetMixConfig=mix,
        FirstFitPackingConfig=pack,
        GrainDataLoader=SimpleNamespace(Config=make_loader),
        IndexedJsonlSource=SimpleNamespace(Config=make_source),
        SingleDatasetConfig=make_single,
        WeightedDataset=weigh,
    )
    text = make_module("torchtitan.hf_datasets.text_datasets", ChatProcessor=SimpleNamespace(Config=make_processor))
    modules = {module.__name__: module for module in (data, text)}
    return run(files["torchtitan_grain_mixture.py"], **modules)["dataloader"]()


READERS = {"torchtitan": read_released, "torchtitan-grain": read_grain}

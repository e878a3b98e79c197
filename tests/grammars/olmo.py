"""How OLMo-core reads its lists of sources (olmo_core/data/source_mixture.py, data/composable) and Dolma its rates.

https://github.com/allenai/OLMo-core and dolma/tokenizer/reshard.py of https://github.com/allenai/dolma.
"""

import math
import urllib.parse
from pathlib import PurePosixPath
from types import SimpleNamespace

import yaml

from grammars import Drawn
from grammars.streaming import make_module, run

FIELDS = {"source_name", "target_ratio", "paths", "max_repetition_ratio", "max_source_fraction"}


def read_olmo_core(files, sizes):
    (text,) = files.values()
    data = yaml.safe_load(text)
    assert set(data) == {"sources"}
    drawn, passes = {}, {}
    names = set()
    total = 0.0
    for source in data["sources"]:
        assert set(source) <= FIELDS
        assert isinstance(source["source_name"], str)
        assert isinstance(source["target_ratio"], float)
        assert 0 < source["target_ratio"] <= 1
        assert 0 < source.get("max_source_fraction", 1.0) <= 1
        assert source.get("max_repetition_ratio", 1.0) >= 1
        assert source["source_name"] not in names, "tokens are counted by the source's name"
        names.add(source["source_name"])
        (path,) = source["paths"]
        check_array_path(path)
        assert path not in drawn
        drawn[path] = source["target_ratio"]
        passes[path] = source.get("max_source_fraction", 1.0) * source.get("max_repetition_ratio", 1.0)
        total += source["target_ratio"]
    assert abs(total - 1.0) <= 1e-8 + 1e-5, f"target_ratios must sum to 1.0, got {total}"
    return Drawn(drawn, most_passes=passes)


def check_array_path(path):
    assert isinstance(path, str)
    assert path
    if "*" in path and "://" not in path:
        # list_directory gives paths of pathlib, with which the pattern is compared.
        assert str(PurePosixPath(path)) == path, f"Glob pattern '{path}' did not match any files"


def read_composable(files, sizes):
    """Runs the file as ``mixing_instance_source.py`` and ``concat_and_chunk_instance_source.py`` take it."""

    def from_npy(*npy_paths, tokenizer, sequence_length, label=None):
        assert isinstance(label, str)
        assert tokenizer == "tokenizer"
        (path,) = npy_paths
        check_array_path(path)
        return path

    def make_spec(*, source, ratio, max_repetition_factor=1.0, label=None):
        assert ratio > 0, "Ratio must be greater than 0."
        assert max_repetition_factor >= 1.0, "Max repetition must be at least 1.0."
        return source, ratio, max_repetition_factor

    def make_mixing(*, source_specs, num_tokens=None, seed=None):
        assert type(seed) is int
        assert num_tokens is None or num_tokens >= 0
        drawn, passes = {}, {}
        for path, ratio, repetition in source_specs:
            assert path not in drawn
            drawn[path], passes[path] = ratio, repetition
        assert math.isclose(sum(drawn.values()), 1.0, rel_tol=1e-5), "it would normalize, and warn"
        return Drawn(drawn, most_passes=passes, tokens=num_tokens)

    module = make_module(
        "olmo_core.data.composable",
        ConcatAndChunkInstanceSource=SimpleNamespace(Config=SimpleNamespace(from_npy=from_npy)),
        MixingInstanceSource=SimpleNamespace(Config=make_mixing, Spec=SimpleNamespace(Config=make_spec)),
    )
    mixture = run(files["olmo_core_mixture.py"], **{module.__name__: module})["mixture"]
    whole, cut = (mixture("tokenizer", sequence_length) for sequence_length in (1, 64))
    tokens = whole.said["tokens"]
    # A part of a sequence cannot be drawn.
    assert cut.said["tokens"] == (tokens and tokens // 64 * 64)
    return whole


def read_dolma(files, sizes):
    (text,) = files.values()
    config = yaml.safe_load(text)
    assert set(config) == {"source_prefixes", "destination_prefix", "max_size_bytes", "random_seed"}
    assert isinstance(int(config["max_size_bytes"]), int)
    drawn = {}
    for source in config["source_prefixes"]:
        assert set(source) == {"prefix", "sample_rate"}
        assert source["sample_rate"] > 0
        prefix = source["prefix"]
        assert isinstance(prefix, str)
        scheme = urllib.parse.urlparse(prefix).scheme
        assert scheme in {"", "s3"}, f"Invalid protocol: {scheme}"
        # os.walk goes into every folder below.
        for other in drawn:
            assert not PurePosixPath(prefix).is_relative_to(other)
            assert not PurePosixPath(other).is_relative_to(prefix)
        # It takes whole files: exact where each row is one, and never nothing of a part.
        whole = math.floor(source["sample_rate"])
        part = source["sample_rate"] - whole
        drawn[prefix] = whole * sizes[prefix] + (max(1, round(part * sizes[prefix])) if part else 0)
    return drawn


READERS = {"olmo-core": read_olmo_core, "olmo-core-composable": read_composable, "dolma": read_dolma}

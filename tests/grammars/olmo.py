"""How OLMo-core reads its lists of sources (olmo_core/data/source_mixture.py, data/composable) and Dolma its rates.

https://github.com/allenai/OLMo-core and dolma/tokenizer/reshard.py of https://github.com/allenai/dolma.
"""

import ast
import math
import urllib.parse
from pathlib import PurePosixPath

import yaml

FIELDS = {"source_name", "target_ratio", "paths", "max_repetition_ratio", "max_source_fraction"}


def read_olmo_core(files, sizes):
    (text,) = files.values()
    data = yaml.safe_load(text)
    assert set(data) == {"sources"}
    drawn = {}
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
        total += source["target_ratio"]
    assert abs(total - 1.0) <= 1e-8 + 1e-5, f"target_ratios must sum to 1.0, got {total}"
    return drawn


def check_array_path(path):
    assert isinstance(path, str)
    assert path
    if "*" in path and "://" not in path:
        # list_directory gives paths of pathlib, with which the pattern is compared.
        assert str(PurePosixPath(path)) == path, f"Glob pattern '{path}' did not match any files"


def read_composable(files, sizes):
    (text,) = files.values()
    constants = python_constants(text)
    assert constants["MAX_REPETITION"] >= 1.0, "Max repetition must be at least 1.0."
    assert constants["NUM_TOKENS"] is None or constants["NUM_TOKENS"] > 0
    drawn = {}
    for name, path, ratio in constants["DOMAINS"]:
        assert isinstance(name, str)
        check_array_path(path)
        assert ratio > 0, "Ratio must be greater than 0."
        assert path not in drawn
        drawn[path] = ratio
    assert math.isclose(sum(drawn.values()), 1.0, rel_tol=1e-5)
    return drawn


def python_constants(text):
    """Returns what a Python file assigns literally, after compiling the whole of it."""
    tree = ast.parse(text)
    compile(tree, "file", "exec")
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


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
        whole = math.floor(source["sample_rate"])
        drawn[prefix] = (whole + (source["sample_rate"] - whole)) * sizes[prefix]
    return drawn


READERS = {"olmo-core": read_olmo_core, "olmo-core-composable": read_composable, "dolma": read_dolma}

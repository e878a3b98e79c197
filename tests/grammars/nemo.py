"""How NeMo 2, Megatron-Bridge and NeMo-Automodel read blends and domain mixtures."""

import ast
import math
import warnings

import yaml

from . import Drawn
from .huggingface import load
from .megatron import drawn, read_blend
from .streaming import make_module, run


def read_nemo(files, sizes):
    """Reads the argument ``paths`` of PreTrainingDataModule."""
    (text,) = files.values()
    paths = yaml.safe_load(text)["paths"]
    if not all(isinstance(word, str) for word in paths) or "${" in "".join(paths):
        raise TypeError("a word that is no plain string")
    for word in paths[::2]:
        float(word)
    return drawn(*read_blend(paths))


def read_bridge(files, sizes):
    """Reads the pair that dataset.blend takes."""
    prefixes, weights = run(files["megatron_bridge_blend.py"])["BLEND"]
    if len(prefixes) != len(weights):
        raise AssertionError("blend prefixes and weights must be equal in number")
    return drawn(prefixes, weights)


def read_bridge_sft(files, sizes):
    """Counts the rows that blend_sft_rows takes of each source."""

    def make_source(*, path_or_dataset, load_kwargs, split="train"):
        assert set(load_kwargs) == {"data_files"}
        return load(sizes, path_or_dataset, **load_kwargs, split=split)

    module = make_module("megatron.bridge.data.builders", HFDatasetSourceConfig=make_source)
    names = run(files["megatron_bridge_sft.py"], **{module.__name__: module})
    assert isinstance(names["BLEND_SEED"], int)
    counts = {}
    for (path, size), weight in zip(names["SOURCES"], names["SOURCE_WEIGHTS"], strict=True):
        if not math.isfinite(weight) or weight <= 0:
            raise ValueError(f"Blend weights must be positive, got {weight}")
        assert path not in counts
        passes = int(weight)
        counts[path] = passes * size + round(size * (weight - passes))
    return counts


def translated(value):
    """What ConfigNode of NeMo-Automodel makes of a scalar."""
    if not isinstance(value, str):
        return value
    if "$" in value:
        raise KeyError("an environment variable")
    words = {"none": None, "None": None, "true": True, "True": True, "false": False, "False": False}
    if value in words:
        return words[value]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(value) if len(value) <= 1000 else value
    except Exception:
        return value


def read_automodel(files, sizes):
    """Returns how often each domain is sampled, and its part in the objective.

    The checks are those of DomainMixtureConfig and DomainMixture, which divides both weights by their sums.
    """
    (text,) = files.values()
    config = yaml.safe_load(text)
    assert config["dataset"]["splits_to_build"] == "train"
    prefixes, weights = read_blend([translated(word) for word in config["dataset"]["paths"]["train"]])
    domains = [{key: translated(value) for key, value in d.items()} for d in config["domain_mixture"]["domains"]]
    if len(domains) < 2:
        raise ValueError("domain_mixture.domains must contain at least two domains")
    names = [domain["name"] for domain in domains]
    if len(set(names)) < len(names) or "weighted" in names or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"names {names}")
    for domain in domains:
        if not (domain["sampling_weight"] > 0 and math.isfinite(domain["sampling_weight"])):
            raise ValueError(domain)
        if not (domain["objective_weight"] >= 0 and math.isfinite(domain["objective_weight"])):
            raise ValueError(domain)
    if [domain["path"].strip() for domain in domains] != prefixes:
        raise ValueError("domain_mixture paths must match the corpus prefixes")
    shares = drawn(prefixes, weights)
    total = sum(domain["sampling_weight"] for domain in domains)
    for domain, share in zip(domains, shares.values(), strict=True):
        if not math.isclose(domain["sampling_weight"] / total, share, rel_tol=1e-6, abs_tol=1e-8):
            raise ValueError("domain_mixture sampling weights must match")
    whole = sum(domain["objective_weight"] for domain in domains)
    objective = {domain["name"]: domain["objective_weight"] / whole for domain in domains}
    return Drawn(zip(names, shares.values(), strict=True), objective=objective)


READERS = {
    "nemo": read_nemo,
    "megatron-bridge": read_bridge,
    "megatron-bridge-sft": read_bridge_sft,
    "nemo-automodel": read_automodel,
}

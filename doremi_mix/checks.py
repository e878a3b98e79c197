"""Settings that contradict each other or the data, found before anything is trained."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from doremi_mix.bpe import SMALLEST_VOCABULARY
from doremi_mix.config import MIXTURE_WORDS, Config, TrainingConfig
from doremi_mix.errors import ConfigError, ModelError
from doremi_mix.presets import PRESETS, is_config_only


def check_vocab_size(vocab_size: int | None, *, given: str | None) -> None:
    """Raises ConfigError when a BPE of this size cannot be trained; a given tokenizer has its own size."""
    if given is None and vocab_size is not None and vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"tokenize.vocab_size must be at least {SMALLEST_VOCABULARY} (256 bytes and 2 special tokens), "
            f"got {vocab_size}"
        )


def check_reference_weights(config: Config, names: Sequence[str]) -> None:
    """Raises ConfigError when given reference weights miss a domain, name an unknown one, or are not positive."""
    weights = config.reference.weights
    if not isinstance(weights, dict):
        return
    for name in sorted(set(weights) ^ set(names)):
        problem = "is missing from" if name in names else "is no domain, but stands in"
        raise ConfigError(
            f"reference.weights: {name!r} {problem} the weights; give one weight to each of {list(names)}"
        )
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight <= 0:
            raise ConfigError(f"reference.weights: the weight of {name!r} must be a positive number, got {weight}")


def check_proxy_batch(config: Config, num_domains: int) -> None:
    """Raises ConfigError when group DRO's batch has fewer sequences than there are domains."""
    batch_size = config.proxy.batch_size
    if config.proxy.method != "doremi":
        return
    if batch_size is not None and batch_size < num_domains:
        raise ConfigError(
            f"proxy.batch_size is {batch_size}, fewer than the {num_domains} domains, each of which must be in every "
            f"batch; raise it to {num_domains} or more"
        )


def check_compare(given_steps: int | None) -> None:
    """Raises ConfigError when the comparison's steps are given: they follow from its budget and batch."""
    if given_steps is not None:
        raise ConfigError(
            f"compare.steps is {given_steps}, but the steps follow from compare.token_budget and compare.batch_size; "
            "give one of these instead"
        )


def check_headroom(config: Config) -> None:
    """Raises ConfigError when the proxy is not the reference at half its training, as headroom needs it."""
    reference, proxy = config.reference, config.proxy
    if proxy.method != "headroom":
        return
    assert reference.steps and reference.batch_size and proxy.steps and proxy.batch_size
    if proxy.steps * proxy.batch_size >= reference.steps * reference.batch_size:
        raise ConfigError(
            f"proxy.steps is {proxy.steps}, no shorter a training than the reference's ({reference.steps} steps); "
            "headroom is what the rest of the reference's training brings: leave proxy.steps out, or give half"
        )
    if proxy.model != reference.model:
        raise ConfigError(
            f"proxy.model is {proxy.model}, but reference.model is {reference.model}; headroom compares two lengths of "
            "one training: give both the same model, or proxy.method=doremi"
        )


def check_evidence(config: Config) -> None:
    """Raises ConfigError when the spread over seeds is to decide, and there is one seed."""
    if config.weights.shrink == "evidence" and config.weights.num_seeds < 2:
        raise ConfigError(
            "weights.shrink is evidence, which is the spread over seeds, but weights.num_seeds is 1; raise it to 3 or "
            "give a number from 0 to 1"
        )


def check_mixture_weights(config: Config) -> None:
    """Raises ConfigError when mixture.weights is no word, no entered mixture and no file."""
    wanted = config.mixture.weights
    if wanted in MIXTURE_WORDS or wanted in config.compare.also or Path(wanted).expanduser().is_file():
        return
    raise ConfigError(
        f"mixture.weights: {wanted!r} is none of {', '.join(MIXTURE_WORDS)}, and no file; give one of these words or a "
        "domain_weights.json"
    )


def check_adapters(section: TrainingConfig, name: str) -> None:
    """Raises ConfigError for LoRA settings that have nothing to work on."""
    if section.lora_rank is None:
        for key in ("lora_alpha", "lora_target_modules"):
            if getattr(section, key) is not None:
                raise ConfigError(f"{name}.{key} is given without {name}.lora_rank; give both, or neither")
        return
    if section.model in PRESETS or is_config_only(str(section.model)):
        raise ConfigError(
            f"{name}.lora_rank is {section.lora_rank}, but {name}.model {section.model} starts from fresh weights, "
            "which adapters cannot make up for; give a checkpoint, or no lora_rank"
        )
    if find_spec("peft") is None:
        raise ModelError(f"{name}.lora_rank: LoRA needs peft; run: pip install 'doremi-mix[lora]'")


def check_model_name(name: str, key: str) -> None:
    """Raises ModelError for what is no preset, no path and no name of the hub."""
    if name.endswith(".gguf") and find_spec("gguf") is None:
        raise ModelError(f"{key}: {name} needs gguf; run: pip install 'doremi-mix[gguf]'")
    if name in PRESETS or Path(name).expanduser().exists() or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return
    raise ModelError(
        f"{key}: {name!r} is no preset ({', '.join(PRESETS)}), no path that exists and no hub name (owner/model); "
        "give one of these"
    )

"""Settings that contradict each other or the data, found before anything is trained."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from doremi_mix.bpe import SMALLEST_VOCABULARY
from doremi_mix.config import MIXTURE_WORDS, Config, FinetuneConfig, TrainingConfig
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


def check_export(config: Config) -> None:
    """Raises ConfigError when a format is unknown, or the paths are neither a template nor a file."""
    from doremi_mix.export_files import format_named
    from doremi_mix.export_inputs import read_paths

    for name in config.export.formats:
        format_named(name)
    if config.export.paths is not None:
        read_paths(config.export.paths)


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


def check_finetune(config: Config) -> None:
    """Finds now what would otherwise stop stage finetune after the rest of the run.

    Raises:
        ConfigError: its settings contradict each other, or name a file that is not there.
        ModelError: the main model is no path and no name of the hub, is no trained one, or a package is missing.
    """
    section = config.finetune
    if section.model is None:
        return
    if section.model in PRESETS or is_config_only(section.model):
        raise ModelError(f"finetune.model: {section.model} starts from random weights; give a trained checkpoint")
    if find_spec("peft") is None:
        raise ModelError("finetune: LoRA needs peft; run: pip install 'doremi-mix[lora]'")
    if section.quantization != "none" and find_spec("bitsandbytes") is None:
        raise ModelError(
            f"finetune.quantization: {section.quantization} needs bitsandbytes; "
            "run: pip install 'doremi-mix[quantized]'"
        )
    if section.quantization != "none" and section.shard:
        raise ConfigError(
            f"finetune.quantization is {section.quantization}, which finetune.shard cannot split over processes; leave "
            "out one of the two"
        )
    if section.data is None and config.mixture.token_budget is None:
        raise ConfigError(
            "finetune trains on the mixture, but mixture.token_budget is missing; give it, for example: "
            "--set mixture.token_budget=1000000, or finetune.data"
        )
    targets = section.lora_target_modules
    if section.lora_shared_input and (targets is None or not {"q_proj", "k_proj", "v_proj"} <= set(targets)):
        raise ConfigError(
            "finetune.lora_shared_input is for q_proj, k_proj and v_proj, but finetune.lora_target_modules is "
            f"{'every layer' if targets is None else ', '.join(targets)}; name the three, or set it to false"
        )


def check_main_model(config: Config) -> None:
    """Looks at what finetune and evaluate take from outside the run: configuration and tokenizer of the model, files.

    It takes a second; the model's weights come hours later.

    Raises:
        ConfigError: a file or folder does not exist, or the model takes fewer tokens than it will get.
        ModelError: the model cannot be read, does not fit its tokenizer, has not the layers that get adapters, or has a
            layout that nothing loads any more.
    """
    section = config.finetune
    if section.model is None:
        return
    path = Path(section.model).expanduser()
    if not path.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", section.model):
        raise ModelError(
            f"finetune.model: {section.model} does not exist, and is no hub name (owner/model); give the main model's "
            "folder"
        )
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"finetune.model: {section.model} is an adapter and not a whole model; give its base")
    if section.data is not None and not Path(section.data).is_file():
        found = "is a folder" if Path(section.data).is_dir() else "does not exist"
        raise ConfigError(f"finetune.data: {section.data} {found}; give a file of examples, or leave it out")
    for key in ("task_folder", "semi_final_task_folder"):
        folder = getattr(config.evaluate, key)
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"evaluate.{key}: {folder} is no folder; give one with task files of lm-eval")
    from doremi_mix.tokenizer import load_tokenizer, tokenizer_files

    name = section.model
    if section.tokenizer in (None, name) and path.is_dir() and not tokenizer_files(path):
        raise ModelError(f"finetune.model: {name} has no tokenizer beside its weights; give one: finetune.tokenizer")
    if name.endswith(".gguf"):
        # What it holds is known once it is loaded.
        if config.evaluate.tasks and section.tokenizer in (None, name):
            raise ConfigError(
                f"evaluate.tasks: lm-eval cannot use the tokenizer inside {name}; give finetune.tokenizer a folder "
                "with the model's own, or leave evaluate.tasks out"
            )
        return
    settings = _read_model_settings(section)
    tokenizer = load_tokenizer(section.tokenizer or name, trust_remote_code=section.trust_remote_code)
    if tokenizer.vocab_size > settings.vocab_size:
        raise ModelError(
            f"finetune.tokenizer: {tokenizer.name} has {tokenizer.vocab_size:,} tokens, but {name} has embeddings for "
            f"{settings.vocab_size:,}; give the model's own tokenizer"
        )
    positions = getattr(settings, "max_position_embeddings", None)
    lengths = {"finetune.max_example_tokens": section.max_example_tokens}
    if config.evaluate.tasks:
        lengths["evaluate.max_length"] = config.evaluate.max_length
    for key, length in lengths.items():
        if isinstance(positions, int) and length is not None and length > positions:
            raise ConfigError(f"{key} is {length:,}, but {name} takes {positions:,} tokens; lower it")
    if not section.trust_remote_code:
        _check_layers(section, settings)


def _read_model_settings(section: FinetuneConfig) -> Any:
    """Returns the main model's transformers configuration."""
    from transformers import AutoConfig

    from doremi_mix.errors import short_reason

    name = str(section.model)
    raw = Path(name).expanduser() / "config.json"
    if raw.is_file() and '"baichuan"' in raw.read_text(encoding="utf-8", errors="replace"):
        raise ModelError(
            f"finetune.model: {name} is Baichuan2 in its original layout, which current libraries cannot run; convert "
            f"it first: doremi-mix baichuan convert {name} DST"
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"finetune.model: {name}: its configuration cannot be read ({short_reason(error)}); give a checkpoint's "
            "folder or hub name"
        ) from None


def _check_layers(section: FinetuneConfig, settings: Any) -> None:
    """Finds the layers that are to get adapters in a model without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from doremi_mix.adapter_layers import shared_groups, target_names
    from doremi_mix.finetune_plan import finetune_lora

    lora = finetune_lora(section)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except Exception:  # an architecture of its own ways; loading it will tell
        return
    try:
        shared_groups(model, lora.shared_input, target_names(model, lora.target_modules))
    except ModelError as error:
        raise ModelError(f"finetune.{error}, or set finetune.preset=modern") from None


def check_evaluate(config: Config) -> None:
    """Finds now what would otherwise stop stage evaluate after the rest of the run.

    Raises:
        ConfigError: its settings contradict each other, or name a folder that is not there.
        ModelError: a package is missing.
    """
    section = config.evaluate
    if section.tasks and find_spec("lm_eval") is None:
        raise ModelError("evaluate.tasks: benchmarks need lm-eval; run: pip install 'doremi-mix[evaluate]'")
    if "contest" in section.tasks and len(section.tasks) > 1:
        raise ConfigError("evaluate.tasks: contest stands for its seven tasks; give it alone, or tasks by name")
    if section.semi_final_task_folder is not None and section.tasks != ("contest",):
        raise ConfigError("evaluate.semi_final_task_folder is for evaluate.tasks=contest; leave it out")
    if not section.tasks and (section.task_folder or section.semi_final_task_folder):
        raise ConfigError("evaluate.task_folder is given, but no evaluate.tasks; name the tasks, or set it to contest")
    if section.base_scores == "published" and (
        section.tasks != ("contest",) or section.semi_final_task_folder is not None
    ):
        raise ConfigError(
            "evaluate.base_scores is published, but scores were published for the contest's preliminary items only; "
            "set it to measured, or evaluate.tasks to contest without semi_final_task_folder"
        )
    if config.finetune.model is not None and not section.tasks and section.held_out_examples == 0:
        raise ConfigError(
            "evaluate has nothing to do: evaluate.tasks is empty and evaluate.held_out_examples is 0; give one of them"
        )


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

"""Settings of the fine-tune that nobody gave: those of the preset, and what the memory allows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from doremi_mix.config import Config, FinetuneConfig

if TYPE_CHECKING:
    from doremi_mix.adapters import LoraSettings

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""What W_pack of Baichuan2 becomes in Llama layout."""

PRESETS: dict[str, dict[str, Any]] = {
    # The rules of the BetterMixture challenge.  Its learning rate was one of 1e-3, 1e-4 and 1e-5; the first is what
    # teams in its first and third place took.
    "contest": {
        "token_budget": 10_000_000,
        "max_example_tokens": 1024,
        "packing": "none",
        "skip_plain_text": True,
        "batch_size": 256,
        "learning_rate": 1e-3,
        "lora_rank": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.1,
        "lora_target_modules": ATTENTION_PROJECTIONS,
        "lora_shared_input": True,
    },
    "modern": {
        "token_budget": None,
        "max_example_tokens": 2048,
        "packing": "documents",
        "skip_plain_text": False,
        "batch_size": 64,
        "learning_rate": 2e-4,
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
        "lora_target_modules": None,
        "lora_shared_input": False,
    },
}
BETAS = (0.9, 0.999)
"""AdamW's, in the contest and by default of most trainers."""


def choose_finetune(config: Config, hardware: str) -> FinetuneConfig:
    """Fills the settings of stage finetune that are null.

    Args:
        config: as given.
        hardware: ``cuda`` or ``cpu``.
    """
    section = config.finetune
    preset = PRESETS[section.preset]
    chosen = {key: value for key, value in preset.items() if getattr(section, key) is None}
    if section.lora_target_modules is not None and section.lora_shared_input is None:
        # The preset's choice is about its own layers.
        chosen["lora_shared_input"] = set(ATTENTION_PROJECTIONS) <= set(section.lora_target_modules) and bool(
            preset["lora_shared_input"]
        )
    if section.max_example_tokens is None and config.tokenize.max_example_tokens is not None:
        chosen["max_example_tokens"] = config.tokenize.max_example_tokens
    if section.gradient_checkpointing is None:
        chosen["gradient_checkpointing"] = hardware == "cuda"
    if section.compile is None:
        chosen["compile"] = False
    if section.tokenizer is None:
        chosen["tokenizer"] = section.model
    return section.model_copy(update=chosen)


def finetune_lora(section: FinetuneConfig) -> LoraSettings:
    """Returns the form of the adapters."""
    from doremi_mix.adapters import LoraSettings

    assert section.lora_rank and section.lora_alpha and section.lora_dropout is not None
    return LoraSettings(
        rank=section.lora_rank,
        alpha=section.lora_alpha,
        target_modules=section.lora_target_modules,
        dropout=section.lora_dropout,
        shared_input=ATTENTION_PROJECTIONS if section.lora_shared_input else (),
    )


def micro_batches(section: FinetuneConfig, smallest_batch: int, num_processes: int, micro_batch_size: int) -> int:
    """Returns the micro-batches per step and process.

    Args:
        section: of the stage.
        smallest_batch: sequences in the smallest batch, over all processes.
        num_processes: that share a batch.
        micro_batch_size: sequences that fit a forward pass, where the section says nothing.
    """
    size = section.micro_batch_size or micro_batch_size
    wanted = math.ceil(smallest_batch / (size * num_processes))
    return max(1, min(wanted, smallest_batch // num_processes))

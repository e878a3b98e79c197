"""Frozen base weights in 8 or 4 bits, by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch

from doremi_mix.errors import ModelError

Quantization = Literal["none", "8bit", "4bit"]


def quantized_options(quantization: Quantization, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what transformers' ``from_pretrained`` must be told to hold a model's weights in fewer bits.

    4bit is QLoRA's form: NF4 with quantized constants (https://arxiv.org/abs/2305.14314).

    Args:
        quantization: none, 8bit or 4bit.
        name: of the model, for messages.
        dtype: in which it computes.

    Raises:
        ModelError: bitsandbytes is missing.
    """
    if quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model {name}: holding it in {quantization} needs bitsandbytes, which is not installed; "
            "run: pip install 'doremi-mix[quantized]'"
        )
    from transformers import BitsAndBytesConfig

    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    )
    # The weights are quantized where they will stay.
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": device}}

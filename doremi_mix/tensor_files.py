"""The header of a safetensors file whose tensors are written one after the other.

safetensors' own function wants all tensors of a file in memory at once.  The format is eight bytes with the length of a
JSON header, the header, and the raw tensors (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

DTYPE_CODES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls the kinds of numbers."""


def safetensors_header(forms: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """Returns the bytes before the tensors.

    Args:
        forms: name, kind of numbers and shape of each tensor, in the order in which they follow.

    Raises:
        KeyError: a kind of numbers that is not among ``DTYPE_CODES``.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in forms:
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text

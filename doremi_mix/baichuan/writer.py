"""Writes and checks safetensors shards of the result, block by block (see ``tensor_files`` for the format).

One block is in memory at a time.  The check afterwards reads the file with safetensors' own library, so that nothing
rests on our idea of the format alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from doremi_mix.baichuan.layout import HEAD, LlamaTensor
from doremi_mix.baichuan.shards import ShardReader
from doremi_mix.errors import ModelError
from doremi_mix.tensor_files import safetensors_header

BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A file of the result.

    Attributes:
        file: its name.
        tensors: what it holds, in order.
        num_tensor_bytes: of these.
        num_bytes: of the whole file.
    """

    file: str
    tensors: tuple[LlamaTensor, ...]
    num_tensor_bytes: int
    num_bytes: int


def plan_shards(tensors: Sequence[LlamaTensor], dtype: torch.dtype, max_shard_bytes: int) -> list[ShardPlan]:
    """Fills files with tensors in their order; only a tensor that is larger itself makes a file larger than the limit.

    Args:
        tensors: of the result.
        dtype: of all of them.
        max_shard_bytes: of tensors in a file.
    """
    groups: list[list[LlamaTensor]] = [[]]
    sizes = [0]
    for tensor in tensors:
        size = tensor.num_elements * dtype.itemsize
        if groups[-1] and sizes[-1] + size > max_shard_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(tensor)
        sizes[-1] += size
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = ["model.safetensors"]
    return [
        ShardPlan(name, tuple(group), size, len(_header(group, dtype)) + size)
        for name, group, size in zip(names, groups, sizes, strict=True)
    ]


def write_shard(path: Path, plan: ShardPlan, reader: ShardReader, advance: Callable[[int], None]) -> None:
    """Writes a shard and makes sure that it has reached the disk.

    Args:
        path: where to.
        plan: what it holds.
        reader: of the original's tensors.
        advance: is told the number of bytes after each block.

    Raises:
        ModelError: a weight of the original is not finite.
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        file.write(_header(plan.tensors, reader.dtype))
        for tensor in plan.tensors:
            for block in _blocks(tensor, reader):
                if not torch.stack(torch.aminmax(block)).isfinite().all():
                    raise ModelError(
                        f"{reader.path_of(tensor.source)}: {tensor.source} holds values that are not finite; "
                        f"fetch the file again"
                    )
                file.write(_bytes(block).data)
                advance(block.nbytes)
        file.flush()
        os.fsync(file.fileno())


def check_shard(path: Path, plan: ShardPlan, reader: ShardReader) -> int:
    """Reads a written shard again and compares every bit with the original.

    Args:
        path: the shard.
        plan: what it should hold.
        reader: of the original's tensors.

    Returns:
        How many rows of the head are all zeros: they have no direction, and stay as they are.

    Raises:
        ModelError: something differs.
    """
    from safetensors import SafetensorError, safe_open

    num_zero_rows = 0
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != {tensor.name for tensor in plan.tensors}:
                raise _differs(path, "the list of its tensors")
            for tensor in plan.tensors:
                num_zero_rows += _check_tensor(path, tensor, file.get_tensor(tensor.name), reader)
    except SafetensorError:
        raise _differs(path, "its header") from None
    return num_zero_rows


def _blocks(tensor: LlamaTensor, reader: ShardReader) -> Iterator[Tensor]:
    """Yields the rows of a tensor of the result, a few at a time."""
    source = reader.read(tensor.source)
    row_bytes = math.prod(tensor.shape[1:]) * source.itemsize
    step = max(1, BLOCK_BYTES // row_bytes)
    end = tensor.first_row + tensor.shape[0]
    for start in range(tensor.first_row, end, step):
        block = source[start : min(start + step, end)].contiguous()
        yield _unit_rows(block) if tensor.name == HEAD else block


def _unit_rows(rows: Tensor) -> Tensor:
    """Divides rows by their lengths as the original does at every call, in the same format of numbers."""
    # In float16 the smallest length that the function divides by is zero.
    return functional.normalize(rows, dim=1).masked_fill_(~rows.any(dim=1, keepdim=True), 0)


def _check_tensor(path: Path, tensor: LlamaTensor, written: Tensor, reader: ShardReader) -> int:
    """Compares a written tensor with the original; returns the number of zero rows if it is the head."""
    if tuple(written.shape) != tensor.shape or written.dtype != reader.dtype:
        raise _differs(path, f"the form of {tensor.name}")
    row = num_zero_rows = 0
    for block in _blocks(tensor, reader):
        rows = written[row : row + len(block)]
        if not np.array_equal(_words(rows), _words(block)):
            raise _differs(path, tensor.name)
        if tensor.name == HEAD:
            num_zero_rows += _check_lengths(rows, row)
        row += len(block)
    return num_zero_rows


def _check_lengths(rows: Tensor, first_row: int) -> int:
    """Checks that each row has length 1, or is zero; returns the number of the latter."""
    lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    is_zero = lengths == 0
    wrong = ((lengths - 1).abs() > 2 * torch.finfo(rows.dtype).eps + 1e-6) & ~is_zero
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ModelError(
            f"{HEAD}: row {first_row + row:,} has length {float(lengths[row]):.4g} after it was divided by its length: "
            f"its values are too small or too large for their format; fetch the weight files again"
        )
    return int(is_zero.sum())


def _header(tensors: Sequence[LlamaTensor], dtype: torch.dtype) -> bytes:
    return safetensors_header((tensor.name, dtype, tensor.shape) for tensor in tensors)


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _words(tensor: Tensor) -> NDArray[Any]:
    """The memory of a contiguous tensor in the largest units that fit, which are compared the fastest."""
    memory = _bytes(tensor)
    return memory.view(np.uint64) if memory.size % 8 == 0 else memory


def _differs(path: Path, what: str) -> ModelError:
    return ModelError(
        f"{path}: {what} cannot be read back as written; the disk or the memory is faulty, convert again elsewhere"
    )

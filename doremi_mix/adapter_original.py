"""Whether a folder holds the Baichuan2, in its original layout, that an adapter's base was converted from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doremi_mix.adapter_matrices import read_adapter
from doremi_mix.adapters import base_of, read_json
from doremi_mix.baichuan.layout import CONFIG, HEAD, LlamaTensor, llama_tensors, read_layout
from doremi_mix.baichuan.shards import WeightFiles, find_weights, open_shard
from doremi_mix.errors import ModelError

_CONVERSION = "conversion.json"


def check_original(adapter: Path, original: Path, *, say: Callable[[str], None]) -> None:
    """Checks that an adapter of converted Baichuan2 belongs to a checkpoint in the original layout.

    The adapter's base says what it was converted from, and holds the same numbers: names and sizes of the weight files,
    the configuration, and one row of each tensor are compared.

    Args:
        adapter: its folder.
        original: the folder of Baichuan2 as it was published.
        say: prints one line, where the base does not say what it was converted from.

    Raises:
        ModelError: it is another model, or another one of the same form.
    """
    _, pairs = read_adapter(adapter)
    original = original.expanduser()
    if (original / _CONVERSION).is_file():
        raise ModelError(f"{original}: is the converted model; give the folder with Baichuan2 in its original layout")
    tensors = {tensor.name: tensor for tensor in llama_tensors(read_layout(original))}
    weights = find_weights(original)
    for name, pair in pairs.items():
        tensor, expected = tensors.get(f"{name}.weight"), (pair.b_NR.shape[0], pair.a_RD.shape[1])
        if tensor is None:
            raise ModelError(
                f"adapter {adapter}: adapts {name}, which {original} does not have; give the one that it was trained on"
            )
        if tensor.shape != expected:
            raise ModelError(
                f"adapter {adapter}: its {name} is for a weight of {expected[0]} x {expected[1]}, and {original} has "
                f"{' x '.join(map(str, tensor.shape))}; give the one that it was trained on"
            )
    base = Path(base_of(adapter)).expanduser()
    if not (base / _CONVERSION).is_file():
        say(f"  {base} has no {_CONVERSION}: whether it was converted from {original} is not known")
        return
    other = _difference(read_json(base, _CONVERSION), base, weights, list(tensors.values()))
    if other:
        raise ModelError(
            f"adapter {adapter}: its adapter is for another base: {original} has another {other} than the checkpoint "
            f"that {base} was converted from; give that one"
        )


def _difference(
    conversion: Mapping[str, Any], base: Path, weights: WeightFiles, tensors: list[LlamaTensor]
) -> str | None:
    """Returns what tells a checkpoint from the one that a base was converted from: a file or a tensor; None if nothing.

    Raises:
        ModelError: a file is damaged.
    """
    source = conversion.get("source")
    if not isinstance(source, dict) or not all(isinstance(source.get(key), dict) for key in ("bytes", "sha256")):
        raise ModelError(f"model {base}: its {_CONVERSION} does not say what it was converted from; convert it again")
    if source["sha256"].get(CONFIG) != hashlib.sha256((weights.folder / CONFIG).read_bytes()).hexdigest():
        return CONFIG
    sizes = {file: (weights.folder / file).stat().st_size for file in weights.files}
    expected: dict[str, int] = source["bytes"]
    for file in sorted({*sizes, *expected}):
        if sizes.get(file) != expected.get(file):
            return file
    places = [(tensor.name, (tensor.source, tensor.first_row)) for tensor in tensors if tensor.name != HEAD]
    converted = dict(_rows(find_weights(base), {(name, 0) for name, _ in places}))
    originals = dict(_rows(weights, {place for _, place in places}))
    for name, place in places:
        one, other = originals.get(place), converted.get((name, 0))
        if one is None or other is None or not torch.equal(one, other):
            return place[0]
    return None


def _rows(weights: WeightFiles, places: set[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], Tensor]]:
    """Yields single rows by the name of their tensor and their number."""
    for file in weights.files:
        tensors = open_shard(weights.folder / file)
        for name, row in places:
            if name in tensors:
                yield (name, row), tensors[name][row : row + 1].float()

"""Adapters in other forms: merged into their base, or over Baichuan2 as it was published.

Baichuan2 keeps q, k and v in one layer, ``W_pack``, whose rows are [q; k; v]; the converted model has three.  An
adapter of the three is one of ``W_pack``, exactly: with the same A, B is [Bq; Bk; Bv]; with different ones, the As lie
on each other and B is block-diagonal, at the same scaling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doremi_mix.adapter_matrices import Pair, copy_file, end_of, new_folder, read_adapter, write_adapter
from doremi_mix.adapters import (
    CONFIG,
    RECORD,
    WEIGHTS,
    base_fingerprint,
    base_of,
    check_base,
    read_json,
    read_record,
    write_json,
)
from doremi_mix.baichuan.shards import WeightFiles, find_weights, open_shard
from doremi_mix.errors import ModelError
from doremi_mix.tensor_files import DTYPE_CODES, safetensors_header

W_PACK = "W_pack"
_QKV = ("q_proj", "k_proj", "v_proj")
_SAME_NAMES = ("o_proj", "gate_proj", "up_proj", "down_proj")
_LAYER = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+")

_MERGED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WEIGHT_SUFFIXES = (".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True, slots=True)
class Merged:
    """What ``merge_adapter`` wrote.

    Attributes:
        num_tensors: of the checkpoint.
        num_merged: of these, weights that the adapter changed.
        num_bytes: of the tensors.
    """

    num_tensors: int
    num_merged: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WPackAdapter:
    """What ``export_w_pack_adapter`` wrote.

    Attributes:
        rank: of the adapter of ``W_pack``; None without one.
        num_matrices: different As of q, k and v that it holds.
        num_parameters: of the whole adapter.
    """

    rank: int | None
    num_matrices: int
    num_parameters: int


def describe_adapter(adapter: Path) -> dict[str, Any]:
    """Returns what a person wants to know of an adapter: its form, its size, its base.

    Args:
        adapter: its folder.

    Raises:
        ModelError: it is no LoRA adapter, or names no base.
    """
    config, pairs = read_adapter(adapter)
    shared = tuple(read_record(adapter).get("shared_input", ()))
    counted: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        parent, _, end = name.rpartition(".")
        # A matrix that layers share is in the file for each of them.
        first = counted.setdefault(f"{parent} A" if end in shared else f"{name} A", pair.a_RD)
        if not torch.equal(first, pair.a_RD):
            counted[f"{name} A"] = pair.a_RD
        counted[f"{name} B"] = pair.b_NR
    targets = config["target_modules"]
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout") or 0.0,
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "shared_input": list(shared),
        "num_parameters": sum(tensor.numel() for tensor in counted.values()),
        "base": base_of(adapter),
    }


def copy_adapter(adapter: Path, target: Path, base: str | None = None) -> None:
    """Copies an adapter in peft's layout, with another place of its base.

    Args:
        adapter: its folder.
        target: the folder to make.
        base: what loads the base model: a path or a name on the hub; None for what the adapter names.

    Raises:
        ModelError: it is no LoRA adapter, it is for another base, or the target exists.
        RunDirectoryError: the target cannot be written.
    """
    config, _ = read_adapter(adapter)
    if base is not None:
        check_base(adapter, base_fingerprint(base))
        config["base_model_name_or_path"] = _place(base)
    with new_folder(target) as folder:
        write_json(folder / CONFIG, config)
        for name in (WEIGHTS, RECORD):
            if (adapter / name).exists():
                copy_file(adapter / name, folder / name)


def merge_adapter(
    adapter: Path,
    base: Path,
    target: Path,
    *,
    say: Callable[[str], None],
    advance: Callable[[int], None] = lambda _num_bytes: None,
) -> Merged:
    """Adds an adapter to the weights of its base and writes a whole checkpoint.

    One tensor is in memory at a time.  A weight is added to in float32 and rounded once, to the base's own format.
    Configuration and tokenizer are the base's.

    Args:
        adapter: its folder.
        base: the folder of the base model, in full precision.
        target: the folder to make.
        say: prints one line.
        advance: is told the number of bytes after each tensor.

    Raises:
        ModelError: the adapter is for another base, one of them cannot be read or merged, or the target exists.
        RunDirectoryError: the target cannot be written.
    """
    config, pairs = read_adapter(adapter)
    base = base.expanduser()
    _check_mergeable(adapter, base, pairs)
    weights = find_weights(base)
    transposed = bool(config.get("fan_in_fan_out"))  # GPT-2's layers keep their weights so
    layer_of = _match(adapter, base, weights, pairs, transposed=transposed)
    with new_folder(target) as folder:
        weight_map: dict[str, str] = {}
        num_bytes = 0
        for number, file in enumerate(weights.files, start=1):
            name = "model.safetensors"
            if len(weights.files) > 1:
                name = f"model-{number:05}-of-{len(weights.files):05}.safetensors"
            tensors = open_shard(base / file)
            deltas = {key: pairs[layer_of[key]] for key in tensors if key in layer_of}
            values = _merged(tensors, deltas, adapter, transposed=transposed)
            num_bytes += _write_tensors(folder / name, values, tensors, advance)
            weight_map |= dict.fromkeys(tensors, name)
        if len(weights.files) > 1:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        _copy_other_files(base, folder)
    say(f"  {len(pairs):,} of {len(weight_map):,} tensors merged; configuration and tokenizer are those of {base}")
    return Merged(len(weight_map), len(pairs), num_bytes)


def export_w_pack_adapter(adapter: Path, target: Path, base: str) -> WPackAdapter:
    """Writes an adapter of converted Baichuan2 as one of Baichuan2 as it was published; both give the same outputs.

    Args:
        adapter: its folder; it may adapt the projections of attention and MLP.
        target: the folder to make, in peft's layout.
        base: what loads the published model: a path or a name on the hub (``check_original`` looks into a folder).

    Raises:
        ModelError: the adapter has no counterpart in the published layout, or the target exists.
        RunDirectoryError: the target cannot be written.
    """
    config, pairs = read_adapter(adapter)
    _check_counterpart(adapter, config, pairs)
    packed, num_matrices = _pack(adapter, {name: pair for name, pair in pairs.items() if end_of(name) in _QKV})
    others = {name: pair for name, pair in pairs.items() if end_of(name) not in _QKV}
    targets = _w_pack_targets(config, packed, others)
    changed = {**config, "base_model_name_or_path": _place(base), "target_modules": targets}
    changes = _form(config, next(iter(packed.values()))) if packed else None
    if changes and not others:
        changed |= {"r": changes[0], "lora_alpha": changes[1], "rank_pattern": {}, "alpha_pattern": {}}
    elif changes:
        for key, value, own in zip(("rank_pattern", "alpha_pattern"), changes, ("r", "lora_alpha"), strict=True):
            patterns = config.get(key) or {}
            changed[key] = {W_PACK: value, **patterns} if patterns or value != config[own] else {}
    with new_folder(target) as folder:
        num_parameters = write_adapter(folder, changed, {**packed, **others})
    return WPackAdapter(changes[0] if changes else None, num_matrices, num_parameters)


def _place(base: str) -> str:
    """Returns a model's name as it holds in any working directory."""
    path = Path(base).expanduser()
    return str(path.resolve()) if path.exists() else base


def _check_mergeable(adapter: Path, base: Path, pairs: Mapping[str, Pair]) -> None:
    """Raises a ModelError if a base is not what the adapter can be merged into."""
    if not (base / "config.json").is_file():
        raise ModelError(f"adapter {adapter}: merging needs its base, and {base} is no model's folder; give the folder")
    check_base(adapter, base_fingerprint(str(base)))
    config = read_json(base, "config.json")
    if config.get("quantization_config"):
        raise ModelError(f"base {base}: its weights are quantized, and sums would be lost; give it in full precision")
    if config.get("tie_word_embeddings") and any(end_of(name) == "lm_head" for name in pairs):
        raise ModelError(
            f"adapter {adapter}: adapts lm_head, and {base} ties it to the embeddings, which would change, too; "
            "train without lm_head"
        )


def _match(
    adapter: Path, base: Path, weights: WeightFiles, pairs: Mapping[str, Pair], *, transposed: bool
) -> dict[str, str]:
    """Returns which layer of the adapter each tensor of the base is the weight of; only tensors that have one.

    Raises:
        ModelError: a layer has no tensor, or one of another form.
    """
    layer_of: dict[str, str] = {}
    for file in weights.files:
        for key, tensor in open_shard(base / file).items():
            # Files of some models leave out the name of the trunk.
            layer = next(
                (name for name in pairs if key in (f"{name}.weight", f"{name.partition('.')[2]}.weight")), None
            )
            if layer is None:
                continue
            pair = pairs[layer]
            expected = (pair.b_NR.shape[0], pair.a_RD.shape[1])
            if tuple(tensor.shape) != (expected[::-1] if transposed else expected):
                raise ModelError(
                    f"adapter {adapter}: its {layer} is for a weight of {expected[0]} x {expected[1]}, and {base} has "
                    f"{' x '.join(map(str, tensor.shape))}; give the base that it was trained on"
                )
            if tensor.dtype not in _MERGED_DTYPES:
                raise ModelError(f"base {base}: {key} is {tensor.dtype}; give the model in full precision")
            layer_of[key] = layer
    missing = sorted(pairs.keys() - layer_of.values())
    if missing:
        raise ModelError(
            f"adapter {adapter}: adapts {missing[0]}, which {base} does not have; give the base that it was trained on"
        )
    return layer_of


def _merged(
    tensors: Mapping[str, Tensor], pairs: Mapping[str, Pair], adapter: Path, *, transposed: bool
) -> Iterator[Tensor]:
    """Yields tensors, with what the adapter adds to some of them.

    Raises:
        ModelError: a sum is not finite.
    """
    for name, tensor in tensors.items():
        if name not in pairs:
            yield tensor
            continue
        delta = pairs[name].delta()
        total = (delta.T if transposed else delta).add_(tensor.float()).to(tensor.dtype)
        if not torch.stack(torch.aminmax(total)).isfinite().all():
            raise ModelError(f"adapter {adapter}: {name} would not be finite with it; train it again")
        yield total


def _write_tensors(
    path: Path, values: Iterator[Tensor], forms: Mapping[str, Tensor], advance: Callable[[int], None]
) -> int:
    """Writes a safetensors file tensor by tensor, and returns the bytes of the tensors."""
    for name, tensor in forms.items():
        if tensor.dtype not in DTYPE_CODES:
            raise ModelError(f"{name} is {tensor.dtype}, which cannot be written; give the model in full precision")
    with path.open("wb") as file:
        file.write(safetensors_header((name, tensor.dtype, tensor.shape) for name, tensor in forms.items()))
        for tensor in values:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            advance(tensor.nbytes)
    return sum(tensor.nbytes for tensor in forms.values())


def _copy_other_files(base: Path, folder: Path) -> None:
    """Copies configuration and tokenizer: what is neither weights nor tells of them."""
    for path in sorted(base.iterdir()):
        told = path.name.endswith(".index.json") or path.name == "conversion.json"  # has the sums of the base's files
        if path.is_file() and not told and not path.name.startswith(".") and path.suffix not in _WEIGHT_SUFFIXES:
            copy_file(path, folder / path.name)


def _check_counterpart(adapter: Path, config: Mapping[str, Any], pairs: Mapping[str, Pair]) -> None:
    """Raises a ModelError if a layer has no counterpart in Baichuan2's own layout."""
    for name, pair in pairs.items():
        if end_of(name) in ("lm_head", "embed_tokens"):
            raise ModelError(
                f"adapter {adapter}: adapts {name}, and Baichuan2 divides the rows of its head by their lengths at "
                f"each call, so that no adapter of it gives the same outputs; train without {end_of(name)}"
            )
        if _LAYER.fullmatch(name) is None or end_of(name) not in (*_QKV, *_SAME_NAMES):
            raise ModelError(f"adapter {adapter}: adapts {name}, which Baichuan2 does not have; give one of Baichuan2")
        if end_of(name) in _QKV and pair.b_NR.shape[0] != pair.a_RD.shape[1]:
            raise ModelError(
                f"adapter {adapter}: {name} has {pair.b_NR.shape[0]} outputs for {pair.a_RD.shape[1]} inputs, and the "
                f"thirds of {W_PACK} are square (no grouped queries); give an adapter of Baichuan2"
            )
    if config.get("fan_in_fan_out"):
        raise ModelError(f"adapter {adapter}: its weights are transposed (fan_in_fan_out); give one of Baichuan2")


def _pack(adapter: Path, parts: Mapping[str, Pair]) -> tuple[dict[str, Pair], int]:
    """Returns adapters of ``W_pack`` for those of q, k and v, and how many different As each of them holds.

    Raises:
        ModelError: their ranks or scalings differ.
    """
    if len({(pair.rank, pair.scaling) for pair in parts.values()}) > 1:
        raise ModelError(
            f"adapter {adapter}: q_proj, k_proj and v_proj have different ranks or alphas; train with the same ones"
        )
    layers: dict[str, dict[str, Pair]] = {}
    for name, pair in parts.items():
        layers.setdefault(name.rpartition(".")[0], {})[end_of(name)] = pair
    ends = [end for end in _QKV if any(end in layer for layer in layers.values())]
    # Which As are one is decided for all layers alike: peft wants the same rank everywhere.
    slots: list[str] = []
    slot_of: dict[str, int] = {}
    for end in ends:
        same = (slot for slot, other in enumerate(slots) if _have_same_a(layers.values(), end, other))
        slot_of[end] = next(same, len(slots))
        if slot_of[end] == len(slots):
            slots.append(end)
    return {f"{parent}.{W_PACK}": _pack_layer(layer, slots, slot_of) for parent, layer in layers.items()}, len(slots)


def _have_same_a(layers: Any, one: str, other: str) -> bool:
    return all(one in layer and other in layer and torch.equal(layer[one].a_RD, layer[other].a_RD) for layer in layers)


def _pack_layer(layer: Mapping[str, Pair], slots: list[str], slot_of: Mapping[str, int]) -> Pair:
    some = next(iter(layer.values()))
    rank, size = some.a_RD.shape
    a_RD = some.a_RD.new_zeros(rank * len(slots), size)
    b_NR = some.b_NR.new_zeros(len(_QKV) * size, rank * len(slots))
    for third, end in enumerate(_QKV):
        if end in layer:
            columns = slice(slot_of[end] * rank, (slot_of[end] + 1) * rank)
            a_RD[columns] = layer[end].a_RD
            b_NR[third * size : (third + 1) * size, columns] = layer[end].b_NR
    return Pair(a_RD, b_NR, some.scaling)


def _form(config: Mapping[str, Any], pair: Pair) -> tuple[int, float]:
    """Returns the rank, and the alpha with which peft gets to the scaling."""
    return pair.rank, pair.scaling * (math.sqrt(pair.rank) if config.get("use_rslora") else pair.rank)


def _w_pack_targets(config: Mapping[str, Any], packed: Mapping[str, Pair], others: Mapping[str, Pair]) -> list[str]:
    targets = config["target_modules"]
    if not isinstance(targets, list):  # a pattern over the names of the converted model
        return sorted((*packed, *others))
    return sorted({re.sub(rf"(?<![^.])({'|'.join(_QKV)})$", W_PACK, target) for target in targets})

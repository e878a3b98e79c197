"""LoRA adapters: small trained matrices beside the frozen weights of a base model, several sets over one base.

Reference and proxy can be two adapters of the same weights in memory, so that a large model can be its own proxy.  Of
the adapters of a model, one is active: it takes part in the forward pass, and nothing but it is trained.

The layers are peft's, and so is the format on disk, so that peft loads what is saved here.  What peft has no word for
(which layers share their matrix A, which weights the base has) lies in a small file beside peft's two.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from doremi_mix.adapter_layers import (
    dropouts,
    is_lora,
    is_shared,
    is_target,
    linear_layers,
    lora_layers,
    quiet,
    share_input,
    shared_groups,
    target_names,
)
from doremi_mix.errors import ModelError, short_reason

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECORD = "doremi_mix_adapter.json"
PREFIX = "base_model.model."
"""What peft's files put before the name of a module."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The form of an adapter.

    Attributes:
        rank: columns of the matrices.
        alpha: their product is scaled by alpha / rank.
        target_modules: names, or ends of names, of the linear layers that get one; None for all of the blocks.
        dropout: probability that an input of an adapter is dropped, while ``set_adapter_dropout`` has it on.  0
            where domain weights are learned: the losses that decide them must be those whose gradient they weight.
        shared_input: names of target modules that read the same input in the same parent and share one matrix A (and
            one dropout mask), as one adapter of a fused projection does.
    """

    rank: int = 16
    alpha: float = 32
    target_modules: tuple[str, ...] | None = None
    dropout: float = 0.0
    shared_input: tuple[str, ...] = ()


def add_adapter(model: Any, name: str, settings: LoraSettings, seed: int) -> None:
    """Adds an adapter to a model, in place of one of the same name, and activates it.

    It changes no output yet: the second of its two matrices starts at zero, the first uniformly, as in
    https://arxiv.org/abs/2106.09685.  It is float32 whatever the base is.

    Args:
        model: a transformers model.
        name: of the adapter; letters, digits and underscores.
        settings: its form.
        seed: of its initialization, which depends on nothing else.

    Raises:
        ModelError: peft is missing, a target is no linear layer of the model's blocks, or layers cannot share an input.
    """
    _check_peft()
    if not name.isidentifier():
        raise ValueError(f'"{name}" does not name an adapter: expected letters, digits and underscores')
    targets = target_names(model, settings.target_modules)
    _inject(model, name, settings, targets)
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in _own_tensors(model, name).items():
        if "lora_A" in key:
            bound = 1 / math.sqrt(tensor.shape[1])
            tensor.data.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))
        else:
            tensor.data.zero_()
    activate_adapter(model, name)


def activate_adapter(model: Any, name: str) -> None:
    """Lets one adapter take part in the forward pass, and freezes everything but it.

    Args:
        model: a transformers model.
        name: of one of its adapters.

    Raises:
        ValueError: the model has no adapter of this name.
    """
    if name not in adapter_names(model):
        raise ValueError(f'the model has no adapter "{name}", only {", ".join(adapter_names(model)) or "none"}')
    for layer in lora_layers(model).values():
        layer.set_adapter(name)
        # What is shared is told by its identity, so it casts for itself.
        layer.cast_input_dtype_enabled = not is_shared(layer, name)
    model.requires_grad_(False)
    for tensor in _own_tensors(model, name).values():
        tensor.requires_grad_()


def adapter_names(model: Any) -> list[str]:
    """Returns the names of a model's adapters, in the order in which they were added."""
    # Adapters may sit on different layers.
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.lora_A))


def active_adapter(model: Any) -> str | None:
    """Returns the name of the active adapter; None for a model without adapters."""
    layer = next((module for module in model.modules() if is_lora(module)), None)
    return next(iter(layer.active_adapters), None) if layer is not None else None


def remove_adapter(model: Any, name: str) -> None:
    """Frees an adapter; a model left with none computes what its base does, but keeps peft's layers."""
    with quiet():
        for layer in lora_layers(model).values():
            layer.delete_adapter(name)
    model.peft_config.pop(name, None)


def set_adapter_dropout(model: nn.Module, *, on: bool) -> None:
    """Switches the dropout of the active adapter, and of nothing else; it is off until this turns it on.

    A model stays in evaluation mode while it is trained, and ``eval()`` turns this off again.  A forward pass that is
    computed again must draw the same masks: gradient checkpointing has to keep the random state while this is on.

    Args:
        model: a model with adapters.
        on: whether inputs are dropped.
    """
    for layer in lora_layers(model).values():
        for name in layer.lora_A:
            for dropout in dropouts(layer, name):
                dropout.train(on and name in layer.active_adapters)


def has_adapter_dropout(model: nn.Module) -> bool:
    """Says whether an adapter in a model drops inputs now."""
    return any(
        isinstance(dropout, nn.Dropout) and dropout.training
        for layer in lora_layers(model).values()
        for name in layer.active_adapters
        for dropout in dropouts(layer, name)
    )


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Lets a model compute what its base does; the active adapter is back when the context ends.

    Args:
        model: a model with adapters, or without.
    """
    layers = [layer for layer in lora_layers(model).values() if not layer.disable_adapters]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        # peft makes an adapter trainable when it enables it.
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_()


def num_trainable_parameters(model: nn.Module) -> int:
    """Counts the parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def is_adapter_folder(folder: str | Path) -> bool:
    """Says whether a folder holds a saved adapter."""
    return (Path(folder).expanduser() / CONFIG).is_file()


def base_of(folder: Path) -> str:
    """Returns the name of the model that a saved adapter belongs to.

    Raises:
        ModelError: the folder names none.
    """
    base = read_adapter_config(folder).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"model {folder}: its {CONFIG} names no base model; {how_to_get_again(folder)}")
    return str(base)


def save_adapter(
    model: Any,
    name: str,
    folder: Path,
    base: str,
    state: Mapping[str, Tensor] | None = None,
    *,
    fingerprint: str | None = None,
) -> None:
    """Writes an adapter as peft does; a matrix that layers share is written for each of them.

    Args:
        model: a transformers model.
        name: of the adapter.
        folder: is made if need be.
        base: what loads the base model: a path or a name on the hub.
        state: the model's tensors by name, where the model itself holds only parts of them.
        fingerprint: ``base_fingerprint`` of the base; ``load_adapter`` then knows another base of the same shape.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{PREFIX}{_without_name(key, name)}": (tensor if state is None else state[key]).detach().cpu().contiguous()
        for key, tensor in _own_tensors(model, name, every_name=True).items()
    }
    shared = _shared_input(model, name)
    if shared:  # safetensors takes no two tensors in the same memory
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[name]
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    written = read_adapter_config(folder)
    written["target_modules"] = sorted(written["target_modules"])  # peft writes a set, in any order
    write_json(folder / CONFIG, written)
    if shared or fingerprint:
        write_json(folder / RECORD, {"base_fingerprint": fingerprint, "shared_input": shared})
    else:
        (folder / RECORD).unlink(missing_ok=True)


def load_adapter(model: Any, name: str, folder: Path, *, fingerprint: str | None = None) -> None:
    """Adds a saved adapter to its base model, in place of one of the same name, and activates it.

    Args:
        model: a transformers model: the base.
        name: to be given to the adapter.
        folder: what ``save_adapter`` or peft wrote.
        fingerprint: ``base_fingerprint`` of what the model was loaded from.

    Raises:
        ModelError: peft is missing, or the folder holds no LoRA adapter that fits the model.
    """
    _check_peft()
    config, record = read_adapter_config(folder), read_record(folder)
    check_base(folder, fingerprint)
    try:
        _fill(model, name, folder, config, tuple(record.get("shared_input", ())))
    except Exception as error:  # damaged files and other adapters come as many classes, all the user's to settle
        if name in adapter_names(model):
            remove_adapter(model, name)
        raise ModelError(
            f"model {folder}: its adapter cannot be loaded onto its base ({short_reason(error)}); "
            "train it again, or give the base that it was trained on"
        ) from None
    activate_adapter(model, name)


def base_fingerprint(name_or_path: str) -> str | None:
    """Returns a sha256 that tells a base from others, also from those of the same shape; cheap for any size.

    It is over the shape in ``config.json`` and over the names, the sizes and 256 KiB of the content of each file of
    weights, and does not depend on where they lie.  A merged, converted or newly split checkpoint is another base.

    Args:
        name_or_path: a checkpoint folder, a ``.gguf`` file, or a name on the hub.

    Returns:
        None for a name on the hub, or a folder without weights.

    Raises:
        ModelError: the configuration cannot be read.
    """
    path = Path(name_or_path).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not files:
        return None
    shape: dict[str, Any] = {}
    if (path / "config.json").is_file():
        config = read_json(path, "config.json")
        shape = {key: config[key] for key in _SHAPE if key in config}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{'' if file == path else file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for part in range(_SAMPLES):
                opened.seek(part * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def check_base(folder: Path, fingerprint: str | None) -> None:
    """Checks that a saved adapter belongs to a base, as far as both have a fingerprint.

    Args:
        folder: with the adapter.
        fingerprint: of the base, as ``base_fingerprint`` gives it.

    Raises:
        ModelError: it belongs to another one.
    """
    recorded = read_record(folder).get("base_fingerprint")
    if recorded and fingerprint and recorded != fingerprint:
        raise ModelError(
            f"model {folder}: its adapter is for another base ({recorded[:12]}, not {fingerprint[:12]}); "
            f"give the one that it was trained on, {base_of(folder)}"
        )


def read_record(folder: Path) -> dict[str, Any]:
    """Returns what a saved adapter says beside peft's files: base_fingerprint and shared_input; empty without it.

    Raises:
        ModelError: the file is damaged.
    """
    return read_json(folder, RECORD) if (folder / RECORD).exists() else {}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Returns peft's configuration of a saved adapter.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return read_json(folder, CONFIG)
    except ModelError as error:
        raise ModelError(f"{error}; {how_to_get_again(folder)}") from None


def how_to_get_again(folder: Path) -> str:
    """Returns what to do about a saved adapter that is damaged: words for the end of an error's line."""
    place = folder.absolute()
    run = next((parent for parent in place.parents if (parent / "run.json").is_file()), None)
    if run is None or place.parent.name != "finetune":
        return "fetch or train it again"
    return f"delete {folder.parent} and run again: doremi-mix finetune --run-dir {shlex.quote(str(run))}"


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Returns the object in a model's JSON file.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ModelError(f"model {folder}: its {name} cannot be read ({short_reason(error)})") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as JSON that a person can read, always in the same bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_SHAPE = (
    *("architectures", "head_dim", "hidden_size", "intermediate_size", "model_type", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_theta"),
    *("tie_word_embeddings", "vocab_size"),
)
"""What of a ``config.json`` decides what the weights compute; the rest changes with the version that wrote it."""
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def _fill(model: Any, name: str, folder: Path, config: dict[str, Any], shared_input: tuple[str, ...]) -> None:
    """Adds an adapter with the weights in a folder.

    Raises:
        ValueError: it is of another kind than ours, or of another base.
    """
    from safetensors.torch import load_file

    if config["peft_type"] != "LORA" or not isinstance(config["target_modules"], list):
        raise ValueError(f"expected LoRA with a list of target_modules, got {config['peft_type']}")
    for key in ("use_dora", "use_rslora", "lora_bias", "alpha_pattern", "rank_pattern", "modules_to_save"):
        if config.get(key):
            raise ValueError(f"{key} is set, which is not supported")
    saved = load_file(folder / WEIGHTS)
    settings = LoraSettings(
        int(config["r"]),
        float(config["lora_alpha"]),
        tuple(config["target_modules"]),
        float(config.get("lora_dropout") or 0.0),
        shared_input if _are_shared(saved, shared_input) else (),
    )
    _inject(model, name, settings, config["target_modules"])
    expected = {
        f"{PREFIX}{_without_name(key, name)}": tensor
        for key, tensor in _own_tensors(model, name, every_name=True).items()
    }
    if expected.keys() != saved.keys():
        raise ValueError(f"it holds other layers than this base has: {len(saved)} tensors for {len(expected)}")
    for key, tensor in expected.items():
        if tensor.shape != saved[key].shape:
            raise ValueError(f"{key} is {tuple(saved[key].shape)}, this base needs {tuple(tensor.shape)}")
        tensor.data.copy_(saved[key])


def _are_shared(saved: Mapping[str, Tensor], shared_input: tuple[str, ...]) -> bool:
    """Says whether layers that shared their A still have the same one: it may have been trained elsewhere since."""
    first: dict[str, Tensor] = {}
    for key, tensor in saved.items():
        parent, _, end = key.removesuffix(".lora_A.weight").rpartition(".")
        if end in shared_input and not torch.equal(first.setdefault(parent, tensor), tensor):
            return False
    return True


def _check_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ModelError("LoRA needs the package peft, which is not installed; run: pip install 'doremi-mix[lora]'")


def _inject(model: Any, name: str, settings: LoraSettings, targets: list[str]) -> None:
    """Puts peft's layers around the targets, or another adapter into those that are there.

    Raises:
        ModelError: layers cannot share their input.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    groups = shared_groups(model, settings.shared_input, targets)
    if name in adapter_names(model):
        remove_adapter(model, name)
    matched = [layer for key, layer in linear_layers(model).items() if is_target(key, targets)]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=cast("Any", float(settings.alpha)),  # peft says int, and divides
        target_modules=targets,
        lora_dropout=settings.dropout,
        bias="none",
        task_type="CAUSAL_LM",
        # GPT-2's layers keep their weights transposed.
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in matched),
    )
    with quiet():
        inject_adapter_in_model(config, model, name)
    layers = lora_layers(model)
    for parent, keys in groups.items():
        share_input(model.get_submodule(parent), [layers[key] for key in keys], name, settings.dropout)
    for tensor in _own_tensors(model, name).values():
        tensor.data = tensor.data.float()  # an update of a number in bf16 would mostly be rounded away
    for layer in layers.values():
        for dropout in dropouts(layer, name):
            dropout.eval()
    # peft keeps the configuration of the adapter that came last only.
    model.peft_config = {**getattr(model, "peft_config", {}), name: config}


def _own_tensors(model: Any, name: str, *, every_name: bool = False) -> dict[str, Tensor]:
    """Returns an adapter's parameters by their name in the model, one that layers share by its first or every name."""
    part = re.compile(rf"\.lora_[AB]\.{name}\.weight$")
    named = model.named_parameters(remove_duplicate=not every_name)
    return {key: tensor for key, tensor in named if part.search(key)}


def _shared_input(model: Any, name: str) -> list[str]:
    """Returns the ends of the names of the layers that share their A in an adapter."""
    return sorted({key.rpartition(".")[2] for key, layer in lora_layers(model).items() if is_shared(layer, name)})


def _without_name(key: str, name: str) -> str:
    """A saved adapter has no name: it gets one when it is loaded."""
    return key.removesuffix(f".{name}.weight") + ".weight"

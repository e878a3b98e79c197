"""LoRA adapters: small trained matrices beside the frozen weights of a base model, several sets over one base.

Reference and proxy can be two adapters of the same weights in memory, so that a large model can be its own proxy.  Of
the adapters of a model, one is active: it takes part in the forward pass, and nothing but it is trained.

The layers are peft's, and so is the format on disk, so that peft loads what is saved here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from doremi_mix.errors import ModelError, short_reason

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
"""What peft's files put before the name of a module."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The form of an adapter.

    There is no dropout: the losses that decide the domain weights must be those whose gradient they weight.

    Attributes:
        rank: columns of the matrices.
        alpha: their product is scaled by alpha / rank.
        target_modules: names, or ends of names, of the linear layers that get one; None for all of the blocks.
    """

    rank: int = 16
    alpha: float = 32
    target_modules: tuple[str, ...] | None = None


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
        ModelError: peft is missing, or a target is no linear layer of the model's blocks.
    """
    _check_peft()
    if not name.isidentifier():
        raise ValueError(f'"{name}" does not name an adapter: expected letters, digits and underscores')
    targets = _targets(model, settings)
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
    for layer in _layers(model).values():
        layer.set_adapter(name)
    model.requires_grad_(False)
    for tensor in _own_tensors(model, name).values():
        tensor.requires_grad_()


def adapter_names(model: Any) -> list[str]:
    """Returns the names of a model's adapters, in the order in which they were added."""
    # Adapters may sit on different layers.
    return list(dict.fromkeys(name for layer in _layers(model).values() for name in layer.lora_A))


def active_adapter(model: Any) -> str | None:
    """Returns the name of the active adapter; None for a model without adapters."""
    layer = next((module for module in model.modules() if _is_lora(module)), None)
    return next(iter(layer.active_adapters), None) if layer is not None else None


def remove_adapter(model: Any, name: str) -> None:
    """Frees an adapter; a model left with none computes what its base does, but keeps peft's layers."""
    with _quiet():
        for layer in _layers(model).values():
            layer.delete_adapter(name)
    model.peft_config.pop(name, None)


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
    base = _read_config(folder).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"model {folder}: its {CONFIG} names no base model; save the adapter again")
    return str(base)


def save_adapter(model: Any, name: str, folder: Path, base: str, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes an adapter as peft does.

    Args:
        model: a transformers model.
        name: of the adapter.
        folder: is made if need be.
        base: what loads the base model: a path or a name on the hub.
        state: the model's tensors by name, where the model itself holds only parts of them.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_PREFIX}{_without_name(key, name)}": (tensor if state is None else state[key]).detach().cpu().contiguous()
        for key, tensor in _own_tensors(model, name).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[name]
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    written = _read_config(folder)
    written["target_modules"] = sorted(written["target_modules"])  # peft writes a set, in any order
    (folder / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(model: Any, name: str, folder: Path) -> None:
    """Adds a saved adapter to its base model, in place of one of the same name, and activates it.

    Args:
        model: a transformers model: the base.
        name: to be given to the adapter.
        folder: what ``save_adapter`` or peft wrote.

    Raises:
        ModelError: peft is missing, or the folder holds no LoRA adapter that fits the model.
    """
    _check_peft()
    config = _read_config(folder)
    try:
        _fill(model, name, folder, config)
    except Exception as error:  # damaged files and other adapters come as many classes, all the user's to settle
        if name in adapter_names(model):
            remove_adapter(model, name)
        raise ModelError(
            f"model {folder}: its adapter cannot be loaded onto its base ({short_reason(error)}); "
            "train it again, or give the base that it was trained on"
        ) from None
    activate_adapter(model, name)


def _fill(model: Any, name: str, folder: Path, config: dict[str, Any]) -> None:
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
    settings = LoraSettings(int(config["r"]), float(config["lora_alpha"]), tuple(config["target_modules"]))
    _inject(model, name, settings, config["target_modules"])
    expected = {f"{_PREFIX}{_without_name(key, name)}": tensor for key, tensor in _own_tensors(model, name).items()}
    if expected.keys() != saved.keys():
        raise ValueError(f"it holds other layers than this base has: {len(saved)} tensors for {len(expected)}")
    for key, tensor in expected.items():
        if tensor.shape != saved[key].shape:
            raise ValueError(f"{key} is {tuple(saved[key].shape)}, this base needs {tuple(tensor.shape)}")
        tensor.data.copy_(saved[key])


def _check_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ModelError("LoRA needs the package peft, which is not installed; run: pip install 'doremi-mix[lora]'")


def _linear_layers(model: Any) -> dict[str, nn.Module]:
    """Returns the linear layers of a model's blocks by name; the one that makes the logits is in none of them."""
    from transformers.pytorch_utils import Conv1D

    # What an adapter wraps keeps the name that it had before.
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"\.\d+\.", name) and ".lora_" not in name
    }


def _targets(model: Any, settings: LoraSettings) -> list[str]:
    """Returns the ends of names of the layers that get an adapter.

    Raises:
        ModelError: a target matches none of them.
    """
    layers = _linear_layers(model)
    ends = sorted({name.rpartition(".")[2] for name in layers})
    if settings.target_modules is None:
        return ends
    for target in settings.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise ModelError(
                f"lora_target_modules: {target} names no linear layer of the blocks of {type(model).__name__}; "
                f"choose from {', '.join(ends)}"
            )
    return list(settings.target_modules)


def _inject(model: Any, name: str, settings: LoraSettings, targets: list[str]) -> None:
    """Puts peft's layers around the targets, or another adapter into those that are there."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    if name in adapter_names(model):
        remove_adapter(model, name)
    matched = [
        layer
        for key, layer in _linear_layers(model).items()
        if any(key == target or key.endswith(f".{target}") for target in targets)
    ]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=cast("Any", float(settings.alpha)),  # peft says int, and divides
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        # GPT-2's layers keep their weights transposed.
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in matched),
    )
    with _quiet():
        inject_adapter_in_model(config, model, name)
    for tensor in _own_tensors(model, name).values():
        tensor.data = tensor.data.float()  # an update of a number in bf16 would mostly be rounded away
    # peft keeps the configuration of the adapter that came last only.
    model.peft_config = {**getattr(model, "peft_config", {}), name: config}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what peft has to say of several adapters in one model: it is what we want."""
    with warnings.catch_warnings():
        for message in ("Already found a `peft_config`", "fan_in_fan_out is set", "Adapter .* was active which is now"):
            warnings.filterwarnings("ignore", message=message)
        yield


def _is_lora(module: nn.Module) -> bool:
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def _layers(model: Any) -> dict[str, Any]:
    """Returns peft's layers in a model by name."""
    return {name: module for name, module in model.named_modules() if _is_lora(module)}


def _own_tensors(model: Any, name: str) -> dict[str, Tensor]:
    """Returns an adapter's parameters by their name in the model."""
    part = re.compile(rf"\.lora_[AB]\.{name}\.weight$")
    return {key: tensor for key, tensor in model.named_parameters() if part.search(key)}


def _without_name(key: str, name: str) -> str:
    """A saved adapter has no name: it gets one when it is loaded."""
    return key.removesuffix(f".{name}.weight") + ".weight"


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {folder}: its {CONFIG} cannot be read ({short_reason(error)})") from None

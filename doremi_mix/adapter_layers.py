"""The layers of peft in a model, and one matrix A for several of them that read the same input.

A LoRA on a fused projection, such as Baichuan's ``W_pack``, has one A for what other models keep as ``q_proj``,
``k_proj`` and ``v_proj``.  Here the three layers of peft get the same module in the place of their own A.  Its product
is computed once a pass of their parent module and given to all of them, so that dropout mask and memory are those of
the fused layer.  What is kept between them is gone when the parent's pass ends, also by an error or by a recomputation
that stops early.

Axes: B sequences, T tokens, D inputs, R rank.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from doremi_mix.errors import ModelError


class SharedProjection(nn.Linear):
    """A matrix A that several layers share, with the dropout before it.

    Args:
        own: the A of one of the layers, whose weight this takes over.
        dropout: probability that an input is dropped, once it is switched on.
    """

    def __init__(self, own: nn.Linear, dropout: float) -> None:
        super().__init__(own.in_features, own.out_features, bias=False, device="meta")
        self.weight = own.weight
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self._is_open = False
        self._kept: tuple[Tensor, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- nn.Linear's name
        """Returns the product [B, T, R] with the input [B, T, D]; the same one to all layers of the parent.

        Raises:
            RuntimeError: the layers do not read the same input.
        """
        if not self._is_open:  # a layer that is called by itself
            return self._project(input)
        if self._kept is None:
            self._kept = input, self._project(input)
        elif self._kept[0] is not input:
            raise RuntimeError("layers that share a LoRA matrix A read different inputs; leave them unshared")
        return self._kept[1]

    def open(self, *, is_open: bool) -> None:
        """Starts a pass of the parent, or ends it."""
        self._is_open, self._kept = is_open, None

    def _project(self, input_BTD: Tensor) -> Tensor:
        return super().forward(self.dropout(input_BTD.to(self.weight.dtype)))


def share_input(parent: nn.Module, layers: Sequence[Any], name: str, dropout: float) -> None:
    """Gives several layers of peft one A instead of one each.

    Args:
        parent: the module whose forward pass calls them.
        layers: of peft; the weight of the first one's A is kept.
        name: of the adapter.
        dropout: probability that an input is dropped.
    """
    shared = SharedProjection(layers[0].lora_A[name], dropout)
    for layer in layers:
        layer.lora_A[name] = shared
        layer.lora_dropout[name] = nn.Identity()
    if not hasattr(parent, "shares_input"):
        kind: Any = type(parent)
        parent.__class__ = _sharing(kind)


def is_shared(layer: Any, name: str) -> bool:
    """Says whether a layer of peft shares the A of an adapter."""
    return name in layer.lora_A and isinstance(layer.lora_A[name], SharedProjection)


def dropouts(layer: Any, name: str) -> Iterator[nn.Module]:
    """Yields the dropout of an adapter in a layer of peft."""
    if is_shared(layer, name):
        yield layer.lora_A[name].dropout
    elif name in layer.lora_dropout:
        yield layer.lora_dropout[name]


def is_lora(module: nn.Module) -> bool:
    """Says whether a module is a layer of peft around a layer of the model."""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def lora_layers(model: Any) -> dict[str, Any]:
    """Returns peft's layers in a model by name."""
    return {name: module for name, module in model.named_modules() if is_lora(module)}


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Returns the linear layers of a model's blocks by name; the one that makes the logits is in none of them."""
    from transformers.pytorch_utils import Conv1D

    # What an adapter wraps keeps the name that it had before.
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"\.\d+\.", name) and ".lora_" not in name
    }


def target_names(model: Any, chosen: tuple[str, ...] | None) -> list[str]:
    """Returns the ends of names of the layers that get an adapter.

    Raises:
        ModelError: a target matches none of them.
    """
    layers = linear_layers(model)
    ends = sorted({name.rpartition(".")[2] for name in layers})
    if chosen is None:
        return ends
    for target in chosen:
        if not any(is_target(name, [target]) for name in layers):
            raise ModelError(
                f"lora_target_modules: {target} names no linear layer of the blocks of {type(model).__name__}; "
                f"choose from {', '.join(ends)}"
            )
    return list(chosen)


def is_target(key: str, targets: list[str]) -> bool:
    """Says whether a layer is one of those that are named by their names, or by the ends of these."""
    return any(key == target or key.endswith(f".{target}") for target in targets)


def shared_groups(model: Any, shared_input: tuple[str, ...], targets: list[str]) -> dict[str, list[str]]:
    """Returns the names of the layers that share an input, by the name of their parent.

    Raises:
        ModelError: there are none, or they cannot share one.
    """
    layers = {key: layer for key, layer in linear_layers(model).items() if is_target(key, targets)}
    groups: dict[str, list[str]] = {}
    for key in layers:
        parent, _, end = key.rpartition(".")
        if end in shared_input:
            groups.setdefault(parent, []).append(key)
    if shared_input and not groups:
        raise ModelError(
            f"lora_shared_input: {', '.join(shared_input)} are none of the layers that get an adapter; "
            f"choose from {', '.join(sorted({key.rpartition('.')[2] for key in layers}))}"
        )
    for parent, keys in groups.items():
        num_inputs = {key.rpartition(".")[2]: _num_inputs(layers[key]) for key in keys}
        if len(set(num_inputs.values())) > 1 or len(num_inputs) < len(set(shared_input)):
            found = ", ".join(f"{end} ({number} inputs)" for end, number in num_inputs.items())
            raise ModelError(
                f"lora_shared_input: {', '.join(shared_input)} must all get an adapter and have as many inputs "
                f"as each other, and {parent} has {found}; name layers that read the same input"
            )
    return groups


def keep_gradients_of_quantized_layers(model: nn.Module) -> None:
    """Puts the layers of bitsandbytes into training mode, which is about their weights and not about dropout.

    In evaluation mode, a pass on a CPU packs 4-bit weights for a kernel that has no gradient, once and for all, and
    8-bit layers compute in another way than the one that they differentiate.  On a GPU nothing changes.
    """
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.train()


def allow_compiled_checkpointing() -> None:
    """Lets torch.compile take blocks that are checkpointed and share inputs; without it they stay uncompiled.

    It minds that the forward pass sets attributes of a module, which the backward pass would have to repeat; those of
    ``SharedProjection`` are back at None when a pass ends.
    """
    import torch._dynamo

    flag = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    if hasattr(torch._dynamo.config, flag):  # older versions of torch have none
        setattr(torch._dynamo.config, flag, True)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what peft has to say of several adapters in one model: it is what we want."""
    with warnings.catch_warnings():
        for message in ("Already found a `peft_config`", "fan_in_fan_out is set", "Adapter .* was active which is now"):
            warnings.filterwarnings("ignore", message=message)
        yield


def _num_inputs(layer: Any) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.nx)  # nx is that of GPT-2's layers


@functools.cache
def _sharing(kind: Any) -> Any:
    """Returns a module's class, but with what its layers share open during its pass.

    It is one class for all parents: hooks have numbers, for which torch.compile would compile every block anew.
    """

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        shared = _shared_in(self)
        for one in shared:
            one.open(is_open=True)
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            for one in shared:
                one.open(is_open=False)

    return type(kind.__name__, (kind,), {"forward": forward, "shares_input": True, "__module__": kind.__module__})


def _shared_in(parent: nn.Module) -> list[SharedProjection]:
    layers: list[Any] = [layer for layer in parent.children() if is_lora(layer)]
    return [found for layer in layers for found in layer.lora_A.values() if isinstance(found, SharedProjection)]

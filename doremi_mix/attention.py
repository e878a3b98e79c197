"""Attention over packed sequences, in which a document sees itself and nothing else.

Axes: B sequences, T tokens, H query heads, G key and value heads, E size of a head, C document starts.

Three ways give the same numbers.  ``sdpa`` hands a block-diagonal mask to whatever the model has, and runs everywhere.
On CUDA, ``varlen`` (flash attention over documents of any length) and ``flex`` (blocks of the mask that are empty are
skipped) do not compute what the mask would throw away; they are taken only after they gave SDPA's numbers there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch user knows)
from numpy.typing import NDArray
from torch import Tensor

from doremi_mix.errors import short_reason

Attend = Callable[..., tuple[Tensor, None]]
"""What transformers calls in each attention layer: (module, query_BHTE, key_BGTE, value_BGTE, attention_mask, ...)."""

NAMES = {"varlen": "varlen_attn", "flex": "flex_attention"}
"""The fast ways, fastest first, and what torch calls them."""

LEAST_STARTS = 64
"""Document starts are padded to this many, or the next power of two, so that few shapes occur."""


def document_mask(document_ids_BT: Tensor) -> Tensor:
    """Returns who may attend to whom, shape [B, 1, T, T]: earlier tokens of the same document, and oneself.

    Padding attends to padding, so that no row is empty (a softmax over nothing is NaN).
    """
    T = document_ids_BT.shape[1]
    same_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=document_ids_BT.device).tril()
    return (same_BTT & causal_TT)[:, None]


def document_starts(document_ids_BT: Tensor | NDArray[Any]) -> Tensor:
    """Returns where documents start among the B x T tokens of a batch laid end to end, and where the last one ends.

    Every run of equal ids in a sequence is a document, padding included.  Computed on the host, where the ids come
    from: a device would have to be waited for.

    Args:
        document_ids_BT: which document of its sequence a token belongs to; the tokens of one lie together.

    Returns:
        Ascending offsets from 0 to B x T, shape [C], int32 on the CPU.  The last is repeated (empty documents) up to a
        power of two, so that shapes recur.

    Example:
        >>> document_starts(np.array([[0, 0, 1, -1], [0, 0, 0, 0]]))[:6].tolist()
        [0, 2, 3, 4, 8, 8]
    """
    ids_BT = document_ids_BT.cpu().numpy() if isinstance(document_ids_BT, Tensor) else np.asarray(document_ids_BT)
    is_start_BT = np.ones(ids_BT.shape, dtype=bool)
    is_start_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    starts = np.flatnonzero(is_start_BT)
    starts_C = np.full(max(LEAST_STARTS, 1 << len(starts).bit_length()), ids_BT.size, dtype=np.int32)
    starts_C[: len(starts)] = starts
    return torch.from_numpy(starts_C)


def block_mask(document_ids_BT: Tensor) -> Any:
    """Returns ``document_mask`` in the form that flex_attention takes: which blocks of it are empty, full or mixed."""
    from torch.nn.attention.flex_attention import create_block_mask

    B, T = document_ids_BT.shape

    def may_attend(sequence: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document_ids_BT[sequence, query] == document_ids_BT[sequence, key]) & (query >= key)

    return create_block_mask(may_attend, B, None, T, T, device=document_ids_BT.device)


def attention_inputs(name: str, document_ids_BT: Tensor, document_starts_C: Tensor | None) -> dict[str, Any]:
    """Returns the keyword arguments with which a model's forward pass keeps documents apart.

    Args:
        name: ``sdpa``, ``varlen`` or ``flex``.
        document_ids_BT: which document of its sequence a token belongs to.
        document_starts_C: from ``document_starts``, on the device; without it ``varlen`` waits for the device.
    """
    if name == "sdpa":
        return {"attention_mask": document_mask(document_ids_BT)}
    # Not as the mask: some models look at its shape and some add to it.
    if name == "flex":
        return {"attention_mask": None, "document_blocks": block_mask(document_ids_BT)}
    if document_starts_C is None:
        document_starts_C = document_starts(document_ids_BT).to(document_ids_BT.device)
    return {"attention_mask": None, "document_starts_C": document_starts_C}


def use_attention(model: Any, name: str, own: str | None) -> None:
    """Makes a transformers model attend in one of the three ways.

    Args:
        model: a transformers model; its configuration is changed.
        name: ``sdpa``, ``varlen`` or ``flex``.
        own: the implementation that the model came with, which takes a mask; what ``sdpa`` goes back to.

    Raises:
        ValueError: there is no such way, or this torch or this model does not offer it.
    """
    if name == "sdpa":
        # Models that cannot change never left their own.
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)
        return
    if name not in NAMES:
        raise ValueError(f'attention "{name}" is unknown; expected sdpa, {" or ".join(NAMES)}')
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{type(model).__name__} does not take other attention")
    _register(name, varlen_attention(varlen_kernel()) if name == "varlen" else flex_attention(flex_kernel()))
    model.set_attn_implementation(f"doremi_mix_{name}")


def _register(name: str, attend: Attend) -> None:
    """Lets transformers know a way to attend.

    It gets no entry among the mask functions on purpose: for a name without one, transformers builds no mask and does
    not look for borders in the positions, for which it would wait for the device.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(f"doremi_mix_{name}", attend)


def varlen_kernel() -> Callable[..., Tensor]:
    """Returns torch's flash attention over documents of any length.

    Raises:
        ValueError: this torch has none.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise ValueError(f"torch {torch.__version__} has none") from None
    return cast("Callable[..., Tensor]", varlen_attn)


def varlen_attention(kernel: Callable[..., Tensor]) -> Attend:
    """Wraps a kernel with the signature of torch's ``varlen_attn`` as an attention function of transformers.

    The kernel's parameters changed from release to release of torch (2.10 has ``is_causal``, later ones
    ``window_size``, ``scale`` and ``enable_gqa``), so what it takes is asked of its signature.
    """
    parameters = inspect.signature(kernel).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    takes_scale, takes_groups = "scale" in parameters, "enable_gqa" in parameters

    def attend(
        module: Any,  # noqa: ARG001 (the interface's)
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,  # noqa: ARG001 (None: the starts say it all)
        dropout: float = 0.0,
        scaling: float | None = None,
        document_starts_C: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        _refuse_extras(dropout, others)
        _check_given(document_starts_C)
        B, H, T, E = query.shape
        groups = H // key.shape[1]
        query, key, value = (
            heads.transpose(1, 2).flatten(0, 1) for heads in _in_autocast_dtype(query, key, value)
        )  # [B * T, H or G, E]
        options = dict(causal)
        if takes_scale:
            options["scale"] = scaling
        elif scaling is not None:
            query = query * (scaling * math.sqrt(E))
        if groups > 1 and takes_groups:
            options["enable_gqa"] = True
        elif groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        # T bounds the length of a document: the true maximum is another number in every batch.
        mixed = kernel(query, key, value, document_starts_C, document_starts_C, T, T, **options)
        return mixed.view(B, T, H, -1), None

    return attend


@lru_cache(maxsize=1)
def flex_kernel() -> Callable[..., Tensor]:
    """Returns torch's flex_attention, compiled: without, it would make the whole matrix of scores."""
    from torch.nn.attention import flex_attention as module

    return torch.compile(module.flex_attention)


def flex_attention(kernel: Callable[..., Tensor]) -> Attend:
    """Wraps a kernel with the signature of torch's ``flex_attention`` as an attention function of transformers."""

    def attend(
        module: Any,  # noqa: ARG001 (the interface's)
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,  # noqa: ARG001 (None: the blocks say it all)
        dropout: float = 0.0,
        scaling: float | None = None,
        document_blocks: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        _refuse_extras(dropout, others)
        _check_given(document_blocks)
        grouped = query.shape[1] != key.shape[1]
        query, key, value = _in_autocast_dtype(query, key, value)
        mixed = kernel(query, key, value, block_mask=document_blocks, scale=scaling, enable_gqa=grouped)
        return mixed.transpose(1, 2).contiguous(), None

    return attend


def _check_given(borders: Any) -> None:
    if borders is None:
        raise ValueError("the model does not hand the documents' borders on to its attention")


def _refuse_extras(dropout: float, others: dict[str, Any]) -> None:
    """Refuses what some models add to attention and the fast ways would leave out without a word.

    A sliding window is no such thing: the mask, as ``sdpa`` gets it, has none either.
    """
    extras = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if dropout or extras:
        raise ValueError(f"the model's attention has {', '.join(extras) or 'dropout'}")


def _in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """Casts to what autocast computes in, as it does by itself for SDPA only: rotary positions come out in float32."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def choose_attention(
    model: Any, device: torch.device, dtype: torch.dtype, ways: Sequence[str] | None = None
) -> tuple[str, str]:
    """Finds the fastest way to attend that gives SDPA's numbers, in values and gradients.

    A few packed tokens go through the model once with the mask and once without, which shows that the borders reach
    every attention layer and nothing else changes; then each kernel is held against SDPA in float32 on random heads of
    the sizes that were seen, on the device and in the dtype of training.

    Args:
        model: a ``TokenLossModel``, on any device; left as it was.
        device: where it will train.
        dtype: what attention will compute in.
        ways: to be tried in this order; by default the fast ones on CUDA, and none elsewhere.

    Returns:
        What to set ``model.attention`` to, and one line that says why no faster way was taken, empty if there is none.
    """
    if ways is None:
        ways = tuple(NAMES) if device.type == "cuda" else ()
    refused: list[str] = []
    for name in ways:
        reason = _why_not(model, name, device, dtype)
        if reason is None:
            return name, f"attention: {NAMES[name]}; {'; '.join(refused)}" if refused else ""
        refused.append(f"{NAMES[name]} is off: {reason}")
    return "sdpa", f"attention: SDPA with a mask; {'; '.join(refused) or 'the fast ways need CUDA'}"


@dataclass(frozen=True, slots=True)
class _Heads:
    """The sizes of one attention layer."""

    num_heads: int
    num_groups: int
    size: int
    value_size: int
    scaling: float | None


def _why_not(model: Any, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Says in a few words why a way to attend is not to be used; None where it is fine."""
    try:
        seen = _heads_of(model, name)
        if isinstance(seen, str):
            return seen
        attend = varlen_attention(varlen_kernel()) if name == "varlen" else flex_attention(flex_kernel())
        # Rounding of the outputs and of the probabilities; an attention over a wrong border is off by tens of percent.
        allowed = max(4 * torch.finfo(dtype).eps, 2e-3)
        for heads in seen:
            for what, error in _errors(attend, heads, name, device, dtype).items():
                if not error <= allowed:
                    return f"its {what} differ from SDPA's by {error:.1%} (allowed {allowed:.1%})"
    except Exception as error:  # kernels and compilers fail in many ways, and none of them may stop a training
        return short_reason(error)
    return None


@torch.no_grad()
def _heads_of(model: Any, name: str) -> list[_Heads] | str:
    """Runs packed documents through a model with the mask and, computed the same, without; returns what heads it has.

    Returns:
        The distinct sizes of its attention layers, or why the model cannot do without the mask.
    """
    place = next(model.parameters()).device
    documents_BT = torch.tensor([[0] * 5 + [1] * 8 + [-1] * 3, [0] * 16], device=place)
    positions_BT = torch.tensor([[*range(5), *range(8), 0, 0, 0], [*range(16)]], device=place)
    num_tokens = model.model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(num_tokens, (2, 16), generator=torch.Generator().manual_seed(0)).to(place)
    mask = document_mask(documents_BT)
    seen: dict[_Heads, None] = {}

    def attend(
        module: Any,  # noqa: ARG001 (the interface's)
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,  # noqa: ARG001 (None)
        dropout: float = 0.0,
        scaling: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        _check_given(others.get("document_starts_C" if name == "varlen" else "document_blocks"))
        _refuse_extras(dropout, others)
        groups = query.shape[1] // key.shape[1]
        seen[_Heads(query.shape[1], key.shape[1], query.shape[3], value.shape[3], scaling)] = None
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return mixed.transpose(1, 2).contiguous(), None

    previous = model.attention
    try:
        model.attention = name
        _register(name, attend)
        found_BT = model(ids_BT, ids_BT, positions_BT, documents_BT)
        model.attention = "sdpa"
        expected_BT = model(ids_BT, ids_BT, positions_BT, documents_BT)
    finally:
        model.attention = previous
    tolerance = max(1e-4, torch.finfo(expected_BT.dtype).eps, torch.finfo(next(model.parameters()).dtype).eps)
    if not seen:
        return f"{type(model.model).__name__} does not take other attention"
    if not torch.allclose(found_BT, expected_BT, rtol=tolerance, atol=tolerance):
        return f"{type(model.model).__name__} needs the mask elsewhere too"
    return list(seen)


def _errors(attend: Attend, heads: _Heads, name: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Returns how far attention over random packed documents is from SDPA in float32, relative to its size."""
    lengths = [[1, 70, 130, 0, 55], [256, 0, 0, 0, 0]]  # across blocks of 128, in which kernels compute
    documents_BT = torch.stack([torch.arange(5).repeat_interleave(torch.tensor(row)) for row in lengths])
    B, T = documents_BT.shape
    generator = torch.Generator().manual_seed(0)

    def random(num_heads: int, size: int) -> Tensor:
        return torch.randn(B, num_heads, T, size, generator=generator).to(device, dtype).requires_grad_()

    tensors = (
        random(heads.num_heads, heads.size),
        random(heads.num_groups, heads.size),
        random(heads.num_groups, heads.value_size),
    )
    upstream = torch.randn(B, T, heads.num_heads, heads.value_size, generator=generator).to(device)
    inputs = attention_inputs(name, documents_BT.to(device), document_starts(documents_BT).to(device))
    found, _ = attend(None, *tensors, **inputs, scaling=heads.scaling)
    found_gradients = torch.autograd.grad(found, tensors, upstream.to(found.dtype))

    query, key, value = (tensor.detach().float().requires_grad_() for tensor in tensors)
    groups = heads.num_heads // heads.num_groups
    expected = F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(groups, dim=1),
        value.repeat_interleave(groups, dim=1),
        attn_mask=document_mask(documents_BT.to(device)),
        scale=heads.scaling,
    ).transpose(1, 2)
    expected_gradients = torch.autograd.grad(expected, (query, key, value), upstream)

    def difference(one: Tensor, other: Tensor) -> float:
        return float((one.detach().float() - other.detach()).norm() / other.detach().norm())

    pairs = zip(found_gradients, expected_gradients, strict=True)
    return {"values": difference(found, expected), "gradients": max(difference(*pair) for pair in pairs)}

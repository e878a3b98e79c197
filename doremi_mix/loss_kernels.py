"""Ways to compute the cross-entropy of a linear head, all called ``kernel(hidden_ND, head_VD, labels_N) -> loss_N``.

Axes: N tokens, D hidden size, V vocabulary (the head's words); M tokens by W words are one block of the logits.

Every one of them makes the logits in parts and makes them again for the gradient, 8 N D V operations for the 6 N D V of
the path that holds all logits.  What is saved are that path's passes over memory: it writes or reads the N x V logits,
their log-softmax and the gradients of both about ten times.  Blocks that stay in the processor's caches make up for the
fourth product: on two CPU cores, 2,048 x 256 x 125,696 in float32 takes 0.94 of the time of full logits, and 5,000 x
96 x 4,096 takes 0.66 (scripts/bench/loss.py).

``blocked_cross_entropy`` is ours and needs nothing but torch.  The others are packages that a user may have installed;
they are imported when called, and ``doremi_mix.loss.select_loss_kernel`` finds out what they are worth.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# 2**26 float32 logits are 256 MiB: up to there, keeping them is faster than making them twice.
MAX_KEPT_LOGITS = 2**26
LOG2_E = 1 / math.log(2)

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


class Passes(NamedTuple):
    """What is done to the numbers of a block, as ``fold`` and ``gradient`` below, or as faster versions of them."""

    fold: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


class _Blocks(NamedTuple):
    """How the logits are cut, whether they are kept for the gradient, and what is done to each block."""

    num_tokens: int
    num_words: int
    keep: bool
    passes: Passes


def fold(logits_MW: Tensor, scratch_MW: Tensor, max_M: Tensor, sum_M: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """Takes a block of logits into the running maximum of each token, and into its sum of exp(logit - maximum)."""
    new_max_M = torch.maximum(max_M, logits_MW.amax(dim=1))
    return new_max_M, sum_M * (max_M - new_max_M).exp() + (logits_MW - new_max_M[:, None]).exp().sum(dim=1)


def gradient(
    logits_MW: Tensor,
    scratch_MW: Tensor,  # noqa: ARG001
    lse_M: Tensor,
    upstream_M: Tensor,
    column_M: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the gradient of the logits: (softmax - onehot) times the upstream gradient of each token's loss.

    Args:
        logits_MW: the block.
        scratch_MW: a buffer of its size, which may be the block itself, and whose content does not matter.
        lse_M: log-sum-exp of each token's logits over the whole vocabulary.
        upstream_M: gradient of what is minimized with respect to each token's loss.
        column_M: where in the block a token's label is; less than 0, or W and more, where it is in another block.
        dtype: of the result.  The difference is taken before it is rounded to that: of a token that the model is sure
            of, 0.9990 - 1 would be all rounding error.
    """
    onehot_MW = torch.arange(logits_MW.shape[1], device=logits_MW.device) == column_M[:, None]
    probability_MW = (logits_MW - lse_M[:, None]).exp()
    return ((probability_MW - onehot_MW.to(probability_MW.dtype)) * upstream_M[:, None]).to(dtype)


def _fold_in_place(logits_MW: Tensor, scratch_MW: Tensor, max_M: Tensor, sum_M: Tensor) -> tuple[Tensor, Tensor]:
    new_max_M = torch.maximum(max_M, logits_MW.amax(dim=1))
    shifted_MW = torch.sub(logits_MW, new_max_M[:, None], out=scratch_MW)
    return new_max_M, sum_M * (max_M - new_max_M).exp() + _exp_(shifted_MW).sum(dim=1)


def _gradient_in_place(
    logits_MW: Tensor, scratch_MW: Tensor, lse_M: Tensor, upstream_M: Tensor, column_M: Tensor, dtype: torch.dtype
) -> Tensor:
    gradient_MW = _exp_(torch.sub(logits_MW, lse_M[:, None], out=scratch_MW))
    column_M1, inside_M = _inside(column_M, gradient_MW.shape[1])
    gradient_MW.scatter_add_(1, column_M1, inside_M[:, None].to(gradient_MW.dtype).neg_())
    return gradient_MW.mul_(upstream_M[:, None]).to(dtype)


def _exp_(numbers: Tensor) -> Tensor:
    # On CPUs exp2 is vectorized better: 0.28 ns a number against 0.82 ns.
    return numbers.mul_(LOG2_E).exp2_() if numbers.device.type == "cpu" else numbers.exp_()


def _inside(column_M: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """Returns each label's column, moved into the block where it is outside, and whether it was inside."""
    inside_M = (column_M >= 0) & (column_M < num_words)
    return column_M.clamp(0, num_words - 1)[:, None], inside_M


IN_PLACE = Passes(_fold_in_place, _gradient_in_place)


def blocked_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    max_kept_logits: int = MAX_KEPT_LOGITS,
    block_shape: tuple[int, int] | None = None,
    passes: Passes = IN_PLACE,
) -> Tensor:
    """Computes the cross-entropy of each token block by block, with an online log-sum-exp over the vocabulary.

    The outer loop is over words: a block of words meets all tokens before the next one comes, so that the head is read
    once, its gradient is finished piece by piece, and only the gradient of the hidden states (N x D) is summed over
    blocks, in float32.  No step waits for the device.

    Memory beyond the two gradients that are returned, at 16,384 tokens of D = 1,024 in bfloat16 on a GPU (8,192 x 4,096
    blocks): a block in float32 134 MB and its gradient in bfloat16 67 MB, the float32 sum of the hidden gradient 67 MB,
    the words of a block 8 MB: 276 MB, whatever the vocabulary.  On a CPU: 28 MiB.

    Args:
        hidden_ND: hidden states.
        head_VD: the head's weight; rounded to the type of the hidden states, block by block, where it is wider.
        labels_N: the token to predict, in [0, V).  A label outside of it gives a loss that is not a number.
        max_kept_logits: keep the logits for the gradient where there are no more than this, and only then.
        block_shape: tokens and words of a block; chosen by the device if None.
        passes: what is done to the numbers of each block.

    Returns:
        The loss of each token in nats, float32 (float64 for float64 inputs).
    """
    num_tokens, num_words = block_shape or _block_shape(hidden_ND.shape[0], hidden_ND.device)
    differentiates = torch.is_grad_enabled() and (hidden_ND.requires_grad or head_VD.requires_grad)
    keep = differentiates and hidden_ND.shape[0] * head_VD.shape[0] <= max_kept_logits
    blocks = _Blocks(num_tokens, num_words, keep, passes)
    loss_N: Tensor = _BlockedCrossEntropy.apply(hidden_ND, head_VD, labels_N, blocks)  # type: ignore[no-untyped-call]
    return loss_N


def _block_shape(num_tokens: int, device: torch.device) -> tuple[int, int]:
    """Chooses tokens and words of a block.

    On a CPU a block is 28 MiB: in the last cache, more or less, and under the 32 MiB from which on the C library gets a
    buffer's pages from the system each time.  A fourth of that takes the same time while nothing else runs.  But each
    operation ends with its threads waiting for each other, and where processors are shared with another busy program,
    small blocks take several times as long.  On a GPU a block is large enough that each product fills the device (4,096
    x 768 numbers of the head's gradient are 192 tiles of 128 x 128).
    """
    if device.type == "cpu":
        max_tokens, size = 2048, 7 * 2**20
    else:
        max_tokens, size = 8192, 2**25
    tokens = min(max(num_tokens, 1), max_tokens)
    if device.type == "cpu":
        return tokens, size // tokens
    # Rows that do not start at a multiple of 16 bytes keep a product off the fast kernels.
    return tokens, max(128, size // tokens // 128 * 128)


class _BlockedCrossEntropy(torch.autograd.Function):
    # What belongs to one block of tokens is a tensor of its own, not a view: compiled passes would be compiled again
    # for each kind of view.

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, blocks: _Blocks) -> Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            operand, total = _dtypes(hidden_ND)
            factor_ND = hidden_ND.to(operand)
            scratch = _Scratch(blocks, hidden_ND, head_VD)
            pieces = _cut(len(hidden_ND), blocks.num_tokens)
            maxima = [hidden_ND.new_full((piece.stop - piece.start,), -math.inf, dtype=total) for piece in pieces]
            sums = [torch.zeros_like(max_M) for max_M in maxima]
            targets = [torch.full_like(max_M, math.nan) for max_M in maxima]
            kept: list[Tensor] = []
            for words in _cut(len(head_VD), blocks.num_words):
                head_WD = head_VD[words].to(hidden_ND.dtype).to(operand)
                for i, tokens in enumerate(pieces):
                    scratch_MW = scratch.block(tokens, words)
                    logits_MW = torch.empty_like(scratch_MW) if blocks.keep else scratch_MW
                    _multiply(factor_ND[tokens], head_WD.T, logits_MW)
                    column_M1, inside_M = _inside(labels_N[tokens] - words.start, logits_MW.shape[1])
                    targets[i] = torch.where(inside_M, logits_MW.gather(1, column_M1)[:, 0], targets[i])
                    maxima[i], sums[i] = blocks.passes.fold(logits_MW, scratch_MW, maxima[i], sums[i])
                    kept += [logits_MW] * blocks.keep
            lse = [max_M + sum_M.log() for max_M, sum_M in zip(maxima, sums, strict=True)]
            ctx.save_for_backward(hidden_ND, head_VD, labels_N, *lse, *kept)
            ctx.blocks = blocks
            nothing = hidden_ND.new_empty(0, dtype=total)
            return torch.cat([nothing, *(lse_M - target_M for lse_M, target_M in zip(lse, targets, strict=True))])

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_ND, head_VD, labels_N, *lse_and_kept = ctx.saved_tensors
        blocks: _Blocks = ctx.blocks
        with torch.autocast(hidden_ND.device.type, enabled=False):
            operand, total = _dtypes(hidden_ND)
            factor_ND = hidden_ND.to(operand)
            scratch = _Scratch(blocks, hidden_ND, head_VD)
            pieces = _cut(len(hidden_ND), blocks.num_tokens)
            lse, kept = lse_and_kept[: len(pieces)], iter(lse_and_kept[len(pieces) :])
            upstream = [upstream_N[tokens].clone() for tokens in pieces]
            hidden_grad_ND = torch.zeros_like(hidden_ND, dtype=total) if ctx.needs_input_grad[0] else None
            # Of no tokens, nothing would be written below.
            head_grad_VD = (
                (torch.empty_like if pieces else torch.zeros_like)(head_VD) if ctx.needs_input_grad[1] else None
            )
            for words in _cut(len(head_VD), blocks.num_words):
                head_WD = head_VD[words].to(hidden_ND.dtype).to(operand)
                rows_WD = sum_WD = None
                if head_grad_VD is not None:  # summed in place where it is wide enough for a sum
                    rows_WD = head_grad_VD[words]
                    sum_WD = rows_WD if rows_WD.dtype == total else torch.empty_like(rows_WD, dtype=total)
                for i, tokens in enumerate(pieces):
                    scratch_MW = scratch.block(tokens, words)
                    if blocks.keep:
                        logits_MW = next(kept)
                    else:
                        logits_MW = scratch_MW
                        _multiply(factor_ND[tokens], head_WD.T, logits_MW)
                    column_M = labels_N[tokens] - words.start
                    gradient_MW = blocks.passes.gradient(logits_MW, scratch_MW, lse[i], upstream[i], column_M, operand)
                    if hidden_grad_ND is not None:
                        _multiply(gradient_MW, head_WD, hidden_grad_ND[tokens], add=True)
                    if sum_WD is not None:
                        _multiply(gradient_MW.T, factor_ND[tokens], sum_WD, add=i > 0)
                if rows_WD is not None and sum_WD is not None and sum_WD is not rows_WD:
                    rows_WD.copy_(sum_WD)
        return None if hidden_grad_ND is None else hidden_grad_ND.to(hidden_ND.dtype), head_grad_VD, None, None


class _Scratch:
    """One buffer for the blocks of all sizes, one after the other."""

    def __init__(self, blocks: _Blocks, hidden_ND: Tensor, head_VD: Tensor) -> None:
        size = min(len(hidden_ND), blocks.num_tokens) * min(len(head_VD), blocks.num_words)
        self.buffer = hidden_ND.new_empty(size, dtype=_dtypes(hidden_ND)[1])

    def block(self, tokens: slice, words: slice) -> Tensor:
        shape = tokens.stop - tokens.start, words.stop - words.start
        return self.buffer[: math.prod(shape)].view(shape).detach()


def _cut(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _dtypes(hidden_ND: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Returns the types of the matrices that are multiplied, and of the products, sums and losses."""
    total = torch.promote_types(hidden_ND.dtype, torch.float32)
    # bfloat16 numbers times bfloat16 numbers are exact in float32, so widening them first gives the same sums, slower.
    is_mixed = hidden_ND.dtype != total and multiplies_into_float32(hidden_ND.device, hidden_ND.dtype)
    return (hidden_ND.dtype if is_mixed else total), total


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Writes the product into ``out``, or adds it; the sums of the product are of the type of ``out``."""
    if left.dtype != out.dtype:
        _multiply_mixed(left, right, out, add=add)
    elif add:
        torch.addmm(out, left, right, out=out)
    else:
        torch.mm(left, right, out=out)


def _multiply_mixed(left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
    if add and multiplies_into_float32(left.device, left.dtype, add=True):
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    elif add:
        out.add_(torch.mm(left, right, out_dtype=out.dtype))
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


@functools.cache
def multiplies_into_float32(device: torch.device, dtype: torch.dtype, *, add: bool = False) -> bool:
    """Says whether matrices of a narrow type can be multiplied into (or onto) a float32 one, by trying it.

    CUDA can since torch 2.8, and could add only later; CPUs cannot.
    """
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    out = ones.float()
    try:
        if add:
            torch.addmm(out, ones, ones, out_dtype=out.dtype, out=out)
        else:
            torch.mm(ones, ones, out_dtype=out.dtype, out=out)
    except (RuntimeError, TypeError):  # not on this device; not in this version
        return False
    return bool((out == 16 + add).all())


def compiled(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Ours, with the passes over a block fused by ``torch.compile``.

    A block is then read once or twice going forward, and read once and written once, rounded, going back: a third of
    the memory traffic of the passes in place, which are what a GPU spends most of its time on here.
    """
    return blocked_cross_entropy(hidden_ND, head_VD, labels_N, passes=_compiled_passes())


@functools.cache
def _compiled_passes() -> Passes:
    # The number of unmasked tokens is another one in each batch: shapes are left open.
    return Passes(torch.compile(fold, dynamic=True), torch.compile(gradient, dynamic=True))


def cut_cross_entropy(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """The package cut-cross-entropy: the logits of a tile never leave the chip."""
    linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    # Its default leaves out gradients below a threshold.  Versions before 25.9 cannot sum in float32.
    exact = {"filter_eps": None, "accum_e_fp32": True, "accum_c_fp32": True}
    known = inspect.signature(linear_cross_entropy).parameters
    loss_N: Tensor = linear_cross_entropy(
        hidden_ND,
        head_VD.to(hidden_ND.dtype),
        labels_N,
        reduction="none",
        **{name: value for name, value in exact.items() if name in known},
    )
    return loss_N


def liger_kernel(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """The package liger-kernel: chunks of tokens, with one fused pass over each chunk's logits.

    Before 0.8.2 it left out the upstream gradient of each token; it rounds logits to the type of the inputs.
    """
    functional = importlib.import_module("liger_kernel.transformers.functional")
    loss_N: Tensor = functional.liger_fused_linear_cross_entropy(
        hidden_ND, head_VD.to(hidden_ND.dtype), labels_N, reduction="none", accum_dtype=torch.float32
    )
    return loss_N


def torch_chunked(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """What torch 2.13 has of its own: chunks of tokens; losses, and sums over chunks, in the type of the inputs."""
    try:
        linear_cross_entropy = torch.nn.functional.linear_cross_entropy
        options = torch.nn.LinearCrossEntropyOptions
    except AttributeError:
        raise ImportError("torch 2.13 or newer is needed") from None
    num_tokens = max(1, MAX_KEPT_LOGITS // head_VD.shape[0])
    loss_N: Tensor = linear_cross_entropy(
        hidden_ND,
        head_VD.to(hidden_ND.dtype),
        labels_N,
        reduction="none",
        # Its own choice of 64 tokens a chunk reads the whole head, and its gradient, for each 64.
        options=options(batch_chunk_size=num_tokens, chunking_method=None),
    )
    return loss_N


CUDA_KERNELS: dict[str, Kernel] = {
    "compiled": compiled,
    "cut-cross-entropy": cut_cross_entropy,
    "liger-kernel": liger_kernel,
    "torch": torch_chunked,
}
"""What may be faster than our blocks on a GPU, by name."""

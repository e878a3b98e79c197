"""Per-token cross-entropy straight from hidden states, and which kernel computes it.

Axes: B sequences, T tokens, D hidden size, V vocabulary, N tokens whose loss is computed.

The logits of a batch are its largest tensor by far (at a vocabulary of 125,696, 16,384 tokens need 8 GB).  Only the
unmasked tokens need any, and never all at once.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch user knows)
from torch import Tensor

from doremi_mix.loss_kernels import CUDA_KERNELS, MAX_KEPT_LOGITS, Kernel, blocked_cross_entropy

BLOCKS = "blocks"
"""The name of our own kernel, which every device can run."""

# What a kernel may differ by from float64 on the same, rounded inputs.  Logits summed in float32 give losses to about
# 1e-5; logits rounded to bfloat16 are off by 2**-9 of themselves, 0.02 and more.
LOSS_TOLERANCE = 1e-3
# Rounding the logits' gradient and the result to bfloat16 (half of 2**-8 at most, each) gives 0.0016.
GRADIENT_TOLERANCE = 2**-8
# The same for the worst row, so that rare words count; rows of next to no gradient are all rounding error.
ROW_TOLERANCE, ROW_FLOOR = 2**-6, 2**-8


class LossKernel(NamedTuple):
    """A way to compute the loss, chosen for a device.

    Attributes:
        name: for logs.
        function: ``(hidden_ND, head_VD, labels_N) -> loss_N``, or None for our own blocks.
        reason: one line on why this one.
    """

    name: str
    function: Kernel | None
    reason: str


def linear_cross_entropy(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    labels_BT: Tensor,
    ignore_index: int = -100,
    *,
    label_index_N: Tensor | None = None,
    kernel: LossKernel | None = None,
    max_kept_logits: int = MAX_KEPT_LOGITS,
) -> Tensor:
    """Cross-entropy of a linear head, one loss per token, without holding the logits.

    Exact in value and in both gradients, for any upstream gradient per token: the gradient may be weighted by what is
    known only once the losses are.  Logits, sums and losses are float32 (float64 for float64 inputs), also of bfloat16
    inputs.  Ignored tokens cost nothing and are never read.  Under autocast, hidden states and head are rounded to its
    type first; the gradient of a float32 head is float32.

    Args:
        hidden_BTD: hidden states.
        head_VD: the head's weight; it may be the embeddings, too.
        labels_BT: the token to predict at each position; ``ignore_index`` where there is none.
        ignore_index: the label of tokens that do not count.
        label_index_N: positions, int64, in the B * T tokens laid end to end, of all labels that count, once each, on
            the labels' device.  Positions whose label is ignored may be among them, any number of times (to fill an
            index up to a round length): they give 0 and no gradient.  If None it is found from the labels, for which
            the host waits for a GPU; the host that made the labels knows it without.
        kernel: what ``select_loss_kernel`` chose for the device; our own blocks if None.
        max_kept_logits: up to this many logits (unmasked tokens times V) are kept by our own kernel for the gradient;
            beyond it none are, and they are made again in the backward pass.

    Returns:
        The loss of each token in nats, shape [B, T], 0 where the label is ignored.

    Raises:
        ValueError: a label is not a row of the head.  Found on a CPU only; elsewhere its loss is not a number.

    Example:
        >>> hidden_BTD, head_VD = torch.zeros(1, 2, 3), torch.ones(4, 3)
        >>> linear_cross_entropy(hidden_BTD, head_VD, torch.tensor([[1, -100]]))  # log 4, and an ignored token
        tensor([[1.3863, 0.0000]])
    """
    labels_all = labels_BT.flatten()
    index_N = (labels_all != ignore_index).nonzero().squeeze(1) if label_index_N is None else label_index_N
    # index_select with a flat index is the same gather forward and a plain index_add backward.
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, index_N)
    labels_N = labels_all.index_select(0, index_N)
    ignored_N = None
    if label_index_N is not None:
        ignored_N = labels_N == ignore_index
        labels_N = labels_N.masked_fill(ignored_N, 0)
        # What is under the mask may be NaN, which no upstream gradient of 0 would stop.
        hidden_ND = hidden_ND.masked_fill(ignored_N[:, None], 0)
    _check_labels(labels_N, head_VD.shape[0])
    if torch.is_autocast_enabled(hidden_ND.device.type):
        # Here, so that the backward pass, which runs outside autocast, sees the same numbers.
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(hidden_ND.device.type))
    if kernel is not None and kernel.function is not None and len(labels_N):
        loss_N = kernel.function(hidden_ND, head_VD, labels_N)
    else:
        loss_N = blocked_cross_entropy(hidden_ND, head_VD, labels_N, max_kept_logits=max_kept_logits)
    if ignored_N is not None:
        loss_N = loss_N.masked_fill(ignored_N, 0)
    loss = torch.zeros(labels_BT.numel(), dtype=loss_N.dtype, device=loss_N.device)
    return loss.index_copy(0, index_N, loss_N).view(labels_BT.shape)


def _check_labels(labels_N: Tensor, vocab_size: int) -> None:
    if labels_N.device.type == "cpu" and len(labels_N):
        lowest, highest = (int(label) for label in labels_N.aminmax())
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"label {wrong} is none of the head's {vocab_size:,} rows")


def select_loss_kernel(
    device: torch.device,
    dtype: torch.dtype,
    *,
    candidates: Mapping[str, Kernel] | None = None,
    num_tokens: int = 4096,
    hidden_size: int = 768,
    vocab_size: int = 32_768,
) -> LossKernel:
    """Chooses how a device computes the loss: the fastest kernel whose values and gradients are right.

    Each candidate computes the losses and gradients of made-up tokens, some of them ignored, under a different upstream
    gradient for each token, and is compared with the plain path in float64 on the same numbers.  Those that agree, and
    our own blocks, are timed on them.  It is done once for a device, a type and a size; call it when training starts.
    The fastest may be another one on another day: to repeat a run to the last bit, pass its kernel as the only
    candidate.

    Args:
        device: where the loss is computed.
        dtype: of the hidden states in training, under autocast that of autocast.
        candidates: kernels by name; ``loss_kernels.CUDA_KERNELS`` on a GPU if None, and none on a CPU, where our own
            blocks are chosen at once.
        num_tokens: unmasked tokens of a typical step, or fewer.
        hidden_size: D.
        vocab_size: V.

    Returns:
        The kernel.  Its reason names the time and memory of those that were right and what was wrong with the others;
        where it is our own for want of another, that is the warning to print.
    """
    size = _Size(num_tokens, hidden_size, vocab_size)
    if candidates is not None:
        return _select(device, dtype, candidates, size)
    if device.type != "cuda":
        return LossKernel(BLOCKS, None, f"loss kernel: {BLOCKS}")
    return _select_for_cuda(device, dtype, size)


class _Size(NamedTuple):
    num_tokens: int
    hidden_size: int
    vocab_size: int


class _Problem(NamedTuple):
    """Made-up tokens: what goes in, the upstream gradient of each loss, and what must come out."""

    hidden_BTD: Tensor
    head_VD: Tensor
    labels_BT: Tensor
    label_index_N: Tensor
    upstream_BT: Tensor
    expected: tuple[Tensor, ...]


class _Cost(NamedTuple):
    seconds: float
    peak_bytes: int


@functools.cache
def _select_for_cuda(device: torch.device, dtype: torch.dtype, size: _Size) -> LossKernel:
    try:
        return _select(device, dtype, CUDA_KERNELS, size)
    except torch.OutOfMemoryError:
        reason = f"loss kernel: {BLOCKS}; too little memory is free to try the others ({', '.join(CUDA_KERNELS)})"
        return LossKernel(BLOCKS, None, reason)
    finally:
        torch.cuda.empty_cache()


def _select(device: torch.device, dtype: torch.dtype, candidates: Mapping[str, Kernel], size: _Size) -> LossKernel:
    problem = _make_problem(device, dtype, size)
    failures: list[str] = []
    costs: dict[str, _Cost] = {}
    for name, function in {BLOCKS: None, **candidates}.items():
        kernel = LossKernel(name, function, "")
        failure = _what_is_wrong(problem, kernel)
        if failure is None:
            costs[name] = _cost(problem, kernel)
        else:
            failures.append(f"{name}: {failure}")
    name = min(costs, key=lambda one: costs[one].seconds, default=BLOCKS)
    parts = [f"{one} {cost.seconds * 1e3:.1f} ms{_memory(cost)}" for one, cost in costs.items()]
    measured = f" ({', '.join(parts)} for {size.num_tokens:,} tokens)" if parts else ""
    reason = "; ".join([f"loss kernel: {name}{measured}", *failures])
    return LossKernel(name, candidates.get(name), reason)


def _memory(cost: _Cost) -> str:
    return f" and {cost.peak_bytes / 2**30:.2f} GiB" if cost.peak_bytes else ""


def _make_problem(device: torch.device, dtype: torch.dtype, size: _Size) -> _Problem:
    """Makes up tokens like those of a trained model: some predicted with certainty, some not; a quarter is ignored."""
    (num_tokens, D, V), generator = size, torch.Generator(device).manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    head_VD = torch.randn(V, D, generator=generator, device=device) * (2 / D**0.5)
    labels_BT = (uniform(2, -(-num_tokens * 2 // 3)) * V).long().clamp_(max=V - 1)
    # Pulled toward its label's row w by up to 8 w, a token's logit for it is up to 32; the others' spread is 2.
    hidden_BTD = torch.randn(*labels_BT.shape, D, generator=generator, device=device)
    hidden_BTD += 8 * uniform(*labels_BT.shape, 1) * head_VD[labels_BT]
    labels_BT[uniform(*labels_BT.shape) < 0.25] = -100
    index_N = (labels_BT != -100).flatten().nonzero().squeeze(1)
    padding = (labels_BT == -100).flatten().nonzero().squeeze(1)[:3]
    hidden_BTD = hidden_BTD.to(dtype)
    upstream_BT = uniform(*labels_BT.shape) - 0.25
    expected = _plain(hidden_BTD.double(), head_VD.to(dtype).double(), labels_BT, upstream_BT.double())
    return _Problem(hidden_BTD, head_VD, labels_BT, torch.cat([index_N, padding]), upstream_BT, expected)


def _plain(hidden_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor, upstream_BT: Tensor) -> tuple[Tensor, ...]:
    """Returns losses and gradients the plain way; a few tokens at a time, as float64 logits are large."""
    hidden_ND, labels_N, upstream_N = hidden_BTD.flatten(0, 1), labels_BT.flatten(), upstream_BT.flatten()
    hidden_ND.requires_grad_()
    head_VD.requires_grad_()
    losses = []
    for start in range(0, len(labels_N), 256):
        few = slice(start, start + 256)
        losses.append(F.cross_entropy(hidden_ND[few] @ head_VD.T, labels_N[few], reduction="none"))
        torch.autograd.backward(losses[-1], upstream_N[few])
    assert hidden_ND.grad is not None
    assert head_VD.grad is not None
    return torch.cat(losses).detach().view(labels_BT.shape), hidden_ND.grad.view(hidden_BTD.shape), head_VD.grad


def _run(problem: _Problem, kernel: LossKernel) -> tuple[Tensor, ...]:
    hidden_BTD, head_VD = problem.hidden_BTD.detach().requires_grad_(), problem.head_VD.detach().requires_grad_()
    loss_BT = linear_cross_entropy(
        hidden_BTD, head_VD, problem.labels_BT, label_index_N=problem.label_index_N, kernel=kernel
    )
    gradients = torch.autograd.grad(loss_BT, (hidden_BTD, head_VD), problem.upstream_BT.to(loss_BT.dtype))
    return loss_BT.detach(), *gradients


def _what_is_wrong(problem: _Problem, kernel: LossKernel) -> str | None:
    """Returns what keeps a kernel from being used, in a few words; None if nothing does."""
    try:
        loss_BT, *gradients = _run(problem, kernel)
    except ModuleNotFoundError as error:
        return f"not installed (no module {error.name})"
    except Exception as error:  # kernels fail in as many ways as there are kernels; none of them may stop training
        first, *_ = str(error).strip().splitlines() or [""]
        return f"failed ({type(error).__name__}: {first[:160]})"
    if loss_BT.dtype != torch.promote_types(problem.hidden_BTD.dtype, torch.float32):
        return f"losses come as {str(loss_BT.dtype).removeprefix('torch.')}"
    expected_loss_BT, *expected_gradients = problem.expected
    off = float((loss_BT - expected_loss_BT).abs().max())
    if not off <= LOSS_TOLERANCE:
        return f"losses off by up to {off:.2g} nats, at most {LOSS_TOLERANCE:g} is right"
    for what, got, expected in zip(("hidden states", "head"), gradients, expected_gradients, strict=True):
        difference = got.double() - expected
        share = float(difference.norm() / expected.norm())
        if not share <= GRADIENT_TOLERANCE:
            return f"gradient of the {what} off by {share:.2g} of itself, at most {GRADIENT_TOLERANCE:.2g} is right"
        rows = expected.norm(dim=-1)
        worst = float((difference.norm(dim=-1) / (rows + ROW_FLOOR * rows.max())).max())
        if not worst <= ROW_TOLERANCE:
            return f"gradient of a row of the {what} off by {worst:.2g}, at most {ROW_TOLERANCE:.2g} is right"
    return None


def _cost(problem: _Problem, kernel: LossKernel) -> _Cost:
    device = problem.head_VD.device
    if device.type != "cuda":
        return _Cost(statistics.median(_timed(lambda: _run(problem, kernel)) for _ in range(3)), 0)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds = statistics.median(_timed_on_cuda(lambda: _run(problem, kernel)) for _ in range(5))
    return _Cost(seconds, torch.cuda.max_memory_allocated(device) - before)


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _timed_on_cuda(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3

"""Per-token cross-entropy straight from hidden states.

Axes: B sequences, T tokens, D hidden size, V vocabulary, N unmasked tokens.

The logits of a batch are its largest tensor by far (at a vocabulary of 125,696, 16,384 tokens need 8 GB).  Only the
unmasked tokens need any; where even those would be too many, they are made in chunks, and made again for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch user knows)
from torch import Tensor

# 2**26 float32 logits are 256 MiB: under that, keeping them is faster than making them twice.
MAX_KEPT_LOGITS = 2**26


def linear_cross_entropy(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    labels_BT: Tensor,
    ignore_index: int = -100,
    max_kept_logits: int = MAX_KEPT_LOGITS,
) -> Tensor:
    """Cross-entropy of a linear head, one loss per token, without holding the full logits.

    Exact in value and in both gradients, for any upstream gradient per token.  Products are accumulated and losses
    computed in float32 (float64 for float64 inputs).  Ignored tokens cost nothing.

    Args:
        hidden_BTD: hidden states.
        head_VD: the head's weight.
        labels_BT: the token to predict at each position; ``ignore_index`` where there is none.
        ignore_index: the label of tokens that do not count.
        max_kept_logits: up to this many logits (unmasked tokens times V) are kept for the gradient; beyond it they are
            made in chunks of that size and made again in the backward pass.

    Returns:
        The loss of each token in nats, shape [B, T], 0 where the label is ignored.
    """
    counted_BT = labels_BT != ignore_index
    # index_select with a flat index is the same gather forward and a plain index_add backward.
    index_N = counted_BT.flatten().nonzero().squeeze(1)
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, index_N)
    labels_N = labels_BT.flatten().index_select(0, index_N)
    if torch.is_autocast_enabled(hidden_ND.device.type):
        # Here, so that the backward pass, which runs outside autocast, sees the same numbers.
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(hidden_ND.device.type))
    if hidden_ND.shape[0] * head_VD.shape[0] <= max_kept_logits:
        loss_N = F.cross_entropy(_logits(hidden_ND, head_VD), labels_N, reduction="none")
    else:
        chunk_size = max(1, max_kept_logits // head_VD.shape[0])
        loss_N = _ChunkedCrossEntropy.apply(hidden_ND, head_VD, labels_N, chunk_size)  # type: ignore[no-untyped-call]
    loss = torch.zeros(labels_BT.numel(), dtype=loss_N.dtype, device=loss_N.device)
    return loss.index_copy(0, index_N, loss_N).view(labels_BT.shape)


def _logits(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
    logits_NV = hidden_ND @ head_VD.to(hidden_ND.dtype).T
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy in chunks of tokens; the backward pass makes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, chunk_size: int) -> Tensor:
        ctx.save_for_backward(hidden_ND, head_VD, labels_N)
        ctx.chunk_size = chunk_size
        return torch.cat(
            [
                F.cross_entropy(_logits(hidden_CD, head_VD), labels_C, reduction="none")
                for hidden_CD, labels_C in zip(
                    torch.split(hidden_ND, chunk_size), torch.split(labels_N, chunk_size), strict=True
                )
            ]
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad_N,) = grad_outputs
        hidden_ND, head_VD, labels_N = ctx.saved_tensors
        accumulate = torch.promote_types(hidden_ND.dtype, torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=accumulate) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden_ND.shape[0], ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            # d loss / d logits = softmax - onehot, times the token's upstream gradient; in place on the one buffer.
            grad_CV = _logits(hidden_ND[chunk], head_VD).softmax(dim=1)
            grad_CV.scatter_add_(1, labels_N[chunk, None], torch.full_like(grad_CV[:, :1], -1.0))
            grad_CV.mul_(grad_N[chunk, None])
            grad_CV = grad_CV.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[chunk] = grad_CV @ head_VD.to(hidden_ND.dtype)
            if grad_head_VD is not None:
                grad_head_VD.add_(grad_CV.T @ hidden_ND[chunk])
        return grad_hidden_ND, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype), None, None

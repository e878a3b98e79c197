"""Held-out loss per domain, with standard errors.

Axes: B sequences of a batch, T tokens, N held-out sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from doremi_mix.types import DomainLoss


def summarize_losses(loss_sums_N: NDArray[np.float64], num_tokens_N: NDArray[np.float64]) -> DomainLoss:
    """Returns the loss per token over some sequences and its standard error.

    The loss is a ratio of two sums over sequences, so its error is that of a ratio estimator: the spread of
    ``sum - loss * tokens`` over sequences.  Sequences, not tokens, are the independent draws.

    Args:
        loss_sums_N: the sum of the losses of each sequence's unmasked tokens, in nats.
        num_tokens_N: how many those are.

    Example:
        >>> summarize_losses(np.array([2.0, 4.0]), np.array([1.0, 1.0]))
        DomainLoss(loss=3.0, standard_error=1.0, num_tokens=2, num_sequences=2)
    """
    num_tokens = float(num_tokens_N.sum())
    count = len(loss_sums_N)
    if num_tokens == 0:
        return DomainLoss(math.nan, math.nan, 0, count)
    loss = float(loss_sums_N.sum()) / num_tokens
    error = math.nan
    if count > 1:
        residuals_N = loss_sums_N - loss * num_tokens_N
        error = math.sqrt(float((residuals_N**2).sum()) * count / (count - 1)) / num_tokens
    return DomainLoss(loss, error, int(num_tokens), count)


@torch.no_grad()
def score_sequences(
    sequence_ids: NDArray[np.int64],
    score: Callable[[NDArray[np.int64]], Tensor],
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
) -> NDArray[np.float64]:
    """Scores sequences in batches, of which this process takes its share.

    Every process calls ``score`` equally often (a call without work of its own is made on the first batch and dropped):
    a model that is split over the processes needs all of them for each forward pass.

    Args:
        sequence_ids: ids to score.
        score: from ids, shape [B], the sum of losses and the number of unmasked tokens of each sequence, shape [B, 2].
        batch_size: sequences in a batch.
        process_index: which process this is.
        num_processes: how many there are.

    Returns:
        Sums and counts, shape [N, 2], zero where another process scored: add the processes' results.
    """
    result_N2 = np.zeros((len(sequence_ids), 2))
    for first in range(0, len(sequence_ids), num_processes * batch_size):
        start = first + process_index * batch_size
        mine = start < len(sequence_ids)
        batch = slice(start, start + batch_size) if mine else slice(0, batch_size)
        scores_B2 = score(sequence_ids[batch])
        if mine:
            result_N2[batch] = scores_B2.double().cpu().numpy()
    return result_N2

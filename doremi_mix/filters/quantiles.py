"""Exact quantiles of a score over any number of shards, from counts that add up.

Axes: B bins, Q probabilities.  A float32 has a 32-bit code that sorts as it does.  Two passes find the value of any
rank: the first counts the upper 16 bits of all codes, the second the lower 16 bits inside the few bins that hold a
wanted rank.  Counts of shards are added, so one shard and a thousand give the same bits.  The first pass holds 0.5 MB,
the second 0.5 MB for each bin::

    counts = sum(count_upper(shard) for shard in shards)
    bins = bins_of_quantiles(counts, probabilities)
    lower_counts = sum(count_lower(shard, bins) for shard in shards)
    quantiles = quantiles_from_counts(counts, bins, lower_counts, probabilities)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_HALF = 1 << 16
_SIGN = np.uint32(1 << 31)


def exact_quantiles(
    shards: Callable[[], Iterable[NDArray[np.float32]]], probabilities: Sequence[float]
) -> NDArray[np.float64]:
    """Returns quantiles of all values of all shards, as ``numpy.quantile`` of their concatenation would.

    Args:
        shards: starts a pass over the values, float32 arrays of any shape; it is called twice.  NaN is left out.
        probabilities: each in [0, 1].

    Returns:
        float64 [Q], interpolated linearly between the two nearest values; NaN where there are no values.  A quantile
        that is itself a value is that value; between a finite and an infinite value lies the infinite one, where NumPy
        gives NaN for some, and between -inf and inf lies NaN.

    Raises:
        ValueError: a probability is outside [0, 1], or values are not float32.

    Example:
        >>> shards = [np.array([4, 1], np.float32), np.array([np.nan, 2], np.float32)]
        >>> exact_quantiles(lambda: shards, [0.0, 0.5, 0.75]).tolist()
        [1.0, 2.0, 3.0]
    """
    upper_counts = np.zeros(_HALF, np.int64)
    for values in shards():
        upper_counts += count_upper(values)
    bins_B = bins_of_quantiles(upper_counts, probabilities)
    lower_counts_B = np.zeros((len(bins_B), _HALF), np.int64)
    for values in shards():
        lower_counts_B += count_lower(values, bins_B)
    return quantiles_from_counts(upper_counts, bins_B, lower_counts_B, probabilities)


def count_upper(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Counts values by the upper half of their codes: int64 [65536], from the least value to the greatest."""
    return np.bincount(_codes(values) >> np.uint32(16), minlength=_HALF)


def bins_of_quantiles(upper_counts: NDArray[np.int64], probabilities: Sequence[float]) -> NDArray[np.int64]:
    """Returns the upper halves that hold the values which the quantiles lie between, sorted and distinct, int64 [B].

    Args:
        upper_counts: the sum of ``count_upper`` over all shards.
        probabilities: each in [0, 1].

    Raises:
        ValueError: a probability is outside [0, 1].
    """
    ranks_2Q, _ = _ranks(int(upper_counts.sum()), probabilities)
    return np.unique(np.searchsorted(np.cumsum(upper_counts), ranks_2Q.ravel(), side="right"))


def count_lower(values: NDArray[np.float32], bins_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts the values of each bin by the lower half of their codes: int64 [B, 65536]."""
    codes = _codes(values)
    uppers = codes >> np.uint32(16)
    row_of_bin = np.full(_HALF, -1, np.int64)
    row_of_bin[bins_B] = np.arange(len(bins_B))
    rows = row_of_bin[uppers]
    wanted = rows >= 0
    cells = rows[wanted] * _HALF + (codes[wanted] & np.uint32(_HALF - 1))
    return np.bincount(cells, minlength=len(bins_B) * _HALF).reshape(len(bins_B), _HALF)


def quantiles_from_counts(
    upper_counts: NDArray[np.int64],
    bins_B: NDArray[np.int64],
    lower_counts_B: NDArray[np.int64],
    probabilities: Sequence[float],
) -> NDArray[np.float64]:
    """Reads the quantiles off the counts of both passes; see ``exact_quantiles``."""
    num_values = int(upper_counts.sum())
    if num_values == 0:
        return np.full(len(probabilities), np.nan)
    ranks_2Q, fractions_Q = _ranks(num_values, probabilities)
    ends = np.cumsum(upper_counts)
    uppers_2Q = np.searchsorted(ends, ranks_2Q, side="right")
    values_2Q = np.empty(ranks_2Q.shape)
    lower_ends_B = np.cumsum(lower_counts_B, axis=1)
    for cell in np.ndindex(*ranks_2Q.shape):
        upper = uppers_2Q[cell]
        rank_in_bin = ranks_2Q[cell] - (ends[upper] - upper_counts[upper])
        lower = np.searchsorted(lower_ends_B[np.searchsorted(bins_B, upper)], rank_in_bin, side="right")
        values_2Q[cell] = _value(int(upper) * _HALF + int(lower))
    return _interpolate(values_2Q[0], values_2Q[1], fractions_Q)


def _ranks(num_values: int, probabilities: Sequence[float]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the ranks, from 0, that each quantile lies between, [2, Q], and how far between, [Q]."""
    probabilities_Q = np.asarray(probabilities, dtype=np.float64)
    if not ((probabilities_Q >= 0) & (probabilities_Q <= 1)).all():
        raise ValueError(f"probabilities must be in [0, 1], got {probabilities_Q.tolist()}")
    if num_values == 0:
        return np.zeros((2, 0), np.int64), np.zeros(0)
    positions_Q = probabilities_Q * (num_values - 1)
    below_Q = np.floor(positions_Q).astype(np.int64)
    return np.stack([below_Q, np.minimum(below_Q + 1, num_values - 1)]), positions_Q - below_Q


def _interpolate(
    below_Q: NDArray[np.float64], above_Q: NDArray[np.float64], fractions_Q: NDArray[np.float64]
) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # inf - inf
        step_Q = above_Q - below_Q
        # Starting from the nearer end, as NumPy does, makes a quantile monotonic in its probability.
        between_Q = np.where(fractions_Q < 0.5, below_Q + step_Q * fractions_Q, above_Q - step_Q * (1 - fractions_Q))
        # Any way toward an infinite end is infinite already; from -inf to inf there is no halfway, so that is NaN.
        between_Q = np.where(np.isfinite(step_Q), between_Q, below_Q + above_Q)
    return np.where((fractions_Q == 0) | (below_Q == above_Q), below_Q, between_Q)


def _codes(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Returns the codes of all values but NaN: for floats, the bits; they sort as the values do."""
    if values.dtype != np.float32:
        raise ValueError(f"values must be float32, got {values.dtype}")
    # Adding 0 turns -0 into 0, so that equal values have equal codes.
    bits = (values[~np.isnan(values)] + np.float32(0)).view(np.uint32)
    # The bits of a positive float sort as it does; those of a negative one the other way round.
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _value(code: int) -> float:
    bits = code & ~int(_SIGN) if code & int(_SIGN) else ~code & 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))

"""How far the domain weights can be trusted: what several seeds agree on.

Axes: R seeds, K domains; ``...`` stands for any leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from doremi_mix.types import check_distribution

FloatArray = npt.NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class WeightSummary:
    """The weights of several seeds in one: the mean, which is what is exported, and how sure it is.

    Attributes:
        mean: the mean weight of each domain over seeds; sums to 1 within 1e-9.
        standard_deviation: of one seed's weight (R - 1 in the denominator), by domain; empty for a single seed.
        intervals: by domain, the 95 % confidence interval (low, high) **of the mean** over seeds: it says where the
            mean of very many seeds would lie, and narrows as seeds are added.  It is not the range in which the weight
            of one more run would fall, which is wider by a factor of about sqrt(R + 1).  Empty for a single seed.
        rank_stability: mean Kendall tau-b over all pairs of seeds: 1 if every seed ranks the domains alike, about 0 if
            the rankings have nothing in common.  None for a single seed, and if a seed ranks nothing because it gives
            all domains one weight.
        num_seeds: R.
    """

    mean: Mapping[str, float]
    standard_deviation: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    rank_stability: float | None
    num_seeds: int

    def __post_init__(self) -> None:
        check_distribution(self.mean, "mean weights")


def summarize_seeds(names: Sequence[str], weights_RK: npt.ArrayLike) -> WeightSummary:
    """Summarizes the weights that several independent seeds learned.

    Args:
        names: the names of the domains, in domain order.
        weights_RK: the weights that each seed learned, each on the simplex within 1e-6, shape [R, K].

    Returns:
        Mean, standard deviation, 95 % interval of the mean, and stability of the ranking.

    Raises:
        ValueError: there is no seed, the shape does not fit the names, a name occurs twice, or the weights of a seed
            are no distribution.

    Example:
        >>> summary = summarize_seeds(["dolly", "gsm8k"], [[0.5, 0.5], [0.6, 0.4], [0.7, 0.3]])
        >>> round(summary.mean["dolly"], 6), round(summary.standard_deviation["dolly"], 6)
        (0.6, 0.1)
        >>> [round(bound, 4) for bound in summary.intervals["dolly"]]
        [0.3476, 0.8085]
    """
    weights = _check_weights(names, weights_RK)
    num_seeds = weights.shape[0]
    mean = dict(zip(names, weights.mean(0).tolist(), strict=True))
    if num_seeds == 1:
        return WeightSummary(mean, {}, {}, None, 1)
    low_K, high_K = mean_intervals(weights)
    return WeightSummary(
        mean=mean,
        standard_deviation=dict(zip(names, weights.std(0, ddof=1).tolist(), strict=True)),
        intervals=dict(zip(names, zip(low_K.tolist(), high_K.tolist(), strict=True), strict=True)),
        rank_stability=rank_stability(weights),
        num_seeds=num_seeds,
    )


def mean_intervals(weights_RK: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Returns the 95 % confidence interval of the mean weight over seeds.

    A t-interval on the scale of log-odds, to which the standard error is carried by the delta method::

        m     = mean over seeds,   e = standard deviation / sqrt(R),   t = 97.5 % quantile of Student's t, R - 1 degrees
        odds  = m / (1 - m) * exp(-+ t * e / (m * (1 - m)))
        bound = odds / (1 + odds)

    It holds m, stays in [0, 1] by itself, is the plain interval m -+ t * e for small e, and for two domains the bounds
    of one are 1 minus those of the other.  Where all seeds agree, e is 0 and the interval a point.

    Simulated coverage of the arithmetic mean, averaged over the 20 domains of a logistic normal with a floor (4 domains
    near it), by the standard deviation of the log-weights over seeds::

        standard deviation    0.1    0.3    0.6    1.0
        R = 3  plain        0.949  0.941  0.915  0.851
               log-odds     0.949  0.947  0.938  0.915
        R = 5  plain        0.948  0.939  0.907  0.841
               log-odds     0.949  0.945  0.930  0.895

    Up to 0.3 both serve.  Above, weights are skewed and few seeds seldom show the long tail: read 95 % as about 90 %.

    Args:
        weights_RK: the weights that each independent seed learned, on the simplex, shape [..., R, K], R at least 2.

    Returns:
        The lower and the upper bounds, each of shape [..., K].

    Raises:
        ValueError: there are fewer than two seeds.

    Example:
        >>> low_K, high_K = mean_intervals([[0.2, 0.8], [0.2, 0.8]])
        >>> low_K.tolist(), high_K.tolist()
        ([0.2, 0.8], [0.2, 0.8])
    """
    # Here and not above: scipy.stats takes a second to import, and the command line should not wait for it.
    from scipy import stats

    weights = np.asarray(weights_RK, dtype=np.float64)
    if weights.ndim < 2 or weights.shape[-2] < 2:
        raise ValueError(f"weights must have shape [..., R, K] with at least two seeds, got {list(weights.shape)}")
    num_seeds = weights.shape[-2]
    mean = weights.mean(-2)
    half_width = stats.t.ppf((1 + CONFIDENCE) / 2, num_seeds - 1) * weights.std(-2, ddof=1) / np.sqrt(num_seeds)
    slope = mean * (1 - mean)
    # A mean of 0 or 1 means that all seeds agree on it.  Elsewhere, e / m and e / (1 - m) are at most 1, so the
    # exponent stays below 26 and cannot overflow.
    factor = np.exp(np.divide(half_width, slope, out=np.zeros_like(mean), where=slope > 0))
    low = mean / (mean + (1 - mean) * factor)
    high = mean * factor / (mean * factor + (1 - mean))
    # Rounding must not push a bound past the mean.
    return np.clip(low, 0.0, mean), np.clip(high, mean, 1.0)


def rank_stability(weights_RK: npt.ArrayLike) -> float | None:
    """Returns the mean Kendall tau-b over all pairs of seeds, how alike they rank the domains.

    For one pair, with the domain pairs that both seeds order alike (C), oppositely (D), and tied in one (T, U)::

        tau-b = (C - D) / sqrt((C + D + T) * (C + D + U))

    Weights that differ by less than 1e-12 are tied.

    Args:
        weights_RK: the weights that each seed learned, shape [R, K].

    Returns:
        A number in [-1, 1]; None for a single seed, or if a seed gives all domains one weight and so ranks nothing.

    Example:
        >>> rank_stability([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
        1.0
        >>> round(rank_stability([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]]), 6)
        0.333333
    """
    from scipy import stats

    # Rounded, so that 1/3 computed in two ways is one weight.
    weights = np.asarray(weights_RK, dtype=np.float64).round(12)
    if weights.shape[0] < 2 or bool((np.ptp(weights, axis=1) == 0).any()):
        return None
    pairs = combinations(weights, 2)
    return float(np.mean([stats.kendalltau(first_K, second_K).statistic for first_K, second_K in pairs]))


def _check_weights(names: Sequence[str], weights_RK: npt.ArrayLike) -> FloatArray:
    weights = np.asarray(weights_RK, dtype=np.float64)
    if weights.ndim != 2 or weights.shape[0] < 1 or weights.shape[1] != len(names):
        raise ValueError(f"weights must have shape [R, {len(names)}], one column per domain, got {list(weights.shape)}")
    if len(set(names)) != len(names):
        raise ValueError(f"domain names must be unique, got {list(names)}")
    for seed_number, weights_K in enumerate(weights, start=1):
        if not (np.isfinite(weights_K).all() and (weights_K >= 0).all() and abs(weights_K.sum() - 1) <= 1e-6):
            raise ValueError(
                f"the weights of seed number {seed_number} must be finite, at least 0 and sum to 1, "
                f"got {weights_K.tolist()}"
            )
    normalized: FloatArray = weights / weights.sum(1, keepdims=True)
    return normalized

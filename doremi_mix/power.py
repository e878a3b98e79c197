"""How many seeds a comparison needs: its power, planned before it is run.

Axes: S seeds.  Losses are in nats per token.
"""

from __future__ import annotations

import math
from itertools import count

from scipy import stats

from doremi_mix.comparison import SIGNIFICANCE


def _power(noncentrality: float, num_seeds: int) -> float:
    """Returns the chance that the two-sided paired t test over seeds finds a difference, in its true direction."""
    critical = stats.t.ppf(1 - SIGNIFICANCE / 2, num_seeds - 1)
    return float(stats.nct.sf(critical, num_seeds - 1, noncentrality))


def _check_plan(seed_deviation: float, power: float) -> None:
    if not (math.isfinite(seed_deviation) and seed_deviation >= 0):
        raise ValueError(f"the deviation over seeds must be finite and at least 0, got {seed_deviation}")
    if not 0.5 <= power < 1:
        raise ValueError(f"the power must be at least 0.5 and below 1, got {power}")


def minimum_detectable_difference(seed_deviation: float, num_seeds: int, power: float = 0.8) -> float:
    """Returns the smallest true difference in average loss that paired seeds detect with this power at 5 %.

    Solves ``P(T > t(0.975, S - 1)) = power`` for ``difference``, where T is noncentral t with S - 1 degrees of
    freedom and noncentrality ``difference * sqrt(S) / seed_deviation``.  One baseline is looked at, and the error over
    examples, which more seeds do not lower, comes on top.

    Args:
        seed_deviation: standard deviation over seeds of the paired difference (``PairedResult.seed_deviation``).
        num_seeds: S, at least 2.
        power: the chance to detect it, at least 0.5 and below 1.

    Returns:
        Nats per token.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> round(minimum_detectable_difference(0.01, 3), 4)
        0.0326
    """
    _check_plan(seed_deviation, power)
    if num_seeds < 2:
        raise ValueError(f"a difference over seeds needs at least 2 seeds, got {num_seeds}")
    low, high = 0.0, 1.0
    while _power(high, num_seeds) < power:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _power(middle, num_seeds) < power else (low, middle)
    return high * seed_deviation / math.sqrt(num_seeds)


def seeds_needed(seed_deviation: float, difference: float, power: float = 0.8) -> int:
    """Returns the fewest seeds (at least 2) whose minimum detectable difference is at most ``difference``.

    Args:
        seed_deviation: standard deviation over seeds of the paired difference, in nats per token.
        difference: the true difference to detect, in nats per token; its sign does not matter.
        power: the chance to detect it, at least 0.5 and below 1.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> seeds_needed(0.01, 0.02)
        5
    """
    _check_plan(seed_deviation, power)
    if not math.isfinite(difference) or difference == 0:
        raise ValueError(f"the difference must be finite and not 0, got {difference}")
    if seed_deviation == 0:
        return 2
    ratio = abs(difference) / seed_deviation
    # A normal test, which knows the deviation, needs no more seeds than the t test: a safe place to start.
    quantiles = float(stats.norm.ppf(1 - SIGNIFICANCE / 2) + stats.norm.ppf(power))
    start = max(2, math.floor((quantiles / ratio) ** 2))
    return next(seeds for seeds in count(start) if _power(ratio * math.sqrt(seeds), seeds) >= power)

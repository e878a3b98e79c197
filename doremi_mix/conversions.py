"""The same mixture in other units: shares of tokens, of sequences and of examples, counts, passes over a domain.

Other programs mean four different things by a weight.  Everything here is a pure function of plain numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction

Amounts = Mapping[str, float] | Mapping[str, Fraction]

GRID = 2**53
"""Shares are whole numbers of 1 / GRID, so that every partial sum of them is a float64 without rounding."""


def exact_shares(values: Amounts) -> dict[str, float]:
    """Returns values in proportion as shares whose sum is 1.0 exactly, in whatever order a program adds them.

    Up to six values that are such shares already stay as they were typed.  Otherwise shares are multiples of 2**-53,
    rounded by largest remainder, and a value above 0 never becomes 0: one below the grid is lifted to 2**-53.  Each
    share is off by less than 2**-53 (1.2e-16); only the largest may be off by more, because it gives what the lifted
    ones get: by less than 2**-53 for each of them.

    Args:
        values: at least 0 and finite, with one above 0, by name.

    Returns:
        Shares by name, in the same order.

    Raises:
        ValueError: a value is negative or not finite, or none is above 0.

    Example:
        >>> shares = exact_shares({"a": 1, "b": 1, "c": 1})
        >>> sum(shares.values()) == sum(reversed(shares.values())) == 1.0
        True
    """
    for name, value in values.items():
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"the value of {name!r} must be finite and at least 0, got {value}")
    exact = [Fraction(value) for value in values.values()]
    total = sum(exact, Fraction(0))
    if total == 0:
        raise ValueError("no value is above 0")
    rounded = [float(value / total) for value in exact]
    if _adds_up(rounded) and all(share or not value for share, value in zip(rounded, exact, strict=True)):
        return dict(zip(values, rounded, strict=True))
    scaled = [value * GRID / total for value in exact]
    units = [max(math.floor(value), 1) if value else 0 for value in scaled]
    missing = GRID - sum(units)
    order = sorted(range(len(units)), key=lambda i: units[i] - scaled[i])
    if missing >= 0:
        for i in itertools.islice(order, missing):
            units[i] += 1
    else:
        # Values below the grid were lifted to it; the largest share does not notice.
        units[max(range(len(units)), key=units.__getitem__)] += missing
    return {name: count / GRID for name, count in zip(values, units, strict=True)}


def _adds_up(shares: list[float]) -> bool:
    """Says whether a few shares, as a person types them, sum to 1.0 in every order."""
    few = 6
    return len(shares) <= few and all(sum(order) == 1.0 for order in itertools.permutations(shares))


def in_other_units(token_shares: Mapping[str, float], tokens_per_unit: Amounts) -> dict[str, float]:
    """Returns shares of sequences or examples that draw the given shares of tokens.

    A domain's share of units is in proportion to its share of tokens over the tokens of one of its units.

    Args:
        token_shares: by domain, at least 0; they sum to 1.
        tokens_per_unit: mean tokens of one unit of each domain, above 0.

    Returns:
        Shares by domain, in the same order; their sum is 1.0 exactly.

    Example:
        >>> in_other_units({"long": 0.5, "short": 0.5}, {"long": 30, "short": 10})
        {'long': 0.25, 'short': 0.75}
    """
    return exact_shares(
        {name: Fraction(share) / Fraction(tokens_per_unit[name]) for name, share in token_shares.items()}
    )


def to_token_shares(example_shares: Mapping[str, float], mean_tokens: Amounts) -> dict[str, float]:
    """Returns the shares of tokens that drawing by shares of examples gives: ``in_other_units``, the other way round.

    A domain's share of tokens is in proportion to its share of examples times the tokens of one of its examples.

    Args:
        example_shares: by domain, at least 0, with one above 0.
        mean_tokens: mean tokens of an example of each domain, above 0.

    Returns:
        Shares by domain, in the same order; their sum is 1.0 exactly.

    Example:
        >>> to_token_shares({"long": 0.25, "short": 0.75}, {"long": 30, "short": 10})
        {'long': 0.5, 'short': 0.5}
    """
    return exact_shares({name: Fraction(share) * Fraction(mean_tokens[name]) for name, share in example_shares.items()})


def whole_counts(shares: Mapping[str, Fraction], caps: Mapping[str, int] | None = None) -> dict[str, int]:
    """Rounds amounts to whole numbers by largest remainder, so that their sum is that of the amounts, rounded down.

    Args:
        shares: amounts of at least 0, by name.
        caps: what each may be at most; an amount above its cap is cut to it.

    Returns:
        Counts by name, in the same order, none above its cap.

    Example:
        >>> whole_counts({"a": Fraction(5, 2), "b": Fraction(5, 2)})
        {'a': 3, 'b': 2}
    """
    amounts = {name: min(share, Fraction(caps[name])) if caps else share for name, share in shares.items()}
    counts = {name: math.floor(amount) for name, amount in amounts.items()}
    missing = math.floor(sum(amounts.values(), Fraction(0))) - sum(counts.values())
    by_remainder = sorted(amounts, key=lambda name: counts[name] - amounts[name])
    for name in by_remainder[:missing]:
        counts[name] += 1
    return counts

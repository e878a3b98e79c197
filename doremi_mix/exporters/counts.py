"""What exporters of counts share: numbers of rows as shares, in passes over a domain, and as parts of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from doremi_mix.conversions import exact_shares
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain


def planned_counts(plan: ExportPlan) -> dict[str, int] | None:
    """Returns the examples to draw of each domain, without those of which the budget draws none; None when not known.

    Raises:
        ExportError: the lengths of examples are not known, or no domain gets an example.
    """
    if any(domain.examples is None for domain in plan.domains):
        plan.example_shares()
        return None
    return plan.counts()


def of_counts(counts: Mapping[str, int]) -> dict[str, float]:
    """Returns counts as shares that sum to 1, without the domains that have none."""
    return exact_shares({name: Fraction(count) for name, count in counts.items() if count})


def not_reached(plan: ExportPlan, drawn: Mapping[str, Any], what: str = "The budget") -> tuple[str, ...]:
    """Returns a note that names the domains of which nothing is drawn although their weight is above 0."""
    missing = [domain.name for domain in plan.domains if domain.name not in drawn]
    return (f"{what} does not reach for one example of: {', '.join(missing)}.",) if missing else ()


def passes(plan: ExportPlan, counts: Mapping[str, int]) -> dict[str, tuple[PlannedDomain, int]]:
    """Divides what is drawn of a domain into passes over it, for programs that would repeat rows at random.

    Args:
        plan: what is to be drawn.
        counts: examples to draw, by domain.

    Returns:
        By a name of their own, the domain of each pass and the rows to draw in it: all but the last are whole. A domain
        of unknown size has one.
    """
    parts: dict[str, tuple[PlannedDomain, int]] = {}
    for name, count in counts.items():
        domain = plan.named(name)
        size = domain.file_examples or count
        for number, start in enumerate(range(0, count, size), 1):
            key = name if number == 1 else f"{name} pass {number}"
            while number > 1 and (key in counts or key in parts):
                key += "+"
            parts[key] = domain, min(size, count - start)
    return parts


def fraction_for(count: int, size: int) -> float:
    """Returns a float of which ``int(size * fraction)`` is the count: what programs do that take a part of a file.

    Example:
        >>> 29 / 100 * 100, int(100 * fraction_for(29, 100))
        (28.999999999999996, 29)
    """
    fraction = count / size
    while int(size * fraction) < count:
        fraction = math.nextafter(fraction, math.inf)
    while int(size * fraction) > count:
        fraction = math.nextafter(fraction, 0.0)
    return fraction

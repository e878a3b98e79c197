"""Numbers in files of weights: which text is one, exactly how much it is, and how messages show what is none."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

Unit = Literal["tokens", "examples"]

NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
"""Decimal numbers; not what readers of YAML disagree on (leading zeros, ``1:30``, ``1_000``, ``0x10``)."""


def is_number(value: Any) -> bool:
    """Says whether Megatron takes a value for a weight."""
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool)


def is_percentage(value: Any) -> bool:
    """Says whether a value is text that ends in a % sign."""
    return isinstance(value, str) and value.rstrip().endswith("%")


def cell(value: Any) -> Any:
    """Returns the number that stands in a cell, or what else stands there."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value.strip()) else value


def to_number(name: str, value: Any) -> tuple[Fraction, bool]:
    """Returns a weight exactly, and whether it was given with a % sign.

    Args:
        name: of its domain, for errors.
        value: the number; text only where it ends in a % sign.

    Raises:
        ValueError: it is no number, is not finite or is negative.
    """
    if isinstance(value, Fraction):
        return value, False
    percent = is_percentage(value)
    number = cell(value.rstrip().removesuffix("%")) if percent else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"the weight of {name!r} must be a number, got {short(value)}")
    try:
        usable = math.isfinite(number) and number >= 0
    except OverflowError:  # a whole number beyond float64
        usable = False
    if not usable:
        raise ValueError(f"the weight of {name!r} must be finite and at least 0, got {short(value)}")
    return Fraction(number), percent


def given_twice(name: str) -> str:
    """Says that a name stands twice where it must stand once."""
    return f"{name!r} is given twice, and must be given once"


def listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Returns names for a message."""
    return ", ".join(map(repr, names))


def short(value: Any) -> str:
    """Returns a value for a message."""
    if value is None or isinstance(value, dict):
        return "nothing" if value is None else "an object"
    text = repr(value) if not isinstance(value, list) or len(value) < 8 else f"a list of {len(value)}"
    return text if len(text) <= 60 else f"{text[:57]}..."

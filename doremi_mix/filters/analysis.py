"""What a set of rows is like: counts, shares, and quantiles of every score, by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROBABILITIES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
MOST_LANGUAGES = 10


def describe_domain(
    columns: Mapping[str, NDArray[Any]], kept: NDArray[np.bool_], ids: Sequence[str], num_longest: int
) -> dict[str, Any]:
    """Describes the kept rows of one domain.

    Args:
        columns: score columns, each with a value for every row, kept or not; flags are counted, texts (languages) are
            shared out, numbers get a sum where they count something and quantiles.
        kept: which rows are meant.
        ids: of every row; empty: no longest rows are listed.
        num_longest: how many of the longest rows to list.

    Returns:
        ``num_rows``, ``totals``, ``flags``, ``languages``, ``quantiles`` (by score, a value for each probability) and
        ``longest`` (id and number of characters).
    """
    result: dict[str, Any] = {"num_rows": int(np.count_nonzero(kept)), "totals": {}, "flags": {}, "quantiles": {}}
    for name, all_values in columns.items():
        values = all_values[kept]
        if values.dtype == bool:
            result["flags"][name] = int(np.count_nonzero(values))
        elif values.dtype.kind in "OU":
            result["languages"] = _shares(values)
        else:
            if values.dtype.kind in "iu":
                result["totals"][name] = int(values.sum(dtype=np.int64))
            result["quantiles"][name] = _quantiles(values)
    if "text_len" in columns and len(ids):
        lengths = np.where(kept, columns["text_len"], -1)
        # The longest first; of two of one length the earlier one, whatever the machine.
        order = np.argsort(-lengths.astype(np.int64), kind="stable")[: min(num_longest, result["num_rows"])]
        result["longest"] = [{"id": str(ids[i]), "characters": int(lengths[i])} for i in order.tolist()]
    return result


def _quantiles(values: NDArray[Any]) -> list[float] | None:
    """Returns the quantiles of the values that are numbers; None when there is none."""
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if not len(finite):
        return None
    return [float(value) for value in np.quantile(finite, PROBABILITIES)]


def _shares(values: NDArray[Any]) -> dict[str, float]:
    """Returns the share of each language, the most frequent ones first and the rest as ``other``."""
    names, counts = np.unique(values.astype(str), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    total = max(int(counts.sum()), 1)
    shares = {str(names[i]) or "unknown": int(counts[i]) / total for i in order[:MOST_LANGUAGES]}
    if len(order) > MOST_LANGUAGES:
        shares["other"] = int(counts[order[MOST_LANGUAGES:]].sum()) / total
    return shares

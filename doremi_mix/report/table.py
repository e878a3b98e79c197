"""The tables of a finished run: its domains, and how its mixtures compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table


def _format_interval(interval: Sequence[float]) -> str:
    low, high = (f"{bound:.3f}".removeprefix("0") for bound in interval)
    return f"{low}-{high}"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "natural_weight": ("natural\nshare", "{:.3f}".format),
    "domain_weight": ("learned\nweight", "{:.3f}".format),
    "interval": ("95 %", _format_interval),
    "ratio": ("ratio", "{:.2f}".format),
    "excess_loss": ("excess\nloss", "{:.3f}".format),
    "available_tokens": ("available\ntokens", "{:,}".format),
    "allocated_tokens": ("allocated\ntokens", "{:,}".format),
    "epochs": ("epochs", "{:.2f}".format),
}
"""Column by key of a row: its heading and how a value is written."""


def make_rows(
    natural: dict[str, float],
    learned: dict[str, float],
    excess_loss: dict[str, float],
    available_tokens: dict[str, int],
    allocation: dict[str, Any] | None,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    standard_deviation: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Joins what is known of each domain, the largest weight first.

    Args:
        natural: share of the available tokens.
        learned: the domain weights.
        excess_loss: in nats per token.
        available_tokens: one pass over the domain.
        allocation: ``allocation.json``, when a mixture was drawn.
        intervals: 95 % interval of the mean weight over seeds (low, high); None or empty for a single seed.
        standard_deviation: of one seed's weight, over seeds; None or empty for a single seed.  Not in the table.
    """
    rows = []
    for name in sorted(learned, key=lambda name: (-learned[name], name)):
        row: dict[str, Any] = {
            "domain": name,
            "natural_weight": natural[name],
            "domain_weight": learned[name],
            "ratio": learned[name] / natural[name] if natural[name] else math.inf,
            "excess_loss": excess_loss[name],
            "available_tokens": available_tokens[name],
        }
        if intervals:
            row["interval"] = list(intervals[name])
        if standard_deviation:
            row["standard_deviation"] = standard_deviation[name]
        if allocation is not None:
            drawn = allocation["domains"][name]
            row |= {key: drawn[key] for key in ("allocated_tokens", "drawn_tokens", "drawn_rows", "epochs")}
        rows.append(row)
    return rows


def render_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Draws the rows for a terminal."""
    shown = [key for key in COLUMNS if key in rows[0]]
    if {"interval", "epochs"} <= set(shown):
        # No room for all: the available tokens are the allocated ones over the epochs.
        shown.remove("available_tokens")
    table = new_table(title, "domain", [COLUMNS[key][0] for key in shown])
    for row in rows:
        table.add_row(escape(row["domain"]), *(COLUMNS[key][1](row[key]) for key in shown))
    return table


def render_comparison(results: Mapping[str, Any]) -> Group:
    """Draws ``compare/results.json`` for a terminal: the losses, then the candidate's differences.

    Both tables have the lowest average loss on top.  With one seed there are no intervals, and no domain is clear.
    """
    mixtures = results["mixtures"]
    order = sorted(mixtures, key=lambda name: (mixtures[name]["average_loss"], name))
    # The candidate's pairs come first.
    candidate = results["pairs"][0]["mixture"]
    pairs = {pair["baseline"]: pair for pair in results["pairs"] if pair["mixture"] == candidate}
    several = len(results["seeds"]) > 1
    seeds = f"mean over {len(results['seeds'])} seeds" if several else "one seed"
    losses = new_table(f"Held-out loss, nats per token ({seeds})", "mixture", ["average\nloss", "worst\nloss"])
    losses.add_column("worst\ndomain", overflow="fold")
    for name in order:
        result = mixtures[name]
        numbers = (f"{result[key]:.4f}" for key in ("average_loss", "worst_loss"))
        losses.add_row(escape(name), *numbers, escape(result["worst_domain"]))
    counts = {"num_better": f"better\nof {results['pairs'][0]['num_domains']}"}
    if several:
        counts |= {"num_clearly_better": "clearly\nbetter", "num_clearly_worse": "clearly\nworse"}
    title = f"{escape(candidate)} minus the others (lower is better)"
    differences = new_table(title, "mixture", ["average\nloss", "worst\nloss", *counts.values()])
    differences.caption = "better: domains with a lower loss"
    if several:
        differences.caption = (
            "±: 95 % interval over seeds and held-out examples\n"
            f"{differences.caption}; clearly: their interval leaves zero out"
        )
    differences.caption_justify = "left"
    for name in (name for name in order if name in pairs):
        pair = pairs[name]
        numbers = (_format_difference(pair[key], several) for key in ("average", "worst"))
        differences.add_row(escape(name), *numbers, *(str(pair[key]) for key in counts))
    return Group(losses, differences)


def _format_difference(interval: Mapping[str, float | None], several: bool) -> str:
    shown = f"{interval['estimate']:+.4f}"
    if several and interval["low"] is not None and interval["high"] is not None:
        shown += f" ± {(interval['high'] - interval['low']) / 2:.4f}"
    return shown


def new_table(title: str, first: str, numbers: Sequence[str]) -> Table:
    """Returns a table narrow enough for 80 columns with names of 20 characters."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 0))
    table.add_column(first, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def explain_shortfalls(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Says of which domains clearly fewer tokens were drawn than allocated: their next example did not fit."""
    return [
        f"{row['domain']}: {row['drawn_tokens']:,} of {row['allocated_tokens']:,} allocated tokens drawn; "
        "the next example is longer than what was left"
        for row in rows
        if "drawn_tokens" in row and row["drawn_tokens"] < 0.9 * row["allocated_tokens"]
    ]

"""The closing table: one row per domain, from the artifacts of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

COLUMNS: dict[str, tuple[str, str]] = {
    "natural_weight": ("natural\nshare", "{:.3f}"),
    "domain_weight": ("learned\nweight", "{:.3f}"),
    "ratio": ("ratio", "{:.2f}"),
    "excess_loss": ("excess\nloss", "{:.3f}"),
    "available_tokens": ("available\ntokens", "{:,}"),
    "allocated_tokens": ("allocated\ntokens", "{:,}"),
    "epochs": ("epochs", "{:.2f}"),
}
"""Column by key of a row: its heading and format."""


def make_rows(
    natural: dict[str, float],
    learned: dict[str, float],
    excess_loss: dict[str, float],
    available_tokens: dict[str, int],
    allocation: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """Joins what is known of each domain, the largest weight first.

    Args:
        natural: share of the available tokens.
        learned: the domain weights.
        excess_loss: in nats per token.
        available_tokens: one pass over the domain.
        allocation: ``allocation.json``, when a mixture was drawn.
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
        if allocation is not None:
            drawn = allocation["domains"][name]
            row |= {key: drawn[key] for key in ("allocated_tokens", "drawn_tokens", "drawn_rows", "epochs")}
        rows.append(row)
    return rows


def render_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Draws the rows for a terminal."""
    # Narrow enough for 80 columns with names of 20 characters.
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 0))
    table.add_column("domain", overflow="fold")
    shown = [key for key in COLUMNS if key in rows[0]]
    for key in shown:
        table.add_column(COLUMNS[key][0], justify="right", no_wrap=True)
    for row in rows:
        table.add_row(escape(row["domain"]), *(COLUMNS[key][1].format(row[key]) for key in shown))
    return table


def explain_shortfalls(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Says of which domains clearly fewer tokens were drawn than allocated: their next example did not fit."""
    return [
        f"{row['domain']}: {row['drawn_tokens']:,} of {row['allocated_tokens']:,} allocated tokens drawn; "
        "the next example is longer than what was left"
        for row in rows
        if "drawn_tokens" in row and row["drawn_tokens"] < 0.9 * row["allocated_tokens"]
    ]

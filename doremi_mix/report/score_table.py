"""The tables of evaluate: benchmark scores as ratios to the base model's, and held-out losses by domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from doremi_mix.report.table import new_table


def render_scores(summary: Mapping[str, Any], title: str = "Benchmark scores, %") -> Table:
    """Draws what `doremi_mix.benchmarks.summarize_scores` returns: a line a task, and the contest's score.

    Args:
        summary: the scores of the base and the tuned model.
        title: above the table.
    """
    tasks = summary["tasks"]
    table = new_table(title, "task", ["items", "base", "tuned", "ratio"])
    for row in tasks:
        table.add_row(
            escape(row["task"]),
            f"{row['tuned']['num_items']:,}",
            _with_error(row["base"]["score"], row["base"]["standard_error"], 1),
            _with_error(row["tuned"]["score"], row["tuned"]["standard_error"], 1),
            _with_error(row["ratio"], row["ratio_standard_error"], 3),
        )
    notes = ["±: standard error over items"]
    if any(not row["paired"] for row in tasks):
        notes.append("that of a ratio takes the two models' errors as independent")
    if any(row["ratio"] is None for row in tasks):
        notes.append("-: the base score is 0")
    if (contest := summary["contest"]) is not None:
        table.add_section()
        table.add_row("mean ratio", "", "", "", _with_error(contest["mean_ratio"], contest["standard_error"], 3))
    table.caption = "; ".join(notes)
    if summary["why_no_contest"]:
        table.caption += f"\nno contest score: {escape(summary['why_no_contest'])}"
    table.caption_justify = "left"
    return table


def render_held_out(losses: Mapping[str, Mapping[str, float | None]], average: str = "average") -> Table:
    """Draws the held-out losses of the base and the tuned model, the largest gain first.

    Args:
        losses: by domain, ``base`` and ``tuned`` in nats per token, ``difference`` (tuned minus base) and its
            ``standard_error`` (None where unknown).
        average: the key of a row that is no domain and comes last.
    """
    table = new_table("Held-out loss, nats per token", "domain", ["base", "tuned", "tuned - base"])
    domains = sorted((name for name in losses if name != average), key=lambda name: (_number(losses[name]), name))
    for name in [*domains, *([average] if average in losses else [])]:
        if name == average:
            table.add_section()
        row = losses[name]
        difference = _with_error(row["difference"], row["standard_error"], 4, sign="+")
        table.add_row(escape(name), _with_error(row["base"], None, 4), _with_error(row["tuned"], None, 4), difference)
    table.caption = "±: standard error over held-out examples"
    table.caption_justify = "left"
    return table


def _number(row: Mapping[str, float | None]) -> float:
    difference = row["difference"]
    return float("inf") if difference is None else difference


def _with_error(value: float | None, error: float | None, digits: int, sign: str = "") -> str:
    if value is None:
        return "-"
    shown = f"{value:{sign}.{digits}f}"
    # None is unknown; zero is a score that is taken as given, or one that all items agree on.
    return shown if not error else f"{shown} ± {error:.{digits}f}"

"""The table of export formats, for a terminal and for the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

HEADINGS = ("format", "written for", "numbers are", "draws", "repeats rows", "proof", "by", "date")

_MEANINGS = {
    "share": "shares",
    "count": "counts",
    "multiplier": "multipliers of own size",
    "objective": "weights in the objective",
    "table": "a table",
}


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns one row of the table, from one of ``export_files.list_formats``."""
    return (
        row["format"],
        row["title"],
        _MEANINGS[row["meaning"]],
        row["unit"],
        row["oversamples"],
        row["proof"],
        row["proven_by"] or "",
        row["date"] or "",
    )


def render_formats(rows: Sequence[Mapping[str, Any]], width: int = 120) -> Table:
    """Draws the table for a terminal of some width, in characters."""
    table = Table(
        title="Formats (doremi-mix export WEIGHTS_JSON --format NAME)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption="proof: what the program's own released code did with our files. drawn: it drew the predicted "
        "composition; parsed: it read them; golden: only our texts are tested",
        caption_justify="left",
    )
    # What a terminal has no room for is in --json and in the README.
    hidden = {"repeats rows", "date"} | ({"written for"} if width < 110 else set())
    shown = [place for place, heading in enumerate(HEADINGS) if heading not in hidden]
    for place in shown:
        table.add_column(HEADINGS[place], overflow="fold", no_wrap=HEADINGS[place] == "format")
    for row in rows:
        table.add_row(*(escape(cells(row)[place]) for place in shown))
    return table


def markdown_formats(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table as Markdown."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS)]
    for row in rows:
        first, *others = cells(row)
        lines.append((f"`{first}`", *others))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

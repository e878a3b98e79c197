"""Tables for people, spreadsheets and scripts: CSV, Markdown, the contest's ratio.json, our own JSON, and flat YAML.

Unlike programs that draw, they list also the domains of which nothing is drawn, with a share of 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from doremi_mix.conversions import exact_shares
from doremi_mix.errors import ExportError
from doremi_mix.exporters.export import Export, ExportedFile, Format, json_text, yaml_text
from doremi_mix.exporters.plan import ExportPlan
from doremi_mix.weight_forms import FORMULA_STARTS, TABLE_COLUMNS

_BLANK_WEIGHT = (
    "The weight of a domain of which the budget draws nothing is left blank: it may be 0, or too small for one token."
)
# Punctuation that means something inside a cell; "_" only where it is not between letters or digits.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])")


def write_csv(plan: ExportPlan) -> Export:
    """Writes all that is planned of each domain; text is quoted, numbers are exact, unknown cells are empty."""
    formulas = [name for name, _ in _rows(plan) if name.startswith(FORMULA_STARTS)]
    lines = [",".join(map(_quoted, TABLE_COLUMNS))]
    for name, numbers in _rows(plan):
        cells = ["" if number is None else repr(number) for number in numbers]
        lines.append(",".join([_quoted(f"'{name}" if name in formulas else name), *cells]))
    notes = list(_zero_notes(plan))
    if plan.left_out and plan.budget is not None:
        notes.append(_BLANK_WEIGHT)
    if formulas:
        names = ", ".join(map(repr, formulas))
        notes.append(f"A ' stands before names that a spreadsheet would run as formulas: {names}.")
    return Export(
        files=(ExportedFile("domain_weights.csv", "\n".join(lines) + "\n", comment=None),),
        expected=plan.token_shares(),
        usage='pandas.read_csv("domain_weights.csv", dtype={"name": str}, keep_default_na=False, na_values=[""]), or '
        "open it in a spreadsheet",
        notes=tuple(notes),
    )


def _quoted(text: str) -> str:
    """Returns text as a cell of a CSV, whatever it holds."""
    doubled = text.replace('"', '""')
    return f'"{doubled}"'


def write_markdown(plan: ExportPlan) -> Export:
    """Writes a table for a README or a report, with six significant digits."""
    columns = ("domain", "weight", "share of tokens", "share of examples", "tokens", "examples", "epochs")
    for name, _ in _rows(plan):
        if not _can_be_shown(name):
            raise ExportError(
                f"the name of domain {name!r} has a character that no web page can show; rename the domain, or use "
                "--format csv"
            )
    rows = [[_cell(name), *map(_rounded, numbers)] for name, numbers in _rows(plan)]
    shares = {domain.name: float(_rounded(domain.token_share)) for domain in plan.domains}
    lines = [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)]), *map(_line, rows)]
    return Export(
        files=(ExportedFile("domain_weights.md", "\n".join(lines) + "\n", comment=None),),
        expected=exact_shares(shares),
        usage="paste it where GitHub's Markdown is read",
        notes=("Numbers are rounded to six significant digits; another format has them exactly.",),
    )


def write_ratio(plan: ExportPlan) -> Export:
    """Writes the contest's ``ratio.json``: from the name of a file to its share of the tokens."""
    shares = _shares(plan)
    for name in shares:
        if "/" in name or "\\" in name:
            raise ExportError(
                f"domain {name!r} would be the file {name + '.jsonl'!r}, which is in another folder; rename the "
                "domain, or use --format yaml"
            )
    ratio = {f"{name}.jsonl": share for name, share in shares.items()}
    return Export(
        files=(ExportedFile("ratio.json", json_text(ratio), comment=None),),
        expected=plan.token_shares(),
        usage="hand ratio.json in beside mixture.jsonl; doremi-mix mixture writes both, by what it really drew",
    )


def write_domain_weights(plan: ExportPlan) -> Export:
    """Writes our own JSON, of the planned shares: what ``mixture.weights`` and ``compare --also`` take."""
    learned = plan.learned
    shares = {name: _shares(plan)[name] for name in learned.domain_weights}
    of_unit = {"token": shares}
    if all(domain.example_share is not None for domain in plan.domains):
        of_unit["example"] = {**dict.fromkeys(shares, 0.0), **plan.example_shares()}
    if shares != learned.domain_weights:
        # Intervals, spread and verdict are those of the weights that were learned.
        budget = "no budget" if plan.budget is None else f"{plan.budget:,} {plan.budget_unit}"
        planned = f"These shares were planned for {budget} from the weights that were learned."
        learned = replace(
            learned,
            domain_weights=shares,
            intervals={},
            uncertainty={},
            verdict={},
            diagnoses=(planned, *([plan.verdict] if plan.verdict else [])),
        )
    text = json_text(replace(learned, shares=of_unit).to_dict())
    return Export(
        files=(ExportedFile("domain_weights.json", text, comment=None),),
        expected=plan.token_shares(),
        usage="doremi-mix mixture --run-dir RUN_DIR --set mixture.weights=domain_weights.json",
    )


def write_yaml(plan: ExportPlan) -> Export:
    """Writes ``{name: share of tokens}``."""
    return Export(
        files=(ExportedFile("domain_weights.yaml", yaml_text(_shares(plan))),),
        expected=plan.token_shares(),
        usage='yaml.safe_load(open("domain_weights.yaml", encoding="utf-8"))',
        notes=_zero_notes(plan),
    )


def _shares(plan: ExportPlan) -> dict[str, float]:
    """Returns the shares of tokens, with zeros for what is left out."""
    return {**plan.token_shares(), **dict.fromkeys(plan.left_out, 0.0)}


def _zero_notes(plan: ExportPlan) -> tuple[str, ...]:
    return ("Domains of which nothing is drawn are listed here with a share of 0.",) if plan.left_out else ()


def _rows(plan: ExportPlan) -> list[tuple[str, Sequence[float | None]]]:
    """Returns the name of each domain and its other cells, None where something is not known."""
    rows: list[tuple[str, Sequence[float | None]]] = []
    for domain in plan.domains:
        available = domain.statistics.available_tokens if domain.statistics else None
        epochs = domain.tokens / available if domain.tokens is not None and available else None
        shares = (float(domain.weight), domain.token_share, domain.example_share)
        rows.append((domain.name, (*shares, domain.tokens, domain.examples, epochs)))
    # Nothing of the rest is drawn: 0 of whatever is known of the others.
    weight = 0.0 if plan.budget is None else None
    zeros = [None if number is None else number * 0 for number in rows[0][1][1:]]
    return rows + [(name, (weight, *zeros)) for name in plan.left_out]


def _rounded(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:,}" if isinstance(number, int) else f"{number:.6g}"


def _can_be_shown(text: str) -> bool:
    """Says whether HTML has all characters of a text: most control characters and the noncharacters it has not."""
    codes = [ord(character) for character in text if character not in "\t\n\f\r"]
    return not any(
        code < 0x20 or 0x7F <= code < 0xA0 or 0xFDD0 <= code < 0xFDF0 or code & 0xFFFE == 0xFFFE for code in codes
    )


def _cell(text: str) -> str:
    """Returns text that Markdown shows as it is: no markup, no end of the cell or the line, spaces kept."""
    escaped = _MARKDOWN.sub(lambda match: f"\\{match[0]}", text)
    shown = "".join(c if c.isprintable() else f"&#{ord(c)};" for c in escaped)
    inner = shown.strip(" ")
    lead, trail = len(shown) - len(shown.lstrip(" ")), len(shown) - len(shown.rstrip(" "))
    return "&#32;" * lead + inner + "&#32;" * (trail if inner else 0)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_NAMES = "{name}"
"""Tables name domains; they read no files."""

FORMATS = (
    Format(
        name="csv",
        consumer="csv",
        title="spreadsheets and data frames (CSV)",
        unit="tokens",
        meaning="table",
        oversamples="draws nothing itself",
        write=write_csv,
        path=_NAMES,
    ),
    Format(
        name="markdown",
        consumer="markdown",
        title="readers (a Markdown table)",
        unit="tokens",
        meaning="table",
        oversamples="draws nothing itself",
        write=write_markdown,
        path=_NAMES,
    ),
    Format(
        name="ratio",
        consumer="better-mixture",
        title="the BetterMixture contest (ratio.json)",
        unit="tokens",
        meaning="share",
        oversamples="draws nothing itself",
        write=write_ratio,
        path="{name}.jsonl",
    ),
    Format(
        name="domain-weights",
        consumer="doremi-mix",
        title="doremi_mix itself (domain_weights.json, of the planned shares)",
        unit="tokens",
        meaning="share",
        oversamples="yes, up to its own mixture.max_epochs",
        write=write_domain_weights,
        path=_NAMES,
    ),
    Format(
        name="yaml",
        consumer="yaml",
        title="scripts (flat YAML)",
        unit="tokens",
        meaning="share",
        oversamples="draws nothing itself",
        write=write_yaml,
        path=_NAMES,
    ),
)

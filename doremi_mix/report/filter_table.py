"""The tables of analyze and filter: rows before and after, who lost rows to whom, and what the rows are like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from doremi_mix.filters.rules import Rule

SHOWN_CHARACTERS = 500

LARGEST_PAIRS = 10
"""Pairs of domains that are listed; the files have all."""


def render_filter(summary: Mapping[str, Any]) -> Group:
    """Draws ``filter/summary.json``: the steps, what each took of each domain, and who lost rows to whom."""
    steps = summary["steps"]
    # Columns of numbers, explained by the table above them, leave room for the names of domains.
    by_step = _new_table("Steps", "", [])
    by_step.add_column("rule")
    for heading in ("rows\nbefore", "rejected"):
        by_step.add_column(heading, justify="right")
    for number, step in enumerate(steps, 1):
        which = {"zh": " (Chinese rows)", "other": " (other rows)"}.get(step.get("applies", "all"), "")
        by_step.add_row(str(number), step["rule"] + which, f"{step['rows_before']:,}", _count(step["rejected"]))
    numbers: dict[str, str] = {}
    for number, step in enumerate(steps, 1):
        if step["rejected"]:
            before = numbers.get(step["rule"])
            numbers[step["rule"]] = f"{before}+{number}" if before else str(number)
    by_domain = _new_table("Rows before and after, and what each step took", "domain", ["rows", "kept", "%"])
    for shown in numbers.values():
        by_domain.add_column(shown, justify="right", no_wrap=True)
    for domain in summary["domains"]:
        _add_counts(by_domain, escape(domain["domain"]), [domain], list(numbers))
    by_domain.add_section()
    _add_counts(by_domain, "all", summary["domains"], list(numbers))
    by_domain.caption = "a rejected row is counted at the first step that rejects it"
    parts: list[Any] = [by_step, by_domain]
    domains = [domain["domain"] for domain in summary["domains"]]
    for key, what in (("exact_duplicates", "Exact duplicates"), ("near_duplicates", "Near duplicates")):
        if key in summary:
            parts.append(_lost_to(f"{what}: who lost rows to whom", domains, summary[key]["lost_to"]))
    if {"exact_duplicates", "near_duplicates"} & summary.keys():
        priority = summary.get("exact_duplicates", summary.get("near_duplicates"))["priority"]
        parts.append(Text(f"shared rows stay with the first of: {', '.join(priority)} (filter.priority)"))
    return Group(*parts)


def _add_counts(table: Table, name: str, domains: Sequence[Mapping[str, Any]], rules: Sequence[str]) -> None:
    num_rows, num_kept = (sum(domain[key] for domain in domains) for key in ("num_rows", "num_kept"))
    taken = [_count(sum(domain["rejected"].get(rule, 0) for domain in domains)) for rule in rules]
    table.add_row(name, f"{num_rows:,}", f"{num_kept:,}", _share(num_kept, num_rows), *taken)


def render_statistics(statistics: Mapping[str, Any], title: str = "What was loaded") -> Group:
    """Draws ``analyze/statistics.json``: a line a domain, then the pairs of domains that share most texts."""
    median = statistics["probabilities"].index(0.5)
    high = statistics["probabilities"].index(0.99)
    headings = ["rows", "tokens" if _has_tokens(statistics) else "words", "characters\nmedian", "99 %", "dup-\nlicates"]
    table = _new_table(title, "domain", [*headings, "place-\nholder", "refusal", "broken"])
    table.add_column("languages")
    for name, domain in statistics["domains"].items():
        lengths = domain["quantiles"]["text_len"]
        flags = domain["flags"]
        table.add_row(
            escape(name),
            f"{domain['num_rows']:,}",
            f"{domain['totals'].get('num_token', domain['totals']['num_words']):,}",
            f"{lengths[median]:,.0f}",
            f"{lengths[high]:,.0f}",
            _count(domain["num_duplicates"]),
            *(_count(flags[key]) for key in ("placeholder_answer", "refusal_answer", "broken_turns")),
            ", ".join(f"{key} {share:.0%}" for key, share in list(domain["languages"].items())[:2] if share >= 0.005),
        )
    table.caption = "duplicates: rows that repeat an earlier one of their domain"
    overlap = statistics["overlap"]
    return Group(table, _pairs("Texts that two domains share", overlap["domains"], overlap["shared_texts"]))


def _has_tokens(statistics: Mapping[str, Any]) -> bool:
    return all("num_token" in domain["totals"] for domain in statistics["domains"].values())


def _pairs(title: str, domains: Sequence[str], matrix: Sequence[Sequence[int]]) -> Table | Text:
    pairs = [
        (matrix[i][j], domains[i], domains[j])
        for i in range(len(domains))
        for j in range(i + 1, len(domains))
        if matrix[i][j]
    ]
    if not pairs:
        return Text("no two domains share a text")
    table = _new_table(title, "domain", [])
    table.add_column("and domain")
    table.add_column("texts", justify="right")
    for count, first, second in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:LARGEST_PAIRS]:
        table.add_row(escape(first), escape(second), f"{count:,}")
    return table


def _lost_to(title: str, domains: Sequence[str], matrix: Sequence[Sequence[int]]) -> Table | Text:
    pairs = [
        (matrix[i][j], domains[i], domains[j]) for i in range(len(domains)) for j in range(len(domains)) if matrix[i][j]
    ]
    if not pairs:
        return Text(f"{title}: nobody")
    table = _new_table(title, "lost by", [])
    table.add_column("to")
    table.add_column("rows", justify="right")
    for count, loser, keeper in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:LARGEST_PAIRS]:
        table.add_row(escape(loser), "itself" if loser == keeper else escape(keeper), f"{count:,}")
    return table


def render_rules(rules: Sequence[Rule]) -> Table:
    """Draws the table of rules for a person who writes a config."""
    table = _new_table("Rules, in the order in which they are applied (filter.rules)", "rule", ["min", "max"])
    table.add_column("rejects rows by")
    table.add_column("Data-Juicer's op", overflow="fold")
    for rule in rules:
        bounds = ("·" if bound is None else f"{bound:g}" for bound in (rule.min, rule.max))
        table.add_row(rule.name, *bounds, escape(rule.description), rule.op)
    return table


def render_rejections(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Draws rejected rows for a person to read: which row, why, and how its text begins."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_lines=True)
    for heading in ("row", "rule", "why", "text"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        text = row["text"]
        if len(text) > SHOWN_CHARACTERS:
            text = f"{text[:SHOWN_CHARACTERS]} ... ({len(text):,} characters)"
        table.add_row(*(escape(str(row[key])) for key in ("id", "rule", "detail")), escape(text))
    return table


def _new_table(title: str, first: str, numbers: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    table.caption_justify = "left"
    table.add_column(first, overflow="fold", min_width=min(20, len(first)))
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _count(count: int) -> str:
    return f"{count:,}" if count else "·"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"

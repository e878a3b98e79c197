"""The tables of analyze and filter, as they stand on a terminal."""

from rich.console import Console

from doremi_mix.filters.rules import RULES
from doremi_mix.report.filter_table import render_filter, render_rejections, render_rules, render_statistics


def shown(table, width=100):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


SUMMARY = {
    "steps": [
        {"rule": "exact_duplicate", "rows_before": 1500, "rejected": 200},
        {"rule": "text_length", "rows_before": 1300, "rejected": 30},
        {"rule": "text_length", "rows_before": 1270, "rejected": 5},
        {"rule": "urls", "rows_before": 1265, "rejected": 0},
    ],
    "domains": [
        {"domain": "a_long_domain_name_1", "num_rows": 1000, "num_kept": 965, "rejected": {"text_length": 35}},
        {"domain": "水", "num_rows": 500, "num_kept": 300, "rejected": {"exact_duplicate": 200}},
    ],
    "exact_duplicates": {"lost_to": [[0, 0], [150, 50]], "priority": ["a_long_domain_name_1", "水"]},
}


def test_rows_before_and_after_by_step_and_by_domain():
    lines = shown(render_filter(SUMMARY))
    numbers = [line.split() for line in lines]
    assert ["1", "exact_duplicate", "1,500", "200"] in numbers
    assert ["4", "urls", "1,265", "·"] in numbers
    # Two settings of one rule share a column; a step that took nothing has none.
    assert ["domain", "rows", "kept", "%", "1", "2+3"] in numbers
    assert ["a_long_domain_name_1", "1,000", "965", "96.5", "·", "35"] in numbers
    assert ["水", "500", "300", "60.0", "200", "·"] in numbers
    assert ["all", "1,500", "1,265", "84.3", "200", "35"] in numbers
    assert ["水", "a_long_domain_name_1", "150"] in numbers
    assert ["水", "itself", "50"] in numbers
    assert "shared rows stay with the first of: a_long_domain_name_1, 水 (filter.priority)" in lines


def test_the_tables_fit_a_terminal_of_80_columns():
    many = {**SUMMARY, "steps": [{"rule": f"rule_{i}", "rows_before": 1500, "rejected": 1} for i in range(9)]}
    many["domains"] = [{**domain, "rejected": {f"rule_{i}": 1 for i in range(9)}} for domain in SUMMARY["domains"]]
    lines = shown(render_filter(many), 80)
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:2] == ["a_long_domain_name_1", "1,000"] for line in lines if line)


def test_what_rows_are_like():
    domain = {
        "num_rows": 12,
        "totals": {"text_len": 300, "num_words": 77},
        "quantiles": {"text_len": [10.0, 25.4, 99.0]},
        "flags": {"placeholder_answer": 1, "refusal_answer": 0, "broken_turns": 2},
        "num_duplicates": 3,
        "languages": {"en": 0.9, "zh": 0.098, "fr": 0.002},
    }
    statistics = {
        "probabilities": [0.0, 0.5, 0.99],
        "domains": {"a": domain, "b": {**domain, "num_rows": 9}},
        "overlap": {"domains": ["a", "b"], "shared_texts": [[9, 4], [4, 6]]},
    }
    numbers = [line.split() for line in shown(render_statistics(statistics))]
    assert ["a", "12", "77", "25", "99", "3", "1", "·", "2", "en", "90%,", "zh", "10%"] in numbers
    assert ["a", "b", "4"] in numbers
    statistics["overlap"]["shared_texts"] = [[9, 0], [0, 6]]
    assert "no two domains share a text" in shown(render_statistics(statistics))


def test_a_long_row_is_cut_for_the_eye():
    row = {"id": "a:1", "rule": "text_length", "detail": "2,000 characters", "text": "[b]x" * 500}
    text = " ".join(shown(render_rejections([row]), 200))
    assert "[b]x[b]x" in text
    assert "(2,000 characters)" in text
    assert text.count("[b]x") < 130


def test_every_rule_is_listed():
    lines = shown(render_rules(RULES), 140)
    assert all(any(line.strip().startswith(rule.name) for line in lines) for rule in RULES)

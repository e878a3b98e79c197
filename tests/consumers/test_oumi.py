"""Oumi's own config reads our file, and its own builder makes the mixture."""

import json
from pathlib import Path

import pytest
import yaml

from doremi_mix.errors import ExportError
from doremi_mix.exporters.plan import make_plan

from .checking import assert_composition, write_problem

CONSUMER = "oumi"
pytestmark = pytest.mark.consumers


def name_answers(problem):
    """Rewrites the rows so that each answer names its domain: it is what Oumi keeps of a row."""
    for name, path in problem.paths.items():
        messages = [
            [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": name}]
            for number in range(len(problem.rows[name]))
        ]
        lines = [json.dumps({"messages": entry}) + "\n" for entry in messages]
        Path(path).write_text("".join(lines), encoding="utf-8")
    return problem


def planned(export):
    return {name: round(share * export.num_drawn) for name, share in export.expected.items()}


@pytest.mark.proves("oumi", how="drawn")
def test_counts_are_drawn_exactly_and_shares_by_chance(consumer, tmp_path):
    problem = name_answers(
        write_problem(
            tmp_path / "rows",
            {"alpha": 0.2, "beta": 0.5, "gamma": 0.3},
            {"alpha": 2000, "beta": 1200, "gamma": 200},
            {"alpha": 5, "beta": 10, "gamma": 20},
        )
    )
    (counts, [counts_file]), (shares, [shares_file]) = (
        consumer.export("oumi", problem.weights, budget=budget) for budget in (30_000, None)
    )
    by_count, by_share = consumer.ask("mixtures", files=[counts_file, shares_file])
    assert by_count["paths"] == by_share["paths"] == list(problem.paths.values())
    assert by_count["drawn"] == planned(counts)
    assert by_count["most_often"] == {"alpha": 1, "beta": 2, "gamma": 3}
    assert by_share["shares"] == list(make_plan(problem.weights).example_shares().values())
    assert sum(by_share["shares"]) == 1.0
    assert_composition(by_share["drawn"], shares.expected)
    assert set(by_share["most_often"].values()) == {1}


def test_hostile_names_are_read_right_or_refused(consumer, tmp_path):
    names = ["yes", "1e5", "-x", "a b", "it's", '"q"', "a,b:c#d@e", "中文", "[1]*?", "null", "{a}%s", "a\\n", "b\nc"]
    names += ["~", "$HOME", "???", "a::b", "\x85 \u2028\ufeff", "2020-01-01"]
    problem = name_answers(
        write_problem(
            tmp_path / "rows", dict.fromkeys(names, 1 / 19), dict.fromkeys(names, 40), dict.fromkeys(names, 6)
        )
    )
    exports, files = zip(*(consumer.export("oumi", problem.weights, budget=b) for b in (None, 1200, 5000)), strict=True)
    shares, *counts = consumer.ask("mixtures", files=[file for [file] in files])
    assert_composition(shares["drawn"], exports[0].expected)
    for export, answer in zip(exports[1:], counts, strict=True):
        assert answer["drawn"] == planned(export)


def test_trap_sums_some_without_the_others_and_of_interpolation(consumer, problem, tmp_path):
    entries = [{"dataset_name": "text_sft", "dataset_path": path} for path in problem.paths.values()]

    def mixed(*proportions):
        return [
            entry if share is None else {**entry, "mixture_proportion": share}
            for entry, share in zip(entries, proportions, strict=True)
        ]

    odd = tmp_path / "a\t${x}.jsonl"
    odd.write_text(Path(problem.paths["beta"]).read_text("utf-8"), encoding="utf-8")
    naive = {
        "rounded": mixed(0.2, 0.5, 0.300001),
        "some": mixed(0.4, 0.6, None),
        "interpolation": [{"dataset_name": "text_sft", "dataset_path": str(odd)}],
    }
    files = []
    for name, datasets in naive.items():
        files.append(str(tmp_path / f"{name}.yaml"))
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"data": {"train": {"datasets": datasets}}}), "utf-8")
    rounded, some, interpolation = consumer.ask("mixtures", files=files)
    assert "The sum of `mixture_proportion` must be 1.0. The current sum is 1.000001" in rounded
    assert "If `mixture_proportion` is specified it must be  specified for all datasets" in some
    assert "found unknown escape character" in interpolation
    with pytest.raises(ExportError) as refusal:
        consumer.export("oumi", problem.weights, paths={**problem.paths, "beta": "/d/${x}.jsonl"})
    assert str(refusal.value) == (
        "oumi: domain 'beta': its path '/d/${x}.jsonl' holds \"${\", which its configs take for a reference, or cannot "
        "parse in double quotes; give other paths: --paths"
    )

"""The datasets library of Hugging Face builds what our Python file and our JSON say."""

import json
from pathlib import Path

import pytest

from doremi_mix.errors import ExportError

from .checking import Consumer, assert_composition, write_problem
from .conftest import ENVIRONMENTS

CONSUMER = "datasets"
BUDGET = 8000
"""Tokens, for which the 312 rows of beta and the 50 of gamma are read more than once."""


def export_and_ask(consumer, name, weights, **how):
    """Returns an export and what to ask of it."""
    export, [file] = consumer.export(name, weights, **how)
    if name == "datasets":
        return export, {"task": "python", "file": file}
    return export, {"task": "usage", "file": file, "line": export.usage}


def planned(export):
    return {name: round(share * export.num_drawn) for name, share in export.expected.items()}


@pytest.mark.proves("datasets", "datasets-json", how="drawn")
def test_with_a_budget_the_counts_are_drawn_exactly(consumer, problem):
    exports, asks = zip(
        *(export_and_ask(consumer, name, problem.weights, budget=BUDGET) for name in ("datasets", "datasets-json")),
        strict=True,
    )
    for export, answer in zip(exports, consumer.ask("several", asks=asks), strict=True):
        assert answer["drawn"] == planned(export) == {"alpha": 321, "beta": 401, "gamma": 121}
        # No row comes again before all of its domain came.
        assert answer["most_often"] == {"alpha": 1, "beta": 2, "gamma": 3}


@pytest.mark.proves("datasets", "datasets-json", how="drawn")
def test_without_a_budget_rows_are_drawn_by_share_and_none_twice(consumer, tmp_path):
    problem = write_problem(
        tmp_path / "large",
        {"alpha": 0.2, "beta": 0.5, "gamma": 0.3},
        {"alpha": 2000, "beta": 1800, "gamma": 900},
        {"alpha": 5, "beta": 10, "gamma": 20},
    )
    exports, asks = zip(
        *(export_and_ask(consumer, name, problem.weights) for name in ("datasets", "datasets-json")), strict=True
    )
    for export, answer in zip(exports, consumer.ask("several", asks=asks), strict=True):
        assert_composition(answer["drawn"], export.expected)
        assert set(answer["most_often"].values()) == {1}
        # It ended because one domain has come once.
        assert any(answer["drawn"][name] == size for name, size in problem.sizes.items())


def test_hostile_names_and_paths_are_read_right(consumer, tmp_path):
    # The last one is a file that the bare path of "[1]*?" would match as well.
    names = ["yes", "1e5", "-x", "a b", "it's", '"q"', "a,b:c#d@e", "中文", "[1]*?", "null", "{a}%s", "a\\n", "b\nc"]
    names += ["~", "1zz"]
    problem = write_problem(
        tmp_path / "rows", dict.fromkeys(names, 1 / 15), dict.fromkeys(names, 40), dict.fromkeys(names, 6)
    )
    exports, asks = zip(
        *(
            export_and_ask(consumer, name, problem.weights, budget=budget)
            for name in ("datasets", "datasets-json")
            for budget in (None, 1200)
        ),
        strict=True,
    )
    for export, answer in zip(exports, consumer.ask("several", asks=asks), strict=True):
        if export.num_drawn is None:
            assert_composition(answer["drawn"], export.expected)
        else:
            assert answer["drawn"] == planned(export)


def test_the_python_file_refuses_fewer_rows_than_were_counted_and_takes_columns(consumer, problem, tmp_path):
    wrapped = tmp_path / "wrapped.json"
    wrapped.write_text(json.dumps({"data": problem.rows["gamma"]}), encoding="utf-8")
    paths = {**problem.paths, "gamma": str(wrapped)}
    _, fewer = export_and_ask(consumer, "datasets", problem.weights, budget=BUDGET, paths=paths)
    other = tmp_path / "other_types.jsonl"
    other.write_text("".join(json.dumps({**row, "input": 7}) + "\n" for row in problem.rows["gamma"]), "utf-8")
    paths = {**problem.paths, "gamma": str(other)}
    export, types = export_and_ask(consumer, "datasets", problem.weights, budget=BUDGET, paths=paths)
    columns = {**types, "columns": ["domain", "instruction"]}
    answers = consumer.ask("several", asks=[fewer, types, columns])
    assert answers[0] == f"ValueError: gamma: {wrapped} has 1 rows, expected at least 50"
    assert answers[1].startswith("ValueError: The features can't be aligned because the key input of features")
    assert answers[2]["drawn"] == planned(export)


@pytest.fixture(scope="module")
def naive(tmp_path_factory):
    """What the library does with what one would write by hand, by the name of the trap."""
    folder = tmp_path_factory.mktemp("naive")
    sizes = {"alpha": 1000, "beta": 300, "gamma": 50}
    problem = write_problem(folder / "rows", dict.fromkeys(sizes, 1 / 3), sizes, dict.fromkeys(sizes, 5))
    arguments = {
        "rounded": {"probabilities": [0.2, 0.5, 0.300001]},
        "nearly": {"probabilities": [0.2, 0.5, 0.3 + 1e-8]},
        "zero": {"probabilities": [0.4, 0.6, 0.0], "stopping_strategy": "all_exhausted"},
        "zero, once": {"probabilities": [0.4, 0.6, 0.0], "stopping_strategy": "all_exhausted_without_replacement"},
        "once": {"probabilities": [0.2, 0.5, 0.3], "stopping_strategy": "all_exhausted_without_replacement"},
        "all": {"probabilities": [0.2, 0.5, 0.3], "stopping_strategy": "all_exhausted"},
    }
    asks = [{"task": "interleave", "paths": list(problem.paths.values()), "arguments": a} for a in arguments.values()]
    for file, domain in (("a1.jsonl", "other"), ("a[1].jsonl", "meant"), ("$HOME.jsonl", "home"), ("a::b.jsonl", "a")):
        (folder / file).write_text(json.dumps({"domain": domain}) + "\n", encoding="utf-8")
        asks.append(
            {"task": "load", "arguments": {"path": "json", "data_files": [str(folder / file)], "split": "train"}}
        )
    answers = Consumer(ENVIRONMENTS[CONSUMER], folder).ask("several", asks=asks)
    return dict(zip([*arguments, "a1", "a[1]", "$HOME", "a::b"], answers, strict=True))


def test_trap_rounded_probabilities_do_not_sum_to_one(naive, consumer, problem):
    assert (
        naive["rounded"].lower()
        == "valueerror: probabilities do not sum to 1. see notes section of docstring for more information."
    )
    assert naive["nearly"]["drawn"]
    _, [file] = consumer.export("datasets-json", problem.weights)
    probabilities = json.loads(Path(file).read_text(encoding="utf-8"))["interleave_datasets"]["probabilities"]
    assert sum(probabilities) == 1.0


def test_trap_zeros_raise_or_never_end(naive, consumer, tmp_path):
    assert naive["zero"] == (
        'ValueError: interleave_datasets with stopping_strategy="all_exhausted" cannot exhaust a dataset that is never '
        "sampled; datasets at indices [2] have probability 0."
    )
    assert naive["zero, once"] == "TimeoutError: it does not end"
    problem = write_problem(
        tmp_path / "rows",
        {"alpha": 0.4, "beta": 0.6, "gamma": 0.0},
        {"alpha": 100, "beta": 30, "gamma": 5},
        {"alpha": 5, "beta": 5, "gamma": 5},
    )
    exports, asks = zip(
        *(export_and_ask(consumer, "datasets", problem.weights, budget=budget) for budget in (None, 200)), strict=True
    )
    for export, answer in zip(exports, consumer.ask("several", asks=asks), strict=True):
        assert set(answer["drawn"]) == set(export.expected) == {"alpha", "beta"}


def test_trap_without_replacement_ignores_the_weights(naive):
    assert naive["once"]["drawn"] == {"alpha": 1000, "beta": 300, "gamma": 50}


def test_trap_all_exhausted_repeats_a_small_domain_far_beyond_any_epoch_cap(naive):
    assert naive["all"]["most_often"]["gamma"] > 20


def test_trap_patterns_variables_and_addresses_in_paths(naive, consumer, problem):
    assert naive["a1"] == {"other": 1}
    assert naive["a[1]"] == {"other": 1}, "the brackets are a pattern, which another file matches"
    assert naive["$HOME"].startswith("FileNotFoundError: [Errno 2] No such file or directory:")
    assert naive["a::b"].startswith("FileNotFoundError: Unable to find")
    for path in ("$HOME.jsonl", "a::b.jsonl"):
        for name in ("datasets", "datasets-json"):
            with pytest.raises(ExportError, match="give other paths: --paths"):
                consumer.export(name, problem.weights, paths={**problem.paths, "beta": path})

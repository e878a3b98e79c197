"""LLaMA-Factory mixes what its training YAML, its dataset_info.json and the YAML of its v1 stack say."""

import json
from pathlib import Path

import pytest
import yaml

from doremi_mix.errors import ExportError

from .checking import Consumer, assert_composition, write_problem
from .conftest import ENVIRONMENTS

CONSUMER = "llama-factory"
BUDGET = 8000
"""Tokens, for which the 312 rows of beta and the 50 of gamma are read more than once."""

pytestmark = pytest.mark.consumers


def mark(problem):
    """Says in each prompt where the row comes from: its other columns are dropped."""
    for name, path in problem.paths.items():
        rows = [
            {"instruction": f"From {name}", "input": f"{number}.", "output": row["output"]}
            for number, row in enumerate(problem.rows[name])
        ]
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return problem


def export_and_ask(consumer, name, weights, **how):
    """Returns an export and what to ask of it."""
    export, [file, *_] = consumer.export(name, weights, **how)
    return export, {"task": "draw_v1" if name.endswith("v1") else "draw", "file": file, "usage": export.usage}


def planned(export):
    return {name: round(share * export.num_drawn) for name, share in export.expected.items()}


@pytest.mark.proves("llama-factory", "llama-factory-v1", how="drawn")
def test_counts_are_drawn_exactly(consumer, problem):
    mark(problem)
    # The second budget takes the file of beta exactly once.
    exports, asks = zip(
        *(
            export_and_ask(consumer, name, problem.weights, budget=budget)
            for name in ("llama-factory", "llama-factory-v1")
            for budget in (BUDGET, 6233)
        ),
        strict=True,
    )
    answers = consumer.ask("several", asks=asks)
    counts = {"alpha": 321, "beta": 401, "gamma": 121}, {"alpha": 250, "beta": 312, "gamma": 94}
    for export, answer, count in zip(exports, answers, (*counts, *counts), strict=True):
        assert answer["drawn"] == planned(export) == count
    # No row comes again before all of its domain came, but for the last pass of the v1 stack, drawn with replacement.
    assert answers[0]["most_often"] == {"alpha": 1, "beta": 2, "gamma": 3}
    assert answers[1]["most_often"] == {"alpha": 1, "beta": 1, "gamma": 2}
    assert answers[2]["most_often"]["alpha"] > 1
    assert answers[3]["most_often"]["beta"] == 1


@pytest.mark.proves("llama-factory-probabilities", how="drawn")
def test_rows_are_drawn_by_share_and_none_twice(consumer, tmp_path):
    problem = write_problem(
        tmp_path / "large",
        {"alpha": 0.2, "beta": 0.5, "gamma": 0.3},
        {"alpha": 2000, "beta": 1800, "gamma": 900},
        {"alpha": 5, "beta": 10, "gamma": 20},
    )
    export, ask = export_and_ask(consumer, "llama-factory-probabilities", mark(problem).weights)
    [answer] = consumer.ask("several", asks=[ask])
    assert_composition(answer["drawn"], export.expected)
    assert set(answer["most_often"].values()) == {1}
    assert any(answer["drawn"][name] == size for name, size in problem.sizes.items())


@pytest.mark.proves("llama-factory", "llama-factory-probabilities", "llama-factory-v1", how="drawn")
def test_hostile_names_and_paths_are_read_right(consumer, tmp_path):
    names = ["yes", "1e5", "-x", "a b", " lead ", "it's", '"q"', "a,b:c#d@e", "中文"]
    names += ["null", "???", "{a}%s", "a\\n", "a\x85b"]
    names += ["~", "1.5", "2024-01-01", "<<", "a.b"]
    problem = write_problem(
        tmp_path / "rows", dict.fromkeys(names, 1 / len(names)), dict.fromkeys(names, 40), dict.fromkeys(names, 6)
    )
    # A name may hold "?", but a path with it is a pattern of the datasets library.
    paths = {name: path if name != "???" else path.replace("???", "what") for name, path in problem.paths.items()}
    Path(problem.paths["???"]).rename(paths["???"])
    problem.paths.update(paths)
    mark(problem)
    exports, asks = zip(
        *(
            export_and_ask(consumer, name, problem.weights, budget=1500, paths=problem.paths)
            for name in ("llama-factory", "llama-factory-probabilities", "llama-factory-v1")
        ),
        strict=True,
    )
    counts, shares, counts_v1 = consumer.ask("several", asks=asks)
    assert counts["names"] == shares["names"] == names
    assert counts["drawn"] == planned(exports[0])
    assert counts_v1["drawn"] == planned(exports[2])
    assert_composition(shares["drawn"], exports[1].expected)


@pytest.fixture(scope="module")
def naive(tmp_path_factory):
    """What it does with what one would write by hand, by the name of the trap."""
    folder = tmp_path_factory.mktemp("naive")
    consumer = Consumer(ENVIRONMENTS[CONSUMER], folder)
    sizes = {"alpha": 1000, "beta": 300, "gamma": 50}
    problem = mark(write_problem(folder / "rows", dict.fromkeys(sizes, 1 / 3), sizes, dict.fromkeys(sizes, 5)))
    over = {"mix_strategy": "interleave_over"}
    by_hand = {
        "zero": over | {"interleave_probs": "0.4,0.6,0.0"},
        "rounded": over | {"interleave_probs": "0.2,0.5,0.300001"},
        "concat": {"interleave_probs": "0.2,0.5,0.3"},
        "one name twice": {"dataset": "alpha,beta,beta"},
        "number": {"dataset": ["alpha", 1e5]},
    }
    asks = []
    for number, training in enumerate(by_hand.values()):
        _, ask = export_and_ask(consumer, "llama-factory-probabilities", problem.weights)
        file = Path(ask["file"]).with_name(f"{number}.yaml")
        file.write_text(yaml.safe_dump({"dataset_dir": ".", "dataset": "alpha,beta,gamma", **training}), "utf-8")
        asks.append({**ask, "file": str(file), "seconds": 20})
    _, ask = export_and_ask(consumer, "llama-factory-v1", problem.weights, budget=3000)
    Path(ask["file"]).write_text(
        yaml.safe_dump(
            {
                name: {"path": path, "source": "local", "converter": "alpaca", "weight": weight}
                for (name, path), weight in zip(problem.paths.items(), (0.5, 2.0, 0), strict=True)
            }
        ),
        encoding="utf-8",
    )
    return dict(zip([*by_hand, "v1 zero"], consumer.ask("several", asks=[*asks, ask]), strict=True))


def with_a_zero(tmp_path):
    problem = write_problem(
        tmp_path / "zero",
        {"alpha": 0.4, "beta": 0.6, "gamma": 0.0},
        {"alpha": 1000, "beta": 300, "gamma": 50},
        {"alpha": 5, "beta": 5, "gamma": 5},
    )
    return mark(problem).weights


def test_trap_a_zero_never_ends(naive, consumer, tmp_path):
    assert naive["zero"] == "TimeoutError: it does not end"
    export, ask = export_and_ask(consumer, "llama-factory-probabilities", with_a_zero(tmp_path))
    [answer] = consumer.ask("several", asks=[{**ask, "seconds": 20}])
    assert_composition(answer["drawn"], export.expected)
    assert set(export.expected) == {"alpha", "beta"}


def test_trap_rounded_probabilities_are_refused(naive, consumer, problem):
    assert naive["rounded"].lower().startswith("valueerror: probabilities do not sum to 1")
    _, ask = export_and_ask(consumer, "llama-factory-probabilities", problem.weights)
    assert sum(yaml.safe_load(Path(ask["file"]).read_text("utf-8"))["interleave_probs"]) == 1.0


def test_trap_probabilities_are_refused_beside_concat(naive, consumer, problem):
    assert naive["concat"] == "ValueError: `interleave_probs` is only valid for interleaved mixing."
    for name in ("llama-factory", "llama-factory-probabilities"):
        _, ask = export_and_ask(consumer, name, problem.weights, budget=3000)
        training = yaml.safe_load(Path(ask["file"]).read_text("utf-8"))
        assert ("interleave_probs" in training) == (training["mix_strategy"] != "concat")


def test_trap_a_weight_of_zero_in_v1_is_the_whole_dataset(naive, consumer, tmp_path):
    assert naive["v1 zero"]["drawn"] == {"alpha": 500, "beta": 600, "gamma": 50}
    export, ask = export_and_ask(consumer, "llama-factory-v1", with_a_zero(tmp_path), budget=3000)
    [answer] = consumer.ask("several", asks=[ask])
    assert answer["drawn"] == planned(export)
    assert set(answer["drawn"]) == {"alpha", "beta"}


def test_trap_a_name_that_comes_twice_counts_once(naive):
    assert naive["one name twice"]["drawn"] == {"alpha": 1000, "beta": 300}


def test_trap_a_name_like_a_number_is_no_name(naive):
    assert naive["number"] == "ValueError: Undefined dataset 100000.0 in dataset_info.json."


def test_what_it_would_misread_is_refused(consumer, problem):
    for path in (
        "a[1].jsonl",
        "a*.jsonl",
        "a?.jsonl",
        "$HOME.jsonl",
        "a::b.jsonl",
        "s3://b/a.jsonl",
        "a.JSONL",
        "a.gz",
    ):
        with pytest.raises(ExportError, match=r"domain 'beta': .*; give other paths: --paths"):
            consumer.export("llama-factory", problem.weights, budget=3000, paths={**problem.paths, "beta": path})

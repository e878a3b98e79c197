"""ms-swift draws as many rows of each file as the number after ``#`` says."""

from pathlib import Path

import pytest
import yaml

from doremi_mix.errors import ExportError

from .checking import Consumer, write_problem
from .conftest import ENVIRONMENTS

CONSUMER = "ms-swift"
BUDGET = 8000
"""Tokens, for which the 312 rows of beta and the 50 of gamma are read more than once."""

pytestmark = pytest.mark.consumers


def export_and_ask(consumer, weights, **how):
    """Returns an export and what to ask of it."""
    export, [file] = consumer.export("ms-swift", weights, **how)
    return export, {"file": file, "usage": export.usage}


def planned(export, problem):
    """What is to be drawn, by path."""
    return {problem.paths[name]: round(share * export.num_drawn) for name, share in export.expected.items()}


@pytest.mark.proves("ms-swift", how="drawn")
def test_counts_are_drawn_exactly(consumer, problem, tmp_path):
    names = ["yes", "1e5", "-x", "a b", " lead ", "it's", '"q"', "a,b:c#d@e", "a#7"]
    names += ["中文", "null", "{a}%s", "a\\n", "a\x85b"]
    hostile = write_problem(
        tmp_path / "hostile", dict.fromkeys(names, 1 / len(names)), dict.fromkeys(names, 40), dict.fromkeys(names, 6)
    )
    export, ask = export_and_ask(consumer, problem.weights, budget=BUDGET)
    other, other_ask = export_and_ask(consumer, hostile.weights, budget=1500)
    answer, other_answer = consumer.ask("several", asks=[ask, other_ask])
    assert answer["drawn"] == planned(export, problem)
    assert sorted(answer["drawn"].values()) == [121, 321, 401]
    # No row comes again before all of its domain came.
    paths = problem.paths
    assert answer["most_often"] == {paths["alpha"]: 1, paths["beta"]: 2, paths["gamma"]: 3}
    assert other_answer["drawn"] == planned(other, hostile)


@pytest.fixture(scope="module")
def naive(tmp_path_factory):
    """What it does with what one would write by hand, by the name of the trap."""
    folder = tmp_path_factory.mktemp("naive")
    consumer = Consumer(ENVIRONMENTS[CONSUMER], folder)
    sizes = {"alpha": 1000, "beta": 300, "gamma": 50, "a::b": 20}
    problem = write_problem(folder / "rows", dict.fromkeys(sizes, 1 / 4), sizes, dict.fromkeys(sizes, 5))
    a, b, c, hop = problem.paths.values()
    by_hand = {
        "fraction": {"dataset": [f"{a}#0.2", f"{b}#0.8"]},
        "zero": {"dataset": [f"{a}#200", f"{b}#0"]},
        "hop": {"dataset": [f"{a}#200", f"{hop}#10"]},
        "probability of zero": {
            "dataset": [a, b, c],
            "interleave_prob": [0.4, 0.6, 0.0],
            "stopping_strategy": "all_exhausted",
        },
        "probabilities": {"dataset": [a, b, c], "interleave_prob": [0.2, 0.5, 0.300001]},
        "streaming": {"dataset": [f"{a}#200", f"{b}#100"], "streaming": True},
    }
    asks = []
    for number, arguments in enumerate(by_hand.values()):
        file = folder / f"{number}.yaml"
        file.write_text(yaml.safe_dump(arguments), encoding="utf-8")
        asks.append({"file": str(file), "usage": f"swift sft {file} --model MODEL", "seconds": 20})
    return dict(zip(by_hand, consumer.ask("several", asks=asks), strict=True))


def test_trap_the_number_after_the_sign_is_a_count(naive):
    assert naive["fraction"] == "ValueError: invalid literal for int() with base 10: '0.2'"


def test_trap_zeros_are_refused_or_never_end(naive, consumer, tmp_path):
    assert naive["zero"] == "AssertionError: "
    assert naive["probability of zero"] == "TimeoutError: it does not end"
    problem = write_problem(
        tmp_path / "zero",
        {"alpha": 0.4, "beta": 0.6, "gamma": 0.0},
        {"alpha": 1000, "beta": 300, "gamma": 50},
        {"alpha": 5, "beta": 5, "gamma": 5},
    )
    export, ask = export_and_ask(consumer, problem.weights, budget=3000)
    [answer] = consumer.ask("several", asks=[{**ask, "seconds": 20}])
    assert answer["drawn"] == planned(export, problem)
    assert set(answer["drawn"]) == {problem.paths["alpha"], problem.paths["beta"]}


def test_trap_rounded_probabilities_are_refused(naive):
    assert naive["probabilities"].lower().startswith("valueerror: probabilities do not sum to 1")


def test_trap_what_precedes_two_colons_is_dropped(naive, consumer, problem):
    # It looks for what is left in a hub.
    assert naive["hop"].startswith("ConnectionError: Couldn't reach 'b.jsonl' on the Hub")
    with pytest.raises(ExportError, match="domain 'beta'"):
        consumer.export("ms-swift", problem.weights, budget=3000, paths={**problem.paths, "beta": "/x/a::b.jsonl"})


def test_trap_streaming_draws_the_first_rows(naive, consumer, problem):
    assert [*naive["streaming"]["last"].values()] == [199, 99]
    export, ask = export_and_ask(consumer, problem.weights, budget=3000)
    [answer] = consumer.ask("several", asks=[ask])
    alpha = problem.paths["alpha"]
    assert answer["last"][alpha] > planned(export, problem)[alpha]
    assert "Leave streaming and split_dataset_ratio out: the first rows would be drawn, or fewer." in export.notes


def test_the_yaml_is_read_as_it_was_meant(consumer, problem):
    export, ask = export_and_ask(consumer, problem.weights, budget=BUDGET)
    written = yaml.safe_load(Path(ask["file"]).read_text("utf-8"))
    assert written == {
        "dataset": [f"{path}#{count}" for path, count in planned(export, problem).items()],
        "dataset_shuffle": True,
        "data_seed": 0,
    }

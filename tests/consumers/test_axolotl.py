"""Axolotl draws of each file the part that the weights of its entries say."""

import copy
from pathlib import Path

import pytest
import yaml

from doremi_mix.errors import ExportError

from .checking import Consumer, write_problem
from .conftest import ENVIRONMENTS

CONSUMER = "axolotl"
BUDGET = 8000
"""Tokens, for which the 312 rows of beta and the 50 of gamma are read more than once."""

pytestmark = pytest.mark.consumers


def planned(export):
    return {name: round(share * export.num_drawn) for name, share in export.expected.items()}


@pytest.mark.proves("axolotl", how="drawn")
def test_counts_are_drawn_exactly(consumer, problem, tmp_path):
    names = ["yes", "1e5", "-x", "a b", " lead ", "it's", '"q"', "a,b:c#d@e", "a.csv"]
    names += ["中文", "null", "{a}%s", "a\\n", "a\x85b"]
    hostile = write_problem(
        tmp_path / "hostile", dict.fromkeys(names, 1 / len(names)), dict.fromkeys(names, 41), dict.fromkeys(names, 6)
    )
    exports, files = zip(
        *(
            consumer.export("axolotl", of.weights, budget=budget)
            for of, budget in ((problem, BUDGET), (hostile, 1500), (problem, 1001))
        ),
        strict=True,
    )
    answers = consumer.ask("several", asks=[{"file": file} for [file] in files])
    for export, answer in zip(exports, answers, strict=True):
        assert answer["drawn"] == planned(export)
    assert answers[0]["drawn"] == {"alpha": 321, "beta": 401, "gamma": 121}
    # No row comes again before all of its domain came, and the domains are shuffled.
    assert answers[0]["most_often"] == {"alpha": 1, "beta": 2, "gamma": 3}
    assert set(answers[0]["first"]) == {"alpha", "beta", "gamma"}


@pytest.fixture(scope="module")
def naive(tmp_path_factory):
    """What it does with what one would write by hand, by the name of the trap."""
    folder = tmp_path_factory.mktemp("naive")
    consumer = Consumer(ENVIRONMENTS[CONSUMER], folder)
    sizes = {"alpha": 1000, "beta": 300, "gamma": 50}
    problem = write_problem(folder / "rows", dict.fromkeys(sizes, 1 / 3), sizes, dict.fromkeys(sizes, 5))
    _, [file] = consumer.export("axolotl", problem.weights, budget=1500)
    config = yaml.safe_load(Path(file).read_text("utf-8"))
    by_hand = {
        "shares": (0.2, 0.5, 0.3),
        "above one": (0.2, 0.5, 2.0),
        "zero": (0.2, 0.5, 0.0),
        # Of 50 rows, 29 are not drawn by 0.58, nor 1 by a weight that draws none.
        "rounded down": (0.2, 0.5, 0.58),
        "tiny": (0.2, 0.5, 1e-9),
    }
    asks = []
    for name, weights in by_hand.items():
        changed = copy.deepcopy(config)
        changed["datasets"] = [
            {"path": path, "ds_type": "json", "type": "alpaca", "weight": weight}
            for path, weight in zip(problem.paths.values(), weights, strict=True)
        ]
        written = folder / f"{name}.yaml"
        written.write_text(yaml.safe_dump(changed), encoding="utf-8")
        asks.append({"file": str(written)})
    return dict(zip(by_hand, consumer.ask("several", asks=asks), strict=True))


def test_trap_weights_are_parts_of_each_dataset_not_of_the_mixture(naive):
    assert naive["shares"]["drawn"] == {"alpha": 200, "beta": 150, "gamma": 15}


def test_trap_weights_above_one_and_of_zero_are_refused(naive, consumer, tmp_path):
    assert "Input should be less than or equal to 1" in naive["above one"]
    assert "Input should be greater than 0" in naive["zero"]
    problem = write_problem(
        tmp_path / "zero",
        {"alpha": 0.4, "beta": 0.6, "gamma": 0.0},
        {"alpha": 1000, "beta": 300, "gamma": 50},
        {"alpha": 5, "beta": 5, "gamma": 5},
    )
    export, [file] = consumer.export("axolotl", problem.weights, budget=5000)
    [answer] = consumer.ask("several", asks=[{"file": file}])
    assert answer["drawn"] == planned(export)
    assert answer["drawn"]["beta"] > 300
    assert "gamma" not in answer["drawn"]


def test_trap_a_tiny_weight_draws_a_row(naive):
    assert naive["tiny"]["drawn"]["gamma"] == 1


def test_trap_a_part_is_rounded_down(naive, consumer, tmp_path):
    assert naive["rounded down"]["drawn"]["gamma"] == 28
    # 29 of 50 rows, for which 29 / 50 is not enough.
    problem = write_problem(
        tmp_path / "part", {"alpha": 0.5, "gamma": 0.5}, {"alpha": 100, "gamma": 50}, {"alpha": 5, "gamma": 5}
    )
    export, [file] = consumer.export("axolotl", problem.weights, budget=58, budget_unit="examples")
    [answer] = consumer.ask("several", asks=[{"file": file}])
    assert answer["drawn"] == planned(export) == {"alpha": 29, "gamma": 29}


def test_what_it_would_misread_is_refused(consumer, problem):
    for path in ("a[1].jsonl", "a*.jsonl", "$HOME.jsonl", "a::b.jsonl", "s3://b/a.jsonl", "folder"):
        with pytest.raises(ExportError, match=r"domain 'beta': .*; give other paths: --paths"):
            consumer.export("axolotl", problem.weights, budget=3000, paths={**problem.paths, "beta": path})

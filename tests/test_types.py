"""The values between stages refuse what they must not hold."""

import pickle
import re
from dataclasses import asdict

import pytest

from doremi_mix import errors
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.types import Allocation, Domains, DomainStatistics

GOOD = DomainWeights({"a": 0.25, "b": 0.75}, {"a": 0.5, "b": 0.5}, intervals={"a": (0.2, 0.3)}).to_dict()


def test_weights_survive_json():
    assert DomainWeights.from_dict(GOOD).to_dict() == GOOD
    assert (GOOD["format"], GOOD["version"], GOOD["unit"]) == ("doremi-mix/domain-weights", 1, "tokens")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, '"format" must be "doremi-mix/domain-weights", got \'x\''),
        ({"version": 2}, '"version" must be 1, got 2'),
        ({"domain_weights": {"a": 0.5, "b": 0.6}}, "domain weights must sum to 1, got 1.1"),
        (
            {"domain_weights": {"a": "0.25", "b": 0.75}},
            "domain weights: the weight of 'a' must be a number, got '0.25'",
        ),
        ({"domain_weights": {"a": None, "b": 1}}, "domain weights: the weight of 'a' must be a number, got None"),
        (
            {"domain_weights": {"a": -1, "b": 2}},
            "domain weights: the weight of 'a' must be finite and at least 0, got -1",
        ),
        ({"domain_weights": {"c": 1.0}}, "domain weights and reference weights name different domains"),
        ({"domain_weights": None}, '"domain_weights" must be an object, got None'),
        ({"intervals": None}, '"intervals" must be an object, got None'),
        ({"shares": {"token": [1]}}, '"shares.token" must be an object of numbers, got [1]'),
        ({"shares": {"token": {"a": None}}}, "\"shares.token\" must be an object of numbers, got {'a': None}"),
        ({"intervals": {"a": 5}}, '"intervals.a" must be two numbers, got 5'),
        ({"intervals": {"a": [0.1]}}, '"intervals.a" must be two numbers, got [0.1]'),
        ({"intervals": {"a": ["x", "y"]}}, "\"intervals.a\" must be two numbers, got ['x', 'y']"),
        (
            {"corpus": {"a": {"num_examples": 5, "available_tokens": 9, "num_rows": 2}}},
            '"corpus.a": num_rows must be at least num_examples, 5, or 0 for unknown, got 2',
        ),
        ({"diagnoses": 5}, '"diagnoses" must be a list of sentences, got 5'),
        ({"diagnoses": "all is well"}, "\"diagnoses\" must be a list of sentences, got 'all is well'"),
        ({"diagnoses": [5]}, '"diagnoses" must be a list of sentences, got [5]'),
        (
            {"domain_weights": {"a": 10**400, "b": 0}},
            f"domain weights: the weight of 'a' must be finite and at least 0, got 1{'0' * 59}",
        ),
        ({"domain_weights": {"a": 1e308, "b": 1e308}}, "domain weights must sum to 1, got inf"),
    ],
)
def test_edited_weights_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DomainWeights.from_dict({**GOOD, **change})


def test_statistics():
    assert asdict(DomainStatistics(3, 30, num_rows=3))["num_rows"] == 3
    assert DomainStatistics(3, 30, num_rows=0).mean_tokens == 10
    with pytest.raises(ValueError, match=r"^num_rows must be at least num_examples, 3, or 0 for unknown, got 2$"):
        DomainStatistics(3, 30, num_rows=2)
    with pytest.raises(ValueError, match=r"^num_examples must be a whole number of at least 1, got 0$"):
        DomainStatistics(0, 30)


def test_domains_and_allocations():
    assert Domains(("a", "b")).index("b") == 1
    with pytest.raises(ValueError, match="domain names must be unique, got 'a' twice"):
        Domains(("a", "a"))
    with pytest.raises(ValueError, match="allocated tokens sum to 3, not to the budget 4"):
        Allocation(4, 1.0, {"a": 3}, {"a": 3})


def test_errors_can_be_pickled_and_are_standard_exceptions():
    for error, standard in (
        (errors.ConfigError, ValueError),
        (errors.SourceNotFoundError, FileNotFoundError),
        (errors.StageNotFinishedError, RuntimeError),
        (errors.RunDirectoryError, OSError),
        (errors.DivergedError, ArithmeticError),
    ):
        again = pickle.loads(pickle.dumps(error("what, which, got, do")))
        assert (type(again), str(again)) == (error, "what, which, got, do")
        assert isinstance(again, standard)

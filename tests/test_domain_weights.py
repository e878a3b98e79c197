"""Domain weights in other units, and as counts under a budget."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import BudgetError, DataError
from doremi_mix.exporters.plan import make_plan
from doremi_mix.run import read_json
from doremi_mix.types import DomainStatistics

CORPUS = {
    "alpha": DomainStatistics(1000, 5_000, 100),
    "beta": DomainStatistics(300, 3_000, 50),
    "gamma": DomainStatistics(50, 1_000, 20),
}
SHARES = {"alpha": 0.2, "beta": 0.5, "gamma": 0.3}
UNIFORM = dict.fromkeys(SHARES, 1 / 3)
WEIGHTS = DomainWeights(SHARES, UNIFORM, corpus=CORPUS)
BARE = DomainWeights(SHARES, UNIFORM)


def message(text):
    return f"^{re.escape(text)}$"


def test_probabilities_in_each_unit():
    assert WEIGHTS.to_probabilities() == SHARES
    # 0.2 / 5, 0.5 / 10, 0.3 / 20 tokens an example are as 8, 10, 3.
    assert WEIGHTS.to_probabilities("examples") == pytest.approx({"alpha": 8 / 21, "beta": 10 / 21, "gamma": 3 / 21})
    # 0.2 / 50, 0.5 / 60, 0.3 / 50 tokens a packed sequence are as 12, 25, 18.
    assert WEIGHTS.to_probabilities("sequences") == pytest.approx({"alpha": 12 / 55, "beta": 25 / 55, "gamma": 18 / 55})


def test_a_weight_of_zero_stays_in_its_place():
    weights = DomainWeights({"alpha": 0.0, "beta": 0.5, "gamma": 0.5}, UNIFORM, corpus=CORPUS)
    assert weights.to_probabilities("examples") == pytest.approx({"alpha": 0, "beta": 2 / 3, "gamma": 1 / 3})
    assert list(weights.to_probabilities("examples")) == ["alpha", "beta", "gamma"]
    assert weights.to_counts(600) == {"alpha": 0, "beta": 30, "gamma": 15}


def test_a_run_stores_what_the_corpus_gives(finished_run):
    weights = DomainWeights.from_dict(read_json(finished_run / "weights" / "domain_weights.json"))
    bare = replace(weights, corpus={})
    for unit in ("tokens", "sequences", "examples"):
        assert weights.to_probabilities(unit) == pytest.approx(weights.shares[unit[:-1]], rel=1e-12)
        assert bare.to_probabilities(unit) == pytest.approx(weights.shares[unit[:-1]], rel=1e-12)


def test_stored_shares_of_other_weights_are_not_believed():
    stored = {"token": SHARES, "sequence": {"alpha": 0.1, "beta": 0.1, "gamma": 0.8}}
    fresh = replace(WEIGHTS, shares=stored)
    assert fresh.to_probabilities("sequences") == stored["sequence"]
    stale = replace(fresh, domain_weights=UNIFORM)
    # As 1 / 50, 1 / 60, 1 / 50.
    assert stale.to_probabilities("sequences") == pytest.approx({"alpha": 6 / 17, "beta": 5 / 17, "gamma": 6 / 17})
    assert replace(fresh, corpus={}).to_probabilities("sequences") == stored["sequence"]
    with pytest.raises(DataError):
        replace(stale, corpus={}).to_probabilities("sequences")


def test_units_that_are_not_known_are_refused():
    text = (
        "how many tokens the examples of each domain have is not known; take the domain_weights.json of a run, or "
        'unit="tokens"'
    )
    with pytest.raises(DataError, match=message(text)):
        BARE.to_probabilities("examples")
    unpacked = {name: replace(statistics, num_sequences=0) for name, statistics in CORPUS.items()}
    with pytest.raises(DataError, match="how many tokens the sequences of each domain have is not known"):
        replace(WEIGHTS, corpus=unpacked).to_probabilities("sequences")
    with pytest.raises(ValueError, match=message('unit must be "tokens", "sequences" or "examples", got \'token\'')):
        WEIGHTS.to_probabilities("token")
    with pytest.raises(ValueError, match=message('unit must be "tokens" or "examples", got \'sequences\'')):
        WEIGHTS.to_counts(10, unit="sequences")


def test_counts_fill_the_budget():
    # 420 tokens: 84, 210, 126; 16.8, 21, 6.3 examples.
    assert WEIGHTS.to_counts(420) == {"alpha": 17, "beta": 21, "gamma": 6}
    assert WEIGHTS.to_counts(21, unit="examples") == {"alpha": 8, "beta": 10, "gamma": 3}
    # Gamma is cut at 50 examples; the others share the rest as 8 to 10.
    assert WEIGHTS.to_counts(500, unit="examples", max_epochs=1) == {"alpha": 200, "beta": 250, "gamma": 50}
    assert BARE.to_counts(10, unit="examples", equal_lengths=True) == {"alpha": 2, "beta": 5, "gamma": 3}


def test_counts_that_cannot_be_are_refused():
    text = (
        "counts of examples need the lengths of examples, and the weights have no corpus; take the "
        'domain_weights.json of a run, or say unit="examples", equal_lengths=True'
    )
    for how in ({}, {"equal_lengths": True}, {"unit": "examples"}):
        with pytest.raises(DataError, match=message(text)):
            BARE.to_counts(10, **how)
    with pytest.raises(BudgetError, match=message("a budget of 1 tokens is smaller than one example; raise it")):
        WEIGHTS.to_counts(1)
    with pytest.raises(BudgetError, match="give at most 36,000"):
        WEIGHTS.to_counts(36_001)


@st.composite
def weights_with_corpus(draw):
    num_domains = draw(st.integers(2, 30))
    parts = draw(st.lists(st.sampled_from([0, 1e-12, 0.1, 1.0, 7.0]), min_size=num_domains, max_size=num_domains))
    parts[0] = 1.0
    corpus = {}
    for number in range(num_domains):
        num_examples = draw(st.integers(1, 1000))
        corpus[f"d{number}"] = DomainStatistics(
            num_examples, num_examples * draw(st.integers(1, 50)), draw(st.integers(1, num_examples))
        )
    shares = {f"d{number}": part / sum(parts) for number, part in enumerate(parts)}
    return DomainWeights(shares, dict.fromkeys(shares, 1 / num_domains), corpus=corpus)


@given(weights_with_corpus(), st.sampled_from(["tokens", "sequences", "examples"]))
@settings(max_examples=60, deadline=None)
def test_probabilities_sum_to_one_and_give_the_token_shares_back(weights, unit):
    shares = weights.to_probabilities(unit)
    assert sum(shares.values()) == sum(reversed(shares.values())) == 1.0
    assert [name for name, share in shares.items() if share] == [n for n, w in weights.domain_weights.items() if w]
    size = {
        "tokens": dict.fromkeys(shares, Fraction(1)),
        "sequences": {n: Fraction(s.available_tokens, s.num_sequences) for n, s in weights.corpus.items()},
        "examples": {n: Fraction(s.available_tokens, s.num_examples) for n, s in weights.corpus.items()},
    }[unit]
    tokens = {name: share * size[name] for name, share in shares.items()}
    total = sum(tokens.values())
    for name, weight in weights.domain_weights.items():
        assert float(tokens[name] / total) == pytest.approx(weight, abs=1e-12)


@given(weights_with_corpus(), st.floats(0.01, 1.0), st.sampled_from(["tokens", "examples"]))
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_the_exporters_and_keep_the_cap(weights, part, unit):
    drawn = [s for name, s in weights.corpus.items() if weights[name]]
    whole = sum(s.available_tokens if unit == "tokens" else s.num_examples for s in drawn)
    budget = max(1, int(part * 2 * whole))
    plan = make_plan(weights, budget=budget, budget_unit=unit, max_epochs=2.0)
    if not any(domain.examples for domain in plan.domains):
        with pytest.raises(BudgetError, match="is smaller than one example"):
            weights.to_counts(budget, unit=unit, max_epochs=2.0)
        return
    counts = weights.to_counts(budget, unit=unit, max_epochs=2.0)
    planned = plan.counts()
    assert {name: count for name, count in counts.items() if count} == planned
    assert all(counts[name] <= 2 * statistics.num_examples for name, statistics in weights.corpus.items())
    if unit == "examples":
        assert sum(counts.values()) == budget


def test_a_file_of_any_pipeline_is_read(tmp_path):
    path = tmp_path / "weights"
    path.write_text(json.dumps(WEIGHTS.to_dict()), encoding="utf-8")
    assert DomainWeights.read(path) == DomainWeights.read(str(path)) == WEIGHTS
    other = {name: replace(statistics, num_sequences=1) for name, statistics in CORPUS.items()}
    assert DomainWeights.read(path, other) == replace(WEIGHTS, corpus=other)
    path.write_text("alpha: 20\nbeta: 50\ngamma: 30\n", encoding="utf-8")
    foreign = replace(BARE, method="{domain: weight} in YAML")
    assert DomainWeights.read(path) == foreign
    # A corpus may know of more domains than the weights.
    assert DomainWeights.read(path, {"delta": CORPUS["alpha"], **CORPUS}) == replace(foreign, corpus=CORPUS)
    text = "the corpus knows nothing of domain 'gamma'; give the corpus of these domains"
    with pytest.raises(DataError, match=message(text)):
        DomainWeights.read(path, {name: CORPUS[name] for name in ("alpha", "beta")})
    with pytest.raises(
        DataError, match=message(f"{tmp_path}: cannot be read (Is a directory); give a domain_weights.json")
    ):
        DomainWeights.read(tmp_path)


def test_a_file_of_shares_of_examples_needs_the_corpus(tmp_path):
    path = tmp_path / "weights.csv"
    path.write_text("name,example_share\nalpha,0.4\nbeta,0.5\ngamma,0.1\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=message(f"{path}: holds shares of examples, not of tokens; give a corpus, which converts them")
    ):
        DomainWeights.read(path)
    # 0.4 x 5, 0.5 x 10 and 0.1 x 20 tokens.
    read = DomainWeights.read(path, CORPUS)
    assert read.domain_weights == pytest.approx({"alpha": 2 / 9, "beta": 5 / 9, "gamma": 2 / 9})
    assert read.to_probabilities("examples") == pytest.approx({"alpha": 0.4, "beta": 0.5, "gamma": 0.1})


def test_the_methods_load_nothing_that_they_do_not_need():
    code = (
        "import sys; from doremi_mix import DomainWeights\n"
        "w = DomainWeights({'a': 0.5, 'b': 0.5}, {'a': 0.5, 'b': 0.5})\n"
        "w.to_probabilities(); w.to_counts(4, unit='examples', equal_lengths=True)\n"
        "assert not {'torch', 'datasets', 'pyarrow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

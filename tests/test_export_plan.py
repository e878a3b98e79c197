"""How much of each domain is drawn, in every unit, from weights, corpus and budget."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import BudgetError, DataError, ExportError
from doremi_mix.exporters.plan import make_plan
from doremi_mix.types import DomainStatistics


def weights_of(shares, corpus=None, **more):
    corpus = {name: DomainStatistics(*entry) for name, entry in (corpus or {}).items()}
    return DomainWeights(shares, dict.fromkeys(shares, 1 / len(shares)), corpus=corpus, **more)


# Examples, tokens: of 10, 20 and 40 tokens each.
CORPUS = {"short": (100, 1000), "middle": (100, 2000), "long": (100, 4000)}
WEIGHTS = {"short": 0.25, "middle": 0.25, "long": 0.5}


def test_without_a_budget_shares_are_the_weights_and_examples_follow_from_lengths():
    plan = make_plan(weights_of(WEIGHTS, CORPUS))
    assert plan.token_shares() == WEIGHTS
    # .25/10 : .25/20 : .5/40 = 2 : 1 : 1
    assert plan.example_shares() == {"short": 0.5, "middle": 0.25, "long": 0.25}
    assert (plan.budget, plan.token_budget, plan.capped) == (None, None, ())
    with pytest.raises(ExportError, match=r"^it takes numbers of examples, which need a budget; give --budget$"):
        plan.counts()


def test_a_budget_of_tokens_becomes_counts_of_examples_and_multipliers():
    plan = make_plan(weights_of(WEIGHTS, CORPUS), budget=4000)
    assert {d.name: d.tokens for d in plan.domains} == {"short": 1000, "middle": 1000, "long": 2000}
    assert plan.counts() == {"short": 100, "middle": 50, "long": 50}
    assert plan.multipliers() == {"short": 1, "middle": Fraction(1, 2), "long": Fraction(1, 2)}


def test_a_budget_of_examples_gives_exactly_so_many():
    plan = make_plan(weights_of(WEIGHTS, CORPUS), budget=41, budget_unit="examples")
    assert plan.counts() == {"short": 21, "middle": 10, "long": 10}
    assert plan.token_shares() == {
        "short": pytest.approx(210 / 810),
        "middle": pytest.approx(200 / 810),
        "long": pytest.approx(400 / 810),
    }


def test_the_epoch_cap_moves_tokens_to_the_others():
    plan = make_plan(weights_of({"short": 0.8, "middle": 0.1, "long": 0.1}, CORPUS), budget=4000, max_epochs=2)
    assert {d.name: d.tokens for d in plan.domains} == {"short": 2000, "middle": 1000, "long": 1000}
    assert plan.capped == ("short",)
    assert plan.counts()["short"] == 200
    assert plan.token_shares() == {"short": 0.5, "middle": 0.25, "long": 0.25}
    assert plan.named("short").weight == 0.8


def test_domains_of_weight_zero_are_left_out_and_named():
    plan = make_plan(weights_of({"short": 0.5, "middle": 0.0, "long": 0.5}, CORPUS), budget=1000)
    assert [domain.name for domain in plan.domains] == ["short", "long"]
    assert plan.left_out == ("middle",)


def test_a_weight_below_one_example_is_a_share_but_no_count():
    plan = make_plan(
        weights_of({"short": 1 - 1e-12, "long": 1e-12}, {"short": (10, 100), "long": (10, 100)}), budget=50
    )
    assert plan.counts() == {"short": 5}
    shares = make_plan(weights_of({"short": 1 - 1e-12, "long": 1e-12}, {"short": (10, 100), "long": (10, 100)}))
    assert shares.token_shares()["long"] == pytest.approx(1e-12, rel=1e-3)


def test_without_a_corpus_examples_are_unknown_unless_said_to_be_equal():
    plan = make_plan(weights_of(WEIGHTS))
    assert plan.token_shares() == WEIGHTS
    with pytest.raises(ExportError, match=r"lengths of examples are not known; give --corpus RUN_DIR"):
        plan.example_shares()
    equal = make_plan(weights_of(WEIGHTS), budget=8, budget_unit="examples", equal_lengths=True)
    assert equal.example_shares() == WEIGHTS
    assert equal.counts() == {"short": 2, "middle": 2, "long": 4}
    assert equal.notes == ("The sizes of the domains are not known, so no epoch cap was applied.",)
    with pytest.raises(ExportError, match=r"not known; say --budget-unit examples, or give --corpus RUN_DIR$"):
        make_plan(weights_of(WEIGHTS), budget=8, equal_lengths=True).counts()
    with pytest.raises(ExportError, match=r"multipliers of each domain's own size, which are not known"):
        equal.multipliers()
    with pytest.raises(ExportError, match=r"^a budget in examples needs the lengths of examples"):
        make_plan(weights_of(WEIGHTS), budget=8, budget_unit="examples")


def test_the_source_file_has_rows_that_are_not_trained_on():
    corpus = {"a": (100, 1000, 0, "a.json", 125), "b": (100, 1000, 0, "b.json", 100)}
    source = make_plan(weights_of({"a": 0.5, "b": 0.5}, corpus), budget=1000)
    assert source.multipliers() == {"a": Fraction(50, 125), "b": Fraction(1, 2)}
    assert [domain.path for domain in source.domains] == ["a.json", "b.json"]
    same = make_plan(weights_of({"a": 0.5, "b": 0.5}, corpus), budget=1000, paths={"a": "./a.json", "b": "x/b"})
    assert same.multipliers() == {"a": Fraction(50, 125), "b": Fraction(1, 2)}
    other = make_plan(weights_of({"a": 0.5, "b": 0.5}, corpus), budget=1000, paths={"a": "x/a", "b": "x/b"})
    assert other.multipliers() == {"a": Fraction(1, 2), "b": Fraction(1, 2)}


def test_what_no_file_can_hold_is_refused():
    with pytest.raises(ExportError, match=r"^domain 'a\\ud800': its name has a character that no file can hold"):
        make_plan(weights_of({"a\ud800": 0.5, "b": 0.5}))
    with pytest.raises(ExportError, match=r"^domain 'b': its path has a character that no file can hold"):
        make_plan(weights_of({"a": 0.5, "b": 0.5}), paths={"a": "x", "b": "y\0"})
    with pytest.raises(DataError, match=r"^no path is given for domain 'b'; give one for each domain in --paths$"):
        make_plan(weights_of({"a": 0.5, "b": 0.5}), paths={"a": "x"})
    with pytest.raises(BudgetError, match=r"^token budget 100,000 is impossible: 7,000 tokens"):
        make_plan(weights_of(WEIGHTS, CORPUS), budget=100_000)


@given(
    st.lists(
        st.tuples(st.one_of(st.just(0.0), st.floats(1e-12, 1)), st.integers(1, 10_000), st.integers(1, 3000)),
        min_size=2,
        max_size=60,
    ).filter(lambda domains: any(weight for weight, _, _ in domains)),
    st.floats(0.01, 4),
    st.sampled_from(["tokens", "examples"]),
)
def test_a_plan_keeps_its_promises(domains, epochs, unit):
    total = math.fsum(weight for weight, _, _ in domains)
    shares = {str(i): weight / total for i, (weight, _, _) in enumerate(domains)}
    corpus = {str(i): (examples, examples * length) for i, (_, examples, length) in enumerate(domains)}
    drawn = [corpus[name] for name in shares if shares[name]]
    budget = max(1, int(epochs * sum(d[unit == "tokens"] for d in drawn)))
    plan = make_plan(weights_of(shares, corpus), budget=budget, budget_unit=unit, max_epochs=4.0)
    assert sum(plan.token_shares().values()) == sum(plan.example_shares().values()) == 1.0
    for domain in plan.domains:
        assert domain.examples <= 4 * domain.statistics.num_examples
    amount = sum(d.tokens if unit == "tokens" else d.examples for d in plan.domains)
    assert amount == budget
    if unit == "tokens":
        # Rounding to whole examples costs less than one of each domain.
        counted = sum(d.examples * d.statistics.mean_tokens for d in plan.domains)
        assert abs(counted - budget) <= sum(d.statistics.mean_tokens for d in plan.domains)
    assert set(plan.left_out) | {d.name for d in plan.domains} == set(shares)

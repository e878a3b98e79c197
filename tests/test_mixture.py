"""The token budget and the draws: exact sums, caps, the KL projection, determinism."""

import math
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.distributed import Processes
from doremi_mix.errors import BudgetError, DataError
from doremi_mix.mixture import allocate, draw_examples, mixture_order, natural_weights
from doremi_mix.pipeline import resolve
from doremi_mix.progress import Narrator
from doremi_mix.run import RunDirectory
from doremi_mix.stages import StageContext
from doremi_mix.stages import mixture as stage


def normalized(raw):
    total = math.fsum(raw)
    return [weight / total for weight in raw]


@st.composite
def problems(draw, least_domains=1, most_domains=8):
    """A feasible problem: (weights, available tokens, budget, max_epochs)."""
    num_domains = draw(st.integers(least_domains, most_domains))
    raw = draw(
        st.lists(
            st.one_of(st.just(0.0), st.floats(1e-12, 1e-9), st.floats(1e-3, 1.0)),
            min_size=num_domains,
            max_size=num_domains,
        ).filter(lambda weights: sum(weights) > 0)
    )
    available = draw(st.lists(st.integers(0, 2000), min_size=num_domains, max_size=num_domains))
    max_epochs = draw(st.sampled_from([0.1, 0.7, 1.0, 2.5, 4.0, 1000.0]))
    weights = {f"d{i}": weight for i, weight in enumerate(normalized(raw))}
    feasible = sum(round(max_epochs * 10) * count // 10 for weight, count in zip(raw, available, strict=True) if weight)
    budget = draw(st.integers(1, max(feasible, 1)))
    return weights, {f"d{i}": count for i, count in enumerate(available)}, budget, max_epochs, feasible


def fill_by_bisection(weights, caps, budget):
    """The scale at which min(scale * weight, cap) sums to the budget, found without sorting anything."""
    low, high = 0.0, 1.0
    while sum(min(high * weight, cap) for weight, cap in zip(weights, caps, strict=True)) < budget * (1 - 1e-12):
        high *= 2
    for _ in range(300):
        middle = (low + high) / 2
        total = sum(min(middle * weight, cap) for weight, cap in zip(weights, caps, strict=True))
        low, high = (middle, high) if total < budget else (low, middle)
    return [min(high * weight, cap) for weight, cap in zip(weights, caps, strict=True)]


@given(problems())
@settings(deadline=None, max_examples=300)
def test_allocate_agrees_with_bisection_and_sums_exactly(problem):
    weights, available, budget, max_epochs, feasible = problem
    if budget > feasible:
        with pytest.raises(BudgetError, match="impossible"):
            allocate(weights, available, budget, max_epochs)
        return
    allocation = allocate(weights, available, budget, max_epochs)
    caps = [round(max_epochs * 10) * count // 10 for count in available.values()]
    expected = fill_by_bisection(list(weights.values()), caps, budget)
    assert sum(allocation.tokens.values()) == budget
    for name, ideal, cap in zip(weights, expected, caps, strict=True):
        assert abs(allocation.tokens[name] - ideal) < 1 + 1e-6 * budget
        assert allocation.tokens[name] <= cap
        assert weights[name] > 0 or allocation.tokens[name] == 0
        assert allocation.epochs(name) <= max_epochs


@given(problems(least_domains=2))
@settings(deadline=None, max_examples=200)
def test_allocate_meets_the_kkt_conditions_of_the_kl_projection(problem):
    weights, available, budget, max_epochs, feasible = problem
    if budget > feasible:
        return
    allocation = allocate(weights, available, budget, max_epochs)
    free = [name for name in weights if name not in allocation.capped and weights[name] > 0]
    # Free domains share one multiplier (the scale); a capped domain would take more at that scale, not less.
    for one in free:
        for other in free:
            assert (allocation.tokens[one] - 1) / weights[one] <= (allocation.tokens[other] + 1) / weights[other]
    for name in allocation.capped:
        for other in free:
            assert allocation.tokens[name] / weights[name] <= (allocation.tokens[other] + 1) / weights[other]


def test_allocate_gives_the_integers_nearest_in_kl_by_brute_force():
    weights, available = {"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 3, "b": 40, "c": 50}
    allocation = allocate(weights, available, budget=24, max_epochs=2)

    def divergence(tokens):
        return sum(n / 24 * math.log(n / 24 / w) for n, w in zip(tokens, weights.values(), strict=True) if n)

    candidates = [(a, b, 24 - a - b) for a in range(7) for b in range(25 - a)]
    # Capped at 6, "a" leaves 18 tokens to "b" and "c" at 3 : 1; the tie of 13.5 and 4.5 goes to the earlier.
    assert tuple(allocation.tokens.values()) == (6, 14, 4)
    assert divergence((6, 14, 4)) == pytest.approx(min(map(divergence, candidates)), abs=1e-3)
    assert allocation.capped == ("a",)


def test_caps_that_bind_in_a_cascade():
    # Freed tokens push the next domain over its cap, one after another; only the last one has room.
    weights = {f"d{i}": weight for i, weight in enumerate(normalized([512, 256, 128, 64, 32, 8]))}
    available = {"d0": 100, "d1": 100, "d2": 100, "d3": 100, "d4": 100, "d5": 10**6}
    allocation = allocate(weights, available, budget=10_000, max_epochs=1)
    assert list(allocation.tokens.values()) == [100, 100, 100, 100, 100, 9_500]
    assert allocation.capped == ("d0", "d1", "d2", "d3", "d4")


def test_a_cap_that_is_met_exactly_has_cut_nothing():
    allocation = allocate({"a": 0.5, "b": 0.5}, {"a": 10, "b": 100}, budget=20, max_epochs=1)
    assert allocation.tokens == {"a": 10, "b": 10}
    assert allocation.capped == ()


def test_the_largest_feasible_budget_fills_every_cap_of_a_weighted_domain():
    weights = {"a": 0.9, "b": 1e-12, "c": 0.1 - 1e-12, "d": 0.0}
    allocation = allocate(weights, {"a": 7, "b": 11, "c": 0, "d": 5}, budget=17 + 27, max_epochs=2.5)
    assert allocation.tokens == {"a": 17, "b": 27, "c": 0, "d": 0}


def test_huge_budgets_and_minute_weights_are_exact():
    weights = {"a": 1 - 3e-12, "b": 1e-12, "c": 2e-12}
    available = {"a": 10**15, "b": 10**15, "c": 10**15}
    assert allocate(weights, available, budget=10**12).tokens == {"a": 10**12 - 3, "b": 1, "c": 2}
    million = allocate({f"d{i}": 1 / 3 for i in range(3)}, {f"d{i}": 10**18 for i in range(3)}, budget=10**18 + 1)
    assert list(million.tokens.values()) == [333333333333333334, 333333333333333334, 333333333333333333]


def test_one_domain_takes_the_whole_budget():
    assert allocate({"only": 1.0}, {"only": 100}, budget=400).tokens == {"only": 400}


def test_equal_remainders_go_to_the_earlier_domain():
    weights = {"z": 0.25, "a": 0.25, "m": 0.25, "k": 0.25}
    available = dict.fromkeys(weights, 100)
    assert allocate(weights, available, budget=6).tokens == {"z": 2, "a": 2, "m": 1, "k": 1}


def test_a_decimal_epoch_cap_means_what_was_typed():
    # The float 0.7 lies below 7/10: exact binary arithmetic would floor 0.7 epochs of 10 tokens to 6.
    assert allocate({"a": 1.0}, {"a": 10}, budget=7, max_epochs=0.7).tokens == {"a": 7}
    # And .3 to .1 is 3 to 1, so that 13.5 and 4.5 tie and the earlier domain gets the token.
    assert allocate({"b": 0.3, "c": 0.1, "a": 0.6}, {"b": 99, "c": 99, "a": 1}, budget=19, max_epochs=1).tokens == {
        "b": 14,
        "c": 4,
        "a": 1,
    }


def test_the_order_of_the_token_counts_does_not_matter():
    weights = {"a": 0.7, "b": 0.3}
    one = allocate(weights, {"a": 5, "b": 50}, budget=60)
    other = allocate(weights, {"b": 50, "a": 5}, budget=60)
    assert one == other
    assert list(one.tokens) == ["a", "b"]
    assert list(other.available_tokens) == ["a", "b"]


def test_numpy_scalars_are_accepted_and_come_back_as_plain_integers():
    allocation = allocate({"a": np.float64(1.0)}, {"a": np.int64(9)}, budget=np.int64(5))
    assert type(allocation.tokens["a"]) is int
    assert type(allocation.budget) is int
    assert type(allocation.available_tokens["a"]) is int


HALVES = {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (HALVES, {"a": 1_000, "b": 500}, 10_000, 4.0),
            BudgetError,
            "token budget 10,000 is impossible: 1,500 tokens in domains with a weight above 0, each drawn at most 4 "
            "times, give at most 6,000; lower the token budget to 6,000 or raise mixture.max_epochs to 6.67",
        ),
        (
            ({"a": 1.0, "b": 0.0}, {"a": 10, "b": 500}, 41, 4.0),
            BudgetError,
            "token budget 41 is impossible: 10 tokens in domains with a weight above 0, each drawn at most 4 times, "
            "give at most 40; lower the token budget to 40 or raise mixture.max_epochs to 4.10",
        ),
        (
            (HALVES, {"a": 0, "b": 0}, 1, 4.0),
            BudgetError,
            "token budget 1 is impossible: no domain with a weight above 0 has any tokens; add data",
        ),
        (
            (HALVES, {"a": 3, "b": 3}, 1, 0.25),
            BudgetError,
            "token budget 1 is impossible: 6 tokens in domains with a weight above 0, each drawn at most 0.25 times, "
            "give at most 0; raise mixture.max_epochs to 0.50",
        ),
        (
            (HALVES, {"a": 1, "b": 1}, 0, 4.0),
            BudgetError,
            "the token budget must be a whole number of at least 1, got 0; change the token budget",
        ),
        (
            (HALVES, {"a": 1, "b": 1}, 1.5, 4.0),
            BudgetError,
            "the token budget must be a whole number of at least 1, got 1.5; change the token budget",
        ),
        (
            (HALVES, {"a": 1, "b": 1}, 1, 0),
            BudgetError,
            "mixture.max_epochs must be finite and above 0, got 0; change mixture.max_epochs",
        ),
        (
            (HALVES, {"a": 1, "b": 1}, 1, math.nan),
            BudgetError,
            "mixture.max_epochs must be finite and above 0, got nan; change mixture.max_epochs",
        ),
        (
            (HALVES, {"a": 1, "c": 1}, 1, 4.0),
            DataError,
            "domain 'b' has a weight but no token count; token counts are known for a, c; load that domain too, or "
            "take weights that were learned on these domains",
        ),
        (
            (HALVES, {f"{name}": 1 for name in "abcdefgh"}, 1, 4.0),
            DataError,
            "domain 'c' has tokens but no weight; weights are known for a, b; give it a weight (0 leaves it out), or "
            "leave that domain out",
        ),
        (
            ({"a": 0.5, "b": 0.4}, {"a": 1, "b": 1}, 1, 4.0),
            DataError,
            "weights must sum to 1, got 0.9; divide every weight by the sum of all",
        ),
        (
            (HALVES, {"a": -1, "b": 1}, 1, 4.0),
            DataError,
            "available tokens of domain 'a' must be a whole number of at least 0, got -1; count the tokens again",
        ),
        (
            ({}, {}, 1, 4.0),
            DataError,
            "weights name no domain; expected at least one; give the weights of the domains to mix",
        ),
    ],
)
def test_errors_say_what_to_do(arguments, error, message):
    with pytest.raises(error) as caught:
        allocate(*arguments)
    assert str(caught.value) == message


@given(problems(), st.integers(1, 10**7))
@settings(deadline=None)
def test_the_advice_of_the_budget_error_works(problem, extra):
    weights, available, _, max_epochs, feasible = problem
    budget = feasible + extra
    with pytest.raises(BudgetError) as caught:
        allocate(weights, available, budget, max_epochs)
    message = str(caught.value)
    if message.endswith("add data"):
        return
    larger_cap = float(message.rsplit(" ", 1)[1])
    assert sum(allocate(weights, available, budget, larger_cap).tokens.values()) == budget
    if feasible:
        assert f"; lower the token budget to {feasible:,} or raise" in message
        assert allocate(weights, available, feasible, max_epochs).budget == feasible


def test_natural_weights_are_shares_of_tokens():
    assert natural_weights({"a": 6, "b": 0, "c": 2}) == {"a": 0.75, "b": 0.0, "c": 0.25}
    with pytest.raises(DataError) as caught:
        natural_weights({"a": 0, "b": 0})
    assert str(caught.value) == (
        "no domain has any tokens; 2 domains were given; at least one must have some: check the sources and the filters"
    )


def draw_one_by_one(example_tokens, token_quota, permutations):
    """The definition: walk through the epochs and stop at the first example that does not fit."""
    drawn, left = [], token_quota
    for permutation in permutations:
        for index in permutation:
            if example_tokens[index] > left:
                return drawn
            drawn.append(int(index))
            left -= int(example_tokens[index])
    raise AssertionError("the quota outlasts the permutations")


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.integers(0, 2000),
    st.integers(0, 2**40),
    st.text(max_size=8),
)
@settings(deadline=None, max_examples=200)
def test_draws_equal_a_walk_through_the_epochs(example_tokens, quota, seed, domain):
    drawn = draw_examples(example_tokens, quota, seed, domain)
    num_examples = len(example_tokens)
    # The epochs are the longest draw, cut into pieces: each must be a permutation, and the walk over them the draw.
    everything = draw_examples(example_tokens, quota + sum(example_tokens) * 2, seed, domain)
    epochs = [everything[start : start + num_examples] for start in range(0, len(everything), num_examples)]
    for epoch in epochs[:-1]:
        assert sorted(epoch) == list(range(num_examples))
    assert drawn.tolist() == draw_one_by_one(example_tokens, quota, epochs)
    left = quota - sum(example_tokens[i] for i in drawn)
    assert 0 <= left < example_tokens[int(everything[len(drawn)])]


def test_epochs_are_fresh_permutations_and_domains_are_independent():
    lengths = np.ones(1000, dtype=np.int64)
    two_epochs = draw_examples(lengths, 2000, seed=3, domain="dolly")
    assert sorted(two_epochs[:1000]) == sorted(two_epochs[1000:]) == list(range(1000))
    assert (two_epochs[:1000] != two_epochs[1000:]).mean() > 0.9
    for other in (draw_examples(lengths, 2000, 4, "dolly"), draw_examples(lengths, 2000, 3, "gsm8k")):
        assert (two_epochs != other).mean() > 0.9
    assert two_epochs.tolist() == draw_examples(lengths.astype(np.int32), 2000, seed=3, domain="dolly").tolist()


def test_draws_do_not_depend_on_the_process():
    code = (
        "from doremi_mix.mixture import *; "
        "print(draw_examples([1] * 9, 9, 0, '中文').tolist(), mixture_order([3, 4], 0).tolist())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    # Golden values: a change here changes every mixture that was ever drawn, and must be announced.
    assert outputs == ["[4, 5, 2, 1, 6, 8, 3, 0, 7] [4, 2, 6, 5, 0, 1, 3]\n"] * 2


def test_an_example_longer_than_the_quota_never_enters():
    assert draw_examples([100], 99, seed=0, domain="d").size == 0
    assert draw_examples([100], 100, seed=0, domain="d").tolist() == [0]
    assert draw_examples([], 0, seed=0, domain="d").size == 0


def test_the_draw_is_fast_enough_for_a_million_examples():
    lengths = np.random.default_rng(0).integers(1, 1000, size=1_000_000)
    quota = int(lengths.sum() * 3.5)
    drawn = draw_examples(lengths, quota, seed=0, domain="big")
    assert 0 <= quota - lengths[drawn].sum() < 1000


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ([3, 0], 5, 0, "dolly"),
            DataError,
            "domain 'dolly': example 1 has 0 tokens; expected at least 1; drop empty examples before drawing",
        ),
        (
            ([], 1_000, 0, "dolly"),
            DataError,
            "domain 'dolly' has no examples; 1,000 tokens were to be drawn; give it weight 0",
        ),
        (([3], -1, 0, "dolly"), ValueError, "the token quota of 'dolly' must be at least 0, got -1"),
        (([3], 1, -1, "dolly"), ValueError, "the seed must be at least 0, got -1"),
        (
            ([0.5], 1, 0, "dolly"),
            ValueError,
            "example_tokens of 'dolly' must be a one-dimensional array of integers, got shape (1,) of float64",
        ),
    ],
)
def test_draw_errors_say_what_to_do(arguments, error, message):
    with pytest.raises(error) as caught:
        draw_examples(*arguments)
    assert str(caught.value) == message


@given(st.lists(st.integers(0, 20), max_size=10), st.integers(0, 2**64))
@settings(deadline=None)
def test_mixture_order_is_a_permutation(num_drawn, seed):
    order = mixture_order(num_drawn, seed)
    assert sorted(order) == list(range(sum(num_drawn)))


def test_mixture_order_spreads_every_domain_over_the_whole_mixture():
    order = mixture_order([5_000, 500], seed=0)
    for positions in (order[:5_000], order[5_000:]):
        # Means of uniform positions: 2,750 with a standard error of at most 71.
        assert abs(positions.mean() - 2_749.5) < 4 * 71
        assert all(after - before > 1 for before, after in pairwise(sorted(set(np.sort(positions)[::100]))))
    assert (order != mixture_order([5_000, 500], seed=1)).mean() > 0.99
    with pytest.raises(ValueError, match="at least 0, got \\[-1\\]"):
        mixture_order([-1], seed=0)


@pytest.mark.parametrize(("bucket_rows", "max_buckets"), [(7, 1_000), (7, 4), (1, 128)])
def test_the_mixture_does_not_depend_on_how_many_rows_are_shuffled_at_a_time(
    finished_run, tmp_path, monkeypatch, bucket_rows, max_buckets
):
    monkeypatch.setattr(stage, "BUCKET_ROWS", bucket_rows)
    monkeypatch.setattr(stage, "MAX_BUCKETS", max_buckets)
    run = RunDirectory(finished_run)
    config, _ = resolve(run.describe()["given"], run)
    stage.run(StageContext(config, run, tmp_path, Narrator(quiet=True), Processes()))
    written = (tmp_path / "mixture.jsonl").read_bytes()
    assert written.count(b"\n") > 50
    assert written == (finished_run / "mixture" / "mixture.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "allocation.json",
        "mixture.jsonl",
        "ratio.json",
        "rows.npy",
    ]

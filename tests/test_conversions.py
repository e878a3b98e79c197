"""The same mixture in other units."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doremi_mix.conversions import GRID, exact_shares, in_other_units, to_token_shares, whole_counts

positive = st.floats(min_value=1e-12, max_value=1e12)
VALUES = st.lists(positive | st.just(0.0), min_size=2, max_size=200).filter(any)


@given(VALUES, st.randoms(use_true_random=False))
def test_shares_add_up_to_one_exactly_in_any_order(values, rng):
    shares = exact_shares({str(i): value for i, value in enumerate(values)})
    shuffled = list(shares.values())
    for _ in range(3):
        rng.shuffle(shuffled)
        assert sum(shuffled) == 1.0
        assert float(np.sum(shuffled)) == 1.0
        assert math.fsum(shuffled) == 1.0


@given(VALUES)
def test_shares_are_off_by_less_than_one_step_of_the_grid_and_never_lost(values):
    shares = exact_shares({str(i): value for i, value in enumerate(values)})
    total = sum(Fraction(value) for value in values)
    for share, value in zip(shares.values(), values, strict=True):
        assert (share == 0) == (value == 0)
        off = abs(Fraction(share) - Fraction(value) / total)
        # What tiny values were lifted by is taken from the largest.
        assert off <= Fraction(len(values) if value == max(values) else 1, GRID)


def test_values_far_below_the_grid_are_lifted_to_it():
    assert exact_shares({"a": 1e300, "b": 1e-300}) == {"a": 1 - 2**-53, "b": 2**-53}
    # Where a float64 holds them and the sum is 1.0 in any order, they stay.
    assert exact_shares({"a": 1.0, "b": 1e-300}) == {"a": 1.0, "b": 1e-300}
    many = exact_shares({"a": 1.0, **{f"b{i}": 1e-300 for i in range(199)}})
    assert many.pop("a") == 1 - 199 * 2**-53
    assert set(many.values()) == {2**-53}


@given(
    st.lists(st.sampled_from([0.0, 1e-300, 5e-324, 1e-20, 1e-16, 3e-16, 0.1, 1.0, 7.0, 1e300]), min_size=1).filter(any)
)
def test_what_is_said_of_the_error_holds_for_any_values(values):
    shares = list(exact_shares({str(i): value for i, value in enumerate(values)}).values())
    total = sum(Fraction(value) for value in values)
    exact = [Fraction(value) / total for value in values]
    lifted = sum(0 < share * GRID < 1 for share in exact)
    off = [abs(Fraction(share) - true) * GRID for share, true in zip(shares, exact, strict=True)]
    far = [i for i, steps in enumerate(off) if steps >= 1]
    assert len(far) <= 1
    assert all(exact[i] == max(exact) and off[i] < lifted for i in far)
    assert [share > 0 for share in shares] == [value > 0 for value in values]
    assert math.fsum(shares) == sum(shares) == sum(reversed(shares)) == 1.0


def test_shares_that_add_up_stay_as_they_were_typed():
    assert exact_shares({"a": 0.2, "b": 0.5, "c": 0.3}) == {"a": 0.2, "b": 0.5, "c": 0.3}


def test_shares_that_add_up_in_one_order_only_are_rounded():
    typed = {"a": 0.6, "b": 0.3, "c": 0.1}
    assert sum(typed.values()) != sum(reversed(typed.values()))
    assert {sum(order) for order in itertools.permutations(exact_shares(typed).values())} == {1.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": -1.0, "b": 2.0}, "the value of 'a' must be finite and at least 0, got -1.0"),
        ({"a": 1.0, "b": math.inf}, "the value of 'b' must be finite and at least 0, got inf"),
        ({"a": 0.0, "b": 0.0}, "no value is above 0"),
    ],
)
def test_values_that_are_no_amounts_are_refused(values, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        exact_shares(values)


@given(st.lists(st.tuples(st.floats(1e-6, 1), st.integers(1, 5000)), min_size=2, max_size=50))
def test_drawing_by_shares_of_examples_gives_the_shares_of_tokens(domains):
    weights = exact_shares({str(i): weight for i, (weight, _) in enumerate(domains)})
    lengths = {str(i): float(length) for i, (_, length) in enumerate(domains)}
    examples = in_other_units(weights, lengths)
    tokens = {name: examples[name] * lengths[name] for name in weights}
    total = math.fsum(tokens.values())
    for name, weight in weights.items():
        # The grid of the shares is coarse beside a share that is tiny among much shorter examples.
        assert tokens[name] / total == pytest.approx(weight, rel=1e-9, abs=1e-15 * max(lengths.values()))


def test_shares_of_examples_as_shares_of_tokens():
    # 2 examples of 5 tokens, 3 of 10, 5 of 4: 10, 30 and 20 tokens.
    shares = to_token_shares({"a": 0.2, "b": 0.3, "c": 0.5, "d": 0.0}, {"a": 5, "b": 10, "c": 4, "d": 7})
    assert shares == pytest.approx({"a": 1 / 6, "b": 1 / 2, "c": 1 / 3, "d": 0.0}, abs=2e-16)
    assert list(shares) == ["a", "b", "c", "d"]


@given(st.lists(st.tuples(st.floats(1e-6, 1), st.integers(1, 5000)), min_size=2, max_size=50))
def test_shares_of_tokens_and_of_examples_are_each_others_inverse(domains):
    weights = exact_shares({str(i): weight for i, (weight, _) in enumerate(domains)})
    lengths = {str(i): Fraction(length) for i, (_, length) in enumerate(domains)}
    there_and_back = to_token_shares(in_other_units(weights, lengths), lengths)
    assert sum(there_and_back.values()) == sum(reversed(there_and_back.values())) == 1.0
    for name, weight in weights.items():
        assert there_and_back[name] == pytest.approx(weight, abs=1e-12)


@given(st.lists(st.fractions(min_value=0, max_value=1000), min_size=1, max_size=60), st.integers(0, 2**32))
def test_counts_are_amounts_rounded_by_largest_remainder(amounts, seed):
    rng = random.Random(seed)
    shares = {str(i): amount for i, amount in enumerate(amounts)}
    caps = {name: rng.randint(0, 1200) for name in shares}
    for given_caps in (None, caps):
        counts = whole_counts(shares, given_caps)
        cut = {name: min(share, given_caps[name]) if given_caps else share for name, share in shares.items()}
        assert sum(counts.values()) == math.floor(sum(cut.values()))
        rounded_up = [name for name in counts if counts[name] > cut[name]]
        rounded_down = [name for name in counts if counts[name] < cut[name]]
        assert all(abs(counts[name] - cut[name]) < 1 for name in counts)
        assert not given_caps or all(counts[name] <= given_caps[name] for name in counts)
        if rounded_up and rounded_down:
            least = min(cut[name] - math.floor(cut[name]) for name in rounded_up)
            assert least >= max(cut[name] - math.floor(cut[name]) for name in rounded_down)

"""The same mixture in other units."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doremi_mix.conversions import GRID, exact_shares, in_other_units, whole_counts

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

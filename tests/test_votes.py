"""Votes of several models: both rules against loops over rows and models."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.filters.votes import vote


def by_hand(values, low, high, min_votes):
    """Whether one row is kept, and its median, from the values that models gave it."""
    said = [value for value in values if not math.isnan(value)]
    if not said:
        return True, math.nan
    median = statistics.median(said)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if min_votes is None:
        return low <= median <= high, median
    return sum(low <= value <= high for value in said) >= min_votes, median


# Whole numbers meet the bounds often, and their medians are exact.
VALUES = st.one_of(st.just(math.nan), st.integers(0, 6).map(float), st.just(math.inf))
BOUNDS = st.one_of(st.none(), st.integers(0, 6).map(float))


@st.composite
def elections(draw):
    num_models, num_rows = draw(st.integers(1, 5)), draw(st.integers(0, 8))
    rows = draw(
        st.lists(st.lists(VALUES, min_size=num_models, max_size=num_models), min_size=num_rows, max_size=num_rows)
    )
    min_votes = draw(st.one_of(st.none(), st.integers(1, num_models)))
    return rows, num_models, draw(BOUNDS), draw(BOUNDS), min_votes


@given(elections())
@settings(max_examples=300, deadline=None)
def test_votes_are_counted_as_by_hand(election):
    rows, num_models, low, high, min_votes = election
    values_MN = np.array(rows, dtype=np.float64).reshape(len(rows), num_models).T
    keep_N, value_N = vote(values_MN, low, high, min_votes=min_votes)
    assert keep_N.dtype == bool
    expected = [by_hand(row, low, high, min_votes) for row in rows]
    assert keep_N.tolist() == [keep for keep, _ in expected]
    np.testing.assert_array_equal(value_N, [median for _, median in expected])


def test_one_model_decides_alone_by_either_rule():
    values_MN = np.array([[0.1, 0.5, 0.95, np.nan]], dtype=np.float32)
    for min_votes in (None, 1):
        keep_N, value_N = vote(values_MN, 0.2, 0.9, min_votes=min_votes)
        assert keep_N.tolist() == [False, True, False, True]
        np.testing.assert_array_equal(value_N, values_MN[0])


def test_a_model_without_a_value_is_no_vote_for_a_row():
    values_MN = np.array([[0.5], [0.6], [np.nan]])
    assert vote(values_MN, 0.2, 0.9, min_votes=2)[0].tolist() == [True]
    assert vote(values_MN, 0.2, 0.9, min_votes=3)[0].tolist() == [False]


def test_the_values_that_were_voted_on_are_not_changed():
    values_MN = np.array([[3.0, np.nan], [1.0, np.nan]])
    before = values_MN.copy()
    vote(values_MN, 0, 1)
    np.testing.assert_array_equal(values_MN, before)


@pytest.mark.parametrize("min_votes", [0, 3, -1])
def test_votes_that_cannot_be_had_are_refused(min_votes):
    message = (
        rf"^min_votes must be from 1 to the number of models, which is 2, got {min_votes}; ask for fewer votes or name "
        r"more models$"
    )
    with pytest.raises(ValueError, match=message):
        vote(np.zeros((2, 4)), 0, 1, min_votes=min_votes)


def test_nobody_cannot_vote():
    with pytest.raises(ValueError, match=r"^a vote needs at least one model, got none$"):
        vote(np.zeros((0, 4)), 0, 1)

"""Quantiles from counts: equal to NumPy's on the concatenation, however the values are split."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.filters.quantiles import (
    bins_of_quantiles,
    count_lower,
    count_upper,
    exact_quantiles,
    quantiles_from_counts,
)

FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 3.4028234663852886e38]),
    st.integers(-3, 3).map(float),
)
PROBABILITIES = st.lists(st.floats(0, 1), max_size=5).map(lambda drawn: [0.0, 0.25, 0.5, 1.0, *drawn])


def floats(values):
    return np.array(values, np.float32)


@st.composite
def splits(draw, elements=FLOATS):
    """Values, and the same values cut into shards, empty ones too."""
    values = floats(draw(st.lists(elements, min_size=1, max_size=40)))
    cuts = sorted(draw(st.lists(st.integers(0, len(values)), max_size=4)))
    return values, np.split(values, cuts)


@given(splits(), PROBABILITIES)
@settings(deadline=None, max_examples=60)
def test_quantiles_equal_numpy_on_the_concatenation(split, probabilities):
    values, shards = split
    quantiles = exact_quantiles(lambda: shards, probabilities)
    assert quantiles.dtype == np.float64
    np.testing.assert_array_equal(quantiles, np.quantile(values.astype(np.float64), probabilities))


@given(splits(st.one_of(FLOATS, st.sampled_from([np.inf, -np.inf, np.nan]))), PROBABILITIES)
@settings(deadline=None, max_examples=60)
def test_infinities_and_nan(split, probabilities):
    """The definition on the sorted values: a rank that is whole takes its value, others lie between two."""
    values, shards = split
    ordered = sorted(float(value) for value in values if not np.isnan(value))
    expected = []
    for probability in probabilities:
        position = probability * (len(ordered) - 1)
        if not ordered:
            expected.append(np.nan)
            continue
        rank = int(position)
        low, high = ordered[rank], ordered[min(rank + 1, len(ordered) - 1)]
        if position == rank or low == high:
            expected.append(low)
        else:
            expected.append(
                float(np.quantile([low, high], position - rank)) if np.isfinite([low, high]).all() else low + high
            )
    np.testing.assert_array_equal(exact_quantiles(lambda: shards, probabilities), expected)


def test_a_large_column_in_many_shards():
    rng = np.random.default_rng(0)
    values = floats(np.concatenate([rng.lognormal(3, 2, 50_000), -rng.exponential(1e-6, 9_999), np.full(5000, 0.5)]))
    rng.shuffle(values)
    probabilities = [0, 0.001, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.99, 1]
    expected = np.quantile(values.astype(np.float64), probabilities)
    for num_shards in (1, 7, 100):
        shards = np.array_split(values, num_shards)
        np.testing.assert_array_equal(exact_quantiles(lambda shards=shards: iter(shards), probabilities), expected)


def test_counts_of_shards_add_up_to_the_counts_of_all():
    """The reduction as separate machines would do it: each counts twice, and only sums travel."""
    rng = np.random.default_rng(1)
    shards = [floats(rng.normal(size=size)) for size in (300, 0, 41)]
    probabilities = [0.1, 0.5, 0.9]
    upper = sum(count_upper(shard) for shard in shards)
    bins = bins_of_quantiles(upper, probabilities)
    lower = sum(count_lower(shard, bins) for shard in shards)
    assert upper.sum() == 341
    assert upper.dtype == lower.dtype == np.int64
    # Each of the six ranks lies in a bin, and a bin's lower counts add up to its upper count.
    assert lower.sum(axis=1).tolist() == upper[bins].tolist()
    expected = np.quantile(np.concatenate(shards).astype(np.float64), probabilities)
    np.testing.assert_array_equal(quantiles_from_counts(upper, bins, lower, probabilities), expected)


def test_counts_are_in_the_order_of_values():
    ordered = floats([-np.inf, -3e38, -1.5, -1e-40, 0.0, 2.0**-149, 1.5, 3e38, np.inf])
    bins = [int(count_upper(ordered[i : i + 1]).argmax()) for i in range(len(ordered))]
    assert bins == sorted(bins)
    assert len(set(bins)) == len(bins) - 1  # only 0 and the smallest number share their upper bits
    np.testing.assert_array_equal(count_upper(floats([-0.0])), count_upper(floats([0.0])))


def test_no_values_give_nan_and_no_probabilities_give_nothing():
    assert np.isnan(exact_quantiles(lambda: [floats([np.nan])], [0.0, 0.5])).tolist() == [True, True]
    assert np.isnan(exact_quantiles(list, [0.5])).all()
    assert exact_quantiles(lambda: [floats([1])], []).shape == (0,)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^probabilities must be in \[0, 1\], got \[0.5, 1.5\]$"):
        exact_quantiles(lambda: [floats([1])], [0.5, 1.5])
    with pytest.raises(ValueError, match=r"^probabilities must be in \[0, 1\], got \[nan\]$"):
        exact_quantiles(lambda: [floats([1])], [float("nan")])
    with pytest.raises(ValueError, match=r"^values must be float32, got float64$"):
        exact_quantiles(lambda: [np.ones(2)], [0.5])

"""Several seeds in one summary: intervals that cover a known truth, figures by hand, Kendall against scipy."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from doremi_mix.uncertainty import WeightSummary, mean_intervals, rank_stability, summarize_seeds

# A few large domains, a tail, and two domains that live at the floor.
CENTERS = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.038, 0.001, 0.001])


def logistic_normal(rng, deviation, shape, smoothing=1e-3):
    """Weights as group DRO gives them: a softmax of noisy scores, and a floor of smoothing / K."""
    scores = np.log(CENTERS) + deviation * rng.standard_normal((*shape, len(CENTERS)))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (1 - smoothing) * weights + smoothing / len(CENTERS)


@st.composite
def several_seeds(draw, least_seeds=2):
    num_domains = draw(st.integers(1, 8))
    row = st.lists(st.floats(0.0, 1.0), min_size=num_domains, max_size=num_domains).filter(lambda raw: sum(raw) > 1e-3)
    weights = np.array(draw(st.lists(row, min_size=least_seeds, max_size=5)))
    return weights / weights.sum(1, keepdims=True)


def named(weights):
    return [f"domain {i}" for i in range(np.shape(weights)[-1])]


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("deviation", [0.1, 0.3])
def test_the_interval_covers_the_truth(num_seeds, deviation):
    rng = np.random.default_rng(0)
    truth_K = logistic_normal(rng, deviation, (200_000,)).mean(0)
    low, high = mean_intervals(logistic_normal(rng, deviation, (8_000, num_seeds)))
    coverage_K = ((low <= truth_K) & (truth_K <= high)).mean(0)
    assert 0.92 <= coverage_K.min() <= coverage_K.max() <= 0.99, coverage_K
    assert coverage_K.mean() == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_on_skewed_weights_it_covers_more_often_than_the_plain_interval(num_seeds):
    """Why the scale of log-odds: seeds that differ by a factor of 2 seldom show the long tail."""
    rng = np.random.default_rng(0)
    truth_K = logistic_normal(rng, 0.6, (200_000,)).mean(0)
    weights = logistic_normal(rng, 0.6, (8_000, num_seeds))
    low, high = mean_intervals(weights)
    half_width = stats.t.ppf(0.975, num_seeds - 1) * weights.std(1, ddof=1) / np.sqrt(num_seeds)
    coverage = ((low <= truth_K) & (truth_K <= high)).mean()
    plain_coverage = (np.abs(weights.mean(1) - truth_K) <= half_width).mean()
    assert plain_coverage + 0.01 < coverage < 0.95


def test_the_summary_by_hand():
    # Mean 0.6, standard deviation 0.1; t with 2 degrees of freedom is 4.302653, so the half width in log-odds is
    # 4.302653 * 0.1 / sqrt(3) / (0.6 * 0.4) = 1.035057 about ln(0.6 / 0.4) = 0.405465.
    summary = summarize_seeds(["a", "b"], [[0.5, 0.5], [0.6, 0.4], [0.7, 0.3]])
    assert summary.mean == pytest.approx({"a": 0.6, "b": 0.4})
    assert summary.standard_deviation == pytest.approx({"a": 0.1, "b": 0.1})
    low, high = (1 / (1 + np.exp(-(0.405465 + sign * 1.035057))) for sign in (-1, 1))
    assert summary.intervals["a"] == pytest.approx((low, high), abs=1e-6)
    assert summary.intervals["b"] == pytest.approx((1 - high, 1 - low), abs=1e-6)
    # The first seed gives both domains one weight and ranks nothing.
    assert (summary.rank_stability, summary.num_seeds) == (None, 3)


def test_the_interval_is_of_the_mean_and_narrows_with_seeds():
    rng = np.random.default_rng(0)
    widths = []
    for num_seeds in (3, 12, 48):
        low, high = mean_intervals(logistic_normal(rng, 0.1, (200, num_seeds)))
        widths.append((high - low).mean() / stats.t.ppf(0.975, num_seeds - 1))
    # The standard error falls as one over the square root; the standard deviation's bias is small.
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.15)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.1)


def test_for_small_noise_it_is_the_plain_interval():
    weights = np.array([[0.3, 0.7], [0.3001, 0.6999], [0.2999, 0.7001]])
    half_width = stats.t.ppf(0.975, 2) * 0.0001 / np.sqrt(3)
    low, high = mean_intervals(weights)
    np.testing.assert_allclose(low, [0.3 - half_width, 0.7 - half_width], atol=1e-7)
    np.testing.assert_allclose(high, [0.3 + half_width, 0.7 + half_width], atol=1e-7)


@given(several_seeds())
@settings(deadline=None)
def test_a_summary_is_sound(weights):
    summary = summarize_seeds(named(weights), weights)
    assert abs(sum(summary.mean.values()) - 1) < 1e-9
    for name, (low, high) in summary.intervals.items():
        assert 0 <= low <= summary.mean[name] + 1e-15
        assert summary.mean[name] - 1e-15 <= high <= 1
    assert summary.rank_stability is None or -1 - 1e-12 <= summary.rank_stability <= 1 + 1e-12
    assert tuple(summary.mean) == tuple(summary.intervals) == tuple(summary.standard_deviation)


@given(several_seeds())
@settings(deadline=None)
def test_the_order_of_the_seeds_does_not_matter(weights):
    forward, backward = (summarize_seeds(named(weights), rows) for rows in (weights, weights[::-1]))
    assert forward.mean == pytest.approx(backward.mean)
    # Where seeds agree on 0 or 1 up to rounding, the bounds are rounding too.
    for name, interval in forward.intervals.items():
        assert interval == pytest.approx(backward.intervals[name], abs=1e-9)
    assert forward.rank_stability == pytest.approx(backward.rank_stability)


@pytest.mark.parametrize("weights", [[[1.0, 0.0], [1.0, 0.0]], [[1.0], [1.0], [1.0]], [[0.25, 0.75], [0.25, 0.75]]])
def test_seeds_that_agree_give_a_point(weights):
    summary = summarize_seeds(named(weights), weights)
    assert list(summary.intervals.values()) == [(mean, mean) for mean in summary.mean.values()]
    assert set(summary.standard_deviation.values()) == {0.0}


def test_two_seeds_as_far_apart_as_can_be_do_not_overflow():
    low, high = mean_intervals([[1.0, 0.0], [0.0, 1.0]])
    assert (low > 0).all()
    assert (high < 1).all()
    assert (high - low > 0.999).all()


def test_one_seed_has_a_mean_and_no_more():
    assert summarize_seeds(["a", "b"], [[0.25, 0.75]]) == WeightSummary({"a": 0.25, "b": 0.75}, {}, {}, None, 1)
    with pytest.raises(
        ValueError, match=r"^weights must have shape \[\.\.\., R, K\] with at least two seeds, got \[1, 2"
    ):
        mean_intervals([[0.25, 0.75]])


def tau_b(first, second):
    """Kendall's tau-b, counted pair by pair."""
    concordance, untied_first, untied_second = 0, 0, 0
    for i, j in combinations(range(len(first)), 2):
        a, b = np.sign(first[i] - first[j]), np.sign(second[i] - second[j])
        concordance += a * b
        untied_first += a != 0
        untied_second += b != 0
    return concordance / np.sqrt(untied_first * untied_second)


def test_rank_stability_is_the_mean_of_kendall_tau_b_over_pairs():
    rng = np.random.default_rng(0)
    weights = rng.multinomial(20, np.full(7, 1 / 7), size=4) / 20  # with ties
    pairs = list(combinations(weights, 2))
    assert rank_stability(weights) == pytest.approx(np.mean([tau_b(*pair) for pair in pairs]))
    assert rank_stability(weights) == pytest.approx(np.mean([stats.kendalltau(*pair).statistic for pair in pairs]))


def test_rank_stability_by_hand():
    up, down = [0.1, 0.2, 0.7], [0.7, 0.2, 0.1]
    assert rank_stability([up, up]) == pytest.approx(1)
    assert rank_stability([up, down]) == pytest.approx(-1)
    assert rank_stability([up, up, down]) == pytest.approx((1 - 1 - 1) / 3)
    # Two of three pairs agree and one is tied on one side: 2 / sqrt(3 * 2).
    assert rank_stability([up, [0.2, 0.2, 0.6]]) == pytest.approx(2 / np.sqrt(6))


@pytest.mark.parametrize(
    "weights", [[[0.2, 0.8]], [[1.0], [1.0]], [[1 / 3] * 3, [0.2, 0.3, 0.5]], [[0.1 + 0.2, 0.3, 0.4 - 1e-16 - 0.1]] * 2]
)
def test_a_seed_that_ranks_nothing_leaves_no_rank_stability(weights):
    assert rank_stability(weights) is None


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["a", "b"], [[1.0]], "weights must have shape [R, 2], one column per domain, got [1, 1]"),
        (["a", "b"], [0.5, 0.5], "weights must have shape [R, 2], one column per domain, got [2]"),
        (["a", "b"], np.empty((0, 2)), "weights must have shape [R, 2], one column per domain, got [0, 2]"),
        (["a", "a"], [[0.5, 0.5]], "domain names must be unique, got ['a', 'a']"),
        (
            ["a", "b"],
            [[0.5, 0.5], [0.5, 0.6]],
            "the weights of seed number 2 must be finite, at least 0 and sum to 1, got [0.5, 0.6]",
        ),
        (
            ["a", "b"],
            [[1.5, -0.5]],
            "the weights of seed number 1 must be finite, at least 0 and sum to 1, got [1.5, -0.5]",
        ),
    ],
)
def test_what_is_no_set_of_weights_is_refused(names, weights, message):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the whole message is compared below)
        summarize_seeds(names, weights)
    assert str(refusal.value) == message


def test_a_summary_whose_mean_is_no_distribution_is_refused():
    with pytest.raises(ValueError, match=r"^mean weights must sum to 1, got 0\.5$"):
        WeightSummary({"a": 0.5}, {}, {}, None, 1)

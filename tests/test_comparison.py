"""Comparing mixtures: intervals that cover, verdicts that do not cry wolf, sentences for a person."""

import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from doremi_mix import comparison
from doremi_mix.comparison import compare_mixtures
from doremi_mix.power import minimum_detectable_difference, seeds_needed

COUNTS_K = np.array([40, 30, 60, 25, 80])
DOMAINS = ("code", "math", "chat", "law", "web")


@pytest.fixture
def few_draws(monkeypatch):
    """The interval of a count is not what a simulation of averages looks at."""
    monkeypatch.setattr(comparison, "COUNT_DRAWS", 50)


def study(rng, shifts, num_seeds, *, seed_noise=0.01, domain_noise=0.02, example_noise=0.2, both_noise=0.0, ids=None):
    """Scores of one study: a mixture's loss on a sequence is the sequence's own, plus a shift, plus noise.

    Noise falls on the mixture's seed, on its seed and domain, on the mixture's sequence, and on all of these at once.
    """
    ids = np.repeat(np.arange(len(COUNTS_K)), COUNTS_K) if ids is None else ids
    num_domains, count = ids.max() + 1, len(ids)
    tokens = rng.integers(20, 200, count).astype(float)
    hardness = 2.5 + 0.3 * ids + rng.normal(0, 0.5, count)
    scores = {}
    for name, shift in shifts.items():
        loss = hardness + np.broadcast_to(shift, num_domains)[ids]
        loss = loss + rng.normal(0, seed_noise, (num_seeds, 1))
        loss += rng.normal(0, domain_noise, (num_seeds, num_domains))[:, ids]
        loss += rng.normal(0, example_noise, count) + rng.normal(0, both_noise, (num_seeds, count))
        scores[name] = np.stack([loss * tokens, np.broadcast_to(tokens, loss.shape)], axis=-1)
    return scores, ids


def exact(losses, num_sequences=4, jitter=0.0):
    """Scores whose average losses by seed are just these, on one domain; ``jitter`` moves sequences apart."""
    pattern = np.where(np.arange(num_sequences) % 2, 1.0, -1.0)
    scores = {}
    for place, (name, by_seed) in enumerate(losses.items()):
        sums = np.array(by_seed)[:, None] + pattern * jitter * place
        scores[name] = np.stack([sums, np.ones_like(sums)], axis=-1)
    return scores, np.zeros(num_sequences, dtype=np.int64)


def test_a_small_study_by_hand():
    tokens = np.array([1.0, 1.0, 1.0, 3.0])
    sums = {"natural": [[2, 4, 2, 6], [2, 4, 2, 6]], "learned": [[1, 4, 2, 6], [2, 1, 1, 6]]}
    scores = {
        name: np.stack([np.array(rows, float), np.broadcast_to(tokens, (2, 4))], -1) for name, rows in sums.items()
    }
    result = compare_mixtures(scores, np.array([0, 0, 1, 1]), ["a", "b"])
    learned, natural = result.mixtures["learned"], result.mixtures["natural"]
    assert natural.domain_losses == {"a": 3.0, "b": 2.0}
    assert learned.domain_losses == {"a": 2.0, "b": 1.875}
    assert learned.average_loss_by_seed == (2.25, 1.625)
    assert learned.average_loss == 1.9375
    # The worst domain is a (2.5) under the first seed and b (1.75) under the second.
    assert (learned.worst_loss, learned.worst_domain) == (2.125, "a")
    pair = result.pair("learned", "natural")
    parts = np.array([0.09765625, 0.25 / 4, 0.03515625 / 4])  # seeds, examples of a, examples of b
    half = stats.t.ppf(0.975, parts.sum() ** 2 / (parts**2).sum()) * math.sqrt(parts.sum())
    assert pair.average.estimate == -0.5625
    assert pair.average.standard_error == pytest.approx(math.sqrt(parts.sum()))
    assert (pair.average.low, pair.average.high) == pytest.approx((-0.5625 - half, -0.5625 + half))
    assert pair.worst.estimate == -0.875
    assert pair.worst.standard_error == pytest.approx(math.sqrt(0.140625 + 0.0625 + 0.03515625))
    assert pair.domains["a"].estimate == -1.0
    assert pair.domains["a"].standard_error == pytest.approx(math.sqrt(0.25 + 0.25))
    assert (pair.num_better, pair.num_clearly_better, pair.num_clearly_worse, pair.num_domains) == (2, 0, 0, 2)
    assert pair.seed_deviation == pytest.approx(0.625 / math.sqrt(2))
    assert pair.interval_over == "seeds and examples"


def test_the_p_value_is_that_of_t_when_only_one_part_varies():
    scores, ids = exact({"natural": [2.0, 2.0, 2.0], "learned": [1.9, 1.8, 1.75]})
    adjusted = compare_mixtures(scores, ids, ["a"]).verdict.adjusted_p_values
    expected = stats.ttest_1samp([-0.1, -0.2, -0.25], 0).pvalue
    assert adjusted == {"natural": pytest.approx(expected, rel=1e-6)}


def test_holm_multiplies_by_what_is_left_and_never_falls():
    assert comparison._holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})


SHIFT_K = np.array([-0.05, -0.02, 0.0, -0.1, 0.05])


def coverage(num_seeds, num_studies=400, **noise):
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(num_studies):
        scores, ids = study(rng, {"natural": 0.0, "learned": SHIFT_K}, num_seeds, **noise)
        pair = compare_mixtures(scores, ids, DOMAINS).pair("learned", "natural")
        by_domain = [pair.domains[name] for name in DOMAINS]
        # The last domain is the worst of both mixtures by far.
        truths = [(pair.average, SHIFT_K.mean()), (pair.worst, SHIFT_K[-1])]
        hits.append(
            [interval.low <= truth <= interval.high for interval, truth in truths]
            + [np.mean([i.low <= truth <= i.high for i, truth in zip(by_domain, SHIFT_K, strict=True)])]
        )
    return np.mean(hits, axis=0)


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("num_seeds", [3, 4])
def test_intervals_cover_the_planted_difference(num_seeds):
    average, worst, domains = coverage(num_seeds)
    assert 0.92 <= average <= 0.98
    assert 0.92 <= worst <= 0.98
    assert 0.93 <= domains <= 0.97


@pytest.mark.usefixtures("few_draws")
def test_intervals_are_wide_rather_than_narrow_when_seeds_change_single_sequences():
    shares = coverage(3, seed_noise=0.0, domain_noise=0.0, example_noise=0.0, both_noise=0.4)
    assert (shares >= 0.95).all()


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize(("num_seeds", "seed_noise"), [(2, 0.05), (3, 0.05)])
def test_without_any_difference_the_verdict_rarely_claims_one(num_seeds, seed_noise):
    rng = np.random.default_rng(2)
    shifts = dict.fromkeys(("learned", "natural", "uniform", "temperature"), 0.0)
    claims = []
    for _ in range(200):
        scores, ids = study(rng, shifts, num_seeds, seed_noise=seed_noise)
        verdict = compare_mixtures(scores, ids, DOMAINS).verdict
        claims.append(verdict.kind != "no_reliable_gain")
    assert np.mean(claims) <= 0.07


@pytest.mark.usefixtures("few_draws")
def test_a_large_gain_is_found():
    rng = np.random.default_rng(3)
    shifts = {"learned": -0.15, "natural": 0.0, "uniform": 0.0, "temperature": 0.0}
    verdicts = []
    for _ in range(100):
        scores, ids = study(rng, shifts, 4)
        verdicts.append(compare_mixtures(scores, ids, DOMAINS).verdict)
    assert np.mean([verdict.kind == "better" and verdict.best == "learned" for verdict in verdicts]) >= 0.9


def test_the_count_of_better_domains_has_an_interval():
    rng = np.random.default_rng(4)
    scores, ids = study(rng, {"natural": 0.0, "learned": np.array([-1.0, -1.0, -1.0, 1.0, 0.0])}, 3)
    pair = compare_mixtures(scores, ids, DOMAINS).pair("learned", "natural")
    assert (pair.num_clearly_better, pair.num_clearly_worse) == (3, 1)
    assert pair.num_better_interval == (3, 4)
    assert compare_mixtures(scores, ids, DOMAINS).pair("learned", "natural") == pair


def test_the_interval_of_a_count_holds_the_count():
    # Twenty tiny gains: draws alone would say that about half of them are real.
    scores, ids = study(np.random.default_rng(5), {"natural": 0.0}, 3, ids=np.repeat(np.arange(20), 10))
    sums, tokens = scores["natural"][..., 0], scores["natural"][..., 1]
    noise = np.tile([1.0, -1.0], 100) * 50
    scores["learned"] = np.stack([sums + noise - 0.001 * tokens - noise.mean(), tokens], axis=-1)
    balanced = np.full_like(tokens, 100.0)
    scores = {name: np.stack([array[..., 0], balanced], axis=-1) for name, array in scores.items()}
    pair = compare_mixtures(scores, ids, [f"domain {k}" for k in range(20)]).pair("learned", "natural")
    assert pair.num_better == 20
    low, high = pair.num_better_interval
    assert low < 10
    assert high == 20


TAIL = ": average held-out loss in nats per token with 95 % intervals."
BETTER = {"natural": [2.0, 2.0, 2.0], "uniform": [2.1, 2.1, 2.1], "temperature": [2.2, 2.2, 2.2]}


@pytest.mark.parametrize(
    ("losses", "kind", "best", "sentence"),
    [
        (
            BETTER | {"learned": [1.5, 1.51, 1.49]},
            "better",
            "learned",
            "Over 3 seeds, learned is better than natural by 0.5000 (0.4752 to 0.5248), uniform by 0.6000 (0.5752 to "
            "0.6248) and temperature by 0.7000 (0.6752 to 0.7248)",
        ),
        (
            {"natural": [2.0, 2.0, 2.0], "learned": [1.5, 1.51, 1.49]},
            "better",
            "learned",
            "Over 3 seeds, learned is better than natural by 0.5000 (0.4752 to 0.5248)",
        ),
        (
            {"natural": [2.0, 2.0, 2.0], "uniform": [1.5, 1.5, 1.5], "learned": [1.49, 1.51, 1.47]},
            "better_than_some",
            "uniform",
            "Over 3 seeds, learned is better than natural by 0.5100 (0.4603 to 0.5597), with no reliable difference "
            "from uniform (-0.0100, -0.0597 to +0.0397)",
        ),
        (
            {"natural": [1.5, 1.5, 1.5], "uniform": [1.4, 1.5, 1.6], "learned": [1.48, 1.5, 1.46]},
            "no_reliable_gain",
            "natural",
            "Over 3 seeds, learned shows no reliable gain over natural (-0.0200, -0.0697 to +0.0297) or uniform "
            "(-0.0200, -0.2966 to +0.2566)",
        ),
        (
            {"natural": [1.5, 1.5, 1.5], "uniform": [1.4, 1.5, 1.6], "learned": [1.48, 1.47, 1.46]},
            "no_reliable_gain",
            "natural",
            "Over 3 seeds, learned shows no reliable gain over natural (-0.0300, -0.0548 to -0.0052, which may still "
            "be luck) or uniform (-0.0300, -0.3033 to +0.2433)",
        ),
        (
            BETTER | {"natural": [1.0, 1.0, 1.0], "temperature": [1.4, 1.5, 1.6], "learned": [1.5, 1.51, 1.49]},
            "worse",
            "natural",
            "Over 3 seeds, learned is worse than natural by 0.5000 (0.4752 to 0.5248), but better than uniform by "
            "0.6000 (0.5752 to 0.6248), with no reliable difference from temperature (+0.0000, -0.2617 to +0.2617)",
        ),
    ],
)
def test_the_verdict_is_one_sentence_for_a_person(losses, kind, best, sentence):
    scores, ids = exact(losses)
    verdict = compare_mixtures(scores, ids, ["a"]).verdict
    assert verdict.sentence == sentence + TAIL
    assert (verdict.kind, verdict.best) == (kind, best)


def test_one_seed_makes_no_claim():
    scores, ids = exact({"learned": [1.5], "natural": [2.0], "uniform": [2.1]}, jitter=0.01)
    result = compare_mixtures(scores, ids, ["a"])
    assert result.verdict.sentence == (
        "One seed cannot tell a gain from luck: learned differs by -0.5000 from natural and -0.6000 from uniform in "
        "average held-out loss (nats per token); run at least 3 seeds."
    )
    assert (result.verdict.kind, result.verdict.best, result.num_seeds) == ("one_seed", "natural", 1)
    pair = result.pair("learned", "natural")
    assert pair.interval_over == "examples"
    assert pair.average.low < -0.5 < pair.average.high < 0
    assert (pair.num_better, pair.num_clearly_better) == (1, 0)
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["verdict"]["adjusted_p_values"] == {"natural": None, "uniform": None}
    assert plain["pairs"][0]["seed_deviation"] is None
    assert plain["pairs"][0]["num_better_interval"] == [1, 1]
    assert plain["mixtures"]["learned"]["average_loss_by_seed"] == [1.5]


def test_the_best_is_the_plainest_that_nothing_reliably_beats():
    losses = {
        "mine": [1.0, 1.01, 0.99],
        "learned": [1.0, 1.02, 1.01],
        "uniform": [1.01, 1.01, 1.03],
        "natural": [2.0] * 3,
    }
    scores, ids = exact(losses)
    result = compare_mixtures(scores, ids, ["a"])
    assert result.mixtures["mine"].average_loss < result.mixtures["learned"].average_loss
    assert result.verdict.best == "uniform"
    losses["uniform"] = [1.5, 1.5, 1.5]
    scores, ids = exact(losses)
    assert compare_mixtures(scores, ids, ["a"]).verdict.best == "learned"
    losses["mine"] = [0.5, 0.52, 0.51]
    scores, ids = exact(losses)
    assert compare_mixtures(scores, ids, ["a"]).verdict.best == "mine"


def test_the_pairs_are_the_candidate_with_all_and_all_with_each_baseline():
    scores, ids = exact({name: [1.0, 1.1] for name in ("learned", "natural", "mine", "uniform")})
    result = compare_mixtures(scores, ids, ["a"])
    assert [(pair.mixture, pair.baseline) for pair in result.pairs] == [
        ("learned", "natural"),
        ("learned", "mine"),
        ("learned", "uniform"),
        ("mine", "natural"),
        ("uniform", "natural"),
        ("natural", "uniform"),
        ("mine", "uniform"),
    ]
    # Equal mixtures: a difference of 0 without error is no difference.
    assert result.pair("learned", "natural").average == comparison.Interval(0.0, 0.0, 0.0, 0.0)
    assert result.verdict.adjusted_p_values == {"natural": 1.0, "uniform": 1.0}
    with pytest.raises(KeyError, match="natural was not compared with mine"):
        result.pair("natural", "mine")
    other = compare_mixtures(scores, ids, ["a"], candidate="uniform")
    assert list(other.verdict.adjusted_p_values) == ["natural"]


def test_domains_with_one_sequence_or_none_are_told():
    rng = np.random.default_rng(6)
    ids = np.array([0] * 30 + [1] + [3] * 20)
    scores, _ = study(rng, {"natural": 0.0, "learned": -0.5}, 3, ids=ids)
    # Domain 3 has tokens in none of its sequences, domain 1 a second sequence without tokens.
    for name, array in scores.items():
        more = np.concatenate([array, np.zeros((3, 1, 2))], axis=1)
        more[:, 31:51] = 0.0
        scores[name] = more
    ids = np.append(ids, 1)
    result = compare_mixtures(scores, ids, ["a", "b", "c", "d"])
    assert result.domains_without_tokens == ("c", "d")
    assert result.domains_with_one_sequence == ("b",)
    pair = result.pair("learned", "natural")
    assert list(pair.domains) == list(result.mixtures["learned"].domain_losses) == ["a", "b"]
    assert math.isnan(pair.domains["b"].standard_error)
    assert pair.domains["b"].to_dict()["low"] is None
    assert math.isfinite(pair.average.standard_error)
    assert (pair.num_better, pair.num_clearly_better) == (2, 1)
    assert pair.num_better_interval == (1, 2)
    # The average's error: the seeds' of both domains, the examples' of the first one alone.
    losses = {name: array[..., 0] / np.where(array[..., 1], array[..., 1], 1) for name, array in scores.items()}
    tokens = scores["natural"][0, :30, 1]
    by_seed = {name: (value[:, :30] @ tokens / tokens.sum() + value[:, 30]) / 2 for name, value in losses.items()}
    difference = (losses["learned"] - losses["natural"]).mean(axis=0)[:30]
    residuals = tokens * (difference - difference @ tokens / tokens.sum()) / tokens.sum()
    variance = np.var(by_seed["learned"] - by_seed["natural"], ddof=1) / 3 + (residuals**2).sum() * 30 / 29 / 4
    assert pair.average.standard_error == pytest.approx(math.sqrt(variance))


def test_nothing_is_claimed_when_every_domain_has_one_sequence():
    scores, ids = exact({"natural": [2.0, 2.0], "learned": [1.0, 1.0]}, num_sequences=1)
    result = compare_mixtures(scores, ids, ["a"])
    assert result.verdict.kind == "no_reliable_gain"
    assert result.verdict.sentence == (
        "Over 2 seeds, learned shows no reliable gain over natural (-1.0000, no interval)" + TAIL
    )
    assert result.pair("learned", "natural").num_better_interval == (0, 1)


def test_what_does_not_fit_is_refused():
    good, ids = exact({"natural": [2.0, 2.0], "learned": [1.0, 1.0]})
    flat, short, tokens, infinite = (good | {"learned": good["learned"].copy()} for _ in range(4))
    flat["learned"] = flat["learned"][0]
    short["learned"] = short["learned"][:1]
    tokens["learned"][1, 2, 1] = 7
    infinite["learned"][0, 0, 0] = math.inf
    empty = {name: np.zeros_like(array) for name, array in good.items()}
    cases = [
        ({"natural": good["natural"]}, ids, "the candidate 'learned' is not among the mixtures ['natural']"),
        (
            {"learned": good["learned"]},
            ids,
            "none of the baselines ['natural', 'uniform', 'temperature'] is among the mixtures ['learned']",
        ),
        (flat, ids, "scores of 'learned' must have shape [seeds, sequences, 2], got [4, 2]"),
        (short, ids, "scores of 'learned' and 'natural' must have one shape, got [1, 4, 2] and [2, 4, 2]"),
        (tokens, ids, "tokens of 'learned' differ from those of 'natural': score the same sequences"),
        (infinite, ids, "scores of 'learned' must be finite"),
        (empty, ids, "numbers of tokens must be at least 0, and some above 0"),
        (good, ids[:3], "domain ids must have shape [4], got [3]"),
        (good, ids.astype(float), "domain ids must be integers, got float64"),
        (good, ids + 1, "domain ids must lie in 0 to 0, got 1 to 1"),
    ]
    for scores, domain_ids, message in cases:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            compare_mixtures(scores, domain_ids, ["a"])
    with pytest.raises(ValueError, match=r"^domain names must be unique, got \['a', 'a'\]$"):
        compare_mixtures(good, ids, ["a", "a"])


@pytest.mark.parametrize("num_seeds", [2, 3, 10])
@pytest.mark.parametrize("power", [0.8, 0.95])
def test_the_minimum_detectable_difference_is_detected_that_often(num_seeds, power):
    difference = minimum_detectable_difference(0.02, num_seeds, power)
    draws = np.random.default_rng(7).normal(difference, 0.02, (40_000, num_seeds))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(power, abs=0.01)


@pytest.mark.parametrize("difference", [0.05, -0.02, 0.003])
def test_the_seeds_needed_are_the_fewest(difference):
    seeds = seeds_needed(0.01, difference)
    assert minimum_detectable_difference(0.01, seeds) <= abs(difference)
    assert seeds == 2 or minimum_detectable_difference(0.01, seeds - 1) > abs(difference)


def test_plans_at_the_edge():
    assert minimum_detectable_difference(0.0, 3) == 0.0
    assert seeds_needed(0.0, 0.1) == 2
    # With so many seeds the normal test is as good: (1.960 + 0.842) ** 2 / 0.001 ** 2.
    assert seeds_needed(1.0, 0.001) == pytest.approx(7_848_880, abs=10)
    for call, message in [
        (lambda: minimum_detectable_difference(0.1, 1), "a difference over seeds needs at least 2 seeds, got 1"),
        (
            lambda: minimum_detectable_difference(-0.1, 3),
            "the deviation over seeds must be finite and at least 0, got -0.1",
        ),
        (lambda: minimum_detectable_difference(0.1, 3, 1.0), "the power must be at least 0.5 and below 1, got 1.0"),
        (lambda: seeds_needed(0.1, 0.0), "the difference must be finite and not 0, got 0.0"),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()

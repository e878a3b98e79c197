"""Weights by headroom: the arithmetic, the optimum that it claims, and slopes that it finds again."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from doremi_mix.dro import DomainSums
from doremi_mix.headroom import LATENESS, Headroom, init_headroom, step_headroom
from doremi_mix.uncertainty import mean_intervals


def sums_of(excess, tokens=None):
    """Sums of a batch in which each domain trails the reference by so many nats per token."""
    excess = torch.tensor(excess, dtype=torch.float64)
    tokens = torch.full_like(excess, 10.0) if tokens is None else torch.tensor(tokens, dtype=torch.float64)
    zero = torch.zeros_like(excess)
    return DomainSums(excess.clamp(min=0) * tokens, excess * tokens, zero, zero, tokens)


def run(batches, **settings):
    state = init_headroom(len(batches[0]))
    for excess in batches:
        state = step_headroom(state, sums_of(excess), **settings)
    return state


def test_weights_are_in_proportion_to_the_excess():
    weights = run([[0.3, 0.1, 0.0]], smoothing=0.0).weights_K
    assert weights.tolist() == pytest.approx([0.75, 0.25, 0.0], abs=1e-12)
    weights = run([[0.3, 0.1, 0.0]], smoothing=0.3).weights_K
    assert weights.tolist() == pytest.approx([0.625, 0.275, 0.1], abs=1e-12)
    weights = run([[0.3, 0.1, 0.0]], smoothing=0.0, power=2.0).weights_K
    assert weights.tolist() == pytest.approx([0.9, 0.1, 0.0], abs=1e-12)


def test_a_domain_ahead_of_the_reference_has_no_headroom():
    """Unlike the clipped excess of group DRO, to which noise around zero adds up."""
    rng = np.random.default_rng(0)
    batches = np.stack([rng.normal(0.2, 1, 400), rng.normal(0, 1, 400), rng.normal(-0.2, 1, 400)], axis=1)
    weights = run(batches.tolist(), smoothing=0.0).weights_K
    assert weights[2] == 0
    assert weights[0] > 0.5


def test_without_headroom_the_weights_are_uniform():
    assert run([[-1.0, -0.5, 0.0]]).weights_K.tolist() == pytest.approx([1 / 3] * 3)


def test_only_the_end_counts():
    """Half of the average comes from the last twelfth of the updates: what was learned early leaves no trace."""
    early, late = [0.5, 0.0], [0.1, 0.3]
    weights = run([early] * 300 + [late] * 100, smoothing=0.0).weights_K
    assert weights.tolist() == pytest.approx([0.25, 0.75], abs=0.1)
    num_updates = 500
    shares = []
    for t in range(1, num_updates + 1):
        share = (LATENESS + 1) / (LATENESS + t)
        shares = [s * (1 - share) for s in shares] + [share]
    assert sum(shares) == pytest.approx(1)
    assert sum(shares[-round(0.08 * num_updates) :]) == pytest.approx(0.5, abs=0.03)


def test_tokens_are_averaged_and_not_batches():
    state = init_headroom(2)
    for excess, tokens in (([0.9, 0.1], [1.0, 10.0]), ([0.1, 0.1], [9.0, 10.0])):
        state = step_headroom(state, sums_of(excess, tokens), smoothing=0.0)
    # The second update counts 9/10, the first 1/10: (.1 * .9 + .9 * .9) / (.1 * 1 + .9 * 9) = .9 / 8.2.
    first = (0.1 * 0.9 + 0.9 * 0.9) / (0.1 * 1 + 0.9 * 9)
    assert state.weights_K.tolist() == pytest.approx([first / (first + 0.1), 0.1 / (first + 0.1)])


def test_held_out_text_takes_the_place_of_what_is_known_by_heart():
    learner = Headroom(smoothing=0.0)
    state, _ = learner.step(learner.start(3), sums_of([0.3, 0.3, 1.5]))
    assert learner.corrected(state, {2: 0.2}).tolist() == pytest.approx([0.375, 0.375, 0.25])
    assert learner.corrected(state, {2: -0.2}).tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert torch.equal(learner.corrected(state, {}), learner.result(state))


@pytest.mark.parametrize("seed", range(10))
def test_the_slopes_are_the_best_weights(seed):
    """Where each loss is a - s ln(w n), no weights have a smaller average loss than those in proportion to s."""
    rng = np.random.default_rng(seed)
    slopes = rng.uniform(0.05, 1, 6)
    found = minimize(
        lambda w: -(slopes * np.log(w)).sum(),
        np.full(6, 1 / 6),
        bounds=[(1e-6, 1)] * 6,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    # A proxy with half of the reference's tokens trails it by s ln 2.
    weights = run([(slopes * math.log(2)).tolist()], smoothing=0.0).weights_K
    assert weights.tolist() == pytest.approx(found.x.tolist(), abs=2e-4)


def test_noisy_slopes_are_found_again():
    """Slopes of .1 to .6 under noise of half a nat in each batch, ten seeds: the ranking and the sizes come back."""
    slopes = np.linspace(0.1, 0.6, 6)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        batches = slopes * math.log(2) + rng.normal(0, 0.1, (200, 6))
        weights = run(batches.tolist(), smoothing=0.0).weights_K.numpy()
        assert weights == pytest.approx(slopes / slopes.sum(), abs=0.035), seed


def test_the_interval_over_seeds_covers_the_truth():
    """Three seeds each of 100 studies with known slopes: the 95 % intervals of the mean hold the true weights."""
    slopes = np.linspace(0.2, 0.6, 5)
    truth = slopes / slopes.sum()
    rng = np.random.default_rng(0)
    learned = []
    for _ in range(300):
        batches = torch.from_numpy(slopes * math.log(2) + rng.normal(0, 0.08, (60, 5)))
        state = init_headroom(5)
        for excess in batches:
            state = step_headroom(
                state, DomainSums(excess, excess, excess, excess, torch.ones_like(excess)), smoothing=0
            )
        learned.append(state.weights_K.numpy())
    low, high = mean_intervals(np.array(learned).reshape(100, 3, 5))
    covered = ((low <= truth) & (truth <= high)).mean()
    assert 0.91 <= covered <= 0.99


def test_the_learner_leaves_the_loss_as_plain_training_has_it():
    learner = Headroom(smoothing=0.5)
    state, loss_weights = learner.step(learner.start(2), sums_of([0.3, 0.1], [30.0, 10.0]))
    assert loss_weights.tolist() == pytest.approx([0.75, 0.25])
    assert learner.result(state).tolist() == pytest.approx([0.5 * 0.75 + 0.25, 0.5 * 0.25 + 0.25])
    again = learner.restore(state._asdict())
    assert again.num_updates == 1
    assert torch.equal(again.excess_K, state.excess_K)
    with pytest.raises(ValueError, match="there are no weights before the first update"):
        learner.result(learner.start(2))

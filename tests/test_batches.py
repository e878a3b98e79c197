"""Which sequences a step sees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.batches import Schedule, plan_domain_counts


@settings(max_examples=100, deadline=None)
@given(
    raw=st.lists(st.integers(0, 100), min_size=1, max_size=12).filter(any),
    batch_size=st.integers(1, 50),
    num_steps=st.integers(1, 60),
)
def test_running_totals_follow_the_weights(raw, batch_size, num_steps):
    weights_K = np.array(raw) / sum(raw)
    counts_SK = plan_domain_counts(weights_K, batch_size, num_steps)
    assert (counts_SK >= 0).all()
    assert (counts_SK.sum(1) == batch_size).all()
    assert (counts_SK[:, weights_K == 0] == 0).all()
    wanted_SK = weights_K * batch_size * np.arange(1, num_steps + 1)[:, None]
    assert np.abs(counts_SK.cumsum(0) - wanted_SK).max() < len(raw)
    # Every batch has its floor: with uniform weights and B >= K no domain is ever absent.
    assert (counts_SK >= np.floor(np.round(weights_K * batch_size, 9))).all()


@pytest.mark.parametrize(("num_domains", "batch_size"), [(20, 40), (20, 21), (20, 59), (3, 3), (7, 8)])
def test_uniform_batches_hold_every_domain(num_domains, batch_size):
    counts_SK = plan_domain_counts(np.full(num_domains, 1 / num_domains), batch_size, 200)
    assert counts_SK.min() >= 1
    assert np.ptp(counts_SK.sum(0)) <= 1


def schedule(seed=0, steps=30):
    ids = [np.arange(10), np.arange(10, 13), np.arange(13, 40)]
    return Schedule(ids, np.array([0.5, 0.3, 0.2]), 8, steps, seed)


def test_without_replacement_inside_an_epoch():
    plan = schedule()
    draws = np.concatenate([plan.batch(step) for step in range(30)])
    for low, high in ((0, 10), (10, 13), (13, 40)):
        drawn = [i for i in draws if low <= i < high]
        counts = np.bincount(np.array(drawn) - low, minlength=high - low)
        assert np.ptp(counts) <= 1


def test_a_step_is_a_pure_function():
    forward = [schedule().batch(step).tolist() for step in range(30)]
    plan = schedule()
    backward = [plan.batch(step).tolist() for step in reversed(range(30))][::-1]
    assert forward == backward
    assert forward != [schedule(seed=1).batch(step).tolist() for step in range(30)]
    # A longer run starts with the same steps.
    assert forward == [schedule(steps=50).batch(step).tolist() for step in range(30)]


def test_drawn_is_what_the_steps_draw():
    plan = schedule(steps=3)
    assert plan.drawn().tolist() == sorted({int(i) for step in range(3) for i in plan.batch(step)})


def test_epochs_count_passes_over_a_domain():
    assert schedule().epochs().tolist() == pytest.approx([12.0, 24.0, 48 / 27], abs=0.4)

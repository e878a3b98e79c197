"""Which sequences a step sees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.batches import EpochSchedule, Schedule, plan_domain_counts


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


# --- a fine-tune's epochs ---


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
    st.integers(1, 60),
    st.integers(1, 5),
    st.integers(0, 9),
    st.randoms(),
)
def test_epochs_are_permutations_laid_end_to_end(lengths, batch_size, num_epochs, seed, rng):
    lengths_S = np.array(lengths)
    plan = EpochSchedule(lengths_S, batch_size, num_epochs, seed)
    num_draws = len(lengths) * num_epochs
    if num_draws < batch_size:
        assert (plan.num_steps, plan.smallest_batch, plan.num_left_out) == (1, num_draws, 0)
    else:
        assert (plan.num_steps, plan.smallest_batch) == (num_draws // batch_size, batch_size)
        assert plan.num_left_out == num_draws % batch_size
    batches = [plan.batch(step).tolist() for step in range(plan.num_steps)]
    for step, batch in enumerate(batches):
        assert len(batch) == plan.smallest_batch
        assert [lengths[i] for i in batch] == sorted((lengths[i] for i in batch), reverse=True)
        assert plan.num_tokens(step) == sum(lengths[i] for i in batch)
    # However the batches cut the epochs, every sequence was drawn as often as any other, or once more.
    drawn = []
    for batch in batches:
        drawn += batch
        counts = np.bincount(drawn, minlength=len(lengths))
        assert np.ptp(counts) <= 1
    counts = np.bincount(drawn, minlength=len(lengths))
    if not plan.num_left_out:
        assert (counts == num_epochs).all()
    assert counts.max() <= num_epochs
    # A step is a pure function: a run that is resumed anywhere, or asks in any order, sees the same.
    steps = rng.sample(range(plan.num_steps), plan.num_steps)
    again = EpochSchedule(lengths_S, batch_size, num_epochs, seed)
    assert [again.batch(step).tolist() for step in steps] == [batches[step] for step in steps]


def test_each_epoch_is_a_fresh_permutation_in_the_order_drawn():
    # Of one length, so that a batch is in the order of the draw.
    plan = EpochSchedule(np.full(10, 5), 4, 3, seed=1)
    assert (plan.num_steps, plan.num_left_out) == (7, 2)
    draws = [i for step in range(7) for i in plan.batch(step).tolist()]
    epochs = [draws[:10], draws[10:20], draws[20:]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    assert len(set(epochs[2])) == 8
    whole = EpochSchedule(np.full(10, 5), 1, 3, seed=1)
    assert draws == [int(whole.batch(step)[0]) for step in range(28)]
    other = EpochSchedule(np.full(10, 5), 10, 1, seed=2)
    assert sorted(other.batch(0).tolist()) == list(range(10))
    assert other.batch(0).tolist() != epochs[0]
    # By length, and within one length as drawn.
    lengths = np.array([1, 2, 3, 2, 1, 2, 3, 2, 1, 2])
    by_length = EpochSchedule(lengths, 10, 1, seed=1).batch(0).tolist()
    assert by_length == sorted(epochs[0], key=lambda i: -lengths[i])


def test_the_contests_arithmetic():
    plan = EpochSchedule(np.full(7_705, 1_024), 256, 3, seed=42)
    assert (plan.num_steps, plan.smallest_batch, plan.num_left_out) == (90, 256, 75)
    assert sum(plan.num_tokens(step) for step in range(90)) == 90 * 256 * 1_024
    for step in (-1, 90):
        with pytest.raises(IndexError, match=rf"^steps must be from 0 to 89, got {step}$"):
            plan.batch(step)


def test_fewer_draws_than_a_batch_make_one_step_of_all():
    plan = EpochSchedule(np.array([3, 9, 5]), 256, 2, seed=0)
    assert (plan.num_steps, plan.smallest_batch, plan.num_left_out) == (1, 6, 0)
    assert plan.batch(0).tolist() == [1, 1, 2, 2, 0, 0]
    assert plan.num_tokens(0) == 34


def test_sorted_batches_leave_little_padding_in_equal_parts():
    lengths_S = np.random.default_rng(0).integers(10, 1_024, 4_000)
    plan = EpochSchedule(lengths_S, 256, 1, seed=0)
    parts = np.array_split(plan.batch(3), 32)
    widths = [int(lengths_S[part].max()) for part in parts]
    assert widths == sorted(widths, reverse=True)
    padded = sum(width * len(part) for width, part in zip(widths, parts, strict=True))
    assert plan.num_tokens(3) / padded > 0.95

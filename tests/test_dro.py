"""Algorithm 1 of DoReMi against a transcription in plain Python, published numbers and planted problems."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.dro import (
    GroupDROState,
    average_weights,
    domain_sums,
    init_group_dro,
    step_domain_weights,
    update_domain_weights,
    weighted_loss,
)


def algorithm_1(weights, proxy, reference, mask, domain_ids, step_size, smoothing):
    """One update, transcribed from the paper in plain Python: lists in, lists out."""
    num_domains = len(weights)
    excess = []
    for domain in range(num_domains):
        total, count = 0.0, 0
        for b in range(len(proxy)):
            for t in range(len(proxy[b])):
                if domain_ids[b] == domain and mask[b][t]:
                    total += max(proxy[b][t] - reference[b][t], 0.0)
                    count += 1
        excess.append(total / count if count else 0.0)
    largest = max(excess)
    raised = [w * math.exp(step_size * (e - largest)) for w, e in zip(weights, excess, strict=True)]
    total = math.fsum(raised)
    return [(1 - smoothing) * r / total + smoothing / num_domains for r in raised], excess


def one_token_per_domain(excess):
    """A batch whose excess losses are the given ones."""
    proxy = torch.tensor(excess, dtype=torch.float64)[:, None]
    return proxy, torch.zeros_like(proxy), torch.ones_like(proxy), torch.arange(len(excess))


def state_of(weights):
    return init_group_dro(len(weights), initial_weights_K=torch.tensor(weights, dtype=torch.float64))


def test_published_numbers_of_two_updates_and_their_average():
    proxy = torch.tensor([[0.5, 0.1], [-0.4, 0.2], [-0.3, -0.1]], dtype=torch.float64)
    batch = (proxy, torch.zeros_like(proxy), torch.ones_like(proxy), torch.arange(3))
    first, excess_K = update_domain_weights(init_group_dro(3), *batch)
    assert excess_K.tolist() == pytest.approx([0.3, 0.1, 0.0], abs=1e-12)
    assert first.weights_K.tolist() == pytest.approx([0.3906364728, 0.3198865166, 0.2894770106], abs=1e-9)
    second, _ = update_domain_weights(first, *batch)
    assert second.weights_K.tolist() == pytest.approx([0.4504504929, 0.3021128914, 0.2474366157], abs=1e-9)
    assert average_weights(second).tolist() == pytest.approx([0.4205434829, 0.3109997040, 0.2684568132], abs=1e-9)


def test_published_number_from_unequal_weights():
    state, _ = update_domain_weights(state_of([0.5, 0.3, 0.2]), *one_token_per_domain([0.2, 0.0, 0.1]))
    assert state.weights_K.tolist() == pytest.approx([0.5394086243, 0.2651478447, 0.1954435311], abs=1e-9)


def test_a_huge_excess_stays_finite_and_leaves_the_floor():
    state, _ = update_domain_weights(init_group_dro(4), *one_token_per_domain([1000.0, 0, 0, 0]))
    assert state.weights_K.tolist() == pytest.approx([0.99925, 2.5e-4, 2.5e-4, 2.5e-4], abs=1e-12)


def test_published_objective():
    loss_BT = torch.zeros(2, 10, dtype=torch.float64)
    mask_BT = torch.zeros(2, 10)
    loss_BT[0], mask_BT[0] = 3.0, 1
    loss_BT[1, :2], mask_BT[1, :2] = 2.5, 1
    weights_K = torch.tensor([0.7, 0.3], dtype=torch.float64)
    assert weighted_loss(loss_BT, mask_BT, torch.tensor([0, 1]), weights_K).item() == pytest.approx(2.85, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), num_domains=st.integers(1, 5), B=st.integers(1, 6), T=st.integers(1, 5))
def test_equals_the_transcription(data, num_domains, B, T):
    numbers = st.floats(0, 50, width=32)
    grid = lambda values: data.draw(st.lists(st.lists(values, min_size=T, max_size=T), min_size=B, max_size=B))  # noqa: E731
    proxy, reference, mask = grid(numbers), grid(numbers), grid(st.booleans())
    domain_ids = data.draw(st.lists(st.integers(0, num_domains - 1), min_size=B, max_size=B))
    raw = data.draw(st.lists(st.floats(0.01, 1), min_size=num_domains, max_size=num_domains))
    start = state_of(raw)
    step_size, smoothing = data.draw(st.floats(0.01, 3)), data.draw(st.floats(0, 1))
    state, excess_K = update_domain_weights(
        start,
        torch.tensor(proxy, dtype=torch.float64),
        torch.tensor(reference, dtype=torch.float64),
        torch.tensor(mask),
        torch.tensor(domain_ids),
        step_size=step_size,
        smoothing=smoothing,
    )
    weights, excess = algorithm_1(start.weights_K.tolist(), proxy, reference, mask, domain_ids, step_size, smoothing)
    assert excess_K.tolist() == pytest.approx(excess, abs=1e-9)
    assert state.weights_K.tolist() == pytest.approx(weights, abs=1e-9)
    assert state.weights_K.sum().item() == pytest.approx(1.0, abs=1e-12)


def test_a_constant_added_to_every_excess_changes_nothing():
    plain, _ = update_domain_weights(state_of([0.5, 0.3, 0.2]), *one_token_per_domain([0.2, 0.0, 0.1]))
    shifted, _ = update_domain_weights(state_of([0.5, 0.3, 0.2]), *one_token_per_domain([5.2, 5.0, 5.1]))
    assert torch.allclose(plain.weights_K, shifted.weights_K, atol=1e-12, rtol=0)


def test_zero_excess_only_shrinks_toward_uniform():
    state, _ = update_domain_weights(state_of([0.5, 0.3, 0.2]), *one_token_per_domain([0.0, 0.0, 0.0]))
    assert state.weights_K.tolist() == pytest.approx([0.999 * w + 0.001 / 3 for w in (0.5, 0.3, 0.2)], abs=1e-12)


def test_a_proxy_equal_to_its_reference_is_a_fixed_point():
    loss_BT = torch.rand(3, 4, dtype=torch.float64)
    state, excess_K = update_domain_weights(
        state_of([0.5, 0.3, 0.2]), loss_BT, loss_BT, torch.ones(3, 4), torch.arange(3), smoothing=0.0
    )
    assert excess_K.tolist() == [0, 0, 0]
    assert state.weights_K.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=1e-12)


def test_an_absent_domain_has_excess_zero():
    state, excess_K = update_domain_weights(
        init_group_dro(3), torch.ones(2, 1), torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([0, 2]), smoothing=0.0
    )
    assert excess_K.tolist() == [1, 0, 1]
    assert state.weights_K[1] < state.weights_K[0]


def test_clipped_tokens_count_in_the_denominator():
    proxy = torch.tensor([[1.0, -1.0, -1.0, -1.0]])
    _, excess_K = update_domain_weights(
        init_group_dro(1), proxy, torch.zeros(1, 4), torch.ones(1, 4), torch.tensor([0])
    )
    assert excess_K.tolist() == [0.25]


def test_nothing_under_the_mask_is_read():
    proxy = torch.tensor([[1.0, math.nan], [0.5, math.inf]])
    mask = torch.tensor([[1, 0], [1, 0]])
    state, excess_K = update_domain_weights(init_group_dro(2), proxy, torch.zeros(2, 2), mask, torch.tensor([0, 1]))
    assert excess_K.tolist() == [1.0, 0.5]
    assert torch.isfinite(state.weights_K).all()
    loss = weighted_loss(proxy.requires_grad_(), mask, torch.tensor([0, 1]), state.weights_K)
    loss.backward()
    assert proxy.grad is not None
    assert proxy.grad[:, 1].tolist() == [0.0, 0.0]


def test_the_state_goes_in_unmodified_and_carries_over():
    before = init_group_dro(3)
    after, _ = update_domain_weights(before, *one_token_per_domain([1.0, 0.0, 0.0]))
    assert before.weights_K.tolist() == [1 / 3] * 3
    assert before.num_updates == 0
    assert after.num_updates == 1
    twice, _ = update_domain_weights(after, *one_token_per_domain([1.0, 0.0, 0.0]))
    assert twice.weights_K[0] > after.weights_K[0]


def test_summing_micro_batches_equals_one_batch():
    torch.manual_seed(0)
    proxy, reference = torch.rand(6, 5, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64)
    mask, domain_ids = torch.rand(6, 5) < 0.7, torch.tensor([0, 1, 2, 0, 1, 2])
    whole = domain_sums(proxy, reference, mask, domain_ids, 3)
    halves = [domain_sums(proxy[h], reference[h], mask[h], domain_ids[h], 3) for h in (slice(0, 2), slice(2, 6))]
    joined = type(whole)(*(a + b for a, b in zip(*halves, strict=True)))
    state, _ = step_domain_weights(init_group_dro(3), joined)
    same, _ = update_domain_weights(init_group_dro(3), proxy, reference, mask, domain_ids)
    assert torch.allclose(state.weights_K, same.weights_K, atol=1e-14, rtol=0)
    parts = [
        weighted_loss(proxy[h], mask[h], domain_ids[h], state.weights_K, joined.num_tokens_K)
        for h in (slice(0, 2), slice(2, 6))
    ]
    assert sum(parts).item() == pytest.approx(weighted_loss(proxy, mask, domain_ids, state.weights_K).item(), abs=1e-12)


def test_no_gradient_flows_into_the_weights():
    weights_K = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
    loss_BT = torch.ones(2, 1, requires_grad=True)
    weighted_loss(loss_BT, torch.ones(2, 1), torch.tensor([0, 1]), weights_K).backward()
    assert weights_K.grad is None
    assert loss_BT.grad is not None
    assert loss_BT.grad.flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_loss_BT": torch.zeros(2, 2)}, r"one shape \[B, T\], got \[2, 1\], \[2, 2\] and \[2, 1\]"),
        ({"domain_ids_B": torch.tensor([0])}, r"domain ids must have shape \[2\], one per sequence, got \[1\]"),
        ({"domain_ids_B": torch.tensor([0, 2])}, r"domain ids must be in \[0, 2\), got \[0, 2\]"),
        ({"domain_ids_B": torch.tensor([-1, 0])}, r"domain ids must be in \[0, 2\), got \[-1, 0\]"),
        ({"proxy_loss_BT": torch.tensor([[math.nan], [1.0]])}, "an unmasked loss is not finite"),
        ({"smoothing": 1.5}, r"smoothing must be in \[0, 1\], got 1.5"),
        ({"step_size": 0.0}, "step_size must be positive, got 0.0"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "proxy_loss_BT": torch.ones(2, 1),
        "reference_loss_BT": torch.zeros(2, 1),
        "mask_BT": torch.ones(2, 1),
        "domain_ids_B": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        update_domain_weights(init_group_dro(2), **{**arguments, **change})


def test_average_needs_an_update():
    with pytest.raises(ValueError, match="there is no average before the first update"):
        average_weights(init_group_dro(2))
    with pytest.raises(ValueError, match="num_domains must be at least 1, got 0"):
        init_group_dro(0)
    with pytest.raises(ValueError, match="initial weights must be positive and finite"):
        state_of([0.5, 0.0])


# Planted language model: vocabulary 16, three domains, a tabular softmax over (domain, previous token), zero init.
# easy = 98 % cycle, learnable = 60 % fixed permutation + 40 % uniform, noise = uniform.  S seeds run side by side.
VOCAB, DOMAINS, BATCH, STEPS = 16, 3, 48, 400
DOMAIN_IDS = np.repeat(np.arange(DOMAINS), BATCH // DOMAINS)


def run_planted(num_seeds, step_size):
    rng = np.random.default_rng(0)
    seed_S1 = np.arange(num_seeds)[:, None]
    uniform = np.full((VOCAB, VOCAB), 1 / VOCAB)
    easy = 0.02 * uniform + 0.98 * np.eye(VOCAB)[(np.arange(VOCAB) + 1) % VOCAB]
    learnable = [0.4 * uniform + 0.6 * np.eye(VOCAB)[rng.permutation(VOCAB)] for _ in range(num_seeds)]
    cumulative = np.stack([[easy, one, uniform] for one in learnable]).cumsum(-1)

    def draw():
        """Previous and next token, [S, B], a third of the batch from each domain."""
        previous = rng.integers(VOCAB, size=(num_seeds, BATCH))
        following = (rng.random((num_seeds, BATCH, 1)) > cumulative[seed_S1, DOMAIN_IDS, previous]).sum(-1)
        return previous, following.clip(max=VOCAB - 1)

    def log_probabilities(table, previous):
        logits = table[seed_S1, DOMAIN_IDS, previous]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def losses(table, previous, following):
        return -np.take_along_axis(log_probabilities(table, previous), following[..., None], -1)

    def descend(table, weights_SB, previous, following):
        """SGD with learning rate .5 on the weighted sum of losses; softmax minus onehot is the gradient."""
        gradient = np.exp(log_probabilities(table, previous))
        gradient[seed_S1, np.arange(BATCH), following] -= 1
        np.add.at(table, (seed_S1, DOMAIN_IDS, previous), -0.5 * weights_SB[..., None] * gradient)

    reference = np.zeros((num_seeds, DOMAINS, VOCAB, VOCAB))
    for _ in range(STEPS):
        descend(reference, np.ones((num_seeds, BATCH)), *draw())
    proxy = np.zeros_like(reference)
    states = [init_group_dro(DOMAINS)] * num_seeds
    mask, domain_ids = torch.ones(BATCH, 1), torch.from_numpy(DOMAIN_IDS)
    for _ in range(STEPS):
        batch = draw()
        proxy_SB1, reference_SB1 = (torch.from_numpy(losses(table, *batch)) for table in (proxy, reference))
        states = [
            update_domain_weights(state, proxy_SB1[s], reference_SB1[s], mask, domain_ids, step_size=step_size)[0]
            for s, state in enumerate(states)
        ]
        # weighted_loss gives a token alpha over its domain's tokens; K times that is 1 at uniform weights.
        weights_SK = np.stack([state.weights_K.numpy() for state in states])
        descend(proxy, DOMAINS * weights_SK[:, DOMAIN_IDS], *batch)
    return torch.stack([average_weights(state) for state in states])


def test_planted_language_model_finds_the_learnable_domain_30_of_30_seeds():
    results = run_planted(30, step_size=1.0)
    assert results.argmax(1).tolist() == [1] * 30
    assert results.argmin(1).tolist() == [2] * 30
    # The published figures: easy .019, learnable .979 +- .002, noise .002.
    assert results.mean(0).tolist() == pytest.approx([0.019, 0.979, 0.002], abs=0.002)


def test_planted_language_model_with_a_tiny_step_size_puts_noise_on_top():
    """E[max(x, 0)] > 0 for zero-mean noise: the known failure, kept visible."""
    assert run_planted(5, step_size=0.01).argmax(1).tolist() == [2] * 5


def test_state_is_plain_values():
    state = init_group_dro(2)
    assert isinstance(state, GroupDROState)
    assert state._fields == ("weights_K", "weight_sum_K", "num_updates")
    assert state.weights_K.dtype == torch.float64

"""Shrinkage and caps: every closed form against a solver, and the properties that make it safe to train with."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from doremi_mix.mixture import allocate
from doremi_mix.shrinkage import cap_weights, max_weights, project_onto_caps, shrink_by_evidence, shrink_weights

KINDS = ("linear", "kl")
UNIFORM_2 = torch.tensor([0.5, 0.5])


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def divergence(q, p):
    """KL(q || p) of positive vectors that need not sum to 1."""
    return float(np.sum(q * np.log(q / p) - q + p))


def solve_on_simplex(objective, gradient, num_domains, upper=None):
    """The minimizer on the simplex under upper bounds, by SLSQP from a feasible start."""
    upper = np.ones(num_domains) if upper is None else upper
    start = upper / upper.sum()
    result = minimize(
        lambda q: objective(np.clip(q, 1e-12, None)),
        start,
        jac=lambda q: gradient(np.clip(q, 1e-12, None)),
        bounds=[(1e-12, cap) for cap in upper],
        constraints={"type": "eq", "fun": lambda q: q.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert abs(result.x.sum() - 1) < 1e-9
    return result.x


@st.composite
def distributions(draw, num_domains, zeros=True):
    smallest = [st.just(0.0), st.floats(1e-12, 1e-9)] if zeros else []
    raw = draw(
        st.lists(st.one_of(*smallest, st.floats(1e-3, 1.0)), min_size=num_domains, max_size=num_domains).filter(
            lambda weights: sum(weights) > 1e-3
        )
    )
    return tensor(raw) / math.fsum(raw)


@st.composite
def pairs(draw, zeros=False):
    num_domains = draw(st.integers(1, 12))
    return draw(distributions(num_domains, zeros)), draw(distributions(num_domains, zeros))


@st.composite
def cap_problems(draw):
    """Weights, and caps that let them sum to 1."""
    num_domains = draw(st.integers(1, 12))
    weights_K = draw(distributions(num_domains))
    raw = tensor(draw(st.lists(st.floats(0.0, 1.0), min_size=num_domains, max_size=num_domains)))
    # Whatever the caps lack, one domain that has a weight may take.
    caps_K = raw.clone()
    caps_K[int(weights_K.argmax())] += max(0.0, 1.0 - float(raw[weights_K > 0].sum()))
    return weights_K, caps_K


# --- shrink_weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", KINDS)
def test_shrinkage_is_what_a_solver_finds(kind, seed):
    rng = np.random.default_rng(seed)
    num_domains = int(rng.integers(2, 7))
    w, t = rng.dirichlet(np.ones(num_domains), size=2) * 0.95 + 0.05 / num_domains
    s = float(rng.uniform(0.05, 0.95))
    if kind == "linear":
        solved = solve_on_simplex(
            lambda q: (1 - s) * np.sum((q - w) ** 2) + s * np.sum((q - t) ** 2),
            lambda q: 2 * (1 - s) * (q - w) + 2 * s * (q - t),
            num_domains,
        )
    else:
        solved = solve_on_simplex(
            lambda q: (1 - s) * divergence(q, w) + s * divergence(q, t),
            lambda q: (1 - s) * np.log(q / w) + s * np.log(q / t),
            num_domains,
        )
    shrunk = shrink_weights(tensor(w), tensor(t), s, kind=kind).numpy()
    np.testing.assert_allclose(shrunk, solved, atol=2e-6)


@given(pairs(), st.floats(0.0, 1.0), st.sampled_from(KINDS))
@settings(deadline=None)
def test_shrunk_weights_stay_on_the_simplex(pair, strength, kind):
    q_K = shrink_weights(*pair, strength, kind=kind)
    assert q_K.dtype == torch.float64
    assert (q_K >= 0).all()
    assert abs(q_K.sum().item() - 1) < 1e-12


@given(pairs(zeros=True), st.sampled_from(KINDS), st.booleans())
@settings(deadline=None)
def test_strength_0_keeps_the_weights_and_1_gives_the_target_zeros_included(pair, kind, as_tensor):
    weights_K, target_K = pair
    zero, one = (tensor(0.0), tensor(1.0)) if as_tensor else (0.0, 1.0)
    torch.testing.assert_close(shrink_weights(weights_K, target_K, zero, kind=kind), weights_K, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(shrink_weights(weights_K, target_K, one, kind=kind), target_K, rtol=1e-12, atol=1e-15)


@given(pairs(), st.sampled_from(KINDS))
@settings(deadline=None)
def test_a_target_that_is_the_weights_changes_nothing(pair, kind):
    weights_K, _ = pair
    torch.testing.assert_close(shrink_weights(weights_K, weights_K, 0.3, kind=kind), weights_K)


@given(pairs(), st.sampled_from(KINDS))
@settings(deadline=None)
def test_more_strength_is_nearer_to_the_target(pair, kind):
    weights_K, target_K = pair
    path = [shrink_weights(weights_K, target_K, s / 10, kind=kind).numpy() for s in range(11)]
    target = target_K.numpy()
    distances = [np.abs(q - target).sum() if kind == "linear" else divergence(q, target) for q in path]
    assert all(after <= before + 1e-12 for before, after in pairwise(distances))


@given(pairs(), st.floats(0.0, 0.99), st.sampled_from(KINDS))
@settings(deadline=None)
def test_a_uniform_target_keeps_the_order(pair, strength, kind):
    weights_K, _ = pair
    uniform_K = torch.full_like(weights_K, 1 / len(weights_K))
    order = weights_K.argsort()
    assert (shrink_weights(weights_K, uniform_K, strength, kind=kind)[order].diff() >= -1e-15).all()


def test_kl_shrinkage_by_hand_with_zeros():
    # sqrt(0.8 * 0.2) = 0.4 and sqrt(0.2 * 0.2) = 0.2; the third domain has no weight, the fourth no target.
    q_K = shrink_weights(tensor([0.8, 0.2, 0.0, 0.0]), tensor([0.2, 0.2, 0.6, 0.0]), 0.5, kind="kl")
    torch.testing.assert_close(q_K, tensor([2 / 3, 1 / 3, 0.0, 0.0]))


def test_kl_shrinkage_without_a_common_domain_is_loud():
    assert shrink_weights(tensor([1.0, 0.0]), tensor([0.0, 1.0]), 0.5, kind="kl").isnan().all()


def test_kl_shrinkage_survives_tiny_weights():
    q_K = shrink_weights(tensor([1.0, 1e-300]), tensor([1e-300, 1.0]), 0.5, kind="kl")
    torch.testing.assert_close(q_K, tensor([0.5, 0.5]))


def test_shrinkage_refuses_what_it_can_see_without_reading_tensors():
    with pytest.raises(ValueError, match=r"^strength must be in \[0, 1\], got 1\.5$"):
        shrink_weights(UNIFORM_2, UNIFORM_2, 1.5)
    with pytest.raises(ValueError, match=r'^kind must be "linear" or "kl", got \'cubic\'$'):
        shrink_weights(UNIFORM_2, UNIFORM_2, 0.5, kind="cubic")
    with pytest.raises(ValueError, match=r"^weights and target must have one shape \[K\], got \[2\] and \[3\]$"):
        shrink_weights(UNIFORM_2, torch.ones(3) / 3, 0.5)


# --- caps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_the_projection_is_what_a_solver_finds(seed):
    rng = np.random.default_rng(seed)
    num_domains = int(rng.integers(2, 7))
    w = rng.dirichlet(np.ones(num_domains)) * 0.95 + 0.05 / num_domains
    caps = rng.uniform(0.05, 1.0, num_domains)
    caps *= max(1.0, 1.1 / caps.sum())
    caps = np.minimum(caps, 1.0)
    solved = solve_on_simplex(lambda q: divergence(q, w), lambda q: np.log(q / w), num_domains, caps)
    projected = project_onto_caps(tensor(w), tensor(caps)).numpy()
    np.testing.assert_allclose(projected, solved, atol=5e-6)
    assert divergence(np.clip(projected, 1e-300, None), w) <= divergence(solved, w) + 1e-9


@given(cap_problems())
@settings(max_examples=300, deadline=None)
def test_the_projection_is_a_distribution_under_the_caps(problem):
    weights_K, caps_K = problem
    q_K = project_onto_caps(weights_K, caps_K)
    assert (q_K >= 0).all()
    assert (q_K <= caps_K).all()
    assert (q_K[weights_K == 0] == 0).all()
    assert abs(q_K.sum().item() - 1) < 1e-12


@given(cap_problems())
@settings(max_examples=300, deadline=None)
def test_the_projection_meets_the_conditions_of_optimality(problem):
    # Below its cap, a domain has the largest ratio to its weight: min(s * w, cap) with one s.
    weights_K, caps_K = problem
    q_K = project_onto_caps(weights_K, caps_K)
    active_K = weights_K > 0
    ratio_K = q_K[active_K] / weights_K[active_K]
    assert ((ratio_K >= ratio_K.max() * (1 - 1e-12)) | (q_K == caps_K)[active_K]).all()


@given(cap_problems())
@settings(deadline=None)
def test_projecting_twice_is_projecting_once(problem):
    weights_K, caps_K = problem
    once_K = project_onto_caps(weights_K, caps_K)
    torch.testing.assert_close(project_onto_caps(once_K, caps_K), once_K, rtol=1e-9, atol=1e-12)


@given(cap_problems(), st.floats(1e-6, 1e6))
@settings(deadline=None)
def test_the_projection_does_not_depend_on_the_scale_of_the_weights(problem, scale):
    weights_K, caps_K = problem
    scaled_K = project_onto_caps(weights_K * scale, caps_K)
    torch.testing.assert_close(scaled_K, project_onto_caps(weights_K, caps_K), rtol=1e-9, atol=1e-12)


@given(st.integers(1, 12).flatmap(distributions), st.floats(0.0, 1.0))
@settings(deadline=None)
def test_one_cap_for_all_keeps_the_order(weights_K, extra):
    cap = 1 / int((weights_K > 0).sum()) + extra
    q_K = project_onto_caps(weights_K, torch.full_like(weights_K, cap))
    assert (q_K[weights_K.argsort()].diff() >= -1e-15).all()


@given(st.integers(1, 12).flatmap(distributions))
@settings(deadline=None)
def test_caps_that_do_not_bind_change_nothing(weights_K):
    torch.testing.assert_close(project_onto_caps(weights_K, torch.ones_like(weights_K)), weights_K, rtol=1e-12, atol=0)


def test_the_projection_agrees_with_the_exact_allocation():
    """``mixture.allocate`` works in fractions; with a budget of 1e15 its rounding is below 1e-14."""
    rng = np.random.default_rng(0)
    budget, max_epochs, num_capped = 10**15, 4.0, []
    for _ in range(100):
        num_domains = int(rng.integers(1, 30))
        raw = rng.dirichlet(np.full(num_domains, 0.5)) + 1e-9
        raw[rng.random(num_domains) < 0.1] = 0.0
        raw[0] = max(raw[0], 1e-3)
        weights_K = tensor(raw) / math.fsum(raw)
        available = [int(tokens) for tokens in rng.lognormal(-1, 2, num_domains) * budget / num_domains]
        available[0] = max(available[0], budget // 3)
        names = [f"domain {i}" for i in range(num_domains)]
        exact = allocate(
            dict(zip(names, weights_K.tolist(), strict=True)),
            dict(zip(names, available, strict=True)),
            budget,
            max_epochs,
        )
        num_capped.append(len(exact.capped))
        shares = [float(Fraction(tokens, budget)) for tokens in exact.tokens.values()]
        q_K = cap_weights(weights_K, max_weights(torch.tensor(available), budget, max_epochs))
        np.testing.assert_allclose(q_K.numpy(), shares, rtol=0, atol=1e-12)
    # The comparison would be hollow if caps never did anything, or always everything.
    assert num_capped.count(0) >= 5
    assert sum(number >= 3 for number in num_capped) >= 30


def test_the_projection_by_hand_at_its_corners():
    # Caps that sum to 1 exactly leave no choice; ten times 0.1 is a little less than 1.
    torch.testing.assert_close(cap_weights(torch.ones(10), torch.full((10,), 0.1).double()).sum(), tensor(1.0))
    torch.testing.assert_close(cap_weights(tensor([0.9, 0.1]), tensor([0.25, 0.75])), tensor([0.25, 0.75]))
    # A cap of 0, a cap without end, a weight of 0, and one below the smallest normal number.
    caps_K = tensor([0.0, math.inf, 1.0, 1.0])
    torch.testing.assert_close(cap_weights(tensor([0.5, 0.5, 0.0, 5e-324]), caps_K), tensor([0.0, 1.0, 0.0, 0.0]))
    assert project_onto_caps(tensor([1.0, 5e-324]), tensor([0.25, 1.0])).tolist() == [0.25, 0.0]
    # A tiny weight takes all that the caps of the others leave.
    torch.testing.assert_close(cap_weights(tensor([1.0, 1e-300]), tensor([0.25, 1.0])), tensor([0.25, 0.75]))
    torch.testing.assert_close(project_onto_caps(tensor([1.0]), tensor([1.0])), tensor([1.0]))


def test_max_weights_by_hand():
    assert max_weights(torch.tensor([0, 50, 900]), 1000, 2).tolist() == [0.0, 0.1, 1.0]
    with pytest.raises(ValueError, match=r"^budget and max_epochs must be above 0, got 0 and 4$"):
        max_weights(torch.tensor([1]), 0, 4)


def test_without_enough_room_the_inner_projection_stops_at_the_caps():
    assert project_onto_caps(tensor([0.5, 0.5, 0.0]), tensor([0.25, 0.5, 1.0])).tolist() == [0.25, 0.5, 0.0]


@pytest.mark.parametrize(
    ("weights", "caps", "message"),
    [
        ([0.5, 0.5, 0.0], [0.25, 0.5, 1.0], "caps of the domains with a weight sum to 0.75, expected at least 1; "),
        ([0.5, -0.5], [1.0, 1.0], "weights must be finite, at least 0 and not all 0, got [0.5, -0.5]"),
        ([0.0, 0.0], [1.0, 1.0], "weights must be finite, at least 0 and not all 0, got [0.0, 0.0]"),
        ([math.nan, 1.0], [1.0, 1.0], "weights must be finite, at least 0 and not all 0, got [nan, 1.0]"),
        ([0.5, 0.5], [math.nan, 1.0], "caps must be at least 0, got [nan, 1.0]"),
        ([0.5, 0.5], [1.0], "weights and caps must have one shape [K], got [2] and [1]"),
    ],
)
def test_the_checked_function_refuses(weights, caps, message):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the whole message is compared below)
        cap_weights(tensor(weights), tensor(caps))
    assert str(refusal.value).startswith(message)


# --- shrink_by_evidence ---------------------------------------------------------------------------------------------


def noisy_seeds(rng, truth, standard_deviation, num_seeds, num_trials):
    noise = rng.normal(0, standard_deviation, (num_trials, num_seeds, len(truth)))
    return torch.from_numpy(truth + noise - noise.mean(-1, keepdims=True))


@pytest.mark.parametrize("seed", range(5))
def test_the_strength_minimizes_the_expected_error_for_its_noise_and_signal(seed):
    rng = np.random.default_rng(seed)
    weights_RK, target_K = torch.from_numpy(rng.dirichlet(np.full(6, 5.0), 3)), torch.full((6,), 1 / 6).double()
    noise = np.var(weights_RK.numpy(), axis=0, ddof=1).mean() / 3
    signal = max(0.0, ((weights_RK.numpy().mean(0) - 1 / 6) ** 2).mean() - noise)
    best = minimize_scalar(lambda s: (1 - s) ** 2 * noise + s**2 * signal, bounds=(0, 1), method="bounded")
    q_K, strength = shrink_by_evidence(weights_RK, target_K)
    assert strength.item() == pytest.approx(best.x, abs=1e-4)
    torch.testing.assert_close(q_K, shrink_weights(weights_RK.mean(0), target_K, strength))


def test_seeds_that_agree_are_kept_and_seeds_that_scatter_about_the_target_are_not():
    target_K = tensor([0.25, 0.25, 0.5])
    agreed_K = tensor([0.6, 0.3, 0.1])
    q_K, strength = shrink_by_evidence(agreed_K.repeat(3, 1), target_K)
    assert strength.item() < 1e-12
    torch.testing.assert_close(q_K, agreed_K)
    q_K, strength = shrink_by_evidence(tensor([[0.3, 0.3, 0.4], [0.2, 0.2, 0.6]]), target_K)
    assert strength.item() == 1.0
    torch.testing.assert_close(q_K, target_K)


def test_nothing_to_decide_is_strength_0():
    target_K = tensor([0.25, 0.75])
    q_K, strength = shrink_by_evidence(target_K.repeat(2, 1), target_K)
    assert strength.item() == 0.0
    torch.testing.assert_close(q_K, target_K)


@pytest.mark.parametrize(("signal_over_noise", "largest_ratio"), [(0.0, 0.1), (0.5, 0.5), (2.0, 0.85), (16.0, 1.0)])
def test_on_planted_weights_it_is_nearer_to_the_truth_than_the_mean_of_the_seeds(signal_over_noise, largest_ratio):
    rng = np.random.default_rng(0)
    num_domains, num_seeds, deviation = 20, 3, 0.005
    direction = rng.normal(size=num_domains)
    direction -= direction.mean()
    direction /= np.sqrt(np.mean(direction**2))
    target = np.full(num_domains, 1 / num_domains)
    truth = target + direction * deviation * np.sqrt(signal_over_noise / num_seeds)
    trials = noisy_seeds(rng, truth, deviation, num_seeds, 400)
    shrunk = torch.stack([shrink_by_evidence(weights_RK, tensor(target))[0] for weights_RK in trials])
    error, error_of_mean = ((q - tensor(truth)).square().mean().item() for q in (shrunk, trials.mean(1)))
    assert error < largest_ratio * error_of_mean


@given(st.integers(1, 8).flatmap(lambda k: st.lists(distributions(k), min_size=3, max_size=5)))
@settings(deadline=None)
def test_evidence_keeps_the_simplex_and_does_not_overshoot(rows):
    *seeds, target_K = rows
    q_K, strength = shrink_by_evidence(torch.stack(seeds), target_K)
    assert 0 <= strength.item() <= 1
    assert (q_K >= 0).all()
    assert abs(q_K.sum().item() - 1) < 1e-12


@pytest.mark.parametrize("shape", [(1, 3), (3,)])
def test_one_seed_is_no_evidence(shape):
    with pytest.raises(ValueError, match=r"^weights must have shape \[R, K\] with at least two seeds, got \["):
        shrink_by_evidence(torch.ones(shape) / 3, torch.ones(3) / 3)


# --- on a device ----------------------------------------------------------------------------------------------------


def run_all(device):
    weights_RK = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]], device=device)
    target_K = torch.ones(3, device=device) / 3
    caps_K = max_weights(torch.ones(3, device=device, dtype=torch.int64), 4, 2.0)
    mean_K, strength = shrink_by_evidence(weights_RK, target_K)
    results = [caps_K, mean_K, project_onto_caps(mean_K, caps_K)]
    results += [shrink_weights(mean_K, target_K, s, kind=kind) for s in (0.5, strength) for kind in KINDS]
    return results


def test_no_value_is_read_back_to_the_host():
    """A tensor on "meta" has no values: any ``.item()``, branch on a value or boolean index would raise."""
    for result in run_all("meta"):
        assert (result.shape, result.dtype, result.device.type) == ((3,), torch.float64, "meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_never_waited_for_and_gives_the_same():
    run_all("cuda")  # the first call may set up the device
    device = torch.device("cuda")
    inputs = [torch.rand(50, device=device) for _ in range(2)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [project_onto_caps(*inputs), *(shrink_weights(*inputs, 0.5, kind=kind) for kind in KINDS)]
        results += shrink_by_evidence(torch.stack(inputs), inputs[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_host = [tensor_K.cpu() for tensor_K in inputs]
    torch.testing.assert_close(results[0].cpu(), project_onto_caps(*on_host))
    torch.testing.assert_close(results[2].cpu(), shrink_weights(*on_host, 0.5, kind="kl"))

"""Diagnoses of planted faults and of healthy runs; every path comes from the real group-DRO update.

Axes: S updates, K domains, M tokens of a domain in a batch.
"""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

from doremi_mix.diagnostics import (
    Diagnosis,
    batch_means,
    diagnose,
    find_clip_bias,
    find_drift,
    find_one_hot,
    find_reference_worse,
    find_small_domains,
    infer_step_size,
)
from doremi_mix.dro import DomainSums, average_weights, init_group_dro, step_domain_weights
from doremi_mix.headroom import init_headroom, step_headroom
from doremi_mix.types import DomainLoss

SEEDS = range(10)
SEQUENCE_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Problem:
    """A simulated run.

    The proxy's loss on domain i falls from ``reference + start`` to ``reference + gap``, at a rate that grows with the
    square root of its weight.  A token's difference between the models has standard deviation ``token_noise``; the
    proxy's level wobbles as an AR(1) process.  On held-out text, the reference is worse by ``reference_worse_by`` and
    the proxy by ``memorized`` than on the batches.
    """

    gap: tuple[float, ...]
    start: tuple[float, ...]
    rate: tuple[float, ...]
    token_noise: tuple[float, ...]
    steps: int = 400
    batch_size: int = 32
    step_size: float = 0.1
    smoothing: float = 1e-3
    num_sequences: tuple[int, ...] = ()
    reference_worse_by: tuple[float, ...] = ()
    wobble: float = 0.005
    memorized: float = 0.0

    @property
    def names(self):
        return [f"d{i}" for i in range(len(self.gap))]


def problem(num_domains=4, **changes):
    """A healthy run of alike domains, with changes: a dict {domain id: value} changes one domain."""
    values = {"gap": 0.15, "start": 1.5, "rate": 6.0, "token_noise": 0.3, "num_sequences": 100_000}
    values["reference_worse_by"] = -0.15
    kept = {key: value for key, value in changes.items() if key not in values}
    for key, value in values.items():
        change = changes.get(key, {})
        given = change if isinstance(change, dict) else dict.fromkeys(range(num_domains), change)
        kept[key] = tuple(given.get(i, value) for i in range(num_domains))
    return Problem(**kept)


@functools.cache
def simulate(run, seed):
    """Returns the arguments of ``diagnose`` for one draw of a run."""
    rng = np.random.default_rng(seed)
    K = len(run.gap)
    gap_K, start_K, rate_K, noise_K = (np.array(column) for column in (run.gap, run.start, run.rate, run.token_noise))
    level_K = np.linspace(2.0, 4.0, K)
    num_tokens = run.batch_size * SEQUENCE_TOKENS // K
    state = init_group_dro(K)
    progress_K, wobble_K = np.zeros(K), np.zeros(K)
    columns = {key: [] for key in ("weights", "excess", "unclipped", "proxy_loss", "reference_loss")}
    for _ in range(run.steps):
        wobble_K = 0.8 * wobble_K + 0.6 * run.wobble * rng.standard_normal(K)
        mean_K = gap_K + (start_K - gap_K) * np.exp(-progress_K) + wobble_K
        difference_KM = mean_K[:, None] + noise_K[:, None] * rng.standard_normal((K, num_tokens))
        # How hard the drawn text is moves both models' losses alike.
        reference_K = level_K + 0.1 * rng.standard_normal(K)
        mean_5K = np.stack(
            [
                np.maximum(difference_KM, 0).mean(1),
                difference_KM.mean(1),
                reference_K + difference_KM.mean(1),
                reference_K,
                np.ones(K),
            ]
        )
        sums = DomainSums(*torch.from_numpy(mean_5K * num_tokens))
        state, excess_K = step_domain_weights(state, sums, step_size=run.step_size, smoothing=run.smoothing)
        weights_K = state.weights_K.numpy()
        progress_K = progress_K + rate_K * np.sqrt(weights_K * K) / run.steps
        for column, value in zip(columns.values(), (weights_K, excess_K.numpy(), *mean_5K[1:4]), strict=True):
            column.append(value)
    hard_K = 0.05 * rng.standard_normal(K)
    proxy_K = level_K + mean_K + hard_K + 0.005 * rng.standard_normal(K) + run.memorized
    reference_K = proxy_K + np.array(run.reference_worse_by) + 0.005 * rng.standard_normal(K)
    return {
        "names": run.names,
        **{f"{key}_SK": np.array(column) for key, column in columns.items()},
        "average_weights_K": average_weights(state).numpy(),
        "num_sequences_K": np.array(run.num_sequences),
        "batch_size": run.batch_size,
        "reference_held_out": held_out(run.names, reference_K),
        "proxy_held_out": held_out(run.names, proxy_K),
        "smoothing": run.smoothing,
        "method": "doremi",
    }


def held_out(names, losses, error=0.02):
    return {name: DomainLoss(float(loss), error, 6400, 100) for name, loss in zip(names, losses, strict=True)}


HEALTHY = {
    "alike": problem(),
    "a slower domain": problem(rate={1: 5.0}, start={1: 1.6}),
    "two domains, 0.6 and 0.4": problem(2, start={0: 1.8}, gap={0: 0.16}),
    "twenty domains": problem(20, batch_size=80),
    "twenty domains of many speeds": problem(
        20, batch_size=80, rate={i: 5.0 + 0.1 * i for i in range(20)}, step_size=0.05
    ),
    "noisier tokens": problem(token_noise=0.5, gap=0.3),
    "long": problem(steps=2000, step_size=0.02),
    "slow wobble": problem(wobble=0.02),
    "little headroom in a domain of little weight": problem(gap={2: 0.0}, rate={2: 12.0}, token_noise={2: 0.2}),
    "short": problem(steps=30),
    "one domain": problem(1, batch_size=8),
}

PLANTED = {
    "one domain of eight takes all": (
        problem(8, batch_size=64, start={3: 3.0}, rate={3: 2.0}, step_size=1.0),
        ("one_hot", ("d3",)),
    ),
    "one domain of two takes all": (
        problem(2, start={1: 3.0}, rate={1: 2.0}, step_size=1.0),
        ("one_hot", ("d1",)),
    ),
    "a lasting gap": (problem(8, batch_size=64, gap={3: 0.5}), ("one_hot", ("d3",))),
    "a noisy domain without a gap": (
        problem(start=0.5, rate={2: 12.0}, gap={2: 0.0}, token_noise={2: 0.6}),
        ("clip_bias", ("d2",)),
    ),
    "a reference of a run as long": (
        problem(gap=-0.01, rate=20.0, token_noise={0: 0.41, 1: 0.4, 2: 0.4, 3: 0.1}, step_size=0.01),
        ("clip_bias", ("d0", "d1", "d2")),
    ),
    "a domain of one sequence": (problem(num_sequences={3: 1}), ("small_domain", ("d3",))),
    "two domains passed over often": (
        problem(num_sequences={1: 700, 3: 500}, memorized=0.3),
        ("small_domain", ("d1", "d3")),
    ),
    "a reference that is worse on a domain": (problem(reference_worse_by={0: 0.2}), ("reference_worse", ("d0",))),
    "a reference that is worse": (problem(reference_worse_by=0.2), ("reference_worse", ())),
    "a path that only begins": (
        problem(20, batch_size=80, gap={4: 0.5}, step_size=0.03),
        ("drift", ("d4",)),
    ),
    "a path on which all weights move": (
        problem(gap={0: 0.5}, step_size=0.02),
        ("drift", ("d0", "d1", "d2", "d3")),
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_check_fires_on_a_healthy_run(name):
    assert {seed: found for seed in SEEDS if (found := diagnose(**simulate(HEALTHY[name], seed)))} == {}


@pytest.mark.parametrize("name", PLANTED)
def test_each_check_fires_on_its_planted_fault_and_names_the_domains(name):
    run, (code, domains) = PLANTED[name]
    for seed in SEEDS:
        findings = diagnose(**simulate(run, seed))
        assert [found.domains for found in findings if found.code == code] == [domains], (seed, findings)
        for found in findings:
            assert len(found.sentence) <= 300
            assert found.sentence.endswith(".")


@pytest.mark.parametrize("name", [name for name, (_, (code, _)) in PLANTED.items() if code not in ("one_hot", "drift")])
def test_faults_of_the_inputs_set_off_no_check_of_the_outcome(name):
    run, (code, _) = PLANTED[name]
    for seed in SEEDS:
        others = {found.code for found in diagnose(**simulate(run, seed))} - {code}
        # A weight that noise feeds grows and grows.
        assert others <= ({"drift"} if code == "clip_bias" else set())


@pytest.mark.parametrize("name", ["one domain of eight takes all", "a lasting gap"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_step_size_that_is_named_cures_the_collapse_and_four_times_as_much_does_not(name, seed):
    run, _ = PLANTED[name]
    path = simulate(run, seed)
    (found,) = find_one_hot(path["names"], path["weights_SK"], path["excess_SK"])
    step_size = float(found.sentence.partition("to about ")[2].split()[0])
    for factor, num_findings in ((1, 0), (4, 1)):
        path = simulate(dataclasses.replace(run, step_size=factor * step_size), seed)
        assert len(find_one_hot(path["names"], path["weights_SK"], path["excess_SK"])) == num_findings


@pytest.mark.parametrize("seed", SEEDS)
def test_fewer_steps_as_named_and_a_reference_with_a_gap_cure_their_faults(seed):
    run, _ = PLANTED["two domains passed over often"]
    (found,) = diagnose(**simulate(run, seed))
    steps = int(found.sentence.partition("proxy.steps=")[2].split()[0])
    assert diagnose(**simulate(dataclasses.replace(run, steps=steps), seed)) == ()
    run, _ = PLANTED["a noisy domain without a gap"]
    cured = diagnose(**simulate(dataclasses.replace(run, gap=(0.15, 0.15, 0.5, 0.15)), seed))
    assert "clip_bias" not in {found.code for found in cured}


def settling(steps, seed, memory=150.0):
    """A weight that falls to its final value, with noise."""
    rng = np.random.default_rng(seed)
    weight_S = 0.05 + 0.5 * np.exp(-np.arange(1, steps + 1) / memory) + 0.003 * rng.standard_normal(steps)
    return np.stack([weight_S, 1 - weight_S], axis=1)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_steps_that_are_named_let_the_weights_settle(seed):
    (found,) = find_drift(["code", "law"], settling(400, seed))
    assert found.domains == ("code",)
    steps = int(found.sentence.partition("proxy.steps=")[2].rstrip("."))
    assert 600 <= steps <= 1200
    assert find_drift(["code", "law"], settling(steps, seed)) == ()


@pytest.mark.parametrize(("step_size", "smoothing"), [(1.0, 1e-3), (0.02, 1e-3), (0.5, 0.0), (0.3, 0.2)])
def test_the_step_size_is_read_off_the_path(step_size, smoothing):
    path = simulate(problem(steps=2, step_size=step_size, smoothing=smoothing), 0)
    assert infer_step_size(path["weights_SK"], path["excess_SK"], smoothing) == pytest.approx(step_size, rel=1e-6)


def test_no_step_size_is_read_off_a_path_that_tells_none():
    assert infer_step_size(np.full((3, 2), 0.5), np.zeros((3, 2)), 1e-3) is None
    assert infer_step_size(np.array([[1.0, 0.0]]), np.array([[9.0, 0.0]]), 0.0) is None
    # A cap cuts the second weight and raises the others.
    assert infer_step_size(np.array([[0.44, 0.25, 0.31]]), np.array([[0.5, 0.4, 0.1]]), 0.0) is None


# whole sentences


def test_the_sentence_on_a_collapse():
    excess_SK = np.tile([1.0, 0.2, 0.2, 0.2], (200, 1))
    state, weights = init_group_dro(4), []
    for excess_K in torch.from_numpy(excess_SK):
        sums = DomainSums(excess_K, excess_K, excess_K, excess_K, torch.ones(4, dtype=torch.float64))
        state, _ = step_domain_weights(state, sums, step_size=0.5, smoothing=1e-3)
        weights.append(state.weights_K.numpy())
    (found,) = find_one_hot(["code", "law", "math", "web"], np.array(weights), excess_SK)
    assert found == Diagnosis(
        "one_hot",
        ("code",),
        "The weights collapse on code: in 98% of 200 updates the largest weight is 0.99 on the average, with 1.0 of 4 "
        "domains in effect; lower proxy.step_size from 0.5 to about 0.01 or raise proxy.batch_size.",
    )
    (found,) = find_one_hot(["code", "law", "math", "web"], np.array(weights), excess_SK, method="another")
    assert found.sentence.endswith("in effect; raise weights.shrink, or lower proxy.power.")


def test_the_sentence_on_the_bias_of_the_clip():
    noise_S = np.tile([0.25, -0.25], 50)
    unclipped_SK = np.stack([noise_S, 0.5 * noise_S + 0.1], axis=1)
    findings = find_clip_bias(["chat", "code"], np.maximum(unclipped_SK, 0), unclipped_SK, np.array([0.56, 0.44]))
    assert findings == (
        Diagnosis(
            "clip_bias",
            ("chat",),
            "Noise feeds the weight of chat (weight 0.56, uniform 0.50): its later excess loss is 0.125 clipped but "
            "0.000 ± 0.033 unclipped; raise reference.steps, or proxy.batch_size to see a small gap.",
        ),
    )


def test_the_sentences_on_small_domains():
    counts_K = np.array([1, 3, 1000, 400, 100_000])
    losses_SK = np.full((1500, 5), 2.0)
    held = held_out("abcde", [2.0, 2.0, 2.0, 2.5, 2.0])
    findings = find_small_domains("abcde", losses_SK, counts_K, 20, held)
    assert findings == (
        Diagnosis(
            "small_domain",
            ("a", "b"),
            "One update sees a sequence of a and b twice (most a: 1 training sequence for 4 places in a batch), so its "
            "excess loss is of memorized text; set proxy.batch_size=5 or merge it with another domain.",
        ),
        Diagnosis(
            "small_domain",
            ("c", "d"),
            "The proxy passes 15.0 times over c and d (most d: 400 training sequences, loss 0.50 below held-out), so "
            "its excess loss measures memorization, not headroom; set proxy.steps=400 or merge it with another domain.",
        ),
    )
    # So few steps that nothing would be learned are no advice.
    (found,) = find_small_domains("abcde", losses_SK, np.array([9000, 9000, 9000, 9000, 20]), 20, {})
    assert found.sentence == (
        "The proxy passes 300.0 times over e (20 training sequences), so its excess loss measures "
        "memorization, not headroom; merge it with another domain."
    )


def test_the_sentences_on_a_reference_that_is_worse():
    names = ["code", "law", "web"]
    proxy = held_out(names, [2.0, 3.0, 4.0])
    assert find_reference_worse(names, held_out(names, [2.1, 3.2, 3.5]), proxy) == (
        Diagnosis(
            "reference_worse",
            ("code", "law"),
            "The reference is worse than the proxy on held-out text of code and law (most law: 3.20 against 3.00, "
            "difference 0.200 ± 0.057), so excess losses there show no headroom; raise reference.steps or "
            "choose a better reference.model.",
        ),
    )
    assert find_reference_worse(names, held_out(names, [2.1, 3.2, 4.0]), proxy) == (
        Diagnosis(
            "reference_worse",
            (),
            "The reference is worse than the proxy on held-out text: 3.10 against 3.00 nats per token on the average "
            "of 3 domains (difference 0.100 ± 0.033), so excess losses show no headroom; raise "
            "reference.steps or choose a better reference.model.",
        ),
    )


def test_the_sentence_on_drift():
    weight_S = np.linspace(0.001, 0.4, 400)
    assert find_drift(["code", "law"], np.stack([weight_S, 1 - weight_S], axis=1)) == (
        Diagnosis(
            "drift",
            ("code",),
            "The weights of code still move at the end of 400 updates (0.25 to 0.35 from the third to the last "
            "quarter, noise ± 0.040), so their average lags behind; try proxy.steps=800.",
        ),
    )


@pytest.mark.parametrize("length", [1, 20, 60])
def test_no_sentence_is_long_however_many_domains_there_are(length):
    names = [f"{i:02d}".ljust(length, "x") for i in range(40)]
    noise_SK = np.tile([[0.3], [-0.3]], (500, 40))
    findings = (
        *find_clip_bias(names, np.maximum(noise_SK, 0), noise_SK, np.full(40, 1 / 40)),
        *find_small_domains(names, noise_SK, np.full(40, 123), 4000, {}),
        *find_small_domains(names, noise_SK, np.full(40, 2345), 4000, held_out(names, np.full(40, 12.5))),
        *find_reference_worse(names, held_out(names, [12.5] * 39 + [0.0]), held_out(names, [12.0] * 39 + [99.0])),
        *find_drift(names, np.linspace(0.001, 0.5, 1000)[:, None] * np.ones(40)),
        *find_one_hot(names, np.tile(np.eye(40), (25, 1)), noise_SK),
    )
    assert [found.code for found in findings] == [
        "clip_bias",
        "small_domain",
        "small_domain",
        "reference_worse",
        "drift",
        "one_hot",
    ]
    for found in findings:
        assert len(found.sentence) <= 300
        assert " more" in found.sentence
        assert len(found.domains) >= 32


# edges


@pytest.mark.parametrize("steps", [1, 2, 39])
@pytest.mark.parametrize("num_domains", [1, 2, 4])
def test_short_runs_are_not_judged_by_their_path(steps, num_domains):
    assert diagnose(**simulate(problem(num_domains, steps=steps, step_size=5.0, gap={0: 3.0}), 0)) == ()


def test_no_update_is_no_finding():
    path = simulate(problem(steps=2), 0)
    empty = {key: path[key][:0] for key in path if key.endswith("_SK")}
    assert diagnose(**path | empty) == ()


def test_one_domain_is_never_collapsed_drifting_or_fed_by_noise():
    path = simulate(problem(1, gap=0.0, rate=40.0, batch_size=8), 0)
    assert diagnose(**path) == ()
    assert diagnose(**path | {"weights_SK": np.full_like(path["weights_SK"], 1 + 1e-15)}) == ()


def test_domains_without_a_standard_error_or_a_held_out_loss_are_left_out():
    names = ["code", "law", "web"]
    reference, proxy = held_out(names, [3.0, 4.0, 5.0]), held_out(names, [2.0, 4.0, 5.0])
    assert find_reference_worse(names, reference, proxy)[0].domains == ()
    unsure = reference | {"code": DomainLoss(3.0, math.nan, 9, 1)}
    assert find_reference_worse(names, unsure, proxy) == ()
    assert find_reference_worse(names, reference, proxy | {"code": DomainLoss(math.nan, math.nan, 0, 0)}) == ()
    assert find_reference_worse(names, reference, {name: proxy[name] for name in ("law", "web")}) == ()
    assert find_reference_worse(names, {}, {}) == ()
    path = simulate(problem(), 0)
    assert diagnose(**path | {"reference_held_out": {}, "proxy_held_out": {}}) == ()


def test_a_reference_worse_by_a_hair_is_no_finding_even_without_noise():
    names = ["code"]
    assert find_reference_worse(names, held_out(names, [2.005], 0.0), held_out(names, [2.0], 0.0)) == ()


def test_weights_of_zero_are_weights():
    weights_SK = np.tile([1.0, 0.0, 0.0], (100, 1))
    (found,) = find_one_hot(["a", "b", "c"], weights_SK, np.tile([1.0, 0.0, 0.0], (100, 1)), smoothing=0.0)
    assert found.domains == ("a",)
    assert find_drift(["a", "b", "c"], weights_SK) == ()


@pytest.mark.parametrize("weights_K", [[0.6, 0.4], [0.8, 0.2], [0.6, 0.3, 0.1], [0.5, 0.2, 0.1, 0.1, 0.05, 0.05]])
def test_an_uneven_mixture_is_no_collapse(weights_K):
    weights_SK = np.tile(weights_K, (100, 1))
    assert find_one_hot("abcdef"[: len(weights_K)], weights_SK, np.zeros_like(weights_SK)) == ()


def test_weights_that_flip_between_domains_collapse_on_all_of_them():
    weights_SK = np.full((100, 8), 0.01)
    weights_SK[np.arange(100), np.arange(100) % 2 * 5] = 0.93
    (found,) = find_one_hot("abcdefgh", weights_SK, np.zeros((100, 8)))
    assert found.domains == ("a", "f")


def test_batch_means_see_the_memory_of_a_path():
    """An AR(1) path of 4,000 with correlation .95: the error of its mean is 6.2 times that of independent values."""
    rng = np.random.default_rng(0)
    paths_SK = np.zeros((4000, 200))
    for step in range(1, 4000):
        paths_SK[step] = 0.95 * paths_SK[step - 1] + rng.standard_normal(200)
    mean_K, error_K = batch_means(paths_SK)
    assert np.sqrt((error_K**2).mean()) == pytest.approx(mean_K.std(), rel=0.15)
    assert (np.abs(mean_K) > 2 * error_K).mean() < 0.12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"excess_SK": np.zeros((3, 4))}, r"paths must share one shape \[S, 4\], got"),
        ({"num_sequences_K": np.ones(3)}, r"weights and counts must have shape \[4\], got \[\(4,\), \(3,\)\]"),
        ({"average_weights_K": np.full(4, np.nan)}, "a weight, loss or count is not finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        diagnose(**simulate(problem(steps=2), 0) | change)


def headroom_path(seed, last_domain=0.0, num_updates=160):
    """What the headroom rule logs for six slopes, the last of which may still rise."""
    rng = np.random.default_rng(seed)
    slopes = np.array([0.30, 0.25, 0.2, 0.35, 0.15, 0.3])
    rise_S1 = np.linspace(0, 1, num_updates)[:, None] ** 3 * np.array([0, 0, 0, 0, 0, last_domain])
    excess_SK = slopes + rise_S1 + rng.normal(0, 0.05, (num_updates, 6))
    state, weights = init_headroom(6), []
    for excess_K in torch.from_numpy(excess_SK):
        sums = DomainSums(excess_K.clamp(min=0), excess_K, excess_K, excess_K, torch.ones(6, dtype=torch.float64))
        state = step_headroom(state, sums)
        weights.append(state.weights_K.numpy())
    return np.array(weights), excess_SK


def diagnose_headroom(weights_SK, excess_SK):
    names = ["code", "law", "math", "web", "news", "chat"]
    losses = {name: DomainLoss(3.0, 0.02, 900, 30) for name in names}
    return diagnose(
        names,
        weights_SK=weights_SK,
        excess_SK=excess_SK.clip(min=0),
        unclipped_SK=excess_SK,
        proxy_loss_SK=excess_SK + 3,
        reference_loss_SK=np.full_like(excess_SK, 3.0),
        average_weights_K=weights_SK[-1],
        num_sequences_K=np.array([900, 900, 900, 900, 900, 4]),
        batch_size=6,
        reference_held_out=losses,
        proxy_held_out=losses,
        smoothing=1e-3,
        method="headroom",
    )


@pytest.mark.parametrize("seed", range(10))
def test_headroom_is_told_apart_from_group_dro(seed):
    """A healthy run says nothing, also where a domain is small: its headroom comes from held-out text."""
    assert diagnose_headroom(*headroom_path(seed)) == ()
    (found,) = diagnose_headroom(*headroom_path(seed, last_domain=0.6))
    assert (found.code, "chat" in found.domains) == ("drift", True)
    assert "so a longer training has other weights; try reference.steps=" in found.sentence

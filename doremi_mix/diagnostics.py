"""What is wrong with a run, in one sentence each: the domains, the evidence, and the setting to change.

Axes: S updates of the domain weights, K domains, N windows of updates.  Losses are in nats per
token; "±" in a sentence is two standard errors.  A run without a finding is not proven right: each check speaks only
when its evidence is clear, and can be called alone, with the arguments of ``diagnose``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from doremi_mix.types import DomainLoss

Array = NDArray[np.float64]

# Fewer updates show no path: their later half gives two to each of ten batch means.
MIN_UPDATES = 40
# Batch means per standard error: enough for a stable spread, few enough to be longer than the memory of a path.
NUM_WINDOWS = 10
# Standard errors beyond which means differ: about one false alarm in forty, one-sided.
NUM_ERRORS = 2.0
# One of many domains with more than half of the weight is trained nearly alone ...
DOMINANT_WEIGHT = 0.5
# ... but half is ordinary for few (0.6 and 0.4): there, the others must fall to a tenth each.
SMALLEST_REST = 0.1
# Share of the updates that shapes the average; shorter excursions are averaged away.
COLLAPSED_SHARE = 0.25
# Most of a clipped excess is the clip's when the unclipped one is surely below this share of it.
MOST_CLIP_SHARE = 0.5
# The clip helps a domain only when its weight and clipped excess are near the average of the domains, or above.
NEAR_AVERAGE = 0.9
# Repeated text is worth nearly as much as new text up to about four passes (Muennighoff et al., 2023).
MAX_EPOCHS = 4.0
# Nats that the loss on training text must be below the held-out one to be worth a word.
MIN_MEMORIZED = 0.05
# Nats, one percent of perplexity: a reference that is worse by less moves no weight.
MIN_GAP = 0.01
# Movement of a weight, absolute and relative, below which the result is as good as another seed's.
MIN_MOVE, MIN_RELATIVE_MOVE = 0.02, 0.2
# Stricter than NUM_ERRORS: weights add up the noise of all updates, so their windows wander more than they vary.
NUM_DRIFT_ERRORS = 3.0
# Names in a sentence, and characters of all and of each, so that it stays below 300.
MAX_NAMES, MAX_NAMES_LENGTH, MAX_NAME_LENGTH = 5, 50, 24


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One thing that is wrong with a run.

    Attributes:
        code: ``reference_worse``, ``small_domain``, ``one_hot``, ``clip_bias`` or ``drift``.
        domains: those concerned, in domain order; () for the whole run.
        sentence: what, where, the evidence and the setting to change.
    """

    code: str
    domains: tuple[str, ...]
    sentence: str


def diagnose(
    names: Sequence[str],
    *,
    weights_SK: Array,
    excess_SK: Array,
    unclipped_SK: Array,
    proxy_loss_SK: Array,
    reference_loss_SK: Array,
    average_weights_K: Array,
    num_sequences_K: NDArray[np.int64],
    batch_size: int,
    reference_held_out: Mapping[str, DomainLoss],
    proxy_held_out: Mapping[str, DomainLoss],
    smoothing: float,
    method: str,
) -> tuple[Diagnosis, ...]:
    """Runs every check; what spoils the input of the others comes first.

    Args:
        names: of the domains, in order.
        weights_SK: alpha_1 .. alpha_S, as ``trajectory.jsonl`` has them.
        excess_SK: the excess losses, clipped.
        unclipped_SK: proxy minus reference.
        proxy_loss_SK: the proxy model's losses on the batches.
        reference_loss_SK: the reference model's.
        average_weights_K: the result of the run.
        num_sequences_K: training sequences of each domain.
        batch_size: sequences per update, spread evenly over the domains.
        reference_held_out: the reference model's held-out losses; a domain may be missing, a standard error NaN.
        proxy_held_out: the proxy model's.
        smoothing: c of group DRO.
        method: how the weights were learned; a step size is named for ``doremi`` only.

    Returns:
        The findings; () when nothing is wrong.

    Raises:
        ValueError: an array has another shape than [S, K] or [K], or a value that is not finite.
    """
    paths = (weights_SK, excess_SK, unclipped_SK, proxy_loss_SK, reference_loss_SK)
    if any(path.shape != (len(weights_SK), len(names)) for path in paths):
        raise ValueError(f"paths must share one shape [S, {len(names)}], got {[path.shape for path in paths]}")
    vectors = (average_weights_K, num_sequences_K)
    if any(vector.shape != (len(names),) for vector in vectors):
        raise ValueError(f"weights and counts must have shape [{len(names)}], got {[v.shape for v in vectors]}")
    if not all(np.isfinite(array).all() for array in (*paths, *vectors)):
        raise ValueError("a weight, loss or count is not finite")
    return (
        *find_reference_worse(names, reference_held_out, proxy_held_out),
        # Headroom of a small domain is measured on held-out text, where nothing is memorized.
        *(
            find_small_domains(names, proxy_loss_SK, num_sequences_K, batch_size, proxy_held_out)
            if method == "doremi"
            else ()
        ),
        *find_one_hot(names, weights_SK, excess_SK, smoothing=smoothing, method=method),
        # Only group DRO takes clipped losses.
        *(find_clip_bias(names, excess_SK, unclipped_SK, average_weights_K) if method == "doremi" else ()),
        *find_drift(names, weights_SK, method=method),
    )


def find_reference_worse(
    names: Sequence[str], reference_held_out: Mapping[str, DomainLoss], proxy_held_out: Mapping[str, DomainLoss]
) -> tuple[Diagnosis, ...]:
    """Finds a reference whose held-out loss is above the proxy's by more than two combined standard errors.

    Both models score the same text, so their errors largely cancel and the combined error is on the careful side.
    Domains without a loss or a standard error are left out.  When the average over the domains is worse, the finding is
    for the whole run; else it names the domains.

    Example:
        >>> reference, proxy = DomainLoss(3.5, 0.01, 900, 9), DomainLoss(3.0, 0.01, 900, 9)
        >>> [found.code for found in find_reference_worse(["code"], {"code": reference}, {"code": proxy})]
        ['reference_worse']
    """
    unknown = DomainLoss(math.nan, math.nan, 0, 0)
    scores_2K = [[losses.get(name, unknown) for name in names] for losses in (reference_held_out, proxy_held_out)]
    loss_2K = np.array([[score.loss for score in scores_K] for scores_K in scores_2K])
    error_2K = np.array([[score.standard_error for score in scores_K] for scores_K in scores_2K])
    gap_K, error_K = loss_2K[0] - loss_2K[1], np.hypot(error_2K[0], error_2K[1])
    known_K = np.isfinite(gap_K) & np.isfinite(error_K)
    count = int(known_K.sum())
    if not count:
        return ()
    found = np.flatnonzero(known_K & (gap_K > MIN_GAP) & (gap_K > NUM_ERRORS * error_K)).tolist()
    gap, error = float(gap_K[known_K].mean()), math.hypot(*error_K[known_K]) / count
    advice = "raise reference.steps or choose a better reference.model"
    if gap > max(MIN_GAP, NUM_ERRORS * error):
        reference, proxy = loss_2K[:, known_K].mean(axis=1)
        sentence = (
            f"The reference is worse than the proxy on held-out text: {reference:.2f} against {proxy:.2f} nats per "
            f"token on the average of {_counted(count, 'domain')} (difference {_plus_minus(gap, error)}), so excess "
            f"losses show no headroom; {advice}."
        )
        return _diagnosis("reference_worse", names, [], sentence)
    if not found:
        return ()
    worst = max(found, key=lambda i: float(gap_K[i]))
    sentence = (
        f"The reference is worse than the proxy on held-out text of {_listed(names, found)} "
        f"({_most(names, found, worst)}{loss_2K[0, worst]:.2f} against {loss_2K[1, worst]:.2f}, difference "
        f"{_plus_minus(gap_K[worst], error_K[worst])}), so excess losses there show no headroom; {advice}."
    )
    return _diagnosis("reference_worse", names, found, sentence)


def find_small_domains(
    names: Sequence[str],
    proxy_loss_SK: Array,
    num_sequences_K: NDArray[np.int64],
    batch_size: int,
    proxy_held_out: Mapping[str, DomainLoss],
) -> tuple[Diagnosis, ...]:
    """Finds domains with fewer sequences than places in a batch, and others that the proxy passes over too often.

    How far the loss on their text lies below the held-out loss is evidence of memorization, where there is any.
    """
    num_updates, num_domains = proxy_loss_SK.shape
    places = batch_size / num_domains
    epochs_K = num_updates * places / np.maximum(num_sequences_K, 1)
    twice = np.flatnonzero(num_sequences_K < places).tolist()
    often = np.flatnonzero((num_sequences_K >= places) & (epochs_K > MAX_EPOCHS)).tolist()
    findings: tuple[Diagnosis, ...] = ()
    if twice:
        worst = min(twice, key=lambda i: int(num_sequences_K[i]))
        count = int(num_sequences_K[worst])
        sentence = (
            f"One update sees a sequence of {_listed(names, twice)} twice ({_most(names, twice, worst)}"
            f"{_counted(count, 'training sequence')} for {math.ceil(places)} places in a batch), so its excess loss is "
            f"of memorized text; set proxy.batch_size={max(1, count) * num_domains} or merge it with another domain."
        )
        findings += _diagnosis("small_domain", names, twice, sentence)
    if often:
        worst = max(often, key=lambda i: float(epochs_K[i]))
        steps = _rounded(MAX_EPOCHS * float(num_sequences_K[worst]) / places)
        set_steps = f"set proxy.steps={steps} or " if steps >= MIN_UPDATES else ""
        held_out = proxy_held_out.get(names[worst])
        memorized = held_out.loss - float(proxy_loss_SK[-(num_updates // 4) or -1 :, worst].mean()) if held_out else 0
        evidence = f", loss {memorized:.2f} below held-out" if memorized > MIN_MEMORIZED else ""
        sentence = (
            f"The proxy passes {epochs_K[worst]:.1f} times over {_listed(names, often)} ({_most(names, often, worst)}"
            f"{_counted(int(num_sequences_K[worst]), 'training sequence')}{evidence}), so "
            f"its excess loss measures memorization, not headroom; {set_steps}merge it with another domain."
        )
        findings += _diagnosis("small_domain", names, often, sentence)
    return findings


def find_one_hot(
    names: Sequence[str], weights_SK: Array, excess_SK: Array, *, smoothing: float = 1e-3, method: str = "doremi"
) -> tuple[Diagnosis, ...]:
    """Finds a path that spends a large share of its updates on one domain or a few.

    An update is collapsed when one domain has more than half of the weight (more with fewer than six domains: 0.9 of
    two), or the effective number of domains, exp(entropy), is hardly above one.  The step size to try follows
    from the number of updates and the largest lead of one domain's excess loss over the others'.

    Example:
        >>> weights_SK = np.tile([0.96, 0.02, 0.02], (100, 1))
        >>> [found.domains for found in find_one_hot(["code", "law", "web"], weights_SK, np.zeros((100, 3)))]
        [('code',)]
    """
    num_updates, num_domains = weights_SK.shape
    collapsed_S = _is_collapsed(weights_SK)
    if num_updates < MIN_UPDATES or num_domains < 2 or collapsed_S.mean() <= COLLAPSED_SHARE:
        return ()
    collapsed_SK = weights_SK[collapsed_S]
    # The fewest domains that hold most of what the collapsed updates give: several, when the top changes.
    mean_K = collapsed_SK.mean(axis=0)
    order_K = np.argsort(-mean_K, kind="stable")
    num_top = int(np.searchsorted(np.cumsum(mean_K[order_K]), 0.8)) + 1
    found = sorted(order_K[:num_top].tolist())
    current = infer_step_size(weights_SK, excess_SK, smoothing) if method == "doremi" else None
    values = ""
    if current is not None:
        # A lead that comes and goes is smaller in windows than in updates: at least halve it.
        sensible = min(current / 2, _sensible_step_size(excess_SK, smoothing))
        values = f" from {_digits(current, 2)} to about {_digits(sensible, 1)}"
    advice = f"lower proxy.step_size{values} or raise proxy.batch_size"
    if method != "doremi":
        advice = "raise weights.shrink, or lower proxy.power"
    sentence = (
        f"The weights collapse on {_listed(names, found)}: in {collapsed_S.mean():.0%} of {num_updates:,} updates the "
        f"largest weight is {collapsed_SK.max(axis=1).mean():.2f} on the average, with "
        f"{_effective_number(collapsed_SK).mean():.1f} of {num_domains} domains in effect; {advice}."
    )
    return _diagnosis("one_hot", names, found, sentence)


def find_clip_bias(
    names: Sequence[str], excess_SK: Array, unclipped_SK: Array, average_weights_K: Array
) -> tuple[Diagnosis, ...]:
    """Finds domains whose weight is fed by the clip: E[max(x, 0)] > 0 for noise x without any gap.

    Over the later half of the updates, the mean unclipped excess loss of such a domain is not above its noise (batch
    means), and so close to zero that most of its clipped excess loss must be the clip's.  Domains that the clip does
    not help, with a weight or a clipped excess loss below the average of the domains, are not worth a word.
    """
    num_updates, num_domains = excess_SK.shape
    if num_updates < MIN_UPDATES or num_domains < 2:
        return ()
    clipped_K = excess_SK[num_updates // 2 :].mean(axis=0)
    mean_K, error_K = batch_means(unclipped_SK[num_updates // 2 :])
    found = np.flatnonzero(
        (mean_K <= NUM_ERRORS * error_K)
        & (mean_K + NUM_ERRORS * error_K < MOST_CLIP_SHARE * clipped_K)
        & (average_weights_K >= NEAR_AVERAGE / num_domains)
        & (clipped_K >= NEAR_AVERAGE * clipped_K.mean())
    ).tolist()
    if not found:
        return ()
    worst = max(found, key=lambda i: float(average_weights_K[i]))
    sentence = (
        f"Noise feeds the weight of {_listed(names, found)} ({_most(names, found, worst)}weight "
        f"{average_weights_K[worst]:.2f}, uniform {1 / num_domains:.2f}): its later excess loss is "
        f"{clipped_K[worst]:.3f} clipped but {_plus_minus(mean_K[worst], error_K[worst])} unclipped; raise "
        "reference.steps, or proxy.batch_size to see a small gap."
    )
    return _diagnosis("clip_bias", names, found, sentence)


def find_drift(names: Sequence[str], weights_SK: Array, *, method: str = "doremi") -> tuple[Diagnosis, ...]:
    """Finds weights that still move at the end: the last quarter of the path against the third.

    A movement counts when it is beyond the noise of the two means (batch means), above 0.02 and above 20 %.  The steps
    to try let an exponential approach, seen in the last three quarters, come to rest; without one, they double.
    """
    num_updates = len(weights_SK)
    if num_updates < MIN_UPDATES:
        return ()
    quarters = np.split(weights_SK[num_updates % 4 :], 4)[1:]
    (second_K, _), (third_K, third_error_K), (last_K, last_error_K) = (
        batch_means(q, NUM_WINDOWS // 2) for q in quarters
    )
    move_K, error_K = last_K - third_K, np.hypot(third_error_K, last_error_K)
    limit_K = np.maximum(MIN_MOVE, MIN_RELATIVE_MOVE * third_K)
    found = np.flatnonzero((np.abs(move_K) > NUM_DRIFT_ERRORS * error_K) & (np.abs(move_K) > limit_K)).tolist()
    if not found:
        return ()
    worst = max(found, key=lambda i: abs(float(move_K[i])))
    factor = max(_steps_factor(float((third_K - second_K)[i]), float(move_K[i]), float(limit_K[i])) for i in found)
    num_steps = _rounded(factor * num_updates, up=True)
    advice = f"so their average lags behind; try proxy.steps={num_steps}"
    if method != "doremi":
        # Headroom has no average that could lag; its proxy has half of the reference's steps.
        advice = f"so a longer training has other weights; try reference.steps={2 * num_steps}"
    sentence = (
        f"The weights of {_listed(names, found)} still move at the end of {num_updates:,} updates "
        f"({_most(names, found, worst)}{third_K[worst]:.2f} to {last_K[worst]:.2f} from the third to the last quarter, "
        f"noise ± {NUM_ERRORS * error_K[worst]:.3f}), {advice}."
    )
    return _diagnosis("drift", names, found, sentence)


def batch_means(values_SK: Array, num_windows: int = NUM_WINDOWS) -> tuple[Array, Array]:
    """Returns mean and standard error of autocorrelated columns, each of shape [K].

    The updates are cut into consecutive windows; the spread of the windows' means is the noise of the whole, as long as
    a window is longer than the memory of the path.  The remainder of updates, at the start, is left out.

    Example:
        >>> mean_K, error_K = batch_means(np.array([[1.0], [1.0], [3.0], [3.0]]), num_windows=2)
        >>> mean_K.tolist(), error_K.tolist()
        ([2.0], [1.0])
    """
    length = len(values_SK) // num_windows
    windows_NK = values_SK[len(values_SK) - num_windows * length :].reshape(num_windows, length, -1).mean(axis=1)
    return windows_NK.mean(axis=0), windows_NK.std(axis=0, ddof=1) / math.sqrt(num_windows)


def infer_step_size(weights_SK: Array, excess_SK: Array, smoothing: float) -> float | None:
    """Returns eta, which the first update from uniform weights tells; None when it does not (caps, a warm-up).

    Example:
        >>> weights_K = np.exp([0.3 * 0.5, 0.3 * 0.1])
        >>> round(infer_step_size(weights_K[None] / weights_K.sum(), np.array([[0.5, 0.1]]), 0.0), 6)
        0.3
    """
    # The smoothing's floor comes off; its factor falls out of the centered logarithms.
    tilted_K = weights_SK[0] - smoothing / weights_SK.shape[1]
    force_K = excess_SK[0] - excess_SK[0].mean()
    if not force_K.any() or tilted_K.min() < 1e-9:
        return None
    change_K = np.log(tilted_K) - np.log(tilted_K).mean()
    step_size = float(force_K @ change_K / (force_K @ force_K))
    explains = np.allclose(change_K, step_size * force_K, rtol=1e-3, atol=1e-6)
    return step_size if step_size > 0 and explains else None


def _dominant_weight(num_domains: int) -> float:
    return max(DOMINANT_WEIGHT, 1 - SMALLEST_REST * (num_domains - 1))


def _is_collapsed(weights_SK: Array) -> NDArray[np.bool_]:
    num_domains = weights_SK.shape[1]
    is_few_S = _effective_number(weights_SK) < 1 + SMALLEST_REST * (num_domains - 1)
    return np.asarray(is_few_S | (weights_SK.max(axis=1) > _dominant_weight(num_domains)))


def _effective_number(weights_SK: Array) -> Array:
    # A weight of 0 adds nothing: 0 * log(tiny).
    entropy_S = -(weights_SK * np.log(np.maximum(weights_SK, np.finfo(np.float64).tiny))).sum(axis=-1)
    return np.asarray(np.exp(entropy_S))


def _sensible_step_size(excess_SK: Array, smoothing: float) -> float:
    """Returns the step size with which the largest lead seen, kept for the whole run, just makes a domain dominant.

    The recorded path cannot be replayed with a smaller one: a collapse teaches the proxy its domain fast, so the record
    has smaller leads than lighter weights would give.  The smoothing holds the weights back in long runs.
    """
    num_updates, num_domains = excess_SK.shape
    length = num_updates // NUM_WINDOWS
    windows_NK = excess_SK[: NUM_WINDOWS * length].reshape(NUM_WINDOWS, length, num_domains).mean(axis=1)
    others_N = (windows_NK.sum(axis=1) - windows_NK.max(axis=1)) / (num_domains - 1)
    lead = float((windows_NK.max(axis=1) - others_N).max())
    weight = _dominant_weight(num_domains)
    by_steps = math.log(weight / (1 - weight) * (num_domains - 1)) / num_updates
    by_smoothing = smoothing * (weight - 1 / num_domains) / (weight * (1 - weight))
    return float(max(by_steps, by_smoothing) / max(lead, 1e-12))


def _steps_factor(before: float, move: float, limit: float) -> float:
    """Returns how many times longer a path comes to rest, from its last two movements between quarters."""
    ratio = move / before if before else 1.0
    if not 0 < ratio < 0.9:
        return 2.0
    # Of the last quarter, on an exponential approach whose quarters are longer by the factor.
    movement = {f: ratio ** (2 * f) * (1 - ratio**f) ** 2 / f for f in (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)}
    return next((f for f, m in movement.items() if abs(move) * m <= 0.5 * limit * movement[1.0]), 4.0)


def _listed(names: Sequence[str], found: Sequence[int]) -> str:
    """Joins names for a sentence: at most five, fewer when they are long, then "and N more"."""
    shown: list[str] = []
    for i in found[:MAX_NAMES]:
        name = names[i] if len(names[i]) <= MAX_NAME_LENGTH else f"{names[i][: MAX_NAME_LENGTH - 1]}…"
        if shown and sum(map(len, shown)) + len(name) > MAX_NAMES_LENGTH:
            break
        shown.append(name)
    left = len(found) - len(shown)
    last = f"{left} more" if left else shown.pop()
    return f"{', '.join(shown)} and {last}" if shown else last


def _diagnosis(code: str, names: Sequence[str], found: Sequence[int], sentence: str) -> tuple[Diagnosis, ...]:
    return (Diagnosis(code, tuple(names[i] for i in found), sentence),)


def _most(names: Sequence[str], found: Sequence[int], worst: int) -> str:
    """Says whose evidence follows, where several domains are named."""
    return f"most {_listed(names, [worst])}: " if len(found) > 1 else ""


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _plus_minus(value: float, error: float) -> str:
    return f"{value:.3f} ± {NUM_ERRORS * error:.3f}"


def _digits(value: float, digits: int) -> str:
    """Writes a number with so many digits and no exponent."""
    return np.format_float_positional(value, precision=digits, fractional=False, trim="-")


def _rounded(value: float, *, up: bool = False) -> int:
    """Rounds to two digits, as people set numbers of steps."""
    unit = 10 ** max(0, len(str(int(value))) - 2)
    return int(math.ceil(value / unit) if up else value // unit) * int(unit)

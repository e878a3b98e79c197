"""Which mixture is best, and how sure that is: held-out losses of several mixtures, paired by seed and by sequence.

Axes: M mixtures, S seeds, N held-out sequences, K domains with held-out tokens.  Losses are in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Kind = Literal["better", "better_than_some", "no_reliable_gain", "worse", "one_seed"]

SIGNIFICANCE = 0.05
COUNT_DRAWS = 4000


def _plain(value: Any) -> Any:
    """Returns plain JSON values: tuples become lists, NaN becomes None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


class _Record:
    """What the results share: their form in JSON."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; NaN becomes None."""
        plain: dict[str, Any] = _plain(asdict(self))  # type: ignore[call-overload]
        return plain


@dataclass(frozen=True, slots=True)
class Interval(_Record):
    """A number and its 95 % interval; all but the estimate are NaN when the error is unknown."""

    estimate: float
    low: float
    high: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class MixtureResult(_Record):
    """The held-out losses of one mixture.

    Attributes:
        name: of the mixture.
        average_loss: mean over domains, then over seeds.
        average_loss_by_seed: mean over domains, one per seed.
        worst_loss: mean over seeds of the highest loss of a domain; seeds may differ in which domain that is.
        worst_domain: the domain with the highest mean loss over seeds.
        domain_losses: mean over seeds, by domain; domains without held-out tokens are missing.
    """

    name: str
    average_loss: float
    average_loss_by_seed: tuple[float, ...]
    worst_loss: float
    worst_domain: str
    domain_losses: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PairedResult(_Record):
    """One mixture minus a baseline: below zero, the mixture is better.

    Attributes:
        mixture: its name.
        baseline: the name of what it is compared with.
        interval_over: what the intervals cover; with one seed ``examples`` alone, which is no ground for a claim.
        average: the difference in average loss.
        worst: the difference in the loss of the worst domain.
        num_better: domains whose estimated difference is below zero.
        num_better_interval: 95 % interval of that count, see ``compare_mixtures``.
        num_clearly_better: domains whose own interval lies below zero; 0 with one seed.
        num_clearly_worse: domains whose own interval lies above zero; 0 with one seed.
        domains: the difference of each domain; no interval for a domain with one held-out sequence.
        num_domains: domains with held-out tokens.
        seed_deviation: standard deviation over seeds of the difference in average loss, for planning; NaN with one.
    """

    mixture: str
    baseline: str
    interval_over: Literal["seeds and examples", "examples"]
    average: Interval
    worst: Interval
    num_better: int
    num_better_interval: tuple[int, int]
    num_clearly_better: int
    num_clearly_worse: int
    domains: Mapping[str, Interval]
    num_domains: int
    seed_deviation: float


@dataclass(frozen=True, slots=True)
class Verdict(_Record):
    """What the comparison says about the candidate.

    Attributes:
        kind: ``better`` than every baseline, ``better_than_some``, ``no_reliable_gain``, ``worse`` than at least one,
            or ``one_seed`` (no claim).
        sentence: the same for a person, with numbers.
        best: the mixture to train on, see ``compare_mixtures``.
        adjusted_p_values: by baseline, after Holm; a difference is reliable at 0.05 or below.  NaN with one seed.
    """

    kind: Kind
    sentence: str
    best: str
    adjusted_p_values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Comparison(_Record):
    """All that ``compare_mixtures`` found.

    Attributes:
        mixtures: the results by mixture, in the order given.
        pairs: the candidate against every other mixture, and every mixture against each baseline.
        verdict: about the candidate.
        num_seeds: seeds that each mixture was trained with.
        domains_without_tokens: left out of everything: nothing was held out.
        domains_with_one_sequence: left out of the error over examples: one sequence has no spread.
    """

    mixtures: Mapping[str, MixtureResult]
    pairs: tuple[PairedResult, ...]
    verdict: Verdict
    num_seeds: int
    domains_without_tokens: tuple[str, ...]
    domains_with_one_sequence: tuple[str, ...]

    def pair(self, mixture: str, baseline: str) -> PairedResult:
        """Returns the comparison of a mixture with a baseline.

        Raises:
            KeyError: the two were not compared.
        """
        for pair in self.pairs:
            if (pair.mixture, pair.baseline) == (mixture, baseline):
                return pair
        raise KeyError(f"{mixture} was not compared with {baseline}")


class _Study(NamedTuple):
    """The scored sequences of the scored domains.

    ``influences[m]`` [S, N] is each sequence's pull on its domain's loss: (sum - loss * tokens) / tokens of the domain.
    """

    names: tuple[str, ...]
    domain_ids_N: NDArray[np.int64]
    num_sequences_K: NDArray[np.int64]
    losses: dict[str, Array]
    influences: dict[str, Array]


class _Estimate(NamedTuple):
    """A difference with the variances of its two parts, seeds and examples, and their degrees of freedom."""

    estimate: float
    variances: tuple[float, float]
    freedoms: tuple[float, float]

    def interval(self) -> Interval:
        """Returns the 95 % interval; degrees of freedom by Welch and Satterthwaite."""
        variance = sum(self.variances)
        spread = sum(part**2 / freedom for part, freedom in zip(self.variances, self.freedoms, strict=True))
        freedom = math.inf if spread == 0 else variance**2 / spread
        half = math.sqrt(variance) * float(stats.t.ppf(1 - SIGNIFICANCE / 2, freedom))
        return Interval(self.estimate, self.estimate - half, self.estimate + half, math.sqrt(variance))

    def p_value(self) -> float:
        """Returns the p at which ``estimate ** 2 = sum of t(1 - p / 2, freedom) ** 2 * variance`` over both parts."""
        variance = sum(self.variances)
        if variance == 0 or math.isnan(variance):
            return float(self.estimate == 0 or math.isnan(variance))
        low, high = -40.0, 0.0
        for _ in range(30):
            middle = (low + high) / 2
            quantiles = stats.t.isf(math.exp(middle) / 2, self.freedoms)
            reaches_zero = float(quantiles**2 @ self.variances) >= self.estimate**2
            low, high = (middle, high) if reaches_zero else (low, middle)
        return math.exp(high)


def compare_mixtures(
    scores: Mapping[str, Array],
    domain_ids_N: NDArray[np.int64],
    names: Iterable[str],
    *,
    candidate: str = "learned",
    baselines: Sequence[str] = ("natural", "uniform", "temperature"),
) -> Comparison:
    """Compares mixtures on the same held-out sequences, each trained with the same seeds.

    With loss[m, s, k] = sum of losses / sum of tokens over the sequences of domain k, every difference is paired by
    seed and by sequence.  For the average over domains against baseline b::

        D_s      = mean over k of (loss[m, s, k] - loss[b, s, k])
        d_n      = mean over s of the difference of (sum_n - loss[s, k] * tokens_n) / (tokens of domain k)
        V_seeds  = sample variance of D_s / S
        V_k      = N_k / (N_k - 1) * sum over the sequences n of domain k of d_n ** 2
        variance = V_seeds + sum over k of V_k / K ** 2
        df       = variance ** 2 / (V_seeds ** 2 / (S - 1) + sum over k of (V_k / K ** 2) ** 2 / (N_k - 1))
        interval = mean of D_s -+ t(0.975, df) * sqrt(variance)

    A domain's own difference has V_seeds of that domain and its V_k.  The difference of the worst domains is linearized
    at the worst domain of each mixture and seed, so it is paired where that is the same domain, and only approximate
    where two domains nearly tie for the worst.  What a sequence and a seed do together is in both parts, so intervals
    are too wide rather than too narrow when that is most of the noise.

    A domain with one held-out sequence has an unknown V_k: it is left out of the sum, and has no interval of its own.
    With one seed the intervals cover examples alone, no domain is called clear, and the verdict makes no claim.

    ``num_better_interval`` holds the middle 95 % of the count of differences below zero when they are drawn around
    their estimates with their estimated errors (seeds move all domains together, examples each its own; a fixed random
    seed).  Domains of unknown error may fall either way, and the interval is widened to hold the count itself.  Draws
    pull a count of many small differences toward half of the domains, so it may miss the true count: it describes, and
    proves nothing.

    Intervals are plain 95 % intervals.  The verdict must hold over all baselines and with few seeds, so its words are
    stricter: Holm's method over the baselines, on two-sided p-values of the average differences.  The p-value is that
    at which |mean of D_s| = sqrt(t(1 - p / 2, S - 1) ** 2 * V_seeds + t(1 - p / 2, df of examples) ** 2 * V_examples):
    two or three seeds that agree by chance make Welch's df too large.  Simulated with no difference at all from three
    baselines, Welch's p-values lead to some claim in up to 25 % of studies of 2 seeds and 12 % of 3; these in at most
    5 %.  Likewise intervals cover as little as 87 % with 2 seeds and 92 % with 3, when seeds are most of the noise.  An
    interval that leaves zero out may thus be no reliable difference; the sentence then says so.  Being worse than one
    baseline outweighs being better than the others.

    ``verdict.best`` has the lowest average loss, unless the difference to it is not reliable: among the mixtures that
    are not reliably worse than any other, the plainest is taken: baselines in their order, then the candidate, then
    the others.  Reliable is what the verdict calls so; the pairs outside of it are corrected by Holm among themselves.

    Args:
        scores: by mixture the sum of losses (nats) and the number of loss tokens of each sequence, shape [S, N, 2].
        domain_ids_N: the domain of each sequence, a position in ``names``.
        names: the domains' names.
        candidate: the mixture that the verdict is about.
        baselines: the plain mixtures, plainest first; those that are missing from ``scores`` are passed over.

    Returns:
        The losses of each mixture, the paired differences, and the verdict.

    Raises:
        ValueError: the candidate or every baseline is missing, shapes or tokens differ between mixtures or seeds, a
            domain id is out of range, a number is not finite, or no sequence has tokens.

    Example:
        >>> scores = {
        ...     "natural": np.array([[[2.0, 1.0], [4.0, 1.0]], [[2.0, 1.0], [4.0, 1.0]]]),
        ...     "learned": np.array([[[1.0, 1.0], [3.0, 1.0]], [[1.0, 1.0], [3.0, 1.0]]]),
        ... }
        >>> compare_mixtures(scores, np.array([0, 0]), ["dolly"]).pair("learned", "natural").average
        Interval(estimate=-1.0, low=-1.0, high=-1.0, standard_error=0.0)
    """
    domains = tuple(names)
    chosen = [name for name in baselines if name in scores and name != candidate]
    if candidate not in scores:
        raise ValueError(f"the candidate {candidate!r} is not among the mixtures {list(scores)}")
    if not chosen:
        raise ValueError(f"none of the baselines {list(baselines)} is among the mixtures {list(scores)}")
    _check_scores(scores, domain_ids_N, domains)
    study = _prepare(scores, domain_ids_N, domains)
    others = [name for name in scores if name != candidate]
    tested = [(candidate, other) for other in others]
    tested += [(name, base) for base in chosen for name in others if name != base]
    pairs = tuple(_compare_pair(study, name, base) for name, base in tested)
    return Comparison(
        mixtures={name: _summarize(study, name) for name in scores},
        pairs=pairs,
        verdict=_judge(study, candidate, chosen),
        num_seeds=len(study.losses[candidate]),
        domains_without_tokens=tuple(name for name in domains if name not in study.names),
        domains_with_one_sequence=tuple(
            name for name, count in zip(study.names, study.num_sequences_K, strict=True) if count == 1
        ),
    )


def _check_scores(scores: Mapping[str, Array], domain_ids_N: NDArray[np.int64], domains: tuple[str, ...]) -> None:
    if len(set(domains)) != len(domains):
        raise ValueError(f"domain names must be unique, got {list(domains)}")
    first_name, first = next(iter(scores.items()))
    for name, scores_SN2 in scores.items():
        if scores_SN2.ndim != 3 or scores_SN2.shape[2] != 2 or scores_SN2.shape[0] == 0:
            raise ValueError(f"scores of {name!r} must have shape [seeds, sequences, 2], got {list(scores_SN2.shape)}")
        if scores_SN2.shape != first.shape:
            shapes = f"{list(scores_SN2.shape)} and {list(first.shape)}"
            raise ValueError(f"scores of {name!r} and {first_name!r} must have one shape, got {shapes}")
        if not np.isfinite(scores_SN2).all():
            raise ValueError(f"scores of {name!r} must be finite")
        if (scores_SN2[..., 1] != first[:1, :, 1]).any():
            raise ValueError(f"tokens of {name!r} differ from those of {first_name!r}: score the same sequences")
    tokens_N = first[0, :, 1]
    if (tokens_N < 0).any() or not tokens_N.any():
        raise ValueError("numbers of tokens must be at least 0, and some above 0")
    if domain_ids_N.shape != tokens_N.shape:
        raise ValueError(f"domain ids must have shape {list(tokens_N.shape)}, got {list(domain_ids_N.shape)}")
    if not np.issubdtype(domain_ids_N.dtype, np.integer):
        raise ValueError(f"domain ids must be integers, got {domain_ids_N.dtype}")
    if domain_ids_N.min() < 0 or domain_ids_N.max() >= len(domains):
        got = f"{domain_ids_N.min()} to {domain_ids_N.max()}"
        raise ValueError(f"domain ids must lie in 0 to {len(domains) - 1}, got {got}")


def _prepare(scores: Mapping[str, Array], domain_ids_N: NDArray[np.int64], domains: tuple[str, ...]) -> _Study:
    tokens_N = next(iter(scores.values()))[0, :, 1].astype(np.float64)
    # A sequence without loss tokens says nothing: counted as one of N_k, it would make a lone sequence look certain.
    used_N = tokens_N > 0
    tokens_N = tokens_N[used_N]
    scored, ids_N, counts_K = np.unique(domain_ids_N[used_N], return_inverse=True, return_counts=True)
    tokens_K = np.bincount(ids_N, tokens_N)
    losses, influences = {}, {}
    for name, scores_SN2 in scores.items():
        sums_SN = scores_SN2[:, used_N, 0].astype(np.float64)
        losses[name] = np.stack([np.bincount(ids_N, sums_N) for sums_N in sums_SN]) / tokens_K
        influences[name] = (sums_SN - losses[name][:, ids_N] * tokens_N) / tokens_K[ids_N]
    return _Study(tuple(domains[k] for k in scored), ids_N, counts_K, losses, influences)


def _summarize(study: _Study, name: str) -> MixtureResult:
    losses_SK = study.losses[name]
    losses_K = losses_SK.mean(axis=0)
    return MixtureResult(
        name=name,
        average_loss=float(losses_K.mean()),
        average_loss_by_seed=tuple(losses_SK.mean(axis=1).tolist()),
        worst_loss=float(losses_SK.max(axis=1).mean()),
        worst_domain=study.names[int(losses_K.argmax())],
        domain_losses=dict(zip(study.names, losses_K.tolist(), strict=True)),
    )


def _example_variance(study: _Study, influences_N: Array) -> Array:
    """Returns V_k of ``compare_mixtures``, shape [K]; NaN for a domain with one sequence."""
    count_K = study.num_sequences_K
    squares_K = np.bincount(study.domain_ids_N, influences_N**2).astype(np.float64)
    squares_K *= np.divide(count_K, count_K - 1, out=np.full(len(count_K), np.nan), where=count_K > 1)
    return squares_K


def _estimate(difference_S: Array, variance_K: Array, count_K: NDArray[np.int64]) -> _Estimate:
    """Joins the seeds' part with those of the domains whose part is known (unknown as a whole when none is)."""
    known_K = ~np.isnan(variance_K)
    parts, num_seeds = variance_K[known_K], len(difference_S)
    examples = float(parts.sum()) if known_K.any() else math.nan
    spread = float((parts**2 / (count_K[known_K] - 1)).sum())
    examples_freedom = examples**2 / spread if spread > 0 else math.inf
    # One seed leaves no variance to see, which is why nothing is claimed then.
    seeds, seeds_freedom = (float(difference_S.var(ddof=1)) / num_seeds, num_seeds - 1) if num_seeds > 1 else (0.0, 1)
    return _Estimate(float(difference_S.mean()), (seeds, examples), (seeds_freedom, examples_freedom))


def _average_difference(study: _Study, mixture: str, baseline: str) -> _Estimate:
    difference_S = (study.losses[mixture] - study.losses[baseline]).mean(axis=1)
    influences_N = (study.influences[mixture] - study.influences[baseline]).mean(axis=0)
    variance_K = _example_variance(study, influences_N) / len(study.names) ** 2
    return _estimate(difference_S, variance_K, study.num_sequences_K)


def _worst_difference(study: _Study, mixture: str, baseline: str) -> _Estimate:
    worst_S, influences_SN, used = {}, {}, set[int]()
    for name in (mixture, baseline):
        losses_SK = study.losses[name]
        worst_S[name] = losses_SK.max(axis=1)
        ids_S = losses_SK.argmax(axis=1)
        influences_SN[name] = np.where(study.domain_ids_N == ids_S[:, None], study.influences[name], 0.0)
        used |= set(ids_S.tolist())
    variance_K = _example_variance(study, (influences_SN[mixture] - influences_SN[baseline]).mean(axis=0))
    ids = sorted(used)
    return _estimate(worst_S[mixture] - worst_S[baseline], variance_K[ids], study.num_sequences_K[ids])


def _compare_pair(study: _Study, mixture: str, baseline: str) -> PairedResult:
    difference_SK = study.losses[mixture] - study.losses[baseline]
    influences_N = (study.influences[mixture] - study.influences[baseline]).mean(axis=0)
    variance_K = _example_variance(study, influences_N)
    count_K = study.num_sequences_K
    domains = {
        name: _estimate(difference_SK[:, k], variance_K[k : k + 1], count_K[k : k + 1]).interval()
        for k, name in enumerate(study.names)
    }
    several = len(difference_SK) > 1
    return PairedResult(
        mixture=mixture,
        baseline=baseline,
        interval_over="seeds and examples" if several else "examples",
        average=_average_difference(study, mixture, baseline).interval(),
        worst=_worst_difference(study, mixture, baseline).interval(),
        num_better=sum(interval.estimate < 0 for interval in domains.values()),
        num_better_interval=_count_interval(difference_SK, variance_K, count_K),
        num_clearly_better=sum(several and interval.high < 0 for interval in domains.values()),
        num_clearly_worse=sum(several and interval.low > 0 for interval in domains.values()),
        domains=domains,
        num_domains=len(domains),
        seed_deviation=float(difference_SK.mean(axis=1).std(ddof=1)) if several else math.nan,
    )


def _count_interval(difference_SK: Array, variance_K: Array, count_K: NDArray[np.int64]) -> tuple[int, int]:
    """Draws the differences around their estimates; see ``num_better_interval`` in ``compare_mixtures``."""
    rng = np.random.default_rng(0)
    known_K = ~np.isnan(variance_K)
    mean_K = difference_SK.mean(axis=0)
    num_better = int((mean_K < 0).sum())
    num_seeds, num_unknown = len(difference_SK), int((~known_K).sum())
    freedom_K = count_K[known_K] - 1
    noise_RK = rng.standard_t(freedom_K, size=(COUNT_DRAWS, len(freedom_K))) * np.sqrt(variance_K[known_K])
    if num_seeds > 1:
        # Random signs and sizes of the seeds' deviations have just the covariance over domains that the seeds showed.
        deviations_SK = (difference_SK - mean_K)[:, known_K] / math.sqrt(num_seeds * (num_seeds - 1))
        scale_R1 = np.sqrt((num_seeds - 1) / rng.chisquare(num_seeds - 1, size=(COUNT_DRAWS, 1)))
        noise_RK += scale_R1 * (rng.standard_normal((COUNT_DRAWS, num_seeds)) @ deviations_SK)
    counts_R = (mean_K[known_K] + noise_RK < 0).sum(axis=1)
    low, high = (int(np.quantile(counts_R, q, method="nearest")) for q in (SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2))
    return min(low, num_better), max(high + num_unknown, num_better)


def _holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Returns the p-values adjusted for being several, by Holm's method."""
    adjusted: dict[Any, float] = {}
    highest = 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        adjusted[key] = highest
    return {key: adjusted[key] for key in p_values}


def _judge(study: _Study, candidate: str, baselines: list[str]) -> Verdict:
    """Decides on the candidate and on the best mixture; see ``compare_mixtures``."""
    mixtures = [*baselines, candidate, *(name for name in study.losses if name not in {*baselines, candidate})]
    several = len(study.losses[candidate]) > 1
    estimates = {(m, b): _average_difference(study, m, b) for m in mixtures for b in mixtures if m != b}
    p_values = _holm({base: estimates[candidate, base].p_value() for base in baselines})
    rest = [pair for pair in combinations(mixtures, 2) if not (pair[1] == candidate and pair[0] in baselines)]
    adjusted = _holm({pair: estimates[pair].p_value() for pair in rest})
    adjusted |= {(base, candidate): p for base, p in p_values.items()}
    reliable = {pair for pair, p in adjusted.items() if several and p <= SIGNIFICANCE}
    beaten = {m if estimates[m, b].estimate > 0 else b for m, b in reliable}
    best = next(name for name in mixtures if name not in beaten)
    differences = {base: estimates[candidate, base].interval() for base in baselines}
    decided = [base for base in baselines if (base, candidate) in reliable]
    if several:
        kind, sentence = _word(candidate, differences, decided, len(study.losses[candidate]))
    else:
        kind, sentence = "one_seed", _word_one_seed(candidate, differences)
        p_values = dict.fromkeys(baselines, math.nan)
    return Verdict(kind, sentence, best, p_values)


def _word(candidate: str, differences: dict[str, Interval], decided: list[str], num_seeds: int) -> tuple[Kind, str]:
    """Returns the kind of the verdict and its sentence; ``decided`` are the baselines that it reliably differs from."""
    worse = [base for base in decided if differences[base].estimate > 0]
    better = [base for base in decided if differences[base].estimate < 0]
    unclear = [base for base in differences if base not in decided]
    parts = []
    if worse:
        parts.append("is worse than " + _join([_by(base, differences[base]) for base in worse], "and"))
    if better:
        lead = "but better than " if worse else "is better than "
        parts.append(lead + _join([_by(base, differences[base]) for base in better], "and"))
    if unclear:
        lead, last = ("with no reliable difference from ", "and") if decided else ("shows no reliable gain over ", "or")
        parts.append(lead + _join([_unclear(base, differences[base]) for base in unclear], last))
    kind: Kind = "worse" if worse else "better" if not unclear else "better_than_some" if better else "no_reliable_gain"
    unit = "average held-out loss in nats per token with 95 % intervals"
    return kind, f"Over {num_seeds} seeds, {candidate} {', '.join(parts)}: {unit}."


def _word_one_seed(candidate: str, differences: dict[str, Interval]) -> str:
    listed = _join([f"{interval.estimate:+.4f} from {base}" for base, interval in differences.items()], "and")
    return (
        f"One seed cannot tell a gain from luck: {candidate} differs by {listed} in average held-out loss "
        "(nats per token); run at least 3 seeds."
    )


def _join(items: list[str], last: str) -> str:
    return f" {last} ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _by(base: str, interval: Interval) -> str:
    low, high = sorted((abs(interval.low), abs(interval.high)))
    return f"{base} by {abs(interval.estimate):.4f} ({low:.4f} to {high:.4f})"


def _unclear(base: str, interval: Interval) -> str:
    if math.isnan(interval.low):
        return f"{base} ({interval.estimate:+.4f}, no interval)"
    luck = ", which may still be luck" if interval.low * interval.high > 0 else ""
    return f"{base} ({interval.estimate:+.4f}, {interval.low:+.4f} to {interval.high:+.4f}{luck})"

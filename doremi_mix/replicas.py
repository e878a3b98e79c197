"""Rounds and seeds: the stages that are run several times over, and where each time keeps its artifacts.

A replica is one pass of reference, reference_losses and proxy.  The first one owns the folders of these names in the
run directory; the others own ``round-R-seed-S/`` with the same folders in it.  Rounds are iterated DoReMi: a round's
reference is trained on the average weights of the round before.  Seeds repeat a round with another initialization and
order of the data.  A replica is an ordinary run as far as its stages can tell: resume and fingerprints are theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from doremi_mix.config import Config
from doremi_mix.run import RunDirectory, read_json

PER_REPLICA = ("reference", "reference_losses", "proxy")
"""The stages that a replica runs, in order."""
SEED_MODULUS = 2**32


@dataclass(frozen=True, slots=True)
class Replica:
    """One pass of reference, reference_losses and proxy.

    Attributes:
        round: from 1.
        seed: from 0; added to the seeds of the configuration.
        config: of this pass.
        run: the run directory as this pass sees it.
    """

    round: int
    seed: int
    config: Config
    run: RunDirectory

    @property
    def label(self) -> str:
        """Which replica this is, as a suffix for messages; empty for the first."""
        return f" (round {self.round}, seed {self.seed})" if _folder(self.round, self.seed) else ""

    def wants(self, stage: str) -> bool:
        """Says whether a stage is this replica's own, and not the first seed's."""
        return stage != "reference" or self.seed == 0 or self.config.weights.vary_reference


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What the proxies of one round came to.

    Attributes:
        names: the domains.
        weights_RK: the average weights of each seed's proxy, shape [R, K].
        reference_weights_K: what the round's reference was trained with.
    """

    names: tuple[str, ...]
    weights_RK: NDArray[np.float64]
    reference_weights_K: NDArray[np.float64]

    @property
    def mean_of_seeds(self) -> NDArray[np.float64]:
        """The mean over seeds."""
        mean = self.weights_RK.mean(axis=0)
        return np.asarray(mean / mean.sum())

    @property
    def change(self) -> float:
        """The largest difference between the weights that came out and those that the reference was trained with."""
        return float(np.abs(self.mean_of_seeds - self.reference_weights_K).max())


def replicas_of_round(config: Config, run: RunDirectory, round_: int, before: RoundResult | None) -> list[Replica]:
    """Returns the replicas of one round, one per seed.

    Args:
        config: of the run.
        run: the run directory.
        round_: from 1.
        before: the result of the round before; None for the first round.
    """
    reference = config.reference
    if before is not None:
        weights = dict(zip(before.names, before.mean_of_seeds.tolist(), strict=True))
        reference = reference.model_copy(update={"weights": weights})
    replicas = []
    for seed in range(config.weights.num_seeds):
        own_reference = seed == 0 or config.weights.vary_reference
        proxy = config.proxy.model_copy(update={"seed": (config.proxy.seed + seed) % SEED_MODULUS})
        shift = seed if config.weights.vary_reference else 0
        own = reference.model_copy(update={"seed": (reference.seed + shift) % SEED_MODULUS})
        places = {stage: _folder(round_, seed) for stage in PER_REPLICA}
        if not own_reference:
            places["reference"] = _folder(round_, 0)
        view = run.with_places({stage: folder for stage, folder in places.items() if folder})
        replicas.append(Replica(round_, seed, config.model_copy(update={"reference": own, "proxy": proxy}), view))
    return replicas


def read_round(round_replicas: Sequence[Replica]) -> RoundResult:
    """Reads what the finished proxies of a round came to."""
    first = round_replicas[0].run
    reference_weights = read_json(first.stage_path("reference") / "weights.json")
    names = tuple(reference_weights)
    averages = [read_json(replica.run.stage_path("proxy") / "average.json") for replica in round_replicas]
    return RoundResult(
        names,
        np.array([[average[name] for name in names] for average in averages]),
        np.array([reference_weights[name] for name in names]),
    )


def is_last(config: Config, round_: int, result: RoundResult) -> bool:
    """Says whether the rounds end here: the weights no longer change, or there were enough (the paper's rule)."""
    return round_ >= config.weights.max_rounds or result.change < config.weights.round_tolerance


def rounds(config: Config, run: RunDirectory) -> Iterator[tuple[list[Replica], RoundResult | None]]:
    """Yields the rounds up to the last one, or up to the first with a proxy that has not finished (result None)."""
    before: RoundResult | None = None
    for round_ in range(1, config.weights.max_rounds + 1):
        round_replicas = replicas_of_round(config, run, round_, before)
        if not all(map(_is_readable, round_replicas)):
            yield round_replicas, None
            return
        before = read_round(round_replicas)
        yield round_replicas, before
        if is_last(config, round_, before):
            return


def replicas(config: Config, run: RunDirectory) -> Iterator[Replica]:
    """Yields the replicas of all rounds that are known by now."""
    for round_replicas, _ in rounds(config, run):
        yield from round_replicas


def _is_readable(replica: Replica) -> bool:
    """Says whether a replica's proxy has finished, over the reference that is there now."""
    weights = replica.run.stage_path("reference") / "weights.json"
    average = replica.run.stage_path("proxy") / "average.json"
    if replica.run.manifest("proxy") is None or not (weights.exists() and average.exists()):
        return False
    return bool(read_json(weights).keys() == read_json(average).keys())


def _folder(round_: int, seed: int) -> str:
    return "" if (round_, seed) == (1, 0) else f"round-{round_}-seed-{seed}"

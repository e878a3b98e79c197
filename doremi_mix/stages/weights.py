"""Stage weights: the mean over seeds of the average of the trajectory, in every unit, with where it came from.

Writes ``domain_weights.json`` (the product: see ``types.DomainWeights``), ``diagnostics.json``, ``weights.png`` and
``trajectory.png``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import doremi_mix
from doremi_mix.atomic import write_json
from doremi_mix.config import Config
from doremi_mix.conversions import to_token_shares
from doremi_mix.diagnostics import Diagnosis, diagnose
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.fingerprints import rows_stage
from doremi_mix.mixture import natural_weights, temperature_weights, uniform_weights
from doremi_mix.replicas import Replica, rounds
from doremi_mix.report.plots import plot_trajectory, plot_weights
from doremi_mix.run import RunDirectory, read_json
from doremi_mix.shrinkage import cap_weights, shrink_by_evidence, shrink_weights
from doremi_mix.stages import StageContext
from doremi_mix.stages.load import read_summary
from doremi_mix.stages.training import available_tokens, open_store, read_columns, weight_caps
from doremi_mix.store import TokenStore
from doremi_mix.types import DomainLoss, DomainStatistics
from doremi_mix.uncertainty import summarize_seeds
from doremi_mix.weight_files import match_domains
from doremi_mix.weight_files import read_weights as read_weight_file

WEIGHTS_FILE = "domain_weights.json"
DIAGNOSTICS_FILE = "diagnostics.json"
COLUMNS = ("domain_weights", "excess_loss", "unclipped_excess_loss", "proxy_loss", "reference_loss")


def run(context: StageContext) -> str:
    """Writes the weights and their pictures; returns one line about them."""
    config = context.config
    store = open_store(context.run)
    names = store.domains.names
    finished = [(replicas, result) for replicas, result in rounds(config, context.run) if result is not None]
    replicas, last = finished[-1]
    weights_RK, strength = pull_and_cap(config, store, last.weights_RK)
    seeds = summarize_seeds(names, weights_RK)
    learned = dict(seeds.mean)
    by_seed = [diagnose_replica(replica, store) for replica in replicas]
    first = replicas[0]
    weights = DomainWeights(
        domain_weights=learned,
        reference_weights=read_json(first.run.stage_path("reference") / "weights.json"),
        shares=_shares(learned, store),
        method=config.proxy.method,
        settings={
            section: getattr(config, section).result_settings()
            for section in ("tokenize", "reference", "proxy", "weights")
        },
        tokenizer={
            key: value
            for key, value in read_json(context.run.stage_path("tokenize") / "tokenizer.json").items()
            if key in ("name", "sha256")
        },
        provenance=_provenance(context.config, context.run),
        intervals=dict(seeds.intervals),
        corpus=corpus_of(context.run, store),
        uncertainty={
            "num_seeds": seeds.num_seeds,
            "standard_deviation": dict(seeds.standard_deviation),
            "rank_stability": seeds.rank_stability,
            "rounds": [result.change for _, result in finished],
            "shrink": strength,
        },
        diagnoses=tuple(_sentences(by_seed)),
    )
    write_json(context.folder / WEIGHTS_FILE, weights.to_dict())
    write_json(context.folder / DIAGNOSTICS_FILE, [[asdict(found) for found in of_seed] for of_seed in by_seed])
    _draw(context, store, first, weights)
    for sentence in weights.diagnoses:
        context.narrator.say(f"  {sentence}")
    return f"written to {context.run.stage_path('weights') / WEIGHTS_FILE}"


def pull_and_cap(
    config: Config, store: TokenStore, weights_RK: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Pulls each seed's weights toward a plain mixture, then keeps them under what the token budget can use.

    Returns:
        The weights of each seed, shape [R, K], and the strength of the pull.
    """
    settings = config.weights
    available = available_tokens(store)
    plain = natural_weights(available) if settings.shrink_toward == "natural" else uniform_weights(available)
    target_K = torch.tensor(list(plain.values()), dtype=torch.float64)
    learned_RK = torch.from_numpy(weights_RK)
    by_evidence = settings.shrink == "evidence"
    strength = float(shrink_by_evidence(learned_RK, target_K)[1]) if by_evidence else float(settings.shrink or 0)
    pulled = [shrink_weights(weights_K, target_K, strength, kind=settings.shrink_kind) for weights_K in learned_RK]
    caps_K = weight_caps(config, store)
    if caps_K is not None:
        pulled = [cap_weights(weights_K, caps_K) for weights_K in pulled]
    return torch.stack(pulled).numpy(), strength


def diagnose_replica(replica: Replica, store: TokenStore) -> tuple[Diagnosis, ...]:
    """Looks for what is wrong with one proxy and its reference."""
    names = store.domains.names
    proxy = replica.run.stage_path("proxy")
    path = read_columns(proxy / "trajectory.jsonl", names, COLUMNS)
    average = read_json(proxy / "average.json")
    section = replica.config.proxy
    assert section.batch_size
    return diagnose(
        names,
        weights_SK=path["domain_weights"],
        excess_SK=path["excess_loss"],
        unclipped_SK=path["unclipped_excess_loss"],
        proxy_loss_SK=path["proxy_loss"],
        reference_loss_SK=path["reference_loss"],
        average_weights_K=np.array([average[name] for name in names]),
        num_sequences_K=np.array([store.num_sequences(i) for i in range(len(names))]),
        batch_size=section.batch_size,
        reference_held_out=_held_out(replica.run, "reference"),
        proxy_held_out=_held_out(replica.run, "proxy"),
        smoothing=section.smoothing,
        method=section.method,
    )


def _held_out(run: RunDirectory, stage: str) -> dict[str, DomainLoss]:
    losses = read_json(run.stage_path(stage) / "metrics.json")["held_out_loss"]
    return {
        name: DomainLoss(
            math.nan if loss["loss"] is None else loss["loss"],
            math.nan if loss["standard_error"] is None else loss["standard_error"],
            loss["num_tokens"],
            loss["num_sequences"],
        )
        for name, loss in losses.items()
    }


def _sentences(by_seed: Sequence[Sequence[Diagnosis]]) -> list[str]:
    """Returns the findings of the first seed, then others' of kinds that it has not, with how many seeds have them."""
    counts = Counter(code for of_seed in by_seed for code in {found.code for found in of_seed})
    shown: list[Diagnosis] = []
    for of_seed in by_seed:
        known = {found.code for found in shown}
        shown += [found for found in of_seed if found.code not in known]
    if len(by_seed) == 1:
        return [found.sentence for found in shown]
    return [f"{found.sentence} (in {counts[found.code]} of {len(by_seed)} seeds)" for found in shown]


def _draw(context: StageContext, store: TokenStore, first: Replica, weights: DomainWeights) -> None:
    """Draws the weights, and the first seed's path to them."""
    names = store.domains.names
    path = read_columns(first.run.stage_path("proxy") / "trajectory.jsonl", names, ["domain_weights"])
    average = read_json(first.run.stage_path("proxy") / "average.json")
    natural = natural_weights(available_tokens(store))
    plot_weights(
        context.folder / "weights.png",
        names,
        natural=[natural[name] for name in names],
        learned=[weights[name] for name in names],
        uniform=1 / len(names),
        intervals=[weights.intervals[name] for name in names] if weights.intervals else None,
    )
    weights_TK = path["domain_weights"]
    average_K = np.array([average[name] for name in names])
    plot_trajectory(context.folder / "trajectory.png", names, np.arange(1, len(weights_TK) + 1), weights_TK, average_K)


def read_weights(run: RunDirectory) -> DomainWeights:
    """Returns what the stage wrote."""
    return DomainWeights.from_dict(read_json(run.stage_path("weights") / WEIGHTS_FILE))


def plain_weights(name: str, available: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Returns the weights of a plain mixture by its name."""
    if name == "natural":
        return natural_weights(available)
    return uniform_weights(available) if name == "uniform" else temperature_weights(available, temperature)


def weights_from(
    path: Path,
    names: Sequence[str],
    say: Callable[[str], None] | None = None,
    mean_tokens: Mapping[str, float] | None = None,
) -> Mapping[str, float]:
    """Reads domain weights from a file: ours, or one of another program (see ``weight_files``), in any unit.

    Args:
        path: the file.
        names: the domains of the run.
        say: is told how a file of another program was read, line by line.
        mean_tokens: of an example of each domain, by which shares of examples become shares of tokens.

    Returns:
        Weights in the order of the domains; they sum to 1.

    Raises:
        DataError: the file is missing, holds no domain weights, or has not the weights of these domains.
    """
    read = read_weight_file(path)
    weights = match_domains(read.weights, names, path)
    if read.unit == "examples" and mean_tokens is not None:
        weights = to_token_shares(weights, mean_tokens)
    if say is not None:
        for notice in read.notices:
            say(f"  {path}: {notice}")
    return weights


def _shares(learned: Mapping[str, float], store: TokenStore) -> dict[str, dict[str, float]]:
    """Returns the same mixture as shares of tokens, of packed sequences and of examples.

    A domain's share of examples is its share of tokens over its mean tokens per example, normalized; likewise for
    sequences.
    """

    def in_units_of(tokens_per_unit: Mapping[str, float]) -> dict[str, float]:
        raw = {name: weight / tokens_per_unit[name] for name, weight in learned.items()}
        total = sum(raw.values())
        return {name: value / total for name, value in raw.items()}

    return {
        "token": dict(learned),
        "sequence": in_units_of({s["name"]: s["train"]["tokens"] / s["train"]["sequences"] for s in store.summaries}),
        "example": in_units_of(mean_tokens(store)),
    }


def mean_tokens(store: TokenStore) -> dict[str, float]:
    """Returns mean tokens of an example by domain."""
    return {s["name"]: s["available_tokens"] / s["train"]["documents"] for s in store.summaries}


def corpus_of(run: RunDirectory, store: TokenStore) -> dict[str, DomainStatistics]:
    """Returns what there is of each domain; its file is the one that was loaded, whatever was filtered since."""
    sources = {domain["domain"]: domain for domain in read_summary(run.stage_path("load"))}
    return {
        summary["name"]: DomainStatistics(
            num_examples=summary["train"]["documents"],
            available_tokens=summary["available_tokens"],
            num_sequences=summary["train"]["sequences"],
            path=sources[summary["name"]]["path"],
            num_rows=sources[summary["name"]]["num_rows"],
        )
        for summary in store.summaries
    }


def _provenance(config: Config, run: RunDirectory) -> dict[str, object]:
    import torch
    import transformers

    return {
        "doremi_mix": doremi_mix.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "inputs": {
            domain["domain"]: {
                "sha256": domain["sha256"],
                "num_rows": domain["num_rows"],
                "num_kept": domain["num_kept"],
            }
            for domain in read_summary(run.stage_path(rows_stage(config)))
        },
    }

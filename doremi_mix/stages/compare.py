"""Stage compare: train fresh small models on the learned mixture and on plain ones, and say whether it helps.

Every mixture gets the same token budget, epoch cap, steps, seeds, initialization and plain training (no group DRO).
Writes ``results.json`` (losses, paired intervals, verdict), ``comparison.png``, and a folder per mixture and seed with
its ``metrics.jsonl`` and ``scores.npy`` (loss and tokens of each held-out sequence).  The verdict also goes into
``weights/domain_weights.json``, so that it travels with the weights.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doremi_mix.atomic import write_atomic, write_json
from doremi_mix.batches import Schedule
from doremi_mix.checkpoints import CHECKPOINT
from doremi_mix.comparison import Comparison, compare_mixtures
from doremi_mix.config import CompareConfig, Config
from doremi_mix.errors import BudgetError
from doremi_mix.mixture import allocate
from doremi_mix.models import forget_base
from doremi_mix.objectives import PlainObjective
from doremi_mix.power import minimum_detectable_difference
from doremi_mix.replicas import SEED_MODULUS
from doremi_mix.report.comparison_plot import plot_comparison
from doremi_mix.run import RunDirectory, read_json
from doremi_mix.stages import StageContext, free_memory
from doremi_mix.stages.training import (
    available_tokens,
    held_out_ids,
    open_store,
    score_held_out,
    sequence_ids,
    train_model,
)
from doremi_mix.stages.weights import WEIGHTS_FILE, mean_tokens, plain_weights, read_weights, weights_from
from doremi_mix.store import TokenStore
from doremi_mix.types import Allocation

RESULTS_FILE = "results.json"
SCORES_FILE = "scores.npy"
BASELINES = ("natural", "uniform", "temperature")


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """What one mixture gives a small model to train on.

    Attributes:
        allocation: tokens by domain, as the small model sees them (cut at its context length).
        num_sequences_K: packed sequences to draw from each domain.
        num_steps: the same for every mixture.
    """

    allocation: Allocation
    num_sequences_K: NDArray[np.int64]
    num_steps: int


def run(context: StageContext) -> str:
    """Trains and compares; returns the verdict."""
    config, section = context.config, context.config.compare
    store = open_store(context.run)
    mixtures = entrants(config, context.run, store, context.narrator.say)
    assert section.token_budget is not None
    budget = section.token_budget
    if config.mixture.token_budget is None and config.proxy.token_budget is None:
        # Nobody asked for a number: no more than there is.
        budget = min(budget, sum(summary["train"]["tokens"] for summary in store.summaries))
    seeds = [(section.seed + number) % SEED_MODULUS for number in range(section.num_seeds)]
    context.narrator.say(
        f"  {len(mixtures)} mixtures x {len(seeds)} seeds, {budget:,} tokens each: {', '.join(mixtures)}"
    )
    scores: dict[str, NDArray[np.float64]] = {}
    allocations: dict[str, Allocation] = {}
    try:
        # Seed after seed, so that what an interrupted comparison has is balanced.
        for seed in seeds:
            ids_by_domain, available = _available(config, store, budget, seed)
            # All before the first is trained: one that the budget is too large for should not cost hours.
            planned = {
                name: plan_training_set(config, store, name, weights, available, ids_by_domain, budget)
                for name, weights in mixtures.items()
            }
            allocations = allocations or {name: one.allocation for name, one in planned.items()}
            for name, training_set in planned.items():
                _train_one(context, store, f"{name}/seed-{seed}", seed, training_set, ids_by_domain)
    finally:
        forget_base()
    if not context.processes.is_main:
        return ""
    for name in mixtures:
        scores[name] = np.stack([np.load(context.folder / f"{name}/seed-{seed}" / SCORES_FILE) for seed in seeds])
    compared = compare_mixtures(scores, store.domain_ids(held_out_ids(store)), store.domains.names, baselines=BASELINES)
    write_json(context.folder / RESULTS_FILE, _describe(compared, mixtures, allocations, budget, seeds, section))
    plot_comparison(context.folder / "comparison.png", compared)
    restore_verdict(context.run)
    return compared.verdict.sentence


def entrants(
    config: Config, run: RunDirectory, store: TokenStore, say: Callable[[str], None] | None = None
) -> dict[str, Mapping[str, float]]:
    """Returns the mixtures to compare: learned, the plain ones, and those that the user enters.

    How the files of other programs were read goes to ``say``.

    Raises:
        DataError: a file holds no domain weights for these domains.
    """
    available = available_tokens(store)
    mixtures: dict[str, Mapping[str, float]] = {"learned": read_weights(run).domain_weights}
    for name in BASELINES:
        mixtures[name] = plain_weights(name, available, config.compare.temperature)
    for name, path in config.compare.also.items():
        mixtures[name] = weights_from(Path(path), store.domains.names, say, mean_tokens(store))
    return mixtures


def _available(
    config: Config, store: TokenStore, budget: int, seed: int
) -> tuple[list[NDArray[np.int64]], dict[str, int]]:
    """Returns the sequences of each domain that a comparison may use, and their tokens.

    Under a budget smaller than the mixture's, domains are cut in the same ratio: what is repeated four times there is
    repeated four times here.
    """
    whole = sequence_ids(store, "train")
    ratio = min(1.0, budget / (config.mixture.token_budget or config.proxy.token_budget or budget))
    ids_by_domain = []
    available = {}
    for domain_id, (name, ids) in enumerate(zip(store.domains, whole, strict=True)):
        order = np.random.default_rng([seed, 3, domain_id]).permutation(ids)
        ids_by_domain.append(np.sort(order[: max(1, round(ratio * len(ids)))]))
        tokens = store.summaries[domain_id]["train"]["tokens"]
        available[name] = max(1, round(tokens * len(ids_by_domain[-1]) / len(ids)))
    return ids_by_domain, available


def plan_training_set(
    config: Config,
    store: TokenStore,
    name: str,
    weights: Mapping[str, float],
    available: Mapping[str, int],
    ids_by_domain: list[NDArray[np.int64]],
    budget: int,
) -> TrainingSet:
    """Turns weights into packed sequences: the budget under the epoch cap, in tokens as the small model sees them.

    Raises:
        BudgetError: the domains to which the mixture gives a weight cannot fill the budget.
    """
    section = config.compare
    assert section.batch_size
    try:
        allocation = allocate(weights, available, budget, config.mixture.max_epochs)
    except BudgetError as error:
        raise BudgetError(f"compare: mixture {name!r}: {error}") from None
    num_sequences_K = np.array(
        [round(allocation.epochs(domain) * len(ids)) for domain, ids in zip(store.domains, ids_by_domain, strict=True)]
    )
    # The same number of steps for all: mixtures whose sequences are less full have a few more in each batch.
    per_sequence = sum(available.values()) / sum(len(ids) for ids in ids_by_domain)
    num_steps = max(1, round(budget / per_sequence / section.batch_size))
    return TrainingSet(allocation, num_sequences_K, min(num_steps, int(num_sequences_K.sum())))


def _train_one(
    context: StageContext,
    store: TokenStore,
    part: str,
    seed: int,
    planned: TrainingSet,
    ids_by_domain: list[NDArray[np.int64]],
) -> None:
    """Trains one model and scores the held-out sequences, unless an earlier process did."""
    folder = context.folder / part
    # One process looks: the others may see a shared folder later.
    if context.processes.from_main("done" if (folder / SCORES_FILE).exists() else "") == "done":
        if context.processes.is_main:
            (folder / CHECKPOINT).unlink(missing_ok=True)
        return
    section = context.config.compare.model_copy(update={"seed": seed, "steps": planned.num_steps})
    schedule = Schedule.of_totals(ids_by_domain, planned.num_sequences_K, planned.num_steps, seed)
    model, accelerator = train_model(context, section, PlainObjective(), schedule, part=part)
    scores_N2 = score_held_out(store, model, accelerator)
    if context.processes.is_main:
        _save_array(folder / SCORES_FILE, scores_N2)
        (folder / CHECKPOINT).unlink(missing_ok=True)
    context.processes.wait()
    # Accelerate holds on to the models that it has prepared.
    del model, accelerator
    free_memory()


def _save_array(path: Path, array: NDArray[np.float64]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomic(path, buffer.getvalue())


def _describe(
    compared: Comparison,
    mixtures: Mapping[str, Mapping[str, float]],
    allocations: Mapping[str, Allocation],
    budget: int,
    seeds: list[int],
    section: CompareConfig,
) -> dict[str, Any]:
    return {
        "unit": "nats per token, held out; average and worst over domains",
        "token_budget": budget,
        "seeds": seeds,
        "model": section.model,
        "mixtures": {
            name: {
                **compared.mixtures[name].to_dict(),
                "weights": dict(weights),
                "tokens": dict(allocations[name].tokens),
                "capped_domains": list(allocations[name].capped),
            }
            for name, weights in mixtures.items()
        },
        "pairs": [pair.to_dict() for pair in compared.pairs],
        "detectable_difference": _detectable(compared),
        "verdict": compared.verdict.sentence,
        "verdict_kind": compared.verdict.kind,
        "best": compared.verdict.best,
    }


def _detectable(compared: Comparison) -> dict[str, float]:
    """Returns, by mixture, the true difference from the learned one that so many seeds find four times in five."""
    if compared.num_seeds < 2:
        return {}
    return {
        pair.baseline: minimum_detectable_difference(pair.seed_deviation, compared.num_seeds)
        for pair in compared.pairs
        if pair.mixture == "learned"
    }


def restore_verdict(run: RunDirectory) -> None:
    """Writes the verdict into the weights, so that whoever gets the file sees it."""
    results = read_json(run.stage_path("compare") / RESULTS_FILE)
    path = run.stage_path("weights") / WEIGHTS_FILE
    data = read_json(path)
    verdict = {
        "kind": results["verdict_kind"],
        "sentence": results["verdict"],
        "best": results["best"],
        "num_seeds": len(results["seeds"]),
    }
    if data.get("verdict") != verdict:
        write_json(path, {**data, "verdict": verdict})
        # Exports carry it, too: they are written anew.
        run.outdate("export")

"""Stage reference: train the reference model on the reference weights, then freeze it; with folds, one for each.

Writes ``model/``, ``metrics.jsonl`` (loss and throughput of each step), ``weights.json`` (the reference weights),
``metrics.json`` (held-out loss per domain) and ``folds.json`` (how many folds there are, and why).  With two folds or
more, each has its model, log and metrics in ``fold-1/``, ``fold-2/``, ..., and ``metrics.json`` has their averages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from doremi_mix.atomic import write_json
from doremi_mix.batches import Schedule
from doremi_mix.checkpoints import CHECKPOINT
from doremi_mix.errors import ConfigError
from doremi_mix.folds import Folds, choose_folds, fold_names
from doremi_mix.objectives import PlainObjective
from doremi_mix.run import read_json
from doremi_mix.stages import StageContext, free_memory
from doremi_mix.stages.training import (
    make_schedule,
    open_store,
    reference_weights,
    sequence_ids,
    train_and_score,
    write_metrics,
)
from doremi_mix.store import TokenStore

METRICS = "metrics.json"


def run(context: StageContext) -> str:
    """Trains the reference model, or that of each fold; returns one line about it."""
    section = context.config.reference
    store = open_store(context.run)
    weights = reference_weights(context.config, store)
    schedule = make_schedule(store, weights, section)
    num_folds, reason = _decide(context, store, schedule)
    folds = Folds(sequence_ids(store, "train"), num_folds, section.seed)
    _explain(context, store, folds, reason)
    parts = fold_names(num_folds)
    for fold, part in enumerate(parts):
        if num_folds > 1:
            schedule = make_schedule(store, weights, section, folds.training_ids(fold))
        _train(context, store, schedule, part)
    if not context.processes.is_main:
        return ""
    write_json(context.folder / "weights.json", weights)
    unsplit = [store.domains.names[domain_id] for domain_id in folds.unsplit]
    # The seed makes the same split again.
    made = {"num_folds": num_folds, "reason": reason, "seed": section.seed, "not_cross_fitted": unsplit}
    write_json(context.folder / "folds.json", made)
    if num_folds > 1:
        metrics = average_metrics({part: read_json(context.folder / part / METRICS) for part in parts})
        write_json(context.folder / METRICS, metrics)
    average = read_json(context.folder / METRICS)["held_out_loss_average"]
    if average is None:
        return "no domain has held-out examples to measure a loss on"
    over = f"domains and {num_folds} folds" if num_folds > 1 else "domains"
    return f"held-out loss {average:.3f} nats per token, average over {over}"


def average_metrics(by_fold: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the metrics of a stage from those of its folds' models.

    Losses, standard errors and epochs are averages.  All models are scored on the same held-out sequences, whose luck
    they share, so the error of the average loss is hardly smaller than theirs, and never larger than their average.

    Args:
        by_fold: what ``write_metrics`` wrote, by the fold's name.
    """
    every = list(by_fold.values())

    def of_domain(name: str) -> dict[str, Any]:
        losses = [metrics["held_out_loss"][name] for metrics in every]
        averages = {key: _mean([loss[key] for loss in losses]) for key in ("loss", "standard_error")}
        return {**losses[0], **averages}

    return {
        **every[-1],
        "held_out_loss_average": _mean([metrics["held_out_loss_average"] for metrics in every]),
        "held_out_loss": {name: of_domain(name) for name in every[0]["held_out_loss"]},
        "epochs": {name: _mean([metrics["epochs"][name] for metrics in every]) for name in every[0]["epochs"]},
        "folds": {
            fold: {key: metrics[key] for key in ("held_out_loss_average", "held_out_loss", "epochs")}
            for fold, metrics in by_fold.items()
        },
    }


def _decide(context: StageContext, store: TokenStore, schedule: Schedule) -> tuple[int, str]:
    """Returns the number of folds, and why.

    Raises:
        ConfigError: no domain has as many sequences.
    """
    num_sequences = {name: store.num_sequences(domain_id) for domain_id, name in enumerate(store.domains)}
    epochs = dict(zip(store.domains, schedule.epochs().tolist(), strict=True))
    num_folds, reason = choose_folds(context.config.reference.folds, epochs, num_sequences)
    largest = max(num_sequences, key=num_sequences.__getitem__)
    most = num_sequences[largest]
    if num_folds > most:
        raise ConfigError(
            f"reference.folds is {num_folds}, more than the {most:,} training sequences of the largest domain, "
            f"{largest}; lower it to {most} or less"
        )
    return num_folds, reason


def _explain(context: StageContext, store: TokenStore, folds: Folds, reason: str) -> None:
    """Says whether there are folds, why, and what they cost."""
    section = context.config.reference
    if folds.num_folds == 1:
        if section.folds is None:
            context.narrator.say(f"  one reference scores all that the proxy draws, not cross-fitted: {reason}")
        return
    context.narrator.say(
        f"  cross-fitting in {folds.num_folds} folds: {reason}; {folds.num_folds} references of {section.steps:,} "
        "steps are trained instead of 1"
    )
    if folds.unsplit:
        names = ", ".join(f"{store.domains.names[i]} ({store.num_sequences(i)})" for i in folds.unsplit)
        context.narrator.say(
            f"  too few sequences for {folds.num_folds} folds: {names}; every reference trains on all of them, so "
            "their losses are not cross-fitted"
        )


def _train(context: StageContext, store: TokenStore, schedule: Schedule, part: str) -> None:
    """Trains one reference, unless it is a fold's that an earlier process finished."""
    folder = context.folder / part
    # A fold's metrics are its last file.  One process looks: the others may see a shared folder later.
    done = context.processes.from_main("done" if part and (folder / METRICS).exists() else "") == "done"
    if not done:
        model, losses = train_and_score(context, context.config.reference, PlainObjective(), schedule, part=part)
        if context.processes.is_main:
            write_metrics(context, losses, schedule, store.domains, model, part)
        del model
        if part:
            free_memory()
    if part and context.processes.is_main:
        # It is of no more use, and the next fold's needs the room.
        (folder / CHECKPOINT).unlink(missing_ok=True)


def _mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean; None, which stands for NaN in JSON, when a value is missing."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(values) if len(known) == len(values) else None

"""Stage reference: train the reference model on the reference weights, then freeze it.

Writes ``model/``, ``metrics.jsonl`` (loss and throughput of each step), ``weights.json`` (the reference weights) and
``metrics.json`` (held-out loss per domain).
"""

from __future__ import annotations

from doremi_mix.objectives import PlainObjective
from doremi_mix.run import write_json
from doremi_mix.stages import StageContext
from doremi_mix.stages.training import (
    make_schedule,
    open_store,
    reference_weights,
    train_and_score,
    write_metrics,
)


def run(context: StageContext) -> str:
    """Trains the reference model; returns one line about it."""
    section = context.config.reference
    store = open_store(context.run)
    weights = reference_weights(context.config, store)
    schedule = make_schedule(store, weights, section)
    model, losses = train_and_score(context, section, PlainObjective(), schedule)
    if context.processes.is_main:
        write_json(context.folder / "weights.json", weights)
        average = write_metrics(context, losses, schedule, store.domains, model)
        if not losses:
            return "no domain has held-out examples to measure a loss on"
        return f"held-out loss {average:.3f} nats per token, average over domains"
    return ""

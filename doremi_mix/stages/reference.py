"""Stage reference: train the reference model on the reference weights, then freeze it.

Writes ``model/``, ``training.jsonl`` (step, loss), ``weights.json`` (the reference weights) and ``metrics.json``
(held-out loss per domain).
"""

from __future__ import annotations

from doremi_mix.models import build_model, num_parameters
from doremi_mix.objectives import PlainObjective
from doremi_mix.run import write_json
from doremi_mix.stages import StageContext
from doremi_mix.stages.training import (
    held_out_losses,
    make_schedule,
    open_store,
    reference_weights,
    save_model,
    token_info,
    train_model,
    write_metrics,
)


def run(context: StageContext) -> str:
    """Trains the reference model; returns one line about it."""
    section = context.config.reference
    store = open_store(context.run)
    weights = reference_weights(context.config, store)
    schedule = make_schedule(store, weights, section)
    model = build_model(
        str(section.model),
        token_info(context.run),
        store.context_length,
        section.seed,
        trust_remote_code=section.trust_remote_code,
    )
    accelerator = train_model(context, section, model, PlainObjective(), schedule, "training.jsonl")
    save_model(model, context.folder, accelerator)
    losses = held_out_losses(store, model, accelerator)
    if context.processes.is_main:
        write_json(context.folder / "weights.json", weights)
        average = write_metrics(context.folder / "metrics.json", losses, schedule, store.domains, num_parameters(model))
        return f"held-out loss {average:.3f} nats per token, average over domains"
    return ""

"""Stage proxy: train the proxy model, whose losses against the reference model's become domain weights.

Writes ``trajectory.jsonl`` (one line per update, see ``types.TrajectoryPoint``), ``metrics.jsonl`` (loss and throughput
of each step), ``average.json`` (what was learned: for group DRO the mean of alpha_1 to alpha_T), ``model/`` and
``metrics.json`` (held-out loss per domain).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from doremi_mix.atomic import write_json
from doremi_mix.config import Config
from doremi_mix.dro import GroupDRO
from doremi_mix.engine import make_accelerator
from doremi_mix.headroom import Headroom
from doremi_mix.models import forget_base
from doremi_mix.objectives import Learner, ProxyObjective
from doremi_mix.run import read_json
from doremi_mix.stages import StageContext
from doremi_mix.stages.reference_losses import ReferenceLosses
from doremi_mix.stages.training import (
    open_store,
    proxy_schedule,
    train_and_score,
    weight_caps,
    write_metrics,
)
from doremi_mix.store import TokenStore
from doremi_mix.types import DomainLoss, Domains


def run(context: StageContext) -> str:
    """Trains the proxy model; returns one line about it."""
    section = context.config.proxy
    store = open_store(context.run)
    schedule = proxy_schedule(context.config, store)
    objective = ProxyObjective(store.domains, _learner(context.config, store))
    cached = ReferenceLosses(context.run.stage_path("reference_losses"))
    try:
        model, losses = train_and_score(context, section, objective, schedule, cached.read)
    finally:
        # No later stage needs the base of adapters.
        forget_base()
    if context.processes.is_main:
        average_K = _learned(context, objective, losses, store.domains).tolist()
        write_json(context.folder / "average.json", dict(zip(store.domains, average_K, strict=True)))
        write_metrics(context, losses, schedule, store.domains, model)
        top = max(range(len(average_K)), key=average_K.__getitem__)
        return f"largest weight {average_K[top]:.3f} on {store.domains.names[top]}"
    return ""


def _learner(config: Config, store: TokenStore) -> Learner:
    """Returns the rule that the settings ask for."""
    section = config.proxy
    if section.method == "headroom":
        return Headroom(power=section.power, smoothing=section.smoothing)
    caps_K = weight_caps(config, store)
    if caps_K is not None:
        # Once, and not in each step: a copy from the host waits for the device.
        caps_K = caps_K.to(make_accelerator().device)
    return GroupDRO(step_size=section.step_size, smoothing=section.smoothing, max_weights_K=caps_K)


def _learned(
    context: StageContext, objective: ProxyObjective, losses: Mapping[str, DomainLoss], domains: Domains
) -> Tensor:
    """Returns the weights; headroom of domains that the reference repeats is taken from held-out text."""
    learner = objective.learner
    if not isinstance(learner, Headroom):
        return objective.result()
    reference = read_json(context.run.stage_path("reference") / "metrics.json")
    if read_json(context.run.stage_path("reference") / "folds.json")["num_folds"] > 1:
        return objective.result()  # cross-fitted losses are those of text that the reference was not trained on
    repeated = {
        name: losses[name].loss - reference["held_out_loss"][name]["loss"]
        for name, epochs in reference["epochs"].items()
        if epochs > 1 and name in losses and losses[name].num_tokens
    }
    if repeated:
        context.narrator.say(
            f"  headroom measured on held-out text, because the reference repeats them: {', '.join(repeated)}"
        )
    return learner.corrected(objective.learned, {domains.index(name): loss for name, loss in repeated.items()})

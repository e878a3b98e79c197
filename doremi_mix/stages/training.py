"""What the stages reference, reference_losses and proxy share: their model, schedule, and held-out losses."""

from __future__ import annotations

import json
import math
import re
import shutil
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from doremi_mix.adapters import num_trainable_parameters
from doremi_mix.atomic import write_json
from doremi_mix.batches import Schedule
from doremi_mix.checkpoints import whole_state
from doremi_mix.config import Config, ReferenceConfig, TrainingConfig
from doremi_mix.engine import EngineSettings, is_sharded, to_device, with_host_facts
from doremi_mix.errors import BudgetError
from doremi_mix.evaluation import score_sequences, summarize_losses
from doremi_mix.folds import Folds
from doremi_mix.mixture import natural_weights, uniform_weights
from doremi_mix.models import TokenInfo, TokenLossModel, load_trained, num_parameters, save_model, undo_compile
from doremi_mix.objectives import MicroBatch, Objective, counted, forward
from doremi_mix.plan import accumulation, base_dtype, new_model
from doremi_mix.run import RunDirectory, read_json
from doremi_mix.shrinkage import max_weights
from doremi_mix.stages import StageContext
from doremi_mix.store import Split, TokenStore
from doremi_mix.tracking import TrackingSettings, open_trackers
from doremi_mix.train import TrainingPlan, load_batch, train
from doremi_mix.types import DomainLoss, Domains

OTHER_ORDER = 0x9E3779B9
"""Makes of a seed, bit by bit, one that nobody types."""
SCORE_TOKENS = 16_384
"""Tokens in one forward pass without gradient."""


def open_store(run: RunDirectory) -> TokenStore:
    """Opens what the tokenize stage wrote."""
    return TokenStore(run.stage_path("tokenize"))


def token_info(run: RunDirectory) -> TokenInfo:
    """Returns what a model must know of the run's tokenizer."""
    tokenizer = read_json(run.stage_path("tokenize") / "tokenizer.json")
    return TokenInfo(tokenizer["vocab_size"], tokenizer["end_id"], tokenizer["pad_id"])


def available_tokens(store: TokenStore) -> dict[str, int]:
    """Returns what one pass over each domain's training examples gives to a token budget."""
    return dict(zip(store.domains, store.available_tokens, strict=True))


def sequence_ids(store: TokenStore, split: Split) -> list[NDArray[np.int64]]:
    """Returns the ids of each domain's sequences in a split."""
    ranges = [store.sequence_ids(domain_id, split) for domain_id in range(len(store.domains))]
    return [np.arange(ids.start, ids.stop) for ids in ranges]


def reference_weights(config: Config, store: TokenStore) -> dict[str, float]:
    """Returns what the reference model is trained with, by domain; sums to 1."""
    wanted = config.reference.weights
    names = store.domains.names
    if wanted == "natural":
        return natural_weights(available_tokens(store))
    if wanted == "uniform":
        return uniform_weights(names)
    assert isinstance(wanted, dict)
    total = math.fsum(wanted.values())
    return {name: wanted[name] / total for name in names}


def weight_caps(config: Config, store: TokenStore) -> Tensor | None:
    """Returns the largest weight of each domain that the token budget can use, shape [K]; None without a budget.

    Raises:
        BudgetError: all domains together cannot fill it.
    """
    budget = config.proxy.token_budget
    if budget is None:
        return None
    most = int(config.mixture.max_epochs * sum(store.available_tokens))
    if budget > most:
        raise BudgetError(
            f"proxy.token_budget is {budget:,}, more than the {most:,} tokens of all domains, each drawn at most "
            f"{config.mixture.max_epochs:g} times; lower it or raise mixture.max_epochs"
        )
    return max_weights(torch.tensor(store.available_tokens), budget, config.mixture.max_epochs)


def make_schedule(
    store: TokenStore,
    weights: dict[str, float],
    section: TrainingConfig,
    ids_by_domain: list[NDArray[np.int64]] | None = None,
) -> Schedule:
    """Plans which sequences a training run draws: of some for each domain, or of all that are not held out."""
    assert section.batch_size and section.steps
    weights_K = np.array([weights[name] for name in store.domains])
    if ids_by_domain is None:
        ids_by_domain = sequence_ids(store, "train")
    return Schedule(ids_by_domain, weights_K, section.batch_size, section.steps, section.seed)


def proxy_schedule(config: Config, store: TokenStore) -> Schedule:
    """Plans the proxy's draws: for group DRO uniform over domains, every domain in every batch.

    Headroom compares two lengths of one training, so its proxy draws from the reference's mixture, but in another
    order: what the reference was trained on, it knows better than there is to learn.
    """
    if config.proxy.method == "headroom":
        order = config.proxy.model_copy(update={"seed": config.proxy.seed ^ OTHER_ORDER})
        return make_schedule(store, reference_weights(config, store), order)
    return make_schedule(store, uniform_weights(store.domains), config.proxy)


def read_folds(run: RunDirectory, store: TokenStore) -> Folds:
    """Returns how stage reference split the sequences."""
    made = read_json(run.stage_path("reference") / "folds.json")
    return Folds(sequence_ids(store, "train"), made["num_folds"], made["seed"])


def trained_model(run: RunDirectory, section: ReferenceConfig, part: str = "") -> TokenLossModel:
    """Loads what stage reference saved; adapters go over the base that is in memory already, when it is.

    Args:
        run: the run directory.
        section: of the reference.
        part: the folder of one of several references, see ``train_and_score``.
    """
    folder = run.stage_path("reference") / part / "model"
    return load_trained(
        folder, trust_remote_code=section.trust_remote_code, base=section.model, base_dtype=base_dtype(section)
    )


def engine_settings(section: TrainingConfig) -> EngineSettings:
    """Returns how a section's steps are run."""
    return EngineSettings(
        gradient_checkpointing=bool(section.gradient_checkpointing), shard=section.shard, compile=section.compile
    )


def train_and_score(
    context: StageContext,
    section: TrainingConfig,
    objective: Objective,
    schedule: Schedule,
    reference_losses: Callable[[NDArray[np.int64]], NDArray[np.float32]] | None = None,
    part: str = "",
) -> tuple[TokenLossModel, dict[str, DomainLoss]]:
    """Builds the stage's model, trains it, saves it in Hugging Face layout and scores the held-out sequences.

    Args: as ``train_model``.

    Returns:
        The trained model and the held-out loss of each domain.
    """
    model, accelerator = train_model(context, section, objective, schedule, reference_losses, part)
    save_trained(model, engine_settings(section), accelerator, context.folder / part / "model")
    store = open_store(context.run)
    return model, summarize_held_out(store, score_held_out(store, model, accelerator))


def train_model(
    context: StageContext,
    section: TrainingConfig,
    objective: Objective,
    schedule: Schedule,
    reference_losses: Callable[[NDArray[np.int64]], NDArray[np.float32]] | None = None,
    part: str = "",
) -> tuple[TokenLossModel, Any]:
    """Builds a model and trains it.

    Args:
        context: of the stage.
        section: its settings.
        objective: what a step minimizes.
        schedule: its draws.
        reference_losses: from sequence ids to the reference model's losses [B, T]; None for plain training.
        part: of a stage that trains several models, the folder inside its own for this one; checkpoint, logs and model
            go there.

    Returns:
        The trained model, ready to be scored, and its Accelerator.
    """
    store = open_store(context.run)
    stage = context.name
    folder = context.folder / part
    folder.mkdir(parents=True, exist_ok=True)
    T = store.context_length
    assert section.steps and section.batch_size and section.learning_rate and section.checkpoint_every

    def read(ids: NDArray[np.int64]) -> dict[str, Tensor]:
        batch = load_batch(store, ids)
        if reference_losses is not None:
            batch["reference_loss_BT"] = torch.from_numpy(reference_losses(ids))
        return batch

    plan = TrainingPlan(
        stage=stage,
        steps=section.steps,
        learning_rate=section.learning_rate,
        embedding_learning_rate=section.embedding_learning_rate,
        warmup_share=section.warmup_share,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        # One decision for all: it says who trains on what, and their memories may differ.
        gradient_accumulation_steps=int(
            context.processes.from_main(str(accumulation(section, T, context.processes.count)))
        ),
        checkpoint_every=section.checkpoint_every,
        engine=engine_settings(section),
    )
    model = new_model(section, token_info(context.run), T, stage)
    label = f"{stage} {part}".rstrip() + context.label
    trackers = make_trackers(context, section.result_settings(), re.sub(r"[^\w.]+", "-", label).strip("-"))
    num_tokens = int(schedule.counts_SK.sum()) * T
    with context.narrator.track(label, num_tokens, "tokens") as tracker:
        accelerator = train(model, objective, schedule, read, plan, folder, tracker, trackers)
    # Scoring has other shapes, and no gradient: it would be compiled anew for a few batches.
    undo_compile(model)
    return model, accelerator


def make_trackers(context: StageContext, settings_shown: Mapping[str, Any], stage: str) -> Callable[[int], Any]:
    """Returns what opens the experiment trackers that the configuration asks for.

    Args:
        context: of the stage.
        settings_shown: what the trackers keep beside the numbers.
        stage: what to call this training.
    """
    wanted = context.config.tracking
    settings = TrackingSettings(
        trackers=wanted.trackers,
        project=wanted.project,
        run_name=wanted.run_name or context.run.path.absolute().name,
        wandb_mode=wanted.wandb_mode,
    )

    def open_them(first_step: int) -> Any:
        place = context.run.path / "tracking"
        return open_trackers(settings, place, stage, dict(settings_shown), first_step, context.narrator.say)

    return open_them


def save_trained(model: TokenLossModel, engine: EngineSettings, accelerator: Any, target: Path) -> None:
    """Writes a trained model in Hugging Face layout, or its adapter in peft's, whole whatever process holds a part."""
    whole = whole_state(model) if is_sharded(engine, accelerator.num_processes) else None
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        save_model(model, target, whole)
    accelerator.wait_for_everyone()


def held_out_ids(store: TokenStore) -> NDArray[np.int64]:
    """Returns the ids of all held-out sequences, domain after domain, shape [N]."""
    return np.concatenate(sequence_ids(store, "held_out"))


def score_held_out(store: TokenStore, model: TokenLossModel, accelerator: Any) -> NDArray[np.float64]:
    """Returns the sum of losses and the number of tokens of every held-out sequence, shape [N, 2]."""
    score = make_scorer(model, accelerator, lambda ids: load_batch(store, ids))
    batch_size = max(1, SCORE_TOKENS // store.context_length)
    mine = score_sequences(held_out_ids(store), score, batch_size, accelerator.process_index, accelerator.num_processes)
    scores_N2: NDArray[np.float64] = (
        accelerator.reduce(torch.from_numpy(mine).to(accelerator.device), "sum").cpu().numpy()
    )
    return scores_N2


def make_scorer(
    model: TokenLossModel, accelerator: Any, read: Callable[[NDArray[np.int64]], MicroBatch]
) -> Callable[[NDArray[np.int64]], Tensor]:
    """Returns what scores sequences for ``evaluation.score_sequences``.

    Args:
        model: on its device.
        accelerator: of this process.
        read: makes a micro-batch from sequence ids.
    """

    def score(ids: NDArray[np.int64]) -> Tensor:
        batch = to_device(with_host_facts(read(ids), model), accelerator.device)
        with accelerator.autocast():
            loss_BT = forward(model, batch)
        return torch.stack([loss_BT.double().sum(1), counted(batch).sum(1).double()], dim=1)

    return score


def summarize_held_out(store: TokenStore, scores_N2: NDArray[np.float64]) -> dict[str, DomainLoss]:
    """Returns the held-out loss of each domain; a domain without any held-out sequence is left out."""
    losses = {}
    start = 0
    for name, ids in zip(store.domains, sequence_ids(store, "held_out"), strict=True):
        part_N2 = scores_N2[start : start + len(ids)]
        start += len(ids)
        if len(ids):
            losses[name] = summarize_losses(part_N2[:, 0], part_N2[:, 1])
    return losses


def write_metrics(
    context: StageContext,
    losses: dict[str, DomainLoss],
    schedule: Schedule,
    domains: Domains,
    model: TokenLossModel,
    part: str = "",
) -> float:
    """Writes held-out losses and epochs per domain; returns the average of the losses over domains (nats per token)."""
    average = math.fsum(loss.loss for loss in losses.values()) / len(losses) if losses else math.nan
    write_json(
        context.folder / part / "metrics.json",
        {
            "num_parameters": num_parameters(model),
            "num_trained_parameters": num_trainable_parameters(model),
            "num_processes": context.processes.count,
            "split_over_processes": any(isinstance(parameter, DTensor) for parameter in model.parameters()),
            "held_out_loss_average": number_or_none(average),
            "held_out_loss": {
                name: {key: number_or_none(value) for key, value in asdict(loss).items()}
                for name, loss in losses.items()
            },
            "epochs": dict(zip(domains, schedule.epochs().tolist(), strict=True)),
        },
    )
    return average


def read_columns(path: Path, names: Sequence[str], keys: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Reads numbers by domain from ``trajectory.jsonl``, a line at a time, as arrays of shape [updates, K]."""
    columns = {key: array("d") for key in keys}
    with path.open(encoding="utf-8") as file:
        for line in file:
            point = json.loads(line)
            for key, column in columns.items():
                column.extend(point[key][name] for name in names)
    return {key: np.frombuffer(column).reshape(-1, len(names)) for key, column in columns.items()}


def number_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value

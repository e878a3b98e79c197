"""The loop that reference and proxy training share.

Axes: B sequences (of a micro-batch), T tokens, K domains.  The effective batch of a step is split over processes and
micro-batches; what is learned does not depend on how (up to the order of sums).
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from doremi_mix.batches import Schedule
from doremi_mix.checkpoints import cut_log, load_checkpoint, save_checkpoint
from doremi_mix.errors import ConfigError, DivergedError
from doremi_mix.models import TokenLossModel
from doremi_mix.objectives import MicroBatch, Objective
from doremi_mix.progress import Tracker
from doremi_mix.store import TokenStore

FLUSH_EVERY = 20
"""Steps between readings of the losses from the device: each one waits for it."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """The settings of one training run, all decided.

    Attributes:
        stage: its name, for messages.
        steps: optimizer steps.
        learning_rate: peak.
        warmup_share: share of the steps in which it rises.
        weight_decay: on matrices.
        max_grad_norm: clip.
        gradient_accumulation_steps: micro-batches per process and step.
        checkpoint_every: steps between checkpoints.
    """

    stage: str
    steps: int
    learning_rate: float
    warmup_share: float
    weight_decay: float
    max_grad_norm: float
    gradient_accumulation_steps: int
    checkpoint_every: int

    def learning_rate_at(self, step: int) -> float:
        """Returns the learning rate of a step (from 0): a linear rise, then a cosine down to a tenth."""
        warmup = max(1, round(self.warmup_share * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def make_accelerator() -> Any:
    """Returns the Accelerator of this process: bf16 autocast on CUDA, float32 on the CPU.

    Other devices (MPS) are passed over: they have no float64, in which the domain weights live.
    """
    from accelerate import Accelerator

    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return Accelerator(cpu=not cuda, mixed_precision="bf16" if bf16 else "no")


def load_batch(store: TokenStore, sequence_ids: NDArray[np.int64]) -> MicroBatch:
    """Reads sequences from the store as tensors on the CPU."""
    return {name: torch.from_numpy(array) for name, array in store.batch(sequence_ids)._asdict().items()}


def train(
    model: TokenLossModel,
    objective: Objective,
    schedule: Schedule,
    read: Callable[[NDArray[np.int64]], MicroBatch],
    plan: TrainingPlan,
    folder: Path,
    log_name: str,
    tracker: Tracker,
) -> Any:
    """Trains a model, resuming from the folder's checkpoint when there is one.

    Args:
        model: a freshly built model; trained in place.
        objective: what a step minimizes.
        schedule: the sequence ids of each step.
        read: makes a micro-batch from sequence ids.
        plan: the settings.
        folder: where the checkpoint and the log live.
        log_name: the log: one JSON object per step.
        tracker: counts the tokens.

    Returns:
        The Accelerator, whose device holds the trained model.

    Raises:
        ConfigError: the batch has fewer sequences than there are processes times micro-batches.
        DivergedError: a loss is not finite.
    """
    accelerator = make_accelerator()
    num_parts = accelerator.num_processes * plan.gradient_accumulation_steps
    batch_size = int(schedule.counts_SK[0].sum())
    if batch_size < num_parts:
        raise ConfigError(
            f"{plan.stage}.batch_size is {batch_size}, fewer than {accelerator.num_processes} processes x "
            f"{plan.gradient_accumulation_steps} micro-batches; raise it to {num_parts} or more"
        )
    prepared = accelerator.prepare(model)
    optimizer = _make_optimizer(model, plan)
    step = _restore(folder, log_name, model, optimizer, objective, accelerator)
    tokens_per_step = batch_size * int(read(schedule.batch(0)[:1])["input_ids_BT"].shape[1])
    tracker.advance(0)
    tracker.done = tracker._start_done = step * tokens_per_step
    pending: list[Tensor] = []
    with (
        _interrupt_between_steps(accelerator) as interrupted,
        _prefetch(schedule, read, plan, step, accelerator) as data,
    ):
        for batches in data:
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate_at(step)
            pending.append(objective.backward(prepared, batches, accelerator))
            accelerator.clip_grad_norm_(model.parameters(), plan.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            stop = interrupted.is_set()
            checkpoint = stop or step % plan.checkpoint_every == 0 or step == plan.steps
            note = ""
            if checkpoint or len(pending) >= FLUSH_EVERY or accelerator.device.type == "cpu":
                note = f"loss {_flush(folder / log_name, objective, pending, step, plan, accelerator):.3f}"
                pending = []
            tracker.advance(tokens_per_step, note)
            if checkpoint and accelerator.is_main_process:
                state = {
                    "step": step,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "objective": objective.state(),
                }
                save_checkpoint(folder, state)
            if stop:
                raise KeyboardInterrupt
    accelerator.wait_for_everyone()
    return accelerator


def _make_optimizer(model: torch.nn.Module, plan: TrainingPlan) -> torch.optim.AdamW:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.99), fused=True)


def _restore(
    folder: Path,
    log_name: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    accelerator: Any,
) -> int:
    """Brings everything to the state of the last checkpoint and returns its step."""
    state = load_checkpoint(folder)
    step = 0
    if state is not None:
        step = int(state["step"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        objective.restore(state["objective"])
    if accelerator.is_main_process:
        cut_log(folder / log_name, step)
    accelerator.wait_for_everyone()
    return step


def _flush(
    log: Path, objective: Objective, pending: Sequence[Tensor], step: int, plan: TrainingPlan, accelerator: Any
) -> float:
    """Reads the pending values from the device, checks them, appends them to the log, and returns the last loss."""
    loss = math.nan
    lines = []
    for offset, logged in enumerate(torch.stack(list(pending)).cpu()):
        number = step - len(pending) + offset + 1
        if not bool(torch.isfinite(logged).all()):
            raise DivergedError(
                f"{plan.stage}: the loss is not finite at step {number} of {plan.steps}; "
                f"lower {plan.stage}.learning_rate (it is {plan.learning_rate:g})"
            )
        record, loss = objective.record(number, logged)
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    if accelerator.is_main_process:
        with log.open("a", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
    return loss


@contextmanager
def _prefetch(
    schedule: Schedule,
    read: Callable[[NDArray[np.int64]], MicroBatch],
    plan: TrainingPlan,
    first_step: int,
    accelerator: Any,
) -> Iterator[Iterator[list[MicroBatch]]]:
    """Reads the next step's micro-batches in a thread while the current step computes."""
    num_parts = accelerator.num_processes * plan.gradient_accumulation_steps
    first_part = accelerator.process_index * plan.gradient_accumulation_steps

    def micro_batches(step: int) -> list[MicroBatch]:
        parts = np.array_split(schedule.batch(step), num_parts)
        return [read(part) for part in parts[first_part : first_part + plan.gradient_accumulation_steps]]

    def steps(pool: ThreadPoolExecutor) -> Iterator[list[MicroBatch]]:
        following = pool.submit(micro_batches, first_step) if first_step < plan.steps else None
        for step in range(first_step, plan.steps):
            assert following is not None
            batches = following.result()
            following = pool.submit(micro_batches, step + 1) if step + 1 < plan.steps else None
            yield [to_device(batch, accelerator.device) for batch in batches]

    with ThreadPoolExecutor(max_workers=1) as pool:
        yield steps(pool)


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Moves a micro-batch to the device, asynchronously from pinned memory on CUDA."""
    if device.type == "cpu":
        return batch
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}


@contextmanager
def _interrupt_between_steps(accelerator: Any) -> Iterator[threading.Event]:
    """Lets Ctrl-C finish the step and write a checkpoint; a second Ctrl-C stops at once."""
    event = threading.Event()
    if accelerator.num_processes > 1 or threading.current_thread() is not threading.main_thread():
        # Several processes would stop at different steps; the last checkpoint is what counts there.
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(_number: int, _frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)

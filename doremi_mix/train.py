"""The loop that reference and proxy training share.

Axes: B sequences (of a micro-batch), T tokens, K domains.  The effective batch of a step is split over processes and
micro-batches; what is learned does not depend on how (up to the order of sums).

A step never waits for the device: batches are read ahead by a thread and copied from pinned memory, losses are read
back every ``FLUSH_EVERY`` steps, checkpoints are copied in the stream's order and written by a thread.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from doremi_mix.checkpoints import cut_log, load_checkpoint, open_writer, restore_training_state, training_state
from doremi_mix.engine import EngineSettings, is_sharded, make_accelerator, pinned, prepare, to_device, with_host_facts
from doremi_mix.errors import ConfigError, DivergedError
from doremi_mix.models import TokenLossModel, embedding_parameters
from doremi_mix.objectives import MicroBatch, Objective, StepRecord
from doremi_mix.progress import Tracker
from doremi_mix.store import TokenStore
from doremi_mix.tracking import flatten

FLUSH_EVERY = 20
"""Steps between readings of the losses from the device: each one waits for it."""
READ_AHEAD = 3
"""Steps whose batches are read before they are needed."""
METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """The settings of one training run, all decided.

    Attributes:
        stage: its name, for messages.
        steps: optimizer steps.
        learning_rate: peak.
        embedding_learning_rate: peak for the token embeddings and the output head; None for the same.
        warmup_share: share of the steps in which it rises.
        weight_decay: on matrices.
        max_grad_norm: clip.
        gradient_accumulation_steps: micro-batches per process and step.
        checkpoint_every: steps between checkpoints; on a GPU one is left out where writing them would take too much of
            the time.
        engine: how a step is run.
        final_share: of the peak learning rate, at the end of the cosine.
        betas: of AdamW.
        warmup_from_zero: warm up as the Trainer of transformers does: the first step has learning rate 0, and the share
            of the steps is rounded up.
    """

    stage: str
    steps: int
    learning_rate: float
    warmup_share: float
    weight_decay: float
    max_grad_norm: float
    gradient_accumulation_steps: int
    checkpoint_every: int
    engine: EngineSettings = field(default_factory=EngineSettings)
    embedding_learning_rate: float | None = None
    final_share: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_from_zero: bool = False

    def learning_rate_at(self, step: int) -> float:
        """Returns the learning rate of a step (from 0): a linear rise, then a cosine down to ``final_share``."""
        exact = self.warmup_share * self.steps
        # A training of one step must not be one of none.
        from_zero = self.warmup_from_zero and math.ceil(exact) < self.steps
        warmup = math.ceil(exact) if from_zero else max(1, round(exact))
        if step < warmup:
            return self.learning_rate * (step if from_zero else step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * (self.final_share + (1 - self.final_share) * cosine)


class Schedule(Protocol):
    """Which sequences each step sees."""

    @property
    def smallest_batch(self) -> int:
        """Sequences in the smallest of its batches."""
        ...

    def batch(self, step: int) -> NDArray[np.int64]:
        """Returns the sequence ids of a step, shape [B]; it is cut in order into equal micro-batches."""
        ...


class Trackers(Protocol):
    """Where numbers go besides the logs (see ``tracking``)."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Takes the numbers of one step; never raises."""
        ...


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
    tracker: Tracker,
    open_trackers: Callable[[int], Any] | None = None,
    num_tokens_at: Callable[[int], int] | None = None,
) -> Any:
    """Trains a model, resuming from the folder's checkpoint when there is one.

    Writes ``metrics.jsonl`` (loss, learning rate, gradient norm and throughput of each step) and, where the objective
    has numbers by domain, its own log of them.

    Args:
        model: a freshly built model; trained in place.
        objective: what a step minimizes.
        schedule: the sequence ids of each step.
        read: makes a micro-batch from sequence ids.
        plan: the settings.
        folder: where checkpoint and logs live.
        tracker: counts the tokens.
        open_trackers: from the first step that will be logged to a context manager that gives ``Trackers``.
        num_tokens_at: tokens of a step (from 0); None where all sequences are as long as the first batch's.

    Returns:
        The Accelerator, whose device holds the trained model.

    Raises:
        ConfigError: the batch has fewer sequences than there are processes times micro-batches.
        DivergedError: a loss or a gradient is not finite.
    """
    accelerator = make_accelerator()
    batch_size = _checked_batch_size(schedule, plan, accelerator)
    with ExitStack() as stack:
        # Before anything is built on the device: the schedule's first batch is also what the engine measures with.
        example = read(schedule.batch(0)[: max(1, batch_size // _num_parts(plan, accelerator))])
        num_passes = plan.steps * plan.gradient_accumulation_steps
        prepared = prepare(model, plan.engine, accelerator, example, num_passes, tracker.narrator.say)
        optimizer = _make_optimizer(model, plan)
        sharded = is_sharded(plan.engine, accelerator.num_processes)
        step = _restore(folder, model, optimizer, objective, accelerator)
        if num_tokens_at is None:
            tokens_per_step = batch_size * int(example["input_ids_BT"].shape[1])
            num_tokens_at = lambda _step: tokens_per_step  # noqa: E731
        tracker.resume_at(sum(map(num_tokens_at, range(step))))
        trackers = stack.enter_context(open_trackers(step)) if open_trackers and accelerator.is_main_process else None
        log = _Log(folder, objective, plan, accelerator, num_tokens_at, step, trackers)
        writer = stack.enter_context(open_writer(folder))
        interrupted = stack.enter_context(_interrupt_between_steps(accelerator))
        for batches in stack.enter_context(_read_ahead(schedule, read, plan, step, accelerator, model)):
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate_at(step) * group["lr_factor"]
            logged = objective.backward(prepared, batches, accelerator)
            norm = accelerator.clip_grad_norm_(model.parameters(), plan.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.add(logged, norm)
            step += 1
            stop = interrupted.is_set()
            # Of a model that is split, every process has a part, and all must decide alike.
            is_due = step % plan.checkpoint_every == 0 and (
                accelerator.device.type == "cpu" or sharded or writer.has_time()
            )
            checkpoint = stop or is_due or step == plan.steps
            note = ""
            if checkpoint or log.num_pending >= FLUSH_EVERY or accelerator.device.type == "cpu":
                note = f"loss {_flush(log, to_disk=checkpoint):.3f}"
            tracker.advance(num_tokens_at(step - 1), note)
            if checkpoint:
                # Every process has a part of a model that is split.
                if sharded or accelerator.is_main_process:
                    state = training_state(model, optimizer, sharded=sharded)
                if accelerator.is_main_process:
                    writer.save({"step": step, **state, "objective": objective.state()})
            if stop:
                writer.wait()
                raise KeyboardInterrupt
    accelerator.wait_for_everyone()
    return accelerator


def _num_parts(plan: TrainingPlan, accelerator: Any) -> int:
    return int(accelerator.num_processes) * plan.gradient_accumulation_steps


def _checked_batch_size(schedule: Schedule, plan: TrainingPlan, accelerator: Any) -> int:
    batch_size = schedule.smallest_batch
    num_parts = _num_parts(plan, accelerator)
    if batch_size < num_parts:
        raise ConfigError(
            f"{plan.stage}.batch_size is {batch_size}, fewer than {accelerator.num_processes} processes x "
            f"{plan.gradient_accumulation_steps} micro-batches; raise it to {num_parts} or more"
        )
    return batch_size


def _make_optimizer(model: TokenLossModel, plan: TrainingPlan) -> torch.optim.AdamW:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = embedding_parameters(model)
    factor = (plan.embedding_learning_rate or plan.learning_rate) / plan.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in parameters if id(p) in embeddings], "lr_factor": factor},
    ]
    groups = [{"lr_factor": 1.0, "weight_decay": plan.weight_decay, **group} for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=plan.betas, fused=True)


def _restore(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, objective: Objective, accelerator: Any
) -> int:
    """Brings everything to the state of the last checkpoint and returns its step."""
    state = load_checkpoint(folder)
    step = 0
    if state is not None:
        step = int(state["step"])
        restore_training_state(model, optimizer, state)
        objective.restore(state["objective"])
    if accelerator.is_main_process:
        for name in (METRICS, objective.domain_log):
            if name is not None:
                cut_log(folder / name, step)
    accelerator.wait_for_everyone()
    return step


class _Log:
    """The steps that were not read back from the device yet, and the files that they go to."""

    def __init__(
        self,
        folder: Path,
        objective: Objective,
        plan: TrainingPlan,
        accelerator: Any,
        num_tokens_at: Callable[[int], int],
        step: int,
        trackers: Trackers | None,
    ) -> None:
        self.folder = folder
        self.objective = objective
        self.plan = plan
        self.accelerator = accelerator
        self.num_tokens_at = num_tokens_at
        self.step = step
        self.trackers = trackers
        self.diverged = ""
        self._pending: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._since = time.perf_counter()

    @property
    def num_pending(self) -> int:
        """How many steps wait to be read."""
        return len(self._pending)

    def add(self, logged: Tensor, norm: Tensor) -> None:
        """Keeps what a step has to say, on the device."""
        self._pending.append(logged)
        # A model that is split over processes has a norm that is, too.
        self._norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm.detach())

    def take(self) -> list[tuple[StepRecord, dict[str, float]]]:
        """Reads the pending steps from the device and returns the records and metrics of those before a divergence."""
        values = torch.stack(self._pending).cpu()
        norms = torch.stack(self._norms).tolist()
        now = time.perf_counter()
        seconds = (now - self._since) / len(norms)
        tokens = sum(map(self.num_tokens_at, range(self.step, self.step + len(norms))))
        tokens_per_second = round(tokens / (now - self._since), 1)
        self._since = now
        self._pending, self._norms = [], []
        result = []
        for logged, norm in zip(values, norms, strict=True):
            self.step += 1
            what = "gradient" if bool(torch.isfinite(logged).all()) else "loss"
            if what == "loss" or not math.isfinite(norm):
                self.diverged = (
                    f"{self.plan.stage}: the {what} is not finite at step {self.step} of {self.plan.steps}; "
                    f"lower {self.plan.stage}.learning_rate (it is {self.plan.learning_rate:g})"
                )
                break
            record = self.objective.record(self.step, logged)
            metrics = {
                "step": self.step,
                "loss": record.loss,
                "num_tokens": record.num_tokens,
                "learning_rate": self.plan.learning_rate_at(self.step - 1),
                "gradient_norm": norm,
                "seconds": round(seconds, 6),
                "tokens_per_second": tokens_per_second,
            }
            result.append((record, metrics))
        return result


def _flush(log: _Log, *, to_disk: bool) -> float:
    """Appends the pending steps to the logs and returns the last loss; before a checkpoint the logs reach the disk.

    Raises:
        DivergedError: a loss or a gradient is not finite; the steps before it are in the logs.
    """
    taken = log.take()
    if log.accelerator.is_main_process:
        _append(log.folder / METRICS, [metrics for _, metrics in taken], to_disk=to_disk)
        if log.objective.domain_log is not None:
            _append(log.folder / log.objective.domain_log, [record.by_domain for record, _ in taken], to_disk=to_disk)
    if log.trackers is not None:
        for record, metrics in taken:
            log.trackers.log(flatten({**metrics, **(record.by_domain or {})}), int(metrics["step"]))
    if log.diverged:
        raise DivergedError(log.diverged)
    return taken[-1][0].loss


def _append(path: Path, records: Sequence[Any], *, to_disk: bool) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        if to_disk:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _read_ahead(
    schedule: Schedule,
    read: Callable[[NDArray[np.int64]], MicroBatch],
    plan: TrainingPlan,
    first_step: int,
    accelerator: Any,
    model: TokenLossModel,
) -> Iterator[Iterator[list[MicroBatch]]]:
    """Reads the next steps' micro-batches in a thread, into pinned memory, while the current step computes."""
    num_parts = _num_parts(plan, accelerator)

    def micro_batches(step: int) -> list[MicroBatch]:
        parts = np.array_split(schedule.batch(step), num_parts)
        # In turn, so that where long sequences come first, no process gets all of them.
        mine = [
            with_host_facts(read(part), model) for part in parts[accelerator.process_index :: accelerator.num_processes]
        ]
        if accelerator.device.type == "cuda":
            mine = [{name: pinned(tensor) for name, tensor in batch.items()} for batch in mine]
        return mine

    def steps(pool: ThreadPoolExecutor) -> Iterator[list[MicroBatch]]:
        coming: deque[Future[list[MicroBatch]]] = deque()
        for step in range(first_step, plan.steps + READ_AHEAD):
            if step < plan.steps:
                coming.append(pool.submit(micro_batches, step))
            if step >= first_step + READ_AHEAD and coming:
                yield [to_device(batch, accelerator.device) for batch in coming.popleft().result()]

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        try:
            yield steps(pool)
        finally:
            pool.shutdown(cancel_futures=True)


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

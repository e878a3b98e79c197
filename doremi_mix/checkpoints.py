"""Exact resume: everything that a training loop carries from one step to the next, in one atomic file.

The logs beside it are written first, so they are never behind a checkpoint; a resumed run cuts them back to it.  The
file is written by a thread while training goes on: the state is copied to the host, the copy is written.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

CHECKPOINT = "checkpoint.pt"
WRITING_SHARE = 0.1
"""Share of the time in which a GPU's checkpoints may be written: a step can take less time than its checkpoint."""


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replaces the folder's checkpoint; a crash leaves the old one or the new one.

    Raises:
        OSError: it could not be written; the old one is still there.
    """
    temporary = folder / f".{CHECKPOINT}.tmp"
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch hides a full disk behind an error of its archive format.
        cause = error.__context__
        raise (cause if isinstance(cause, OSError) else error) from None
    temporary.replace(folder / CHECKPOINT)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Returns the folder's checkpoint with tensors on the CPU, or None."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    return dict(torch.load(path, map_location="cpu", weights_only=True))


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time, while training goes on."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._pool = pool
        self._writing: Future[None] | None = None
        self._started = self._ended = -math.inf

    def has_time(self) -> bool:
        """Says whether the last one is written, and so long ago that writing takes a small share of the time."""
        if self._writing is not None and not self._writing.done():
            return False
        if self._ended == -math.inf:
            return True
        return time.monotonic() - self._started >= (self._ended - self._started) / WRITING_SHARE

    def save(self, state: dict[str, Any]) -> None:
        """Copies the state to the host and starts to write it; waits for an earlier one that is not done.

        Raises:
            OSError: the earlier one could not be written.
        """
        self.wait()
        self._started = time.monotonic()
        copied = _to_host(state)
        # The copies run behind this step and before the next one; the thread waits for them, training does not.
        event = torch.cuda.Event() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record()

        def write() -> None:
            if event is not None:
                event.synchronize()
            save_checkpoint(self._folder, copied)
            self._ended = time.monotonic()

        self._writing = self._pool.submit(write)

    def wait(self) -> None:
        """Waits until everything is on the disk.

        Raises:
            OSError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()


@contextmanager
def open_writer(folder: Path) -> Iterator[CheckpointWriter]:
    """Gives a writer, whose last checkpoint is on the disk when the context ends without an error."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") as pool:
        writer = CheckpointWriter(folder, pool)
        yield writer
        writer.wait()


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool) -> dict[str, Any]:
    """Returns the trained weights and the optimizer's state by parameter name; the frozen base of adapters is no state.

    Args:
        model: what is trained.
        optimizer: of its trained parameters.
        sharded: whether FSDP splits both over the processes.  Then every process must call, the whole tensors are
            gathered one by one on the first process's host, and the others get nothing.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=sharded, ignore_frozen_params=True)
    # A head that is tied to frozen embeddings goes by a second name, which torch does not take for frozen.
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    # Layers in 8 bits have state that torch cannot collect; what is trained is not in it.
    weights = get_model_state_dict(model, options=options) if sharded else _parameters(model)
    return {
        "model": {name: tensor for name, tensor in weights.items() if name in trained},
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters by every name that they go by."""
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}


def whole_state(model: nn.Module) -> dict[str, Any]:
    """Gathers the weights of a model that FSDP split, on the first process; every process must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def restore_training_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes back what ``training_state`` returned, also under another number of processes."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    # Under FSDP, torch would take a tensor that several modules share for another one under each further name.
    own = {name for name, _ in model.named_parameters()}
    set_model_state_dict(model, {name: t for name, t in state["model"].items() if name in own}, options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def cut_log(path: Path, num_lines: int) -> None:
    """Keeps the first lines of a log, or makes it empty: what was written after the checkpoint is written again."""
    if not path.exists():
        path.touch()
        return
    with path.open("r+b") as file:
        for _ in range(num_lines):
            file.readline()
        file.truncate(file.tell())


def _to_host(value: Any) -> Any:
    """Copies tensors, wherever they nest: the loop goes on to change its own."""
    if isinstance(value, Tensor):
        if value.device.type == "cpu":
            return value.detach().clone()
        try:
            pinned = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
        except RuntimeError:  # the system allows no more of it: slower, but no reason to stop
            return value.detach().cpu()
        return pinned.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_host(item) for item in value)
    return value

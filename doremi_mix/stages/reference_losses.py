"""Stage reference_losses: the reference model's loss on every token that the proxy model will draw, computed once.

Writes ``sequence_ids.npy`` (sorted ids, shape [R]) and ``losses.f32`` (float32 nats, shape [R, T], 0 where no loss is
taken), memory-mapped when read.  With folds, a sequence is scored by the reference that was not trained on it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from doremi_mix.atomic import write_atomic, write_json
from doremi_mix.engine import make_accelerator, prepare_to_score, to_device, with_host_facts
from doremi_mix.folds import fold_names
from doremi_mix.objectives import forward
from doremi_mix.progress import Tracker
from doremi_mix.run import read_json
from doremi_mix.stages import StageContext, free_memory
from doremi_mix.stages.training import (
    SCORE_TOKENS,
    engine_settings,
    open_store,
    proxy_schedule,
    read_folds,
    trained_model,
)
from doremi_mix.store import TokenStore
from doremi_mix.train import load_batch

SCORED = "scored.json"
SAVE_EVERY = 32
"""Batches between two notes of how far the scoring got."""


class ReferenceLosses:
    """Reads cached losses by sequence id."""

    def __init__(self, folder: Path) -> None:
        self.sequence_ids = np.load(folder / "sequence_ids.npy")
        self.losses_RT = np.memmap(folder / "losses.f32", dtype=np.float32, mode="r").reshape(
            len(self.sequence_ids), -1
        )

    def read(self, sequence_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns the losses of sequences, shape [B, T].

        Raises:
            KeyError: a sequence was not scored.
        """
        rows = np.searchsorted(self.sequence_ids, sequence_ids)
        if rows.max(initial=0) >= len(self.sequence_ids) or (self.sequence_ids[rows] != sequence_ids).any():
            raise KeyError("a sequence was drawn that has no reference loss")
        return np.asarray(self.losses_RT[rows])


def run(context: StageContext) -> str:
    """Scores what the proxy will draw; returns one line about it."""
    store = open_store(context.run)
    ids = proxy_schedule(context.config, store).drawn()
    T = store.context_length
    accelerator = make_accelerator()
    path = context.folder / "losses.f32"
    if context.processes.is_main:
        _prepare(context.folder, ids, path, num_bytes=len(ids) * T * 4)
    accelerator.wait_for_everyone()
    num_scored = int(read_json(context.folder / SCORED)["num_sequences"])
    accelerator.wait_for_everyone()
    folds = read_folds(context.run, store)
    fold_of_R = folds.of(ids)
    first = 0
    with (
        path.open("r+b") as file,
        context.narrator.track("reference_losses", len(ids) * T, "tokens", num_scored * T) as tracker,
    ):
        # Fold after fold: one model is in memory at a time.
        for fold, part in enumerate(fold_names(folds.num_folds)):
            rows = np.flatnonzero(fold_of_R == fold)
            done = max(0, num_scored - first)
            if done < len(rows):
                _score(context, _Work(store, ids, rows, first, done, part), file, accelerator, tracker)
                free_memory()
            first += len(rows)
    return f"{len(ids):,} of {store.num_sequences():,} sequences scored, {len(ids) * T * 4 / 2**20:,.0f} MiB"


class _Work(NamedTuple):
    """What one reference has to score.

    Attributes:
        store: holds the sequences.
        ids_R: of all sequences that are scored.
        rows: those of them, as rows of ``ids_R``, that are this reference's.
        first: how many the references before it score.
        done: how many of ``rows`` an earlier process scored.
        part: the folder of the reference.
    """

    store: TokenStore
    ids_R: NDArray[np.int64]
    rows: NDArray[np.int64]
    first: int
    done: int
    part: str


@torch.no_grad()
def _score(context: StageContext, work: _Work, file: BinaryIO, accelerator: Any, tracker: Tracker) -> None:
    """Scores sequences with one reference."""
    T = work.store.context_length
    section = context.config.reference
    model = trained_model(context.run, section, work.part)
    model = prepare_to_score(model, engine_settings(section), accelerator)
    # Loading is not scoring: the time that is left is told from here.
    tracker.resume_at((work.first + work.done) * T)
    # Batches start at multiples of the batch size, also after a restart, so that the same sums are made.
    batch_size = max(1, SCORE_TOKENS // T)
    group = batch_size * accelerator.num_processes
    for number, start in enumerate(range(work.done, len(work.rows), group)):
        mine = start + batch_size * accelerator.process_index
        # Without work of its own, a process scores the group's first batch: a split model needs all of them.
        first = mine if mine < len(work.rows) else start
        rows = work.rows[first : first + batch_size]
        batch = to_device(with_host_facts(load_batch(work.store, work.ids_R[rows]), model), accelerator.device)
        with accelerator.autocast():
            loss_BT = forward(model, batch)
        if mine < len(work.rows):
            _write_rows(file, rows, loss_BT.float().cpu().numpy())
        tracker.advance(len(work.rows[start : start + group]) * T)
        if (number + 1) % SAVE_EVERY == 0:
            _save_progress(context, file, accelerator, work.first + min(start + group, len(work.rows)))
    _save_progress(context, file, accelerator, work.first + len(work.rows))


def _write_rows(file: BinaryIO, rows: NDArray[np.int64], loss_BT: NDArray[np.float32]) -> None:
    """Writes the losses of ascending rows, those that lie side by side at once.

    Not through a memory map: of a page that two machines fill on a shared file system, that would write the whole.
    """
    for run_B in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
        file.seek(int(rows[run_B[0]]) * loss_BT[0].nbytes)
        file.write(loss_BT[run_B].tobytes())
    file.flush()


def _prepare(folder: Path, ids: NDArray[np.int64], path: Path, num_bytes: int) -> None:
    """Makes room for the losses, unless a killed process already did."""
    if (folder / SCORED).exists():
        return
    with (folder / "sequence_ids.npy").open("wb") as file:
        np.save(file, ids)
    write_atomic(path, b"")
    os.truncate(path, num_bytes)
    write_json(folder / SCORED, {"num_sequences": 0})


def _save_progress(context: StageContext, file: BinaryIO, accelerator: Any, num_sequences: int) -> None:
    """Notes how far the scoring got, after the losses have reached the disk."""
    os.fsync(file.fileno())
    accelerator.wait_for_everyone()
    if context.processes.is_main:
        write_json(context.folder / SCORED, {"num_sequences": num_sequences})

"""Stage reference_losses: the reference model's loss on every token that the proxy model will draw, computed once.

Writes ``sequence_ids.npy`` (sorted ids, shape [R]) and ``losses.f32`` (float32 nats, shape [R, T], 0 where no loss is
taken), memory-mapped when read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from doremi_mix.engine import make_accelerator, prepare_to_score, to_device, with_host_facts
from doremi_mix.objectives import forward
from doremi_mix.run import read_json, write_atomic, write_json
from doremi_mix.stages import StageContext
from doremi_mix.stages.training import SCORE_TOKENS, engine_settings, open_store, proxy_schedule, trained_model
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
    section = context.config.reference
    model = prepare_to_score(trained_model(context.run, section), engine_settings(section), accelerator)
    path = context.folder / "losses.f32"
    if context.processes.is_main:
        _prepare(context.folder, ids, path, num_bytes=len(ids) * T * 4)
    accelerator.wait_for_everyone()
    losses_RT = np.memmap(path, dtype=np.float32, mode="r+", shape=(len(ids), T))
    # Batches start at multiples of the batch size, also after a restart, so that the same sums are made.
    batch_size = max(1, SCORE_TOKENS // T)
    first = int(read_json(context.folder / SCORED)["num_sequences"])
    accelerator.wait_for_everyone()
    with (
        context.narrator.track("reference_losses", len(ids) * T, "tokens", first * T) as tracker,
        torch.no_grad(),
    ):
        group = batch_size * accelerator.num_processes
        for number, start in enumerate(range(first, len(ids), group)):
            mine = start + batch_size * accelerator.process_index
            # Without work of its own, a process scores the group's first batch: a split model needs all of them.
            rows = slice(mine, mine + batch_size) if mine < len(ids) else slice(start, start + batch_size)
            batch = to_device(with_host_facts(load_batch(store, ids[rows]), model), accelerator.device)
            with accelerator.autocast():
                loss_BT = forward(model, batch)
            if mine < len(ids):
                losses_RT[rows] = loss_BT.float().cpu().numpy()
            tracker.advance(len(ids[start : start + group]) * T)
            if (number + 1) % SAVE_EVERY == 0:
                _save_progress(context, losses_RT, accelerator, start + group)
    _save_progress(context, losses_RT, accelerator, len(ids))
    return f"{len(ids):,} of {store.num_sequences():,} sequences scored, {len(ids) * T * 4 / 2**20:,.0f} MiB"


def _prepare(folder: Path, ids: NDArray[np.int64], path: Path, num_bytes: int) -> None:
    """Makes room for the losses, unless a killed process already did."""
    if (folder / SCORED).exists():
        return
    with (folder / "sequence_ids.npy").open("wb") as file:
        np.save(file, ids)
    write_atomic(path, b"")
    os.truncate(path, num_bytes)
    write_json(folder / SCORED, {"num_sequences": 0})


def _save_progress(context: StageContext, losses_RT: NDArray[Any], accelerator: Any, num_sequences: int) -> None:
    """Notes how far the scoring got, after the losses have reached the disk."""
    assert isinstance(losses_RT, np.memmap)
    losses_RT.flush()
    accelerator.wait_for_everyone()
    if context.processes.is_main:
        write_json(context.folder / SCORED, {"num_sequences": num_sequences})

"""Exact resume: everything that a training loop carries from one step to the next, in one atomic file.

The logs beside it are written first, so they are never behind a checkpoint; a resumed run cuts them back to it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replaces the folder's checkpoint; a crash leaves the old one or the new one."""
    temporary = folder / f".{CHECKPOINT}.tmp"
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / CHECKPOINT)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Returns the folder's checkpoint with tensors on the CPU, or None."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def cut_log(path: Path, num_lines: int) -> None:
    """Keeps the first lines of a log, or makes it empty: what was written after the checkpoint is written again."""
    if not path.exists():
        path.touch()
        return
    with path.open("r+b") as file:
        for _ in range(num_lines):
            file.readline()
        file.truncate(file.tell())

"""Files that are whole or not there: written under another name, brought to the disk, and renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def temporary_of(path: Path) -> Path:
    """Returns where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a whole file or nothing: a reader sees the old content or the new, also after a crash."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = temporary_of(path)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that a person can read, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

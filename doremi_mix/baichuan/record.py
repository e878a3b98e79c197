"""The folder of a conversion: whose it is, what is done in it, and files that are whole or not there.

``.conversion.partial.json`` is its first file, ``conversion.json`` its last: the one says what is being converted, the
other that it finished, and with what result.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from doremi_mix.errors import ModelError, short_reason

RECORD = "conversion.json"
PARTIAL = ".conversion.partial.json"


@contextlib.contextmanager
def own_folder(source: Path, target: Path) -> Iterator[None]:
    """Makes the target folder, and keeps other processes out of it until the block ends.

    Raises:
        ModelError: the target is in use or is no folder of its own.
    """
    is_new = not target.exists()
    if not is_new and not target.is_dir():
        raise ModelError(f"{target}: is a file; give a new folder")
    if not is_new and target.samefile(source):
        raise ModelError(f"{target}: is the folder of the checkpoint itself; give a new folder")
    target.mkdir(parents=True, exist_ok=True)
    folder = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ModelError(f"{target}: another process is converting into it; wait for it") from None
    finally:
        os.close(folder)
        if is_new:
            with contextlib.suppress(OSError):
                target.rmdir()  # only where nothing came of it


def is_finished(target: Path, begun: Mapping[str, Any]) -> bool:
    """Says whether the conversion is complete: none of the files that it lists is missing.

    Args:
        target: the folder of the result.
        begun: what identifies the conversion.

    Raises:
        ModelError: the folder holds other files, or the conversion of something else.
    """
    found = next((name for name in (RECORD, PARTIAL) if (target / name).is_file()), None)
    if found is None:
        others = sorted(path.name for path in target.iterdir() if path.name != temporary_of(target / PARTIAL).name)
        if others:
            raise ModelError(f"{target}: holds other files ({others[0]}); give a new or empty folder")
        return False
    record = read_record(target / found)
    if any(record.get(key) != begun[key] for key in ("format", "source")):
        raise ModelError(f"{target}: holds the conversion of another checkpoint; give a new folder, or delete this one")
    if record.get("max_shard_bytes") != begun["max_shard_bytes"]:
        raise ModelError(
            f"{target}: holds a conversion into files of at most {record['max_shard_bytes']:,} bytes, not "
            f"{begun['max_shard_bytes']:,}; give the same limit or a new folder"
        )
    return found == RECORD and all(
        (target / file).is_file() and (target / file).stat().st_size == expected["bytes"]
        for file, expected in record["files"].items()
    )


@contextlib.contextmanager
def explain_system_errors(target: Path) -> Iterator[None]:
    """Says in one line that the disk is full, or whatever else the system refuses."""
    try:
        yield
    except OSError as error:
        place = error.filename or target
        raise ModelError(
            f"{place}: {short_reason(error)}; settle that and run the same command again, it goes on where it stopped"
        ) from None


def read_record(path: Path) -> dict[str, Any]:
    """Reads what an earlier run has left.

    Raises:
        ModelError: it is damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ModelError(f"{path}: is damaged; delete {path.parent} and convert again") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a whole file or nothing."""
    temporary = temporary_of(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def temporary_of(path: Path) -> Path:
    """Returns where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.tmp")

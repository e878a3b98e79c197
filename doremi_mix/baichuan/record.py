"""The folder of a conversion: whose it is, what is done in it, and files that are whole or not there.

``.conversion.partial.json`` is its first file, ``conversion.json`` its last: the one says what is being converted, the
other that it finished, and with what result.  ``.conversion.stamps.json`` keeps sizes and times of change of the
original's weight files.  It is a file of its own because times say nothing about the result, whose fingerprint has
``conversion.json`` in it and leaves out hidden files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from doremi_mix.atomic import temporary_of
from doremi_mix.errors import ModelError, short_reason

RECORD = "conversion.json"
PARTIAL = ".conversion.partial.json"
STAMPS = ".conversion.stamps.json"


def folder_of(text: str, what: str) -> Path:
    """Returns the folder that a person has typed, with ``~`` for the home folder.

    Raises:
        ModelError: it is empty, or of an unknown person.
    """
    if not text.strip():
        raise ModelError(f"{what}: expected a folder, got an empty path; give one")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ModelError(f"{text}: no such home folder; give the whole path") from None


@contextlib.contextmanager
def own_folder(source: Path, target: Path) -> Iterator[None]:
    """Makes the target folder, and keeps other processes out of it until the block ends.

    Raises:
        ModelError: the target is in use or is no folder of its own.
    """
    is_new = not target.exists()
    place = next(path for path in (target, *target.parents) if path.exists() or path.is_symlink())
    if not place.exists():
        raise ModelError(f"{place}: is a link that leads nowhere; give a new folder")
    if not place.is_dir():
        inside = "" if place == target else f", and {target} cannot lie in it"
        raise ModelError(f"{place}: is a file{inside}; give a new folder")
    if not is_new and target.samefile(source):
        raise ModelError(f"{target}: is the folder of the checkpoint itself; give a new folder")
    if target.resolve().is_relative_to(source.resolve()):
        raise ModelError(f"{target}: lies in the folder of the checkpoint; give a new folder outside of {source}")
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


def find_record(target: Path, begun: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the record of a finished conversion; None where it has not begun or not finished.

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
        return None
    record = read_record(target / found)
    if any(record.get(key) != begun[key] for key in ("format", "source")):
        raise ModelError(f"{target}: holds the conversion of another checkpoint; give a new folder, or delete this one")
    if record.get("max_shard_bytes") != begun["max_shard_bytes"]:
        raise ModelError(
            f"{target}: holds a conversion into files of at most {record['max_shard_bytes']:,} bytes, not "
            f"{begun['max_shard_bytes']:,}; give the same limit or a new folder"
        )
    return record if found == RECORD else None


def damaged_files(target: Path, record: Mapping[str, Any]) -> list[str]:
    """Returns the files of a finished conversion that are missing or changed; of the weights only the size is compared.

    Args:
        target: the folder of the result.
        record: of the conversion.
    """
    return [
        file
        for file, expected in record["files"].items()
        if not _has_size(target / file, expected["bytes"])
        or (not file.endswith(".safetensors") and sha256_of(target / file) != expected["sha256"])
    ]


def verify_conversion(target: Path, *, advance: Callable[[int], None] = lambda _: None) -> None:
    """Reads every file of a finished conversion again and compares it with what ``conversion.json`` says.

    Args:
        target: the folder of the result.
        advance: is told the number of bytes that are done since it was last called.

    Raises:
        ModelError: a file is missing or differs, or the conversion has not finished.
    """
    with explain_system_errors(target):
        if not (target / RECORD).is_file():
            raise ModelError(f"{target}: holds no finished conversion ({RECORD}); convert first")
        for file, expected in read_record(target / RECORD)["files"].items():
            path = target / file
            if (
                not _has_size(path, expected["bytes"])
                or sha256_of(path, see=lambda block: advance(len(block))) != expected["sha256"]
            ):
                raise ModelError(
                    f"{path}: differs from what {RECORD} says; delete it and convert again, which writes it anew"
                )


def stamps_of(folder: Path, files: Sequence[str]) -> dict[str, list[int]]:
    """Returns size and time of change (nanoseconds) of files: what tells cheaply that one may have changed."""
    stats = {file: (folder / file).stat() for file in files}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def read_stamps(target: Path) -> dict[str, Any]:
    """Returns the stamps of the original's weight files when they were last read; none where that is not known."""
    try:
        return dict(json.loads((target / STAMPS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


@contextlib.contextmanager
def explain_system_errors(target: Path) -> Iterator[None]:
    """Says in one line that the disk is full, or whatever else the system refuses."""
    try:
        yield
    except OSError as error:
        place = error.filename or target
        goes_on = ""
        with contextlib.suppress(OSError):
            goes_on = ", it goes on where it stopped" if (target / PARTIAL).is_file() else ""
        raise ModelError(
            f"{place}: {short_reason(error)}; settle that and run the same command again{goes_on}"
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


def sha256_of(
    path: Path, stop: threading.Event | None = None, see: Callable[[memoryview], None] = lambda _: None
) -> str:
    """Returns the sha256 of a file.

    Args:
        path: of the file.
        stop: ends the work early when it is set; the result is then of no use.
        see: is given each block, one after the other.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while (size := file.readinto(buffer)) and not (stop and stop.is_set()):
            digest.update(buffer[:size])
            see(buffer[:size])
    return digest.hexdigest()


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes

"""The run directory: paths, manifests, fingerprints, atomic writes.

A stage owns the folder of its name.  ``started.json`` is its first file and ``manifest.json`` its last: the manifest's
existence means that the stage finished, its fingerprint says with what.  A resumable stage killed in between finds its
own partial work again when the fingerprint in ``started.json`` is still the wanted one.  Where an earlier result
stands, and for stages that are not resumable, the work is done in a hidden folder beside and takes the place when it is
complete, so that a failure leaves the earlier result alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from doremi_mix.atomic import temporary_of, write_atomic, write_json
from doremi_mix.errors import DoremiMixError, RunDirectoryError

MANIFEST = "manifest.json"
STARTED = "started.json"
RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
RUN_FORMAT = "doremi-mix/run"


def read_json(path: Path) -> Any:
    """Reads a JSON file of the run directory.

    Raises:
        RunDirectoryError: the file was changed by hand and is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunDirectoryError(f"{path}: is not JSON ({error}); delete the stage's folder and run it again") from None


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Returns the sha256 of plain values in canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class RunDirectory:
    """One run: its configuration and the folders of its stages.  Creating the object touches no file."""

    def __init__(self, path: Path, places: Mapping[str, str] | None = None, finished: list[str] | None = None) -> None:
        self.path = path
        self.finished = [] if finished is None else finished
        """The stages that were finished through this object and its views."""
        self._places = dict(places or {})

    def with_places(self, places: Mapping[str, str]) -> RunDirectory:
        """Returns the same run seen by a part of it that keeps some stages in folders of its own.

        Args:
            places: by stage, the folder (relative to the run) that holds the stage's folder.
        """
        return RunDirectory(self.path, places, self.finished)

    def exists(self) -> bool:
        """Says whether a run was started here.

        Raises:
            RunDirectoryError: the path is a file, or a folder with other things in it.
        """
        if (self.path / RUN_FILE).exists():
            return True
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path}: is a file; choose another --run-dir")
        # What a process killed in its first moments may leave is ours, too.
        ours = {".lock", temporary_of(self.path / RUN_FILE).name}
        if self.path.is_dir() and any(entry.name not in ours for entry in self.path.iterdir()):
            raise RunDirectoryError(f"{self.path}: is not empty and not a run directory; choose another --run-dir")
        return False

    def describe(self) -> dict[str, Any]:
        """Returns what ``save`` stored.

        Raises:
            RunDirectoryError: no run was started here.
        """
        if not self.exists():
            raise RunDirectoryError(f"{self.path}: no run was started here; start one with: doremi-mix learn or run")
        data = read_json(self.path / RUN_FILE)
        if not isinstance(data, dict) or data.get("format") != RUN_FORMAT:
            raise RunDirectoryError(f"{self.path / RUN_FILE}: is not a doremi-mix run; choose another --run-dir")
        return data

    @contextlib.contextmanager
    def settings_kept(self) -> Iterator[None]:
        """Puts the stored settings back when an error of the user's stops a command before it finished any stage.

        A setting that was refused would otherwise be refused again by the next command, which does not give it.
        """
        paths = (self.path / RUN_FILE, self.path / CONFIG_FILE)
        before = {path: path.read_bytes() for path in paths if path.exists()}
        try:
            yield
        except DoremiMixError:
            if not self.finished:
                for path, content in before.items():
                    write_atomic(path, content)
            raise

    def save(self, given: Mapping[str, Any], hardware: str, resolved_yaml: str) -> None:
        """Stores the given settings, the kind of hardware that the rest was chosen for, and the resolved config."""
        # This file first: it is what makes the folder a run directory.
        write_json(self.path / RUN_FILE, {"format": RUN_FORMAT, "version": 1, "hardware": hardware, "given": given})
        write_atomic(self.path / CONFIG_FILE, resolved_yaml)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second process from writing into the same run; the lock ends with the process, also when killed.

        Raises:
            RunDirectoryError: the folder cannot be written, or another process holds the lock.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunDirectoryError(
                f"{self.path}: cannot be written ({error.strerror}); choose another --run-dir"
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunDirectoryError(
                    f"{self.path}: another doremi-mix process is working here; wait for it or choose another --run-dir"
                ) from None
            yield

    def stage_path(self, stage: str) -> Path:
        """Returns the folder of a stage."""
        return self.path / self._places.get(stage, "") / stage

    def work_path(self, stage: str, *, resumable: bool) -> Path:
        """Returns the folder in which a stage's files come into being."""
        place = self.stage_path(stage)
        return place if resumable and not (place / MANIFEST).exists() else place.parent / f".{stage}.partial"

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """Returns the manifest of a finished stage, else None."""
        path = self.stage_path(stage) / MANIFEST
        return dict(read_json(path)) if path.exists() else None

    def outdate(self, stage: str) -> None:
        """Marks a finished stage as made with other settings: the next command makes it anew."""
        manifest = self.manifest(stage)
        if manifest is not None:
            write_json(self.stage_path(stage) / MANIFEST, {**manifest, "fingerprint": ""})

    def begin(self, stage: str, wanted: str, *, resumable: bool) -> Path:
        """Makes a stage's folder ready to be filled.

        Args:
            stage: its name.
            wanted: its fingerprint.
            resumable: whether the stage can go on from partial work with the same fingerprint.

        Returns:
            The folder: empty but for ``started.json``, or with the partial work.
        """
        path = self.work_path(stage, resumable=resumable)
        started = path / STARTED
        if (
            resumable
            and started.exists()
            and not (path / MANIFEST).exists()
            and read_json(started)["fingerprint"] == wanted
        ):
            return path
        if path.exists():
            # In this order, so that a kill in between never leaves a folder that looks finished or resumable.
            (path / MANIFEST).unlink(missing_ok=True)
            started.unlink(missing_ok=True)
            shutil.rmtree(path)
        path.mkdir(parents=True)
        write_json(started, {"fingerprint": wanted})
        return path

    def finish(self, stage: str, wanted: str, record: Mapping[str, Any], *, resumable: bool) -> None:
        """Writes the manifest and puts the folder in its place: from now on the stage is finished."""
        work, place = self.work_path(stage, resumable=resumable), self.stage_path(stage)
        write_json(work / MANIFEST, {"stage": stage, "fingerprint": wanted, **record})
        if work != place:
            old = place.parent / f".{stage}.old"
            shutil.rmtree(old, ignore_errors=True)
            if place.exists():
                place.rename(old)
            work.rename(place)
            shutil.rmtree(old, ignore_errors=True)
        self.finished.append(stage)

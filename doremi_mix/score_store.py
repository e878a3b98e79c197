"""Scores of the loaded rows, kept under ``scores/`` of the run: computed once, read by whoever decides.

Each folder there is one pass over rows (a family and its settings) over one state of the loaded data, and says so in
``group.json``.  Thresholds are no part of that, so changing one re-reads scores and computes none.  What only some rows
need (a language model's scores) is computed for these rows; others are added when they are asked for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doremi_mix.atomic import write_json
from doremi_mix.errors import RunDirectoryError
from doremi_mix.filters.scores import FAMILIES
from doremi_mix.progress import Narrator, Tracker
from doremi_mix.row_jobs import JOB_FILE, WANTED, Job, Unit, from_arrow, plan_units
from doremi_mix.run import RunDirectory, fingerprint, read_json
from doremi_mix.stages.load import loaded_path, read_summary

SCORES = "scores"
GROUP_FILE = "group.json"

Executor = Callable[[Path, int, Tracker], None]
"""Runs the job in a folder, over so many rows, and says how far it is."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Columns of one family with the settings that decide their values."""

    family: str
    columns: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


class ScoreStore:
    """The scores of one run's loaded rows."""

    def __init__(self, run: RunDirectory, executor: Executor, narrator: Narrator) -> None:
        self.root = run.path / SCORES
        self._load_folder = run.stage_path("load")
        manifest = run.manifest("load")
        assert manifest is not None
        self.loaded = str(manifest["fingerprint"])
        self._executor = executor
        self._narrator = narrator
        self.domains = tuple(entry["domain"] for entry in read_summary(self._load_folder))
        self.num_rows = tuple(int(entry["num_kept"]) for entry in read_summary(self._load_folder))

    def ensure(self, request: ScoreRequest, wanted: Sequence[NDArray[np.bool_]] | None = None) -> None:
        """Computes what is missing of some columns.

        Args:
            request: the columns.
            wanted: by domain, the rows that need them; None: all.
        """
        columns = self._missing_columns(request)
        if wanted is None and not columns:
            return
        folder = self._folder(request, columns or request.columns)
        units, masks = self._missing_units(request, folder, wanted)
        if not units:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / GROUP_FILE, self._describe(request, columns or request.columns))
        if masks:
            (folder / WANTED).mkdir(exist_ok=True)
            for name, mask in masks.items():
                np.save(folder / WANTED / f"{name}.npy", mask)
        load_folder = Path("..", "..", self._load_folder.relative_to(self.root.parent))
        Job(request.family, columns or request.columns, request.settings, str(load_folder), tuple(units)).save(folder)
        num_rows = sum(int(masks[u.domain][u.start : u.stop].sum()) if u.tag else u.stop - u.start for u in units)
        with self._narrator.track(f"score {request.family}", num_rows, "rows") as tracker:
            self._executor(folder, num_rows, tracker)
        for unit in units:
            if not unit.path(folder).exists():
                raise RunDirectoryError(
                    f"{unit.path(folder)}: was not written by any worker; run the same command again"
                )
        (folder / JOB_FILE).unlink()
        shutil.rmtree(folder / WANTED, ignore_errors=True)

    def read(self, request: ScoreRequest, column: str) -> list[NDArray[Any]]:
        """Returns a column by domain, in the order of rows; NaN (or zero bytes) where no score was asked for."""
        holding = [folder for folder in self._groups(request) if column in read_json(folder / GROUP_FILE)["columns"]]
        if not holding:
            raise RunDirectoryError(f"{self.root}: has no scores {column!r}; run the same command again")
        # A pass that was killed and never asked for again may hold some of the rows, with the same values.
        parts = [
            [part for folder in holding for part in self._read_parts(folder, name, column)] for name in self.domains
        ]
        like = next((part[0][1] for part in parts if part), np.zeros(0, dtype=np.float32))
        return [_join(num_rows, part, like) for num_rows, part in zip(self.num_rows, parts, strict=True)]

    def has(self, request: ScoreRequest) -> bool:
        """Says whether every row has every column by now."""
        return not self._missing_columns(request)

    def _missing_columns(self, request: ScoreRequest) -> tuple[str, ...]:
        """Returns the columns that no finished pass over all rows has."""
        have: set[str] = set()
        for folder in self._groups(request):
            if not self._missing_units(request, folder, None)[0]:
                have |= set(read_json(folder / GROUP_FILE)["columns"])
        return tuple(column for column in request.columns if column not in have)

    def _missing_units(
        self, request: ScoreRequest, folder: Path, wanted: Sequence[NDArray[np.bool_]] | None
    ) -> tuple[list[Unit], dict[str, NDArray[np.bool_]]]:
        """Returns the units of rows without scores, and by domain which rows these are where it is not all."""
        limit = FAMILIES[request.family].max_unit_rows
        units: list[Unit] = []
        masks: dict[str, NDArray[np.bool_]] = {}
        for domain_id, (name, num_rows) in enumerate(zip(self.domains, self.num_rows, strict=True)):
            path = loaded_path(self._load_folder, name)
            missing = ~self._scored(folder, name, num_rows)
            if wanted is not None:
                missing &= wanted[domain_id]
            if not missing.any():
                continue
            if not missing.all():
                masks[name] = missing
            units += plan_units(path, name, limit, None if missing.all() else missing)
        return units, masks

    def _scored(self, folder: Path, name: str, num_rows: int) -> NDArray[np.bool_]:
        import pyarrow.parquet as pq

        scored = np.zeros(num_rows, dtype=bool)
        for path in sorted((folder / name).glob("*.parquet")):
            start, stop, *tag = path.stem.split("-")
            if tag:
                scored[pq.read_table(path, columns=["position"]).column(0).to_numpy()] = True
            else:
                scored[int(start) : int(stop)] = True
        return scored

    def _read_parts(self, folder: Path, name: str, column: str) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Yields the positions and values of each part of a domain."""
        import pyarrow.parquet as pq

        for path in sorted((folder / name).glob("*.parquet")):
            table = pq.read_table(path, columns=["position", column], use_threads=False)
            yield table.column("position").to_numpy(), from_arrow(table.schema.field(column), table.column(column))

    def _groups(self, request: ScoreRequest) -> list[Path]:
        wanted = self._describe(request, ())
        found = []
        for path in sorted(self.root.glob(f"{request.family}-*/{GROUP_FILE}")):
            if {**read_json(path), "columns": []} == wanted:
                found.append(path.parent)
        return found

    def _describe(self, request: ScoreRequest, columns: Sequence[str]) -> dict[str, Any]:
        return {
            "family": request.family,
            "version": FAMILIES[request.family].version,
            "settings": json.loads(json.dumps(request.settings)),
            "loaded": self.loaded,
            "columns": list(columns),
        }

    def _folder(self, request: ScoreRequest, columns: Sequence[str]) -> Path:
        return self.root / f"{request.family}-{fingerprint(self._describe(request, columns))[:12]}"


def _join(num_rows: int, parts: Sequence[tuple[NDArray[np.int64], NDArray[Any]]], like: NDArray[Any]) -> NDArray[Any]:
    """Puts the parts of a domain in place; without a value a row has NaN, None or 0, as the kind of ``like`` has it."""
    fill: Any = {"f": np.nan, "O": None}.get(like.dtype.kind, 0)
    result = np.full((num_rows, *like.shape[1:]), fill, dtype=like.dtype)
    for positions, values in parts:
        result[positions] = values
    return result

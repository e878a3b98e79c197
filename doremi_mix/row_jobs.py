"""Work over the loaded rows that any number of processes may share.

A job is a folder with ``job.json``: what is computed, and a list of units, each a range of rows of one domain.  A unit
becomes one file, written under another name first, so that a file that exists is complete: whoever runs a job again
does only what is missing.  A worker of rank r of n takes the units r, r + n, r + 2n, ...  Workers never speak to each
other, so they may be processes here, on other machines that share the folder, or tasks of a cluster.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from doremi_mix.atomic import temporary_of, write_json
from doremi_mix.errors import RunDirectoryError, short_reason
from doremi_mix.filters.scores import FAMILIES
from doremi_mix.run import read_json
from doremi_mix.stages.load import loaded_path

if TYPE_CHECKING:
    import pyarrow as pa

JOB_FILE = "job.json"
WANTED = ".wanted"

UNIT_BYTES = 16 * 2**20
"""Row groups are joined into one unit up to this size (load's files hold about a quarter of it in a group)."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Some rows of one domain: those of row groups of its file between two positions.

    Attributes:
        domain: its name.
        row_group: of the loaded file, or the first of several.
        num_row_groups: how many.
        first: position of the first row of the row groups.
        start: first position.
        stop: position after the last one.
        tag: "" when all of these rows are meant, else what identifies those that are.
    """

    domain: str
    row_group: int
    num_row_groups: int
    first: int
    start: int
    stop: int
    tag: str = ""

    def path(self, folder: Path) -> Path:
        """Returns the file that the unit becomes."""
        return folder / self.domain / f"{self.start:010d}-{self.stop:010d}{self.tag}.parquet"


@dataclass(frozen=True, slots=True)
class Job:
    """What ``job.json`` holds.

    Attributes:
        family: the pass over the rows, in ``filters.scores.FAMILIES``.
        columns: that are wanted of it.
        settings: of the family.
        load_folder: where the loaded rows are, relative to the job's folder.
        units: the work.
    """

    family: str
    columns: tuple[str, ...]
    settings: Mapping[str, Any]
    load_folder: str
    units: tuple[Unit, ...]

    @property
    def uses_gpu(self) -> bool:
        """Whether it runs a model."""
        return FAMILIES[self.family].uses_gpu

    def save(self, folder: Path) -> None:
        """Writes ``job.json``."""
        write_json(folder / JOB_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Reads what ``save`` wrote."""
        data = read_json(folder / JOB_FILE)
        units = tuple(Unit(**unit) for unit in data.pop("units"))
        return cls(**{**data, "columns": tuple(data["columns"])}, units=units)


def plan_units(path: Path, domain: str, max_unit_rows: int, missing: NDArray[np.bool_] | None = None) -> Iterator[Unit]:
    """Cuts a domain's rows into units.

    Args:
        path: its loaded file.
        domain: its name.
        max_unit_rows: rows of a unit at most.
        missing: by position, whether the row is to be scored; None: all rows.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    row_group = first = 0
    for count, num_rows in _join_groups(sizes, max_unit_rows):
        if missing is None or missing[first : first + num_rows].all():
            for start in range(first, first + num_rows, max_unit_rows):
                stop = min(start + max_unit_rows, first + num_rows)
                yield Unit(domain, row_group, count, first, start, stop)
        else:
            positions = first + np.flatnonzero(missing[first : first + num_rows])
            for at in range(0, len(positions), max_unit_rows):
                some = positions[at : at + max_unit_rows]
                tag = "-" + hashlib.sha256(some.astype("<i8").tobytes()).hexdigest()[:12]
                yield Unit(domain, row_group, count, first, int(some[0]), int(some[-1]) + 1, tag)
        row_group += count
        first += num_rows


def _join_groups(sizes: Sequence[tuple[int, int]], max_unit_rows: int) -> Iterator[tuple[int, int]]:
    """Joins row groups (rows, bytes) that make one unit together: yields their number and their rows."""
    count = num_rows = num_bytes = 0
    for group_rows, group_bytes in sizes:
        if count and (num_rows + group_rows > max_unit_rows or num_bytes + group_bytes > UNIT_BYTES):
            yield count, num_rows
            count = num_rows = num_bytes = 0
        count, num_rows, num_bytes = count + 1, num_rows + group_rows, num_bytes + group_bytes
    if count:
        yield count, num_rows


def run_units(folder: Path, rank: int, world_size: int, on_rows: Callable[[int], None]) -> None:
    """Does a worker's share of a job.

    Args:
        folder: of the job.
        rank: of this worker.
        world_size: number of workers.
        on_rows: called with the number of rows after each unit.
    """
    job = Job.read(folder)
    units = [unit for unit in job.units[rank::world_size] if not unit.path(folder).exists()]
    if not units:
        return
    family = FAMILIES[job.family]
    scorer = family.make(job.settings, job.columns)
    for unit, batch, positions in _batches(folder, job, units, family.reads):
        scores = scorer(batch)
        _write_part(unit.path(folder), positions, {name: scores[name] for name in job.columns})
        on_rows(batch.num_rows)


def _batches(
    folder: Path, job: Job, units: Sequence[Unit], reads: tuple[str, ...]
) -> Iterator[tuple[Unit, pa.RecordBatch, NDArray[np.int64]]]:
    """Yields each unit with its rows and their positions; units in a row that share a row group read it once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    at: tuple[str, int] | None = None
    wanted: dict[str, NDArray[np.bool_]] = {}
    for unit in units:
        if at != (unit.domain, unit.row_group):
            at = (unit.domain, unit.row_group)
            groups = list(range(unit.row_group, unit.row_group + unit.num_row_groups))
            path = loaded_path(folder / job.load_folder, unit.domain)
            with pq.ParquetFile(path, pre_buffer=False) as file:
                table = file.read_row_groups(groups, columns=list(reads), use_threads=False).combine_chunks()
        if unit.tag:
            if unit.domain not in wanted:
                wanted[unit.domain] = np.load(folder / WANTED / f"{unit.domain}.npy")
            positions = unit.start + np.flatnonzero(wanted[unit.domain][unit.start : unit.stop])
            rows = table.take(pa.array(positions - unit.first))
        else:
            positions = np.arange(unit.start, unit.stop)
            rows = table.slice(unit.start - unit.first, unit.stop - unit.start)
        yield unit, rows.combine_chunks().to_batches(max_chunksize=None)[0], positions


def _write_part(path: Path, positions: NDArray[np.int64], scores: Mapping[str, NDArray[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields, arrays = [pa.field("position", pa.int64())], [pa.array(positions)]
    for name, values in scores.items():
        field, array = _to_arrow(name, values)
        fields.append(field)
        arrays.append(array)
    table = pa.table(arrays, schema=pa.schema(fields))
    # Two workers may do one unit at the same time after a restart, also on machines with equal process ids; each writes
    # its own file and the last one stays.
    temporary = temporary_of(path).with_suffix(f".{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd", write_statistics=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunDirectoryError(
            f"{path.parent}: cannot be written ({short_reason(error)}); make room, or choose another --run-dir"
        ) from None


def _to_arrow(name: str, values: NDArray[Any]) -> tuple[pa.Field, pa.Array]:
    """Makes an Arrow column of one value per row, or of one vector (as bytes, with its type beside)."""
    import pyarrow as pa

    if values.ndim == 1:
        array = pa.array(values)
        return pa.field(name, array.type), array
    width = values.dtype.itemsize * values.shape[1]
    data = pa.py_buffer(np.ascontiguousarray(values))
    kind = pa.binary(width)
    meta = {"dtype": values.dtype.str, "width": str(values.shape[1])}
    return pa.field(name, kind, metadata=meta), pa.Array.from_buffers(kind, len(values), [None, data])


def from_arrow(field: pa.Field, column: pa.ChunkedArray) -> NDArray[Any]:
    """Reads back a column of a part."""
    import pyarrow as pa

    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], field.type)
    if not pa.types.is_fixed_size_binary(field.type):
        values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
        return values
    dtype, width = np.dtype(field.metadata[b"dtype"].decode()), int(field.metadata[b"width"])
    flat = np.frombuffer(array.buffers()[1], dtype=dtype, count=(array.offset + len(array)) * width)
    return flat.reshape(-1, width)[array.offset :]

"""Stage load: every source into one schema, ``<domain>.parquet``; what was not kept goes to ``rejections.parquet``.

Writes ``summary.json``: per domain the rows, the kept ones and the rejected ones by rule.  Rows in = kept + rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from doremi_mix.atomic import write_json
from doremi_mix.config import Config
from doremi_mix.errors import ConfigError, DataError, SourceFormatError, TooManyRejectedError
from doremi_mix.progress import Narrator
from doremi_mix.run import read_json
from doremi_mix.sources import OpenSource, Source, open_source
from doremi_mix.sources.catalog import resolve
from doremi_mix.sources.files import domain_name, sha256_of
from doremi_mix.types import Domains, Example, Rejection

if TYPE_CHECKING:
    import pyarrow as pa

    from doremi_mix.stages import StageContext

REJECTIONS = "rejections"
"""The rows that were not kept lie beside the domains, under this name."""

CHUNK_BYTES = 4 * 2**20
"""How much row text is held before it is written: bounds memory, here and in the stages that read it back."""

PAGE_BYTES = 2**16
"""How much of a column is read at a time."""


@dataclass
class SourceCounts:
    """What became of one source's rows."""

    domain: str
    path: str
    format: str
    schema: str
    num_rows: int = 0
    num_kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    first_rejection: str = ""

    def line(self) -> str:
        """Returns one line for a person."""
        line = f"  {self.domain}: {self.num_kept:,} rows, {self.format}, {self.schema}"
        if self.rejected:
            line += "; rejected " + ", ".join(f"{count:,} {rule}" for rule, count in self.rejected.most_common())
        return line

    def check(self, max_rejected_share: float) -> None:
        """Raises when nothing is left of the source, or too little."""
        num_rejected = self.num_rows - self.num_kept
        if self.num_rows == 0:
            raise SourceFormatError(f"{self.path}: holds no rows; remove it or give another file")
        if num_rejected > max_rejected_share * self.num_rows:
            rules = ", ".join(f"{rule} {count:,}" for rule, count in self.rejected.most_common(3))
            raise TooManyRejectedError(
                f"{self.path}: {num_rejected:,} of {self.num_rows:,} rows were rejected "
                f"({num_rejected / self.num_rows:.1%}, allowed {max_rejected_share:.1%}): {rules}; first: "
                f"{self.first_rejection}; mend the file, or raise load.max_rejected_share"
            )
        if self.num_kept == 0:
            raise DataError(f"{self.path}: no row is left; first: {self.first_rejection}; remove the file or mend it")


def list_sources(config: Config) -> list[Source]:
    """Returns the sources of a configuration with their paths resolved.

    Raises:
        ConfigError: an unknown catalog, a domain name that cannot name a file, or two sources with one name.
        DataError: there is only one domain.
    """
    root = Path(config.data_root or ".")
    if config.catalog is not None:
        return resolve(config.catalog, root)
    sources = [
        Source(
            name=source.name or domain_name(Path(source.path)),
            path=root / source.path,
            format=source.format,
            schema=source.schema_,
            columns=source.columns,
        )
        for source in config.sources
    ]
    for source in sources:
        if source.name == REJECTIONS:
            raise ConfigError(
                f"{source.path}: a domain cannot be named {REJECTIONS!r}, which is the file of rejected rows; "
                f"set another: sources: - {{path: {source.path}, name: ...}}"
            )
    if len(sources) < 2:
        raise DataError(
            f"{sources[0].path}: is the only domain; weights need two or more to choose between, one file each"
        )
    try:
        Domains(tuple(source.name for source in sources))
    except ValueError as error:
        raise ConfigError(f"sources: {error}; give one of them another name") from None
    return sources


def describe_sources(config: Config) -> list[dict[str, Any]]:
    """Returns what identifies the input: names, contents and reading settings, but not where the files lie."""
    return [
        {
            "name": source.name,
            "sha256": sha256_of(source.path),
            "format": source.format,
            "schema": source.schema,
            "columns": dict(source.columns),
        }
        for source in list_sources(config)
    ]


def peek_sources(config: Config) -> None:
    """Opens every source and reads its first rows, so that a missing or unreadable one stops a run before it starts.

    Raises:
        DataError: a source does not exist, cannot be read, or fits no schema.
    """
    for source in list_sources(config):
        open_source(source)


def check_sources(config: Config, narrator: Narrator) -> list[SourceCounts]:
    """Reads every row of every source and writes nothing, for ``--dry-run``.

    Raises:
        DataError: as the stage would.
    """
    results = []
    for source in list_sources(config):
        opened = open_source(source)
        counts = _counts_of(opened)
        with narrator.track(f"check {source.name}", None, "rows") as tracker:
            for kept, rejected in _chunks(opened, counts):
                tracker.advance(len(kept) + len(rejected))
        counts.check(config.load.max_rejected_share)
        results.append(counts)
    return results


def run(context: StageContext) -> str:
    """Reads every source; returns one line about it."""
    import pyarrow.parquet as pq

    sources = list_sources(context.config)
    summary = []
    rejections_path = loaded_path(context.folder, REJECTIONS)
    # Statistics are the smallest and the largest text of each piece, in memory until the end; nobody asks for them.
    with pq.ParquetWriter(
        rejections_path, _rejection_schema(), compression="zstd", write_statistics=False
    ) as rejections:
        for source in sources:
            opened = open_source(source)
            counts = _counts_of(opened)
            path = loaded_path(context.folder, source.name)
            with (
                context.narrator.track(f"load {source.name}", None, "rows") as tracker,
                pq.ParquetWriter(path, _example_schema(), compression="zstd", write_statistics=False) as writer,
            ):
                for kept, rejected in _chunks(opened, counts):
                    _write_examples(writer, kept)
                    if rejected:
                        _write_rejections(rejections, rejected)
                    tracker.advance(len(kept) + len(rejected))
            counts.check(context.config.load.max_rejected_share)
            summary.append(counts)
            context.narrator.say(counts.line())
    write_json(
        context.folder / "summary.json",
        {
            "domains": [
                {**asdict(counts), "rejected": dict(counts.rejected), "sha256": sha256_of(Path(counts.path))}
                for counts in summary
            ]
        },
    )
    num_rows = sum(counts.num_rows for counts in summary)
    num_kept = sum(counts.num_kept for counts in summary)
    return f"{num_rows:,} rows = {num_kept:,} kept + {num_rows - num_kept:,} rejected"


def read_examples(folder: Path, domain: str, chunk_size: int = 512) -> Iterator[list[Example]]:
    """Reads back what the stage kept of a domain, in order, in lists of at most ``chunk_size``."""
    for batch in _read_batches(loaded_path(folder, domain), chunk_size):
        yield _examples_of(batch, domain)


def read_examples_at(
    folder: Path, domain: str, rows: NDArray[np.int64], chunk_size: int = 512
) -> Iterator[list[Example]]:
    """Reads back single examples of a domain, in lists of at most ``chunk_size``.

    Args:
        folder: of stage load or filter.
        domain: its name.
        rows: which of its kept examples, in ascending order, each once.
        chunk_size: examples that are looked at together.
    """
    first = 0
    for batch in _read_batches(loaded_path(folder, domain), chunk_size):
        low, high = np.searchsorted(rows, [first, first + batch.num_rows])
        if low < high:
            yield _examples_of(batch.take(rows[low:high] - first), domain)
        first += batch.num_rows
        if high == len(rows):
            return


def _examples_of(batch: pa.RecordBatch, domain: str) -> list[Example]:
    columns = batch.to_pydict()
    return [
        Example(
            id=columns["id"][i],
            domain=domain,
            instruction=columns["instruction"][i],
            input=columns["input"][i],
            output=columns["output"][i],
            history=tuple((turn["user"], turn["assistant"]) for turn in columns["history"][i]),
            system=columns["system"][i],
            row=columns["row"][i],
        )
        for i in range(batch.num_rows)
    ]


def read_rows(folder: Path, domain: str, chunk_size: int = 512) -> Iterator[list[str]]:
    """Reads back the input rows of a domain's kept examples, each as one line of JSON."""
    for batch in _read_batches(loaded_path(folder, domain), chunk_size, columns=["row"]):
        yield batch.column(0).to_pylist()


def read_ids(folder: Path, domain: str) -> pa.ChunkedArray:
    """Reads back the ids of a domain's kept examples."""
    import pyarrow.parquet as pq

    return pq.read_table(loaded_path(folder, domain), columns=["id"], use_threads=False).column(0)


def _read_batches(path: Path, chunk_size: int, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Reads a Parquet file page by page; left to itself, pyarrow would keep all of the file until the end."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False, buffer_size=PAGE_BYTES) as file:
        yield from file.iter_batches(chunk_size, columns=columns, use_threads=False)


def loaded_path(folder: Path, domain: str) -> Path:
    """Returns the Parquet file of a domain."""
    return folder / f"{domain}.parquet"


def read_summary(folder: Path) -> list[dict[str, Any]]:
    """Returns ``summary.json``: one mapping per domain, in the order of domains."""
    domains: list[dict[str, Any]] = read_json(folder / "summary.json")["domains"]
    return domains


def _counts_of(opened: OpenSource) -> SourceCounts:
    return SourceCounts(opened.source.name, str(opened.source.path), opened.format, opened.schema.describe())


def _chunks(opened: OpenSource, counts: SourceCounts) -> Iterator[tuple[list[Example], list[Rejection]]]:
    """Groups a source's rows into pieces of bounded size, each gone when the next one is asked for, and counts them."""
    kept: list[Example] = []
    rejected: list[Rejection] = []
    num_bytes = 0
    for item in opened:
        counts.num_rows += 1
        num_bytes += len(item.row) + 200
        if isinstance(item, Example):
            counts.num_kept += 1
            kept.append(item)
        else:
            counts.rejected[item.rule] += 1
            counts.first_rejection = counts.first_rejection or f"row {item.row_number:,}: {item.detail}"
            rejected.append(item)
        if num_bytes >= CHUNK_BYTES:
            yield kept, rejected
            kept.clear()
            rejected.clear()
            num_bytes = 0
    yield kept, rejected


def _example_schema() -> pa.Schema:
    import pyarrow as pa

    turn = pa.struct([("user", pa.string()), ("assistant", pa.string())])
    texts = [(name, pa.string()) for name in ("instruction", "input", "output", "system", "row")]
    return pa.schema([("id", pa.string()), ("domain", pa.string()), *texts, ("history", pa.list_(turn))])


def _rejection_schema() -> pa.Schema:
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("id", "domain", "path", "rule", "detail", "row")]
    return pa.schema([*texts, ("row_number", pa.int64())])


def _write_examples(writer: Any, examples: list[Example]) -> None:
    import pyarrow as pa

    columns: dict[str, Any] = {
        name: [getattr(example, name) for example in examples]
        for name in ("id", "domain", "instruction", "input", "output", "system", "row")
    }
    schema = _example_schema()
    if any(example.history for example in examples):
        columns["history"] = [[{"user": user, "assistant": answer} for user, answer in e.history] for e in examples]
    else:  # most collections have single turns
        no_turns = pa.array([], schema.field("history").type.value_type)
        columns["history"] = pa.ListArray.from_arrays([0] * (len(examples) + 1), no_turns)
    writer.write_table(pa.table(columns, schema=schema))


def _write_rejections(writer: Any, rejections: list[Rejection]) -> None:
    import pyarrow as pa

    schema = _rejection_schema()
    columns = {name: [getattr(rejection, name) for rejection in rejections] for name in schema.names}
    writer.write_table(pa.table(columns, schema=schema))

"""The mixture as a folder that ``datasets.load_dataset`` reads: Parquet files and a dataset card.

Rows of different sources have different columns.  The folder's columns are those of all of them; what a row has not is
None.  Nested values stay nested.  A value that has no one type over all rows (a number here, a text there) becomes its
JSON text, and the card says where.  The rows are read twice, never held all at once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doremi_mix.atomic import write_atomic
from doremi_mix.dataset_card import dataset_card
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import DataError, ExportError, RunDirectoryError, StageNotFinishedError, short_reason

if TYPE_CHECKING:
    import pyarrow as pa
    from huggingface_hub import HfApi

SHARD_BYTES = 500_000_000
"""JSON text of one Parquet file, which is several times smaller."""

GROUP_BYTES = 16 * 2**20
"""JSON text that is in memory at a time: a row group."""

GROUP_ROWS = 10_000
MAX_KEYS = 200
"""An object with more keys than this, over all rows, is a mapping from data to data: as a struct it would be absurd."""

MAX_DEPTH = 12


@dataclass(frozen=True, slots=True)
class DatasetFolder:
    """What was written.

    Attributes:
        path: the folder.
        num_rows: rows of the mixture.
        shards: the Parquet files, relative to the folder.
        json_columns: where values became JSON text, as paths: ``meta.score``, ``turns[].value``.
    """

    path: Path
    num_rows: int
    shards: tuple[str, ...]
    json_columns: tuple[str, ...]


def write_dataset_folder(
    mixture: Path,
    folder: Path,
    *,
    weights: DomainWeights | None = None,
    title: str = "",
    license_id: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] | None = None,
) -> DatasetFolder:
    """Writes the mixture of a run as a ``datasets`` folder with a dataset card.

    Args:
        mixture: the folder of the stage: ``mixture.jsonl`` and ``allocation.json``.
        folder: what to write; it must not exist, or be empty.  It appears when it is complete.
        weights: the weights of the run, for where the mixture comes from and whether it helps.
        title: of the card.
        license_id: as the hub knows it ("cc-by-4.0"); without it the card names none, because none is known.
        shard_bytes: the most JSON text of one file.
        advance: called with numbers of rows as they are read; each row is read twice.

    Returns:
        What was written.

    Raises:
        StageNotFinishedError: there is no mixture.
        RunDirectoryError: the folder has something in it, or cannot be written.
        DataError: the mixture was changed by hand and is no longer rows of JSON objects.
    """
    rows = mixture / "mixture.jsonl"
    try:
        allocation = json.loads((mixture / "allocation.json").read_text(encoding="utf-8"))
        rows.stat()
    except OSError:
        raise StageNotFinishedError(f"{mixture}: has no mixture; run: doremi-mix mixture") from None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunDirectoryError(f"{folder}: is there already and not empty; remove it, or give another folder")
    advance = advance or (lambda _: None)
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "data").mkdir(parents=True)
        contents = _look(rows, advance)
        shards = _write_shards(rows, partial, contents, shard_bytes, advance)
        json_columns = tuple(_json_paths(contents.columns))
        card = dataset_card(
            allocation,
            weights,
            num_rows=contents.num_rows,
            sha256=contents.sha256,
            json_columns=json_columns,
            title=title,
            license_id=license_id,
        )
        write_atomic(partial / "README.md", card)
        partial.replace(folder)
    except OSError as error:
        raise RunDirectoryError(f"{folder}: cannot be written ({short_reason(error)}); give another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return DatasetFolder(folder, contents.num_rows, shards, json_columns)


def push(
    folder: Path, repo_id: str, *, private: bool = True, token: str | None = None, api: HfApi | None = None
) -> str:
    """Uploads a dataset folder to the Hugging Face hub; nothing else here reaches the network.

    Args:
        folder: what ``write_dataset_folder`` wrote.
        repo_id: "user/name"; it is made if it is not there.  Earlier files under ``data/`` are replaced.
        private: who may see it.  A repository that is there and public is refused, unless this is False.
        token: of the hub; without it, the one of the login.
        api: another client of the hub.

    Returns:
        The address of the dataset.

    Raises:
        ExportError: it is not a dataset folder, the repository is public, or the hub refused.
    """
    if not (folder / "README.md").is_file() or not any((folder / "data").glob("*.parquet")):
        raise ExportError(f"{folder}: is not a dataset folder; write one first, with a README.md and data/*.parquet")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # What the hub's HTTP library raises; which library that is changed between its releases.
    refusals: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError, OSError)
    api = api or HfApi(token=token)
    try:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        # A repository that was there keeps its visibility, whatever was asked for.
        if private and not api.repo_info(repo_id, repo_type="dataset").private:
            raise ExportError(
                f"{repo_id}: is public, and the mixture was to stay private; make it private on the hub, give another "
                "name, or say that it may be public"
            )
        # Files of an earlier upload with more of them would be read as part of this one.
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=str(folder),
            commit_message="Mixture drawn by doremi-mix",
            delete_patterns="data/*",
        )
    except refusals as error:
        raise ExportError(
            f"{repo_id}: the hub cannot take it ({short_reason(error)}); check the name, the login (hf auth login) and "
            "the network"
        ) from None
    return f"https://huggingface.co/datasets/{repo_id}"


# What the rows are.  A kind is a word for a scalar, a list with the kind of its items, or an object by key.


@dataclass(frozen=True, slots=True)
class _ListOf:
    item: Kind


Kind = str | _ListOf | dict[str, "Kind"]


def kind_of(value: Any, depth: int = 0) -> Kind:
    """Returns the kind of a JSON value: null, bool, int, long, float, text, a list, an object, or json for no type.

    ``int`` is what a float64 holds exactly, ``long`` what needs an int64.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= 2**53 else "long" if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, float):
        return "float"
    if isinstance(value, str):
        return "text" if _is_utf8(value) else "json"
    if depth >= MAX_DEPTH:
        return "json"
    if isinstance(value, list):
        item: Kind = "null"
        for entry in value:
            item = join(item, kind_of(entry, depth + 1))
        return _ListOf(item)
    if len(value) > MAX_KEYS or not all(map(_is_utf8, value)):
        return "json"
    return {key: kind_of(entry, depth + 1) for key, entry in value.items()}


def join(one: Kind, other: Kind) -> Kind:
    """Returns the kind that holds values of both."""
    if other in (one, "null"):
        return one
    if one == "null":
        return other
    if isinstance(one, _ListOf) and isinstance(other, _ListOf):
        return _ListOf(join(one.item, other.item))
    if isinstance(one, dict) and isinstance(other, dict):
        joined = {key: join(kind, other.get(key, "null")) for key, kind in one.items()}
        joined.update((key, kind) for key, kind in other.items() if key not in joined)
        return joined if len(joined) <= MAX_KEYS else "json"
    if isinstance(one, str) and isinstance(other, str) and {one, other} <= {"int", "long", "float"}:
        return "long" if "float" not in (one, other) else "float" if "long" not in (one, other) else "json"
    return "json"


def _is_utf8(text: str) -> bool:
    """Says whether text can be written: JSON can hold half of a character (a lone surrogate), files cannot."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _settled(kind: Kind) -> Kind:
    """Returns a kind with what no file can hold replaced: objects without keys, and values that are always null."""
    if isinstance(kind, _ListOf):
        return _ListOf(_settled(kind.item))
    if isinstance(kind, dict):
        return {key: _settled(entry) for key, entry in kind.items()} or "json"
    return "text" if kind == "null" else kind


def _arrow_type(kind: Kind) -> pa.DataType:
    import pyarrow as pa

    if isinstance(kind, _ListOf):
        return pa.list_(_arrow_type(kind.item))
    if isinstance(kind, dict):
        return pa.struct([pa.field(key, _arrow_type(entry)) for key, entry in kind.items()])
    scalars = {"bool": pa.bool_(), "int": pa.int64(), "long": pa.int64(), "float": pa.float64()}
    return scalars.get(kind, pa.string())


def _encoded(value: Any, kind: Kind) -> Any:
    """Returns a value as its column holds it."""
    if value is None:
        return None
    if isinstance(kind, _ListOf):
        return [_encoded(entry, kind.item) for entry in value]
    if isinstance(kind, dict):
        return {key: _encoded(value.get(key), entry) for key, entry in kind.items()}
    if kind == "json":
        text = json.dumps(value, ensure_ascii=False)
        return text if _is_utf8(text) else json.dumps(value)
    return float(value) if kind == "float" else value


def _json_paths(kind: Kind, prefix: str = "") -> Iterator[str]:
    """Yields where JSON text stands in a kind."""
    if isinstance(kind, _ListOf):
        yield from _json_paths(kind.item, f"{prefix}[]")
    elif isinstance(kind, dict):
        for key, entry in kind.items():
            yield from _json_paths(entry, f"{prefix}.{key}" if prefix else key)
    elif kind == "json":
        yield prefix


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a first reading of the rows finds."""

    columns: dict[str, Kind]
    num_rows: int
    num_bytes: int
    sha256: str


def _look(path: Path, advance: Callable[[int], None]) -> _Contents:
    """Reads all rows, for their columns."""
    columns: dict[str, Kind] = {}
    digest = hashlib.sha256()
    num_rows = num_bytes = 0
    for line, row in _read(path):
        for key, value in row.items():
            kind = kind_of(value)
            known = columns.get(key)
            if known is None and not _is_utf8(key):
                raise DataError(
                    f"{path}: row {num_rows + 1}: the key {key!r} has a character that no file can hold; rename it"
                )
            columns[key] = kind if known is None else join(known, kind)
        digest.update(line)
        num_bytes += len(line)
        num_rows += 1
        advance(1)
    if not num_rows:
        raise DataError(f"{path}: holds no rows; draw the mixture again")
    return _Contents({key: _settled(kind) for key, kind in columns.items()}, num_rows, num_bytes, digest.hexdigest())


def _read(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each line with the object that it holds."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}: row {number:,}: is not JSON ({error}); draw the mixture again") from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}: row {number:,}: must be an object, got a {type(row).__name__}; draw the mixture again"
                )
            yield line, row


def _write_shards(
    rows: Path, folder: Path, contents: _Contents, shard_bytes: int, advance: Callable[[int], None]
) -> tuple[str, ...]:
    """Writes the rows into files of as many rows each; returns the names of the files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([pa.field(key, _arrow_type(kind)) for key, kind in contents.columns.items()])
    num_shards = min(max(1, -(-contents.num_bytes // shard_bytes)), contents.num_rows)
    names = tuple(f"data/train-{number:05d}-of-{num_shards:05d}.parquet" for number in range(num_shards))
    lines = _read(rows)
    for number, name in enumerate(names):
        left = (number + 1) * contents.num_rows // num_shards - number * contents.num_rows // num_shards
        # Statistics are the smallest and the largest text of each piece; nobody asks for them.
        with pq.ParquetWriter(folder / name, schema, compression="zstd", write_statistics=False) as writer:
            while left:
                group: list[dict[str, Any]] = []
                num_bytes = 0
                while left and len(group) < GROUP_ROWS and num_bytes < GROUP_BYTES:
                    line, row = next(lines)
                    group.append({key: _encoded(row.get(key), kind) for key, kind in contents.columns.items()})
                    num_bytes += len(line)
                    left -= 1
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                advance(len(group))
    return names

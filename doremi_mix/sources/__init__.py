"""Datasets as published and how to read them, from files over rows (readers) to examples (schemas)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from doremi_mix.errors import ConfigError, SourceFormatError
from doremi_mix.sources.files import FORMATS
from doremi_mix.sources.readers import detect_format, read_rows
from doremi_mix.sources.schemas import RowSchema, check_overrides, detect_schema, make_converter
from doremi_mix.types import Example, Rejection

__all__ = ["OpenSource", "Source", "open_source"]

_NUM_PEEKED_ROWS = 200


_LONGEST_NAME = 200
"""Bytes; file systems allow 255, and suffixes are added."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file and what is known about it; whatever is not given is found out when it is opened.

    Attributes:
        name: the name of its domain, which also names files.
        path: the file.
        format: ``json``, ``jsonl`` or ``parquet``.
        schema: ``alpaca``, ``chat`` or ``text``.
        columns: for single parts of the schema, the column that holds them: ``{"instruction": "prompt"}``.

    Raises:
        ConfigError: on construction, when one of them is not possible.
    """

    name: str
    path: Path
    format: str | None = None
    schema: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = self.name
        if not name or name != name.strip() or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
            raise ConfigError(
                f"{self.path}: the domain name {name!r} cannot name a file, expected printable characters, no slash and"
                f" no dot or space first; set another: sources: - {{path: {self.path}, name: ...}}"
            )
        if len(name.encode()) > _LONGEST_NAME:
            raise ConfigError(
                f"{self.path}: the domain name is longer than {_LONGEST_NAME} bytes, too long to name files; "
                "set another: sources: - {path: ..., name: ...}"
            )
        if self.format is not None and self.format not in FORMATS:
            near = difflib.get_close_matches(self.format, FORMATS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{self.path}: format must be one of {', '.join(FORMATS)} (compression is recognized),"
                f' got "{self.format}"{hint}'
            )
        try:
            check_overrides(self.schema, self.columns)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from error


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A source whose format and schema are known; each iteration reads the file anew, in order, row by row."""

    source: Source
    format: str
    schema: RowSchema

    def __iter__(self) -> Iterator[Example | Rejection]:
        convert = make_converter(self.schema, path=self.source.path, domain=self.source.name)
        return map(convert, read_rows(self.source.path, self.format))


def open_source(source: Source) -> OpenSource:
    """Finds the format and the schema of a source, from its content and its first 200 rows.

    Iterating the result yields an Example or a Rejection for every row of the file.

    Raises:
        SourceNotFoundError: there is no such file.
        SourceFormatError: the file cannot be read, here or while iterating; or none of its first rows is an object.
        SchemaError: its columns fit no schema, or more than one.
    """
    kind = source.format or detect_format(source.path)
    with closing(read_rows(source.path, kind)) as rows:
        peeked = list(islice(rows, _NUM_PEEKED_ROWS))
    values = [row.value for row in peeked if row.value is not None]
    if not values:
        first = peeked[0]
        detail = first.problem[1] if first.problem else ""
        raise SourceFormatError(
            f"{source.path}: none of its first {len(peeked):,} rows can be used (row {first.number:,}: {detail});"
            " give rows that are JSON objects"
        )
    schema = detect_schema(source.path, values, schema=source.schema, columns=source.columns)
    return OpenSource(source, kind, schema)

"""From the bytes of a file to its rows: JSON arrays, JSON Lines and Parquet, also packed with gzip or Zstandard.

Two kinds of defect are kept apart.  A file that cannot be read to its end (empty, truncated, another format) raises
SourceFormatError with the row that was reached.  A bad row inside a good file does not: it comes out as a RawRow with a
``problem``, to be rejected and counted.

JSON is parsed by the standard library's C scanner over a bounded buffer.  It is the reader that keeps text as it is:
ijson (yajl) is no faster, reads the escape of a lone surrogate as "?" or as another character, and gives up the whole
file for an invalid byte, for NaN or for an integer of 20 digits.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from doremi_mix.errors import DataError, SourceFormatError, short_reason
from doremi_mix.sources.files import (
    CHUNK_BYTES,
    FORMATS,
    detect_format,
    domain_name,
    find_files,
    open_bytes,
    sha256_of,
)

__all__ = [
    "FORMATS",
    "MAX_ROW_BYTES",
    "RawRow",
    "detect_format",
    "domain_name",
    "find_files",
    "json_kind",
    "read_rows",
    "sha256_of",
]

MAX_ROW_BYTES = 64 << 20  # a "row" longer than this is a file without line ends, not an example
_MAX_BROKEN_CHARACTERS = 2000
_PARQUET_BATCH_ROWS = 1024
_JSON_SPACE = " \t\r\n"
_match_space = re.compile(r"[ \t\r\n]*").match
_match_comma = re.compile(r"[ \t\r\n]*,[ \t\r\n]*").match

# NaN and Infinity are not JSON, but pandas writes NaN for a missing value: they are read as null.
_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(parse_constant=lambda _name: None).scan_once  # type: ignore[attr-defined]
_SCAN_ERRORS = (StopIteration, ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a file, before anything is known about its columns.

    Attributes:
        number: its place in the file, from 1; in JSON Lines the number of the line, so that an editor finds it.
        value: the row; None when it has a problem.
        text: the row as one line of JSON; of a line that is not JSON, its first 2,000 characters as they are.
        problem: why the row cannot be used, as (rule, detail): ``broken_json``, ``not_an_object``, ``not_unicode`` or
            ``too_long``; None for a good row.
    """

    number: int
    value: dict[str, Any] | None
    text: str
    problem: tuple[str, str] | None = None


def read_rows(path: Path, format: str | None = None) -> Generator[RawRow, None, None]:  # noqa: A002 - the config's own word
    """Reads the rows of a file in order, holding only a small part of it in memory.

    A row has the same value and text in every format and compression. What JSON has no word for becomes a string
    (timestamps, decimals, bytes) or null (NaN, Infinity); what is valid in a row is never altered.

    Args:
        path: the file. Compression is recognized by content.
        format: ``json`` (an array), ``jsonl`` or ``parquet``; None recognizes it.

    Yields:
        One RawRow per row; blank lines are passed over.

    Raises:
        SourceNotFoundError: there is no such file.
        SourceFormatError: the file is empty, truncated, damaged or of another format.
    """
    reader = {"json": _read_array, "jsonl": _read_lines, "parquet": _read_parquet}[format or detect_format(path)]
    number = 0
    try:
        with open_bytes(path) as stream:
            for row in reader(stream, path):
                number = row.number
                yield row
    except DataError:
        raise
    except EOFError as error:
        raise _truncated(path, number + 1, short_reason(error)) from error
    except OSError as error:
        reached = f"after row {number:,}" if number else "from its start"
        raise SourceFormatError(
            f"{path}: cannot be read {reached} ({short_reason(error)}); the file is damaged: copy or download it again"
        ) from error
    if number == 0:
        raise SourceFormatError(f"{path}: holds no rows, expected at least one; fill the file or leave it out")


def _truncated(path: Path, number: int, reason: str) -> SourceFormatError:
    return SourceFormatError(
        f"{path}: ends inside row {number:,} ({reason}); the file is truncated: copy or download it again"
    )


class _Text:
    """The decoded text of a stream, of which only the part from ``at`` on and one more chunk are held."""

    def __init__(self, stream: io.BufferedReader[Any]) -> None:
        self._read = stream.read1  # read() would lose what it had when the stream fails
        # Bytes that are not UTF-8 become lone surrogates, which makes them the defect of a row, not of the file.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.buffer, self.at = "", 0
        while not self.buffer and self.refill():
            pass
        self.buffer = self.buffer.removeprefix("\ufeff")

    def refill(self) -> bool:
        """Drops what has been read and adds a chunk; returns False at the end."""
        chunk = self._read(CHUNK_BYTES)
        if chunk:
            self.buffer, self.at = self.buffer[self.at :] + self._decode(chunk), 0
        return bool(chunk)

    def double(self) -> bool:
        """Refills until twice as much is held, so that parsing a long row again and again stays linear."""
        wanted = 2 * (len(self.buffer) - self.at)
        grown = self.refill()
        while grown and len(self.buffer) < wanted and self.refill():
            pass
        return grown

    def next_character(self) -> str:
        """Moves over space and returns the character there, or "" at the end."""
        while True:
            self.at = _match_space(self.buffer, self.at).end()  # type: ignore[union-attr]  # the empty string matches
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.refill():
                return ""

    def parse_row(self, path: Path, number: int) -> Any:
        """Parses the JSON value at ``at`` and moves behind it; one that runs over the buffer is parsed again."""
        while True:
            try:
                value, end = _scan(self.buffer, self.at)
            except _SCAN_ERRORS as error:
                may_be_incomplete = _may_be_incomplete(error, len(self.buffer))
                if may_be_incomplete and len(self.buffer) - self.at > MAX_ROW_BYTES:
                    raise SourceFormatError(
                        f"{path}: row {number:,} is longer than {MAX_ROW_BYTES:,} bytes; split it or take it out"
                    ) from error
                if may_be_incomplete and self.double():
                    continue
                rest = self.buffer.rstrip(_JSON_SPACE)
                if may_be_incomplete and (not rest.endswith("]") or _position(error) >= len(rest)):
                    raise _truncated(path, number, "the array is not closed") from error
                raise SourceFormatError(
                    f"{path}: row {number:,} is not JSON ({_scan_reason(error, self.at)}), so the rows behind it cannot"
                    " be found; repair it, or write JSON Lines, where a bad row is skipped"
                ) from error
            # A number near the end of the buffer may go on in the next chunk: 1 as 1e+5.
            if end + 2 < len(self.buffer) or not self.refill():
                self.at = end
                return value


def _may_be_incomplete(error: BaseException, length: int) -> bool:
    """Whether more text could mend the error: a string still open, or a defect within one escape of the end."""
    is_open = isinstance(error, json.JSONDecodeError) and error.msg.startswith("Unterminated string")
    return is_open or _position(error) >= length - len(r"\ud83d\ude00")


def _position(error: BaseException) -> int:
    """Returns where the scanner found the error; -1 if it does not say."""
    if isinstance(error, StopIteration):
        return int(error.value)
    return error.pos if isinstance(error, json.JSONDecodeError) else -1


def _scan_reason(error: BaseException, start: int = 0) -> str:
    """Says what is wrong with the JSON value at ``start`` of the text."""
    if isinstance(error, RecursionError):
        return "it has too many levels"
    if isinstance(error, StopIteration):
        return f"expecting a value at character {_position(error) - start + 1:,}"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[0].lower()}{error.msg[1:].removesuffix(' at')} at character {error.pos - start + 1:,}"
    return short_reason(error)


def _read_array(stream: io.BufferedReader[Any], path: Path) -> Iterator[RawRow]:
    text = _Text(stream)
    if (first := text.next_character()) != "[":
        found = f'starts with "{first}"' if first else "is empty"
        raise SourceFormatError(f'{path}: {found}, expected the "[" of a JSON array; or set its format in the config')
    text.at += 1
    number = 0
    is_open = text.next_character() != "]"
    while is_open:
        number += 1
        yield _row(number, text.parse_row(path, number))
        comma = _match_comma(text.buffer, text.at)
        if comma and comma.end() < len(text.buffer):  # as it is after nearly all rows
            text.at = comma.end()
            continue
        after = text.next_character()
        if after == ",":
            text.at += 1
            text.next_character()
        elif after == "]":
            is_open = False
        elif after:
            raise SourceFormatError(
                f'{path}: row {number:,} is followed by "{after}", expected "," or "]"; repair the file,'
                " or write JSON Lines"
            )
        else:
            raise SourceFormatError(
                f"{path}: ends after row {number:,} (the array is not closed); the file is truncated:"
                " copy or download it again"
            )
    text.at += 1
    if after := text.next_character():
        raise SourceFormatError(
            f'{path}: the array ends with row {number:,}, but "{after}" follows; keep one array per file,'
            " or write JSON Lines"
        )


def _read_lines(stream: io.BufferedReader[Any], path: Path) -> Iterator[RawRow]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        text = line.decode("utf-8", "surrogateescape")
        if number == 1:
            text = text.removeprefix("\ufeff")
        text = text.strip(_JSON_SPACE)
        if len(line) > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_ROW_BYTES)
            detail = f"a row must fit in {MAX_ROW_BYTES:,} bytes, got a longer line"
            yield RawRow(number, None, _cut(text), ("too_long", detail))
        elif text:
            yield _parse_line(path, number, text, is_last=not line.endswith(b"\n"))


def _parse_line(path: Path, number: int, text: str, *, is_last: bool) -> RawRow:
    try:
        value, end = _scan(text, 0)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except _SCAN_ERRORS as error:
        if is_last and text.startswith("{") and not text.endswith("}") and _may_be_incomplete(error, len(text)):
            raise _truncated(path, number, "its line is not complete") from error
        return RawRow(number, None, _cut(text), ("broken_json", f"the line is not JSON: {_scan_reason(error)}"))
    return _row(number, value)


def _cut(text: str) -> str:
    return text[:_MAX_BROKEN_CHARACTERS].encode("utf-8", "backslashreplace").decode()


def _row(number: int, value: Any) -> RawRow:
    """Makes a row of a parsed JSON value, with a problem if it is no object or not Unicode text."""
    if value.__class__ is dict:
        try:
            packed = orjson.dumps(value)
        except TypeError:  # an integer of more than 64 bits, a lone surrogate, or hundreds of levels
            pass
        else:
            # An infinite float becomes null, so only a row with a null is looked through.
            if b"null" not in packed or not _is_infinite(value):
                return RawRow(number, value, packed.decode())
    if _is_infinite(value):
        text = json.dumps(value, separators=(",", ":"))
        return RawRow(number, None, _cut(text), ("broken_json", "a number is too large for any float, such as 1e400"))
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, separators=(",", ":"))
        detail = "the row must be Unicode text, got bytes that are not UTF-8 or half of a surrogate pair"
        return RawRow(number, None, text, ("not_unicode", detail))
    if value.__class__ is not dict:
        return RawRow(number, None, text, ("not_an_object", f"the row must be an object, got {json_kind(value)}"))
    return RawRow(number, value, text)


def _is_infinite(value: Any) -> bool:
    """Says whether a parsed value is or holds an infinite float."""
    if isinstance(value, dict):
        return any(map(_is_infinite, value.values()))
    if isinstance(value, list):
        return any(map(_is_infinite, value))
    return isinstance(value, float) and math.isinf(value)


def json_kind(value: object) -> str:
    """Names the JSON type of a value for a person, with its article: "a list", "null"."""
    kinds = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _read_parquet(stream: io.BufferedReader[Any], _path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile() as unpacked:
        if is_packed := not isinstance(stream.raw, io.FileIO):
            # Parquet is read from its end, so a compressed file is unpacked first: to disk, to keep memory bounded.
            shutil.copyfileobj(stream, unpacked, CHUNK_BYTES)
        number = 0
        try:
            with pq.ParquetFile(unpacked if is_packed else stream, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
                for batch in file.iter_batches(_PARQUET_BATCH_ROWS):
                    yield from _parquet_batch(batch, number + 1)
                    number += batch.num_rows
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise OSError(short_reason(error)) from error


def _parquet_batch(batch: Any, first_number: int) -> Iterator[RawRow]:
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:  # somewhere in the batch: read it row by row
        if batch.num_rows == 1:
            detail = "the row must be Unicode text, got bytes that are not UTF-8"
            yield RawRow(first_number, None, "", ("not_unicode", detail))
        else:
            for position in range(batch.num_rows):
                yield from _parquet_batch(batch.slice(position, 1), first_number + position)
        return
    for number, value in enumerate(values, first_number):
        text = orjson.dumps(value, default=_json_value)
        yield RawRow(number, orjson.loads(text), text.decode())


def _json_value(value: object) -> str:
    """Gives a string for what Parquet holds and orjson has no word for: bytes, decimals, durations."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)

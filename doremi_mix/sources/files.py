"""The files themselves: which ones there are, what they are called, what they hold, and their bytes unpacked."""

from __future__ import annotations

import functools
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from doremi_mix.errors import DataError, SourceFormatError, SourceNotFoundError, short_reason

FORMATS = ("json", "jsonl", "parquet")
COMPRESSED_SUFFIXES = (".gz", ".zst")
CHUNK_BYTES = 1 << 20

_FORMAT_OF_SUFFIX = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_SUPPORTED = f"{', '.join(_FORMAT_OF_SUFFIX)}, each also with .gz or .zst"
_GZIP_MAGIC, _ZSTD_MAGIC, _PARQUET_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_JSON_SPACE = " \t\r\n"
_find_list_of_objects = re.compile(r'"((?:[^"\\]|\\.)*)"\s*:\s*\[\s*\{').search
_STATISTICS = b'{"__dj__'
_LISTS_OF_A_ROW = ("messages", "conversations", "history")


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Lists the data files among the paths, one per domain.

    A folder stands for the data files directly in it; hidden files and files of other kinds there (README.md, .csv) are
    passed over, while a file that is named itself is always taken. A file given twice counts once.

    Returns:
        The files in the order of their domain names, then of their names.

    Raises:
        SourceNotFoundError: a path does not exist.
        DataError: nothing is given, a folder has no data files, or two files give the same domain name.
    """
    if not paths:
        raise DataError(f"no input is given, expected files or folders; supported: {_SUPPORTED}")
    files: dict[Path, Path] = {}
    for path in paths:
        for file in _list_folder(path) if path.is_dir() else [path]:
            if not file.exists():
                raise SourceNotFoundError(f"{file}: there is no such file or folder; check the path")
            if not file.is_file():
                raise DataError(f"{file}: is a pipe or device, which cannot be read twice; write it to a file first")
            files.setdefault(file.resolve(), file)
    ordered = sorted(files.values(), key=lambda file: (domain_name(file), file.name, file))
    for first, second in pairwise(ordered):
        if domain_name(first) == domain_name(second):
            raise DataError(
                f'{first} and {second} both give the domain "{domain_name(first)}", expected one file per domain;'
                f" leave one out, or name them in a config: sources: - {{path: {second}, name: ...}}"
            )
    return ordered


def _list_folder(folder: Path) -> list[Path]:
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise SourceNotFoundError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error
    files = [path for path in entries if not path.name.startswith(".") and _suffixes(path)[0] and path.is_file()]
    names = {path.name for path in files}
    files = [path for path in files if not _is_statistics(path, names)]
    if not files:
        num_folders = sum(path.is_dir() for path in entries)
        below = f" directly in it (its {num_folders:,} folders are not searched)" if num_folders else ""
        raise DataError(f"{folder}: has no data files{below}, expected at least one; supported: {_SUPPORTED}")
    return files


def _is_statistics(path: Path, names: set[str]) -> bool:
    """Says whether a file is what Data-Juicer writes beside its output X.jsonl: X_stats.jsonl, without any text."""
    if not path.name.endswith("_stats.jsonl") or path.name.removesuffix("_stats.jsonl") + ".jsonl" not in names:
        return False
    with path.open("rb") as file:
        return file.read(len(_STATISTICS)) == _STATISTICS


def domain_name(path: Path) -> str:
    """Returns the name that a file gives its domain: its own without the suffixes of compression and format.

    Example:
        >>> domain_name(Path("data/belle_data0.5M_cn.json.gz"))
        'belle_data0.5M_cn'
    """
    format_suffix, packed_suffix = _suffixes(path)
    name = path.name.removesuffix(packed_suffix)
    return name.removesuffix(format_suffix) if format_suffix else Path(name).stem


def _suffixes(path: Path) -> tuple[str, str]:
    """Returns the suffixes of format and compression as they are written, each "" if there is none that we know."""
    packed = path.suffix if path.suffix.lower() in COMPRESSED_SUFFIXES else ""
    kind = Path(path.name.removesuffix(packed)).suffix
    return (kind if kind.lower() in _FORMAT_OF_SUFFIX else ""), packed


@functools.cache
def _sha256_once(path: Path, _size: int, _modified: int) -> str:
    """Large files are asked for by several stages: one process reads each once, unless it changes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(path: Path) -> str:
    """Returns the SHA-256, in hexadecimal, of the bytes of a file as they lie on the disk (compressed or not).

    Raises:
        SourceNotFoundError: there is no such file.
        SourceFormatError: it is a folder, or cannot be opened.
    """
    try:
        seen = path.stat()
        return _sha256_once(path, seen.st_size, seen.st_mtime_ns)
    except FileNotFoundError:
        raise SourceNotFoundError(f"{path}: there is no such file; check the path") from None
    except OSError as error:
        raise SourceFormatError(f"{path}: cannot be opened ({short_reason(error)}); give a readable file") from None


def detect_format(path: Path) -> str:
    """Recognizes the format of a file by its content, and by its name where the content leaves a choice.

    A ``.json`` file that holds JSON Lines is JSON Lines, and the reverse; compressed files are looked into.

    Returns:
        ``json`` (an array of rows), ``jsonl`` (a row per line) or ``parquet``.

    Raises:
        SourceNotFoundError: there is no such file.
        SourceFormatError: the file cannot be read, is empty, or holds none of the formats.
    """
    head, is_whole = _read_head(path)
    if not head:
        raise SourceFormatError(f"{path}: is empty, expected rows; fill the file or leave it out")
    if head.startswith(_UTF16_MARKS):
        raise SourceFormatError(f"{path}: is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    if head.startswith(b"version https://git-lfs"):
        raise SourceFormatError(f"{path}: is a Git LFS pointer, expected the data themselves; run: git lfs pull")
    named = _FORMAT_OF_SUFFIX.get(_suffixes(path)[0].lower())
    text = head.decode("utf-8", "surrogateescape").removeprefix("\ufeff").lstrip(_JSON_SPACE)
    if head.startswith(_PARQUET_MAGIC) or named == "parquet":
        return "parquet"
    if text.startswith("["):
        return "json"
    if text.startswith("{"):
        _refuse_single_object(path, text, is_whole=is_whole)
        return "jsonl"
    if named == "jsonl":
        return "jsonl"
    raise SourceFormatError(
        f"{path}: starts with {text[:20]!r}, which is no JSON array, JSON Lines or Parquet; supported: {_SUPPORTED}"
    )


def _read_head(path: Path) -> tuple[bytes, bool]:
    """Returns the first bytes of a file from the first that is no space, and whether they are all there is."""
    head = b""
    with open_bytes(path) as stream:
        try:
            while len(head) < CHUNK_BYTES:
                chunk = stream.read1(CHUNK_BYTES)
                if not chunk:
                    return head, True
                head = (head + chunk).lstrip()
        except (EOFError, OSError) as error:
            if not head:  # otherwise the reader gets further, and names the row that it reached
                raise SourceFormatError(
                    f"{path}: cannot be read from its start ({short_reason(error)}); copy or download it again"
                ) from error
    return head, False


def _refuse_single_object(path: Path, head: str, *, is_whole: bool) -> None:
    """Tells rows on lines of their own from one object around all rows, and from rows spread over lines."""
    short_reason, _, rest = (line.strip(_JSON_SPACE) for line in head.partition("\n"))
    if short_reason.endswith("}") and (rest or not is_whole):
        return
    wrapper = _find_list_of_objects(head)
    if wrapper and wrapper[1] not in _LISTS_OF_A_ROW:
        raise SourceFormatError(
            f'{path}: is one object with a list in "{wrapper[1]}", expected the list of rows itself; extract it:'
            f" jq '.[\"{wrapper[1]}\"]'"
        )
    second_line = rest.partition("\n")[0].strip(_JSON_SPACE)
    if rest and not short_reason.endswith("}") and not (second_line.startswith("{") and second_line.endswith("}")):
        raise SourceFormatError(
            f"{path}: is an object over several lines, expected an array of rows or a row per line; convert it: jq -c ."
        )


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader[Any]]:
    """Opens a file for reading its bytes, unpacked if its content is compressed, whatever its name says.

    Raises:
        SourceNotFoundError: there is no such file.
        SourceFormatError: the file cannot be opened.
        EOFError: while reading: the compressed data are truncated.
        OSError: while reading: they are damaged.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{path}: there is no such file; check the path") from error
    except OSError as error:
        raise SourceFormatError(f"{path}: cannot be opened ({short_reason(error)}); give a readable file") from error
    with file:
        magic = file.peek(4)[:4]
        if magic.startswith(_GZIP_MAGIC):
            packed = _PackedFile(file, lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), zlib.error)
        elif magic == _ZSTD_MAGIC:
            import zstandard

            packed = _PackedFile(file, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError)
        else:
            yield file
            return
        with io.BufferedReader(packed, CHUNK_BYTES) as unpacked:
            yield unpacked


class _PackedFile(io.RawIOBase):
    """Unpacks gzip or Zstandard, and fails only after all the bytes before the defect have been given.

    The libraries' own readers either take a truncated file for one that has ended (zstandard), or keep back what they
    had unpacked when they notice (gzip), so that the row that was reached could not be named.
    """

    def __init__(self, file: IO[bytes], new_frame: Callable[[], Any], error: type[Exception]) -> None:
        self._file, self._new_frame, self._error = file, new_frame, error
        self._frame = new_frame()
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._unpacked:
            packed = self._frame.unused_data.lstrip(b"\0") or self._file.read(CHUNK_BYTES // 16)
            if self._frame.eof:
                if not (packed := packed.lstrip(b"\0")):  # zeros may pad the end
                    return 0
                self._frame = self._new_frame()  # a file may hold several frames, one after the other
            elif not packed:
                raise EOFError("its compressed data are cut off")
            try:
                self._unpacked = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise OSError(f"its compressed data are damaged: {short_reason(error)}") from error
        size = min(len(target), len(self._unpacked))
        target[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size

"""The weight files of a published checkpoint, read through memory maps: a tensor costs memory only while it is used.

Both forms are read: ``pytorch_model*.bin`` (torch, with nothing but tensors in it) and ``model*.safetensors``.
"""

from __future__ import annotations

import pickle
import threading
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doremi_mix.baichuan.layout import read_object, require_folder
from doremi_mix.baichuan.record import sha256_of
from doremi_mix.errors import ModelError, short_reason

_STEMS = (("model", "safetensors"), ("pytorch_model", "bin"))
"""In this order: where both lie side by side, safetensors are the safer to read."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_LFS_POINTER = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Where the tensors of a checkpoint lie.

    Attributes:
        folder: of the checkpoint.
        files: names of the weight files, in order.
        index: the name of the file that says what lies where; None with a single weight file.
        weight_map: what it says: file by tensor.
    """

    folder: Path
    files: tuple[str, ...]
    index: str | None
    weight_map: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the weight files hold.

    Attributes:
        file_of: the weight file of each tensor.
        dtype: of all of them.
    """

    file_of: Mapping[str, str]
    dtype: torch.dtype


def find_weights(source: Path) -> WeightFiles:
    """Finds the weight files of a checkpoint.

    Args:
        source: its folder.

    Raises:
        ModelError: there is no such folder, there are none in it, or one that the index names is missing.
    """
    require_folder(source)
    for stem, suffix in _STEMS:
        index, single = f"{stem}.{suffix}.index.json", f"{stem}.{suffix}"
        if (source / index).is_file():
            return _indexed(source, index)
        if (source / single).is_file():
            return WeightFiles(source, (single,), None, {})
    raise ModelError(
        f"{source}: holds no weights; expected pytorch_model.bin or model.safetensors, or shards with their index; "
        f"fetch them"
    )


def take_inventory(weights: WeightFiles, shapes: Mapping[str, tuple[int, ...]]) -> Inventory:
    """Looks into each weight file and checks that together they hold what they should; no tensor is read.

    Args:
        weights: the files.
        shapes: of the tensors that are expected, by name.

    Raises:
        ModelError: a file is damaged, or a tensor is missing, unknown, there twice or of another form.
    """
    file_of: dict[str, str] = {}
    dtype: torch.dtype | None = None
    for file in weights.files:
        path = weights.folder / file
        tensors = open_shard(path)
        for name, tensor in tensors.items():
            if name.endswith(".rotary_emb.inv_freq"):  # a constant that older files carry
                continue
            if name in file_of:
                raise ModelError(f"{path}: holds {name}, which {file_of[name]} holds too; fetch both again")
            file_of[name] = file
            _check_form(path, name, tensor, shapes, dtype)
            dtype = tensor.dtype
        for name, place in weights.weight_map.items():
            if place == file and name not in tensors:
                raise ModelError(f"{path}: lacks {name}, which {weights.index} places there; fetch both again")
    missing = [name for name in shapes if name not in file_of]
    if missing or dtype is None:
        others = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise ModelError(f"{weights.folder}: its weight files lack {missing[0]}{others}; fetch them again")
    return Inventory(file_of, dtype)


def open_shard(path: Path) -> dict[str, Tensor]:
    """Maps a weight file into memory.

    Args:
        path: a ``.bin`` or ``.safetensors`` file.

    Returns:
        Its tensors by name.  They are read from the file when they are used, and must not be changed.

    Raises:
        ModelError: the file is damaged, or holds something else.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(_LFS_POINTER):
        raise ModelError(f"{path}: is a Git LFS pointer instead of the weights; run in its folder: git lfs pull")
    if not start:
        raise ModelError(f"{path}: is empty; fetch the file again")
    content = _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path, start)
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ModelError(f"{path}: expected tensors by name, got something else; fetch the file again")
    return {name: tensor.detach() for name, tensor in content.items()}


def checked_sha256(path: Path, stop: threading.Event | None = None) -> str:
    """Returns the sha256 of a weight file, and compares the checksums in it, which only ``.bin`` files have.

    Args:
        path: of the file, which is read once.
        stop: ends the work early when it is set; the result is then of no use.

    Raises:
        ModelError: a checksum differs.
    """
    if path.suffix != ".bin":
        return sha256_of(path, stop)
    entries = _entries(path)
    position = 0

    def compare(block: memoryview) -> None:
        nonlocal position
        end = position + len(block)
        for entry in entries:
            if position < entry.end and entry.start < end:
                part = block[max(entry.start - position, 0) : entry.end - position]
                entry.crc = zlib.crc32(part, entry.crc)
        position = end

    digest = sha256_of(path, stop, compare)
    for entry in entries:
        if entry.crc != entry.expected_crc and not (stop and stop.is_set()):
            raise ModelError(f"{path}: is damaged (the checksum of {entry.name} in it differs); fetch the file again")
    return digest


class ShardReader:
    """Gives tensors of a checkpoint by name, with one weight file open at a time.

    Attributes:
        dtype: of all of them.
    """

    def __init__(self, folder: Path, inventory: Inventory) -> None:
        self.dtype = inventory.dtype
        self._folder = folder
        self._file_of = inventory.file_of
        self._file = ""
        self._tensors: dict[str, Tensor] = {}

    def path_of(self, name: str) -> Path:
        """Returns the weight file that holds a tensor."""
        return self._folder / self._file_of[name]

    def read(self, name: str) -> Tensor:
        """Returns a tensor, mapped from its file until one of another file is asked for."""
        file = self._file_of[name]
        if file != self._file:
            self._tensors = {}  # lets go of the last file before the next is mapped
            self._tensors, self._file = open_shard(self._folder / file), file
        return self._tensors[name]


def _indexed(source: Path, index: str) -> WeightFiles:
    weight_map = read_object(source / index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values())
    ):
        raise ModelError(
            f"{source / index}: expected weight_map to give a file of this folder for each tensor; fetch the file again"
        )
    files = sorted(set(weight_map.values()))
    for file in files:
        if not (source / file).is_file():
            raise ModelError(f"{source / file}: is missing, and {index} names it; fetch the file")
    return WeightFiles(source, tuple(files), index, weight_map)


def _check_form(
    path: Path, name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None
) -> None:
    """Raises a ModelError where a tensor is not what is expected."""
    if name not in shapes:
        raise ModelError(f"{path}: holds {name}, which is no tensor of Baichuan2-7B; give the published checkpoint")
    if tuple(tensor.shape) != shapes[name]:
        raise ModelError(
            f"{path}: {name} has shape {tuple(tensor.shape)}, config.json asks for {shapes[name]}; "
            f"fetch both files again"
        )
    if tensor.dtype not in _DTYPES:
        raise ModelError(
            f"{path}: {name} is {_name(tensor.dtype)}, expected bfloat16, float16 or float32; "
            f"give the checkpoint in full precision"
        )
    if dtype is not None and tensor.dtype != dtype:
        raise ModelError(
            f"{path}: {name} is {_name(tensor.dtype)}, the tensors before it are {_name(dtype)}; "
            f"fetch the weight files again"
        )


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise _damaged(path, error) from None


def _open_bin(path: Path, start: bytes) -> Any:
    if not start.startswith(_ZIP):
        raise ModelError(
            f"{path}: is not in the format of torch 1.6 and newer, the only one that can be read tensor by tensor; "
            f"fetch the file again, or load it with torch.load and save it with torch.save"
        )
    if not zipfile.is_zipfile(path):
        raise ModelError(f"{path}: is truncated; fetch the file again")
    _entries(path)  # raises where it is compressed: torch would take the compressed bytes for tensors
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path}: holds more than tensors, and reading the rest could run code; fetch the published file again"
        ) from None
    except Exception as error:  # damage shows itself as many classes
        raise _damaged(path, error) from None


@dataclass(slots=True)
class _Entry:
    """A file in a zip archive: where its bytes lie, and their CRC32 as recorded and as far as it is computed."""

    name: str
    start: int
    end: int
    expected_crc: int
    crc: int = 0


def _entries(path: Path) -> list[_Entry]:
    """Returns what an archive holds, but for files without a checksum.

    Raises:
        ModelError: it is damaged or compressed.
    """
    entries = []
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ModelError(
                        f"{path}: is compressed, as torch writes no file; fetch the published file, or load it with "
                        f"torch.load and save it with torch.save"
                    )
                # Name and extra field before the bytes may be longer than the ones in the directory at the end.
                file.seek(info.header_offset + 26)
                lengths = file.read(4)
                start = file.tell() + sum(int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
                entries.append(_Entry(info.filename, start, start + info.file_size, info.CRC))
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from None
    return [entry for entry in entries if entry.expected_crc]  # torch writes 0 where it is told to compute none


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path}: is truncated or damaged ({short_reason(error)}); fetch the file again")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

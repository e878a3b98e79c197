"""Converts a Baichuan2-7B checkpoint into Llama layout, one block of one tensor at a time.

Query, key and value are cut out of the fused projection, and the rows of the head are divided by their lengths; every
other tensor is taken over bit by bit.  The logits stay the same.

The files of the result come into being one after the other: each is written under a hidden name, read again, compared
with the original, and gets its name.  ``.conversion.partial.json`` says which are done, so that a run after a kill goes
on; ``conversion.json`` is written last, and its existence means that the conversion finished.  Until then there is no
``config.json`` either, so that nothing takes the folder for a model.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doremi_mix import __version__
from doremi_mix.atomic import temporary_of, write_json
from doremi_mix.baichuan.layout import (
    CONFIG,
    GENERATION_CONFIG,
    Layout,
    LlamaTensor,
    llama_config,
    llama_generation_config,
    llama_tensors,
    read_layout,
    vendor_shapes,
)
from doremi_mix.baichuan.record import (
    PARTIAL,
    RECORD,
    STAMPS,
    damaged_files,
    explain_system_errors,
    find_record,
    own_folder,
    read_record,
    read_stamps,
    sha256_of,
    stamps_of,
)
from doremi_mix.baichuan.shards import Inventory, ShardReader, WeightFiles, checked_sha256, find_weights, take_inventory
from doremi_mix.baichuan.writer import ShardPlan, check_shard, plan_shards, write_shard
from doremi_mix.errors import ModelError

FORMAT = "doremi-mix/baichuan-conversion"
INDEX = "model.safetensors.index.json"
DEFAULT_MAX_SHARD_BYTES = 5 * 2**30

_COUNTS = ("num_tensors", "num_parameters", "num_shards", "num_bytes", "dtype", "num_zero_head_rows")
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was converted.

    Attributes:
        target: the folder of the result.
        num_tensors: in the result.
        num_parameters: numbers in these.
        num_shards: weight files of the result.
        num_bytes: of these files.
        dtype: of the weights: ``bfloat16`` and so on.
        num_zero_head_rows: rows of the head that are all zeros and stay so.
        num_kept_shards: weight files that an earlier run had finished.
        was_up_to_date: whether there was nothing to do.
        repaired: files of a finished conversion that were missing or changed, and were written again.
        seconds: that this took.
    """

    target: Path
    num_tensors: int
    num_parameters: int
    num_shards: int
    num_bytes: int
    dtype: str
    num_zero_head_rows: int
    num_kept_shards: int
    was_up_to_date: bool
    repaired: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Shard:
    """A finished weight file of the result.

    Attributes:
        num_zero_head_rows: in it.
        sha256: of the file.
        kept: whether an earlier run has written it.
    """

    num_zero_head_rows: int
    sha256: str
    kept: bool


def source_bytes(source: Path) -> int:
    """Returns the size of a checkpoint's weight files: what ``advance`` adds up to in the end.

    Raises:
        ModelError: there are none.
    """
    with explain_system_errors(source):
        weights = find_weights(source)
        return sum((source / file).stat().st_size for file in weights.files)


def convert(
    source: Path,
    target: Path,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    say: Callable[[str], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> Conversion:
    """Writes a Baichuan2-7B checkpoint in Llama layout, or goes on with what an earlier call has begun.

    Memory for a few blocks of 8 MiB is needed, whatever the size of the model; the files are mapped.

    Args:
        source: the folder of the checkpoint, with its tokenizer.
        target: a new or empty folder, or one that an earlier call has written.
        max_shard_bytes: of tensors in a weight file of the result.
        say: is told in a line what happens.
        advance: is told the number of bytes of the original that are done since it was last called; together they are
            ``source_bytes(source)``.

    Returns:
        What was converted.

    Raises:
        ModelError: the checkpoint is of another model, incomplete or damaged, or the target cannot be written.
    """
    start = time.monotonic()
    with explain_system_errors(target):
        layout = read_layout(source)
        weights = find_weights(source)
        inventory = take_inventory(weights, vendor_shapes(layout))
        tensors = _in_file_order(llama_tensors(layout), weights, inventory)
        plans = plan_shards(tensors, inventory.dtype, max_shard_bytes)
        begun = {
            "format": FORMAT,
            "version": 1,
            "source": _identity(source, weights),
            "max_shard_bytes": max_shard_bytes,
        }
        stamps = stamps_of(source, weights.files)
        num_advanced, count = _counted(advance)
        with own_folder(source, target):
            found = _find_result(source, target, begun, stamps, say)
            damaged = damaged_files(target, found) if found else []
            is_finished = found is not None and not damaged
            kept = {plan.file for plan in plans}
            if is_finished:
                say(f"{target}: is up to date")
            else:
                _prepare(source, target, layout, plans, begun)
                shards, source_sha256 = _write_shards(target, plans, ShardReader(source, inventory), say, count)
                if stamps_of(source, weights.files) != stamps:
                    raise ModelError(f"{source}: changed while it was converted; run the same command again")
                record = _describe(plans, inventory, shards) | {"source_sha256": source_sha256}
                write_json(target / STAMPS, stamps)
                _finish(source, target, layout, plans, begun | record)
                kept = {plan.file for plan, shard in zip(plans, shards, strict=True) if shard.kept}
            (target / PARTIAL).unlink(missing_ok=True)
            record = read_record(target / RECORD)
        advance(source_bytes(source) - num_advanced())
    return Conversion(
        target=target,
        **{key: record[key] for key in _COUNTS},
        num_kept_shards=len(kept),
        was_up_to_date=is_finished,
        repaired=tuple(sorted({*damaged, *(plan.file for plan in plans)} - kept)) if damaged else (),
        seconds=time.monotonic() - start,
    )


def _counted(advance: Callable[[int], None]) -> tuple[Callable[[], int], Callable[[int], None]]:
    """Returns a function that gives the sum of what the other, otherwise like ``advance``, was told."""
    total = 0

    def count(num_bytes: int) -> None:
        nonlocal total
        total += num_bytes
        advance(num_bytes)

    return lambda: total, count


def _in_file_order(tensors: list[LlamaTensor], weights: WeightFiles, inventory: Inventory) -> list[LlamaTensor]:
    """Sorts tensors so that the original's files are read one after the other."""
    order = {file: number for number, file in enumerate(weights.files)}
    return sorted(tensors, key=lambda tensor: order[inventory.file_of[tensor.source]])


def _identity(source: Path, weights: WeightFiles) -> dict[str, dict[str, Any]]:
    """Returns what tells a checkpoint from another without reading its weights."""
    small = [CONFIG, GENERATION_CONFIG, *_TOKENIZER_FILES, *([weights.index] if weights.index else [])]
    return {
        "bytes": {file: (source / file).stat().st_size for file in weights.files},
        "sha256": {file: sha256_of(source / file) for file in small if (source / file).is_file()},
    }


def _find_result(
    source: Path,
    target: Path,
    begun: Mapping[str, Any],
    stamps: Mapping[str, list[int]],
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Returns the record of a finished conversion; one of other weights, as damaged ones were, is taken away.

    Raises:
        ModelError: the target is of something else, or a weight file that changed since is damaged.
    """
    record = find_record(target, begun)
    known = read_stamps(target)
    changed = [file for file, stamp in stamps.items() if known.get(file) != stamp]
    if record is None or not changed:
        return record
    say(f"{source}: {', '.join(changed)} may have changed since the conversion; comparing the sha256")
    expected = record["source_sha256"]
    if all(checked_sha256(source / file) == expected[file] for file in changed if file in expected):
        write_json(target / STAMPS, stamps)
        return record
    say(f"{source}: has changed since the conversion; converting anew")
    # First of all the config, without which the rest is no model; the record goes last, when its files are gone.
    for file in (CONFIG, *record["files"], STAMPS):
        (target / file).unlink(missing_ok=True)
    return None


def _prepare(source: Path, target: Path, layout: Layout, plans: list[ShardPlan], begun: Mapping[str, Any]) -> None:
    """Marks the folder as that of an unfinished conversion and checks what can be checked before the long part.

    Raises:
        ModelError: the tokenizer is of another model, or the disk is too small.
    """
    from doremi_mix.baichuan.tokenizer import copy_tokenizer

    write_json(target / PARTIAL, begun)
    for name in (RECORD, CONFIG, INDEX):
        (target / name).unlink(missing_ok=True)
    missing = [plan for plan in plans if not (target / plan.file).is_file()]
    try:
        copy_tokenizer(source, target, layout.vocab_size)
    except ModelError:
        if len(missing) == len(plans):  # nothing is lost, and the folder can be used for something else
            (target / PARTIAL).unlink()
        raise
    _check_space(target, sum(plan.num_bytes for plan in missing))


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if needed > free:
        raise ModelError(
            f"{target}: {_size(needed)} are to be written, and the disk has {_size(free)} free; free some, or choose "
            f"another target"
        )


@contextlib.contextmanager
def _background() -> Iterator[Callable[[Path], Future[str]]]:
    """Gives a function that computes a sha256 beside the work; what is not done when the block ends is given up."""
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        try:
            yield lambda path: pool.submit(checked_sha256, path, stop)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _write_shards(
    target: Path,
    plans: list[ShardPlan],
    reader: ShardReader,
    say: Callable[[str], None],
    advance: Callable[[int], None],
) -> tuple[list[_Shard], dict[str, str]]:
    """Writes the weight files of the result, but for those that are there and right.

    Returns:
        What is to be recorded of each, and the sha256 of each weight file of the original.
    """
    shards: list[_Shard] = []
    source_digests: dict[str, Future[str]] = {}
    with _background() as sha256_beside:
        for number, plan in enumerate(plans, start=1):
            # A file of the original is hashed while it is converted, so that the disk has to give it only once.
            used = list(dict.fromkeys(reader.path_of(tensor.source) for tensor in plan.tensors))
            for path in used:
                if path.name not in source_digests:
                    source_digests[path.name] = sha256_beside(path)
            digests = [source_digests[path.name] for path in used]
            shard = _check_kept(target / plan.file, plan, reader, sha256_beside)
            if shard is not None:
                _keep_if_whole(target / plan.file, digests)
                advance(plan.num_tensor_bytes)
                line = "kept from an earlier run"
            else:
                shard = _write_one(target / plan.file, plan, reader, sha256_beside, digests, advance)
                line = f"{_size(plan.num_bytes)} written and checked"
            shards.append(shard)
            say(f"{plan.file}: {line} ({number} of {len(plans)})")
        return shards, {file: digest.result() for file, digest in source_digests.items()}


def _check_kept(
    path: Path, plan: ShardPlan, reader: ShardReader, sha256_beside: Callable[[Path], Future[str]]
) -> _Shard | None:
    """Returns what is to be recorded of a file that an earlier run has written; None if it has not, or not rightly."""
    if not path.is_file() or path.stat().st_size != plan.num_bytes:
        return None
    digest = sha256_beside(path)
    try:
        return _Shard(check_shard(path, plan, reader), digest.result(), kept=True)
    except ModelError:
        return None


def _write_one(
    path: Path,
    plan: ShardPlan,
    reader: ShardReader,
    sha256_beside: Callable[[Path], Future[str]],
    source_digests: list[Future[str]],
    advance: Callable[[int], None],
) -> _Shard:
    """Writes and checks a file under a hidden name, and gives it its own when it is right."""
    temporary = temporary_of(path)
    try:
        write_shard(temporary, plan, reader, advance)
        digest = sha256_beside(temporary)
        shard = _Shard(check_shard(temporary, plan, reader), digest.result(), kept=False)
        _keep_if_whole(temporary, source_digests)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return shard


def _keep_if_whole(path: Path, source_digests: list[Future[str]]) -> None:
    """Deletes a file of the result, and says so, where a file of the original that it was made of is damaged."""
    try:
        for digest in source_digests:
            digest.result()
    except ModelError:
        path.unlink()
        raise


def _describe(plans: list[ShardPlan], inventory: Inventory, shards: list[_Shard]) -> dict[str, Any]:
    """Returns the part of the record that counts and names the weight files."""
    tensors = [tensor for plan in plans for tensor in plan.tensors]
    return {
        "num_tensors": len(tensors),
        "num_parameters": sum(tensor.num_elements for tensor in tensors),
        "num_shards": len(plans),
        "num_bytes": sum(plan.num_bytes for plan in plans),
        "dtype": str(inventory.dtype).removeprefix("torch."),
        "num_zero_head_rows": sum(shard.num_zero_head_rows for shard in shards),
        "files": {
            plan.file: {"bytes": plan.num_bytes, "sha256": shard.sha256}
            for plan, shard in zip(plans, shards, strict=True)
        },
    }


def _finish(source: Path, target: Path, layout: Layout, plans: list[ShardPlan], record: Mapping[str, Any]) -> None:
    """Writes the small files, and last of all the record."""
    small = {GENERATION_CONFIG: llama_generation_config(source, layout), CONFIG: llama_config(layout, record["dtype"])}
    if len(plans) > 1:
        weight_map = {tensor.name: plan.file for plan in plans for tensor in plan.tensors}
        total = sum(plan.num_tensor_bytes for plan in plans)
        small = {INDEX: {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}} | small
    for name, value in small.items():
        write_json(target / name, value)
    names = [*small, *(name for name in _TOKENIZER_FILES if (target / name).is_file())]
    files = {name: {"bytes": (target / name).stat().st_size, "sha256": sha256_of(target / name)} for name in names}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    write_json(
        target / RECORD,
        {
            **record,
            "files": record["files"] | files,
            "versions": {"doremi_mix": __version__, **versions},
        },
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"

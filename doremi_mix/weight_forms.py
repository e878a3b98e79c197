"""The forms in which other programs write domain weights down: from what was parsed to numbers by domain.

Functions take plain values and return ``Found``, or None where the values have another form; they raise ValueError
where the form is theirs and its content is wrong.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any

from doremi_mix.weight_numbers import Unit, cell, given_twice, is_number, listed, short, to_number

MAX_DOMAINS = 100_000

TABLE_COLUMNS = ("name", "weight", "token_share", "example_share", "tokens", "examples", "epochs")
"""The columns of our own CSV."""

FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n", "'")
"""Names that start so get a ``'`` before them in our CSV, or a spreadsheet would take them for formulas."""

_AS_THEY_ARE = "not of tokens; they are taken as they are, unless a corpus converts them"
UNSAID = "the file does not say in which unit; they are taken for shares of tokens"

_TOKENS = "shares of tokens"
_SEQUENCES = "shares of fixed-length sequences, which are shares of tokens"
_NAME_COLUMNS = ("name", "domain", "source", "dataset", "domain_name", "source_name", "dataset_name", "subset")
# The first of them that a table has is read.
_WEIGHT_COLUMNS = {
    "token_share": _TOKENS,
    "domain_weight": UNSAID,
    "weight": UNSAID,
    "weights": UNSAID,
    "share": UNSAID,
    "probability": UNSAID,
    "prob": UNSAID,
    "proportion": UNSAID,
    "ratio": UNSAID,
    "sampling_weight": UNSAID,
    "target_ratio": _TOKENS,
    "percent": UNSAID,
    "percentage": UNSAID,
    "tokens": "numbers of tokens",
    "num_tokens": "numbers of tokens",
    "example_share": f"shares of examples, {_AS_THEY_ARE}",
    "examples": f"numbers of examples, {_AS_THEY_ARE}",
    "count": UNSAID,
}
_EXAMPLE_COLUMNS = ("example_share", "examples")
_OLMIX_KEYS = ("weight", "repetition_factor")
_OLMO_CAPS = ("max_repetition_ratio", "max_source_fraction")
_SUFFIX = re.compile(r"(?<=.)_text_(document|sentence)$")


@dataclass(frozen=True, slots=True)
class Found:
    """Weights as they stand in a file.

    Attributes:
        kind: what the file was read as.
        meaning: what its numbers are, as far as the form says it.
        weights: numbers, or what stands in their place, by domain.
        notices: what else a user must know.
        unit: what they are taken for shares of.
    """

    kind: str
    meaning: str
    weights: Mapping[str, Any]
    notices: tuple[str, ...] = ()
    unit: Unit = "tokens"


def from_data(data: Mapping[str, Any] | list[Any], language: str) -> Found:
    """Takes the weights from parsed JSON or YAML of another program.

    Args:
        data: what was parsed.
        language: JSON or YAML.

    Raises:
        ValueError: it has none of the known forms, or its content is wrong.
    """
    if isinstance(data, list):
        if is_blend(data):
            return blend(data)
        if data and all(isinstance(row, dict) for row in data):
            return _records(data)
        raise ValueError("domain weights must be an object, got a list")
    for reader in _FORMS:
        found = reader(data)
        if found is not None:
            return found
    if data and all(name.endswith(".jsonl") and len(name) > len(".jsonl") for name in data):
        names = {name.removesuffix(".jsonl"): weight for name, weight in data.items()}
        return Found("ratio.json", f'{_TOKENS}, by file; domains are called as the files without ".jsonl"', names)
    return Found(f"{{domain: weight}} in {language}", UNSAID, data)


def _ours_without_format(data: Mapping[str, Any]) -> Found | None:
    weights = data.get("domain_weights")
    if not isinstance(weights, dict):
        return None
    others = [key for key in data if key != "domain_weights"]
    notices = (f"of its keys only 'domain_weights' was read, not {listed(others)}",) if others else ()
    return Found("domain_weights without a format", UNSAID, weights, notices)


def _official(data: Mapping[str, Any]) -> Found | None:
    train = data.get("train_domain_weights")
    if not isinstance(train, dict):
        return None
    differs = data.get("eval_domain_weights", train) != train
    notices = ("its eval_domain_weights differ, and were not read",) if differs else ()
    return Found("official DoReMi", _SEQUENCES, train, notices)


def _levanter(data: Mapping[str, Any]) -> Found | None:
    inner = data.get("data")
    weights = inner.get("train_weights") if isinstance(inner, dict) else data.get("train_weights")
    kind = "train_weights of Levanter"
    if isinstance(weights, dict):
        return Found(kind, _SEQUENCES, weights)
    if not isinstance(weights, list):
        return None
    starts = []
    for stage in weights:
        step, of_stage = stage if isinstance(stage, list) and len(stage) == 2 else (None, None)
        if isinstance(step, bool) or not isinstance(step, int) or not isinstance(of_stage, dict):
            raise ValueError(f"a stage of train_weights must be [step, {{domain: weight}}], got {short(stage)}")
        starts.append(step)
    if not starts or starts != sorted(set(starts)):
        raise ValueError(f"the stages of train_weights must start at rising steps, got {starts}")
    # What the last stage does not name is no longer drawn.
    names = {name: 0 for _, stage in weights for name in stage}
    last = f"the weights change during training: read were those of the last of {len(starts)} stages, from {starts[-1]}"
    return Found(kind, _SEQUENCES, {**names, **weights[-1][1]}, (last,) if len(starts) > 1 else ())


def _olmix(data: Mapping[str, Any]) -> Found | None:
    mix = data.get("mix")
    if not isinstance(mix, dict):
        nodes = list(data.values())
        if not nodes or not all(isinstance(node, dict) and "weight" in node for node in nodes):
            return None
        mix = data
    weights: dict[str, Any] = {}
    for name, node in mix.items():
        _add_leaves(name, node, Fraction(1), weights)
    capped = any(_has_key(node, "repetition_factor") for node in mix.values())
    return Found("olmix mix", _TOKENS, weights, _dropped_caps(["repetition_factor"] if capped else []))


def _has_key(node: Any, key: str) -> bool:
    return isinstance(node, dict) and (key in node or any(_has_key(child, key) for child in node.values()))


def _dropped_caps(keys: Sequence[str]) -> tuple[str, ...]:
    """Says which limits of single domains do not come with the weights."""
    return (f"its caps on single domains ({', '.join(keys)}) were not read; one max_epochs caps all",) if keys else ()


def _add_leaves(name: str, node: Any, factor: Fraction, weights: dict[str, Any]) -> None:
    """Adds the leaves below a node of an olmix mix: a leaf's weight is the product of the weights on the path to it."""
    number, percent = to_number(name, node.get("weight", 1) if isinstance(node, dict) else node)
    if percent:
        raise ValueError(f"the weight of {name!r} must be a share of what is above it, without a % sign")
    children = {key: child for key, child in node.items() if key not in _OLMIX_KEYS} if isinstance(node, dict) else {}
    for child_name, child in children.items():
        _add_leaves(f"{name}:{child_name}", child, factor * number, weights)
    if children:
        return
    if name in weights:
        raise ValueError(given_twice(name))
    if len(weights) == MAX_DOMAINS:
        raise ValueError(f"has more than {MAX_DOMAINS:,} domains")
    weights[name] = factor * number


def _olmo(data: Mapping[str, Any]) -> Found | None:
    sources = data.get("sources")
    if not isinstance(sources, list) or not sources:
        return None
    weights: dict[str, Any] = {}
    for source in sources:
        if not isinstance(source, dict) or not {"source_name", "target_ratio"} <= source.keys():
            return None
        name = str(source["source_name"])
        if name in weights:
            raise ValueError(given_twice(name))
        weights[name] = source["target_ratio"]
    caps = [key for key in _OLMO_CAPS if any(key in source for source in sources)]
    return Found("source mixture of OLMo-core", _TOKENS, weights, _dropped_caps(caps))


def _lingua(data: Mapping[str, Any]) -> Found | None:
    inner = data.get("data", data)
    sources = inner.get("sources") if isinstance(inner, dict) else None
    if not isinstance(sources, dict):
        return None
    return Found("sources of lingua", f"shares of documents, {_AS_THEY_ARE}", sources, unit="examples")


def _splits(data: Mapping[str, Any]) -> Found | None:
    """Reads what stands under ``train`` (per split) or ``paths`` (NeMo): a blend, as a list or as text."""
    inner = data.get("paths")
    if isinstance(inner, dict):
        data = inner
    for key in ("train", "paths"):
        value = data.get(key)
        items = value.split() if isinstance(value, str) else value
        if not isinstance(items, list):
            continue
        if not is_blend(items):
            raise ValueError(f'"{key}" must be a blend, weight and prefix by turns, got {short(value)}')
        others = [split for split in data if split != key and data[split]] if key == "train" else []
        return blend(items, (f"only its training split was read, not {listed(others)}",) if others else ())
    return None


_FORMS: tuple[Callable[[Mapping[str, Any]], Found | None], ...] = (
    _ours_without_format,
    _official,
    _levanter,
    _olmix,
    _olmo,
    _lingua,
    _splits,
)


def is_blend(items: Sequence[Any]) -> bool:
    """Says whether Megatron takes a list for weights and prefixes by turns."""
    return (
        len(items) > 0
        and len(items) % 2 == 0
        and all(isinstance(prefix, str) for prefix in items[1::2])
        and all(is_number(weight) for weight in items[::2])
    )


def blend(items: Sequence[Any], notices: tuple[str, ...] = ()) -> Found:
    """Reads weights and prefixes by turns; a domain is called as the last part of its prefix.

    Raises:
        ValueError: two prefixes end alike.
    """
    prefixes: dict[str, str] = {}
    weights: dict[str, Any] = {}
    for weight, prefix in zip(items[::2], items[1::2], strict=True):
        name = _SUFFIX.sub("", PurePosixPath(prefix.strip()).name)
        if name in prefixes:
            both = listed([prefixes[name], prefix])
            raise ValueError(f"domains are called as the last part of their prefix, and {name!r} ends two, {both}")
        prefixes[name] = prefix
        weights[name] = float(weight) if isinstance(weight, str) else weight
    called = "domains are called as the last part of their prefix"
    return Found("Megatron blend", _SEQUENCES, weights, (called, *notices))


# --------------------------------------------------------------------------------------------------------------- tables


def named_table(text: str) -> Found | None:
    """Reads a table whose first line names a column of domains and one of weights.

    Raises:
        ValueError: a row is broken, or a domain stands twice.
    """
    first = _without_comments(text).lstrip("\r\n").partition("\n")[0]
    for delimiter in (",", "\t", ";"):
        header = {cell.strip().strip('"').lower() for cell in first.split(delimiter)}
        if header & set(_NAME_COLUMNS) and header & set(_WEIGHT_COLUMNS):
            try:
                rows = _split(text, delimiter)
            except csv.Error as error:
                raise ValueError(f"is a broken CSV ({error})") from None
            return _table(rows[0], rows[1:])
    return None


def _records(data: list[dict[str, Any]]) -> Found:
    """Reads JSON records."""
    header = list(data[0])
    if not (set(header) & set(_NAME_COLUMNS) and set(header) & set(_WEIGHT_COLUMNS)):
        raise ValueError(f"a record must have a name and a weight, got the keys {listed(header)}")
    for number, row in enumerate(data, 1):
        if row.keys() != set(header):
            raise ValueError(f"record {number} has the keys {listed(row)}, and the first one {listed(header)}")
    return _table(header, [[row[key] for key in header] for row in data])


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Found:
    """Reads the columns of names and of weights of a table."""
    ours = tuple(header) == TABLE_COLUMNS
    header = [cell.strip().lower() for cell in header]
    name_column = next(column for column in _NAME_COLUMNS if column in header)
    weight_column = next(column for column in _WEIGHT_COLUMNS if column in header)
    weights: dict[str, Any] = {}
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"the row {short(list(row))} has {len(row)} cells, and the first line {len(header)}")
        name = row[header.index(name_column)]
        if not isinstance(name, str):
            raise ValueError(f"the name of a domain must be text, got {short(name)}")
        name = name.removeprefix("'") if ours else name.strip()
        if name in weights:
            raise ValueError(given_twice(name))
        weights[name] = cell(row[header.index(weight_column)])
    others = [column for column in _WEIGHT_COLUMNS if column in header and column != weight_column]
    notices = (f"the column {weight_column!r} was read, not {listed(others)}",) if others else ()
    kind = f"a table with the columns {name_column!r} and {weight_column!r}"
    unit: Unit = "examples" if weight_column in _EXAMPLE_COLUMNS else "tokens"
    return Found(kind, _WEIGHT_COLUMNS[weight_column], weights, notices, unit)


def unnamed_table(text: str) -> Found | None:
    """Reads two columns without names, of which one holds the numbers.

    Raises:
        ValueError: there are two such readings, or a domain stands twice.
    """
    readings: list[tuple[list[bool], list[list[str]]]] = []
    for delimiter in (",", "\t", ";", " "):
        try:
            rows = _split(text, delimiter)
        except csv.Error:
            continue
        numeric = [bool(rows) and all(len(row) == 2 and _may_be_number(row[i]) for row in rows) for i in (0, 1)]
        # In "a, 0.5" the space separates nothing.
        if any(numeric) and not (delimiter == " " and readings):
            readings.append((numeric, rows))
    if not readings:
        return None
    (first_is_number, second_is_number), rows = readings[0]
    if len(readings) > 1 or (first_is_number and second_is_number):
        raise ValueError('its two columns can be read in two ways; name them in a first line "name,weight"')
    weights: dict[str, Any] = {}
    for row in rows:
        name, number = row if second_is_number else reversed(row)
        if name.strip() in weights:
            raise ValueError(given_twice(name.strip()))
        weights[name.strip()] = cell(number)
    return Found("a table of two columns without names", UNSAID, weights)


def _split(text: str, delimiter: str) -> list[list[str]]:
    """Splits a table into rows of cells, without blank lines and without the comments above it."""
    text = _without_comments(text)
    if delimiter == " ":
        rows = [line.split() for line in text.splitlines()]
    else:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    return [row for row in rows if any(cell.strip() for cell in row)]


def _without_comments(text: str) -> str:
    while text.startswith("#"):
        text = text.partition("\n")[2]
    return text


def _may_be_number(text: str) -> bool:
    """Says whether somebody may have meant a number, decimal commas included."""
    return re.fullmatch(r"[-+]?[0-9.,]*[0-9][0-9.,]*([eE][-+]?[0-9]+)?\s*%?", text.strip()) is not None

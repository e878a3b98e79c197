"""What an exporter is: a row with one pure function, from a plan to the text of the files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import yaml

if TYPE_CHECKING:
    from doremi_mix.exporters.plan import ExportPlan

Unit = Literal["tokens", "sequences", "examples"]
Meaning = Literal["share", "count", "multiplier", "objective", "table"]


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A file for another program.

    Attributes:
        name: of the file; with folders where the program wants them, separated by "/".
        text: its content, without the header.
        comment: what starts a comment line in it; None where it can hold none (JSON).
    """

    name: str
    text: str
    comment: str | None = "#"


@dataclass(frozen=True, slots=True)
class Export:
    """What one program is told.

    Attributes:
        files: the first one is the main one.
        expected: of what the program draws, the share of each domain, in the format's unit; sums to 1.  Domains that it
            does not draw are absent.
        usage: the command or the line of code with which the program takes the files.
        num_drawn: units that the program draws in one pass over its mixture; None where its own settings say that.
        notes: what a user must know of this export, one sentence each.
        meaning: of the numbers in it, where it is another than the format's.
        second: the share of each domain in the objective, where a program weights losses beside sampling.
    """

    files: tuple[ExportedFile, ...]
    expected: Mapping[str, float]
    usage: str
    num_drawn: int | None = None
    notes: tuple[str, ...] = ()
    meaning: Meaning | None = None
    second: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """One row of the table of formats.

    Attributes:
        name: what ``--format`` takes.
        consumer: the program, as ``environments.toml`` of the checks names it.
        title: for people: the program and the form.
        unit: what the program draws by weight.
        meaning: what it takes a number for: a share of the mixture, a count, a multiplier of the domain's own size, or
            a multiplier of its part in the objective; "table" is for people.
        oversamples: whether it repeats a domain that has too little, in a few words.
        write: the exporter.
        needs_budget: whether the numbers mean nothing without a budget.
        path: what it reads: "" the file that the domain was read from; otherwise a template of paths with ``{name}``,
            for programs that read something else (tokenized data, for example).
    """

    name: str
    consumer: str
    title: str
    unit: Unit
    meaning: Meaning
    oversamples: str
    write: Callable[[ExportPlan], Export] = field(repr=False)
    needs_budget: bool = False
    path: str = ""


# What no YAML reader takes for anything but a string: it starts with a letter and holds no sign that YAML knows.
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_/.-]*\Z")
_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf", "infinity", "none"})


class _QuotingDumper(yaml.SafeDumper):
    """Quotes every string that some version of YAML could take for another type (``1e5`` is one that differs)."""


def _write_string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.match(text) and text.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_QuotingDumper.add_representer(str, _write_string)


def yaml_text(value: Any) -> str:
    """Returns YAML that reads back to the same value in readers of YAML 1.1, of 1.2, and in those between them."""
    text: str = yaml.dump(
        value, Dumper=_QuotingDumper, allow_unicode=True, sort_keys=False, width=math.inf, default_flow_style=False
    )
    return text


def json_text(value: Any) -> str:
    """Returns JSON that reads back to the same value, in the order given."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def python_dict(value: Mapping[str, Any]) -> str:
    """Returns Python for a dict, one entry a line."""
    return "{\n" + "".join(f"    {name!r}: {entry!r},\n" for name, entry in value.items()) + "}"


def one_line(text: str) -> str:
    """Returns text for a comment: what would end the line in any reader is written as an escape."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def decimal(number: float) -> str:
    """Returns a number's shortest exact text without an exponent, with a point: for readers that know no ``1e-05``.

    Example:
        >>> decimal(1e-05), decimal(0.5), decimal(2.0)
        ('0.00001', '0.5', '2.0')
    """
    from decimal import Decimal

    text = format(Decimal(repr(float(number))), "f")
    return text if "." in text else f"{text}.0"

"""From rows to examples: which columns of a file mean what, and which rows cannot be used.

A file has one of three schemas, found once from its first rows:

- ``alpaca``: an instruction and its output, with optional input, history (earlier [user, assistant] pairs) and system;
- ``chat``: a list of turns, ``messages`` with role and content or ShareGPT's ``conversations`` with from and value;
- ``text``: plain text.

Data-Juicer may keep an instruction and its output under ``meta`` beside their joined ``text``; that is ``alpaca`` too,
read from ``meta``.  What Data-Juicer adds to rows (``__dj__stats__`` and the like) stays in them.

Where the columns fit no schema, or more than one, a person decides in the config; nothing is guessed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from doremi_mix.errors import ConfigError, SchemaError
from doremi_mix.sources.readers import RawRow, json_kind
from doremi_mix.types import Example, Rejection

# For each schema its parts, and for each part the columns that may hold it; the part's own name comes first.
SCHEMAS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "alpaca": {
        "instruction": ("instruction", "prompt", "query", "question", "problem"),
        "input": ("input", "context"),
        "output": ("output", "response", "completion", "answer", "solution"),
        "history": ("history",),
        "system": ("system",),
    },
    "chat": {"messages": ("messages", "conversations"), "system": ("system",)},
    "text": {"text": ("text",)},
}
_REQUIRED = {"alpaca": ("instruction", "output"), "chat": ("messages",), "text": ("text",)}

_USER, _ASSISTANT, _SYSTEM = range(3)
_SIDE_OF_ROLE = {
    **dict.fromkeys(("user", "human", "tool", "function", "observation"), _USER),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model"), _ASSISTANT),
    "system": _SYSTEM,
}
_MAX_SHOWN_COLUMNS = 12
_META = "meta."
"""What the config writes before the name of a column under the column meta."""
_ADDED_BY_DATA_JUICER = "__dj__"

Converter = Callable[[RawRow], Example | Rejection]


@dataclass(frozen=True, slots=True)
class RowSchema:
    """What the columns of a file mean.

    Attributes:
        kind: ``alpaca``, ``chat`` or ``text``.
        columns: for each part of the schema that the file has, the column that holds it.
        under: the column that holds an object with all of these; empty: they are the row's own.
    """

    kind: str
    columns: Mapping[str, str] = field(default_factory=dict)
    under: str = ""

    def describe(self) -> str:
        """Returns the schema in a few words.

        Example:
            >>> RowSchema("alpaca", {"instruction": "prompt", "output": "output"}).describe()
            'alpaca (instruction=prompt, output)'
        """
        parts = (part if part == column else f"{part}={column}" for part, column in self.columns.items())
        return f"{self.kind} ({', '.join(parts)}{f' under {self.under}' if self.under else ''})"


def check_overrides(schema: str | None, columns: Mapping[str, str]) -> None:
    """Raises ConfigError unless ``schema`` is a schema and ``columns`` names parts of it, or of one schema."""
    if schema is not None and schema not in SCHEMAS:
        raise ConfigError(f'schema must be one of {", ".join(SCHEMAS)}, got "{schema}"{_nearest(schema, SCHEMAS)}')
    allowed = [schema] if schema else list(SCHEMAS)
    known = dict.fromkeys(part for kind in allowed for part in SCHEMAS[kind])
    for part in columns:
        if part not in known:
            where = f" of schema {schema}" if schema else ""
            raise ConfigError(
                f'columns names the unknown part "{part}"{_nearest(part, known)}; the parts{where} are'
                f" {', '.join(known)}"
            )
    if not any(SCHEMAS[kind].keys() >= columns.keys() for kind in allowed):
        raise ConfigError(
            f"columns names parts of different schemas ({', '.join(columns)}); name parts of one: "
            + "; ".join(f"{kind} has {', '.join(parts)}" for kind, parts in SCHEMAS.items())
        )


def detect_schema(
    path: Path | str,
    rows: Sequence[Mapping[str, object]],
    *,
    schema: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> RowSchema:
    """Finds out what the columns of a file mean.

    A pair of an instruction and an output makes it ``alpaca``, whatever stands beside it other than a list of turns; a
    list of turns makes it ``chat``, with or without a lone prompt; ``instruction`` and ``output`` under ``meta`` make
    it ``alpaca``, with or without a ``text``; ``text`` alone makes it ``text``.

    Args:
        path: the file, for messages.
        rows: its first rows; a column counts when one of them has it.
        schema: what the config says it is; None leaves it to the columns.
        columns: what the config says about single parts, part to column.

    Raises:
        ConfigError: the settings name an unknown schema or part.
        SchemaError: no schema fits, more than one does, or a part has no column, several, or one that does not exist.
    """
    named = dict(columns or {})
    check_overrides(schema, named)
    found = list(dict.fromkeys(column for row in rows for column in row))
    if found and all(column.startswith(_ADDED_BY_DATA_JUICER) for column in found):
        raise SchemaError(
            f"{path}: holds what Data-Juicer says about rows ({_listed(found)}) and not the rows, which are in the "
            "file beside it; leave it out"
        )
    metas = _rows_of_meta(rows, found, schema, named)
    if metas:
        inside = {part: column.removeprefix(_META) for part, column in named.items()}
        nested = detect_schema(
            path, metas, schema=schema, columns=inside or {"instruction": "instruction", "output": "output"}
        )
        return replace(nested, under="meta")
    for part, column in named.items():
        if column not in found:
            raise SchemaError(
                f'{path}: columns names "{column}" for {part}, which is not in the file{_nearest(column, found)}'
                f" (columns found: {_listed(found)}); correct it in the config"
            )
    implied = next((kind for kind in SCHEMAS if named.keys() & SCHEMAS[kind].keys() - {"system"}), None)
    kind = schema or implied or _kind_of_columns(path, found)
    return RowSchema(kind, _bind(path, kind, found, named))


def _rows_of_meta(
    rows: Sequence[Mapping[str, Any]], found: Sequence[str], schema: str | None, named: Mapping[str, str]
) -> list[Mapping[str, Any]]:
    """Returns what the rows have under meta, if examples are to be read from there."""
    metas = [row["meta"] for row in rows if isinstance(row.get("meta"), dict)]
    if named:
        return metas if all(name.startswith(_META) and name not in found for name in named.values()) else []
    parts = ("alpaca", "instruction"), ("alpaca", "output"), ("chat", "messages")
    beside = any(_present(kind, part, found) for kind, part in parts)
    has_pair = any("instruction" in meta for meta in metas) and any("output" in meta for meta in metas)
    return metas if has_pair and not beside and schema != "text" else []


def _kind_of_columns(path: Path | str, found: Sequence[str]) -> str:
    instructions, outputs = (_present("alpaca", part, found) for part in ("instruction", "output"))
    turns, texts = _present("chat", "messages", found), _present("text", "text", found)
    if instructions and outputs:
        if turns:
            raise SchemaError(
                f"{path}: columns {_quoted([instructions[0], outputs[0]])} fit schema alpaca and {_quoted(turns)} fits"
                f" schema chat (columns found: {_listed(found)}); choose in the config:"
                f" sources: - {{path: {path}, schema: chat}}"
            )
        return "alpaca"
    if turns:
        return "chat"
    if texts and not instructions and not outputs:
        return "text"
    if texts:
        half = "instruction" if instructions else "output"
        raise SchemaError(
            f'{path}: column "text" fits schema text, but {_quoted([*instructions, *outputs])} fits {half} of schema'
            f" alpaca (columns found: {_listed(found)}); choose in the config:"
            f" sources: - {{path: {path}, schema: text}}"
        )
    looked_for = "; ".join(
        f"{kind}: " + ", and ".join(" or ".join(SCHEMAS[kind][part]) for part in parts)
        for kind, parts in _REQUIRED.items()
    )
    raise SchemaError(
        f"{path}: no schema fits (columns found: {_listed(found)}; looked for {looked_for}); name the columns in the"
        f" config: sources: - {{path: {path}, columns: {{instruction: ..., output: ...}}}}"
    )


def _bind(path: Path | str, kind: str, found: Sequence[str], named: Mapping[str, str]) -> dict[str, str]:
    """Gives each part of the schema its column: the one named in the config, or the only one that fits."""
    bound = {}
    for part in SCHEMAS[kind]:
        fitting = [column for column in _present(kind, part, found) if column not in named.values()]
        if part in named:
            bound[part] = named[part]
        elif len(fitting) > 1:
            raise SchemaError(
                f"{path}: columns {_quoted(fitting)} all fit {part} (columns found: {_listed(found)}); choose one in"
                f" the config: sources: - {{path: {path}, columns: {{{part}: {fitting[0]}}}}}"
            )
        elif fitting:
            bound[part] = fitting[0]
        elif part in _REQUIRED[kind]:
            raise SchemaError(
                f"{path}: no column fits {part} of schema {kind} (columns found: {_listed(found)}; looked for"
                f" {', '.join(SCHEMAS[kind][part])}); name it in the config:"
                f" sources: - {{path: {path}, columns: {{{part}: ...}}}}"
            )
    return bound


def _present(kind: str, part: str, found: Sequence[str]) -> list[str]:
    return [column for column in SCHEMAS[kind][part] if column in found]


def _quoted(columns: Sequence[str]) -> str:
    return " and ".join(map(_shown, columns))


def _shown(column: str, *, quoted: bool = True) -> str:
    """Writes a column's name so that an error stays one line, whatever the name holds."""
    text = column if column.isprintable() else ascii(column)[1:-1]
    return f'"{text}"' if quoted else text


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(_shown(column, quoted=False) for column in columns[:_MAX_SHOWN_COLUMNS])
    more = len(columns) - _MAX_SHOWN_COLUMNS
    return f"{shown} and {more} more" if more > 0 else shown or "none"


def _nearest(name: str, known: Mapping[str, object] | Sequence[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def to_example(raw: RawRow, *, path: Path | str, domain: str, schema: RowSchema) -> Example | Rejection:
    """Makes the example of one row, or says why it cannot be used; for many rows, see ``make_converter``."""
    return make_converter(schema, path=path, domain=domain)(raw)


def make_converter(schema: RowSchema, *, path: Path | str, domain: str) -> Converter:
    """Returns the function that makes an example, or a rejection, of each row of a file.

    The text of a row is passed on exactly as it is. In a chat, consecutive turns of one side are joined with a line
    end; what a tool says counts as the user's side, because it is given to the model and not learned; a conversation
    that the assistant opens gets an empty user turn; assistant turns without text and user turns without an answer at
    the end are left out. A null in an optional column counts as empty.

    A rejection's rule is the row's own problem (``broken_json``, ``not_an_object``, ``not_unicode``, ``too_long``),
    ``missing_<part>``, ``wrong_type``, ``empty_instruction`` (nothing to answer in instruction, input and history),
    ``empty_output``, ``unknown_role`` or ``no_assistant_turn``.
    """
    make = {"alpaca": _alpaca_maker, "chat": _chat_maker, "text": _text_maker}[schema.kind](schema.columns, domain)
    if schema.under:
        make = _from_under(schema.under, make)
    shown_path = str(path)

    def convert(raw: RawRow) -> Example | Rejection:
        if raw.problem is None:
            try:
                return make(raw)
            except _UnusableError as problem:
                rule, detail = problem.rule, problem.detail
        else:
            rule, detail = raw.problem
        return Rejection(f"{domain}:{raw.number}", domain, shown_path, raw.number, rule, detail, raw.text)

    return convert


def _from_under(column: str, make: Callable[[RawRow], Example]) -> Callable[[RawRow], Example]:
    def make_nested(raw: RawRow) -> Example:
        inside = (raw.value or {}).get(column)
        if not isinstance(inside, dict):
            raise _UnusableError("wrong_type", f'"{column}" must be an object, got {json_kind(inside)}')
        return make(replace(raw, value=inside))

    return make_nested


class _UnusableError(Exception):
    """A row that cannot be used; never leaves this module."""

    def __init__(self, rule: str, detail: str) -> None:
        self.rule, self.detail = rule, detail


def _optional_column(columns: Mapping[str, str], part: str) -> str | None:
    """Returns the column of a part; one that the first rows lack may still come, unless it holds another part."""
    return columns.get(part, None if part in columns.values() else part)


def _alpaca_maker(columns: Mapping[str, str], domain: str) -> Callable[[RawRow], Example]:
    instruction_column, output_column = columns["instruction"], columns["output"]
    input_column, history_column, system_column = (
        _optional_column(columns, part) for part in ("input", "history", "system")
    )

    def make(raw: RawRow) -> Example:
        row: Mapping[str, Any] = raw.value or {}
        instruction = _string(row, "instruction", instruction_column)
        input_ = _optional_string(row, input_column)
        output = _string(row, "output", output_column)
        pairs = row.get(history_column)  # type: ignore[arg-type]  # no row has the column None
        history = _history(pairs, history_column) if pairs else ()
        if not output or output.isspace():
            raise _UnusableError("empty_output", f'"{output_column}" has no text')
        if not instruction or instruction.isspace():
            _refuse_empty_prompt(instruction, input_, history)
        system = _optional_string(row, system_column)
        return Example(f"{domain}:{raw.number}", domain, instruction, input_, output, history, system, raw.text)

    return make


def _text_maker(columns: Mapping[str, str], domain: str) -> Callable[[RawRow], Example]:
    column = columns["text"]

    def make(raw: RawRow) -> Example:
        text = _string(raw.value or {}, "text", column)
        if not text or text.isspace():
            raise _UnusableError("empty_output", f'"{column}" has no text')
        return Example(f"{domain}:{raw.number}", domain, None, "", text, (), "", raw.text)

    return make


def _chat_maker(columns: Mapping[str, str], domain: str) -> Callable[[RawRow], Example]:
    turns_column, system_column = columns["messages"], _optional_column(columns, "system")

    def make(raw: RawRow) -> Example:
        row: Mapping[str, Any] = raw.value or {}
        system = _optional_string(row, system_column)
        turns = row.get(turns_column)
        if turns is None:
            raise _UnusableError("missing_messages", _missing(row, turns_column))
        if turns.__class__ is not list:
            raise _UnusableError("wrong_type", f'"{turns_column}" must be a list, got {json_kind(turns)}')
        pairs, system_turns = _pair_up(turns, turns_column)
        instruction, output = pairs.pop()
        history = tuple(pairs)
        _refuse_empty_prompt(instruction, "", history)
        system = "\n".join(text for text in (system, *system_turns) if text)
        return Example(f"{domain}:{raw.number}", domain, instruction, "", output, history, system, raw.text)

    return make


def _pair_up(turns: Sequence[Any], column: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Makes (user, assistant) pairs of the turns, at least one, and a list of the system's texts."""
    exchanges: list[tuple[list[str], list[str]]] = []  # what the user and what the assistant says in each
    system: list[str] = []
    has_assistant_turn = False
    for number, turn in enumerate(turns, 1):
        side, text = _read_turn(turn, number, column)
        if side == _SYSTEM:
            system.append(text)
        elif side == _USER:
            if not exchanges or exchanges[-1][1]:
                exchanges.append(([], []))
            exchanges[-1][0].append(text)
        else:
            has_assistant_turn = True
            if text and not text.isspace():  # a mere call of a tool has none
                if not exchanges:
                    exchanges.append(([], []))
                exchanges[-1][1].append(text)
    if exchanges and not exchanges[-1][1]:
        exchanges.pop()
    if not exchanges:
        if has_assistant_turn:
            raise _UnusableError("empty_output", f'no turn of the assistant in "{column}" has text')
        raise _UnusableError("no_assistant_turn", f'"{column}" must have a turn of the assistant, got none')
    return [("\n".join(user), "\n".join(assistant)) for user, assistant in exchanges], system


def _read_turn(turn: object, number: int, column: str) -> tuple[int, str]:
    """Returns the side and the text of a turn, which calls them role and content, or from and value."""
    if not isinstance(turn, dict):
        raise _UnusableError("wrong_type", f'turn {number} of "{column}" must be an object, got {json_kind(turn)}')
    role = turn.get("role")
    if role is None:
        role = turn.get("from")
    if role is None:
        raise _UnusableError("missing_role", f'turn {number} of "{column}" has no role')
    side = _SIDE_OF_ROLE.get(role.lower()) if isinstance(role, str) else None
    if side is None:
        known = ", ".join(_SIDE_OF_ROLE)
        raise _UnusableError(
            "unknown_role", f'turn {number} of "{column}" has the role {role!r}, expected one of {known}'
        )
    text = turn.get("content")
    if text is None:
        text = turn.get("value")
    if text is None:
        if side != _ASSISTANT:
            raise _UnusableError("missing_content", f'turn {number} of "{column}" has no content')
        text = ""
    if not isinstance(text, str):
        raise _UnusableError(
            "wrong_type", f'the content of turn {number} of "{column}" must be a string, got {json_kind(text)}'
        )
    return side, text


def _string(row: Mapping[str, Any], part: str, column: str) -> str:
    value = row.get(column)
    if value.__class__ is str:
        return str(value)
    if value is None:
        raise _UnusableError(f"missing_{part}", _missing(row, column))
    raise _UnusableError("wrong_type", f'"{column}" must be a string, got {json_kind(value)}')


def _optional_string(row: Mapping[str, Any], column: str | None) -> str:
    value = row.get(column)  # type: ignore[arg-type]  # no row has the column None
    if value.__class__ is str:
        return str(value)
    if value is None:
        return ""
    raise _UnusableError("wrong_type", f'"{column}" must be a string, got {json_kind(value)}')


def _missing(row: Mapping[str, Any], column: str) -> str:
    return f'"{column}" must be there, got {"null" if column in row else "no such column"}'


def _history(pairs: object, column: str | None) -> tuple[tuple[str, str], ...]:
    must_be = f'"{column}" must be a list of [user, assistant] pairs of strings'
    if not isinstance(pairs, list):
        raise _UnusableError("wrong_type", f"{must_be}, got {json_kind(pairs)}")
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            kinds = f"[{', '.join(map(json_kind, pair))}]" if isinstance(pair, list) else json_kind(pair)
            raise _UnusableError("wrong_type", f"{must_be}, got {kinds} at {number}")
    return tuple((user, assistant) for user, assistant in pairs)


def _refuse_empty_prompt(instruction: str, input_: str, history: tuple[tuple[str, str], ...]) -> None:
    texts = (instruction, input_, *(text for pair in history for text in pair))
    if not any(text.strip() for text in texts):
        raise _UnusableError("empty_instruction", "there is no text to answer: no instruction, input or history")

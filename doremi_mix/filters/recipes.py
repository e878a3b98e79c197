"""Recipe files of Data-Juicer, as plans: ``recipe_ops.RECIPE_OPS`` says of each operator what becomes of it.

Operators of the same meaning become rules and steps of ours, with Data-Juicer's defaults where a recipe gives no value.
Filters without a counterpart run through Data-Juicer; what changes texts or chooses among all rows is refused.

A recipe applies its operators in the order in which it lists them; here the order of steps is fixed: exact duplicates,
rules, Data-Juicer's operators, near duplicates.  The verdict of a filter on a row depends on that row alone, so among
filters the order only changes which of them is named for a row that several reject.  Duplicates are another matter:

- Exact deduplication after a filter in the recipe: rows kept here are a part of those kept by the recipe.  They are the
  same unless copies that count as equal get different verdicts (they differ in case, in digits, or in another column).
  Then the copy that stands for all of them may fall to the filter here, where the recipe keeps the next one.
- Near deduplication before a filter in the recipe: rows kept by the recipe are a part of those kept here.  They are the
  same unless the row to which another one is lost falls to the filter; the other one is then kept here.

A plan has a note where one of the two may matter.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from doremi_mix.errors import ConfigError
from doremi_mix.filters.data_juicer import MISSING_DATA_JUICER, data_juicer_installed
from doremi_mix.filters.exact_duplicates import Normalization
from doremi_mix.filters.plan import FilterPlan, ForeignOp, NearDuplicateSettings, RuleSetting
from doremi_mix.filters.recipe_ops import (
    HOW_IT_RUNS,
    NOTES,
    RECIPE_OPS,
    REFUSED_KINDS,
    SAME_IF,
    TEMPLATED,
    Argument,
    RecipeOp,
)
from doremi_mix.filters.rules import RULES

_COUNTS = ("rep_len", "window_size", "num_permutations")
"""Arguments that must be whole numbers."""
_SIMHASH = "document_simhash_deduplicator"
_NORMALIZATIONS: tuple[Normalization, ...] = ("text", "spaces", "characters")
"""Each finds the duplicates that the one before it finds, and more."""


@dataclass(slots=True)
class _Reading:
    """What has been read of a recipe so far."""

    where: str
    text_keys: tuple[str | None, ...]
    exact_duplicates: Normalization | None = None
    rules: list[RuleSetting] = field(default_factory=list)
    foreign: list[ForeignOp] = field(default_factory=list)
    near_duplicates: NearDuplicateSettings | None = None
    near_op: str = ""
    notes: list[str] = field(default_factory=list)


def plan_from_recipe(recipe: Mapping[str, Any], *, where: str) -> FilterPlan:
    """Makes the plan of a Data-Juicer recipe.

    Args:
        recipe: the parsed YAML file; only its ``process`` and ``text_keys`` matter.
        where: the file, for messages and as the source of thresholds.

    Returns:
        The plan, with notes on all that is not the same as in Data-Juicer.

    Raises:
        ConfigError: it is no recipe; an operator or argument is unknown; a value cannot be; or an operator cannot run
            here: it changes texts, looks at other things than text, or needs Data-Juicer, which is not installed.

    Example:
        >>> plan = plan_from_recipe({"process": [{"text_length_filter": {"min_len": 20}}]}, where="recipe.yaml")
        >>> [(rule.rule, rule.min, rule.max) for rule in plan.rules]
        [('text_length', 20, None)]
    """
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("process"), list):
        raise ConfigError(f"{where}: has no list of operators named process; is it a recipe of Data-Juicer?")
    given = recipe.get("text_keys") or "text"
    key = given[0] if isinstance(given, list) else given
    reading = _Reading(where, text_keys=(None, "text", key))
    if key != "text":
        reading.notes.append(
            f'text_keys is "{key}"; here operators look at the text of an example: instruction, input and output'
        )
    kinds = [_take(*_name_and_arguments(item, where), reading) for item in recipe["process"]]
    _note_order(kinds, [_name_and_arguments(item, where)[0] for item in recipe["process"]], reading.notes)
    order = {rule.name: position for position, rule in enumerate(RULES)}
    return FilterPlan(
        exact_duplicates=reading.exact_duplicates,
        rules=tuple(sorted(reading.rules, key=lambda setting: order[setting.rule])),
        foreign=tuple(reading.foreign),
        near_duplicates=reading.near_duplicates,
        notes=tuple(dict.fromkeys(reading.notes)),
    )


def _name_and_arguments(item: object, where: str) -> tuple[str, dict[str, Any]]:
    """Returns what an entry of ``process`` says: a name, or an object of one name and its arguments."""
    if isinstance(item, str):
        return item, {}
    if isinstance(item, Mapping) and len(item) == 1:
        name, arguments = next(iter(item.items()))
        if isinstance(name, str) and (arguments is None or isinstance(arguments, Mapping)):
            return name, dict(arguments or {})
    raise ConfigError(f"{where}: process must list operators, as name or {{name: {{argument: value}}}}, got {item!r}")


def _take(name: str, arguments: dict[str, Any], reading: _Reading) -> str:
    """Adds an operator to what has been read; returns what became of it."""
    op = _find(name, reading.where)
    if arguments.get("text_key", "text") in reading.text_keys:
        arguments.pop("text_key", None)
    if op.becomes == "foreign":
        _take_foreign(name, arguments, "", reading)
        return "filter"
    _check_arguments(name, op, arguments, reading.where)
    if op.becomes == "rule":
        _take_rule(name, op, arguments, reading)
        return "filter"
    if "text_key" in arguments:
        raise ConfigError(
            f"{reading.where}: {name} compares the column {arguments['text_key']}, and here whole examples are "
            "compared; take text_key out, or the op"
        )
    if op.becomes == "exact_duplicates":
        _take_exact_duplicates(name, arguments, reading)
    else:
        _take_near_duplicates(name, arguments, reading)
    return op.becomes


def _find(name: str, where: str) -> RecipeOp:
    if name in RECIPE_OPS:
        return RECIPE_OPS[name]
    for part, reason in REFUSED_KINDS.items():
        if name.startswith(part) if part.endswith("_") else name.endswith(part):
            raise ConfigError(
                f"{where}: {name} {reason}; take the op out, or run Data-Juicer on the files and give what it exports "
                "as sources"
            )
    raise ConfigError(f"{where}: there is no op {name}{_nearest(name, list(RECIPE_OPS))}")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _check_arguments(name: str, op: RecipeOp, arguments: Mapping[str, Any], where: str) -> None:
    own = [argument[0] for argument in (op.min, op.max, op.parameter) if argument] + [*op.same_if, *op.passed_over]
    for argument in arguments:
        if argument not in (*own, *SAME_IF, *HOW_IT_RUNS, "text_key"):
            raise ConfigError(f"{where}: {name} has no argument {argument}{_nearest(argument, own)}")


def _take_foreign(name: str, arguments: dict[str, Any], because: str, reading: _Reading) -> None:
    if not data_juicer_installed():
        raise ConfigError(
            f"{reading.where}: {name}{because} has no counterpart here and runs through {MISSING_DATA_JUICER},"
            " or take the op out"
        )
    reading.foreign.append(ForeignOp(name, arguments))


def _take_rule(name: str, op: RecipeOp, arguments: dict[str, Any], reading: _Reading) -> None:
    rule = _rule_of(name, op, arguments)
    if rule is None:
        same_if = {"text_key": None, "query_template": None, "response_template": None, **SAME_IF, **op.same_if}
        differing = [f"{key}: {_yaml(value)}" for key, value in arguments.items() if value != same_if.get(key, value)]
        _take_foreign(name, arguments, f" with {', '.join(differing)}", reading)
        return
    source = f"{reading.where}: {name}"
    least, most, parameter = (
        _number(argument, name, arguments, reading.where) for argument in (op.min, op.max, op.parameter)
    )
    if least is not None and most is not None and least > most:
        raise ConfigError(f"{reading.where}: {name} keeps values from {least:g} to {most:g}, so no row could be kept")
    is_usual = parameter is None or op.parameter is None or parameter == op.parameter[1]
    setting = RuleSetting(rule, min=least, max=most, source=source)
    reading.rules.append(setting if is_usual else dataclasses.replace(setting, parameter=int(parameter or 0)))
    languages = arguments.get("lang") if name == "language_id_score_filter" else None
    if languages:
        allowed = (languages,) if isinstance(languages, str) else tuple(map(str, languages))
        reading.rules.append(RuleSetting("languages", allowed=allowed, source=source))
    _note(name, arguments, reading)


def _note(name: str, arguments: Mapping[str, Any], reading: _Reading) -> None:
    if name in NOTES:
        models = {"hf_model": "Qwen/Qwen2.5-0.5B", "hf_tokenizer": "EleutherAI/pythia-6.9b-deduped"}
        reading.notes.append(NOTES[name].format_map({**models, **arguments}))


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _rule_of(name: str, op: RecipeOp, arguments: Mapping[str, Any]) -> str | None:
    """Returns the rule that means what an operator with these arguments means; None: there is none."""
    if any(arguments.get(argument, value) != value for argument, value in {**SAME_IF, **op.same_if}.items()):
        return None
    if "text_key" in arguments:
        of_column = {"instruction": "instruction_length", "output": "output_length"}
        return of_column.get(arguments["text_key"]) if name == "text_length_filter" else None
    if op.passed_over == TEMPLATED:
        asked, answered = arguments.get("query_template") or "", arguments.get("response_template") or "{text}"
        if asked and answered in ("{output}", "{response}"):
            return {"perplexity": "answer_perplexity"}.get(op.rule, op.rule)
        return op.rule if not asked and answered == "{text}" else None
    return op.rule


def _number(argument: Argument | None, name: str, arguments: Mapping[str, Any], where: str) -> float | None:
    """Returns the value of an argument, or Data-Juicer's default; None where it bounds nothing."""
    if argument is None:
        return None
    value = arguments.get(argument[0], argument[1])
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ConfigError(f"{where}: {argument[0]} of {name} must be a number, got {value!r}")
    if argument[0] in _COUNTS and (value < 1 or value != int(value)):
        raise ConfigError(f"{where}: {argument[0]} of {name} must be a whole number of at least 1, got {value!r}")
    return None if abs(value) >= sys.maxsize else value


def _flag(key: str, default: bool, name: str, arguments: Mapping[str, Any], where: str) -> bool:
    value = arguments.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {key} of {name} must be true or false, got {value!r}")
    return value


def _take_exact_duplicates(name: str, arguments: Mapping[str, Any], reading: _Reading) -> None:
    lowercase = _flag("lowercase", False, name, arguments, reading.where)
    letters = _flag("ignore_non_character", False, name, arguments, reading.where)
    found: Normalization = "characters" if letters else "spaces" if lowercase else "text"
    if letters and not lowercase:
        reading.notes.append(f"{name} tells upper from lower case; here both count as the same")
    if lowercase and not letters:
        reading.notes.append(f"{name} folds case alone; here the width of characters and white space are folded too")
    earlier = reading.exact_duplicates
    reading.exact_duplicates = found if earlier is None else max(found, earlier, key=_NORMALIZATIONS.index)


def _take_near_duplicates(name: str, arguments: Mapping[str, Any], reading: _Reading) -> None:
    where, usual = reading.where, NearDuplicateSettings()
    of_simhash = name == _SIMHASH
    window = int(_number(("window_size", 6 if of_simhash else 5), name, arguments, where) or 0)
    by_character = arguments.get("tokenization", "space") == "character"
    shingle_size = window if by_character else usual.shingle_size
    if of_simhash:
        found = NearDuplicateSettings(shingle_size=shingle_size)
    else:
        similarity = _number(("jaccard_threshold", 0.7), name, arguments, where) or 0.0
        num_permutations = int(_number(("num_permutations", 256), name, arguments, where) or 0)
        if not 0 < similarity <= 1:
            raise ConfigError(f"{where}: jaccard_threshold of {name} must be above 0 and at most 1, got {similarity:g}")
        if not 16 <= num_permutations <= 1024:
            raise ConfigError(f"{where}: num_permutations of {name} must be 16 to 1024, got {num_permutations}")
        found = NearDuplicateSettings(similarity, shingle_size, num_permutations)
    _note(name, arguments, reading)
    if not by_character:
        unit = {"punctuation": "phrases", "sentencepiece": "pieces"}.get(arguments.get("tokenization", ""), "words")
        reading.notes.append(
            f"{name} compares runs of {window} {unit}; here it is runs of {shingle_size} characters, of which similar "
            "texts share more"
        )
    if not _flag("lowercase", True, name, arguments, where):
        reading.notes.append(f"{name} tells upper from lower case; here both count as the same")
    if arguments.get("ignore_pattern"):
        reading.notes.append(f"{name} leaves out what its ignore_pattern matches; here all characters are compared")
    if arguments.get("num_bands") or arguments.get("num_rows_per_band"):
        reading.notes.append(f"{name} sets its bands; here they follow from similarity and num_permutations")
    _join_near_duplicates(name, found, reading)


def _join_near_duplicates(name: str, found: NearDuplicateSettings, reading: _Reading) -> None:
    """Puts a second near deduplication together with the first: there is one step."""
    earlier = reading.near_duplicates
    if earlier is None or (reading.near_op == _SIMHASH):
        reading.near_duplicates, reading.near_op = found, name
    elif name == _SIMHASH:
        return
    elif earlier.shingle_size != found.shingle_size:
        raise ConfigError(
            f"{reading.where}: {reading.near_op} and {name} compare runs of {earlier.shingle_size} and of "
            f"{found.shingle_size} characters, and near duplicates are found once; keep one of them"
        )
    else:
        reading.near_duplicates = NearDuplicateSettings(
            min(earlier.similarity, found.similarity),
            found.shingle_size,
            max(earlier.num_permutations, found.num_permutations),
        )


def _note_order(kinds: Sequence[str], names: Sequence[str], notes: list[str]) -> None:
    """Notes where the order of a recipe may keep other rows; see the module."""
    for place, (kind, name) in enumerate(zip(kinds, names, strict=True)):
        if kind == "exact_duplicates" and "filter" in kinds[:place]:
            notes.append(
                f"{name} comes after a filter in the recipe and first here: where copies that count as equal get "
                "different verdicts, fewer rows may be kept here"
            )
        if kind == "near_duplicates" and "filter" in kinds[place:]:
            notes.append(
                f"{name} comes before a filter in the recipe and last here: a near duplicate of a row that the filter "
                "rejects may be kept here"
            )

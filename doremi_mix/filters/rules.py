"""The rules as a table: which score each reads, which values it lets pass, and what it says of a row that it rejects.

Rules are applied in the order of the table, and a row is rejected by the first that it fails.  Names and defaults are
those of Data-Juicer's ops where there is one with the same meaning.

Axes: B rows of a batch.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from doremi_mix.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule over one column of scores.

    Attributes:
        name: what a configuration and a rejection call it.
        column: the column of scores that it reads.
        description: what it looks for, for a person.
        detail: what it says of a rejected row; ``{value}`` is the row's score, ``{expected}`` what would have passed.
        op: the Data-Juicer op that it follows, "" if there is none.
        min: the default of the lowest value that passes; None for no bound.
        max: the default of the highest value that passes; None for no bound.
        kind: ``range`` lets values from min to max pass, both included; ``allowed`` those of a list; ``flag`` those
            that are false.
    """

    name: str
    column: str
    description: str
    detail: str
    op: str = ""
    min: float | None = None
    max: float | None = None
    kind: Literal["range", "allowed", "flag"] = "range"


_COUNT = "{value:,.0f}"
_NUMBER = "{value:,.4g}"

RULES: tuple[Rule, ...] = (
    Rule(
        "broken_turns",
        "broken_turns",
        "an earlier turn is empty, or the answer holds a template's mark of a turn",
        'an earlier turn is empty, or the answer holds a mark such as "### Instruction:"',
        kind="flag",
    ),
    Rule(
        "placeholder_answer",
        "placeholder_answer",
        "the answer or the input is a placeholder",
        "the answer or the input is a placeholder such as N/A or <noinput>",
        kind="flag",
    ),
    Rule(
        "refusal_answer",
        "refusal_answer",
        "the answer refuses, or begins with a disclaimer",
        "the answer begins as a refusal or with a disclaimer of a model",
        kind="flag",
    ),
    Rule(
        "answer_equals_instruction",
        "answer_equals_instruction",
        "the answer repeats the instruction",
        "the answer equals the instruction but for case and whitespace",
        kind="flag",
    ),
    Rule("text_length", "text_len", "characters of the text", f"{_COUNT} characters", "text_length_filter", min=10),
    Rule("output_length", "output_len", "characters of the answer", f"{_COUNT} characters in the answer"),
    Rule(
        "instruction_length",
        "instruction_len",
        "characters of the instruction",
        f"{_COUNT} characters in the instruction",
    ),
    Rule("token_num", "num_token", "tokens of the text", f"{_COUNT} tokens", "token_num_filter", min=10),
    Rule("words_num", "num_words", "words of the text", f"{_COUNT} words", "words_num_filter", min=10),
    Rule(
        "alphanumeric",
        "alnum_ratio",
        "share of letters and digits",
        f"a share of letters and digits of {_NUMBER}",
        "alphanumeric_filter",
        min=0.25,
    ),
    Rule(
        "special_characters",
        "special_char_ratio",
        "share of special characters",
        f"a share of special characters of {_NUMBER}",
        "special_characters_filter",
        max=0.25,
    ),
    Rule(
        "character_repetition",
        "char_rep_ratio",
        "share of repeated character n-grams",
        f"a share of repeated character n-grams of {_NUMBER}",
        "character_repetition_filter",
        max=0.5,
    ),
    Rule(
        "word_repetition",
        "word_rep_ratio",
        "share of repeated word n-grams",
        f"a share of repeated word n-grams of {_NUMBER}",
        "word_repetition_filter",
        max=0.5,
    ),
    Rule(
        "average_line_length",
        "avg_line_length",
        "characters per line",
        f"{_NUMBER} characters per line",
        "average_line_length_filter",
        min=10,
    ),
    Rule(
        "maximum_line_length",
        "max_line_length",
        "characters of the longest line",
        f"{_COUNT} characters in the longest line",
        "maximum_line_length_filter",
        min=10,
    ),
    Rule("urls", "num_urls", "URLs in the text", f"{_COUNT} URLs"),
    Rule("html", "num_html_tags", "HTML tags in the text", f"{_COUNT} HTML tags"),
    Rule(
        "arithmetic",
        "arithmetic",
        "the text works out a sum",
        "the text holds a sum with its result, such as 1 + 2 = 3",
        kind="flag",
    ),
    Rule(
        "languages",
        "lang",
        "the language of the text",
        "the language is {value}",
        "language_id_score_filter",
        kind="allowed",
    ),
    Rule(
        "language_id_score",
        "lang_score",
        "how sure its language is",
        f"a language score of {_NUMBER}",
        "language_id_score_filter",
        min=0.8,
    ),
    Rule(
        "flagged_words",
        "flagged_words_ratio",
        "share of flagged words",
        f"a share of flagged words of {_NUMBER}",
        "flagged_words_filter",
        max=0.045,
    ),
    Rule(
        "stopwords",
        "stopwords_ratio",
        "share of stop words",
        f"a share of stop words of {_NUMBER}",
        "stopwords_filter",
        min=0.3,
    ),
    Rule(
        "perplexity",
        "perplexity",
        "perplexity of the text",
        f"a perplexity of {_NUMBER}",
        "perplexity_filter",
        max=1500,
    ),
    Rule(
        "answer_perplexity",
        "answer_perplexity",
        "perplexity of the answer given its instruction",
        f"a perplexity of the answer of {_NUMBER}",
    ),
    # The op inherits the range of a perplexity, 1 to 100, which no ratio of losses is meant to have: no default here.
    Rule(
        "instruction_following_difficulty",
        "ifd",
        "instruction-following difficulty",
        f"an instruction-following difficulty of {_NUMBER}",
        "instruction_following_difficulty_filter",
    ),
)
"""All rules, in the order in which they are applied."""


def rule_named(name: str) -> Rule:
    """Returns the rule of a name.

    Raises:
        ConfigError: there is none.

    Example:
        >>> rule_named("text_lenght")
        Traceback (most recent call last):
        ...
        doremi_mix.errors.ConfigError: unknown rule 'text_lenght'; did you mean 'text_length'?
    """
    for rule in RULES:
        if rule.name == name:
            return rule
    nearest = difflib.get_close_matches(name, [rule.name for rule in RULES], n=1, cutoff=0)[0]
    raise ConfigError(f"unknown rule {name!r}; did you mean {nearest!r}?")


def failed(
    rule: Rule,
    values_B: NDArray[Any],
    *,
    low: float | None = None,
    high: float | None = None,
    allowed: Collection[str] = (),
    applies: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """Marks the rows that a rule rejects.

    A range includes both ends, as in Data-Juicer.  A score that is NaN, because it could not be computed, rejects no
    row: what cannot be judged is kept.  The rule's defaults are not looked at; pass ``rule.min`` and ``rule.max``.

    Args:
        rule: which; only its kind matters here.
        values_B: the column of scores.
        low: for a range, the lowest value that passes; None for no bound.
        high: for a range, the highest value that passes; None for no bound.
        allowed: for a rule of the kind ``allowed``, what passes; empty for everything.
        applies: rows that the rule looks at; all if None.

    Returns:
        The mask of rejected rows, shape [B].

    Example:
        >>> failed(rule_named("text_length"), np.array([9, 10, 11, 12]), low=10, high=11).tolist()
        [True, False, False, True]
    """
    if rule.kind == "flag":
        mask_B = values_B.astype(np.bool_)
    elif rule.kind == "allowed":
        wanted = list(allowed)
        mask_B = ~np.isin(values_B.astype(np.str_), wanted) if wanted else np.zeros(len(values_B), dtype=np.bool_)
    else:
        mask_B = np.zeros(len(values_B), dtype=np.bool_)
        # A bound of 0.6 means the float32 nearest to it where the scores are float32: a score of 0.6 must equal it.
        cast = values_B.dtype.type if values_B.dtype.kind == "f" else (lambda bound: bound)
        if low is not None:
            mask_B |= values_B < cast(low)
        if high is not None:
            mask_B |= values_B > cast(high)
    return mask_B if applies is None else mask_B & applies


def describe(
    rule: Rule,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    allowed: Collection[str] = (),
) -> str:
    """Returns one short sentence about a row that a rule rejected: what was found and what was expected.

    Args:
        rule: the rule that rejected it.
        value: the row's score.
        low: as for ``failed``.
        high: as for ``failed``.
        allowed: as for ``failed``.

    Example:
        >>> describe(rule_named("text_length"), 2417, low=20, high=2000)
        '2,417 characters, expected 20 to 2,000'
        >>> describe(rule_named("languages"), "fr", allowed=["zh", "en"])
        'the language is fr, expected zh or en'
    """
    if rule.kind == "flag":
        return rule.detail
    if rule.kind == "allowed":
        return f"{rule.detail.format(value=value or 'unknown')}, expected {' or '.join(allowed)}"
    if low is not None and high is not None:
        expected = f"{low:,.12g} to {high:,.12g}"
    elif low is not None:
        expected = f"at least {low:,.12g}"
    else:
        expected = f"at most {high:,.12g}"
    return f"{rule.detail.format(value=value)}, expected {expected}"

"""Scores of texts: one NumPy array per column, one value per row, for a whole batch at a time.

Axes: B rows of a batch, N characters of all of them.

Columns that Data-Juicer has too carry the names of its statistics.  text_len, alnum_ratio, special_char_ratio,
char_rep_ratio, avg_line_length and max_line_length are its values exactly (``tokenization: false``).  What is counted
in words differs, in num_words, word_rep_ratio, flagged_words_ratio and stopwords_ratio: there a word is what
stands between spaces, tabs and newlines without punctuation and digits at its ends, so that a Chinese sentence is one
word and a number none; here it is a CJK letter or an unbroken run of other letters and digits, so that "don't" is two.
The other columns have no counterpart there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from doremi_mix.filters import characters, patterns, repetition
from doremi_mix.filters.texts import CodePoints, code_points, example_texts

if TYPE_CHECKING:
    import pyarrow as pa

Column = NDArray[Any]

TEXT_SCORES: Mapping[str, str] = {
    "text_len": "characters of the text",
    "instruction_len": "characters of the instruction; 0 for plain text",
    "output_len": "characters of the answer",
    "num_words": "words of the text; each CJK letter is one",
    "num_turns": "turns of the conversation; 0 for plain text",
    "alnum_ratio": "share of the characters that are letters or digits",
    "special_char_ratio": "share of the characters in Data-Juicer's set of special characters",
    "char_rep_ratio": "share of the character n-grams that the most frequent repeated ones make up",
    "word_rep_ratio": "share of the word n-grams that occur twice or more",
    "avg_line_length": "characters per line",
    "max_line_length": "characters of the longest line",
    "cjk_ratio": "share of the letters and digits that are Chinese, Japanese or Korean letters",
    "num_urls": "URLs",
    "num_html_tags": "HTML tags",
    "placeholder_answer": "the answer or the input is a placeholder such as N/A, or the text holds <noinput>",
    "refusal_answer": "the answer begins as a refusal or with a disclaimer",
    "broken_turns": "an earlier turn is empty, or the answer holds a template's mark of a turn",
    "answer_equals_instruction": "the answer equals the instruction but for case and whitespace",
    "arithmetic": "the text holds a sum with its result, such as 1 + 2 = 3",
}
"""Every column that ``score_texts`` knows, and what it holds."""

DEFAULT_NGRAM = 10
"""Items of an n-gram where a repetition column names no number."""

_WITH_PARAMETER = ("char_rep_ratio", "word_rep_ratio")


def parse_column(name: str) -> tuple[str, int | None]:
    """Splits the name of a column into its base and its parameter: ``char_rep_ratio@5`` has n-grams of 5 characters.

    Args:
        name: a name in ``TEXT_SCORES``; repetition ratios may be followed by "@" and a whole number from 1 on.

    Returns:
        The base, and the parameter or None.

    Raises:
        ValueError: the base is unknown, takes no parameter, or the parameter is no such number.

    Example:
        >>> parse_column("char_rep_ratio@5"), parse_column("text_len")
        (('char_rep_ratio', 5), ('text_len', None))
    """
    base, at, parameter = name.partition("@")
    if base not in TEXT_SCORES:
        nearest = difflib.get_close_matches(base, TEXT_SCORES, n=1, cutoff=0)
        raise ValueError(f"unknown text score {name!r}; did you mean {nearest[0]!r}?")
    if not at:
        return base, None
    if base not in _WITH_PARAMETER:
        raise ValueError(f"text score {base!r} takes no parameter, got {name!r}")
    if not (parameter.isascii() and parameter.isdigit() and int(parameter) > 0):
        raise ValueError(f"the parameter of {base!r} must be a whole number from 1 on, got {name!r}")
    return base, int(parameter)


def score_texts(batch: pa.RecordBatch, columns: Collection[str]) -> dict[str, Column]:
    """Computes columns of scores; only what was asked for, and what several columns need only once.

    Args:
        batch: B examples with the columns instruction, input, output and, if any has earlier turns, history.
        columns: names as ``parse_column`` takes them.

    Returns:
        By name, in the order of ``columns``: an array of shape [B], which is bool for what is true or false, int32 for
        lengths and counts, and float32 for ratios and ``avg_line_length``.

    Raises:
        ValueError: a name is unknown.

    Example:
        >>> import pyarrow as pa
        >>> batch = pa.RecordBatch.from_pydict({"instruction": ["Add 1 and 2."], "input": [""], "output": ["3"]})
        >>> {name: values.tolist() for name, values in score_texts(batch, ["text_len", "refusal_answer"]).items()}
        {'text_len': [15], 'refusal_answer': [False]}
    """
    parsed = {name: parse_column(name) for name in columns}
    scorer = _Scorer(batch)
    return {name: _SCORES[base](scorer, parameter or DEFAULT_NGRAM) for name, (base, parameter) in parsed.items()}


def flagged_words_ratio(texts: pa.Array, words: Collection[str]) -> Column:
    """Returns how often a flagged word occurs in each text, over the number of its words; float32, shape [B].

    No list of words comes with this package.  See ``repetition.listed_words_ratio`` for the definition, and for how it
    differs from Data-Juicer's flagged_words_filter.

    Example:
        >>> import pyarrow as pa
        >>> flagged_words_ratio(pa.array(["A darn good day!", "真是坏蛋啊", ""]), {"DARN", "坏蛋"}).tolist()
        [0.25, 0.20000000298023224, 0.0]
    """
    return repetition.listed_words_ratio(repetition.find_words(code_points(texts)), words).astype(np.float32)


def stopwords_ratio(texts: pa.Array, words: Collection[str]) -> Column:
    """Returns the same ratio for stop words, as in Data-Juicer's stopwords_filter; no list comes with this package."""
    return flagged_words_ratio(texts, words)


class _Scorer:
    """A batch, and what is made of it on the way to its scores, each when first asked for."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch

    def field(self, name: str) -> pa.Array:
        """Returns a column of strings without nulls."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.batch.column(name)
        return pc.fill_null(column.cast(pa.string()) if pa.types.is_null(column.type) else column, "")

    @cached_property
    def history(self) -> pa.Array | None:
        """The earlier turns; None where no row can have any."""
        import pyarrow as pa

        if "history" not in self.batch.schema.names or pa.types.is_null(self.batch.schema.field("history").type):
            return None
        return self.batch.column("history")

    @cached_property
    def texts(self) -> pa.Array:
        return example_texts(self.batch)

    @cached_property
    def points(self) -> CodePoints:
        return code_points(self.texts)

    @cached_property
    def flags_N(self) -> NDArray[np.uint8]:  # noqa: N802
        return characters.character_flags(self.points.points_N)

    @cached_property
    def words(self) -> repetition.Words:
        return repetition.find_words(self.points, self.flags_N)

    @cached_property
    def lines(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return characters.line_lengths(self.points, self.flags_N)

    def num_characters(self) -> NDArray[np.int64]:
        return _lengths(self.texts)

    def num_flagged(self, flags: np.uint8) -> NDArray[np.int64]:
        """Returns how many characters of each text have any of the flags."""
        return characters.sum_by_text((self.flags_N & flags) != 0, self.points.offsets_B1)

    def num_words(self) -> NDArray[np.int64]:
        starts_N, _ = characters.word_borders(self.flags_N, self.points.offsets_B1)
        return characters.sum_by_text(starts_N, self.points.offsets_B1)

    def num_turns(self) -> NDArray[np.int64]:
        import pyarrow.compute as pc

        num_earlier: Any = 0
        if self.history is not None:
            num_earlier = pc.fill_null(pc.list_value_length(self.history), 0).to_numpy(zero_copy_only=False)
        is_asked = self.batch.column("instruction").is_valid().to_numpy(zero_copy_only=False)
        return np.where(is_asked, num_earlier + 1, 0)

    def placeholder(self) -> patterns.Mask:
        return patterns.placeholder_answers(self.texts, self.field("input"), self.field("output"))

    def broken_turns(self) -> patterns.Mask:
        mask = patterns.turn_marks(self.field("output"))
        # Plain text is nobody's answer: a transcript may hold the marks rightly.
        mask &= self.batch.column("instruction").is_valid().to_numpy(zero_copy_only=False)
        return mask if self.history is None else mask | patterns.blank_turns(self.history)


_SCORES: Mapping[str, Callable[[_Scorer, int], Column]] = {
    "text_len": lambda scorer, _: scorer.num_characters().astype(np.int32),
    "instruction_len": lambda scorer, _: _lengths(scorer.field("instruction")).astype(np.int32),
    "output_len": lambda scorer, _: _lengths(scorer.field("output")).astype(np.int32),
    "num_words": lambda scorer, _: scorer.num_words().astype(np.int32),
    "num_turns": lambda scorer, _: scorer.num_turns().astype(np.int32),
    "alnum_ratio": lambda scorer, _: _ratio(scorer.num_flagged(characters.ALPHANUMERIC), scorer.num_characters()),
    "special_char_ratio": lambda scorer, _: _ratio(scorer.num_flagged(characters.SPECIAL), scorer.num_characters()),
    "char_rep_ratio": lambda scorer, n: repetition.character_repetition(scorer.points, n).astype(np.float32),
    "word_rep_ratio": lambda scorer, n: repetition.word_repetition(scorer.words, n).astype(np.float32),
    "avg_line_length": lambda scorer, _: _ratio(scorer.num_characters(), scorer.lines[0]),
    "max_line_length": lambda scorer, _: scorer.lines[1].astype(np.int32),
    "cjk_ratio": lambda scorer, _: _ratio(
        scorer.num_flagged(characters.CJK), scorer.num_flagged(characters.ALPHANUMERIC)
    ),
    "num_urls": lambda scorer, _: patterns.count_urls(scorer.texts),
    "num_html_tags": lambda scorer, _: patterns.count_html_tags(scorer.texts),
    "placeholder_answer": lambda scorer, _: scorer.placeholder(),
    "refusal_answer": lambda scorer, _: patterns.refusal_answers(scorer.field("output")),
    "broken_turns": lambda scorer, _: scorer.broken_turns(),
    "answer_equals_instruction": lambda scorer, _: patterns.copied_instructions(
        scorer.field("instruction"), scorer.field("output")
    ),
    "arithmetic": lambda scorer, _: patterns.sums(scorer.texts),
}


def _lengths(texts: pa.Array) -> NDArray[np.int64]:
    """Returns the number of characters of each text."""
    import pyarrow.compute as pc

    lengths: NDArray[np.int64] = pc.utf8_length(texts).to_numpy().astype(np.int64)
    return lengths


def _ratio(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> Column:
    """Divides in float64; 0 over 0 is 0."""
    return (numerator / np.maximum(denominator, 1)).astype(np.float32)

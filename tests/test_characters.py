"""Flags, words and lines, against Python's own methods character by character."""

import string
import sys
import unicodedata

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.filters import characters
from doremi_mix.filters.characters import character_flags, line_lengths, lower_case, sum_by_text, word_borders
from doremi_mix.filters.texts import code_points

EVERY_POINT = np.arange(sys.maxunicode + 1, dtype=np.uint32)
FLAGS = character_flags(EVERY_POINT)

pieces = st.sampled_from(
    [*"ab1 .'\n\r\x0b\x85\u2028", "\r\n", "中", "文", "か", "か\u3099", "한", "é", "हिन्दी", "❤\ufe0f", "😀"]
)
texts = st.lists(st.lists(pieces, max_size=12).map("".join), max_size=6)


def is_cjk(character):
    names = (
        "CJK ",
        "IDEOGRAPHIC",
        "HIRAGANA",
        "KATAKANA",
        "HALFWIDTH KATAKANA",
        "HANGUL",
        "HALFWIDTH HANGUL",
        "BOPOMOFO",
    )
    return character.isalnum() and unicodedata.name(character, "").startswith(names)


def is_inner(character):
    """Letters and digits, and marks that do not follow an emoji or a CJK letter."""
    is_mark = unicodedata.category(character) in ("Mn", "Mc") and character not in "\u3099\ufe0f"
    return character.isalnum() or is_mark


def words_of(text):
    """One word for each CJK letter and each run of other letters, digits and marks."""
    words, run = [], ""
    for character in text + " ":
        if is_inner(character) and not is_cjk(character):
            run += character
            continue
        if run:
            words.append(run)
        run = ""
        if is_cjk(character):
            words.append(character)
    return words


def test_alphanumeric_and_line_breaks_are_those_of_python():
    expected = [chr(point).isalnum() for point in EVERY_POINT]
    assert ((FLAGS & characters.ALPHANUMERIC) != 0).tolist() == expected
    expected = [len(("a" + chr(point) + "a").splitlines()) == 2 for point in EVERY_POINT]
    assert ((FLAGS & characters.LINE_BREAK) != 0).tolist() == expected


def test_special_characters_of_ascii_are_what_is_no_letter_of_it():
    special = {chr(point) for point in np.flatnonzero(FLAGS[:128] & characters.SPECIAL)}
    assert special == set(string.punctuation + string.digits + string.whitespace)


def test_special_characters_beyond_ascii():
    flags = character_flags(
        np.array([ord(character) for character in "。，！？「」…—€😀❤©🇩中é\xa0一上"], dtype=np.uint32)
    )
    # A no-break space and regional indicators are not in Data-Juicer's set; two common Chinese characters are.
    assert ((flags & characters.SPECIAL) != 0).tolist() == [True] * 12 + [False] * 4 + [True] * 2
    assert int(((FLAGS & characters.SPECIAL) != 0).sum()) == 184 + 1386 + 32 + 10 + 6


def test_scripts_agree_with_the_names_of_characters():
    wrong = []
    for point in np.flatnonzero(FLAGS & characters.ALPHANUMERIC):
        name, flags = unicodedata.name(chr(point), ""), FLAGS[point]
        expected = 0
        if name.startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "BOPOMOFO LETTER")):
            expected = characters.HAN
        elif name.startswith(("HIRAGANA LETTER", "KATAKANA LETTER", "HALFWIDTH KATAKANA LETTER")):
            expected = characters.KANA
        elif name.startswith(("HANGUL ", "HALFWIDTH HANGUL LETTER")):
            expected = characters.HANGUL
        elif flags & characters.CJK:  # iteration marks, numerals, long vowels: named after no script
            continue
        if flags & characters.CJK != expected:
            wrong.append(name)
    assert wrong == []
    assert not (FLAGS & characters.CJK)[(FLAGS & characters.ALPHANUMERIC) == 0].any()
    assert [bool(character_flags(np.array([ord(c)], np.uint32))[0] & characters.CJK) for c in "々〇ーｱéЖ한。"] == [
        *[True] * 4, False, False, True, False,
    ]  # fmt: skip


def test_lower_case_is_that_of_python_where_it_is_one_character():
    expected = [ord(lower) if len(lower := chr(point).lower()) == 1 else point for point in EVERY_POINT.tolist()]
    assert lower_case(EVERY_POINT).tolist() == expected


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 255), max_size=4), max_size=8))
def test_sums_by_text(values):
    offsets = np.cumsum([0, *map(len, values)])
    flat = np.array([value for row in values for value in row], dtype=np.uint8)
    assert sum_by_text(flat, offsets).tolist() == [sum(row) for row in values]


@settings(deadline=None)
@given(texts)
def test_words_against_the_definition(values):
    points = code_points(pa.array(values, pa.string()))
    starts_N, ends_N = word_borders(character_flags(points.points_N), points.offsets_B1)
    joined = "".join(values)
    spans = zip(np.flatnonzero(starts_N), np.flatnonzero(ends_N), strict=True)
    assert [joined[a : b + 1] for a, b in spans] == [word for text in values for word in words_of(text)]
    assert sum_by_text(starts_N, points.offsets_B1).tolist() == [len(words_of(text)) for text in values]


@settings(deadline=None)
@given(texts)
def test_lines_against_splitlines(values):
    points = code_points(pa.array(values, pa.string()))
    num_lines_B, longest_B = line_lengths(points, character_flags(points.points_N))
    lines = [text.splitlines() for text in values]
    assert num_lines_B.tolist() == [len(split) for split in lines]
    assert longest_B.tolist() == [max(map(len, split), default=0) for split in lines]


def test_a_break_may_end_one_text_and_begin_the_next():
    points = code_points(pa.array(["a\r", "\nb", "\r\n", "\n"]))
    num_lines_B, longest_B = line_lengths(points, character_flags(points.points_N))
    assert num_lines_B.tolist() == [1, 2, 1, 1]
    assert longest_B.tolist() == [1, 1, 0, 0]

"""What kind each character is: one byte of flags per Unicode code point, looked up for whole arrays.

Axes: B texts of a batch, N characters of all of them, M words of all of them.
"""

from __future__ import annotations

import string
import unicodedata
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from doremi_mix.filters.texts import CodePoints, row_pieces

Kind = TypeVar("Kind", bound=np.generic)

NUM_CODE_POINTS = 0x110000

ALPHANUMERIC = np.uint8(1)
"""``str.isalnum()`` holds."""
SPECIAL = np.uint8(2)
"""In Data-Juicer's set of special characters."""
HAN = np.uint8(4)
"""A letter written in Chinese characters, or Bopomofo."""
KANA = np.uint8(8)
"""A letter of the Japanese syllabaries."""
HANGUL = np.uint8(16)
"""A letter of Korean."""
IN_WORD = np.uint8(32)
"""Alphanumeric, or a combining mark inside a word, without which words of many Indic languages would fall apart."""
LINE_BREAK = np.uint8(64)
"""``str.splitlines()`` splits here."""
CJK = HAN | KANA | HANGUL
"""A letter that counts as a word by itself."""

# Scripts as ranges of code points, of which only those that are alphanumeric count.
_HAN = "3005-3007 3021-3029 3038-303b 3105-312f 31a0-31bf 3400-4dbf 4e00-9fff f900-faff 16fe3 20000-323af"
_KANA = "3041-3096 309d-309f 30a1-30fa 30fc-30ff 31f0-31ff ff66-ff9f 1aff0-1affe 1b000-1b16f"
_HANGUL = "1100-11ff 3131-318e a960-a97c ac00-d7a3 d7b0-d7fb ffa0-ffdc"

# Data-Juicer's special characters beyond ASCII punctuation, digits and whitespace.  The list goes back to the filters
# of BigScience; that some letters are in it (一 上 士 and a few of other scripts) is so there, and kept for its values.
_SPECIAL = (
    "81-85 91-93 95-99 9c-9d a1-a8 aa-ab ad af-b4 b7-bf d7 f7-f8 131 26a 2ba-2bc 2c8 2cc 2d0 2d8 2da 2dc 3c0 413 60c "
    "647 66a 66c 6e9 93e 940 947 94d 97d 9be e51 2002-2003 2005 2008-200b 2010-2011 2013-2016 2018-201a 201c-2020 "
    "2022 2024 2026 202f-2030 2032-2033 2039-203a 203f 2043-2044 20a8 20aa 20ac 2103 2190-2193 21d3 2206 2208 2212 "
    "221a 221e-221f 223c 2248 2256 2264-2265 2295 22c5 2550 25a0 25ac 25b2 25b4 25b7 25ba-25bc 25c6 25cf 25e6 "
    "2605-2606 261b 263b 2661 266b 2713 2726 2731 2756 27a4 27a9 2800 3000-3002 300a-300d 3010-3011 309c 30b7 "
    "30c3-30c4 30f3 30fb-30fc 4e00 4e0a 58eb fd3e-fd3f feff ff01 ff08-ff09 ff0c ff0e ff11 ff1a-ff1b ff1f ff3e ff5e "
    "fffc-fffd "
)
# Its emoji: the property Emoji of Unicode 15.0 without digits, "#", "*" (special anyway) and regional indicators.  They
# are written out so that the answer does not depend on which version of a Unicode library is installed.
_EMOJI = (
    "a9 ae 203c 2049 2122 2139 2194-2199 21a9-21aa 231a-231b 2328 23cf 23e9-23f3 23f8-23fa 24c2 25aa-25ab 25b6 25c0 "
    "25fb-25fe 2600-2604 260e 2611 2614-2615 2618 261d 2620 2622-2623 2626 262a 262e-262f 2638-263a 2640 2642 "
    "2648-2653 265f-2660 2663 2665-2666 2668 267b 267e-267f 2692-2697 2699 269b-269c 26a0-26a1 26a7 26aa-26ab "
    "26b0-26b1 26bd-26be 26c4-26c5 26c8 26ce-26cf 26d1 26d3-26d4 26e9-26ea 26f0-26f5 26f7-26fa 26fd 2702 2705 "
    "2708-270d 270f 2712 2714 2716 271d 2721 2728 2733-2734 2744 2747 274c 274e 2753-2755 2757 2763-2764 2795-2797 "
    "27a1 27b0 27bf 2934-2935 2b05-2b07 2b1b-2b1c 2b50 2b55 3030 303d 3297 3299 1f004 1f0cf 1f170-1f171 1f17e-1f17f "
    "1f18e 1f191-1f19a 1f201-1f202 1f21a 1f22f 1f232-1f23a 1f250-1f251 1f300-1f321 1f324-1f393 1f396-1f397 "
    "1f399-1f39b 1f39e-1f3f0 1f3f3-1f3f5 1f3f7-1f4fd 1f4ff-1f53d 1f549-1f54e 1f550-1f567 1f56f-1f570 1f573-1f57a "
    "1f587 1f58a-1f58d 1f590 1f595-1f596 1f5a4-1f5a5 1f5a8 1f5b1-1f5b2 1f5bc 1f5c2-1f5c4 1f5d1-1f5d3 1f5dc-1f5de "
    "1f5e1 1f5e3 1f5e8 1f5ef 1f5f3 1f5fa-1f64f 1f680-1f6c5 1f6cb-1f6d2 1f6d5-1f6d7 1f6dc-1f6e5 1f6e9 1f6eb-1f6ec "
    "1f6f0 1f6f3-1f6fc 1f7e0-1f7eb 1f7f0 1f90c-1f93a 1f93c-1f945 1f947-1f9ff 1fa70-1fa7c 1fa80-1fa88 1fa90-1fabd "
    "1fabf-1fac5 1face-1fadb 1fae0-1fae8 1faf0-1faf8 "
)
# Marks that follow emoji and CJK letters, and so never stand inside a run of other letters.
_NOT_IN_WORD = "302a-302f 3099-309a fe00-fe0f e0100-e01ef"
_LINE_BREAKS = "a-d 1c-1e 85 2028-2029"

# Characters handled at a time: what takes 8 bytes for each of them should stay in the cache.
_CHUNK = 2**16


def character_flags(points_N: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Returns the flags of each character: a sum of ALPHANUMERIC, SPECIAL, HAN and so on.

    What is alphanumeric is Python's own ``str.isalnum()``, so characters that entered Unicode after version 14.0 (of
    Python 3.11) may count differently under a newer Python.
    """
    return _look_up(_flags_table(), points_N)


def lower_case(points_N: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Returns each character in lower case; one whose lower case is several characters (İ) is kept as it is."""
    return _look_up(_lower_case_table(), points_N)


def sum_by_text(values_N: NDArray[np.uint8] | NDArray[np.bool_], offsets_B1: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the sum of the values of each text's characters; 0 for an empty text."""
    sums_B = np.zeros(len(offsets_B1) - 1, dtype=np.int64)
    # An empty text would take its neighbour's first value; without it, each segment ends where the next begins.
    filled = np.flatnonzero(offsets_B1[:-1] < offsets_B1[1:])
    starts = np.append(offsets_B1[filled], offsets_B1[-1])
    for rows in row_pieces(starts, _CHUNK):  # reduceat turns each byte into 8 before it adds them up
        first = starts[rows.start]
        sums_B[filled[rows]] = np.add.reduceat(
            values_N[first : starts[rows.stop]], starts[rows] - first, dtype=np.int64
        )
    return sums_B


def word_borders(
    flags_N: NDArray[np.uint8], offsets_B1: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Marks the first and the last character of each word.

    A word is one CJK letter, or an unbroken run of other letters, digits and combining marks.  Hence "don't" is two
    words, and a language that writes neither spaces nor CJK letters (Thai) has long ones.

    Args:
        flags_N: what ``character_flags`` gives.
        offsets_B1: where each text begins; no word crosses it.

    Returns:
        Two masks with as many marks each, in the same order.
    """
    alone_N = (flags_N & CJK) != 0
    run_N = (flags_N & IN_WORD) != 0
    run_N &= ~alone_N
    starts_N = alone_N | run_N
    ends_N = starts_N.copy()
    inner_N = run_N[1:] & run_N[:-1]  # the run goes on from this character to the next
    borders = offsets_B1[1:-1]
    inner_N[borders[(borders > 0) & (borders < len(flags_N))] - 1] = False
    starts_N[1:] ^= inner_N
    ends_N[:-1] ^= inner_N
    return starts_N, ends_N


def line_lengths(points: CodePoints, flags_N: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    r"""Returns the number of lines of each text, and the length of its longest line, as ``str.splitlines()`` splits.

    A break at the end of a text opens no further line, and "\r\n" is one break.
    """
    points_N, offsets_B1 = points
    starts_B, ends_B = offsets_B1[:-1], offsets_B1[1:]
    breaks = np.flatnonzero(flags_N & LINE_BREAK)
    text_of = np.searchsorted(offsets_B1, breaks, side="right") - 1
    is_pair = np.zeros(len(breaks), dtype=np.bool_)  # a "\n" whose "\r" is the break before it, in the same text
    is_pair[1:] = (points_N[breaks[1:]] == 10) & (points_N[breaks[:-1]] == 13) & (np.diff(breaks) == 1)
    is_pair[1:] &= text_of[1:] == text_of[:-1]
    # Each break ends a line, which begins after the break before it or at the text's start; then the texts' last lines.
    line_starts = starts_B[text_of]
    line_starts[1:] = np.maximum(line_starts[1:], breaks[:-1] + 1)
    lengths = breaks - line_starts
    num_lines_B = np.bincount(text_of[~is_pair], minlength=len(starts_B))
    longest_B = np.zeros(len(starts_B), dtype=np.int64)
    np.maximum.at(longest_B, text_of, lengths)
    last_starts_B = starts_B.copy()
    last_starts_B[text_of] = breaks + 1  # the last break of a text is written last
    last_lengths_B = ends_B - last_starts_B
    num_lines_B += last_lengths_B > 0
    return num_lines_B, np.maximum(longest_B, last_lengths_B)


def _look_up(table: NDArray[Kind], points_N: NDArray[np.uint32]) -> NDArray[Kind]:
    found_N = np.empty(len(points_N), dtype=table.dtype)
    for start in range(0, len(points_N), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        np.take(table, points_N[chunk], out=found_N[chunk], mode="clip")
    return found_N


@cache
def _flags_table() -> NDArray[np.uint8]:
    table = np.zeros(NUM_CODE_POINTS, dtype=np.uint8)
    characters = [chr(point) for point in range(NUM_CODE_POINTS)]
    is_alnum = np.fromiter(map(str.isalnum, characters), np.bool_, NUM_CODE_POINTS)
    is_mark = np.fromiter((unicodedata.category(c) in ("Mn", "Mc") for c in characters), np.bool_, NUM_CODE_POINTS)
    is_mark[_points(_NOT_IN_WORD)] = False
    table[is_alnum] |= ALPHANUMERIC
    table[is_alnum | is_mark] |= IN_WORD
    for script, ranges in ((HAN, _HAN), (KANA, _KANA), (HANGUL, _HANGUL)):
        table[_points(ranges)] |= script
    table[~is_alnum] &= ~CJK
    table[[ord(character) for character in string.punctuation + string.digits + string.whitespace]] |= SPECIAL
    table[_points(_SPECIAL)] |= SPECIAL
    table[_points(_EMOJI)] |= SPECIAL
    table[_points(_LINE_BREAKS)] |= LINE_BREAK
    return table


@cache
def _lower_case_table() -> NDArray[np.uint32]:
    table = np.arange(NUM_CODE_POINTS, dtype=np.uint32)
    for point in range(NUM_CODE_POINTS):
        lower = chr(point).lower()
        if len(lower) == 1:
            table[point] = ord(lower)
    return table


def _points(ranges: str) -> NDArray[np.int64]:
    """Reads "41-5a 61" as code points in hexadecimal, both ends included."""
    borders = [item.partition("-")[::2] for item in ranges.split()]
    return np.concatenate([np.arange(int(low, 16), int(high or low, 16) + 1) for low, high in borders])

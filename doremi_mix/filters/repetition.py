"""How much of a text repeats itself: n-grams of characters and of words, counted by hash for whole batches.

Axes: B texts of a batch, N characters or other items of all of them, M words of all of them.

A hash is a polynomial of its items modulo 2^64.  All windows of a piece come from one running sum: the part of the sum
inside the window, divided by the power that its place contributed, which an odd base allows.  N-grams count as equal
where the upper 52 bits are; that two different ones of a text of 2,000 characters agree has a probability near 10^-9.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from doremi_mix.filters import characters
from doremi_mix.filters.texts import CodePoints, code_points, row_pieces

Item = TypeVar("Item", np.uint32, np.uint64)

_PIECE = 2**14
"""Items handled at a time: what is made of them stays in the second-level cache."""
_MAX_TEXTS = 2**12 - 1
"""Texts in a piece: their number takes 12 of a key's 64 bits."""
_HASH_BITS = 52
_MAX_BUCKET_BITS = 22
"""Of a text far longer than a piece: its table of buckets must not take more memory than the text."""

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)  # odd; its product's top bits choose a bucket


class Words(NamedTuple):
    """The words of a batch of texts.

    Attributes:
        hashes_M: 64 bits of each word in lower case.
        offsets_B1: int64; the words of text i are ``hashes_M[offsets_B1[i] : offsets_B1[i + 1]]``.
    """

    hashes_M: NDArray[np.uint64]
    offsets_B1: NDArray[np.int64]


def character_repetition(points: CodePoints, length: int = 10) -> NDArray[np.float64]:
    """Returns the share of each text's character n-grams that its most frequent repeated ones make up.

    As Data-Juicer's character_repetition_filter has it: of D different n-grams, R of which occur twice or more, the
    counts of the ``min(floor(sqrt(D)), R)`` most frequent ones, over the number of all.  0 for a text without n-grams.

    Args:
        points: B texts.
        length: n, at least 1.

    Returns:
        The ratios, shape [B].

    Example:
        >>> import pyarrow as pa
        >>> character_repetition(code_points(pa.array(["abababab", "abcdefgh", "a"])), 2).tolist()
        [0.5714285714285714, 0.0, 0.0]
    """
    ratios_B = np.zeros(len(points.offsets_B1) - 1)
    for rows, values_N, offsets_B1 in _pieces(points.points_N, points.offsets_B1):
        num_ngrams_B = np.maximum(np.diff(offsets_B1) - length + 1, 0)
        text_of_R, counts_R = _repeated_ngrams(values_N, offsets_B1, length)
        num_repeated_B = np.bincount(text_of_R, minlength=len(num_ngrams_B))
        extra_B = np.bincount(text_of_R, weights=counts_R, minlength=len(num_ngrams_B)) - num_repeated_B
        num_counted_B = np.minimum(np.sqrt(num_ngrams_B - extra_B).astype(np.int64), num_repeated_B)
        # Each text's n-grams from the most frequent on; the first ones count.
        order = np.lexsort((-counts_R, text_of_R))
        first_B = np.cumsum(num_repeated_B) - num_repeated_B
        rank_R = np.arange(len(order)) - first_B[text_of_R]  # text_of_R is sorted already
        is_counted_R = rank_R < num_counted_B[text_of_R]
        sums_B = np.bincount(text_of_R, weights=counts_R[order] * is_counted_R, minlength=len(num_ngrams_B))
        ratios_B[rows] = sums_B / np.maximum(num_ngrams_B, 1)
    return ratios_B


def word_repetition(words: Words, length: int = 10) -> NDArray[np.float64]:
    """Returns the share of each text's word n-grams that occur twice or more; 0 for a text without n-grams.

    The ratio is that of Data-Juicer's word_repetition_filter, but its words are what stands between spaces, tabs and
    newlines, so that a Chinese sentence is one word; these are those of ``find_words``.

    Args:
        words: of B texts.
        length: n, at least 1.

    Returns:
        The ratios, shape [B].
    """
    ratios_B = np.zeros(len(words.offsets_B1) - 1)
    for rows, values_N, offsets_B1 in _pieces(words.hashes_M, words.offsets_B1):
        num_ngrams_B = np.maximum(np.diff(offsets_B1) - length + 1, 0)
        text_of_R, counts_R = _repeated_ngrams(values_N, offsets_B1, length)
        sums_B = np.bincount(text_of_R, weights=counts_R, minlength=len(num_ngrams_B))
        ratios_B[rows] = sums_B / np.maximum(num_ngrams_B, 1)
    return ratios_B


def find_words(points: CodePoints, flags_N: NDArray[np.uint8] | None = None) -> Words:
    """Finds the words of all texts; see ``characters.word_borders`` for what a word is.

    Args:
        points: B texts.
        flags_N: what ``characters.character_flags`` gives, where it has been computed already.
    """
    if flags_N is None:
        flags_N = characters.character_flags(points.points_N)
    hashes, num_words_B = [], np.zeros(len(points.offsets_B1), dtype=np.int64)
    start = 0
    for rows, values_N, offsets_B1 in _pieces(points.points_N, points.offsets_B1):
        stop = start + len(values_N)
        starts_N, ends_N = characters.word_borders(flags_N[start:stop], offsets_B1)
        first, last = np.flatnonzero(starts_N), np.flatnonzero(ends_N)
        hashes.append(_mix(_hash_spans(characters.lower_case(values_N), first, last + 1)))
        num_words_B[rows.start + 1 : rows.stop + 1] = characters.sum_by_text(starts_N, offsets_B1)
        start = stop
    return Words(np.concatenate([np.zeros(0, dtype=np.uint64), *hashes]), np.cumsum(num_words_B))


def listed_words_ratio(words: Words, listed: Collection[str]) -> NDArray[np.float64]:
    """Returns the number of times that a listed word occurs in each text, over the number of its words; at most 1.

    Case does not count.  An entry of several words, which in Chinese is an entry of several characters, is found where
    they follow each other, and counts once.  Data-Juicer's flagged_words_filter and stopwords_filter have the same
    ratio over words that stand between spaces, without the special characters at their ends; entries of several words
    are found there only under ``use_words_aug``, which also adds pairs of words to the denominator.

    Args:
        words: of B texts.
        listed: the entries; they are split into words as the texts are.

    Returns:
        The ratios, shape [B]; 0 for a text without words.
    """
    import pyarrow as pa

    entries = find_words(code_points(pa.array(sorted(set(listed)), pa.string())))
    lengths = np.diff(entries.offsets_B1)
    num_words_B = np.diff(words.offsets_B1)
    num_found_B = np.zeros(len(num_words_B), dtype=np.int64)
    for length in np.unique(lengths[lengths > 0]).tolist():
        firsts = entries.offsets_B1[:-1][lengths == length]
        wanted = np.unique(_hash_spans(entries.hashes_M, firsts, firsts + length))
        for rows, values_N, offsets_B1 in _pieces(words.hashes_M, words.offsets_B1):
            hashes_N = _hash_windows(values_N, length)
            found_N = wanted[np.minimum(np.searchsorted(wanted, hashes_N), len(wanted) - 1)] == hashes_N
            found_N[_cut_windows(offsets_B1, length)] = False
            num_found_B[rows] += characters.sum_by_text(found_N, offsets_B1)
    return np.minimum(num_found_B / np.maximum(num_words_B, 1), 1.0)


def _pieces(
    values_N: NDArray[Item], offsets_B1: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[Item], NDArray[np.int64]]]:
    """Splits a batch at borders of texts: which rows, their items, and where each row begins in these."""
    for rows in row_pieces(offsets_B1, _PIECE, _MAX_TEXTS):
        first, last = int(offsets_B1[rows.start]), int(offsets_B1[rows.stop])
        yield rows, values_N[first:last], offsets_B1[rows.start : rows.stop + 1] - first


def _repeated_ngrams(
    values_N: NDArray[Item], offsets_B1: NDArray[np.int64], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the text and the count of every n-gram that occurs twice or more in a text, sorted by text."""
    num_items_B = np.diff(offsets_B1)
    keys_N = _hash_windows(values_N, length)
    keys_N >>= np.uint64(64 - _HASH_BITS)
    keys_N |= np.repeat(np.arange(len(num_items_B), dtype=np.uint64) << np.uint64(_HASH_BITS), num_items_B)
    cut = _cut_windows(offsets_B1, length)  # each gets a key of its own, of a text that does not exist
    keys_N[cut] = np.uint64(_MAX_TEXTS << _HASH_BITS) + np.arange(len(cut), dtype=np.uint64)
    # Sorting is what costs most, and most n-grams are alone in their bucket of a hash table, hence alone.
    keys = keys_N[_not_alone(keys_N)]
    keys.sort()
    is_next_equal = keys[1:] == keys[:-1]
    edges = np.flatnonzero(np.diff(is_next_equal, prepend=False, append=False))
    firsts, lasts = edges[::2], edges[1::2]
    return (keys[firsts] >> np.uint64(_HASH_BITS)).astype(np.int64), lasts - firsts + 1


def _not_alone(keys_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Returns the indices of the keys that share a bucket; a piece has at least eight times as many buckets as keys."""
    num_bits = min((8 * len(keys_N)).bit_length(), _MAX_BUCKET_BITS)
    bucket_N = ((keys_N * _MULTIPLIER) >> np.uint64(64 - num_bits)).view(np.int64)
    index_N = np.arange(len(keys_N), dtype=np.int32)
    # One key of each bucket stays written there; the others find that it is not theirs.  Buckets without a key are
    # never read, so they need not be cleared.
    table = np.empty(2**num_bits, dtype=np.int32)
    table[bucket_N] = index_N
    written_N = np.take(table, bucket_N, mode="clip")
    shares_N = written_N != index_N
    shares_N[written_N[np.flatnonzero(shares_N)]] = True
    return np.flatnonzero(shares_N)


def _cut_windows(offsets_B1: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Returns the places from which a window of ``length`` items would leave its text."""
    starts_B, ends_B = offsets_B1[:-1], offsets_B1[1:]
    places = ends_B[:, None] - np.arange(1, length)
    return places[places >= starts_B[:, None]]


def _hash_windows(values_N: NDArray[Item], length: int) -> NDArray[np.uint64]:
    """Returns a hash of the ``length`` items from each place on; near the end, of those that are left."""
    sums, inverse_powers = _running_sums(values_N)
    hashes_N = np.empty(len(values_N), dtype=np.uint64)
    whole = max(len(values_N) - length + 1, 0)
    np.subtract(sums[length:], sums[:whole], out=hashes_N[:whole])
    np.subtract(sums[-1], sums[whole:-1], out=hashes_N[whole:])
    hashes_N *= inverse_powers
    return hashes_N


def _hash_spans(values_N: NDArray[Item], first_M: NDArray[np.int64], stop_M: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Returns a hash of the items of each span; equal to that of a window with the same items."""
    sums, inverse_powers = _running_sums(values_N)
    return (sums[stop_M] - sums[first_M]) * inverse_powers[first_M]


def _mix(hashes_M: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Breaks up sums, in place: without it, "ab c" and "ac b" would have one hash, since words are hashed in turn."""
    hashes_M ^= hashes_M >> np.uint64(32)
    hashes_M *= _MULTIPLIER
    hashes_M ^= hashes_M >> np.uint64(29)
    return hashes_M


def _running_sums(values_N: NDArray[Item]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Returns the N + 1 sums of value times power of the base, from none on, and the N factors that undo the powers."""
    powers, inverse_powers = _powers(max(_PIECE, 1 << (len(values_N) - 1).bit_length()) if len(values_N) else _PIECE)
    sums = np.zeros(len(values_N) + 1, dtype=np.uint64)
    np.multiply(values_N, powers[: len(values_N)], out=sums[1:])
    np.cumsum(sums[1:], out=sums[1:])
    return sums, inverse_powers[: len(values_N)]


@lru_cache(maxsize=1)  # those of a very long text shall not stay
def _powers(size: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Returns the base to the powers 0, 1, 2, ... and 1, 0, -1, ... modulo 2^64.

    Their products are the base to the power 1, not 0: a hash of which one item's factor is 1 would not have that item
    in its upper bits.
    """
    powers = np.full(size, _BASE, dtype=np.uint64)
    powers[0] = 1
    inverses = np.full(size, pow(_BASE, -1, 2**64), dtype=np.uint64)
    inverses[0] = _BASE
    return np.cumprod(powers), np.cumprod(inverses)

"""Repetition ratios, against dictionaries of n-grams, with pieces so small that every border matters."""

import math
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.filters import repetition
from doremi_mix.filters.repetition import character_repetition, find_words, listed_words_ratio, word_repetition
from doremi_mix.filters.texts import code_points

lengths = st.integers(1, 5)
texts = st.lists(st.text("ab中", max_size=30) | st.text(st.characters(codec="utf-8"), max_size=10), max_size=8)
sentences = st.lists(
    st.lists(st.sampled_from(["a", "B", "b", "ab", "中", "文", ".", "é1"]), max_size=20).map(" ".join), max_size=6
)


def words_of(text):
    return re.findall("[中文]|[a-zé0-9]+", text.lower())


def ngrams(items, length):
    return Counter(tuple(items[i : i + length]) for i in range(len(items) - length + 1))


def character_ratio(text, length):
    """The definition of Data-Juicer's character_repetition_filter."""
    counts = sorted(ngrams(text, length).values(), reverse=True)
    if not counts:
        return 0.0
    num_counted = min(math.isqrt(len(counts)), sum(count > 1 for count in counts))
    return sum(counts[:num_counted]) / sum(counts)


def word_ratio(words, length):
    """The definition of Data-Juicer's word_repetition_filter."""
    counts = ngrams(words, length).values()
    return sum(count for count in counts if count > 1) / sum(counts) if counts else 0.0


@pytest.fixture(params=[7, 100, 2**14])
def piece(request, monkeypatch):
    monkeypatch.setattr(repetition, "_PIECE", request.param)
    repetition._powers.cache_clear()


@pytest.mark.usefixtures("piece")
def test_character_repetition_against_the_definition():
    @settings(deadline=None)
    @given(texts, lengths)
    def check(values, length):
        points = code_points(pa.array(values, pa.string()))
        assert character_repetition(points, length).tolist() == [character_ratio(text, length) for text in values]

    check()


@pytest.mark.usefixtures("piece")
def test_word_repetition_against_the_definition():
    @settings(deadline=None)
    @given(sentences, lengths)
    def check(values, length):
        words = find_words(code_points(pa.array(values, pa.string())))
        expected = [word_ratio(words_of(text), length) for text in values]
        assert word_repetition(words, length).tolist() == expected

    check()


def test_long_and_many_texts():
    rng = np.random.default_rng(0)
    alphabet = np.array(list("ab 中"))
    values = ["".join(rng.choice(alphabet, rng.integers(0, 60))) for _ in range(9_000)]
    values[4_000] = "".join(rng.choice(alphabet, 50_000))  # longer than a piece
    values[4_001] = "x" * 40_000
    got = character_repetition(code_points(pa.array(values)), 10)
    assert got.tolist() == [character_ratio(text, 10) for text in values]
    assert got[4_001] == 1.0


def test_equal_texts_beside_each_other_do_not_count_as_repetition():
    values = ["The quick brown fox jumps over the lazy dog."] * 100
    assert character_repetition(code_points(pa.array(values))).tolist() == [0.0] * 100


def test_hashes_of_words_depend_on_the_word_alone():
    words = find_words(code_points(pa.array(["Straße, the THE Thé", "the", "中the文"])))
    assert words.offsets_B1.tolist() == [0, 4, 5, 8]
    hashes = words.hashes_M.tolist()
    assert hashes[1] == hashes[2] == hashes[4] == hashes[6]
    assert len(set(hashes)) == 5


def test_different_ngrams_of_few_letters_do_not_count_as_one():
    # All 2^16 strings of 16 letters a and b, one after the other, each closed by what no other window can hold.
    bits = (np.arange(2**16)[:, None] >> np.arange(16)) & 1
    text = "".join(np.array(["a", "b"])[np.concatenate([bits, bits[:, :0]], axis=1)].ravel())
    words = " ".join(text[i : i + 16] for i in range(0, len(text), 16))
    assert word_repetition(find_words(code_points(pa.array([words]))), 1).tolist() == [0.0]


def test_words_may_not_swap_their_letters_unseen():
    words = find_words(code_points(pa.array(["ab c ac b", "ab c ab c"])))
    assert word_repetition(words, 2).tolist() == [0.0, 2 / 3]


@settings(deadline=None)
@given(sentences, st.sets(st.sampled_from(["a", "B", "AB", "中", "中文", "b a", "ab.中文", ".", "zz"]), max_size=5))
def test_listed_words_against_the_definition(values, listed):
    entries = {tuple(words_of(entry)) for entry in listed} - {()}
    expected = []
    for text in values:
        words = words_of(text)
        found = sum(tuple(words[i : i + len(entry)]) == entry for entry in entries for i in range(len(words)))
        expected.append(min(1.0, found / len(words)) if words else 0.0)
    assert listed_words_ratio(find_words(code_points(pa.array(values, pa.string()))), listed).tolist() == expected


def test_no_texts():
    points = code_points(pa.array([], pa.string()))
    assert character_repetition(points).tolist() == []
    assert word_repetition(find_words(points)).tolist() == []
    assert listed_words_ratio(find_words(points), {"a"}).tolist() == []

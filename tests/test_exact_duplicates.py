"""Exact duplicates: keys against their definitions spelled out, survivors against a dictionary filled row by row."""

import hashlib
import string
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.filters.exact_duplicates import (
    find_exact_duplicates,
    normalize_spaces,
    overlap_matrix,
    row_offsets,
    text_keys,
)


def hex_keys(texts, normalization):
    keys = text_keys(pa.array(texts, pa.string()), normalization)
    assert keys.dtype == np.uint64
    return [f"{upper:016x}{lower:016x}" for upper, lower in keys.tolist()]


def md5(text):
    return hashlib.md5(text.encode()).hexdigest()


# --- text_keys ------------------------------------------------------------------------------------------------------

HARD_TEXTS = [
    "",
    " ",
    "Good  day",
    "\tGood day\n",
    "good-day 2",
    "１２ ＡＢ",
    "你好，世界",
    "你好世界",
    "ΟΔΟΣ",
    "İ",
    "x\u3000y",
    "٣ 3",
]


def keep_characters(text):
    """Character by character: what is neither whitespace, a decimal digit nor ASCII punctuation."""
    return "".join(
        c for c in text.lower() if not (c.isspace() or unicodedata.category(c) == "Nd" or c in string.punctuation)
    )


@pytest.mark.parametrize(
    ("normalization", "definition"),
    [
        ("text", str.strip),
        ("spaces", lambda text: " ".join(unicodedata.normalize("NFKC", text).casefold().split())),
        ("characters", keep_characters),
    ],
)
def test_a_key_is_the_md5_digest_of_the_normalized_text(normalization, definition):
    assert hex_keys(HARD_TEXTS, normalization) == [md5(definition(text)) for text in HARD_TEXTS]


@given(st.lists(st.text(max_size=12), max_size=8))
@settings(deadline=None)
def test_characters_match_their_definition_on_any_text(texts):
    # The control characters U+001C to U+001F are whitespace to Python, and not to the regular expression meant here.
    texts = ["".join(c for c in text if not "\x1c" <= c <= "\x1f") for text in texts]
    assert hex_keys(texts, "characters") == [md5(keep_characters(text)) for text in texts]


def test_what_each_normalization_takes_for_the_same():
    def same(one, other):
        return [
            normalization
            for normalization in ("text", "spaces", "characters")
            if len(set(hex_keys([one, other], normalization))) == 1
        ]

    assert same("a b", "a b ") == ["text", "spaces", "characters"]
    assert same("Name three  colors.", "name THREE colors.") == ["spaces", "characters"]
    assert same("３ 个\u3000苹果", "3 个 苹果") == ["spaces", "characters"]
    assert same("Add 3 and 4", "Add 5, and 6!") == ["characters"]
    assert same("你好，世界", "你好世界") == []  # only ASCII punctuation is taken out
    assert same("ab", "a b") == ["characters"]
    assert same("cat", "dog") == []


def test_the_key_of_a_text_does_not_depend_on_its_neighbors():
    whole = text_keys(pa.array(HARD_TEXTS), "spaces")
    shards = [text_keys(pa.array(HARD_TEXTS).slice(start, 5), "spaces") for start in range(0, len(HARD_TEXTS), 5)]
    np.testing.assert_array_equal(whole, np.concatenate(shards))
    assert text_keys(pa.array([], pa.string())).shape == (0, 2)


def test_large_strings_have_the_same_keys():
    np.testing.assert_array_equal(text_keys(pa.array(HARD_TEXTS)), text_keys(pa.array(HARD_TEXTS, pa.large_string())))


def test_normalized_text_has_one_space_for_any_whitespace_and_width():
    assert normalize_spaces(pa.array(["\u3000Ｆｕｌｌ\u00a0\r\n width ①"])) == ["full width 1"]


def test_bad_texts_and_normalizations_are_refused():
    with pytest.raises(ValueError, match=r"^texts must not be null, got 1 nulls in 2 texts$"):
        text_keys(pa.array(["a", None]))
    with pytest.raises(ValueError, match=r"^normalize must be one of text, spaces, characters, got 'words'$"):
        text_keys(pa.array(["a"]), "words")


# --- survivors ------------------------------------------------------------------------------------------------------


def first_come(keys_by_domain, priority):
    """The definition: walk the domains by priority, and give each key to the first row that has it."""
    starts = np.cumsum([0] + [len(keys) for keys in keys_by_domain])
    owner = {}
    for domain in priority:
        for position, key in enumerate(keys_by_domain[domain]):
            owner.setdefault(tuple(key), int(starts[domain]) + position)
    return [[owner[tuple(key)] for key in keys] for keys in keys_by_domain]


@st.composite
def key_sets(draw):
    """Domains of keys that often coincide in one half or both, spread over the whole range."""
    halves = st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1])
    domains = draw(st.lists(st.lists(st.tuples(halves, halves), max_size=12), min_size=1, max_size=5))
    priority = draw(st.permutations(range(len(domains))))
    return [np.array(domain, np.uint64).reshape(-1, 2) for domain in domains], priority


@given(key_sets(), st.sampled_from([1, 2, 3, 64, 1000]))
@settings(deadline=None)
def test_survivors_are_those_of_a_walk_by_priority_for_any_number_of_buckets(problem, num_buckets):
    keys, priority = problem
    found = find_exact_duplicates(keys, priority, num_buckets=num_buckets)
    expected = first_come([domain.tolist() for domain in keys], priority)
    assert [survivors.tolist() for survivors in found.survivor_of] == expected
    assert all(survivors.dtype == np.int64 for survivors in found.survivor_of)


@given(key_sets())
@settings(deadline=None)
def test_rows_are_kept_or_lost_and_every_loss_is_booked_once(problem):
    keys, priority = problem
    found = find_exact_duplicates(keys, priority)
    offsets = row_offsets([len(domain) for domain in keys])
    survivor_N = np.concatenate(found.survivor_of)
    domain_of = np.repeat(np.arange(len(keys)), np.diff(offsets))
    expected = np.zeros((len(keys), len(keys)), int)
    for row, survivor in enumerate(survivor_N.tolist()):
        if survivor != row:
            expected[domain_of[row], domain_of[survivor]] += 1
    assert found.lost_to_KK.tolist() == expected.tolist()
    for domain, survivors in enumerate(found.survivor_of):
        num_kept = (survivors == np.arange(offsets[domain], offsets[domain + 1])).sum()
        assert num_kept + found.lost_to_KK[domain].sum() == len(keys[domain])
    assert (survivor_N[survivor_N] == survivor_N).all()  # a survivor survives


def test_planted_duplicates_go_to_the_preferred_domain():
    texts = [["a", "b", "b"], ["B ", "c"], ["c", "a", "d"]]
    keys = [text_keys(pa.array(domain)) for domain in texts]
    found = find_exact_duplicates(keys, [2, 0, 1])
    assert [survivors.tolist() for survivors in found.survivor_of] == [[6, 1, 1], [1, 5], [5, 6, 7]]
    assert found.lost_to_KK.tolist() == [[1, 0, 1], [1, 0, 1], [0, 0, 0]]


def test_memory_mapped_keys_are_read(tmp_path):
    keys = np.array([[5, 1], [2**63, 2], [5, 1]], np.uint64)
    np.save(tmp_path / "keys.npy", keys)
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    for num_buckets in (1, 4):
        found = find_exact_duplicates([mapped], [0], num_buckets=num_buckets)
        assert found.survivor_of[0].tolist() == [0, 1, 0]


# --- overlap --------------------------------------------------------------------------------------------------------


@given(key_sets(), st.sampled_from([1, 3, 64]))
@settings(deadline=None)
def test_overlap_counts_distinct_shared_keys(problem, num_buckets):
    keys, _ = problem
    sets = [{tuple(key) for key in domain.tolist()} for domain in keys]
    overlap_KK = overlap_matrix(keys, num_buckets=num_buckets)
    assert overlap_KK.dtype == np.int64
    assert overlap_KK.tolist() == [[len(one & other) for other in sets] for one in sets]


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "priority", "num_buckets", "message"),
    [
        ([np.zeros((2, 2), np.int64)], [0], 1, "keys of domain 0 must be uint64 [N, 2], got int64 [2, 2]"),
        ([np.zeros(2, np.uint64)], [0], 1, "keys of domain 0 must be uint64 [N, 2], got uint64 [2]"),
        ([np.zeros((2, 2), np.uint64)], [1], 1, "priority must be a permutation of the 1 domain ids, got [1]"),
        (
            [np.zeros((2, 2), np.uint64)] * 2,
            [0, 0],
            1,
            "priority must be a permutation of the 2 domain ids, got [0, 0]",
        ),
        (
            [np.zeros((2, 2), np.uint64)],
            [0],
            0,
            "there must be a domain and a bucket, got 1 domains and num_buckets=0",
        ),
        ([], [], 1, "there must be a domain and a bucket, got 0 domains and num_buckets=1"),
    ],
)
def test_bad_arguments_are_refused(keys, priority, num_buckets, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the whole message is compared
        find_exact_duplicates(keys, priority, num_buckets=num_buckets)
    assert str(caught.value) == message

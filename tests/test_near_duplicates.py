"""Near-duplicates: Jaccard similarity on sets of shingles as the oracle, and the choice of survivors spelled out."""

import math
import sys
import unicodedata
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from doremi_mix.errors import ConfigError
from doremi_mix.filters import near_duplicates
from doremi_mix.filters.near_duplicates import choose_bands, find_near_duplicates, signatures

ENGLISH = (
    "Describe the three states of matter. Matter is solid, liquid or gas: in a solid the particles stay in place, in a "
    "liquid they slide past each other, and in a gas they fly apart and fill whatever holds them."
)
CHINESE = (
    "请解释什么是光合作用。光合作用是植物、藻类和某些细菌利用阳光的能量，把二氧化碳和水变成葡萄糖和氧气的过程。"
    "它为地球上几乎所有的生命提供食物，也让空气里的氧气得到补充，没有它就没有森林和草原。"
)

GOLDEN = [[13628320, 6390333, 11856804, 1070203], [53187787, 25660597, 18681781, 49641200]]


def sign(texts, **options):
    return signatures(pa.array(texts, pa.string()), **options)


def shingles(text, size=5):
    """The definition: all runs of 5 characters of the normalized text, or a shorter text as a whole."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return {text[i : i + size] for i in range(len(text) - size + 1)} or {text}


def jaccard(one, other, size=5):
    return len(shingles(one, size) & shingles(other, size)) / len(shingles(one, size) | shingles(other, size))


def estimate(signature, other):
    return float((signature == other).mean())


def random_text(rng, length, alphabet="abcdefghijklmnopqrstuvwxyz"):
    return "".join(rng.choice(list(alphabet), length))


def survivors(found):
    return [row for domain in found.survivor_of for row in domain.tolist()]


# --- signatures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [12, 60, 400, 1500])
@pytest.mark.parametrize("alphabet", ["abcdefghijklmnopqrstuvwxyz", "江河湖海溪泉雨雪冰云山石土木花草鸟兽虫鱼"])
def test_the_estimate_is_unbiased_and_as_near_as_it_claims(length, alphabet):
    rng = np.random.default_rng(length)
    pairs = []
    for _ in range(150):
        text = random_text(rng, length, alphabet)
        cut = int(rng.integers(length))
        pairs.append((text, text[:cut] + random_text(rng, int(rng.integers(1, length)), alphabet)))
    found = sign([text for pair in pairs for text in pair])
    true = np.array([jaccard(*pair) for pair in pairs])
    errors = np.array([estimate(found[2 * i], found[2 * i + 1]) for i in range(len(pairs))]) - true
    standard_errors = np.sqrt(true * (1 - true) / 128)
    assert (abs(errors) <= 4 * standard_errors + 1e-12).all()
    # On average the error is that of 150 estimates.
    assert abs(errors.mean()) <= 4 * math.sqrt((standard_errors**2).sum()) / len(pairs)


def test_texts_with_one_set_of_shingles_have_one_signature():
    found = sign(["Ab\u3000cd  ef", "  AB CD EF", "ab cd ef", "abababab", "ababababab", "ab cd eg"])
    assert (found[:3] == found[2]).all()
    assert (found[3] == found[4]).all()  # repeats do not count
    assert estimate(found[2], found[5]) == pytest.approx(jaccard("ab cd ef", "ab cd eg"), abs=4 * math.sqrt(0.24 / 128))


def test_a_text_shorter_than_a_shingle_is_one_shingle():
    texts = ["", "a", "ab", "b", "好", "abcd", "abcde"]
    found = sign([*texts, *texts])
    for i, j in combinations(range(len(found)), 2):
        assert (estimate(found[i], found[j]) == 1) == (i % len(texts) == j % len(texts))
        assert estimate(found[i], found[j]) in (0, 1) or i % len(texts) == j % len(texts)


def test_a_short_text_is_no_part_of_a_longer_one():
    found = sign(["a", "a b", "a\U0010fffe"], shingle_size=2)
    assert [estimate(found[i], found[j]) for i, j in combinations(range(3), 2)] == [0, 0, 0]


@pytest.mark.parametrize("size", [1, 3, 9])
def test_shingles_of_other_sizes(size):
    one, other = ENGLISH, ENGLISH.replace("particles", "molecules").replace("gas", "vapor")
    found = sign([one, other], shingle_size=size, num_permutations=1024)
    true = jaccard(one, other, size)
    assert found.shape == (2, 1024)
    assert abs(estimate(*found) - true) <= 4 * math.sqrt(true * (1 - true) / 1024)


def test_signatures_of_shards_are_those_of_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    texts = [random_text(rng, int(length), "ab 好水") for length in rng.integers(0, 90, 60)]
    whole = sign(texts)
    assert whole.dtype == np.uint32
    shards = [sign(texts[start : start + 7]) for start in range(0, 60, 7)]
    np.testing.assert_array_equal(whole, np.concatenate(shards))
    monkeypatch.setattr(near_duplicates, "_CHARACTERS_AT_ONCE", 100)
    np.testing.assert_array_equal(whole, sign(texts))
    assert sign([]).shape == (0, 128)


def test_signatures_are_what_they_were():
    """Stored signatures are compared with new ones, so a change of these numbers is a change of format."""
    found = sign([ENGLISH, CHINESE], num_permutations=4)
    assert found.tolist() == GOLDEN
    assert (sign([ENGLISH], num_permutations=4, seed=7) != found[:1]).all()


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError) as caught:
        sign(["a"])
    assert str(caught.value) == "near-duplicates need rensa; run: pip install 'doremi-mix[filter]'"


# --- bands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_permutations", "similarity"), [(16, 0.5), (30, 0.8)])
@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_bands_have_the_least_weighted_error_of_all(num_permutations, similarity, weight):
    def error(bands, rows):
        false_positives = quad(lambda s: 1 - (1 - s**rows) ** bands, 0, similarity)[0]
        false_negatives = quad(lambda s: (1 - s**rows) ** bands, similarity, 1)[0]
        return (1 - weight) * false_positives + weight * false_negatives

    choices = [(b, r) for r in range(1, num_permutations + 1) for b in range(1, num_permutations // r + 1)]
    chosen = choose_bands(num_permutations, similarity, false_negative_weight=weight)
    assert error(*chosen) <= min(error(*choice) for choice in choices) + 1e-6


def test_pairs_meet_as_often_as_the_formula_says():
    rng = np.random.default_rng(0)
    num_pairs, true = 4000, 0.7
    one = rng.integers(0, 2**32, (num_pairs, 128), dtype=np.uint32)
    is_equal = np.zeros((num_pairs, 128), bool)
    is_equal[:, :90] = True  # exactly at the threshold, so every pair that meets counts
    other = np.where(rng.permuted(is_equal, axis=1), one, rng.integers(0, 2**32, one.shape, dtype=np.uint32))
    found = find_near_duplicates([one, other], priority=[0, 1], similarity=true)
    expected = 1 - (1 - (90 / 128) ** found.rows_per_band) ** found.num_bands
    assert found.lost_to_KK.tolist() == [[0, 0], [found.lost_to_KK[1, 0], 0]]
    assert found.lost_to_KK[1, 0] / num_pairs == pytest.approx(expected, abs=0.03)


# --- survivors, spelled out -----------------------------------------------------------------------------------------


def meeting_rows(rows, found):
    """For each row the buckets that it is in: a band's number and its numbers."""
    width = found.rows_per_band
    return [
        [(band, *row[band * width : (band + 1) * width].tolist()) for band in range(found.num_bands)] for row in rows
    ]


def one_after_the_other(rows, ranked, found, similarity, max_kept):
    """The definition: rows by preference against their leader and the kept rows that they meet."""
    buckets = dict(zip(ranked, meeting_rows([rows[row] for row in ranked], found), strict=True))
    leader = {}
    for row in ranked:  # a walk through everything that can be reached
        reached = [row]
        for current in reached:
            if current not in leader:
                leader[current] = row
                reached += [other for other in ranked if set(buckets[other]) & set(buckets[current])]
    survivor, kept_in = {}, {}
    for row in ranked:
        met = {leader[row]} | {kept for bucket in buckets[row] for kept in kept_in.get(bucket, [])}
        like = [
            kept for kept in ranked if kept in met and kept != row and estimate(rows[row], rows[kept]) >= similarity
        ]
        survivor[row] = like[0] if like else row
        if not like and leader[row] != row:
            for bucket in buckets[row]:
                if len(kept_in.setdefault(bucket, [])) < max_kept:
                    kept_in[bucket].append(row)
    return survivor


@st.composite
def problems(draw):
    """Domains of short signatures of few values, so that rows meet in all ways, with priority, quality and alive."""
    lengths = draw(st.lists(st.integers(0, 8), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_values = draw(st.integers(1, 4))
    domains = [rng.integers(0, num_values, (length, 8), dtype=np.uint32) for length in lengths]
    quality = [rng.choice([0.5, 1.0, np.nan, -np.inf, np.inf], length) for length in lengths]
    alive = [rng.random(length) < 0.8 for length in lengths]
    return domains, {
        "priority": draw(st.permutations(range(len(lengths)))),
        "quality": draw(st.sampled_from([None, quality])),
        "alive": draw(st.sampled_from([None, alive])),
        "similarity": draw(st.sampled_from([0.3, 0.5, 0.75, 1.0])),
        "false_negative_weight": draw(st.sampled_from([0.1, 0.5, 0.9])),
    }


def ranked_rows(domains, options):
    """Global numbers of the rows that take part, most preferred first, sorted by a tuple each."""
    places = {}
    row = 0
    for domain, domain_rows in enumerate(domains):
        for position in range(len(domain_rows)):
            quality = 0.0 if options["quality"] is None else float(options["quality"][domain][position])
            worth = (1, 0.0) if math.isnan(quality) else (0, -quality)
            if options["alive"] is None or options["alive"][domain][position]:
                places[row] = (options["priority"].index(domain), *worth, position)
            row += 1
    return sorted(places, key=places.get)


@given(problems())
@settings(deadline=None, max_examples=150)
def test_survivors_are_those_of_the_definition(problem):
    domains, options = problem
    found = find_near_duplicates(domains, **options)
    ranked = ranked_rows(domains, options)
    expected = one_after_the_other(np.concatenate(domains), ranked, found, options["similarity"], max_kept=64)
    assert survivors(found) == [expected.get(row, row) for row in range(sum(map(len, domains)))]


@pytest.mark.parametrize("max_kept", [64, 2])
@pytest.mark.parametrize("similarity", [0.5, 0.75])
def test_survivors_of_many_rows_that_all_meet(monkeypatch, similarity, max_kept):
    """Long groups: many kept rows in one bucket, many rows of one quality, and the bound on comparisons."""
    monkeypatch.setattr(near_duplicates, "MAX_KEPT_PER_BUCKET", max_kept)
    rng = np.random.default_rng(0)
    domains = [rng.integers(0, 7, (length, 16), dtype=np.uint32) for length in (150, 60)]
    for domain in domains:
        domain[:, :6] = rng.integers(0, 2, (len(domain), 1))
    quality = [rng.choice([0.25, 0.5], len(domain)) for domain in domains]
    options = {"priority": [1, 0], "quality": quality, "alive": None, "similarity": similarity}
    found = find_near_duplicates(domains, **options)
    ranked = ranked_rows(domains, options)
    expected = one_after_the_other(np.concatenate(domains), ranked, found, similarity, max_kept)
    assert survivors(found) == [expected[row] for row in range(210)]
    assert 0 < found.lost_to_KK.sum() < 200


@given(problems())
@settings(deadline=None, max_examples=100)
def test_what_is_promised_of_every_row(problem):
    domains, options = problem
    found = find_near_duplicates(domains, **options)
    rows, survivor = np.concatenate(domains), survivors(found)
    similarity = np.concatenate(found.similarity)
    rank = {row: place for place, row in enumerate(ranked_rows(domains, options))}
    for row, other in enumerate(survivor):
        if other == row:
            assert math.isnan(similarity[row])
            continue
        assert survivor[other] == other  # the survivor is kept,
        assert rank[other] < rank[row]  # preferred,
        assert similarity[row] == estimate(rows[row], rows[other]) >= options["similarity"]  # and like the row
    buckets = meeting_rows(rows, found)
    for row, other in combinations([row for row in rank if survivor[row] == row], 2):
        if set(buckets[row]) & set(buckets[other]):
            assert estimate(rows[row], rows[other]) < options["similarity"]
    # Rows in = rows kept + rows lost, by domain and by pair of domains.
    domain_of = np.repeat(np.arange(len(domains)), [len(domain) for domain in domains])
    expected = np.zeros_like(found.lost_to_KK)
    for row, other in enumerate(survivor):
        expected[domain_of[row], domain_of[other]] += other != row
    assert found.lost_to_KK.tolist() == expected.tolist()


@given(problems())
@settings(deadline=None, max_examples=50)
def test_clusters_are_the_survivors_with_what_they_took(problem):
    domains, options = problem
    found = find_near_duplicates(domains, **options)
    survivor = survivors(found)
    taking = sorted({other for row, other in enumerate(survivor) if other != row})
    expected = [taking.index(other) if other in taking else -1 for other in survivor]
    assert np.concatenate(found.cluster_of).tolist() == expected
    assert found.num_clusters == len(taking)


def test_the_work_in_parts_changes_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    domains = [rng.integers(0, 3, (200, 8), dtype=np.uint32), rng.integers(0, 3, (100, 8), dtype=np.uint32)]
    whole = find_near_duplicates(domains, priority=[1, 0], similarity=0.75)
    monkeypatch.setattr(near_duplicates, "_ROWS_AT_ONCE", 7)
    assert survivors(find_near_duplicates(domains, priority=[1, 0], similarity=0.75)) == survivors(whole)
    assert 0 < whole.lost_to_KK.sum() < 300


# --- planted texts --------------------------------------------------------------------------------------------------


def test_planted_near_duplicates_are_found_in_two_scripts_and_nothing_else():
    rng = np.random.default_rng(3)
    strangers = [random_text(rng, 150, "abcdefghijklmnopqrstuvwxyz     ") for _ in range(40)]
    strangers += [random_text(rng, 80, "江河湖海溪泉雨雪冰云山石土木花草鸟兽虫鱼金银铜铁") for _ in range(40)]
    near = [ENGLISH.replace("gas:", "gas ."), CHINESE.replace("森林和草原", "森林与草地")]
    assert [round(jaccard(*pair), 2) for pair in zip(near, [ENGLISH, CHINESE], strict=True)] == [0.95, 0.92]
    found = find_near_duplicates(
        [sign([*strangers, ENGLISH, CHINESE]), sign([strangers[0].upper(), *near])], priority=[0, 1]
    )
    assert found.survivor_of[0].tolist() == list(range(82))
    assert found.survivor_of[1].tolist() == [0, 80, 81]
    assert found.lost_to_KK.tolist() == [[0, 0], [3, 0]]
    assert found.similarity[1].dtype == np.float32
    for similarity, pair in zip(found.similarity[1][1:], [(near[0], ENGLISH), (near[1], CHINESE)], strict=True):
        assert abs(similarity - jaccard(*pair)) <= 4 * math.sqrt(jaccard(*pair) * (1 - jaccard(*pair)) / 128)


def test_one_text_under_two_thresholds():
    other = CHINESE.replace("光合作用", "日光合成").replace("植物、藻类", "花草树木")
    assert 0.6 < jaccard(CHINESE, other) < 0.7
    signed = [sign([CHINESE, other])]
    assert find_near_duplicates(signed, priority=[0], similarity=0.9).num_clusters == 0
    assert find_near_duplicates(signed, priority=[0], similarity=0.4).num_clusters == 1


def test_priority_then_quality_then_position_decide():
    signed = [sign([ENGLISH] * 3), sign([ENGLISH] * 2)]
    quality = [np.array([np.nan, 1.0, 1.0]), np.array([0.0, 9.0])]

    def survivor(**options):
        (row,) = set(survivors(find_near_duplicates(signed, **options)))
        return row

    assert survivor(priority=[0, 1]) == 0
    assert survivor(priority=[1, 0]) == 3
    assert survivor(priority=[0, 1], quality=quality) == 1
    assert survivor(priority=[1, 0], quality=quality) == 4


def test_rows_that_take_no_part_neither_lose_nor_win():
    alive = [np.array([False, True, True, False])]
    found = find_near_duplicates([sign([ENGLISH] * 4)], priority=[0], alive=alive)
    assert found.survivor_of[0].tolist() == [0, 1, 1, 3]
    assert found.cluster_of[0].tolist() == [-1, 0, 0, -1]


def test_a_chain_loses_its_middle_and_keeps_its_ends():
    """A is like B and B like C, but A is not like C."""
    base = np.arange(128, dtype=np.uint32)
    a, b, c = base.copy(), base.copy(), base.copy()
    a[:26], c[102:] = 1000, 2000
    rows = np.stack([a, b, c])
    assert [estimate(a, b), estimate(b, c), estimate(a, c)] == [102 / 128, 102 / 128, 76 / 128]
    assert find_near_duplicates([rows], priority=[0]).survivor_of[0].tolist() == [0, 0, 2]
    by_quality = find_near_duplicates([rows], priority=[0], quality=[np.array([0.0, 1.0, 0.0])])
    assert by_quality.survivor_of[0].tolist() == [1, 1, 1]


def test_the_threshold_itself_counts_as_like():
    rows = np.zeros((2, 100), np.uint32)
    rows[1, 55:] = 1
    assert find_near_duplicates([rows], priority=[0], similarity=0.55).survivor_of[0].tolist() == [0, 0]
    assert find_near_duplicates([rows], priority=[0], similarity=0.56).survivor_of[0].tolist() == [0, 1]


def test_nothing_at_all():
    found = find_near_duplicates([np.zeros((0, 128), np.uint32)] * 2, priority=[1, 0])
    assert found.num_clusters == 0
    assert [len(domain) for domain in found.survivor_of] == [0, 0]


# --- errors ---------------------------------------------------------------------------------------------------------

TWO_ROWS = np.zeros((2, 16), np.uint32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sign(["a"], shingle_size=0), "must be at least 1: num_permutations=128, shingle_size=0"),
        (lambda: sign(["a", None]), "texts must not be null, got 1 nulls in 2 texts"),
        (
            lambda: choose_bands(128, 1.5),
            "out of range: num_permutations=128, similarity=1.5, false_negative_weight=0.5",
        ),
        (
            lambda: find_near_duplicates([TWO_ROWS, np.zeros((2, 8), np.uint32)], priority=[0, 1]),
            "signatures must have shape [N, P] with one P in all domains, got [[2, 16], [2, 8]]",
        ),
        (
            lambda: find_near_duplicates([], priority=[]),
            "signatures must have shape [N, P] with one P in all domains, got []",
        ),
        (
            lambda: find_near_duplicates([TWO_ROWS], priority=[1]),
            "priority must be a permutation of the 1 domain ids, got [1]",
        ),
        (
            lambda: find_near_duplicates([TWO_ROWS], priority=[0], quality=[np.zeros(3)]),
            "quality must have one value for each row, [2], got [3]",
        ),
        (
            lambda: find_near_duplicates([TWO_ROWS], priority=[0], alive=[]),
            "alive must have one value for each row, [2], got []",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the whole message is compared
        call()
    assert str(caught.value) == message

"""Rows that say nearly the same: MinHash signatures of character shingles, and which row of each group survives.

Axes: N rows, P permutations, K domains.  Global row numbers are those of ``exact_duplicates``.

A text is the set of its character *shingles*: all runs of 5 characters, in any script.  The similarity of two texts is
the Jaccard similarity of their sets: shared shingles over all shingles.  A *signature* holds P numbers; two signatures
agree in each with a probability equal to the similarity J, so the share of equal numbers estimates it, with a standard
error of at most sqrt(J * (1 - J) / P).  To compare all pairs would be quadratic.  A signature is therefore cut into
*bands* of r numbers; rows that agree in all numbers of a band *meet* in one bucket, and only such are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from doremi_mix.errors import ConfigError
from doremi_mix.filters.exact_duplicates import (
    check_priority,
    count_lost,
    domains_of_rows,
    normalize_spaces,
    row_offsets,
    split_by_domain,
)

if TYPE_CHECKING:
    import pyarrow as pa

MAX_KEPT_PER_BUCKET = 64
"""A row is compared with this many kept rows of each of its buckets, so that work is linear in the rows."""

# Fills a text that is shorter than a shingle.  Unicode promises that it is no character.
_FILLER = "\U0010ffff"
_CHARACTERS_AT_ONCE = 1 << 22
_ROWS_AT_ONCE = 1 << 16
# Odd, and without structure: an accident of two shingles with one hash is as rare as for random numbers.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIXER = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True, eq=False)
class NearDuplicates:
    """Which row stands for each row, how like it that is, and who lost to whom.

    Attributes:
        survivor_of: per domain, the global number of the row that survives for each row, int64 [N]; a row that survives
            or takes no part has its own number.
        cluster_of: per domain, the cluster of each row, int64 [N]; -1 where it is alone.  A cluster is a survivor and
            the rows lost to it; clusters are numbered in the order of their survivors.
        similarity: per domain, the estimated similarity of each lost row to its survivor, float32 [N]; NaN elsewhere.
        lost_to_KK: how many rows of domain i are lost to a survivor in domain j, int64.
        num_clusters: how many survivors have lost rows.
        num_bands: how many bands the signatures were cut into.
        rows_per_band: r, how many numbers of a signature make a band.
    """

    survivor_of: tuple[NDArray[np.int64], ...]
    cluster_of: tuple[NDArray[np.int64], ...]
    similarity: tuple[NDArray[np.float32], ...]
    lost_to_KK: NDArray[np.int64]
    num_clusters: int
    num_bands: int
    rows_per_band: int


class _Meetings(NamedTuple):
    """Which rows meet: one entry for each row in each bucket of at least two, sorted by bucket, then rank."""

    ranks: NDArray[np.int32]
    buckets: NDArray[np.int32]


class _Lost(NamedTuple):
    ranks: NDArray[np.int64]
    survivors: NDArray[np.int64]
    num_matches: NDArray[np.int64]


_Take = Callable[[NDArray[np.int64]], NDArray[np.uint32]]


def signatures(
    texts: pa.Array, *, num_permutations: int = 128, shingle_size: int = 5, seed: int = 42
) -> NDArray[np.uint32]:
    """Returns the MinHash signature of each text's character shingles.

    A text is normalized first as ``normalize_spaces`` does.  A text shorter than a shingle is one shingle, and so is an
    empty one.  A signature depends on its text and on these settings alone.

    Args:
        texts: strings, without nulls.
        num_permutations: P, the numbers in a signature.
        shingle_size: characters in a shingle.
        seed: of the hash functions; only signatures of one seed can be compared.

    Returns:
        uint32 [N, P].

    Raises:
        ConfigError: rensa is not installed.
        ValueError: a text is null, or a number is below 1.
    """
    if min(num_permutations, shingle_size) < 1:
        raise ValueError(f"must be at least 1: {num_permutations=}, {shingle_size=}")
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise ConfigError("near-duplicates need rensa; run: pip install 'doremi-mix[filter]'") from error
    result = np.empty((len(texts), num_permutations), np.uint32)
    for start, part in _parts(normalize_spaces(texts)):
        hashes, offsets = _hash_shingles(part, shingle_size)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, num_permutations, seed)
        result[start : start + len(part)] = matrix.to_rows()
    return result


def _parts(texts: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Cuts texts into parts of bounded memory; gives the start of each and its texts."""
    if not texts:
        return
    characters = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    borders = [0, *(np.flatnonzero(np.diff(characters // _CHARACTERS_AT_ONCE)) + 1).tolist(), len(texts)]
    for start, end in pairwise(borders):
        yield start, texts[start:end]


def _hash_shingles(texts: list[str], shingle_size: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Returns the hashes of all shingles of all texts, flat, and where each text's begin and end, [N + 1]."""
    filled = [text if len(text) >= shingle_size else text.ljust(shingle_size, _FILLER) for text in texts]
    num_shingles = np.fromiter(map(len, filled), np.int64, len(filled)) - shingle_size + 1
    points = np.frombuffer("".join(filled).encode("utf-32-le"), np.dtype("<u4"))
    num_windows = len(points) - shingle_size + 1
    hashes = points[:num_windows].astype(np.uint64)
    for place in range(1, shingle_size):
        hashes *= _BASE
        hashes += points[place : num_windows + place]
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MIXER
    hashes ^= hashes >> np.uint64(32)
    # Windows that begin in one text and end in the next are none.
    is_inside = np.ones(len(points), np.bool_)
    ends = np.cumsum(num_shingles + shingle_size - 1)
    for place in range(1, shingle_size):
        is_inside[ends - place] = False
    offsets = np.concatenate([[0], np.cumsum(num_shingles)]).astype(np.uint64)
    return hashes[is_inside[:num_windows]], offsets


def choose_bands(num_permutations: int, similarity: float, *, false_negative_weight: float = 0.5) -> tuple[int, int]:
    """Chooses how to cut signatures into bands so that rows above a similarity meet and others do not.

    Two rows of similarity s meet in at least one of b bands of r numbers with probability 1 - (1 - s^r)^b.  Of all b
    and r with b * r at most P, this minimizes::

        (1 - w) * integral from 0 to t of 1 - (1 - s^r)^b  +  w * integral from t to 1 of (1 - s^r)^b

    Args:
        num_permutations: P.
        similarity: t, in (0, 1].
        false_negative_weight: w, in [0, 1].  Rows that meet are compared by their signatures, so a false positive costs
            time and a false negative a duplicate.

    Returns:
        The number of bands b, and the numbers in each, r.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> choose_bands(128, 0.7), choose_bands(128, 0.7, false_negative_weight=0.9)
        ((14, 9), (20, 6))

    Reference:
        Chapter 3 of Leskovec, Rajaraman and Ullman, Mining of Massive Datasets.
    """
    if num_permutations < 1 or not 0 < similarity <= 1 or not 0 <= false_negative_weight <= 1:
        raise ValueError(f"out of range: {num_permutations=}, {similarity=}, {false_negative_weight=}")
    # Midpoints of 1,000 intervals below the threshold and 1,000 above.
    midpoints = (np.arange(1000) + 0.5) / 1000
    below, above = midpoints * similarity, similarity + midpoints * (1 - similarity)
    best = (math.inf, 1, 1)
    for rows_per_band in range(1, num_permutations + 1):
        bands = np.arange(1, num_permutations // rows_per_band + 1)[:, None]
        false_positives = similarity * (1 - (1 - below**rows_per_band) ** bands).mean(axis=1)
        false_negatives = (1 - similarity) * ((1 - above**rows_per_band) ** bands).mean(axis=1)
        errors = (1 - false_negative_weight) * false_positives + false_negative_weight * false_negatives
        best = min(best, (float(errors.min()), int(errors.argmin()) + 1, rows_per_band))
    return best[1], best[2]


def find_near_duplicates(
    signatures_by_domain: Sequence[NDArray[np.uint32]],
    *,
    priority: Sequence[int],
    similarity: float = 0.7,
    alive: Sequence[NDArray[np.bool_]] | None = None,
    quality: Sequence[NDArray[np.floating]] | None = None,
    false_negative_weight: float = 0.9,
) -> NearDuplicates:
    """Chooses which rows survive so that no row is like one that survives.

    Rows are taken from the most to the least preferred: by the priority of their domain, then by quality, then by
    position.  Each is compared with the kept rows that it meets, and with the most preferred row of all that it meets
    directly or through others.  It is lost to the most preferred of these that is at least ``similarity`` like it, and
    kept if there is none.  Therefore:

    - every lost row has a survivor that is kept, is preferred to it and is at least ``similarity`` like it: where A is
      like B and B like C but A is not like C, losing B to A does not lose C;
    - no two kept rows that meet are ``similarity`` like each other, except in a bucket where ``MAX_KEPT_PER_BUCKET``
      rows are preferred to both and kept;
    - all likeness is that of the signatures, an estimate, and rows meet with the probability given at ``choose_bands``;
    - nothing depends on how rows were divided for computing signatures.

    Memory beyond the signatures is at most about 1 GB for a million rows: 8 bytes for each row and band in which it
    meets another, as much again while these are linked, and a copy of the signatures of rows that are not like the most
    preferred row they meet.

    Args:
        signatures_by_domain: per domain, from ``signatures``; [N, P].
        priority: all domain ids, most preferred first.
        similarity: from which on a row counts as a duplicate, in (0, 1].
        alive: per domain, which rows take part, [N]; all by default.
        quality: per domain, a number that is higher for better rows, [N]; NaN is worst.
        false_negative_weight: see ``choose_bands``.

    Returns:
        The survivors and the clusters.

    Raises:
        ValueError: shapes disagree, the priority is no permutation, or a number is out of its range.
    """
    num_permutations = _check_shapes(signatures_by_domain, alive, quality)
    check_priority(priority, len(signatures_by_domain))
    num_bands, rows_per_band = choose_bands(num_permutations, similarity, false_negative_weight=false_negative_weight)
    # 0.55 of 100 is 55 matches, though the product of floats is a little more.
    min_matches = math.ceil(similarity * num_permutations - 1e-9)
    offsets_K = row_offsets([len(domain) for domain in signatures_by_domain])
    # From here a row is named by its rank: how many rows are preferred to it.
    rows_by_rank = _rank_rows(offsets_K, priority, alive, quality)
    meetings = _meet(signatures_by_domain, rows_by_rank, num_bands, rows_per_band)

    def take(ranks: NDArray[np.int64]) -> NDArray[np.uint32]:
        return _take_signatures(signatures_by_domain, offsets_K, rows_by_rank[ranks])

    to_leaders, undecided = _lose_to_leaders(take, meetings, len(rows_by_rank), min_matches)
    to_others = _lose_one_by_one(take, meetings, undecided, min_matches)
    survivor_N, similarity_N = np.arange(offsets_K[-1]), np.full(offsets_K[-1], np.nan, np.float32)
    for ranks, survivors, num_matches in (to_leaders, to_others):
        survivor_N[rows_by_rank[ranks]] = rows_by_rank[survivors]
        similarity_N[rows_by_rank[ranks]] = num_matches / num_permutations
    cluster_N, num_clusters = _number_clusters(survivor_N)
    return NearDuplicates(
        survivor_of=split_by_domain(survivor_N, offsets_K),
        cluster_of=split_by_domain(cluster_N, offsets_K),
        similarity=split_by_domain(similarity_N, offsets_K),
        lost_to_KK=count_lost(survivor_N, offsets_K),
        num_clusters=num_clusters,
        num_bands=num_bands,
        rows_per_band=rows_per_band,
    )


def _check_shapes(
    signatures_by_domain: Sequence[NDArray[np.uint32]],
    alive: Sequence[NDArray[np.bool_]] | None,
    quality: Sequence[NDArray[np.floating]] | None,
) -> int:
    """Returns P."""
    widths = {domain.shape[1] for domain in signatures_by_domain if domain.ndim == 2}
    if len(widths) != 1 or any(domain.ndim != 2 for domain in signatures_by_domain):
        shapes = [list(domain.shape) for domain in signatures_by_domain]
        raise ValueError(f"signatures must have shape [N, P] with one P in all domains, got {shapes}")
    expected = [len(domain) for domain in signatures_by_domain]
    for name, arrays in (("alive", alive), ("quality", quality)):
        got = expected if arrays is None else [len(array) for array in arrays]
        if got != expected:
            raise ValueError(f"{name} must have one value for each row, {expected}, got {got}")
    return int(widths.pop())


def _rank_rows(
    offsets_K: NDArray[np.int64],
    priority: Sequence[int],
    alive: Sequence[NDArray[np.bool_]] | None,
    quality: Sequence[NDArray[np.floating]] | None,
) -> NDArray[np.int64]:
    """Returns the global numbers of the rows that take part, most preferred first."""
    ranked = []
    for domain in priority:
        positions = np.arange(offsets_K[domain + 1] - offsets_K[domain])
        if quality is not None:
            worth = np.asarray(quality[domain], np.float64)
            # NaN sorts last, after the -inf whose negative is inf; equal ones stay in the order of positions.
            positions = np.argsort(-worth, kind="stable")
        if alive is not None:
            positions = positions[np.asarray(alive[domain], np.bool_)[positions]]
        ranked.append(positions + offsets_K[domain])
    return np.concatenate(ranked)


def _meet(
    signatures_by_domain: Sequence[NDArray[np.uint32]],
    rows_by_rank: NDArray[np.int64],
    num_bands: int,
    rows_per_band: int,
) -> _Meetings:
    ranks, buckets, num_buckets = [], [], 0
    for band in range(num_bands):
        columns = slice(band * rows_per_band, (band + 1) * rows_per_band)
        hashes = np.concatenate([_hash_band(domain, columns) for domain in signatures_by_domain])[rows_by_rank]
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        is_first = np.ones(len(hashes) + 1, np.bool_)  # with one place beyond the end
        is_first[1:-1] = hashes[1:] != hashes[:-1]
        has_company = ~(is_first[:-1] & is_first[1:])
        numbers = np.cumsum(is_first[:-1][has_company]) + (num_buckets - 1)
        ranks.append(order[has_company].astype(np.int32))
        buckets.append(numbers.astype(np.int32))
        num_buckets = int(numbers[-1]) + 1 if len(numbers) else num_buckets
    return _Meetings(np.concatenate(ranks), np.concatenate(buckets))


def _hash_band(signatures_NP: NDArray[np.uint32], columns: slice) -> NDArray[np.uint64]:
    hashes = np.zeros(len(signatures_NP), np.uint64)
    for column in range(columns.start, columns.stop):
        hashes += signatures_NP[:, column]
        hashes *= _BASE
        hashes ^= hashes >> np.uint64(32)
    return hashes


def _take_signatures(
    signatures_by_domain: Sequence[NDArray[np.uint32]], offsets_K: NDArray[np.int64], rows: NDArray[np.int64]
) -> NDArray[np.uint32]:
    taken = np.empty((len(rows), signatures_by_domain[0].shape[1]), np.uint32)
    domains = domains_of_rows(rows, offsets_K)
    for domain in np.unique(domains):
        places = np.flatnonzero(domains == domain)
        taken[places] = signatures_by_domain[domain][rows[places] - offsets_K[domain]]
    return taken


def _lose_to_leaders(
    take: _Take, meetings: _Meetings, num_rows: int, min_matches: int
) -> tuple[_Lost, NDArray[np.bool_]]:
    """Compares each row with its leader, the most preferred of all rows that it meets directly or through others.

    A leader is kept, because nothing that is preferred to it meets it.  Also returns which ranks are undecided: neither
    a leader nor like it.
    """
    leaders = _find_leaders(meetings, num_rows)
    ranks = np.flatnonzero(leaders != np.arange(num_rows))
    num_matches = np.empty(len(ranks), np.int64)
    for start in range(0, len(ranks), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        num_matches[part] = (take(ranks[part]) == take(leaders[ranks[part]])).sum(axis=1)
    is_like = num_matches >= min_matches
    undecided = np.zeros(num_rows, np.bool_)
    undecided[ranks[~is_like]] = True
    return _Lost(ranks[is_like], leaders[ranks[is_like]], num_matches[is_like]), undecided


def _find_leaders(meetings: _Meetings, num_rows: int) -> NDArray[np.int64]:
    """Returns the lowest rank of the connected rows of each row; its own for rows that meet none."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    ranks, buckets = meetings
    leaders = np.arange(num_rows)
    members = np.flatnonzero(np.bincount(ranks, minlength=num_rows))
    if not len(members):
        return leaders
    places = np.searchsorted(members, ranks)
    # To reach all of a bucket, it is enough to link each row to the first.
    firsts = places[np.flatnonzero(np.diff(buckets, prepend=-1))]
    links = csr_matrix((np.ones(len(ranks), np.bool_), (places, firsts[buckets])), shape=(len(members),) * 2)
    _, groups = connected_components(links, directed=False)
    # Members are in the order of ranks, so the first of a group is its leader.
    _, first_places = np.unique(groups, return_index=True)
    leaders[members] = members[first_places[groups]]
    return leaders


def _lose_one_by_one(take: _Take, meetings: _Meetings, undecided: NDArray[np.bool_], min_matches: int) -> _Lost:
    """Goes through the undecided rows by rank, and compares each with the kept ones that it meets."""
    ranks, buckets = meetings
    is_wanted = undecided[ranks]
    # A bucket of which one row is undecided has nothing left to compare.
    is_wanted &= np.bincount(buckets[is_wanted], minlength=int(buckets.max(initial=0)) + 1)[buckets] > 1
    order = np.argsort(ranks[is_wanted], kind="stable")
    ranks, buckets = ranks[is_wanted][order], buckets[is_wanted][order]
    rows, starts = np.unique(ranks.astype(np.int64), return_index=True)
    signatures_NP = take(rows)
    kept_in: dict[int, list[int]] = {}
    lost: list[tuple[int, int, int]] = []
    for row, (start, end) in enumerate(pairwise([*starts.tolist(), len(ranks)])):
        row_buckets = buckets[start:end].tolist()
        met = sorted({kept for bucket in row_buckets for kept in kept_in.get(bucket, ())})
        if met:
            num_matches = (signatures_NP[met] == signatures_NP[row]).sum(axis=1)
            preferred = int((num_matches >= min_matches).argmax())
            if num_matches[preferred] >= min_matches:
                lost.append((row, met[preferred], int(num_matches[preferred])))
                continue
        for bucket in row_buckets:
            kept_rows = kept_in.setdefault(bucket, [])
            if len(kept_rows) < MAX_KEPT_PER_BUCKET:
                kept_rows.append(row)
    lost_rows, survivors, lost_matches = np.array(lost, np.int64).reshape(-1, 3).T
    return _Lost(rows[lost_rows], rows[survivors], lost_matches)


def _number_clusters(survivor_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    cluster_N = np.full(len(survivor_N), -1, np.int64)
    lost = np.flatnonzero(survivor_N != np.arange(len(survivor_N)))
    survivors, cluster_of_lost = np.unique(survivor_N[lost], return_inverse=True)
    cluster_N[lost] = cluster_of_lost
    cluster_N[survivors] = np.arange(len(survivors))
    return cluster_N, len(survivors)

"""Rows that say the same: a 128-bit key for each text, and which row of each key survives.

Axes: N rows, K domains.  A *global row number* is the position of a row in its domain plus the number of rows in the
domains before it, in the order of domain ids.  A key depends on its text alone, and everything else on the keys alone,
so rows may be hashed in any shards and on any machines.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

_Scalar = TypeVar("_Scalar", bound=np.generic)
Normalization = Literal["text", "spaces", "characters"]

# UTF-8 spells every other character without these bytes, so they can be deleted from it unseen.
_ASCII_NON_CHARACTERS = (string.whitespace + string.digits + string.punctuation).encode()
_WIDE_NON_CHARACTERS = re.compile(r"[^\S\x00-\x7f]+|[^\D\x00-\x7f]+")


@dataclass(frozen=True, eq=False)
class ExactDuplicates:
    """Which row stands for each row.

    Attributes:
        survivor_of: per domain, the global number of the row that survives for each row, int64 [N]; a surviving row has
            its own number.
        lost_to_KK: how many rows of domain i are lost to a survivor in domain j, int64.
    """

    survivor_of: tuple[NDArray[np.int64], ...]
    lost_to_KK: NDArray[np.int64]


def text_keys(texts: pa.Array, normalize: Normalization = "spaces") -> NDArray[np.uint64]:
    """Returns the MD5 digest of each normalized text.

    ======================  ===========================================================================================
    ``text``                the text without the whitespace at its ends.  What Data-Juicer's ``document_deduplicator``
                            hashes by default
    ``spaces``              see ``normalize_spaces``: case, width and spacing make no difference
    ``characters``          lower case, without whitespace, decimal digits and ASCII punctuation.  What Data-Juicer
                            hashes with ``lowercase: true, ignore_non_character: true``.  Other punctuation stays,
                            and texts that differ in their numbers alone count as the same
    ======================  ===========================================================================================

    Args:
        texts: strings, without nulls.
        normalize: what is taken out of a text before it is hashed.

    Returns:
        The digests as two big-endian halves, uint64 [N, 2].

    Raises:
        ValueError: a text is null, or ``normalize`` is unknown.

    Example:
        >>> import pyarrow as pa
        >>> keys = text_keys(pa.array(["Good  day", "good day", "Good-day"]))
        >>> (keys[0] == keys[1]).all().item(), (keys[0] == keys[2]).all().item()
        (True, False)
    """
    if normalize not in _NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(_NORMALIZE)}, got {normalize!r}")
    digests = (hashlib.md5(text, usedforsecurity=False).digest() for text in _NORMALIZE[normalize](texts))
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)


def normalize_spaces(texts: pa.Array) -> list[str]:
    """Returns texts in Unicode NFKC and folded case, with one space for every run of whitespace and none at the ends.

    Example:
        >>> import pyarrow as pa
        >>> normalize_spaces(pa.array(["  ＡＢＣ　 Straße "]))
        ['abc strasse']
    """
    import pyarrow.compute as pc

    return [" ".join(text.casefold().split()) for text in _strings(pc.utf8_normalize(texts, form="NFKC"))]


def _strings(texts: pa.Array) -> list[str]:
    if texts.null_count:
        raise ValueError(f"texts must not be null, got {texts.null_count} nulls in {len(texts)} texts")
    strings: list[str] = texts.to_pylist()
    return strings


def _only_characters(texts: pa.Array) -> Iterator[bytes]:
    for text in _strings(texts):
        lowered = text.lower()
        if not lowered.isascii():
            lowered = _WIDE_NON_CHARACTERS.sub("", lowered)
        yield lowered.encode().translate(None, _ASCII_NON_CHARACTERS)


_NORMALIZE: dict[str, Callable[[pa.Array], Iterator[bytes]]] = {
    "text": lambda texts: (text.strip().encode() for text in _strings(texts)),
    "spaces": lambda texts: (text.encode() for text in normalize_spaces(texts)),
    "characters": _only_characters,
}


def find_exact_duplicates(
    keys: Sequence[NDArray[np.uint64]], priority: Sequence[int], *, num_buckets: int = 1
) -> ExactDuplicates:
    """Chooses one surviving row for each key: of the most preferred domain that has it, the first.

    Args:
        keys: per domain, the keys of its rows, uint64 [N, 2]; memory-mapped arrays are read bucket by bucket.
        priority: all domain ids, most preferred first.
        num_buckets: sort this many ranges of keys one after the other.  Memory beyond the result falls with it, the
            keys are read once for each, and the result is the same.  One bucket takes about 60 bytes a row.

    Returns:
        The survivors.  Rows kept and rows lost add up to the rows of every domain.

    Raises:
        ValueError: the keys have another shape or type, the priority is no permutation, or there is no domain or
            bucket.

    Example:
        >>> a, b = np.array([[0, 7], [0, 8], [0, 7]], np.uint64), np.array([[0, 8], [0, 9]], np.uint64)
        >>> found = find_exact_duplicates([a, b], priority=[1, 0])
        >>> [survivors.tolist() for survivors in found.survivor_of], found.lost_to_KK.tolist()
        ([[0, 3, 0], [3, 4]], [[1, 1], [0, 0]])
    """
    _check_keys(keys, num_buckets)
    check_priority(priority, len(keys))
    offsets_K = row_offsets([len(domain_keys) for domain_keys in keys])
    survivor_N = np.arange(offsets_K[-1])
    for bucket in range(num_buckets):
        # Rows enter most preferred first and the sort is stable, so the first of each group is its survivor.
        rows, rows_keys = _take_bucket(keys, priority, offsets_K, bucket, num_buckets)
        order, is_first = _group_by_key(rows_keys)
        ordered_rows = rows[order]
        survivor_N[ordered_rows] = ordered_rows[is_first][np.cumsum(is_first) - 1]
    return ExactDuplicates(split_by_domain(survivor_N, offsets_K), count_lost(survivor_N, offsets_K))


def overlap_matrix(keys: Sequence[NDArray[np.uint64]], *, num_buckets: int = 1) -> NDArray[np.int64]:
    """Counts the distinct keys that each two domains share.

    Args:
        keys: per domain, the keys of its rows, uint64 [N, 2].
        num_buckets: as in ``find_exact_duplicates``.

    Returns:
        int64 [K, K]: off the diagonal, the number of distinct keys that both domains have; on it, the number of
        distinct keys of the domain.

    Raises:
        ValueError: the keys have another shape or type, or there is no domain or bucket.

    Example:
        >>> a, b = np.array([[0, 7], [0, 8], [0, 7]], np.uint64), np.array([[0, 8], [0, 9]], np.uint64)
        >>> overlap_matrix([a, b]).tolist()
        [[2, 1], [1, 2]]
    """
    from scipy.sparse import csr_matrix

    _check_keys(keys, num_buckets)
    offsets_K = row_offsets([len(domain_keys) for domain_keys in keys])
    overlap_KK = np.zeros((len(keys), len(keys)), np.int64)
    for bucket in range(num_buckets):
        rows, rows_keys = _take_bucket(keys, range(len(keys)), offsets_K, bucket, num_buckets)
        order, is_first = _group_by_key(rows_keys)
        domains = domains_of_rows(rows[order], offsets_K)
        starts = np.append(np.flatnonzero(is_first), len(order))
        # One matrix row for each distinct key.  Duplicates inside a domain are summed, then counted once.
        has_key = csr_matrix((np.ones(len(order), np.int64), domains, starts), shape=(len(starts) - 1, len(keys)))
        has_key.sum_duplicates()
        has_key.data[:] = 1
        overlap_KK += (has_key.T @ has_key).toarray()
    return overlap_KK


def check_priority(priority: Sequence[int], num_domains: int) -> None:
    """Raises a ValueError unless the priority names every domain id once."""
    if sorted(priority) != list(range(num_domains)):
        raise ValueError(f"priority must be a permutation of the {num_domains} domain ids, got {list(priority)}")


def row_offsets(num_rows: Sequence[int]) -> NDArray[np.int64]:
    """Returns the global number of each domain's first row, and the number of all rows, int64 [K + 1]."""
    return np.concatenate([[0], np.cumsum(num_rows, dtype=np.int64)]).astype(np.int64)


def domains_of_rows(rows: NDArray[np.int64], offsets_K: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the domain id of each global row number."""
    return np.searchsorted(offsets_K, rows, side="right") - 1


def split_by_domain(values_N: NDArray[_Scalar], offsets_K: NDArray[np.int64]) -> tuple[NDArray[_Scalar], ...]:
    """Cuts an array over all rows into one array for each domain; they share its memory."""
    return tuple(np.split(values_N, offsets_K[1:-1]))


def count_lost(survivor_N: NDArray[np.int64], offsets_K: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts the rows of domain i whose survivor is another row, in domain j: int64 [K, K]."""
    num_domains = len(offsets_K) - 1
    lost = np.flatnonzero(survivor_N != np.arange(len(survivor_N)))
    pairs = domains_of_rows(lost, offsets_K) * num_domains + domains_of_rows(survivor_N[lost], offsets_K)
    return np.bincount(pairs, minlength=num_domains**2).reshape(num_domains, num_domains)


def _check_keys(keys: Sequence[NDArray[np.uint64]], num_buckets: int) -> None:
    for domain, domain_keys in enumerate(keys):
        if domain_keys.dtype != np.uint64 or domain_keys.ndim != 2 or domain_keys.shape[1] != 2:
            got = f"{domain_keys.dtype} {list(domain_keys.shape)}"
            raise ValueError(f"keys of domain {domain} must be uint64 [N, 2], got {got}")
    if not keys or num_buckets < 1:
        raise ValueError(f"there must be a domain and a bucket, got {len(keys)} domains and {num_buckets=}")


def _take_bucket(
    keys: Sequence[NDArray[np.uint64]],
    domains: Sequence[int],
    offsets_K: NDArray[np.int64],
    bucket: int,
    num_buckets: int,
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Returns the global row numbers and keys whose top bits fall into a bucket, domain after domain as given."""
    if num_buckets == 1:
        rows = [np.arange(offsets_K[domain], offsets_K[domain + 1]) for domain in domains]
        return np.concatenate(rows), np.concatenate([keys[domain] for domain in domains])
    rows, rows_keys = [], []
    for domain in domains:
        # The top 32 bits, scaled to bucket numbers; the product fits in 64 bits.
        buckets = ((keys[domain][:, 0] >> np.uint64(32)) * np.uint64(num_buckets)) >> np.uint64(32)
        positions = np.flatnonzero(buckets == bucket)
        rows.append(positions + offsets_K[domain])
        rows_keys.append(keys[domain][positions])
    return np.concatenate(rows), np.concatenate(rows_keys)


def _group_by_key(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Returns the stable order that sorts keys, and whether each in that order starts a group of equal keys."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    is_first = np.ones(len(keys), np.bool_)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order, is_first

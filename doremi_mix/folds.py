"""Cross-fitting: each sequence is scored by a reference model that never trained on it.

A reference that has passed over few rows again and again knows them by heart.  Its losses on them say nothing about
what can be learned, and what the proxy still lacks looks like a gain to be had.  So each domain's sequences are split
into folds, one reference is trained for each fold, on all the others, and scores its own.

Sequences hold whole examples, so an example is in one fold.  Folds count from 0 here, their folders from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def choose_folds(wanted: int | None, epochs: Mapping[str, float], num_sequences: Mapping[str, int]) -> tuple[int, str]:
    """Returns the number of folds, and why, for the user.

    Args:
        wanted: a number that was given; None to choose: 2 where one reference would pass over a domain more than once,
            else 1.
        epochs: how often one reference would pass over each domain.
        num_sequences: training sequences of each domain.

    Example:
        >>> choose_folds(None, {"a": 0.5, "b": 2.25}, {"a": 90, "b": 20})
        (2, 'one reference would pass 2.25 times over b')
    """
    if wanted is not None:
        return wanted, f"reference.folds is {wanted}"
    if max(num_sequences.values()) < 2:
        return 1, "no domain has two sequences"
    most = max(epochs, key=epochs.__getitem__)
    if epochs[most] > 1:
        return 2, f"one reference would pass {epochs[most]:.2f} times over {most}"
    return 1, "the reference passes over no domain more than once"


def fold_ids(num_sequences: int, num_folds: int, seed: int, domain_id: int) -> NDArray[np.int64]:
    """Splits a domain's sequences at random into folds whose sizes differ by one at most.

    Args:
        num_sequences: N, at least the number of folds.
        num_folds: F.
        seed: of the split.
        domain_id: which domain; each has a split of its own.

    Returns:
        The fold of each sequence, from 0 to F - 1, shape [N]: a pure function of the arguments.

    Raises:
        ValueError: there are fewer sequences than folds.

    Example:
        >>> np.bincount(fold_ids(7, 2, seed=0, domain_id=0)).tolist()
        [4, 3]
    """
    if num_sequences < num_folds:
        raise ValueError(f"{num_sequences} sequences cannot be split into {num_folds} folds")
    # The first numbers of a stream tell it from the schedule's.  Which fold gets one more differs by domain.
    rng = np.random.default_rng([seed, 2, domain_id])
    return rng.permutation((np.arange(num_sequences) + domain_id) % num_folds)


def fold_names(num_folds: int) -> tuple[str, ...]:
    """Returns the folder of each fold's reference inside the stage's; a single reference needs none of its own."""
    return tuple(f"fold-{number}" for number in range(1, num_folds + 1)) if num_folds > 1 else ("",)


class Folds:
    """Which reference is trained on which sequences, and which one scores them.

    Attributes:
        num_folds: F.
        unsplit: ids of the domains with fewer sequences than folds.  Every reference trains on them and the first one
            scores them, so their losses are not cross-fitted; without folds (F = 1) there are none.
    """

    def __init__(self, sequence_ids_by_domain: Sequence[NDArray[np.int64]], num_folds: int, seed: int) -> None:
        """Splits every domain.

        Args:
            sequence_ids_by_domain: the ids of each domain's training sequences, ascending from domain to domain.
            num_folds: F.
            seed: of the splits.
        """
        self.num_folds = num_folds
        self.unsplit = tuple(i for i, ids in enumerate(sequence_ids_by_domain) if len(ids) < num_folds)
        self._ids_by_domain = sequence_ids_by_domain
        self._folds_by_domain = [
            fold_ids(len(ids), num_folds, seed, i) if self._is_split(i) else np.zeros(len(ids), dtype=np.int64)
            for i, ids in enumerate(sequence_ids_by_domain)
        ]

    def training_ids(self, fold: int) -> list[NDArray[np.int64]]:
        """Returns the ids of each domain's sequences that the reference of a fold is trained on."""
        return [
            ids[folds != fold] if self._is_split(i) else ids
            for i, (ids, folds) in enumerate(zip(self._ids_by_domain, self._folds_by_domain, strict=True))
        ]

    def of(self, sequence_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the fold whose reference scores each of some training sequences, shape [N]."""
        known = np.concatenate(self._ids_by_domain)
        return np.concatenate(self._folds_by_domain)[np.searchsorted(known, sequence_ids)]

    def _is_split(self, domain_id: int) -> bool:
        return self.num_folds > 1 and domain_id not in self.unsplit

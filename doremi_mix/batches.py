"""Which sequences each training step sees: a pure function of (weights, seed, step).

Axes: K domains, S steps (of ``EpochSchedule``: sequences), B sequences in a batch.  Group DRO's batches are
stratified-uniform and the others are weighted; both are the same rule with other weights.  Nothing here depends on how
many processes train.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def plan_domain_counts(weights_K: NDArray[np.float64], batch_size: int, num_steps: int) -> NDArray[np.int64]:
    """Splits every batch over the domains so that the running totals follow the weights as closely as integers can.

    A domain gets ``floor(weight * B)`` sequences in every batch; the sequences that are left go, one each, to the
    domains whose fractions have added up to the largest debt so far.  With uniform weights and ``B >= K``, every domain
    is in every batch.

    Args:
        weights_K: weights on the simplex.
        batch_size: B.
        num_steps: S.

    Returns:
        Sequences to draw, shape [S, K]; every row sums to B.
    """
    # Rounded, so that 0.35 * 20 = 6.999999999999999 is 7.
    share_K = np.round(np.asarray(weights_K, dtype=np.float64) * batch_size, 9)
    base_K = np.floor(share_K).astype(np.int64)
    num_left = batch_size - int(base_K.sum())
    counts_SK = np.tile(base_K, (num_steps, 1))
    # A domain without weight is never owed anything.
    debt_K = np.where(share_K > 0, 0.0, -np.inf)
    for step in range(num_steps if num_left else 0):
        debt_K += share_K - base_K
        chosen = np.argsort(-np.round(debt_K, 6), kind="stable")[:num_left]
        counts_SK[step, chosen] += 1
        debt_K[chosen] -= 1
    return counts_SK


def spread_over_steps(num_sequences_K: NDArray[np.int64], num_steps: int) -> NDArray[np.int64]:
    """Spreads a fixed number of sequences of each domain evenly over a training run.

    Args:
        num_sequences_K: sequences to draw from each domain in all.
        num_steps: S, at most the sum of them.

    Returns:
        Sequences to draw, shape [S, K]; columns sum to ``num_sequences_K``, rows differ by one at most in their sum.

    Example:
        >>> spread_over_steps(np.array([4, 2]), 2).tolist()
        [[2, 1], [2, 1]]
    """
    num_sequences_K = np.asarray(num_sequences_K, dtype=np.int64)
    domain_ids = np.repeat(np.arange(len(num_sequences_K)), num_sequences_K)
    # The j-th of n sequences of a domain is due at (j + 1/2) / n of the run.
    due = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in num_sequences_K])
    in_order = domain_ids[np.argsort(due, kind="stable")]
    return np.stack([np.bincount(part, minlength=len(num_sequences_K)) for part in np.array_split(in_order, num_steps)])


class Schedule:
    """Sequence ids for each step.

    The n-th draw from a domain is a pure function of (seed, domain id, n): epochs over the domain's sequences, each in
    a fresh order.  So a resumed run, or one with more processes, sees the same sequences.
    """

    def __init__(
        self,
        sequence_ids_by_domain: Sequence[NDArray[np.int64]],
        weights_K: NDArray[np.float64],
        batch_size: int,
        num_steps: int,
        seed: int,
    ) -> None:
        """Plans a run.

        Args:
            sequence_ids_by_domain: for each domain, the ids of its training sequences.
            weights_K: share of the draws that each domain gets; a domain with weight > 0 needs at least one sequence.
            batch_size: B, over all processes.
            num_steps: S.
            seed: of the orders.
        """
        self._plan(sequence_ids_by_domain, plan_domain_counts(weights_K, batch_size, num_steps), seed)

    @classmethod
    def of_totals(
        cls,
        sequence_ids_by_domain: Sequence[NDArray[np.int64]],
        num_sequences_K: NDArray[np.int64],
        num_steps: int,
        seed: int,
    ) -> Schedule:
        """Plans a run that draws exactly so many sequences of each domain, evenly over the steps."""
        schedule = cls.__new__(cls)
        schedule._plan(sequence_ids_by_domain, spread_over_steps(num_sequences_K, num_steps), seed)
        return schedule

    def _plan(
        self, sequence_ids_by_domain: Sequence[NDArray[np.int64]], counts_SK: NDArray[np.int64], seed: int
    ) -> None:
        self.sequence_ids_by_domain = [np.asarray(ids, dtype=np.int64) for ids in sequence_ids_by_domain]
        self.counts_SK = counts_SK
        self.starts_SK = np.cumsum(self.counts_SK, axis=0) - self.counts_SK
        self.seed = seed
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}

    @property
    def smallest_batch(self) -> int:
        """Sequences in the smallest batch: those of a fixed number of sequences in all differ by one."""
        return int(self.counts_SK.sum(axis=1).min())

    def batch(self, step: int) -> NDArray[np.int64]:
        """Returns the sequence ids of a step, shape [B], in a shuffled order (so that micro-batches mix domains)."""
        parts = [
            self._draw(domain_id, int(self.starts_SK[step, domain_id]), int(count))
            for domain_id, count in enumerate(self.counts_SK[step])
            if count
        ]
        order = np.random.default_rng([self.seed, 1, step])
        return order.permutation(np.concatenate(parts))

    def drawn(self) -> NDArray[np.int64]:
        """Returns the sorted ids of all sequences that any step draws."""
        ids = []
        for domain_id, total in enumerate(self.counts_SK.sum(axis=0)):
            available = self.sequence_ids_by_domain[domain_id]
            ids.append(available if total >= len(available) else self._draw(domain_id, 0, int(total)))
        return np.sort(np.concatenate(ids))

    def epochs(self) -> NDArray[np.float64]:
        """Returns how often the schedule passes over each domain, shape [K]."""
        sizes_K = np.array([max(1, len(ids)) for ids in self.sequence_ids_by_domain])
        return np.asarray(self.counts_SK.sum(axis=0) / sizes_K, dtype=np.float64)

    def _draw(self, domain_id: int, start: int, count: int) -> NDArray[np.int64]:
        available = self.sequence_ids_by_domain[domain_id]
        epoch_n, position_n = np.divmod(np.arange(start, start + count), len(available))
        return np.concatenate(
            [self._order(domain_id, int(epoch))[position_n[epoch_n == epoch]] for epoch in np.unique(epoch_n)]
        )

    def _order(self, domain_id: int, epoch: int) -> NDArray[np.int64]:
        """One epoch's order of a domain; the last one is kept, as draws go forward."""
        if (domain_id, epoch) not in self._orders:
            rng = np.random.default_rng([self.seed, 0, domain_id, epoch])
            self._orders = {key: order for key, order in self._orders.items() if key[0] != domain_id}
            self._orders[domain_id, epoch] = rng.permutation(self.sequence_ids_by_domain[domain_id])
        return self._orders[domain_id, epoch]


class EpochSchedule:
    """Which sequences each step sees: epochs over all of them, each in a fresh order.

    The epochs are laid end to end and cut into batches of ``batch_size``, so a batch may hold the end of one epoch and
    the start of the next.  What is left at the end, less than a batch, stays out; but where there is not even one
    batch, one smaller step takes everything.  (The Trainer of transformers cuts every epoch by itself and takes
    epochs x floor(S / B) steps; here it is floor(epochs x S / B), so that fewer sequences stay out.)

    A step is a pure function of (seed, step), so a resumed run, or one with more processes, sees the same sequences.

    Attributes:
        num_steps: of all epochs.
        smallest_batch: sequences in the smallest batch.
        num_left_out: draws at the end that no step takes.
    """

    def __init__(self, lengths_S: NDArray[np.integer], batch_size: int, num_epochs: int, seed: int) -> None:
        """Plans a run.

        Args:
            lengths_S: tokens of each sequence, of which there is at least one.
            batch_size: B, over all processes.
            num_epochs: passes over all sequences.
            seed: of the orders.
        """
        num_draws = len(lengths_S) * num_epochs
        self.smallest_batch = min(batch_size, num_draws)
        self.num_steps = num_draws // self.smallest_batch
        self.num_left_out = num_draws - self.num_steps * self.smallest_batch
        self._lengths_S = np.asarray(lengths_S)
        self._seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}

    def batch(self, step: int) -> NDArray[np.int64]:
        """Returns the sequence ids of a step, shape [B], longest first; those of one length in the order drawn.

        So micro-batches, which are equal parts in order, hold sequences of about one length and little padding, and
        the first one needs the most memory.

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"steps must be from 0 to {self.num_steps - 1}, got {step}")
        draws_B = np.arange(step * self.smallest_batch, (step + 1) * self.smallest_batch)
        epoch_B, position_B = np.divmod(draws_B, len(self._lengths_S))
        epochs = range(int(epoch_B[0]), int(epoch_B[-1]) + 1)
        orders = {epoch: self._order(epoch) for epoch in epochs}
        self._orders = orders  # the next step mostly needs the same
        ids_B = np.concatenate([orders[epoch][position_B[epoch_B == epoch]] for epoch in epochs])
        return ids_B[np.argsort(-self._lengths_S[ids_B], kind="stable")]

    def num_tokens(self, step: int) -> int:
        """Returns the tokens of a step, without padding."""
        return int(self._lengths_S[self.batch(step)].sum())

    def _order(self, epoch: int) -> NDArray[np.int64]:
        known = self._orders.get(epoch)
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._lengths_S)) if known is None else known

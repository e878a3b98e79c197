"""The mixture without files: which examples of which domain, and a sampler for a torch ``DataLoader``.

Whole examples are drawn, so many of each domain that its share of TOKENS is its weight, under an epoch cap.  Within a
domain every epoch is a permutation: no example comes again before every other one came as often.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import BudgetError, DataError
from doremi_mix.mixture import IntArray, draw_examples, mixture_order
from doremi_mix.types import DomainStatistics

BudgetUnit = Literal["tokens", "examples"]

PIECE = 4_096
"""Indices that are Python numbers at a time: they take four times the memory of those in the array."""


def draw_counts(
    weights: DomainWeights,
    sizes: Mapping[str, int],
    *,
    budget: int | None = None,
    unit: BudgetUnit = "tokens",
    max_epochs: float = 4.0,
    equal_lengths: bool = False,
) -> dict[str, int]:
    """Says how many examples to draw of each domain of the given sizes.

    An example is taken to have as many tokens as the domain's examples had on average when the weights were learned;
    how many examples there are is what ``sizes`` says.

    Args:
        weights: the domain weights.
        sizes: examples of each domain; each with a weight above 0 must be there.
        budget: what to draw in all; None draws as much as the domains hold together, or as the epoch cap allows.
        unit: what the budget counts: "tokens" or "examples".
        max_epochs: the largest number of passes over a domain.
        equal_lengths: take every example to be as long as any other, where the weights have no corpus.

    Returns:
        Counts in the order of the weights, of the domains with a weight above 0.

    Raises:
        DataError: a domain has no size or no weight or no example, or lengths are not known.
        BudgetError: the epoch cap makes the budget impossible, or it is smaller than one example.
        ValueError: there is no such unit.
    """
    check_asked(unit, max_epochs)
    names = drawn_names(sizes, weights)
    sizes = _whole(sizes)
    for name in names:
        if sizes[name] < 1:
            raise no_examples(name, weights)
    if not weights.corpus and not equal_lengths:
        raise DataError(UNKNOWN_LENGTHS)
    if not weights.corpus and budget is not None and unit == "tokens":
        raise DataError(
            "a budget of tokens needs the lengths of examples, and the weights have no corpus; give the budget in "
            'examples: unit="examples"'
        )
    corpus = {name: _resized(weights.corpus.get(name), sizes.get(name, 0)) for name in weights.domain_weights}
    if budget is None:
        passes = Fraction(str(float(min(max_epochs, 1))))
        unit, budget = "tokens", max(1, sum(int(passes * corpus[name].available_tokens) for name in names))
    counts = replace(weights, corpus=corpus).to_counts(budget, unit=unit, max_epochs=max_epochs)
    return {name: counts[name] for name in names}


def mixture_indices(counts: Mapping[str, int], sizes: Mapping[str, int], seed: int, epoch: int = 0) -> IntArray:
    """Returns what to draw from the concatenation of the domains, in the order of training.

    Pass after pass, a domain goes on with its own permutations where the last pass stopped; the first pass draws what
    ``doremi_mix.mixture`` draws.

    Args:
        counts: examples to draw of each domain in one pass.
        sizes: examples that there are of each domain, in the order of the concatenation.
        seed: of the permutations and of the order, at least 0.
        epoch: the number of the pass, from 0.

    Returns:
        Indices into the concatenation, int64.
    """
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()])[:-1].tolist(), strict=True))
    drawn = [
        starts[name]
        + draw_examples(np.ones(sizes[name], dtype=np.int64), count * (epoch + 1), seed, name)[count * epoch :]
        for name, count in counts.items()
    ]
    indices_M = np.empty(sum(counts.values()), dtype=np.int64)
    # The seeds of later passes are those of no first pass below 2**64.
    indices_M[mixture_order(list(counts.values()), seed + (epoch << 64))] = np.concatenate(drawn)
    return indices_M


class MixtureSampler(Sampler[int]):
    """Draws a mixture for a ``DataLoader`` over ``ConcatDataset`` of the domains.

    One iteration is one pass over the mixture: the counts that the budget gives, exactly, in a shuffled order.  It
    counts EXAMPLES, so many of each domain that its share of tokens is its weight.  The n-th index of a pass is a pure
    function of the weights, the sizes, the budget, the seed and the number of the pass; workers, replicas and
    interruptions do not change it.  The epoch cap holds for one pass: to train longer than that on one mixture, give
    the whole budget instead of several passes.

    With several processes give each its ``rank``: the n-th index goes to rank ``n % num_replicas``, and the last
    indices, fewer than there are processes, are left out so that all have as many.  Where the framework itself splits
    batches over processes (Accelerate, the trainers of Transformers and TRL), leave both at their defaults.

    Example:
        >>> weights = DomainWeights({"a": 0.25, "b": 0.75}, {"a": 0.5, "b": 0.5})
        >>> sampler = MixtureSampler({"a": 10, "b": 10}, weights, budget=8, unit="examples", equal_lengths=True)
        >>> len(sampler), sum(index < 10 for index in sampler)
        (8, 2)
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: DomainWeights,
        *,
        budget: int | None = None,
        unit: BudgetUnit = "tokens",
        max_epochs: float = 4.0,
        equal_lengths: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        """Plans the draw.

        Args:
            sizes: examples of each domain, in the order in which the domains are concatenated.
            weights: the domain weights, with the corpus that they were learned on.
            budget: what one pass draws in all processes together; None draws as much as the domains hold together, or
                as the epoch cap allows.
            unit: what the budget counts: "tokens", as the run counted them, or "examples".
            max_epochs: the largest number of passes over a domain in one pass over the mixture.
            equal_lengths: take every example to be as long as any other, where the weights have no corpus.
            seed: of the draw, at least 0.
            num_replicas: processes that share the mixture.
            rank: which of them this is, from 0.

        Raises:
            DataError: a domain has no size or no weight or no example, or lengths are not known.
            BudgetError: the epoch cap makes the budget impossible, or it is smaller than one example a process.
            ValueError: there is no such rank or unit, or the seed is negative.
        """
        # Numbers of numpy too, which JSON does not know.
        seed, num_replicas, rank = map(operator.index, (seed, num_replicas, rank))
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank must be at least 0 and below num_replicas, got {rank} of {num_replicas}")
        if seed < 0:
            raise ValueError(f"the seed must be at least 0, got {seed}")
        self.sizes = _whole(sizes)
        self.counts = draw_counts(
            weights, self.sizes, budget=budget, unit=unit, max_epochs=max_epochs, equal_lengths=equal_lengths
        )
        """Examples of each domain in one pass, all processes together."""
        self.seed, self.num_replicas, self.rank = seed, num_replicas, rank
        if not len(self):
            total = sum(self.counts.values())
            raise BudgetError(f"one pass draws {total:,} examples for {num_replicas:,} processes; raise the budget")
        self.epoch = 0
        self._position = 0
        self._begin_at = 0

    def __len__(self) -> int:
        """Returns the indices of one pass of this process."""
        return sum(self.counts.values()) // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        """Yields the indices of the pass; the first time after ``load_state_dict``, those that are left of it."""
        self._position = self._begin_at
        return self._walk()

    def _walk(self) -> Iterator[int]:
        # At the first index and not before: loaders make iterators that they never use.
        begin, self._begin_at = self._begin_at, 0
        indices_M = mixture_indices(self.counts, self.sizes, self.seed, self.epoch)
        mine = indices_M[self.rank :: self.num_replicas][: len(self)].copy()
        del indices_M
        for start in range(begin, len(mine), PIECE):
            for number, index in enumerate(mine[start : start + PIECE].tolist(), start + 1):
                self._position = number
                yield index

    def set_epoch(self, epoch: int) -> None:
        """Says which pass the next iteration is; without it, every iteration is the same pass.

        Args:
            epoch: from 0.  Another one than now also forgets a position that was loaded.
        """
        if epoch < 0:
            raise ValueError(f"the epoch must be at least 0, got {epoch}")
        if epoch != self.epoch:
            self.epoch, self._position, self._begin_at = epoch, 0, 0

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Returns where this process is, for ``load_state_dict``.

        Args:
            position: indices of this pass that were trained on.  Without it, those that were handed out, which is more
                where a ``DataLoader`` with workers fetches ahead; a ``StatefulDataLoader`` of torchdata knows that.
        """
        return {
            "epoch": self.epoch,
            "position": self._position if position is None else position,
            "draw": self._fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the next iteration go on where ``state_dict`` was taken.

        Raises:
            DataError: the state is of another draw: other domains, counts, seed or number of processes.
        """
        if state["draw"] != self._fingerprint():
            raise DataError(
                "the saved state is of another draw; give the sampler the sizes, weights, budget, seed and number of "
                "processes that it had, or start the pass again"
            )
        if not 0 <= state["position"] <= len(self):
            raise DataError(
                f"the saved position must be from 0 to {len(self)}, got {state['position']}; count the examples of one "
                "process in one pass"
            )
        self.epoch = state["epoch"]
        self._position = self._begin_at = state["position"]

    def _fingerprint(self) -> str:
        """Returns what tells this draw from others; it is the same for all ranks."""
        parts = [list(self.sizes.items()), list(self.counts.items()), self.seed, self.num_replicas]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


UNKNOWN_LENGTHS = (
    "whole examples are drawn, so that shares of tokens must become shares of examples, and the weights have no corpus "
    "that says how long examples are; take the domain_weights.json of a run, or say equal_lengths=True"
)


def drawn_names(given: Mapping[str, object], weights: DomainWeights) -> list[str]:
    """Returns the domains with a weight above 0, after a look whether the given ones are those of the weights."""
    names = [name for name, weight in weights.domain_weights.items() if weight]
    for name in names:
        if name not in given:
            raise DataError(f"domain {name!r} has weight {weights[name]} but is not given; give all domains: {names}")
    for name in given:
        if name not in weights.domain_weights:
            raise DataError(f"domain {name!r} is given but has no weight; leave it out, or give it one")
    return names


def check_asked(unit: str, max_epochs: float) -> None:
    """Raises for what only a budget would show to be wrong."""
    if unit not in ("tokens", "examples"):
        raise ValueError(f'unit must be "tokens" or "examples", got {unit!r}')
    if not (math.isfinite(max_epochs) and max_epochs > 0):
        raise BudgetError(f"max_epochs must be finite and above 0, got {max_epochs}; change it")


def _whole(sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns sizes as numbers of Python, whichever whole numbers they are.

    Raises:
        DataError: a size is no whole number.
    """
    whole = {}
    for name, size in sizes.items():
        try:
            whole[name] = operator.index(size)
        except TypeError:
            raise DataError(
                f"domain {name!r}: its size must be a whole number of examples, got {size!r}; give len(dataset)"
            ) from None
    return whole


def no_examples(name: str, weights: DomainWeights) -> DataError:
    """Returns the error of a domain that is to be drawn and has nothing."""
    return DataError(f"domain {name!r} has weight {weights[name]} but no examples; give it some, or give it weight 0")


def _resized(known: DomainStatistics | None, size: int) -> DomainStatistics:
    """Returns the statistics of a domain of another size, with examples as long as before."""
    if known is None or size < 1:
        return DomainStatistics(max(size, 1), max(size, 1))
    return DomainStatistics(size, max(round(size * known.available_tokens / known.num_examples), 1))

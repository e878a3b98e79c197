"""The mixture without files: an interleaved ``datasets`` dataset, and a sampler for a torch ``DataLoader``.

Both draw whole examples, so many of each domain that its share of TOKENS is its weight, under an epoch cap.  Within a
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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch.utils.data import Sampler

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import BudgetError, ConfigError, DataError, short_reason
from doremi_mix.mixture import IntArray, draw_examples, mixture_order
from doremi_mix.types import DomainStatistics

if TYPE_CHECKING:
    import datasets

BudgetUnit = Literal["tokens", "examples"]

PIECE = 4_096
"""Indices that are Python numbers at a time: they take four times the memory of those in the array."""


def interleave(
    datasets: Mapping[str, datasets.Dataset] | Mapping[str, datasets.IterableDataset],
    weights: DomainWeights,
    *,
    budget: int | None = None,
    unit: BudgetUnit = "tokens",
    max_epochs: float = 4.0,
    equal_lengths: bool = False,
    seed: int = 0,
) -> datasets.Dataset | datasets.IterableDataset:
    """Mixes datasets of Hugging Face by domain weights.

    Datasets that lie on disk or in memory (``Dataset``) give a dataset of exact counts, shuffled, no copy of the rows.
    Streams (``IterableDataset``) are sampled at random by shares of examples, each in its own order (shuffle them
    before): with a budget, as many examples as the budget holds on average, streams that end begin again, and the epoch
    cap holds on average too; without one, each stream is read at most ``max_epochs`` times (rounded down, at least
    once) and the mixture ends where the first one has ended, so that its shares stay right to the end.

    Args:
        datasets: by domain; each domain with a weight above 0 must be there.
        weights: the domain weights, with the corpus that they were learned on.
        budget: what to draw in all; None draws as much as the domains hold together, or as the epoch cap allows.
        unit: what the budget counts: "tokens", as the run counted them, or "examples".
        max_epochs: the largest number of passes over a domain.
        equal_lengths: take every example to be as long as any other, where the weights have no corpus.
        seed: of the draw, at least 0.

    Returns:
        The mixture, with the columns of all; a column that a domain has not is None there.

    Raises:
        ConfigError: the package ``datasets`` is not installed.
        DataError: a domain has no dataset or no weight or no example, lengths are not known, or columns of one name
            differ in type.
        BudgetError: the epoch cap makes the budget impossible, or it is smaller than one example.
        ValueError: there is no such unit.
    """
    _check_asked(unit, max_epochs)
    names = _drawn_names(datasets, weights)
    if _are_streams(datasets):
        return _interleave_streams(
            {name: datasets[name] for name in names}, weights, budget, unit, max_epochs, equal_lengths, seed
        )
    from datasets import concatenate_datasets

    sizes = {name: len(datasets[name]) for name in names}
    counts = draw_counts(weights, sizes, budget=budget, unit=unit, max_epochs=max_epochs, equal_lengths=equal_lengths)
    try:
        whole = concatenate_datasets([datasets[name] for name in names])
    except ValueError as error:
        raise _not_alike(error) from None
    return whole.select(mixture_indices(counts, sizes, seed))


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
    _check_asked(unit, max_epochs)
    names = _drawn_names(sizes, weights)
    sizes = _whole(sizes)
    for name in names:
        if sizes[name] < 1:
            raise _no_examples(name, weights)
    if not weights.corpus and not equal_lengths:
        raise DataError(_UNKNOWN_LENGTHS)
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


_UNKNOWN_LENGTHS = (
    "whole examples are drawn, so that shares of tokens must become shares of examples, and the weights have no corpus "
    "that says how long examples are; take the domain_weights.json of a run, or say equal_lengths=True"
)


def _drawn_names(given: Mapping[str, object], weights: DomainWeights) -> list[str]:
    """Returns the domains with a weight above 0, after a look whether the given ones are those of the weights."""
    names = [name for name, weight in weights.domain_weights.items() if weight]
    for name in names:
        if name not in given:
            raise DataError(f"domain {name!r} has weight {weights[name]} but is not given; give all domains: {names}")
    for name in given:
        if name not in weights.domain_weights:
            raise DataError(f"domain {name!r} is given but has no weight; leave it out, or give it one")
    return names


def _check_asked(unit: str, max_epochs: float) -> None:
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


def _no_examples(name: str, weights: DomainWeights) -> DataError:
    return DataError(f"domain {name!r} has weight {weights[name]} but no examples; give it some, or give it weight 0")


def _resized(known: DomainStatistics | None, size: int) -> DomainStatistics:
    """Returns the statistics of a domain of another size, with examples as long as before."""
    if known is None or size < 1:
        return DomainStatistics(max(size, 1), max(size, 1))
    return DomainStatistics(size, max(round(size * known.available_tokens / known.num_examples), 1))


def _are_streams(given: Mapping[str, Any]) -> bool:
    """Says whether datasets are streams; they must be of one kind."""
    try:
        from datasets import Dataset, IterableDataset
    except ModuleNotFoundError as error:
        raise ConfigError(
            "interleave needs the package datasets, which is not installed; run: pip install 'doremi-mix[datasets]'"
        ) from error

    for name, dataset in given.items():
        if not isinstance(dataset, Dataset | IterableDataset):
            raise DataError(
                f"domain {name!r}: a datasets.Dataset or IterableDataset is expected, got a {type(dataset).__name__}; "
                'of a DatasetDict, give one split: dataset["train"]'
            )
    streams = [name for name, dataset in given.items() if isinstance(dataset, IterableDataset)]
    if streams and len(streams) < len(given):
        other = next(name for name in given if name not in streams)
        raise DataError(
            f"domain {streams[0]!r} is a stream and {other!r} is not; load all with streaming=True, or none"
        )
    return bool(streams)


def _interleave_streams(
    streams: Mapping[str, Any],
    weights: DomainWeights,
    budget: int | None,
    unit: BudgetUnit,
    max_epochs: float,
    equal_lengths: bool,
    seed: int,
) -> datasets.IterableDataset:
    """Samples streams at random; see ``interleave``."""
    from datasets import interleave_datasets

    from doremi_mix.exporters.plan import make_plan

    if not weights.corpus and not equal_lengths:
        raise DataError(_UNKNOWN_LENGTHS)
    num_examples = None
    if budget is not None:
        num_examples = sum(
            weights.to_counts(budget, unit=unit, max_epochs=max_epochs, equal_lengths=equal_lengths).values()
        )
    plan = make_plan(
        weights, budget=budget, budget_unit=unit, max_epochs=max_epochs, equal_lengths=equal_lengths, seed=seed
    )
    shares = plan.example_shares()
    passes = None if num_examples is not None else max(1, math.floor(max_epochs))
    for name in shares:
        # An empty stream would end the mixture at the first draw from it, without a word.
        if not any(True for _ in streams[name].take(1)):
            raise _no_examples(name, weights)
    try:
        mixed = interleave_datasets(
            [streams[name].repeat(passes) for name in shares],
            probabilities=list(shares.values()),
            seed=seed,
            stopping_strategy="first_exhausted",
        )
    except ValueError as error:
        raise _not_alike(error) from None
    return mixed if num_examples is None else mixed.take(num_examples)


def _not_alike(error: ValueError) -> DataError:
    return DataError(
        f"the datasets cannot be put together ({short_reason(error)}); give columns of one name one type in all of them"
    )

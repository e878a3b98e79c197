"""The mixture without files, of datasets of Hugging Face: a dataset of exact counts, or a stream drawn by shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ConfigError, DataError, short_reason
from doremi_mix.sampler import (
    UNKNOWN_LENGTHS,
    BudgetUnit,
    check_asked,
    draw_counts,
    drawn_names,
    mixture_indices,
    no_examples,
)

if TYPE_CHECKING:
    import datasets


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
    check_asked(unit, max_epochs)
    names = drawn_names(datasets, weights)
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
        raise DataError(UNKNOWN_LENGTHS)
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
            raise no_examples(name, weights)
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

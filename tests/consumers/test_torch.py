"""torch and datasets draw what the weights say: a ``DataLoader`` over our sampler, and our interleaved datasets."""

import collections

import datasets
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, WeightedRandomSampler

from .checking import assert_composition, write_problem

CONSUMER = "torch"
BUDGET = 12_000
NUM_FIRST = 400


def counted(rows):
    return dict(collections.Counter(row["domain"] for row in rows))


def tokens_by_domain(rows):
    """Words of the answers: the unit of the problem's weights."""
    tokens = collections.Counter()
    for row in rows:
        tokens[row["domain"]] += len(row["output"].split())
    return dict(tokens)


def shares_of(counts):
    return {name: count / sum(counts.values()) for name, count in counts.items()}


def loaded(problem, sampler, workers=0, batch_size=32):
    """Draws one pass with torch's own loader."""
    rows = ConcatDataset([Rows(problem.rows[name]) for name in sampler.sizes])
    loader = DataLoader(rows, batch_size=batch_size, sampler=sampler, num_workers=workers, collate_fn=list)
    return [row for batch in loader for row in batch]


class Rows(torch.utils.data.Dataset):
    """Rows of a list."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 warns of torch's own forks
def test_the_loader_draws_the_counts_and_its_beginning_their_shares(problem):
    expected = problem.weights.to_counts(BUDGET)
    for workers in (0, 2):
        rows = loaded(problem, problem.weights.sampler(problem.sizes, budget=BUDGET, seed=1), workers)
        assert counted(rows) == expected
        assert_composition(counted(rows[:NUM_FIRST]), shares_of(expected))


def test_the_tokens_that_the_loader_draws_are_shared_by_weight(problem):
    rows = loaded(problem, problem.weights.sampler(problem.sizes, budget=BUDGET, seed=1))
    tokens = tokens_by_domain(rows)
    assert abs(sum(tokens.values()) - BUDGET) < 0.01 * BUDGET
    for name, share in shares_of(tokens).items():
        assert abs(share - problem.weights[name]) < 0.005


def test_trap_weights_as_probabilities_of_examples(problem):
    """Torch's own weighted sampler, given the weights as they are, draws too many tokens where examples are long."""
    names = list(problem.rows)
    rows = [row for name in names for row in problem.rows[name]]
    each = [problem.weights[name] / problem.sizes[name] for name in names for _ in range(problem.sizes[name])]
    naive = WeightedRandomSampler(each, 4_000, generator=torch.Generator().manual_seed(0))
    drawn = [rows[index] for index in naive]
    # The examples have the shares of the weights; the tokens have not: gamma's have twice the weight of 0.3.
    assert_composition(counted(drawn), problem.weights.domain_weights)
    shares = shares_of(tokens_by_domain(drawn))
    assert abs(shares["gamma"] - 0.5) < 0.03
    assert abs(shares["alpha"] - 0.2 * 5 / 12) < 0.02


def test_replicas_draw_the_same_composition_each(problem):
    expected = problem.weights.to_counts(BUDGET)
    together = collections.Counter()
    for rank in range(3):
        sampler = problem.weights.sampler(problem.sizes, budget=BUDGET, seed=2, num_replicas=3, rank=rank)
        drawn = counted(loaded(problem, sampler))
        assert_composition(drawn, shares_of(expected))
        together.update(drawn)
    missing = collections.Counter(expected) - together
    assert not together - collections.Counter(expected)
    assert missing.total() == sum(expected.values()) % 3


def test_trap_two_halves_over_two_replicas(tmp_path):
    """A fixed alternation of two equal domains gives each of two replicas one of them; a shuffled order does not."""
    halves = write_problem(tmp_path, {"a": 0.5, "b": 0.5}, {"a": 500, "b": 500}, {"a": 8, "b": 8})
    alternation = ["a", "b"] * 500
    assert [set(alternation[rank::2]) for rank in range(2)] == [{"a"}, {"b"}]
    for rank in range(2):
        sampler = halves.weights.sampler(halves.sizes, budget=5_000, num_replicas=2, rank=rank)
        assert_composition(counted(loaded(halves, sampler)), shares_of(halves.weights.to_counts(5_000)))


def test_hostile_names(tmp_path):
    shares = {"中文, yes": 0.25, "1e5": 0.25, "-x 'y' \"z\"": 0.5, " ": 0.0}
    hostile = write_problem(tmp_path, shares, dict.fromkeys(shares, 100), dict.fromkeys(shares, 5))
    drawn = counted(loaded(hostile, hostile.weights.sampler(hostile.sizes, budget=1_000)))
    assert drawn == {name: count for name, count in hostile.weights.to_counts(1_000).items() if count}
    assert " " not in drawn


def tables(problem):
    return {name: datasets.Dataset.from_list(rows) for name, rows in problem.rows.items()}


def test_interleaved_datasets_have_the_counts_and_their_beginning_the_shares(problem):
    mixed = problem.weights.interleave(tables(problem), budget=BUDGET, seed=1)
    expected = problem.weights.to_counts(BUDGET)
    assert counted(mixed) == expected
    assert_composition(counted(mixed.select(range(NUM_FIRST))), shares_of(expected))
    # The loader over the sampler draws the same rows in the same order.
    rows = loaded(problem, problem.weights.sampler(problem.sizes, budget=BUDGET, seed=1))
    assert list(mixed) == rows


def test_interleaved_streams_are_drawn_by_shares_of_examples(problem):
    streams = {name: table.to_iterable_dataset() for name, table in tables(problem).items()}
    for budget in (50_000, None):
        rows = problem.weights.interleave(streams, budget=budget, max_epochs=100.0, seed=4)
        drawn = list(rows.take(3_000))
        assert len(drawn) == 3_000
        assert_composition(counted(drawn), problem.weights.to_probabilities("examples"))


def test_streams_keep_the_shares_that_the_epoch_cap_leaves(problem):
    streams = {name: table.to_iterable_dataset() for name, table in tables(problem).items()}
    counts = problem.weights.to_counts(12_000, max_epochs=2.0)
    assert counts["gamma"] == 100
    rows = list(problem.weights.interleave(streams, budget=12_000, max_epochs=2.0, seed=0))
    assert len(rows) == sum(counts.values())
    assert_composition(counted(rows), shares_of(counts))

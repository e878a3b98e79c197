"""The mixture without files: what is drawn, in which order, and that an interruption changes nothing."""

import collections
import pickle
import re
import sys

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import BudgetError, ConfigError, DataError
from doremi_mix.loading import interleave
from doremi_mix.mixture import draw_examples
from doremi_mix.sampler import MixtureSampler, draw_counts, mixture_indices
from doremi_mix.types import DomainStatistics

CORPUS = {
    "alpha": DomainStatistics(1000, 5_000, 100),
    "beta": DomainStatistics(300, 3_000, 50),
    "gamma": DomainStatistics(50, 1_000, 20),
}
SIZES = {name: statistics.num_examples for name, statistics in CORPUS.items()}
WEIGHTS = DomainWeights({"alpha": 0.2, "beta": 0.5, "gamma": 0.3}, dict.fromkeys(CORPUS, 1 / 3), corpus=CORPUS)
BARE = DomainWeights(WEIGHTS.domain_weights, WEIGHTS.reference_weights)
# 4,200 tokens: 840, 2,100 and 1,260 of them at 5, 10 and 20 an example.
BUDGET, COUNTS = 4_200, {"alpha": 168, "beta": 210, "gamma": 63}

FORKS = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 warns of torch's own forks


def message(text):
    return f"^{re.escape(text)}$"


def table(name, size):
    return datasets.Dataset.from_list([{"domain": name, "row": row, "length": 1.5} for row in range(size)])


TABLES = {name: table(name, size) for name, size in SIZES.items()}


def counted(rows):
    return dict(collections.Counter(row["domain"] for row in rows))


def streams():
    return {name: rows.to_iterable_dataset() for name, rows in TABLES.items()}


def test_a_dataset_of_exact_counts():
    mixed = WEIGHTS.interleave(TABLES, budget=BUDGET, seed=3)
    assert isinstance(mixed, datasets.Dataset)
    assert len(mixed) == sum(COUNTS.values())
    assert counted(mixed) == COUNTS
    # Each domain gives what the mixture of a run would draw, whatever the other domains are.
    for name, count in COUNTS.items():
        drawn = draw_examples(np.ones(SIZES[name], dtype=np.int64), count, 3, name)
        assert sorted(row["row"] for row in mixed if row["domain"] == name) == sorted(drawn.tolist())


def test_no_example_comes_again_before_every_other_did():
    mixed = interleave(TABLES, WEIGHTS, budget=BUDGET)
    repeats = collections.Counter(row["row"] for row in mixed if row["domain"] == "gamma")
    assert set(repeats.values()) == {1, 2}
    assert len(repeats) == 50
    with pytest.raises(BudgetError, match="give at most 18,000"):
        interleave(TABLES, WEIGHTS, budget=18_001, max_epochs=2)
    capped = interleave(TABLES, WEIGHTS, budget=18_000, max_epochs=2)
    assert counted(capped) == {name: 2 * size for name, size in SIZES.items()}


def test_the_draw_depends_on_the_seed_and_on_nothing_else():
    rows = interleave(TABLES, WEIGHTS, budget=BUDGET, seed=1).to_list()
    backwards = dict(reversed(TABLES.items()))
    assert interleave(backwards, WEIGHTS, budget=BUDGET, seed=1).to_list() == rows
    assert interleave(TABLES, WEIGHTS, budget=BUDGET, seed=2).to_list() != rows


def test_without_a_budget_as_much_as_there_is():
    # 9,000 tokens by weight: gamma's 2,700 are under its cap of 4,000.
    assert counted(interleave(TABLES, WEIGHTS)) == {"alpha": 360, "beta": 450, "gamma": 135}
    assert draw_counts(WEIGHTS, SIZES, max_epochs=1) == SIZES
    assert draw_counts(BARE, {"alpha": 10, "beta": 10, "gamma": 10}, equal_lengths=True) == {
        "alpha": 6,
        "beta": 15,
        "gamma": 9,
    }


def test_datasets_of_other_sizes_than_the_corpus():
    # As many tokens an example as before, but gamma has only 10 rows: its cap is 40 examples of 20 tokens.
    assert draw_counts(WEIGHTS, SIZES, budget=2_000) == {"alpha": 80, "beta": 100, "gamma": 30}
    assert draw_counts(WEIGHTS, {**SIZES, "gamma": 10}, budget=2_000, max_epochs=2) == {
        "alpha": 91,
        "beta": 114,
        "gamma": 20,
    }


def test_a_domain_without_weight_may_be_there_or_not():
    weights = DomainWeights({"alpha": 0.5, "beta": 0.5, "gamma": 0.0}, WEIGHTS.reference_weights, corpus=CORPUS)
    expected = {"alpha": 100, "beta": 50}
    assert counted(weights.interleave(TABLES, budget=1_000)) == expected
    without = {name: TABLES[name] for name in ("alpha", "beta")}
    assert counted(weights.interleave(without, budget=1_000)) == expected
    # In the concatenation it keeps its place.
    sampler = weights.sampler({"gamma": 50, "alpha": 1000, "beta": 300}, budget=1_000)
    assert min(sampler) >= 50
    assert sampler.counts == expected


def test_columns_of_all_and_none_where_a_domain_has_not():
    pair = {
        "a": datasets.Dataset.from_list([{"text": "x"}]),
        "b": datasets.Dataset.from_list([{"text": "y", "extra": 1}]),
    }
    weights = DomainWeights({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.5})
    mixed = weights.interleave(pair, budget=2, unit="examples", equal_lengths=True)
    assert sorted(mixed.to_list(), key=lambda row: row["text"]) == [
        {"text": "x", "extra": None},
        {"text": "y", "extra": 1},
    ]
    pair["b"] = datasets.Dataset.from_list([{"text": 1}])
    text = (
        "the datasets cannot be put together (The features can't be aligned because the key text of features "
        "{'text': Value('int64')} has unexpected type - Value('int64') (expected either Value('string') or "
        'Value("null")); give columns of one name one type in all of them'
    )
    with pytest.raises(DataError, match=message(text)):
        weights.interleave(pair, budget=2, unit="examples", equal_lengths=True)
    pair = {name: rows.to_iterable_dataset() for name, rows in pair.items()}
    with pytest.raises(DataError, match="the datasets cannot be put together"):
        weights.interleave(pair, budget=2, unit="examples", equal_lengths=True)


def test_streams_under_a_budget():
    mixed = WEIGHTS.interleave(streams(), budget=BUDGET, seed=3)
    assert isinstance(mixed, datasets.IterableDataset)
    rows = list(mixed)
    assert len(rows) == 441
    assert counted(rows) == pytest.approx(COUNTS, abs=40)
    assert list(WEIGHTS.interleave(streams(), budget=BUDGET, seed=3)) == rows
    # Each stream goes round in its own order.
    gamma = [row["row"] for row in rows if row["domain"] == "gamma"]
    assert gamma == [number % 50 for number in range(len(gamma))]


def test_streams_without_a_budget_end_before_their_shares_are_wrong():
    rows = list(WEIGHTS.interleave(streams(), max_epochs=2.9, seed=1))
    drawn = counted(rows)
    # Beta's 600 or gamma's 100 examples are first to end: after about 700 rows, that is gamma.
    assert drawn["gamma"] == 100
    assert drawn["beta"] / len(rows) == pytest.approx(10 / 21, abs=0.06)
    assert counted(WEIGHTS.interleave(streams(), max_epochs=0.5, seed=1))["gamma"] == 50


@pytest.mark.parametrize("features", [None, datasets.Features({"row": datasets.Value("int64")})])
@pytest.mark.parametrize("budget", [None, BUDGET])
def test_a_stream_without_rows(features, budget):
    given = {**streams(), "beta": datasets.IterableDataset.from_generator(lambda: iter(()), features=features)}
    text = "domain 'beta' has weight 0.5 but no examples; give it some, or give it weight 0"
    with pytest.raises(DataError, match=message(text)):
        WEIGHTS.interleave(given, budget=budget)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    text = "interleave needs the package datasets, which is not installed; run: pip install 'doremi-mix[datasets]'"
    with pytest.raises(ConfigError, match=message(text)):
        WEIGHTS.interleave(TABLES)


def test_a_part_of_a_pass_without_a_budget():
    assert draw_counts(WEIGHTS, SIZES, max_epochs=0.5) == {name: size // 2 for name, size in SIZES.items()}
    # Half of 5,005 tokens, of 3,000 and of 1,020: caps of 500, 150 and 25 examples, rounded down.
    odd = {"alpha": 1001, "beta": 300, "gamma": 51}
    assert draw_counts(WEIGHTS, odd, max_epochs=0.5) == {"alpha": 500, "beta": 150, "gamma": 25}
    assert counted(interleave(TABLES, WEIGHTS, max_epochs=0.1)) == {"alpha": 100, "beta": 30, "gamma": 5}
    for wrong in (0, -1.0, float("nan"), float("inf")):
        for given in (TABLES, streams()):
            with pytest.raises(
                BudgetError, match=message(f"max_epochs must be finite and above 0, got {wrong}; change it")
            ):
                interleave(given, WEIGHTS, max_epochs=wrong)


@pytest.mark.parametrize("budget", [None, BUDGET])
def test_a_unit_that_is_not(budget):
    text = message('unit must be "tokens" or "examples", got \'foo\'')
    with pytest.raises(ValueError, match=text):
        WEIGHTS.sampler(SIZES, unit="foo", budget=budget)
    for given in (TABLES, streams()):
        with pytest.raises(ValueError, match=text):
            WEIGHTS.interleave(given, unit="foo", budget=budget)


def test_whole_numbers_of_numpy():
    sizes = {name: np.int64(size) for name, size in SIZES.items()}
    sampler = MixtureSampler(sizes, WEIGHTS, budget=np.int64(BUDGET), seed=np.int64(3), num_replicas=np.int32(1))
    plain = MixtureSampler(SIZES, WEIGHTS, budget=BUDGET, seed=3)
    assert list(sampler) == list(plain)
    assert sampler.state_dict() == plain.state_dict()
    assert {type(count) for count in sampler.counts.values()} == {int}
    for wrong in (10.5, "10", None):
        text = f"domain 'beta': its size must be a whole number of examples, got {wrong!r}; give len(dataset)"
        with pytest.raises(DataError, match=message(text)):
            MixtureSampler({**SIZES, "beta": wrong}, WEIGHTS)


def test_streams_of_which_only_shares_are_known():
    pair = {name: TABLES[name].to_iterable_dataset() for name in ("alpha", "beta", "gamma")}
    rows = list(BARE.interleave(pair, budget=500, unit="examples", equal_lengths=True))
    assert counted(rows) == pytest.approx({"alpha": 100, "beta": 250, "gamma": 150}, abs=40)
    with pytest.raises(DataError, match="whole examples are drawn"):
        BARE.interleave(pair)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"alpha": TABLES["alpha"], "beta": TABLES["beta"]},
            "domain 'gamma' has weight 0.3 but is not given; give all domains: ['alpha', 'beta', 'gamma']",
        ),
        (
            {**TABLES, "delta": TABLES["beta"]},
            "domain 'delta' is given but has no weight; leave it out, or give it one",
        ),
        (
            {**TABLES, "gamma": TABLES["gamma"].select([])},
            "domain 'gamma' has weight 0.3 but no examples; give it some, or give it weight 0",
        ),
        (
            {**TABLES, "gamma": datasets.DatasetDict(train=TABLES["gamma"])},
            "domain 'gamma': a datasets.Dataset or IterableDataset is expected, got a DatasetDict; of a DatasetDict, "
            'give one split: dataset["train"]',
        ),
        (
            {**TABLES, "beta": TABLES["beta"].to_iterable_dataset()},
            "domain 'beta' is a stream and 'alpha' is not; load all with streaming=True, or none",
        ),
    ],
)
def test_what_cannot_be_mixed(given, text):
    with pytest.raises(DataError, match=message(text)):
        interleave(given, WEIGHTS)


def test_lengths_that_are_not_known():
    text = (
        "whole examples are drawn, so that shares of tokens must become shares of examples, and the weights have no "
        "corpus that says how long examples are; take the domain_weights.json of a run, or say equal_lengths=True"
    )
    with pytest.raises(DataError, match=message(text)):
        interleave(TABLES, BARE)
    text = (
        "a budget of tokens needs the lengths of examples, and the weights have no corpus; give the budget in "
        'examples: unit="examples"'
    )
    with pytest.raises(DataError, match=message(text)):
        interleave(TABLES, BARE, budget=100, equal_lengths=True)


class Rows(torch.utils.data.Dataset):
    """What a ``DataLoader`` draws from."""

    def __init__(self, name, size):
        self.name, self.size = name, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"domain": self.name, "row": index}


ROWS = ConcatDataset([Rows(name, size) for name, size in SIZES.items()])


def loaded(loader):
    return [
        (domain, row) for batch in loader for domain, row in zip(batch["domain"], batch["row"].tolist(), strict=True)
    ]


@FORKS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_draws_what_interleave_gives(workers):
    sampler = WEIGHTS.sampler(SIZES, budget=BUDGET, seed=3)
    drawn = loaded(DataLoader(ROWS, batch_size=32, sampler=sampler, num_workers=workers))
    assert drawn == [(row["domain"], row["row"]) for row in interleave(TABLES, WEIGHTS, budget=BUDGET, seed=3)]
    assert len(sampler) == len(drawn) == 441


def test_replicas_share_a_pass():
    whole = list(MixtureSampler(SIZES, WEIGHTS, budget=BUDGET))
    parts = [list(MixtureSampler(SIZES, WEIGHTS, budget=BUDGET, num_replicas=4, rank=rank)) for rank in range(4)]
    assert [len(part) for part in parts] == [110] * 4
    assert [index for together in zip(*parts, strict=True) for index in together] == whole[:440]


def test_passes_go_on_where_the_last_one_stopped():
    sampler = MixtureSampler(SIZES, WEIGHTS, budget=BUDGET, seed=5)
    passes = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        passes.append(list(sampler))
        assert collections.Counter(np.searchsorted([1000, 1300], passes[-1], side="right").tolist()) == {
            0: 168,
            1: 210,
            2: 63,
        }
        # Without set_epoch, the same pass again.
        assert list(sampler) == passes[-1]
    # 5 x 168 of 1,000 examples: none of them twice; and of gamma's 50, 315 make six times each and 15 of them more.
    alpha = [index for one in passes for index in one if index < 1000]
    assert len(alpha) == len(set(alpha)) == 840
    gamma = collections.Counter(index for one in passes for index in one if index >= 1300)
    assert collections.Counter(gamma.values()) == {6: 35, 7: 15}


def test_two_seeds_never_share_a_pass():
    one = mixture_indices(COUNTS, SIZES, seed=1, epoch=0)
    assert not np.array_equal(one, mixture_indices(COUNTS, SIZES, seed=0, epoch=1))


@pytest.mark.parametrize("position", [0, 1, 100, 440, 441])
def test_an_interrupted_pass_goes_on(position):
    sampler = MixtureSampler(SIZES, WEIGHTS, budget=BUDGET)
    sampler.set_epoch(2)
    whole = list(sampler)
    walk = iter(sampler)
    before = [next(walk) for _ in range(position)]
    state = pickle.loads(pickle.dumps(sampler.state_dict()))
    assert state["position"] == position
    other = MixtureSampler(SIZES, WEIGHTS, budget=BUDGET)
    other.load_state_dict(state)
    other.set_epoch(2)
    assert other.state_dict() == state
    assert before + list(other) == whole
    assert list(other) == whole


@FORKS
def test_a_loader_that_fetches_ahead_is_told_where_training_is():
    sampler = MixtureSampler(SIZES, WEIGHTS, budget=BUDGET)
    whole = loaded(DataLoader(ROWS, batch_size=10, sampler=sampler))
    batches = iter(DataLoader(ROWS, batch_size=10, sampler=sampler, num_workers=2))
    before = loaded(next(batches) for _ in range(5))
    assert sampler.state_dict()["position"] > 50
    state = sampler.state_dict(position=50)
    del batches
    other = MixtureSampler(SIZES, WEIGHTS, budget=BUDGET)
    other.load_state_dict(state)
    assert before + loaded(DataLoader(ROWS, batch_size=10, sampler=other, num_workers=2)) == whole


def test_a_loader_that_makes_iterators_which_it_does_not_use():
    """As the StatefulDataLoader of torchdata does: one at once, another after it has loaded the state."""
    whole = list(MixtureSampler(SIZES, WEIGHTS, budget=BUDGET))
    sampler = MixtureSampler(SIZES, WEIGHTS, budget=BUDGET)
    iter(sampler)
    sampler.load_state_dict({**sampler.state_dict(), "position": 100})
    iter(sampler)
    assert sampler.state_dict()["position"] == 100
    walk = iter(sampler)
    assert next(walk) == whole[100]
    assert sampler.state_dict()["position"] == 101
    assert list(walk) == whole[101:]


def test_another_pass_forgets_a_position():
    sampler = MixtureSampler(SIZES, WEIGHTS, budget=BUDGET)
    sampler.load_state_dict(sampler.state_dict(position=100))
    sampler.set_epoch(1)
    assert len(list(sampler)) == 441


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"budget": BUDGET + 100},
        {"num_replicas": 2},
        {"sizes": {**SIZES, "alpha": 999}},
        {"sizes": dict(reversed(SIZES.items()))},
    ],
)
def test_a_state_of_another_draw_is_refused(changed):
    state = MixtureSampler(SIZES, WEIGHTS, budget=BUDGET).state_dict()
    other = MixtureSampler(**{"sizes": SIZES, "weights": WEIGHTS, "budget": BUDGET, **changed})
    text = (
        "the saved state is of another draw; give the sampler the sizes, weights, budget, seed and number of processes "
        "that it had, or start the pass again"
    )
    with pytest.raises(DataError, match=message(text)):
        other.load_state_dict(state)


def test_ranks_positions_and_passes_that_are_not():
    with pytest.raises(ValueError, match="rank must be at least 0 and below num_replicas, got 2 of 2"):
        MixtureSampler(SIZES, WEIGHTS, num_replicas=2, rank=2)
    with pytest.raises(BudgetError, match="one pass draws 441 examples for 442 processes; raise the budget"):
        MixtureSampler(SIZES, WEIGHTS, budget=BUDGET, num_replicas=442)
    with pytest.raises(ValueError, match="the seed must be at least 0, got -1"):
        MixtureSampler(SIZES, WEIGHTS, seed=-1)
    sampler = MixtureSampler(SIZES, WEIGHTS, budget=BUDGET, num_replicas=2)
    with pytest.raises(ValueError, match="the epoch must be at least 0, got -1"):
        sampler.set_epoch(-1)
    with pytest.raises(DataError, match="the saved position must be from 0 to 220, got 221"):
        sampler.load_state_dict(sampler.state_dict(position=221))

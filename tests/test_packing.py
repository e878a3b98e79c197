import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.packing import pack


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The textbook algorithm: the room left in each sequence."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


problems = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)


@settings(max_examples=400, deadline=None)
@given(problems)
def test_packing_is_best_fit_decreasing(problem):
    lengths, capacity = problem
    offsets, documents = pack(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(documents.tolist()) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in documents[a:b]) for a, b in itertools.pairwise(offsets)]
    assert sorted(capacity - tokens for tokens in used) == best_fit_decreasing(lengths, capacity)
    assert all(used)


def test_known_packings():
    offsets, documents = pack(np.array([6, 4, 4, 3, 3, 2, 2]), 10)  # 6 + 4, 4 + 3 + 3, 2 + 2
    assert offsets.tolist() == [0, 2, 5, 7]
    assert documents.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert [array.tolist() for array in pack(np.zeros(0, dtype=np.int64), 8)] == [[0], []]


def test_real_like_lengths_fill_more_than_98_percent():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 20_000).astype(np.int64), 2, 1024)
    offsets, _ = pack(lengths, 1024)
    assert lengths.sum() / (1024 * (len(offsets) - 1)) > 0.98


def test_the_result_depends_on_the_arguments_alone():
    lengths = np.random.default_rng(1).integers(1, 100, 3_000)
    first, second = pack(lengths, 128), pack(lengths.astype(np.int32), 128)
    assert first[0].tolist() == second[0].tolist()
    assert first[1].tolist() == second[1].tolist()


@pytest.mark.parametrize("num_documents", [127, 128, 129, 32_767, 32_768, 32_769])
def test_as_many_sequences_as_documents_at_the_borders_of_the_small_types(num_documents):
    offsets, documents = pack(np.full(num_documents, 4, dtype=np.uint16), 4)
    assert (offsets == np.arange(num_documents + 1)).all()
    assert (documents == np.arange(num_documents)).all()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([3, 9, 1], "document 1 must have 1 to 8 tokens, got 9"), ([3, 0], "document 1 must have 1 to 8 tokens, got 0")],
)
def test_documents_that_cannot_be_packed_are_named(lengths, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        pack(np.array(lengths), 8)

import io
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.errors import DataError
from doremi_mix.packing import to_offsets
from doremi_mix.store import ArrayWriter, TokenStore, TokenStoreWriter
from doremi_mix.tokens import EncodedExamples
from doremi_mix.types import Domains

PAD = 7
Document = tuple[list[int], list[int]]  # ids and loss mask


def encoded(documents: list[Document], truncated: int = 0) -> EncodedExamples:
    lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
    num_tokens = lengths.copy()
    num_tokens[:truncated] += 5
    return EncodedExamples(
        token_ids=np.array([token for ids, _ in documents for token in ids], dtype=np.uint32),
        loss_mask=np.array([bit for _, mask in documents for bit in mask], dtype=np.uint8),
        offsets=to_offsets(lengths),
        num_tokens=num_tokens,
        turn_lengths=np.zeros((len(documents), 2), dtype=np.int64),
        turn_offsets=np.arange(len(documents) + 1),
    )


def write(folder, domains, held_out, *, context_length=8, vocab_size=100, batch=2):
    """Writes documents by domain; the budget counts 10 tokens more than an example has."""
    folder.mkdir(exist_ok=True)
    names = Domains(tuple(domains))
    with TokenStoreWriter(folder, names, context_length=context_length, vocab_size=vocab_size, pad_id=PAD) as writer:
        for i, documents in enumerate(domains.values()):
            for start in range(0, len(documents), batch):
                examples = encoded(documents[start : start + batch])
                writer.append(i, examples, examples.lengths + 10)
        writer.finish([np.array(flags, dtype=bool) for flags in held_out])
    return TokenStore(folder)


def expected_row(documents: list[Document], context_length: int) -> list[list[int]]:
    """One row of a batch, token by token: ids, labels, positions, documents."""
    row = []
    for number, (ids, mask) in enumerate(documents):
        for position, token in enumerate(ids):
            has_next = position + 1 < len(ids) and mask[position + 1]
            row.append([token, ids[position + 1] if has_next else -100, position, number])
    row += [[PAD, -100, 0, -1]] * (context_length - len(row))
    return [list(column) for column in zip(*row, strict=True)]


DOMAINS = {
    "b": [([1, 2, 3], [0, 1, 1]), ([4, 5, 6, 8], [0, 0, 1, 1]), ([9, 10], [0, 1]), ([11, 12, 13], [1, 1, 1])],
    "a": [([20, 21, 22, 23, 24, 25, 26, 27], [0, 0, 1, 1, 0, 0, 1, 1]), ([30, 31], [1, 1])],
}
HELD_OUT = [[False, False, True, False], [True, False]]


def test_a_known_store(tmp_path):
    store = write(tmp_path, DOMAINS, HELD_OUT)
    assert store.domains.names == ("b", "a")
    assert [store.sequence_ids(i, split) for split in ("train", "held_out") for i in range(2)] == [
        range(2),
        range(2, 3),
        range(3, 4),
        range(4, 5),
    ]
    assert store.num_sequences() == 5
    assert store.num_sequences(0) == 2
    assert store.num_sequences(1, "held_out") == 1
    assert store.sequence_lengths().tolist() == [7, 3, 2, 2, 8]
    assert [store.document_ids(i) for i in range(2)] == [range(4), range(4, 6)]
    batch = store.batch(np.array([4, 0]))
    assert batch.input_ids_BT.tolist() == [[20, 21, 22, 23, 24, 25, 26, 27], [1, 2, 3, 4, 5, 6, 8, PAD]]
    assert batch.labels_BT.tolist() == [
        [-100, 22, 23, -100, -100, 26, 27, -100],
        [2, 3, -100, -100, 6, 8, -100, -100],
    ]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch.document_ids_BT.tolist() == [[0] * 8, [0, 0, 0, 1, 1, 1, 1, -1]]
    assert batch.domain_ids_B.tolist() == [1, 0]
    assert [array.dtype for array in batch] == [np.int64, np.int64, np.int64, np.int32, np.int64]
    assert all(array.flags.writeable for array in batch)
    assert store.example_tokens.tolist() == [13, 14, 12, 13, 18, 12]
    assert store.example_held_out.tolist() == [False, False, True, False, True, False]
    assert store.available_tokens == [40, 12]
    assert (store.context_length, store.vocab_size, store.pad_id) == (8, 100, PAD)


def test_the_counts_in_domains_json(tmp_path):
    with TokenStoreWriter(tmp_path, Domains(("b",)), context_length=8, vocab_size=100, pad_id=PAD) as writer:
        writer.append(0, encoded(DOMAINS["b"], truncated=2), np.array([4, 5, 6, 7]))
        writer.finish([np.array(HELD_OUT[0])])
    assert json.loads((tmp_path / "domains.json").read_text(encoding="utf-8")) == {
        "context_length": 8,
        "vocab_size": 100,
        "pad_id": PAD,
        "token_type": "uint16",
        "domains": [
            {
                "name": "b",
                "available_tokens": 16,
                "truncated_examples": 2,
                "train": {"documents": 3, "sequences": 2, "tokens": 10, "labels": 6},
                "held_out": {"documents": 1, "sequences": 1, "tokens": 2, "labels": 1},
            }
        ],
    }


documents = st.lists(st.tuples(st.integers(2, 12), st.booleans(), st.randoms()), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(documents, min_size=1, max_size=3), st.integers(0, 99), st.integers(1, 5), st.randoms())
def test_batches_equal_documents_laid_out_one_by_one(tmp_path_factory, specification, held_seed, batch, rng):
    domains = {}
    for i, documents in enumerate(specification):
        domains[f"d{i}"] = [
            (
                [random.randrange(70_000) for _ in range(length)],
                [int(text or random.random() < 0.5) for _ in range(length - 1)] + [1],
            )
            for length, text, random in documents
        ]
    held_out = [[(j + held_seed) % 3 == 0 and j > 0 for j in range(len(part))] for part in domains.values()]
    folder = tmp_path_factory.mktemp("store")
    store = write(folder, domains, held_out, context_length=12, vocab_size=70_000, batch=batch)

    everything = [document for part in domains.values() for document in part]
    flags = [flag for part in held_out for flag in part]
    seen = []
    for split in ("train", "held_out"):
        for domain_id in range(len(domains)):
            for sequence_id in store.sequence_ids(domain_id, split):
                start, end = store.sequence_offsets[sequence_id : sequence_id + 2]
                ids = store.sequence_documents[start:end].tolist()
                assert all(flags[i] == (split == "held_out") for i in ids)
                assert all(i in store.document_ids(domain_id) for i in ids)
                seen += ids
                row = expected_row([everything[i] for i in ids], 12)
                got = store.batch(np.array([sequence_id]))
                assert [array[0].tolist() for array in got[:4]] == row
                assert got.domain_ids_B.tolist() == [domain_id]
                assert store.sequence_lengths()[sequence_id] == 12 - row[3].count(-1)
    assert sorted(seen) == list(range(len(everything)))
    # A batch in any order, with repeats, is its rows.
    ids = np.array([rng.randrange(store.num_sequences()) for _ in range(5)])
    whole = store.batch(ids)
    for name in whole._fields:
        rows = [getattr(store.batch(ids[i : i + 1]), name)[0] for i in range(5)]
        assert getattr(whole, name).tolist() == np.array(rows).tolist()


def test_the_size_of_the_appended_batches_does_not_change_a_byte(tmp_path):
    for name, batch in (("one", 1), ("three", 3)):
        write(tmp_path / name, DOMAINS, HELD_OUT, batch=batch)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "three" / file.name).read_bytes()
    assert len(list((tmp_path / "one").iterdir())) == 8


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32, np.bool_])
@pytest.mark.parametrize("sizes", [[], [0], [1], [3, 0, 7], [1_000] * 12])
def test_an_array_written_in_pieces_is_the_file_that_numpy_saves(tmp_path, dtype, sizes):
    pieces = [np.arange(size, dtype=np.int64) for size in sizes]
    writer = ArrayWriter(tmp_path / "pieces", dtype)
    for piece in pieces:
        writer.append(piece)
    mapped = writer.read()
    whole = np.concatenate([np.zeros(0, dtype=dtype), *pieces]).astype(dtype)
    saved = io.BytesIO()
    np.save(saved, whole)
    assert (tmp_path / "pieces").read_bytes() == saved.getvalue()
    assert mapped.tolist() == whole.tolist()
    assert writer.length == len(whole)
    writer.remove()
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_documents_but_for_those_of_one_domain(tmp_path):
    num_domains, num_batches = 8, 20
    examples = encoded([([1, 2], [0, 1])] * 1_000)
    domains = Domains(tuple("abcdefgh"))
    held_out = [np.arange(num_batches * 1_000) % 20 == 0] * num_domains
    after_append = []
    with TokenStoreWriter(tmp_path, domains, context_length=4, vocab_size=9, pad_id=0) as writer:
        tracemalloc.start()
        try:
            for i in range(num_domains):
                for _ in range(num_batches):
                    writer.append(i, examples, examples.lengths)
                after_append.append(tracemalloc.get_traced_memory()[0])
            tracemalloc.reset_peak()
            writer.finish(held_out)
            peak = tracemalloc.get_traced_memory()[1] - after_append[-1]
        finally:
            tracemalloc.stop()
    # One byte for each document would be 140 kB.
    assert after_append[-1] - after_append[0] < 20_000
    # 160,000 documents in all, 20,000 in a domain: some arrays of 8 bytes each for the latter.
    assert peak < 20_000 * 64


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
def test_ids_take_two_bytes_where_the_vocabulary_fits(tmp_path, vocab_size, width):
    top = vocab_size - 1
    store = write(tmp_path, {"d": [([top, 0, top], [0, 1, 1])]}, [[False]], vocab_size=vocab_size)
    assert (tmp_path / "tokens.bin").stat().st_size == 3 * width
    assert store.batch(np.array([0])).input_ids_BT[0, :3].tolist() == [top, 0, top]


def test_an_empty_batch_of_sequences(tmp_path):
    batch = write(tmp_path, DOMAINS, HELD_OUT).batch(np.zeros(0, dtype=np.int64))
    assert [array.shape for array in batch] == [(0, 8)] * 4 + [(0,)]


@pytest.mark.parametrize("ids", [[5], [-1]])
def test_sequences_that_do_not_exist_are_refused(tmp_path, ids):
    store = write(tmp_path, DOMAINS, HELD_OUT)
    with pytest.raises(IndexError, match=rf"^sequence ids must be from 0 to 4, got \[{ids[0]}\]$"):
        store.batch(np.array(ids))


def test_writing_errors_say_what_to_do(tmp_path):
    def open_writer() -> TokenStoreWriter:
        return TokenStoreWriter(tmp_path, Domains(("x", "y")), context_length=4, vocab_size=9, pad_id=0)

    good = encoded([([1, 2], [0, 1])])
    with open_writer() as writer:
        writer.append(0, good, np.array([2]))
        with pytest.raises(DataError) as caught:
            writer.append(0, encoded([([1, 2], [0, 1]), ([1, 2], [1, 0])]), np.array([2, 2]))
        assert str(caught.value) == (
            "x: example 3 has nothing to learn: expected a response token after another token, got none; "
            "remove the example"
        )
        with pytest.raises(ValueError, match=r"^an example has 5 tokens, more than the context of 4$"):
            writer.append(0, encoded([([1] * 5, [1] * 5)]), np.array([5]))
        with pytest.raises(ValueError, match=r"^there are 1 examples but 2 token counts$"):
            writer.append(0, good, np.array([2, 2]))
        with pytest.raises(DataError) as caught:
            writer.finish([np.array([False]), np.zeros(0, dtype=bool)])
        assert str(caught.value) == "y: no example to train on: expected at least 1, got none; remove the domain"
    with open_writer() as writer:
        writer.append(1, good, np.array([2]))
        with pytest.raises(ValueError, match=r"^domain 0 must come before domain 1$"):
            writer.append(0, good, np.array([2]))
    with open_writer() as writer:
        writer.append(0, good, np.array([2]))
        writer.append(1, good, np.array([2]))
        with pytest.raises(ValueError, match=r"^y has 1 examples but 0 held-out flags$"):
            writer.finish([np.array([False]), np.zeros(0, dtype=bool)])
        with pytest.raises(DataError) as caught:
            writer.finish([np.array([False]), np.array([True])])
        assert str(caught.value) == (
            "y: no example to train on: expected at least 1, got 1, all of them held out; remove the domain"
        )


def test_a_damaged_store_is_not_read(tmp_path):
    write(tmp_path, DOMAINS, HELD_OUT)
    path = tmp_path / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError) as caught:
        TokenStore(tmp_path)
    assert str(caught.value) == f"{path}: the token store is damaged: expected 44 bytes, got 42; tokenize again"

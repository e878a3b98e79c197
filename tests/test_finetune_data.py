"""The data of a fine-tune, against the contest's rule and against layouts made token by token."""

import itertools
import json
import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_baichuan import train_tiny_tokenizer

from doremi_mix import finetune_data
from doremi_mix.errors import DataError
from doremi_mix.finetune_data import (
    ExampleCounts,
    ExampleStore,
    SequenceStore,
    write_examples,
)
from doremi_mix.tokenizer import Tokenizer, load_tokenizer
from doremi_mix.tokens import CONTEST_TEMPLATE, Template
from doremi_mix.types import Example

END = 0x110000
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
BARE = Template(preamble="", turn="{query}>", separator="|")


def characters(vocab_size=END + 1):
    """One token a character, so that expected ids can be read; the last id ends a response."""
    return Tokenizer(
        name="characters",
        sha256="",
        vocab_size=vocab_size,
        end_id=vocab_size - 1,
        pad_id=0,
        control_ids=frozenset({vocab_size - 1}),
        unknown_id=None,
        encode_raw=lambda texts: [[ord(char) for char in text] for text in texts],
        control_literals=(),
    )


def example(instruction="q", output="a", input_="", **fields):
    return Example("d:1", "d", instruction, input_, output, **fields)


def write(folder, examples, domain_ids=None, *, batch=3, tokenizer=None, template=BARE, limit=64, budget=None, **more):
    """Writes examples, in batches of a few."""
    domain_ids = [0] * len(examples) if domain_ids is None else domain_ids
    batches = [(examples[i : i + batch], domain_ids[i : i + batch]) for i in range(0, len(examples), batch)]
    options = {"max_example_tokens": limit, "token_budget": budget, "skip_empty_query": False} | more
    return write_examples(batches, folder, tokenizer or characters(), template, **options)


# --- the contest's rule, in plain Python ---


def contest_encode(model, row):
    """Question and answer of a row, each piece of the template tokenized apart; None where the row is skipped."""
    query = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
    if query == "" or row["output"] == "":
        return None
    source = model.encode(PREAMBLE) + model.encode("\n\n")
    source += model.encode("### Instruction:\n" + query + "\n\n### Response:\n")
    return source, [*model.encode(row["output"]), model.eos_id()]


def contest_cut(source, target, cutoff):
    """Truncation in proportion to the lengths; a token of the answer is always left, and the question gets the rest."""
    max_target = max(1, int(cutoff * (len(target) / (len(source) + len(target)))))
    return source[: cutoff - max_target], target[:max_target]


def contest_data(encoded_rows, cutoff, budget):
    """Number, ids and labels of the rows that the contest trains on: the first that fit the budget."""
    kept = []
    num_tokens = 0
    for number, encoded in enumerate(encoded_rows):
        if encoded is None:
            continue
        source, target = contest_cut(*encoded, cutoff)
        if budget is not None and num_tokens + len(source) + len(target) > budget:
            break
        num_tokens += len(source) + len(target)
        kept.append((number, source + target, [-100] * len(source) + target))
    return kept, num_tokens


def shifted(labels):
    """What each position predicts: the label of the next one."""
    return [*labels[1:], -100]


def contest_blocks(encoded_rows, cutoff, budget, group_size):
    """The packed form of the contest: blocks of (id, label, row number), and how many fit the budget.

    The rows come in groups, whole; each group is one list, cut into blocks, and loses what is left at its end.
    """
    blocks = []
    for start in range(0, len(encoded_rows), group_size):
        tokens = []
        for number, encoded in enumerate(encoded_rows[start : start + group_size], start):
            if encoded is not None:
                source, target = encoded
                tokens += [(token, -100, number) for token in source] + [(token, token, number) for token in target]
        blocks += [tokens[i : i + cutoff] for i in range(0, len(tokens) // cutoff * cutoff, cutoff)]
    num_kept = num_tokens = 0
    for block in blocks:
        num_tokens += len(block)
        if budget is not None and num_tokens > budget:
            break
        num_kept += 1
    return blocks, num_kept


def fates(encoded_rows, blocks, num_kept, group_size):
    """How many rows are kept, or why not."""
    kept = {row for block in blocks[:num_kept] for _, _, row in block}
    end = len(encoded_rows)
    if num_kept < len(blocks):
        # The first block that does not fit ends the data: before the first row of its group of which nothing is kept.
        first = blocks[num_kept][0][2]
        end = min((first // group_size + 1) * group_size, end)
        end = next((i for i in range(first, end) if encoded_rows[i] is not None and i not in kept), end)
    counts = Counter()
    for number, encoded in enumerate(encoded_rows):
        if number in kept:
            counts["kept"] += 1
        elif number >= end:
            counts["over budget"] += 1
        else:
            counts["not usable" if encoded is None else "remainder of a group"] += 1
    return counts


def check_blocks(folder, counts, encoded_rows, cutoff, budget, group_size=1_000):
    """Compares blocks and counts with the contest's; the domain id of each row must be its number."""
    blocks, num_kept = contest_blocks(encoded_rows, cutoff, budget, group_size)
    kept = blocks[:num_kept]
    store = ExampleStore(folder)
    packed = SequenceStore(store, "blocks", cutoff)
    assert packed.lengths_S.tolist() == [cutoff] * num_kept
    batch = packed.batch(np.arange(num_kept))
    assert batch["input_ids_BT"].tolist() == [[token for token, _, _ in block] for block in kept]
    assert batch["labels_BT"].tolist() == [shifted([label for _, label, _ in block]) for block in kept]
    assert batch["position_ids_BT"].tolist() == [list(range(cutoff))] * num_kept
    assert batch["document_ids_BT"].tolist() == [[0] * cutoff] * num_kept
    predicts = batch["labels_BT"][:, :-1] != -100
    following = np.array([[number for _, _, number in block[1:]] for block in kept])
    assert batch["domain_ids_BT"][:, :-1][predicts].tolist() == following[predicts].tolist()
    assert packed.num_loss_tokens().tolist() == predicts.sum(axis=1).tolist()

    num_tokens_by_row = Counter(number for block in kept for _, _, number in block)
    assert store.domain_ids_E.tolist() == list(num_tokens_by_row)
    assert store.lengths_E.tolist() == list(num_tokens_by_row.values())
    assert counts.num_tokens_by_domain == num_tokens_by_row
    assert (counts.num_kept, counts.num_tokens) == (len(num_tokens_by_row), num_kept * cutoff)
    assert counts.num_loss_tokens == predicts.sum()
    assert counts.num_truncated == sum(
        count < sum(map(len, encoded_rows[number])) for number, count in num_tokens_by_row.items()
    )
    got = Counter(counts.skipped) + Counter({"kept": counts.num_kept})
    got["not usable"] = got.pop("empty query", 0) + got.pop("empty output", 0)
    assert +got == fates(encoded_rows, blocks, num_kept, group_size)
    return blocks, num_kept


def check_against_the_contest(folder, encoded_rows, rows, tokenizer, cutoff, budget):
    """Compares rows, tokens, ids and labels; returns the counts."""
    examples = [Example(f"d:{i}", "d", row["instruction"], row["input"], row["output"]) for i, row in enumerate(rows)]
    numbers = list(range(len(rows)))  # as domain ids, so that each example says which row it was
    counts = write(
        folder,
        examples,
        numbers,
        batch=700,
        tokenizer=tokenizer,
        template=CONTEST_TEMPLATE,
        limit=cutoff,
        budget=budget,
        skip_empty_query=True,
    )
    kept, num_tokens = contest_data(encoded_rows, cutoff, budget)
    store = ExampleStore(folder)
    assert store.domain_ids_E.tolist() == [number for number, _, _ in kept]
    assert (counts.num_kept, counts.num_tokens) == (len(kept), num_tokens)
    assert counts.num_loss_tokens == sum(label != -100 for _, _, labels in kept for label in labels)
    assert counts.num_truncated == sum(
        len(ids) < sum(map(len, encoded_rows[number])) for number, ids, _ in kept if encoded_rows[number]
    )

    rows_of = SequenceStore(store, "none", cutoff)
    for start in range(0, len(kept), 500):
        batch = rows_of.batch(np.arange(start, min(start + 500, len(kept))))
        for (_, ids, labels), got_ids, got_labels in zip(
            kept[start : start + 500], batch["input_ids_BT"].tolist(), batch["labels_BT"].tolist(), strict=True
        ):
            assert got_ids[: len(ids)] == ids
            assert got_labels == shifted(labels) + [-100] * (len(got_ids) - len(ids))

    return counts


def write_blocks(folder, rows, tokenizer, cutoff, budget, batch):
    """Writes rows as the contest's blocks, each with its number as domain id."""
    examples = [Example(f"d:{i}", "d", row["instruction"], row["input"], row["output"]) for i, row in enumerate(rows)]
    options = {"tokenizer": tokenizer, "template": CONTEST_TEMPLATE, "limit": cutoff, "budget": budget, "batch": batch}
    return write(folder, examples, range(len(rows)), skip_empty_query=True, packing="blocks", **options)


@pytest.fixture(scope="module")
def real(shared_data):
    """The contest's own rows, its tokenizer, and its encoding of the rows."""
    import sentencepiece

    folder = shared_data / "contest"
    rows = []
    for name in ("gpt4all_rows.jsonl", "mixture_rows.jsonl"):
        with (folder / name).open(encoding="utf-8") as file:
            rows += map(json.loads, file)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "baichuan2_tokenizer" / "tokenizer.model"))
    return rows, [contest_encode(model, row) for row in rows], load_tokenizer(str(folder / "baichuan2_tokenizer"))


@pytest.mark.parametrize(
    ("cutoff", "budget", "num_kept", "num_tokens"),
    [
        (1024, None, 3_231, 680_562),
        (1024, 100_000, 559, 99_947),
        (256, 400_000, 2_212, 399_833),
        (64, 100_000, 1_562, 99_968),
    ],
)
def test_real_rows_are_kept_and_cut_as_in_the_contest(tmp_path, real, cutoff, budget, num_kept, num_tokens):
    rows, encoded_rows, tokenizer = real
    counts = check_against_the_contest(tmp_path, encoded_rows, rows, tokenizer, cutoff, budget)
    assert (counts.num_kept, counts.num_tokens) == (num_kept, num_tokens)
    assert counts.skipped == ({} if budget is None else {"over budget": len(rows) - num_kept})


@pytest.mark.parametrize(
    ("cutoff", "budget", "num_blocks", "skipped"),
    [
        (1024, None, 663, {"remainder of a group": 4}),
        (256, None, 2_657, {}),
        (1024, 300_000, 292, {"remainder of a group": 2, "over budget": 1_574}),
        (256, 300_000, 1_171, {"over budget": 1_573}),
    ],
)
def test_real_rows_are_packed_as_in_the_contest(tmp_path, real, cutoff, budget, num_blocks, skipped):
    rows, encoded_rows, tokenizer = real
    counts = write_blocks(tmp_path, rows, tokenizer, cutoff, budget, batch=512)
    _, num_kept = check_blocks(tmp_path, counts, encoded_rows, cutoff, budget)
    assert (num_kept, counts.skipped) == (num_blocks, skipped)


WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog.", "{query}", "{}", "</s>", "<s>", "</td>", "###"),
    *("数据混合", "学习，模型", "1234567890", "é😀", "\t", "\n\n", "\n", " ", ""),
)


def made_up_rows(num_rows, seed=0):
    rng = random.Random(seed)

    def text(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(0, most)))

    return [
        {"instruction": "Say. " * (i % 9 > 0) + text(12), "input": text(9) if i % 3 else "", "output": text(20)}
        for i in range(num_rows)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tokenizer of Baichuan2's kind, and sentencepiece's own reading of its file."""
    import sentencepiece

    folder = train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), 500)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return load_tokenizer(str(folder)), model


@pytest.mark.parametrize(("cutoff", "budget"), [(1024, None), (256, 40_000), (128, 12_000), (64, 4_321), (8, 700)])
def test_made_up_rows_are_kept_and_cut_as_in_the_contest(tmp_path, tiny, cutoff, budget):
    tokenizer, model = tiny
    rows = made_up_rows(400)
    rows += [{"instruction": "", "input": "", "output": "x"}, {"instruction": "x", "input": "", "output": ""}]
    rows = rows[-2:] + rows
    encoded_rows = [contest_encode(model, row) for row in rows]
    counts = check_against_the_contest(tmp_path, encoded_rows, rows, tokenizer, cutoff, budget)
    assert counts.num_rows == len(rows) == counts.num_kept + sum(counts.skipped.values())
    assert counts.skipped["empty query"] >= 1
    assert counts.skipped["empty output"] >= 1
    assert ("over budget" in counts.skipped) == (budget is not None)
    assert (counts.num_truncated > 0) == (cutoff < 1024)


@pytest.mark.parametrize(("cutoff", "budget"), [(1024, None), (256, 30_000), (64, 59_999)])
def test_made_up_rows_are_packed_as_in_the_contest(tmp_path, tiny, cutoff, budget):
    tokenizer, model = tiny
    rows = made_up_rows(1_400)
    rows[0]["output"] = rows[1_000]["output"] = ""
    encoded_rows = [contest_encode(model, row) for row in rows]
    counts = write_blocks(tmp_path, rows, tokenizer, cutoff, budget, batch=700)
    blocks, num_kept = check_blocks(tmp_path, counts, encoded_rows, cutoff, budget)
    assert (0 < num_kept < len(blocks)) == (budget is not None)
    assert (0 < num_kept == len(blocks)) == (budget is None)


def test_the_windows_of_rows_do_not_move_blocks(tmp_path):
    """A window is what the mixture is read in; groups are counted from the start of the data."""
    rows = [{"instruction": "q", "input": "", "output": "a" * (i % 29)} for i in range(2_050)]
    written = []
    for batch in (1, 512, 999, 1_000, 1_001, 100_000):
        counts = write_blocks(tmp_path, rows, characters(), 1_024, 350_000, batch)
        written.append((counts, {path.name: path.read_bytes() for path in tmp_path.iterdir()}))
    assert all(other == written[0] for other in written[1:])
    source = [*map(ord, PREAMBLE + "\n\n### Instruction:\nq\n\n### Response:\n")]
    encoded_rows = [(source, [ord("a")] * (i % 29) + [END]) if i % 29 else None for i in range(2_050)]
    check_blocks(tmp_path, counts, encoded_rows, 1_024, 350_000)


# --- the budget, and what is skipped ---


def test_the_first_example_over_the_budget_ends_the_data(tmp_path):
    examples = [
        example("", "no query"),  # costs nothing
        example("q", "a" * 7),  # 10 tokens
        example("q", ""),
        example(None, "plain"),  # 6
        example("q", "a" * 20),  # 23: does not fit
        example("q", ""),  # after the end, whatever it is
        example("q", "a"),  # would fit
    ]
    for budget, kept in ((38, [1, 3]), (16, [1, 3]), (15, [1]), (39, [1, 3, 4])):
        for batch in (1, 3, 7):
            counts = write(tmp_path, examples, list(range(7)), budget=budget, batch=batch)
            assert ExampleStore(tmp_path).domain_ids_E.tolist() == kept
            skipped = {"empty query": 1, "empty output": 1, "over budget": 5 - len(kept)}
            if kept == [1, 3, 4]:
                skipped = {"empty query": 1, "empty output": 2, "over budget": 1}
            assert counts.skipped == skipped
            assert counts.num_tokens == sum({1: 10, 3: 6, 4: 23}[number] for number in kept)
            assert counts.num_tokens_by_domain == {number: {1: 10, 3: 6, 4: 23}[number] for number in kept}


def test_what_a_group_leaves_over_and_what_the_budget_does_not_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_data, "_GROUP_SIZE", 3)
    examples = [
        *(example("q", "a" * 4), example("q", ""), example("q", "aaa")),  # 7 + 6 tokens: a block of 8
        *(example("q", "a"), example("", "a"), example(None, "aa")),  # 4 + 3: none
        *(example("q", "a" * 7), example("q", "a" * 7), example("q", "")),  # 10 + 10: two blocks
    ]
    skipped = {"empty query": 1, "empty output": 2, "remainder of a group": 2}
    for budget, by_row, num_truncated, reasons in (
        (None, {0: 7, 2: 1, 6: 10, 7: 6}, 2, skipped),
        (24, {0: 7, 2: 1, 6: 10, 7: 6}, 2, skipped),
        (23, {0: 7, 2: 1, 6: 8}, 2, skipped | {"empty output": 1, "over budget": 2}),
        (15, {0: 7, 2: 1}, 1, skipped | {"empty output": 1, "over budget": 3}),
    ):
        counts = write(tmp_path, examples, range(9), batch=2, limit=8, budget=budget, packing="blocks")
        assert counts.num_tokens_by_domain == by_row
        assert (counts.num_kept, counts.num_tokens) == (len(by_row), sum(by_row.values()))
        assert (counts.num_truncated, counts.skipped) == (num_truncated, reasons)
        assert (tmp_path / "tokens.bin").stat().st_size == counts.num_tokens * 4
    for budget, limit, found, remedy in (
        (7, 8, "9 over budget", "give rows with a question and an answer, or a larger token budget"),
        (
            50_000,
            1_024,
            "1 empty query, 2 empty output, 6 remainder of a group",
            "a group of 3 rows must fill a block of 1,024 tokens: give more or longer rows, or choose another packing",
        ),
    ):
        with pytest.raises(DataError) as caught:
            write(tmp_path, examples, limit=limit, budget=budget, packing="blocks")
        assert str(caught.value) == (
            f"no example to fine-tune on: expected at least 1 of 9 rows, got 0 ({found}); {remedy}"
        )


def test_plain_text_is_an_empty_query_only_if_asked(tmp_path):
    examples = [example(None, "plain"), example("q", "a"), example("", "", "m"), example("", "a", "m")]
    kept = write(tmp_path, examples)
    assert (kept.num_kept, kept.skipped) == (3, {"empty output": 1})
    assert kept.num_loss_tokens == 5 + 2 + 2  # the first token of a plain text is predicted by none
    skipped = write(tmp_path, examples, skip_empty_query=True)
    assert (skipped.num_kept, skipped.skipped) == (2, {"plain text": 1, "empty output": 1})


def test_the_counts_are_a_file_that_a_person_can_read(tmp_path):
    rows_done = []
    counts = write(
        tmp_path,
        [example("q" * 9, "a" * 9), example("", ""), example("q", "a")],
        [4, 4, 2],
        limit=10,
        batch=2,
        advance=rows_done.append,
    )
    assert rows_done == [3]
    assert counts == ExampleCounts(
        num_rows=3,
        num_kept=2,
        skipped={"empty query": 1},
        num_tokens=14,
        num_loss_tokens=7,
        num_truncated=1,
        num_tokens_by_domain={2: 4, 4: 10},
    )
    assert ExampleStore(tmp_path).counts == counts
    assert json.loads((tmp_path / "examples.json").read_text(encoding="utf-8")) == {
        "num_rows": 3,
        "num_kept": 2,
        "skipped": {"empty query": 1},
        "num_tokens": 14,
        "num_loss_tokens": 7,
        "num_truncated": 1,
        "num_tokens_by_domain": {"2": 4, "4": 10},
        "vocab_size": END + 1,
        "pad_id": 0,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "domain_ids.npy",
        "examples.json",
        "loss_mask.bin",
        "offsets.npy",
        "tokens.bin",
    ]
    with pytest.raises(ValueError, match=r"^3 rows are not 1 kept and \{'x': 1\} skipped$"):
        ExampleCounts(3, 1, {"x": 1}, 0, 0, 0, {})


texts = st.text(alphabet="xy", max_size=30)
examples_strategy = st.lists(
    st.tuples(
        st.builds(example, st.none() | texts, texts, texts, history=st.just(()) | st.just((("h", "i"),))),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(
    examples_strategy, st.integers(2, 40), st.none() | st.integers(2, 300), st.booleans(), st.integers(1, 9), st.data()
)
def test_every_row_is_kept_or_skipped_whatever_the_batches(tmp_path_factory, pairs, limit, budget, skip, batch, data):
    first = (example("start", "here"), 0)  # something to keep
    examples, domain_ids = zip(first, *pairs, strict=True)
    budget = budget and budget + limit
    folder = tmp_path_factory.mktemp("examples")
    options = {"limit": limit, "budget": budget, "skip_empty_query": skip}
    counts = write(folder, examples, domain_ids, batch=batch, **options)
    store = ExampleStore(folder)
    assert counts.num_rows == len(examples) == counts.num_kept + sum(counts.skipped.values())
    assert counts.num_kept == len(store) == len(store.lengths_E)
    assert counts.num_tokens == store.lengths_E.sum() == sum(counts.num_tokens_by_domain.values())
    assert store.lengths_E.max() <= limit
    assert counts.num_tokens <= (budget or counts.num_tokens)
    assert ("over budget" in counts.skipped) <= (budget is not None)
    by_domain = {domain: int(store.lengths_E[store.domain_ids_E == domain].sum()) for domain in range(4)}
    assert counts.num_tokens_by_domain == {domain: count for domain, count in by_domain.items() if count}
    assert counts.num_loss_tokens == SequenceStore(store, "none", limit).num_loss_tokens().sum()
    # Neither the sizes of the batches nor those of the groups change a byte.
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_data, "_GROUP_SIZE", data.draw(st.integers(1, 5)))
        assert write(folder, examples, domain_ids, batch=batch + 1, **options) == counts
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
def test_ids_take_two_bytes_where_the_vocabulary_fits(tmp_path, vocab_size, width):
    write(tmp_path, [example("q", "a")], tokenizer=characters(vocab_size))
    assert (tmp_path / "tokens.bin").stat().st_size == 4 * width
    ids = SequenceStore(ExampleStore(tmp_path), "none", 64).batch(np.array([0]))["input_ids_BT"]
    assert ids.tolist() == [[ord("q"), ord(">"), ord("a"), vocab_size - 1, 0, 0, 0, 0]]


def test_an_attempt_that_broke_off_is_not_read_and_is_written_over(tmp_path):
    write(tmp_path, [example("q", "a" * 50)] * 9)

    def broken():
        yield [example("q", "b")], [0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_examples(
            broken(), tmp_path, characters(), BARE, max_example_tokens=9, token_budget=None, skip_empty_query=True
        )
    with pytest.raises(DataError) as caught:
        ExampleStore(tmp_path)
    path = tmp_path / "examples.json"
    assert str(caught.value) == (
        f"{path}: the fine-tune's data are not complete: expected this file, got none; write again"
    )
    write(tmp_path, [example("q", "c")])
    store = ExampleStore(tmp_path)
    assert (len(store), store.lengths_E.tolist()) == (1, [4])


def test_nothing_to_train_on_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(DataError) as caught:
        write(tmp_path, [example("", "a"), example("q", ""), example("q", "a")], budget=3)
    assert str(caught.value) == (
        "no example to fine-tune on: expected at least 1 of 3 rows, got 0 (1 empty query, 1 empty output, "
        "1 over budget); give rows with a question and an answer, or a larger token budget"
    )
    assert not (tmp_path / "examples.json").exists()
    with pytest.raises(DataError, match=r"^no example to fine-tune on: expected at least 1 of 0 rows, got 0 \(there "):
        write(tmp_path, [])
    write(tmp_path, [example("q", "a")])
    path = tmp_path / "loss_mask.bin"
    path.write_bytes(b"\0")
    with pytest.raises(DataError) as caught:
        ExampleStore(tmp_path)
    assert str(caught.value) == f"{path}: the token store is damaged: expected 4 bytes, got 1; write it again"


def test_memory_does_not_grow_with_the_examples(tmp_path):
    examples = [example("q", "a" * 20)] * 100
    peaks = []
    for num_batches in (20, 80):
        tracemalloc.start()
        try:
            options = {"max_example_tokens": 32, "token_budget": None, "skip_empty_query": True}
            write_examples(((examples, [0] * 100) for _ in range(num_batches)), tmp_path, characters(), BARE, **options)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000  # 6,000 examples more, of 23 tokens


# --- sequences ---


documents = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(0, 9)), st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=20
)


def store_of(folder, specification, limit=24):
    """Examples whose tokens are all different, with the ids, mask and domain of each."""
    count = itertools.count(1)

    def text(length):
        return "".join(chr(next(count) + 256) for _ in range(length))

    examples, expected = [], []
    for prompt, response, domain in specification:
        question = None if prompt is None else text(prompt + 1)
        answer = text(response)
        examples.append(example(question, answer))
        source = [] if question is None else [*map(ord, question), ord(">")]
        expected.append(([*source, *map(ord, answer), END], [0] * len(source) + [1] * (response + 1), domain))
    write(folder, examples, [domain for _, _, domain in specification], limit=limit)
    return ExampleStore(folder), expected


def laid_out(parts):
    """Rows of (token, label, position, document, domain of what is predicted), position by position."""
    row = []
    for number, (ids, mask, domains) in enumerate(parts):
        for i, token in enumerate(ids):
            predicts = i + 1 < len(ids) and mask[i + 1]
            row.append((token, ids[i + 1] if predicts else -100, i, number, domains[i + 1] if predicts else None))
    return row


def check_row(batch, i, row, max_tokens):
    """Compares row i of a batch with what was laid out by hand."""
    width = batch["input_ids_BT"].shape[1]
    assert width == max_tokens or width % 8 == 0
    names = ("input_ids_BT", "labels_BT", "position_ids_BT", "document_ids_BT", "domain_ids_BT")
    got = list(zip(*(batch[name][i].tolist() for name in names), strict=True))
    for values, expected in itertools.zip_longest(got, row, fillvalue=(0, -100, 0, -1, None)):
        assert values[:4] == expected[:4]
        assert expected[4] is None or values[4] == expected[4]


@settings(max_examples=80, deadline=None)
@given(documents, st.integers(24, 50), st.randoms())
def test_whole_examples_make_sequences(tmp_path_factory, specification, max_tokens, rng):
    store, expected = store_of(tmp_path_factory.mktemp("store"), specification)
    for packing in ("none", "documents"):
        sequences = SequenceStore(store, packing, max_tokens)
        first_tokens = {ids[0]: number for number, (ids, _, _) in enumerate(expected)}
        seen = []
        for i in range(sequences.num_sequences):
            batch = sequences.batch(np.array([i]))
            ids, places = batch["input_ids_BT"][0], batch["position_ids_BT"][0]
            is_start = (places == 0) & (batch["document_ids_BT"][0] >= 0)
            numbers = [first_tokens[token] for token in ids[is_start].tolist()]
            parts = [(ids, mask, [domain] * len(ids)) for ids, mask, domain in (expected[n] for n in numbers)]
            row = laid_out(parts)
            check_row(batch, 0, row, max_tokens)
            assert len(row) == sequences.lengths_S[i] <= max_tokens
            assert batch["input_ids_BT"].shape[1] == min(-(-len(row) // 8) * 8, max_tokens)
            assert sequences.num_loss_tokens()[i] == sum(label != -100 for _, label, *_ in row)
            assert len(numbers) == 1 or packing == "documents"
            seen += numbers
        assert sorted(seen) == list(range(len(expected)))
        if packing == "none":
            assert seen == sorted(seen)
        check_batches_are_their_rows(sequences, rng, max_tokens)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.none() | st.integers(0, 9), st.integers(0, 12)), max_size=25),
    st.integers(2, 30),
    st.none() | st.integers(0, 200),
    st.integers(1, 9),
    st.integers(1, 9),
    st.randoms(),
)
def test_blocks_are_cut_from_groups_end_to_end(tmp_path_factory, rows, size, budget, group_size, batch, rng):
    rows = [(9, 20), *rows]
    count = itertools.count(1)  # tokens are all different
    examples, encoded_rows = [], []
    for prompt, response in rows:
        question, answer = (
            "".join(chr(next(count) + 256) for _ in range(length)) for length in (prompt or 0, response)
        )
        examples.append(example(None if prompt is None else question, answer))
        source = [] if prompt is None else [*map(ord, question), ord(">")]
        encoded_rows.append(None if prompt == 0 or not response else (source, [*map(ord, answer), END]))
    folder = tmp_path_factory.mktemp("blocks")
    budget = None if budget is None else budget + size
    options = {"limit": size, "budget": budget, "packing": "blocks"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_data, "_GROUP_SIZE", group_size)
        counts = write(folder, examples, range(len(examples)), batch=batch, **options)
        written = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert write(folder, examples, range(len(examples)), batch=batch + 1, **options) == counts
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    check_blocks(folder, counts, encoded_rows, size, budget, group_size)
    check_batches_are_their_rows(SequenceStore(ExampleStore(folder), "blocks", size), rng, size)


def check_batches_are_their_rows(sequences, rng, max_tokens):
    """A batch in any order, with repeats, has the rows of its sequences, padded to the longest."""
    ids = [rng.randrange(sequences.num_sequences) for _ in range(5)]
    batch = sequences.batch(np.array(ids))
    width = min(-(-int(sequences.lengths_S[ids].max()) // 8) * 8, max_tokens)
    fills = {"input_ids_BT": 0, "labels_BT": -100, "position_ids_BT": 0, "document_ids_BT": -1}
    for row, sequence_id in enumerate(ids):
        alone = sequences.batch(np.array([sequence_id]))
        for name, fill in fills.items():
            own = alone[name][0].tolist()
            assert batch[name][row].tolist() == own + [fill] * (width - len(own))
        predicts = batch["labels_BT"][row, : len(own)] != -100
        domains = batch["domain_ids_BT"][row, : len(own)][predicts].tolist()
        assert domains == alone["domain_ids_BT"][0][predicts].tolist()


def test_a_known_batch_of_each_kind(tmp_path):
    examples = [example("q", "aa"), example(None, "bbb"), example("qq", "c")]
    write(tmp_path, examples, [7, 8, 9], tokenizer=characters(1_000))
    store = ExampleStore(tmp_path)
    q, a, b, c, gt, end = *map(ord, "qabc>"), 999

    none = SequenceStore(store, "none", 16)
    assert none.lengths_S.tolist() == [5, 4, 5]
    assert none.num_loss_tokens().tolist() == [3, 3, 2]
    batch = none.batch(np.array([2, 1]))
    assert {name: array.dtype for name, array in batch.items()} == {
        "input_ids_BT": np.int64,
        "labels_BT": np.int64,
        "position_ids_BT": np.int64,
        "document_ids_BT": np.int32,
        "domain_ids_BT": np.int64,
    }
    assert all(array.flags.writeable for array in batch.values())
    assert batch["input_ids_BT"].tolist() == [[q, q, gt, c, end, 0, 0, 0], [b, b, b, end, 0, 0, 0, 0]]
    assert batch["labels_BT"].tolist() == [[-100, -100, c, end] + [-100] * 4, [b, b, end] + [-100] * 5]
    assert batch["domain_ids_BT"].tolist() == [[9] * 8, [8] * 8]

    packed = SequenceStore(store, "documents", 9)
    assert packed.lengths_S.tolist() == [5, 9]
    batch = packed.batch(np.array([1]))
    assert batch["input_ids_BT"].tolist() == [[b, b, b, end, q, q, gt, c, end]]
    assert batch["labels_BT"].tolist() == [[b, b, end, -100, -100, -100, c, end, -100]]
    assert batch["position_ids_BT"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert batch["document_ids_BT"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1]]
    assert batch["domain_ids_BT"].tolist() == [[8] * 4 + [9] * 5]

    counts = write(tmp_path, examples, [7, 8, 9], tokenizer=characters(1_000), limit=6, packing="blocks")
    assert counts == ExampleCounts(3, 3, {}, 12, 6, 1, {7: 5, 8: 4, 9: 3})
    blocks = SequenceStore(ExampleStore(tmp_path), "blocks", 6)
    assert blocks.num_sequences == 2
    batch = blocks.batch(np.array([0, 1]))
    assert batch["input_ids_BT"].tolist() == [[q, gt, a, a, end, b], [b, b, end, q, q, gt]]
    # The end token predicts the plain text after it, as in any concatenation, and nothing where a prompt comes next.
    assert batch["labels_BT"].tolist() == [[-100, a, a, end, b, -100], [b, end, -100, -100, -100, -100]]
    assert batch["position_ids_BT"].tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert batch["document_ids_BT"].tolist() == [[0] * 6] * 2
    assert batch["domain_ids_BT"][0, :5].tolist() == [7, 7, 7, 7, 8]
    assert blocks.num_loss_tokens().tolist() == [4, 2]


def test_sequences_that_cannot_be_made_or_found_are_refused(tmp_path):
    write(tmp_path, [example("q", "a" * 6), example("q", "a")])
    store = ExampleStore(tmp_path)
    for packing in ("none", "documents"):
        with pytest.raises(ValueError, match=r"^an example has 9 tokens, more than a sequence of 8$"):
            SequenceStore(store, packing, 8)
    with pytest.raises(ValueError, match=r"^13 tokens are no whole number of blocks of 4$"):
        SequenceStore(store, "blocks", 4)
    sequences = SequenceStore(store, "none", 9)
    for bad in (-1, 2):
        with pytest.raises(IndexError, match=rf"^sequence ids must be from 0 to 1, got \[{bad}\]$"):
            sequences.batch(np.array([bad]))
    assert all(array.shape == (0, 0) for array in sequences.batch(np.array([], dtype=np.int64)).values())

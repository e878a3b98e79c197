"""Every column of scores against a transcription of its definition in plain Python, row by row."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.filters.text_scores import (
    TEXT_SCORES,
    flagged_words_ratio,
    parse_column,
    score_texts,
    stopwords_ratio,
)
from doremi_mix.filters.texts import example_texts

TURN = pa.struct([("user", pa.string()), ("assistant", pa.string())])
SCHEMA = pa.schema([*((name, pa.string()) for name in ("instruction", "input", "output")), ("history", pa.list_(TURN))])
FLAGS = {"placeholder_answer", "refusal_answer", "broken_turns", "answer_equals_instruction", "arithmetic"}
FLOATS = {"alnum_ratio", "special_char_ratio", "char_rep_ratio", "word_rep_ratio", "avg_line_length", "cjk_ratio"}

pieces = st.sampled_from(
    [
        "a",
        "b",
        "Ab 1",
        " ",
        ".",
        "中",
        "文字",
        "，",
        "\n",
        "\r\n",
        "é",
        "😀",
        "<br>",
        "http://a.bc",
        "1+1=2",
        "None",
        "</s>",
    ]
)
strings = st.lists(pieces, max_size=10).map("".join)
rows = st.fixed_dictionaries(
    {
        "instruction": st.none() | strings,
        "input": strings,
        "output": strings,
        "history": st.lists(st.fixed_dictionaries({"user": strings, "assistant": strings}), max_size=2),
    }
)


def batch_of(rows):
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def ratio(numerator, denominator):
    return numerator / denominator if denominator else 0.0


# One function a column, of the row and its text.  The special characters are those of the alphabet above.
DEFINITIONS = {
    "text_len": lambda row, text: len(text),
    "instruction_len": lambda row, text: len(row["instruction"] or ""),
    "output_len": lambda row, text: len(row["output"]),
    "num_turns": lambda row, text: 0 if row["instruction"] is None else len(row["history"]) + 1,
    "alnum_ratio": lambda row, text: ratio(sum(map(str.isalnum, text)), len(text)),
    "special_char_ratio": lambda row, text: ratio(sum(c in "12 .，\r\n😀<>:/+=" for c in text), len(text)),
    "avg_line_length": lambda row, text: ratio(len(text), len(text.splitlines())),
    "max_line_length": lambda row, text: max(map(len, text.splitlines()), default=0),
    "cjk_ratio": lambda row, text: ratio(sum(c in "中文字" for c in text), sum(map(str.isalnum, text))),
    "answer_equals_instruction": lambda row, text: (
        row["instruction"] is not None
        and row["output"].split() != []
        and " ".join(row["instruction"].split()).casefold() == " ".join(row["output"].split()).casefold()
    ),
}


@settings(deadline=None)
@given(st.lists(rows, max_size=5))
def test_columns_against_their_definitions(rows):
    batch = batch_of(rows)
    texts = example_texts(batch).to_pylist()
    scores = score_texts(batch, DEFINITIONS)
    for name, definition in DEFINITIONS.items():
        expected = [definition(row, text) for row, text in zip(rows, texts, strict=True)]
        assert scores[name].tolist() == np.array(expected, dtype=scores[name].dtype).tolist(), name


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=5), st.data())
def test_scores_do_not_depend_on_the_batch_nor_on_what_else_is_asked_for(rows, data):
    names = [*TEXT_SCORES, "char_rep_ratio@2", "word_rep_ratio@2"]
    batch = batch_of(rows)
    together = score_texts(batch, names)
    name = data.draw(st.sampled_from(names))
    row = data.draw(st.integers(0, len(rows) - 1))
    assert score_texts(batch.slice(row, 1), [name])[name].tolist() == [together[name][row]]


def test_types_and_order():
    names = [*TEXT_SCORES, "char_rep_ratio@5", "word_rep_ratio@3"]
    scores = score_texts(batch_of([{"instruction": "a", "input": "", "output": "b", "history": []}]), names)
    assert list(scores) == names
    for name, values in scores.items():
        base, _ = parse_column(name)
        assert values.shape == (1,)
        assert values.dtype == ("bool" if base in FLAGS else "float32" if base in FLOATS else "int32"), name


def test_an_empty_batch_has_empty_columns():
    assert {name: values.tolist() for name, values in score_texts(batch_of([]), TEXT_SCORES).items()} == {
        name: [] for name in TEXT_SCORES
    }


def test_columns_without_values_may_have_the_type_null():
    batch = pa.RecordBatch.from_pydict({"instruction": [None], "input": [None], "output": ["Text."], "history": [None]})
    scores = score_texts(batch, TEXT_SCORES)
    assert scores["text_len"].tolist() == [5]
    assert scores["instruction_len"].tolist() == [0]
    assert scores["num_turns"].tolist() == [0]


def test_words_and_repetition_of_a_chinese_and_an_english_text():
    rows = [
        {"instruction": None, "input": "", "output": "我们去公园，我们去公园。", "history": []},
        {"instruction": None, "input": "", "output": "Don't stop: one two, One two!", "history": []},
    ]
    scores = score_texts(batch_of(rows), ["num_words", "word_rep_ratio@2", "char_rep_ratio@2", "cjk_ratio"])
    assert scores["num_words"].tolist() == [10, 7]
    # Of 9 pairs, four occur twice; of 6, "one two" does.
    assert scores["word_rep_ratio@2"].tolist() == np.array([8 / 9, 2 / 6], np.float32).tolist()
    # Of 11 pairs of characters, 7 differ, 4 occur twice and floor(sqrt(7)) = 2 count; "on", "wo" ... of the other text.
    assert scores["char_rep_ratio@2"][0] == np.float32(4 / 11)
    assert scores["cjk_ratio"].tolist() == [1, 0]


def test_planted_problems_are_found_in_their_field():
    problems = {
        "placeholder_answer": {"input": "<noinput>"},
        "refusal_answer": {"output": "As an AI language model, I cannot answer."},
        "broken_turns": {"output": "Blue.\n### Instruction:\nAnother."},
        "answer_equals_instruction": {"output": "name a  COLOR."},
        "arithmetic": {"output": "1 + 2 = 3"},
        "num_urls": {"output": "https://example.com"},
        "num_html_tags": {"output": "<b>Blue</b>"},
    }
    good = {"instruction": "Name a color.", "input": "", "output": "Blue.", "history": []}
    scores = score_texts(batch_of([good, *({**good, **change} for change in problems.values())]), problems)
    for place, name in enumerate(problems, start=1):
        assert np.flatnonzero(scores[name]).tolist() == [place], name


def test_broken_turns_looks_at_earlier_turns_and_not_at_plain_text():
    rows = [
        {"instruction": "a", "input": "", "output": "b", "history": [{"user": "c", "assistant": " "}]},
        {"instruction": "a", "input": "", "output": "b", "history": [{"user": "c", "assistant": "d"}]},
        {"instruction": None, "input": "", "output": "Human: Hi\nAssistant: Hello", "history": []},
    ]
    assert score_texts(batch_of(rows), ["broken_turns"])["broken_turns"].tolist() == [True, False, False]


def test_listed_words():
    texts = pa.array(["The cat, the dog.", "我们的猫", ""])
    assert flagged_words_ratio(texts, ["the", "的", "我们"]).tolist() == [0.5, 0.5, 0.0]
    assert stopwords_ratio(texts, ["cat"]).tolist() == [0.25, 0.0, 0.0]
    assert stopwords_ratio(texts, []).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("text_len", ("text_len", None)),
        ("char_rep_ratio@5", ("char_rep_ratio", 5)),
        ("word_rep_ratio@12", ("word_rep_ratio", 12)),
    ],
)
def test_parse_column(name, expected):
    assert parse_column(name) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text_length", "unknown text score 'text_length'; did you mean 'text_len'?"),
        ("char_rep@5", "unknown text score 'char_rep@5'; did you mean 'char_rep_ratio'?"),
        ("text_len@5", "text score 'text_len' takes no parameter, got 'text_len@5'"),
        (
            "char_rep_ratio@",
            "the parameter of 'char_rep_ratio' must be a whole number from 1 on, got 'char_rep_ratio@'",
        ),
        (
            "char_rep_ratio@0",
            "the parameter of 'char_rep_ratio' must be a whole number from 1 on, got 'char_rep_ratio@0'",
        ),
        (
            "char_rep_ratio@²",
            "the parameter of 'char_rep_ratio' must be a whole number from 1 on, got 'char_rep_ratio@²'",
        ),
    ],
)
def test_unknown_columns(name, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the whole message is compared)
        score_texts(batch_of([]), [name])
    assert str(error.value) == message

"""The text of an example and its code points, against the definition in plain Python."""

from itertools import pairwise

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.filters import texts
from doremi_mix.filters.texts import code_points, example_texts

TURN = pa.struct([("user", pa.string()), ("assistant", pa.string())])
SCHEMA = pa.schema([*((name, pa.string()) for name in ("instruction", "input", "output")), ("history", pa.list_(TURN))])

# Of one, two, three and four bytes, and no surrogates, which UTF-8 has none of.
strings = st.text(
    st.one_of(st.sampled_from("ab \n"), st.sampled_from("é中😀"), st.characters(codec="utf-8")), max_size=12
)
rows = st.fixed_dictionaries(
    {
        "instruction": st.none() | strings,
        "input": strings,
        "output": strings,
        "history": st.lists(st.fixed_dictionaries({"user": strings, "assistant": strings}), max_size=3),
    }
)


def batch_of(rows):
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def text_of(row):
    """The definition."""
    if row["instruction"] is None:
        text = row["output"]
    else:
        text = row["instruction"] + " " + row["input"] + " " + row["output"]
    for turn in reversed(row["history"]):
        text = turn["user"] + " " + turn["assistant"] + " " + text
    return text


@settings(deadline=None)
@given(st.lists(rows, max_size=6), st.data())
def test_the_text_is_the_definition_also_in_a_slice(rows, data):
    start = data.draw(st.integers(0, len(rows)))
    got = example_texts(batch_of(rows).slice(start))
    assert got.type == pa.string()
    assert got.null_count == 0
    assert got.to_pylist() == [text_of(row) for row in rows[start:]]


def test_an_empty_input_leaves_two_spaces():
    row = {"instruction": "Say hello.", "input": "", "output": "Hello!", "history": []}
    assert example_texts(batch_of([row])).to_pylist() == ["Say hello.  Hello!"]


def test_a_column_of_nulls_and_a_missing_history_count_as_nothing():
    batch = pa.RecordBatch.from_pydict({"instruction": [None, None], "input": [None, None], "output": ["a", None]})
    assert example_texts(batch).to_pylist() == ["a", ""]
    batch = pa.RecordBatch.from_pydict({"instruction": ["b"], "input": [None], "output": ["a"], "history": [None]})
    assert example_texts(batch).to_pylist() == ["b  a"]


def test_large_batches_get_large_offsets(monkeypatch):
    rows = [
        {"instruction": "b", "input": "", "output": "a", "history": [{"user": "d", "assistant": "c"}]},
        {"instruction": None, "input": "", "output": "e", "history": []},
    ]
    monkeypatch.setattr(texts, "_MAX_SMALL_BYTES", 0)
    got = example_texts(batch_of(rows))
    assert got.type == pa.large_string()
    assert got.to_pylist() == ["d c b  a", "e"]


@settings(deadline=None)
@given(st.lists(st.none() | strings, max_size=8), st.data(), st.sampled_from([pa.string(), pa.large_string()]))
def test_code_points_are_those_of_python(values, data, kind):
    start = data.draw(st.integers(0, len(values)))
    stop = data.draw(st.integers(start, len(values)))
    points_N, offsets_B1 = code_points(pa.array(values, kind).slice(start, stop - start))
    assert points_N.dtype == "uint32"
    assert offsets_B1.dtype == "int64"
    assert len(offsets_B1) == stop - start + 1
    assert offsets_B1[0] == 0
    assert offsets_B1[-1] == len(points_N)
    decoded = "".join(map(chr, points_N))
    assert [decoded[a:b] for a, b in pairwise(offsets_B1)] == [value or "" for value in values[start:stop]]


def test_what_lies_under_a_null_is_no_text():
    data = pa.array(["abc", "def"])
    hidden = pa.Array.from_buffers(pa.string(), 2, [pa.py_buffer(b"\x02"), *data.buffers()[1:]])
    assert hidden.to_pylist() == [None, "def"]
    points_N, offsets_B1 = code_points(hidden)
    assert bytes(points_N.astype("uint8")) == b"def"
    assert offsets_B1.tolist() == [0, 0, 3]


@pytest.mark.parametrize("text", ["ascii", "中文"])
def test_code_points_cannot_be_written_to(text):
    with pytest.raises(ValueError, match="read-only"):
        code_points(pa.array([text])).points_N[0] = 0

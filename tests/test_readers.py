import datetime
import decimal
import gzip
import json
import random
import tracemalloc
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.errors import DataError, SourceFormatError, SourceNotFoundError
from doremi_mix.sources import readers
from doremi_mix.sources.readers import RawRow, detect_format, domain_name, find_files, read_rows, sha256_of

ROWS = [
    {"instruction": "Add 2 and 3.", "input": "", "output": "5"},
    {"instruction": "翻译：“早安” 😀", "input": "a\tb\n\\ \u2028", "output": 'He said: "hi"'},
    {"instruction": "x", "input": "", "output": "y" * 3000, "score": 0.1, "tags": ["a", "b"], "meta": {"n": 7}},
]


def pack(data: bytes, suffix: str) -> bytes:
    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix](data)


def array(rows: object) -> bytes:
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def lines(rows: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(rows: list[dict[str, object]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read_until_error(path: Path, kind: str | None = None) -> tuple[list[RawRow], str]:
    rows = []

    def read() -> None:
        for row in read_rows(path, kind):
            rows.append(row)

    with pytest.raises(SourceFormatError) as caught:
        read()
    return rows, str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("dump", [array, lines, parquet])
def test_rows_are_the_same_in_every_format_and_compression(tmp_path, dump, packed):
    rows = [row | {"score": 0.5, "tags": ["a"], "meta": {"n": None}} for row in ROWS]
    suffix = {array: ".json", lines: ".jsonl", parquet: ".parquet"}[dump]
    path = write(tmp_path / f"a{suffix}{packed}", pack(dump(rows), packed))
    got = list(read_rows(path))
    assert [row.value for row in got] == rows
    assert [row.number for row in got] == [1, 2, 3]
    assert [row.text for row in got] == [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    assert {row.problem for row in got} == {None}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(), json_values, max_size=4) | json_values, min_size=1, max_size=6),
    style=st.fixed_dictionaries({"indent": st.sampled_from([None, 0, 2]), "ensure_ascii": st.booleans()}),
    chunk_bytes=st.integers(1, 40),
    end=st.sampled_from(["", "\n", "\r\n \t"]),
)
def test_array_equals_json_loads_wherever_the_buffer_ends(tmp_path_factory, rows, style, chunk_bytes, end):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(rows, **style) + end, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK_BYTES", chunk_bytes)
        got = list(read_rows(path, "json"))
    assert [json.loads(row.text) for row in got] == rows
    assert [row.value for row in got] == [row if isinstance(row, dict) else None for row in rows]
    assert not any("\n" in row.text for row in got)


def test_array_cut_anywhere_gives_the_whole_rows_and_then_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 16)
    rows = [
        {"a": "数据\\"},
        {"a": [1.5, {"b": None}]},
        {"a": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")},
    ]
    data = json.dumps(rows).encode()
    ends = [data.index(b"}, {", 3), data.rindex(b"}, {"), len(data) - 2]  # of the last brace of each row
    for size in range(1, len(data)):
        got, message = read_until_error(write(tmp_path / "a.json", data[:size]))
        assert [row.value for row in got] == rows[: len(got)]
        num_whole = sum(size > end for end in ends)
        assert len(got) == num_whole, size
        assert message in (
            f"FILE: ends inside row {num_whole + 1:,} (the array is not closed); the file is truncated:"
            " copy or download it again",
            f"FILE: ends after row {num_whole:,} (the array is not closed); the file is truncated:"
            " copy or download it again",
        )


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("dump", [array, lines])
def test_packed_file_cut_anywhere_is_an_error_after_whole_rows(tmp_path, monkeypatch, dump, packed):
    rows = [{"a": f"{i * i * 7919 % 10_007}"} for i in range(400)]
    data = pack(dump(rows), packed)
    for size in range(4, len(data), 37):
        got, message = read_until_error(
            write(tmp_path / f"a.json{packed}", data[:size]), "json" if dump is array else "jsonl"
        )
        assert [row.value for row in got] == rows[: len(got)]
        assert message == (
            f"FILE: ends inside row {len(got) + 1} (its compressed data are cut off); the file is truncated:"
            " copy or download it again"
        )
    # What comes before the defect is not lost, so that the row can be named; Zstandard gives whole blocks.
    assert len(got) >= (300 if packed == ".gz" else 0)


def test_damaged_gzip_names_the_row_that_was_reached(tmp_path):
    rng = random.Random(0)
    data = bytearray(gzip.compress(lines([{"a": rng.randbytes(40).hex()} for _ in range(5000)])))
    assert len(data) > 2 * 65_536
    data[-8] ^= 1  # the checksum
    got, message = read_until_error(write(tmp_path / "a.jsonl.gz", bytes(data)))
    assert len(got) > 2000
    assert message == (
        f"FILE: cannot be read after row {len(got):,} (its compressed data are damaged: Error -3 while decompressing"
        " data: incorrect data check); the file is damaged: copy or download it again"
    )


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_several_frames_and_padding_are_one_file(tmp_path, packed):
    data = pack(lines(ROWS[:1]), packed) + pack(b"", packed) + pack(lines(ROWS[1:]), packed) + b"\0" * 100
    path = write(tmp_path / f"a.jsonl{packed}", data)
    assert [row.value for row in read_rows(path)] == ROWS


def test_compression_is_recognized_by_content(tmp_path):
    packed_with_plain_name = write(tmp_path / "a.json", gzip.compress(array(ROWS)))
    plain_with_packed_name = write(tmp_path / "b.json.gz", array(ROWS))
    assert [row.value for row in read_rows(packed_with_plain_name)] == ROWS
    assert [row.value for row in read_rows(plain_with_packed_name)] == ROWS


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.json", b"\xef\xbb\xbf \r\n[{}]", "json"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', "jsonl"),
        ("a.json", b'\n\n{"a": 1}', "jsonl"),
        ("a.json", b'{"messages": [{"role": "user", "content": "x"}]}', "jsonl"),
        ("a.json", b'{"a": tru\n{"a": 2}\n', "jsonl"),
        ("a.jsonl", b'[\n{"a": 1}\n]', "json"),
        ("a.jsonl", b"not json\n{}\n", "jsonl"),
        ("a.ndjson", b"{}", "jsonl"),
        ("a", b"[]", "json"),
        ("a.txt", b'{"a": 1}', "jsonl"),
        ("a.data", parquet([{"a": 1}]), "parquet"),
        ("a.JSON", b"[{}]", "json"),
        ("a.json.gz", gzip.compress(b" " * 3_000_000 + b"[{}]"), "json"),
    ],
)
def test_detect_format(tmp_path, name, data, kind):
    assert detect_format(write(tmp_path / name, data)) == kind


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"", "is empty, expected rows; fill the file or leave it out"),
        ("a.jsonl", b" \n\n", "is empty, expected rows; fill the file or leave it out"),
        ("a.json", b"[ ]\n", "holds no rows, expected at least one; fill the file or leave it out"),
        ("a.parquet", parquet([{"a": 1}][:0]), "holds no rows, expected at least one; fill the file or leave it out"),
        (
            "a.csv",
            b"id,text\n1,x\n",
            "starts with 'id,text\\n1,x\\n', which is no JSON array, JSON Lines or Parquet; supported: .json, .jsonl,"
            " .ndjson, .parquet, each also with .gz or .zst",
        ),
        ("a.json", b"\xff\xfe[\0]\0", "is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8"),
        (
            "a.json",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer, expected the data themselves; run: git lfs pull",
        ),
        (
            "a.json",
            b'{"version": 1, "data": [\n {"a": 1}\n]}',
            'is one object with a list in "data", expected the list of rows itself; extract it: jq \'.["data"]\'',
        ),
        (
            "a.json",
            b'{"data": [{"a": 1}]}',
            'is one object with a list in "data", expected the list of rows itself; extract it: jq \'.["data"]\'',
        ),
        (
            "a.json",
            b'{\n "a": 1\n}\n{\n "a": 2\n}\n',
            "is an object over several lines, expected an array of rows or a row per line; convert it: jq -c .",
        ),
        (
            "a.json",
            b'[{"a": 1}, {"a" 2}]',
            "row 2 is not JSON (expecting ':' delimiter at character 6), so the rows behind it cannot be found;"
            " repair it, or write JSON Lines, where a bad row is skipped",
        ),
        (
            "a.json",
            b'[{"a": 1}, {"a": oops, "b": "a long enough tail"}]',
            "row 2 is not JSON (expecting a value at character 7), so the rows behind it cannot be found;"
            " repair it, or write JSON Lines, where a bad row is skipped",
        ),
        (
            "a.json",
            b'[{"a": 1} {"a": 2}]',
            'row 1 is followed by "{", expected "," or "]"; repair the file, or write JSON Lines',
        ),
        (
            "a.json",
            b'[{"a": 1}]\n[{"a": 2}]',
            'the array ends with row 1, but "[" follows; keep one array per file, or write JSON Lines',
        ),
        (
            "a.json",
            b'[{"a": 1},\n]' + b" " * 20,
            "row 2 is not JSON (expecting a value at character 1), so the rows behind it cannot be found;"
            " repair it, or write JSON Lines, where a bad row is skipped",
        ),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "x',
            "ends inside row 2 (its line is not complete); the file is truncated: copy or download it again",
        ),
        (
            "a.parquet",
            parquet([{"a": 1}])[:-4],
            "cannot be read from its start (Parquet magic bytes not found in footer. Either the file is corrupted or"
            " this is not a parquet file); the file is damaged: copy or download it again",
        ),
        (
            "a.json.gz",
            b"\x1f\x8b\x08",
            "cannot be read from its start (its compressed data are cut off); copy or download it again",
        ),
    ],
)
def test_unusable_files(tmp_path, name, data, message):
    assert read_until_error(write(tmp_path / name, data))[1] == f"FILE: {message}"


def test_trailing_comma_at_the_very_end_is_an_error(tmp_path):
    rows, message = read_until_error(write(tmp_path / "a.json", b'[{"a": 1},]'))
    assert len(rows) == 1
    assert message.startswith("FILE: row 2 is not JSON")


def test_wrong_format_in_the_config(tmp_path):
    path = write(tmp_path / "a.json", lines(ROWS))
    assert read_until_error(path, "json")[1] == (
        'FILE: starts with "{", expected the "[" of a JSON array; or set its format in the config'
    )


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(SourceNotFoundError) as caught:
        next(read_rows(tmp_path / "a.json"))
    assert str(caught.value) == f"{tmp_path}/a.json: there is no such file; check the path"
    with pytest.raises(SourceFormatError) as refused:
        next(read_rows(tmp_path))
    assert str(refused.value) == f"{tmp_path}: cannot be opened (Is a directory); give a readable file"


@pytest.mark.parametrize("join", [lambda rows: b"[" + b",\n".join(rows) + b"]", b"\n".join])
def test_bad_rows_do_not_hide_good_ones(tmp_path, join):
    rows = [
        b'{"a": "x\\ud800y"}',  # half of a surrogate pair, as some scraped chats have it
        b'{"a": "\xff"}',
        b"[1, 2]",
        b"null",
        b'{"a": NaN, "b": -Infinity, "c": "NaN"}',
        b'{"a": 123456789012345678901234567890}',
        b'{"a": "last"}',
    ]
    got = list(read_rows(write(tmp_path / "a.json", join(rows)), "json" if join(rows)[:2] == b"[{" else "jsonl"))
    not_unicode = (
        "not_unicode",
        "the row must be Unicode text, got bytes that are not UTF-8 or half of a surrogate pair",
    )
    assert got == [
        RawRow(1, None, '{"a":"x\\ud800y"}', not_unicode),
        RawRow(2, None, '{"a":"\\udcff"}', not_unicode),
        RawRow(3, None, "[1,2]", ("not_an_object", "the row must be an object, got a list")),
        RawRow(4, None, "null", ("not_an_object", "the row must be an object, got null")),
        RawRow(5, {"a": None, "b": None, "c": "NaN"}, '{"a":null,"b":null,"c":"NaN"}'),
        RawRow(6, {"a": 123456789012345678901234567890}, '{"a":123456789012345678901234567890}'),
        RawRow(7, {"a": "last"}, '{"a":"last"}'),
    ]


def test_lines_count_blank_ones_and_reject_broken_ones(tmp_path):
    data = b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": 2,}\n{"a": 3} {"a": 4}\nplain \xff text\n{"a": 5}'
    assert list(read_rows(write(tmp_path / "a.jsonl", data))) == [
        RawRow(1, {"a": 1}, '{"a":1}'),
        RawRow(
            4,
            None,
            '{"a": 2,}',
            ("broken_json", "the line is not JSON: expecting property name enclosed in double quotes at character 9"),
        ),
        RawRow(5, None, '{"a": 3} {"a": 4}', ("broken_json", "the line is not JSON: extra data at character 9")),
        RawRow(
            6, None, "plain \\udcff text", ("broken_json", "the line is not JSON: expecting a value at character 1")
        ),
        RawRow(7, {"a": 5}, '{"a":5}'),
    ]


def test_deep_and_endless_lines_are_rows_with_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 300_000)
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    endless = b'{"a": "' + b"x" * 700_000 + b'"}'
    levels = b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}"  # more than orjson writes, fewer than Python reads
    got = list(read_rows(write(tmp_path / "a.jsonl", b"\n".join([deep, endless, levels, b'{"a": 1}']))))
    assert [(row.number, row.problem) for row in got] == [
        (1, ("broken_json", "the line is not JSON: it has too many levels")),
        (2, ("too_long", "a row must fit in 300,000 bytes, got a longer line")),
        (3, None),
        (4, None),
    ]
    assert [len(row.text) for row in got] == [2000, 2000, 606, 7]


def test_array_row_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 3_000_000)
    path = write(tmp_path / "a.json", b'[{"a": 1}, {"a": "' + b"x" * 20_000_000 + b'"}]')
    rows, message = read_until_error(path)
    assert len(rows) == 1
    assert message == "FILE: row 2 is longer than 3,000,000 bytes; split it or take it out"


def test_array_is_read_in_a_bounded_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1 << 16)
    path = write(tmp_path / "a.json", array([{"instruction": "i" * 200, "output": "o" * 800}] * 8000))
    assert path.stat().st_size > 8_000_000
    rows = read_rows(path, "json")
    list(islice(rows, 10))
    tracemalloc.start()
    try:
        assert sum(1 for _ in rows) == 7990
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_parquet_values_become_json(tmp_path):
    when = datetime.datetime(2024, 5, 1, 12, 30, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "time": pa.array([when], pa.timestamp("us", "UTC")),
            "day": pa.array([when.date()]),
            "price": pa.array([decimal.Decimal("1.50")]),
            "bytes": pa.array(["数".encode()], pa.binary()),
            "nan": pa.array([float("nan")]),
            "turns": pa.array([[{"role": "user", "content": "hi"}]]),
            "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            "word": pa.array(["w"]).dictionary_encode(),
            "took": pa.array([datetime.timedelta(seconds=90)]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet")
    assert row.value == {
        "time": "2024-05-01T12:30:00+00:00",
        "day": "2024-05-01",
        "price": "1.50",
        "bytes": "数",
        "nan": None,
        "turns": [{"role": "user", "content": "hi"}],
        "map": [["k", 1]],
        "word": "w",
        "took": "0:01:30",
    }
    assert json.loads(row.text) == row.value


def test_parquet_row_that_is_not_unicode_is_one_bad_row(tmp_path):
    good_and_bad = pa.array([b"a", b"\xff", b"c"])
    text = pa.StringArray.from_buffers(3, good_and_bad.buffers()[1], good_and_bad.buffers()[2])
    pq.write_table(pa.table({"a": text}), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == [
        RawRow(1, {"a": "a"}, '{"a":"a"}'),
        RawRow(2, None, "", ("not_unicode", "the row must be Unicode text, got bytes that are not UTF-8")),
        RawRow(3, {"a": "c"}, '{"a":"c"}'),
    ]


def test_parquet_rows_are_numbered_across_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_PARQUET_BATCH_ROWS", 7)
    pq.write_table(pa.table({"a": range(50)}), tmp_path / "a.parquet", row_group_size=20)
    assert [(row.number, row.value) for row in read_rows(tmp_path / "a.parquet")] == [
        (i + 1, {"a": i}) for i in range(50)
    ]


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("dolly.json", "dolly"),
        ("belle_data0.5M_cn.json", "belle_data0.5M_cn"),
        ("v1.2.jsonl.gz", "v1.2"),
        ("A.PARQUET.ZST", "A"),
        ("notes.txt", "notes"),
        ("notes.gz", "notes"),
        ("plain", "plain"),
    ],
)
def test_domain_name(name, domain):
    assert domain_name(Path("some.dir") / name) == domain


def test_find_files_passes_over_the_statistics_that_data_juicer_writes_beside_its_output(tmp_path):
    for name in ("out.jsonl", "race_stats.jsonl", "ball.jsonl", "ball_stats.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "out_stats.jsonl").write_text('{"__dj__stats__": {"text_len": 1}}\n', encoding="utf-8")
    found = [path.name for path in find_files([tmp_path])]
    assert found == ["ball.jsonl", "ball_stats.jsonl", "out.jsonl", "race_stats.jsonl"]


def test_find_files_takes_data_files_of_folders_and_any_named_file(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub.json").mkdir()
    for name in ["b.json", "a.jsonl.gz", "c.parquet", "README.md", "t.csv", "LICENSE", ".hidden.json", "sub/d.json"]:
        write(folder / name, b"{}")
    extra = write(tmp_path / "aa.txt", b"{}")
    assert find_files([extra, folder, folder / "b.json"]) == [
        folder / "a.jsonl.gz",
        extra,
        folder / "b.json",
        folder / "c.parquet",
    ]


def test_find_files_errors(tmp_path):
    def message(error: type[Exception], *paths: Path) -> str:
        with pytest.raises(error) as caught:
            find_files(paths)
        return str(caught.value).replace(str(tmp_path), "DIR")

    supported = "supported: .json, .jsonl, .ndjson, .parquet, each also with .gz or .zst"
    assert message(DataError) == f"no input is given, expected files or folders; {supported}"
    assert message(SourceNotFoundError, tmp_path / "no") == "DIR/no: there is no such file or folder; check the path"
    write(tmp_path / "README.md", b"")
    assert message(DataError, tmp_path) == f"DIR: has no data files, expected at least one; {supported}"
    (tmp_path / "sub").mkdir()
    assert message(DataError, tmp_path) == (
        "DIR: has no data files directly in it (its 1 folders are not searched), expected at least one; " + supported
    )
    write(tmp_path / "a.json", b"[]")
    write(tmp_path / "sub" / "a.jsonl.gz", b"")
    assert message(DataError, tmp_path / "sub", tmp_path) == (
        'DIR/a.json and DIR/sub/a.jsonl.gz both give the domain "a", expected one file per domain; leave one out,'
        " or name them in a config: sources: - {path: DIR/sub/a.jsonl.gz, name: ...}"
    )


def test_sha256_is_of_the_bytes_on_disk(tmp_path):
    # The first test vector of FIPS 180-2.
    assert sha256_of(write(tmp_path / "a", b"abc")) == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )

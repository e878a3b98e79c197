"""Stage load: rows in = rows kept + rows rejected with file, row and reason."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from doremi_mix.config import parse_config
from doremi_mix.distributed import Processes
from doremi_mix.errors import ConfigError, DataError, TooManyRejectedError
from doremi_mix.progress import Narrator
from doremi_mix.run import RunDirectory
from doremi_mix.stages import load as stage
from doremi_mix.stages import run_stage, stage_named
from doremi_mix.stages.load import list_sources, read_examples, read_rows, read_summary

GOOD = {"instruction": "say", "input": "it", "output": "said", "source": {"id": 7}}


def load(tmp_path, rows, **settings):
    (tmp_path / "a.jsonl").write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps([GOOD]))
    config = parse_config(
        {"sources": [{"path": "a.jsonl"}, {"path": "b.json"}], "data_root": str(tmp_path), "load": settings}
    )
    run = RunDirectory(tmp_path / "run")
    run_stage(stage_named("load"), config, run, Narrator(quiet=True), Processes())
    return run.stage_path("load")


def test_every_row_is_kept_or_rejected_with_a_reason(tmp_path):
    rows = [GOOD, {**GOOD, "output": ["x"]}, "{broken\n", {**GOOD, "output": " "}, [1], GOOD]
    folder = load(tmp_path, rows, max_rejected_share=0.9)
    summary = read_summary(folder)[0]
    assert (summary["num_rows"], summary["num_kept"]) == (6, 2)
    assert summary["rejected"] == {"wrong_type": 1, "broken_json": 1, "empty_output": 1, "not_an_object": 1}
    rejections = pq.read_table(folder / "rejections.parquet").to_pylist()
    assert [(row["row_number"], row["rule"]) for row in rejections] == [
        (2, "wrong_type"),
        (3, "broken_json"),
        (4, "empty_output"),
        (5, "not_an_object"),
    ]
    assert {row["path"] for row in rejections} == {str(tmp_path / "a.jsonl")}
    assert rejections[0]["detail"] == '"output" must be a string, got a list'
    assert json.loads(rejections[0]["row"]) == {**GOOD, "output": ["x"]}
    (examples,) = read_examples(folder, "a")
    assert [example.id for example in examples] == ["a:1", "a:6"]
    assert [json.loads(row) for chunk in read_rows(folder, "a") for row in chunk] == [GOOD, GOOD]


def test_a_large_domain_is_read_back_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "CHUNK_BYTES", 2**16)
    rng = random.Random(0)
    rows = [{"instruction": "say", "input": "", "output": rng.randbytes(2_000).hex()} for _ in range(2_000)]
    rows[5]["output"] = rows[900]["output"] = ""
    folder = load(tmp_path, rows)
    size = (folder / "a.parquet").stat().st_size
    assert size > 8e6
    at_start = pa.total_allocated_bytes()
    outputs, most = [], 0
    for texts in read_rows(folder, "a", 16):
        outputs += [json.loads(text)["output"] for text in texts]
        most = max(most, pa.total_allocated_bytes() - at_start)
    assert outputs == [row["output"] for row in rows if row["output"]]
    assert most < size / 10
    examples = [example for chunk in read_examples(folder, "a", 700) for example in chunk]
    assert [example.output for example in examples] == outputs
    assert [row["row_number"] for row in pq.read_table(folder / "rejections.parquet").to_pylist()] == [6, 901]


def test_conversations_come_back_as_they_were(tmp_path):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "see you")]
    row = {"messages": [{"role": "system", "content": "be kind"}, *({"role": r, "content": c} for r, c in turns)]}
    (example,) = next(read_examples(load(tmp_path, [row]), "a"))
    assert (example.system, example.history) == ("be kind", (("hi", "hello"),))
    assert (example.instruction, example.output) == ("bye", "see you")


def test_too_many_bad_rows_stop_the_run(tmp_path):
    with pytest.raises(TooManyRejectedError) as caught:
        load(tmp_path, [GOOD, {**GOOD, "output": ""}, {**GOOD, "output": 1}])
    assert str(caught.value) == (
        f"{tmp_path}/a.jsonl: 2 of 3 rows were rejected (66.7%, allowed 50.0%): empty_output 1, wrong_type 1; first: "
        'row 2: "output" has no text; mend the file, or raise load.max_rejected_share'
    )
    assert not (tmp_path / "run" / "load" / "manifest.json").exists()


def test_a_source_without_a_good_row_is_refused_whatever_the_share(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl: no row is left; first: row 1: "):
        load(tmp_path, [{**GOOD, "output": ""}], max_rejected_share=1.0)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (".hidden", "the domain name '.hidden' cannot name a file"),
        ("a/b", "the domain name 'a/b' cannot name a file"),
        ("line\nbreak", "the domain name 'line\\nbreak' cannot name a file"),
        ("rejections", "a domain cannot be named 'rejections'"),
    ],
)
def test_names_that_cannot_name_a_file(name, why):
    config = parse_config({"sources": [{"path": "a.json", "name": name}, {"path": "b.json"}]})
    with pytest.raises(ConfigError) as caught:
        list_sources(config)
    assert str(caught.value).startswith(f"a.json: {why}, ")
    assert str(caught.value).endswith("; set another: sources: - {path: a.json, name: ...}")


def test_the_same_name_twice():
    config = parse_config({"sources": [{"path": "x/a.json"}, {"path": "y/a.json"}]})
    with pytest.raises(ConfigError) as caught:
        list_sources(config)
    assert str(caught.value) == "sources: domain names must be unique, got 'a' twice; give one of them another name"

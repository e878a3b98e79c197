"""The mixture as a ``datasets`` folder: rows in = rows out, and a card that says what is true."""

import dataclasses
import hashlib
import json
import re

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import read_log
from huggingface_hub import HfApi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doremi_mix.dataset_card import dataset_card
from doremi_mix.dataset_folder import push, write_dataset_folder
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import DataError, ExportError, RunDirectoryError, StageNotFinishedError
from doremi_mix.run import read_json

ALLOCATION = {
    "weights": "learned",
    "unit": "tokens, after the prompt template and with the end token, examples whole",
    "token_budget": 1_000,
    "max_epochs": 4.0,
    "drawn_tokens": 990,
    "capped_domains": ["a|b"],
    "domain_key": "domain",
    "domains": {
        "a|b": {
            "weight": 0.25,
            "available_tokens": 60,
            "allocated_tokens": 240,
            "drawn_tokens": 240,
            "drawn_rows": 24,
            "epochs": 4.0,
            "share": 240 / 990,
        },
        "水": {
            "weight": 0.75,
            "available_tokens": 3_000,
            "allocated_tokens": 760,
            "drawn_tokens": 750,
            "drawn_rows": 5_000,
            "epochs": 0.25,
            "share": 750 / 990,
        },
    },
}
WEIGHTS = DomainWeights(
    {"a|b": 0.25, "水": 0.75},
    {"a|b": 0.5, "水": 0.5},
    method="doremi",
    tokenizer={"name": "/home/someone/tokenizer", "sha256": "beef"},
    provenance={
        "doremi_mix": "0.1.0",
        "torch": "2.13.0",
        "inputs": {
            "a|b": {"sha256": "aa", "num_rows": 10, "num_kept": 8},
            "水": {"sha256": "bb", "num_rows": 4_000, "num_kept": 4_000},
        },
    },
    intervals={"a|b": (0.2, 0.3), "水": (0.7, 0.8)},
    uncertainty={"num_seeds": 3},
    verdict={"kind": "better", "sentence": "Over 3 seeds, learned is better than natural.", "best": "learned"},
)
CARD = """\
---
pretty_name: Instructions
license: cc-by-4.0
size_categories:
- "1K<n<10K"
tags:
- doremi
- domain-weights
- data-mixture
configs:
- config_name: default
  data_files:
  - split: train
    path: "data/train-*.parquet"
---

# Instructions

5,024 rows, 990 tokens of 2 domains, drawn and shuffled by doremi-mix. The column `domain` says which domain a row \
comes from.

**Verdict of the comparison:** Over 3 seeds, learned is better than natural.

## Domains

| domain | weight | 95 % interval | rows | tokens | share | epochs |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| a\\|b | 0.25 | 0.2000 to 0.3000 | 24 | 240 | 0.2424 | 4.00 |
| 水 | 0.75 | 0.7000 to 0.8000 | 5,000 | 750 | 0.7576 | 0.25 |

Weights are shares of tokens. Epochs are tokens drawn over tokens available: above 1, rows are repeated.

## How it was made

- Weights: learned by doremi, seeds: 3.
- Budget: 1,000 tokens (tokens, after the prompt template and with the end token, examples whole), no domain more than \
4 times.
- Cut by that cap: a\\|b.
- Tokenizer that counted: tokenizer, sha256 `beef`.
- Versions: doremi\\_mix 0.1.0, torch 2.13.0.
- Made from `mixture.jsonl`, sha256 `cafe`.

## Inputs

| domain | rows | kept | sha256 |
| --- | ---: | ---: | ---: |
| a\\|b | 10 | 8 | `aa` |
| 水 | 4,000 | 4,000 | `bb` |

## Columns

- The columns are those of all sources; what a row does not have is null.
- JSON text, because the rows differ in its type (read it with `json.loads`): score, turns\\[\\].value.

## Loading

```python
from datasets import load_dataset

rows = load_dataset("FOLDER_OR_REPOSITORY", split="train")
```
"""


def message(text):
    return f"^{re.escape(text)}$"


def write_mixture(folder, rows, **changed):
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "mixture.jsonl").write_text(text, encoding="utf-8")
    (folder / "allocation.json").write_text(json.dumps({**ALLOCATION, **changed}), encoding="utf-8")
    return folder


def load(folder, tmp_path):
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))


def without_nulls(value):
    """A row as it is once what is not there and what is null are one, as in a table."""
    if isinstance(value, dict):
        return {key: kept for key, entry in value.items() if (kept := without_nulls(entry)) not in (None, {})}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def read_back(row, json_columns, prefix=""):
    """A row with its JSON text parsed."""
    if row is None:
        return None
    if prefix in json_columns:
        return json.loads(row)
    if isinstance(row, list):
        return [read_back(entry, json_columns, f"{prefix}[]") for entry in row]
    if isinstance(row, dict):
        return {key: read_back(entry, json_columns, f"{prefix}.{key}" if prefix else key) for key, entry in row.items()}
    return row


def assert_rows_survive(written, loaded, rows):
    back = [without_nulls(read_back(row, written.json_columns)) for row in loaded]
    assert back == [without_nulls(row) for row in rows]


def test_the_mixture_of_a_run(finished_run, tmp_path):
    weights = DomainWeights.from_dict(read_json(finished_run / "weights" / "domain_weights.json"))
    seen = []
    written = write_dataset_folder(finished_run / "mixture", tmp_path / "folder", weights=weights, advance=seen.append)
    rows = read_log(finished_run / "mixture" / "mixture.jsonl")
    assert written.path == tmp_path / "folder"
    assert (written.num_rows, written.json_columns) == (len(rows), ())
    assert sum(seen) == 2 * len(rows)
    loaded = load(written.path, tmp_path)
    assert loaded.to_list() == rows
    assert sorted(path.name for path in written.path.iterdir()) == ["README.md", "data"]
    card = (written.path / "README.md").read_text(encoding="utf-8")
    assert "**Verdict of the comparison:** these weights were not compared with plain mixtures." in card
    allocation = read_json(finished_run / "mixture" / "allocation.json")
    for name, domain in allocation["domains"].items():
        assert f"| {name} | {domain['weight']:.6g} | {domain['drawn_rows']:,} | {domain['drawn_tokens']:,} |" in card
        assert weights.provenance["inputs"][name]["sha256"] in card
    digest = hashlib.sha256((finished_run / "mixture" / "mixture.jsonl").read_bytes()).hexdigest()
    assert f"sha256 `{digest}`" in card
    # What is pushed says nothing of the machine.
    assert str(finished_run.parent) not in card
    assert "license:" not in card
    assert "the rows keep the licenses of their sources" in card


MIXED_ROWS = [
    {"text": "a", "score": 1, "tags": ["x"], "meta": {"id": 7, "more": {"k": [1, 2]}}, "domain": "a|b"},
    {
        "text": "b",
        "score": "high",
        "turns": [{"from": "user", "value": "hi"}, {"from": "gpt", "value": 3}],
        "domain": "水",
    },
    {"text": None, "score": None, "tags": [], "meta": {"id": 0.5}, "flag": True, "domain": "水"},
    {"text": "line\u2028break\n\"'|", "big": 2**62, "huge": 10**30, "half": "\ud800", "empty": {}, "domain": "水"},
    {"text": "", "big": 3, "nothing": None, "empties": [], "domain": "a|b", "": "no name", "a.b": 1},
]


def test_rows_that_differ(tmp_path):
    mixture = write_mixture(tmp_path / "mixture", MIXED_ROWS)
    written = write_dataset_folder(mixture, tmp_path / "folder")
    assert written.json_columns == ("score", "turns[].value", "huge", "half", "empty")
    assert written.shards == ("data/train-00000-of-00001.parquet",)
    loaded = load(written.path, tmp_path)
    assert_rows_survive(written, loaded, MIXED_ROWS)
    types = {name: str(feature) for name, feature in loaded.features.items()}
    assert types == {
        "text": "Value('string')",
        "score": "Value('string')",
        "tags": "List(Value('string'))",
        "meta": "{'id': Value('float64'), 'more': {'k': List(Value('int64'))}}",
        "domain": "Value('string')",
        "turns": "List({'from': Value('string'), 'value': Value('string')})",
        "flag": "Value('bool')",
        "big": "Value('int64')",
        "huge": "Value('string')",
        "half": "Value('string')",
        "empty": "Value('string')",
        "nothing": "Value('string')",
        "empties": "List(Value('string'))",
        "": "Value('string')",
        "a.b": "Value('int64')",
    }
    assert loaded[0]["score"] == "1"
    assert loaded[1]["score"] == '"high"'
    card = (written.path / "README.md").read_text(encoding="utf-8")
    assert "(read it with `json.loads`): score, turns\\[\\].value, huge, half, empty." in card


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.just("\udfff"),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=3)),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.sampled_from("abcde"), VALUES, max_size=4), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_survive(tmp_path_factory, rows):
    rows = [{**row, "domain": "x"} for row in rows]
    folder = tmp_path_factory.mktemp("any")
    written = write_dataset_folder(write_mixture(folder / "mixture", rows), folder / "out", shard_bytes=60)
    loaded = [row for shard in written.shards for row in pq.read_table(written.path / shard).to_pylist()]
    assert_rows_survive(written, loaded, rows)


def test_integers_that_a_float_would_change_stay(tmp_path):
    rows = [{"n": 2**53 + 1}, {"n": 0.5}]
    written = write_dataset_folder(write_mixture(tmp_path / "mixture", rows), tmp_path / "folder")
    assert written.json_columns == ("n",)
    assert [json.loads(row["n"]) for row in load(written.path, tmp_path)] == [2**53 + 1, 0.5]


def test_objects_that_are_mappings_of_data_become_text(tmp_path):
    rows = [{"m": {f"key-{number}": number}} for number in range(300)]
    deep = 1
    for _ in range(40):
        deep = [deep]
    rows[0]["deep"] = deep
    written = write_dataset_folder(write_mixture(tmp_path / "mixture", rows), tmp_path / "folder")
    assert written.json_columns == ("m", f"deep{'[]' * 12}")
    assert_rows_survive(written, load(written.path, tmp_path), rows)


def test_shards_share_the_rows_and_row_groups_are_small(tmp_path, monkeypatch):
    from doremi_mix import dataset_folder

    monkeypatch.setattr(dataset_folder, "GROUP_ROWS", 7)
    rows = [{"n": number, "domain": "水"} for number in range(100)]
    mixture = write_mixture(tmp_path / "mixture", rows)
    size = (mixture / "mixture.jsonl").stat().st_size
    written = write_dataset_folder(mixture, tmp_path / "folder", shard_bytes=size // 3 + 1)
    assert written.shards == tuple(f"data/train-{number:05d}-of-00003.parquet" for number in range(3))
    files = [pq.ParquetFile(written.path / name) for name in written.shards]
    assert [file.metadata.num_rows for file in files] == [33, 33, 34]
    assert [file.metadata.num_row_groups for file in files] == [5, 5, 5]
    assert load(written.path, tmp_path).to_list() == rows


def test_a_row_larger_than_a_row_group(tmp_path, monkeypatch):
    from doremi_mix import dataset_folder

    monkeypatch.setattr(dataset_folder, "GROUP_BYTES", 100)
    rows = [{"t": "x" * 150, "n": number} for number in range(3)]
    written = write_dataset_folder(write_mixture(tmp_path / "mixture", rows), tmp_path / "folder", shard_bytes=1)
    assert len(written.shards) == 3
    assert load(written.path, tmp_path).to_list() == rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "{path}: holds no rows; draw the mixture again"),
        (
            '{"a": 1}\n[1]\n',
            "{path}: row 2: must be an object, got a list; draw the mixture again",
        ),
        (
            '{"a": 1}\n{"a": \n',
            "{path}: row 2: is not JSON (Expecting value: line 2 column 1 (char 7)); draw the mixture again",
        ),
        (
            '{"\\ud800": 1}\n',
            "{path}: row 1: the key '\\ud800' has a character that no file can hold; rename it",
        ),
    ],
)
def test_a_mixture_that_was_changed_by_hand(tmp_path, text, expected):
    mixture = write_mixture(tmp_path / "mixture", [])
    (mixture / "mixture.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message(expected.replace("{path}", str(mixture / "mixture.jsonl")))):
        write_dataset_folder(mixture, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixture"]


def test_folders_that_are_not_touched(tmp_path):
    with pytest.raises(StageNotFinishedError, match=message(f"{tmp_path}: has no mixture; run: doremi-mix mixture")):
        write_dataset_folder(tmp_path, tmp_path / "folder")
    mixture = write_mixture(tmp_path / "mixture", MIXED_ROWS)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").touch()
    text = f"{tmp_path / 'folder'}: is there already and not empty; remove it, or give another folder"
    with pytest.raises(RunDirectoryError, match=message(text)):
        write_dataset_folder(mixture, tmp_path / "folder")
    (tmp_path / "folder" / "mine.txt").unlink()
    # What a killed process left is no obstacle.
    (tmp_path / ".folder.partial" / "data").mkdir(parents=True)
    write_dataset_folder(mixture, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "mixture"]
    text = f"{mixture / 'mixture.jsonl' / 'x'}: cannot be written (Not a directory); give another folder"
    with pytest.raises(RunDirectoryError, match=message(text)):
        write_dataset_folder(mixture, mixture / "mixture.jsonl" / "x")


def test_the_whole_card():
    card = dataset_card(
        ALLOCATION,
        WEIGHTS,
        num_rows=5_024,
        sha256="cafe",
        json_columns=("score", "turns[].value"),
        title="Instructions",
        license_id="cc-by-4.0",
    )
    assert card == CARD


def test_weights_that_are_not_the_learned_ones():
    uniform = {
        **ALLOCATION,
        "weights": "best",
        "domains": {name: {**domain, "weight": 0.5} for name, domain in ALLOCATION["domains"].items()},
    }
    lost = dataclasses.replace(WEIGHTS, verdict={"kind": "worse", "sentence": "It lost.", "best": "uniform"})
    card = dataset_card(uniform, lost, num_rows=1, sha256="")
    assert (
        "\n\n**These are not the learned weights.** What the comparison found of the learned ones: It lost.\n\n" in card
    )
    assert "\n- Weights: the best mixture of the comparison, uniform.\n" in card
    assert "interval" not in card
    card = dataset_card({**uniform, "weights": "/home/someone/weights.json"}, None, num_rows=1, sha256="")
    assert "\n\n**These are not the learned weights.**\n\n" in card
    assert "\n- Weights: weights.json.\n" in card
    assert "someone" not in card


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [
        (999, "n<1K"),
        (1_000, "1K<n<10K"),
        (9_999, "1K<n<10K"),
        (10_000, "10K<n<100K"),
        (100_000, "100K<n<1M"),
        (1_000_000, "1M<n<10M"),
        (999_999_999_999, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_the_size_that_the_hub_shows(num_rows, expected):
    card = dataset_card(ALLOCATION, WEIGHTS, num_rows=num_rows, sha256="")
    assert yaml.safe_load(card.split("---\n")[1])["size_categories"] == [expected]


HOSTILE = ["---", "a\n---\nlicense: mit", "yes", "1e5", "# x", "`x` | *y* <b>", "中文: 'q' \"q\"", "=1+1", "- a"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_and_titles(tmp_path, name):
    domains = {name: ALLOCATION["domains"]["水"], "水": ALLOCATION["domains"]["a|b"]}
    weights = DomainWeights({name: 0.75, "水": 0.25}, {name: 0.5, "水": 0.5})
    mixture = write_mixture(tmp_path / "mixture", [{"domain": name}], domains=domains, capped_domains=[name])
    written = write_dataset_folder(mixture, tmp_path / "folder", weights=weights, title=name)
    card = (written.path / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["pretty_name"] == name.replace("\n", "\\n")
    assert "license" not in yaml.safe_load(front)
    # One line of the table a domain, with as many cells as the head.
    lines = body.split("## Domains\n\n")[1].split("\n\n")[0].splitlines()
    assert len(lines) == 4
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert load(written.path, tmp_path).to_list() == [{"domain": name}]


class FakeHub:
    """A hub that remembers what it was asked."""

    def __init__(self, private, error=None):
        self.private, self.error, self.asked = private, error, []

    def create_repo(self, repo_id, **how):
        if self.error:
            raise self.error
        self.asked.append(("create_repo", repo_id, how))

    def repo_info(self, repo_id, **how):
        return type("Info", (), {"private": self.private})()

    def upload_folder(self, **how):
        self.asked.append(("upload_folder", how))


@pytest.fixture
def folder(tmp_path):
    return write_dataset_folder(write_mixture(tmp_path / "mixture", MIXED_ROWS), tmp_path / "folder").path


def test_push(folder):
    hub = FakeHub(private=True)
    assert push(folder, "me/mixture", api=hub) == "https://huggingface.co/datasets/me/mixture"
    assert hub.asked == [
        ("create_repo", "me/mixture", {"repo_type": "dataset", "private": True, "exist_ok": True}),
        (
            "upload_folder",
            {
                "repo_id": "me/mixture",
                "repo_type": "dataset",
                "folder_path": str(folder),
                "commit_message": "Mixture drawn by doremi-mix",
                "delete_patterns": "data/*",
            },
        ),
    ]


def test_nothing_private_is_pushed_into_a_public_repository(folder):
    hub = FakeHub(private=False)
    text = (
        "me/mixture: is public, and the mixture was to stay private; make it private on the hub, give another name, or "
        "say that it may be public"
    )
    with pytest.raises(ExportError, match=message(text)):
        push(folder, "me/mixture", api=hub)
    assert [name for name, *_ in hub.asked] == ["create_repo"]
    push(folder, "me/mixture", private=False, api=hub)
    assert [name for name, *_ in hub.asked] == ["create_repo", "create_repo", "upload_folder"]


def test_a_hub_that_refuses(folder, tmp_path):
    with pytest.raises(
        ExportError,
        match=message(f"{tmp_path}: is not a dataset folder; write one first, with a README.md and data/*.parquet"),
    ):
        push(tmp_path, "me/mixture", api=FakeHub(private=True))
    text = "me/mixture: the hub cannot take it (no route); check the name, the login (hf auth login) and the network"
    with pytest.raises(ExportError, match=message(text)):
        push(folder, "me/mixture", api=FakeHub(private=True, error=ConnectionError("no route")))
    # The real client refuses names, and everything while it is offline.
    with pytest.raises(ExportError, match=r"^a b: the hub cannot take it "):
        push(folder, "a b", api=HfApi(token="hf_x"))
    with pytest.raises(ExportError, match=r"^me/mixture: the hub cannot take it .*offline"):
        push(folder, "me/mixture", token="hf_x")

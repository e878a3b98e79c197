"""Megatron-Core reads what we export, and its own builder draws samples from files of tokens."""

import ast
import json
from pathlib import Path

import pytest
import yaml

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ExportError

from .checking import Consumer
from .environments import read_environments

CONSUMER = "megatron-core"

HOSTILE = {
    "1e5": 0.3,
    "yes": 0.2,
    "a,b": 0.1,
    "q\"u'o": 0.1,
    "a: #c": 0.1,
    "-x": 0.05,
    "中文": 0.05,
    "\\d": 0.05,
    "nan": 0.05,
}
TINY = {f"d{number}": 1e-12 for number in range(40)} | {"big": 1 - 40e-12}
MANY = {"big": 0.5} | {f"d{number}": 1 / 128 for number in range(64)}


def export_all(consumer, weights, paths):
    """Exports to the four formats; returns the exports, and the jobs by which Megatron-Core takes each."""
    by_arguments, arguments = consumer.export("megatron", weights, paths=paths)
    by_split, splits = consumer.export("megatron-per-split", weights, paths=paths)
    by_nemo, nemo = consumer.export("nemo", weights, paths=paths)
    by_bridge, bridge = consumer.export("megatron-bridge", weights, paths=paths)
    zipped = yaml.safe_load(Path(nemo[0]).read_text(encoding="utf-8"))["paths"]
    blend = ast.literal_eval(Path(bridge[0]).read_text(encoding="utf-8").partition("BLEND = ")[2])
    return [by_arguments, by_split, by_nemo, by_bridge], [
        {"how": "arguments", "path": arguments[0]},
        {"how": "per-split", "path": splits[0]},
        {"how": "zipped", "zipped": zipped},
        {"how": "blend", "blend": blend},
    ]


def write_all(folder, names, num_documents):
    paths = {name: str(folder / f"{name}_text_document") for name in names}
    return paths, {"write": dict(zip(paths.values(), num_documents, strict=True)), "num_samples": 1000}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """What Megatron-Core answers to everything that the tests ask, in one process: its import takes seconds."""
    folder = tmp_path_factory.mktemp("megatron")
    consumer = Consumer(read_environments()[CONSUMER], folder)
    jobs = {}

    paths, data = write_all(folder / "plain", ("alpha", "beta", "gamma"), (500, 100, 10))
    plain = DomainWeights({"alpha": 0.2, "beta": 0.5, "gamma": 0.3}, dict.fromkeys(paths, 1 / 3))
    exports, ways = export_all(consumer, plain, paths)
    jobs |= {f"plain {way['how']}": way | data for way in ways}

    hostile_paths, data = write_all(
        folder / "hostile", [name.replace(" ", "") for name in HOSTILE], [20] * len(HOSTILE)
    )
    hostile_paths = dict(zip(HOSTILE, hostile_paths.values(), strict=True))
    hostile = DomainWeights(HOSTILE, HOSTILE)
    jobs |= {f"hostile {way['how']}": way | data for way in export_all(consumer, hostile, hostile_paths)[1]}
    spaced_paths, data = write_all(folder / "spaced", HOSTILE, [20] * len(HOSTILE))
    jobs["spaced"] = {"how": "per-split", **data}
    jobs["spaced"]["path"] = consumer.export("megatron-per-split", hostile, paths=spaced_paths)[1][0]

    (folder / "space.txt").write_text("0.2 my data/a 0.8 my data/b\n")
    (folder / "comment.txt").write_text("# my mixture\n0.5 a 0.5 b\n")
    (folder / "two_keys.json").write_text(json.dumps({"train": ["0.5", "a", "0.5", "b"], "valid": None}))
    two, data = write_all(folder / "two", ("alpha", "beta"), (10, 10))
    without_zero = DomainWeights({"alpha": 1.0, "beta": 0.0}, {"alpha": 0.5, "beta": 0.5})
    tiny, _ = consumer.export("megatron", DomainWeights(TINY, TINY))
    jobs |= {
        "space": {"how": "arguments", "path": str(folder / "space.txt")},
        "comment": {"how": "arguments", "path": str(folder / "comment.txt")},
        "two keys": {"how": "per-split", "path": str(folder / "two_keys.json")},
        "numbers": {"how": "zipped", "zipped": ["2023", "crawl", "2024", "books"]},
        "weight 0": {"how": "blend", "blend": [list(two.values()), [1.0, 0.0]], **data},
        "without 0": {"how": "arguments", "path": consumer.export("megatron", without_zero, paths=two)[1][0], **data},
        "tiny": {"how": "schedule", "weights": list(tiny.expected.values()), "num_samples": 1000},
    }
    many, data = write_all(folder / "many", MANY, [10] * len(MANY))
    short = {"how": "arguments", "path": consumer.export("megatron", DomainWeights(MANY, MANY), paths=many)[1][0]}
    short |= data | {"num_samples": 64}
    jobs |= {"short run": short, "short run with surplus": short | {"surplus": 1.0}}
    answers = dict(zip(jobs, consumer.ask("jobs", jobs=list(jobs.values())), strict=True))
    return {"exports": exports, "paths": paths, "hostile": hostile_paths, "spaced": spaced_paths, "answers": answers}


def drawn(answer, names):
    """Returns the share of samples of each domain; the n-th one is written as the token n."""
    total = sum(answer["drawn"].values())
    return {name: answer["drawn"].get(str(number), 0) / total for number, name in enumerate(names, start=1)}


@pytest.mark.proves("megatron", "megatron-per-split", "nemo", "megatron-bridge", how="drawn")
def test_draws_the_shares_of_tokens(asked):
    answers = [asked["answers"][f"plain {how}"] for how in ("arguments", "per-split", "zipped", "blend")]
    parsed = [list(asked["paths"].values()), [0.2, 0.5, 0.3]]
    assert [answer["parsed"] for answer in answers] == [parsed, [parsed, None, None], parsed, parsed]
    for export, answer in zip(asked["exports"], answers, strict=True):
        # There is no chance in the schedule, and samples are of one length: exactly the shares of tokens.
        assert drawn(answer, asked["paths"]) == dict(export.expected) == {"alpha": 0.2, "beta": 0.5, "gamma": 0.3}


def test_draws_from_hostile_names(asked):
    for how in ("arguments", "per-split", "zipped", "blend"):
        assert drawn(asked["answers"][f"hostile {how}"], HOSTILE) == pytest.approx(HOSTILE, abs=0.001)
    assert drawn(asked["answers"]["spaced"], HOSTILE) == pytest.approx(HOSTILE, abs=0.001)


def test_trap_white_space_and_comments_in_the_arguments_file(asked, consumer):
    # All words become prefixes, and the weights are gone without a word.
    assert asked["answers"]["space"] == [["0.2", "my", "data/a", "0.8", "my", "data/b"], None]
    assert asked["answers"]["comment"] == [["#", "my", "mixture", "0.5", "a", "0.5", "b"], None]
    with pytest.raises(ExportError, match=r"^megatron: the path of domain 'a: #c' has a space"):
        consumer.export("megatron", DomainWeights(HOSTILE, HOSTILE), paths=asked["spaced"])
    export, _ = consumer.export("megatron", DomainWeights(HOSTILE, HOSTILE), paths=asked["hostile"])
    assert len(export.files[0].text.split()) == 2 * len(HOSTILE)


def test_trap_prefixes_that_look_like_numbers(asked):
    # Four prefixes, and Megatron sees two with weights.  Ours has a weight before each, whatever the prefix is.
    assert asked["answers"]["numbers"] == [["crawl", "books"], [2023.0, 2024.0]]
    assert asked["answers"]["hostile arguments"]["parsed"][0] == list(asked["hostile"].values())


def test_trap_two_keys_of_the_per_split_file(asked):
    assert asked["answers"]["two keys"] == {"error": "KeyError: 'test'"}
    assert asked["answers"]["plain per-split"]["parsed"][1:] == [None, None]


def test_trap_weight_0(asked):
    assert asked["answers"]["weight 0"] == {"error": "AssertionError: "}
    assert asked["answers"]["without 0"]["drawn"] == {"1": 1000}


def test_shares_far_below_one_sample_move_the_schedule_by_one(asked):
    assert asked["answers"]["tiny"] == [1] + [0] * 39 + [999]


def test_a_short_run_of_many_domains_needs_a_surplus(asked, consumer):
    """What the notes of the export say: samples are rounded up by domain, and the large one has too few built."""
    assert "The train blend oversamples the contributing datasets" in asked["answers"]["short run"]["error"]
    counts = asked["answers"]["short run with surplus"]["drawn"]
    assert counts["1"] == pytest.approx(32, abs=1)
    export, _ = consumer.export("megatron", DomainWeights(MANY, MANY))
    assert "raise mid_level_dataset_surplus" in export.notes[-1]

"""Stage export, and the command that writes one export from a file of weights."""

import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

from doremi_mix.cli import app
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.export_files import all_formats
from doremi_mix.exporters import FORMATS
from doremi_mix.run import RunDirectory
from doremi_mix.stages.training import open_store
from doremi_mix.types import DomainStatistics


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run_dir(finished_run, tmp_path):
    """A copy of a finished run, to write into."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def weights_json(tmp_path):
    """Weights over a corpus: 10, 20 and 40 tokens an example."""
    corpus = {
        "short": DomainStatistics(100, 1000, 10, "short.jsonl", 110),
        "middle": DomainStatistics(100, 2000, 20, "middle.jsonl", 100),
        "long": DomainStatistics(100, 4000, 40, "long.jsonl", 100),
    }
    weights = DomainWeights(
        {"short": 0.25, "middle": 0.25, "long": 0.5},
        dict.fromkeys(corpus, 1 / 3),
        corpus=corpus,
        verdict={"kind": "worse", "sentence": "natural is better by .1", "best": "natural"},
    )
    path = tmp_path / "domain_weights.json"
    path.write_text(json.dumps(weights.to_dict()), encoding="utf-8")
    return path


def test_the_stage_writes_every_format_with_what_to_expect(run_dir):
    result = invoke("export", "--run-dir", run_dir, "--set", "export.formats=[trl,csv,llama-factory]")
    assert result.exit_code == 0, result.stderr
    exports = json.loads((run_dir / "export" / "exports.json").read_text())["formats"]
    assert list(exports) == ["trl", "csv", "llama-factory"]
    allocation = json.loads((run_dir / "mixture" / "allocation.json").read_text())
    for name, written in exports.items():
        assert written["usage"]
        for path in written["files"]:
            assert (run_dir / "export" / path).stat().st_size > 0
        expected = json.loads((run_dir / "export" / name / f"{name}.expected.json").read_text())
        assert expected["budget"] == allocation["token_budget"] == 5000
        # The same tokens of each domain as the run's own mixture was allocated.
        assert {n: d["tokens"] for n, d in expected["domains"].items()} == {
            n: d["allocated_tokens"] for n, d in allocation["domains"].items()
        }
    again = invoke("export", "--run-dir", run_dir)
    assert "export: up to date" in again.stderr
    assert invoke("status", "--run-dir", run_dir).stdout.count("export") == 1


def test_the_stage_writes_the_rows_that_are_trained_on(run_dir, corpus):
    result = invoke("export", "--run-dir", run_dir, "--format", "llama-factory", "--set", "export.data=true")
    assert result.exit_code == 0, result.stderr
    domains = json.loads((run_dir / "tokenize" / "domains.json").read_text())["domains"]
    info = json.loads((run_dir / "export" / "llama-factory" / "dataset_info.json").read_text())
    store = open_store(RunDirectory(run_dir))
    for number, domain in enumerate(domains):
        name = domain["name"]
        path = run_dir / "export" / "data" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        source = json.loads((corpus / f"{name}.json").read_text(encoding="utf-8"))
        # No row of these sources is rejected, so that held-out examples are found by their place.
        documents = store.document_ids(number)
        held_out = store.example_held_out[documents.start : documents.stop]
        assert held_out.any()
        trained_on = [row for row, out in zip(source, held_out, strict=True) if not out]
        alpaca = [{key: row[key] for key in ("instruction", "input", "output")} for row in rows]
        assert sorted(alpaca, key=str) == sorted(trained_on, key=str)
        assert alpaca != trained_on, "programs that take the first rows must not get those of one kind"
        for row in rows:
            assert list(row) == ["instruction", "input", "output", "system", "messages", "domain"]
            assert row["messages"] == [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        assert any(entry["file_name"] == str(path) for entry in info.values())


def test_exports_are_written_anew_when_the_verdict_is_known(run_dir):
    assert invoke("export", "--run-dir", run_dir, "--format", "csv").exit_code == 0
    RunDirectory(run_dir).outdate("export")
    assert json.loads(invoke("status", "--run-dir", run_dir, "--json").stdout)["export"] == "outdated"
    weights = run_dir / "weights" / "domain_weights.json"
    data = json.loads(weights.read_text())
    weights.write_text(json.dumps({**data, "verdict": {"kind": "better", "sentence": "it helps", "best": "learned"}}))
    result = invoke("export", "--run-dir", run_dir)
    assert "verdict: it helps" in result.stderr
    assert json.loads((run_dir / "export" / "csv" / "csv.expected.json").read_text())["verdict"] == "it helps"


def test_other_weights_than_the_learned_ones_do_not_get_their_verdict(run_dir):
    (run_dir / "compare").mkdir()
    results = {"verdict": "natural is better", "pairs": []}
    (run_dir / "compare" / "results.json").write_text(json.dumps(results), encoding="utf-8")
    result = invoke("export", "--run-dir", run_dir, "--format", "yaml", "--set", "mixture.weights=uniform")
    assert result.exit_code == 0, result.stderr
    (text,) = (run_dir / "export" / "yaml").glob("*.yaml")
    assert (
        "# Verdict of the comparison: these are not the learned weights, but mixture.weights=uniform; what was found "
        "of the mixtures that were compared: natural is better\n"
    ) in text.read_text(encoding="utf-8")


def test_the_natural_mixture_is_exported_when_that_is_what_is_drawn(run_dir):
    result = invoke(
        *("export", "--run-dir", run_dir, "--format", "csv", "--set", "mixture.weights=natural"),
        *("--set", "mixture.token_budget=null"),
    )
    assert result.exit_code == 0, result.stderr
    domains = json.loads((run_dir / "tokenize" / "domains.json").read_text())["domains"]
    total = sum(domain["available_tokens"] for domain in domains)
    expected = json.loads((run_dir / "export" / "csv" / "csv.expected.json").read_text())
    assert expected["budget"] is None
    for domain in domains:
        share = expected["domains"][domain["name"]]["token_share"]
        assert share == pytest.approx(domain["available_tokens"] / total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "export.formats=[]"], "export.formats is empty; name some, for example: --set export.formats=["),
        (["--format", "trll"], "unknown format 'trll'; did you mean trl?"),
        (["--format", "trl", "--budget", "5"], "--budget does not go with --run-dir; give --set mixture.token_budget"),
        (["--format", "trl", "--max-epochs", "2"], "--max-epochs does not go with --run-dir; give --set mixture.max"),
        (["--format", "trl", "--out", "x"], "--out does not go with --run-dir; give another --run-dir"),
        (
            ["--format", "trl", "--set", "export.paths=nowhere.yaml"],
            "paths 'nowhere.yaml': neither a template with {name}",
        ),
    ],
)
def test_what_the_stage_cannot_do_is_one_line(run_dir, arguments, message):
    result = invoke("export", "--run-dir", run_dir, *arguments)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.removeprefix("error: ").startswith(message)
    assert not (run_dir / "export").exists()


def test_a_file_of_weights_becomes_one_export(weights_json, tmp_path):
    out = tmp_path / "mix.yaml"
    result = invoke("export", weights_json, "--format", "trl", "--out", out, "--budget", 4000)
    assert result.exit_code == 0, result.stderr
    assert yaml.safe_load(out.read_text())["datasets"]
    header = [line for line in out.read_text().splitlines() if line.startswith("#")]
    assert "# Budget: 4,000 tokens, planned for at most 4 passes over a domain." in header
    assert "# Verdict of the comparison: natural is better by .1" in header
    expected = json.loads((tmp_path / "mix.yaml.expected.json").read_text())
    assert {name: domain["examples"] for name, domain in expected["domains"].items()} == {
        "short": 100,
        "middle": 50,
        "long": 50,
    }
    assert f"wrote {out}" in result.stderr
    assert "verdict: natural is better by .1" in result.stderr
    assert "use it: " in result.stderr
    again = invoke("export", weights_json, "--format", "trl", "--out", out)
    assert again.stderr == f"error: {out}: exists already; choose another --out, or say --overwrite\n"
    assert invoke("export", weights_json, "--format", "trl", "--out", out, "--overwrite").exit_code == 0


def test_weights_of_an_older_run_take_the_corpus_beside_them(run_dir, tmp_path):
    weights = run_dir / "weights" / "domain_weights.json"
    new = invoke("export", weights, "--format", "ms-swift", "--budget", "3000").stdout
    data = json.loads(weights.read_text())
    assert data.pop("corpus")
    weights.write_text(json.dumps(data))
    assert invoke("export", weights, "--format", "ms-swift", "--budget", "3000").stdout == new
    elsewhere = tmp_path / "copied.json"
    elsewhere.write_text(json.dumps(data))
    assert "--corpus RUN_DIR" in invoke("export", elsewhere, "--format", "ms-swift", "--budget", "3000").stderr
    with_corpus = invoke("export", elsewhere, "--format", "ms-swift", "--budget", "3000", "--corpus", run_dir)
    assert with_corpus.stdout == new


def test_without_out_the_text_goes_to_stdout(weights_json):
    result = invoke("export", weights_json, "--format", "trl")
    assert result.exit_code == 0, result.stderr
    assert len(yaml.safe_load(result.stdout)["datasets"]) == 3
    as_json = json.loads(invoke("export", weights_json, "--format", "trl", "--json").stdout)
    (text,) = as_json["files"].values()
    assert text == result.stdout


def test_a_slash_at_the_end_makes_a_folder_with_room_for_several_formats(weights_json, tmp_path):
    for name in ("trl", "oumi"):
        result = invoke("export", weights_json, "--format", name, "--out", f"{tmp_path}/new/mix/", "--budget", "4k")
        assert result.exit_code == 0, result.stderr
    assert {path.name for path in (tmp_path / "new" / "mix").iterdir()} == {
        *("trl.yaml", "trl.expected.json", "oumi.yaml", "oumi.expected.json")
    }


def test_what_the_budget_did_is_said(weights_json, tmp_path):
    result = invoke("export", weights_json, "--format", "megatron", "--budget", "1", "--out", tmp_path / "blend.txt")
    assert "note: Left out, because nothing of them is to be drawn: short, middle.\n" in result.stderr
    assert "note: Paths such as tokenized/{name}_text_document are placeholders for data in" in result.stderr
    result = invoke("export", weights_json, "--format", "trl", "--budget", "15,000", "--max-epochs", "3")
    assert "note: Cut by the epoch cap: " in result.stderr
    assert "note: The files have 10 rows that the run rejected, filtered or holds out; they can be drawn, too." in (
        result.stderr
    )


def test_a_format_comes_beside_those_that_are_there(run_dir):
    assert invoke("export", "--run-dir", run_dir, "--format", "csv").exit_code == 0
    result = invoke("export", "--run-dir", run_dir, "--format", "trl", "--json")
    assert list(json.loads(result.stdout)) == ["csv", "trl"]
    assert invoke("export", "--run-dir", run_dir, "--set", "export.formats=[trl,trl]", "--json").exit_code == 0
    assert sorted(path.name for path in (run_dir / "export").glob("*/")) == ["trl"]


def test_a_run_that_was_moved_exports_anew(run_dir):
    invoke("export", "--run-dir", run_dir, "--format", "trl", "--set", "export.data=true")
    moved = run_dir.rename(run_dir.with_name("moved"))
    result = invoke("export", "--run-dir", moved)
    assert (result.exit_code, "up to date" in result.stderr) == (0, False)
    text = (moved / "export" / "trl" / "trl.yaml").read_text()
    assert f"{moved}/export/data/fruit.jsonl" in text
    assert str(run_dir) not in text


def test_formats_of_counts_say_which_budget_they_took(weights_json):
    result = invoke("export", weights_json, "--format", "ms-swift")
    assert "note: No budget was given; 7,000 tokens are one pass over the domains.\n" in result.stderr
    # What the weights were learned for, as far as the epoch cap goes: three passes over 1,000 + 2,000 + 4,000 tokens.
    data = json.loads(weights_json.read_text())
    for learned_for, epochs, counted in (
        (5000, 4, "5,000 tokens are what the weights were learned for"),
        (10**9, 3, "21,000 tokens are the most that --max-epochs allows"),
        (None, 0.5, "3,500 tokens are the most that --max-epochs allows"),
    ):
        data["settings"] = {"proxy": {"token_budget": learned_for}}
        weights_json.write_text(json.dumps(data))
        result = invoke("export", weights_json, "--format", "ms-swift", "--max-epochs", epochs)
        assert f"note: No budget was given; {counted}.\n" in result.stderr


def test_the_line_to_use_names_the_file_that_was_written(weights_json, tmp_path):
    result = invoke("export", weights_json, "--format", "trl", "--out", tmp_path / "my mix.yaml")
    assert f"use it: trl sft --config '{tmp_path}/my mix.yaml' --model_name_or_path MODEL\n" in result.stderr
    result = invoke("export", weights_json, "--format", "olmo-core", "--out", tmp_path / "my olmo.yaml")
    assert f'SourceMixtureList.from_yaml("{tmp_path}/my olmo.yaml")' in result.stderr
    result = invoke("export", weights_json, "--format", "datasets", "--out", tmp_path / "drawn.py")
    assert "use it: from drawn import build" in result.stderr


def test_weights_of_another_pipeline_need_what_there_is_of_each_domain(tmp_path, weights_json, finished_run):
    foreign = tmp_path / "doremi.json"
    shares = {"short": 0.2, "middle": 0.3, "long": 0.5}
    foreign.write_text(json.dumps({"train_domain_weights": shares, "eval_domain_weights": shares}))
    result = invoke("export", foreign, "--format", "ms-swift", "--budget", 100)
    assert result.exit_code == 1
    assert "--corpus RUN_DIR" in result.stderr
    assert "Traceback" not in result.stderr
    result = invoke("export", foreign, "--format", "ms-swift", "--budget", 4000, "--corpus", weights_json)
    assert result.exit_code == 0, result.stderr
    # 800 / 10, 1200 / 20, 2000 / 40
    assert [path.partition("#")[2] for path in yaml.safe_load(result.stdout)["dataset"]] == ["80", "60", "50"]
    result = invoke("export", foreign, "--format", "csv", "--corpus", finished_run)
    assert f"{finished_run}: knows nothing of domain 'short' of {foreign}" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--format NAME is missing; for example: doremi-mix export domain_weights.json --format trl"),
        (
            ["--format", "trl", "--paths", "tok/{domain}"],
            "paths 'tok/{domain}': neither a template with {name}, such as data/{name}.jsonl, nor a file",
        ),
        (
            ["--format", "trl", "--corpus", "nowhere"],
            "nowhere: cannot be read (No such file or directory); give another",
        ),
        (["--format", "trl", "--out", ""], "--out is empty; give a file or a folder, or leave it out"),
        (["--format", "llama-factory", "--out", "x.yaml"], "llama-factory has several files (llama_factory.yaml, "),
        (["--format", "trl", "--budget", "many"], "'many' is no count; give a whole number of at least 1"),
        (["--format", "ms-swift", "--max-epochs", "nan"], "max_epochs must be finite and above 0, got nan; change"),
        (
            ["--format", "ms-swift", "--budget", "1M", "--budget-unit", "examples"],
            "example budget 1,000,000 is impossible: 300 examples in domains",
        ),
        (["--format", "trl", "--max-epochs", "0"], "max_epochs must be finite and above 0, got 0.0; change max_epochs"),
        (["--format", "trl", "--budget", "1000000"], "token budget 1,000,000 is impossible: 7,000 tokens in domains"),
        (["--format", "trl", "--set", "export.seed=1"], "--set goes with --run-dir; give that, or leave --set out"),
        (["--format", "megatron", "--paths", "/a b/{name}"], "megatron: the path of domain 'short' has a space"),
    ],
)
def test_what_cannot_be_exported_is_one_line(weights_json, arguments, message):
    result = invoke("export", weights_json, *arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")


def test_the_list_names_every_format_with_its_meaning():
    rows = json.loads(invoke("export", "--list", "--json").stdout)
    assert [row["format"] for row in rows] == list(FORMATS)
    assert all(row["unit"] in ("tokens", "sequences", "examples") for row in rows)
    assert {row["proof"] for row in rows} <= {"drawn", "parsed", "golden"}
    shown = invoke("export", "--list").stdout
    assert all(name in shown for name in FORMATS)


def test_other_packages_add_formats(monkeypatch):
    from importlib.metadata import EntryPoint

    import doremi_mix.export_files as files
    from doremi_mix.errors import ConfigError

    def with_point(value):
        point = EntryPoint(name="mine", value=value, group="doremi_mix.exporters")
        monkeypatch.setattr(files, "entry_points", lambda group: [point])

    import sys
    import types
    from dataclasses import replace

    module = types.ModuleType("their_exporters")
    module.ROW = replace(FORMATS["csv"], name="theirs")
    module.TAKEN = [FORMATS["csv"]]
    module.WRONG = 5
    monkeypatch.setitem(sys.modules, "their_exporters", module)
    with_point("their_exporters:ROW")
    assert all_formats()["theirs"].write is FORMATS["csv"].write
    for value, message in (
        ("their_exporters:TAKEN", "takes the name 'csv', which is taken already"),
        ("their_exporters:WRONG", "is no doremi_mix.exporters.Format, nor a list of them"),
        ("their_exporters:NONE", "cannot be loaded"),
    ):
        with_point(value)
        with pytest.raises(ConfigError, match=message):
            all_formats()


def test_the_mixture_becomes_a_dataset_folder(finished_run, tmp_path):
    from datasets import load_dataset

    result = invoke("dataset", "--run-dir", finished_run, "--out", tmp_path / "hub", "--title", "Fruit and metal")
    assert result.exit_code == 0, result.stderr
    mixture = (finished_run / "mixture" / "mixture.jsonl").read_text(encoding="utf-8").splitlines()
    assert result.stdout.startswith(f"{tmp_path / 'hub'}: {len(mixture):,} rows in 1 file, with a dataset card")
    rows = load_dataset(str(tmp_path / "hub"), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(rows) == [json.loads(line) for line in mixture]
    assert "# Fruit and metal" in (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    again = invoke("dataset", "--run-dir", finished_run, "--out", tmp_path / "hub")
    assert (again.exit_code, again.stderr.count("\n")) == (1, 1)
    assert "is there already and not empty" in again.stderr

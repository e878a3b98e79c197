"""The command line as a person meets it: one line per mistake, nothing half-made, JSON for machines."""

import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

from doremi_mix.cli import app
from doremi_mix.run import RunDirectory

ROWS = [{"instruction": f"say {i}", "output": f"said {i} times"} for i in range(40)]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(ROWS))
    return tmp_path


@pytest.fixture(scope="module")
def fast(small_settings):
    return [
        text
        for section, settings in small_settings.items()
        for key, value in settings.items()
        for text in ("--set", f"{section}.{key}={value}")
    ]


def assert_one_line(result, message):
    assert result.exit_code == 1, result.output + result.stderr
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert errors == [f"error: {message}"]
    assert result.stderr.splitlines()[-1] == errors[0]


def broken_inputs():
    """(name, what to make of the folder, arguments, whole message)."""

    def write(name, text):
        return lambda folder: (folder / name).write_text(text)

    cases = {
        "missing": (lambda folder: None, ["{0}/none.json", "{0}/b.json"], "{0}/none.json: "),
        "empty": (write("a.json", ""), ["{0}/a.json", "{0}/b.json"], "{0}/a.json: "),
        "truncated": (write("a.json", json.dumps(ROWS)[:-20]), ["{0}/a.json", "{0}/b.json"], "{0}/a.json: "),
        "wrong schema": (write("a.json", '[{"x": "1", "y": "2"}]'), ["{0}/a.json", "{0}/b.json"], "{0}/a.json: "),
        "single domain": (lambda folder: None, ["{0}/a.json"], "{0}/a.json: is the only domain; "),
        "no data in folder": (lambda folder: (folder / "sub").mkdir(), ["{0}/sub"], "{0}/sub: "),
        "twice": (write("a.jsonl", json.dumps(ROWS[0]) + "\n"), ["{0}"], "{0}/a.json"),
    }
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize(("prepare", "arguments", "start"), broken_inputs())
@pytest.mark.parametrize("dry", [True, False])
def test_bad_inputs(files, tmp_path_factory, fast, prepare, arguments, start, dry):
    prepare(files)
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    arguments = [argument.format(files) for argument in arguments]
    result = invoke("learn", *arguments, "--run-dir", run_dir, *fast, *(["--dry-run"] if dry else []))
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: " + start.format(files)), last
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert not (run_dir / "load" / "manifest.json").exists()
    assert dry is False or not run_dir.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("proxy.step_sise=1", "settings: unknown key proxy.step_sise; did you mean proxy.step_size?"),
        ("proxy.steps=0", "settings: proxy.steps must be greater than or equal to 1, got 0"),
        ("proxy.steps", "--set proxy.steps: expected key=value, for example --set proxy.steps=200"),
        ("proxy.step_size=.inf", "settings: proxy.step_size must be a finite number, got inf"),
        (
            "reference.weights=5",
            "settings: reference.weights must be natural, uniform or a mapping of domain to weight, got 5",
        ),
        (
            "reference.weights={a: 1}",
            "reference.weights: 'b' is missing from the weights; give one weight to each of ['a', 'b']",
        ),
        ("tokenize.vocab_size=10", "tokenize.vocab_size must be at least 258 (256 bytes and 2 special tokens), got 10"),
        (
            "tokenize.turn=Question",
            "the template's turn must hold {query} exactly once, got 'Question'; "
            "put {query} where the instruction belongs",
        ),
        (
            "proxy={method: doremi, batch_size: 1}",
            "proxy.batch_size is 1, fewer than the 2 domains, each of which must be in every batch; "
            "raise it to 2 or more",
        ),
        (
            "proxy.gradient_accumulation_steps=99",
            "proxy.gradient_accumulation_steps is 99, more than the 8 sequences of proxy.batch_size; lower it",
        ),
        ("weights.shrink=2", "settings: weights.shrink must be less than or equal to 1, got 2"),
        (
            "weights.shrink=evidence",
            "weights.shrink is evidence, which is the spread over seeds, but weights.num_seeds is 1; raise it to 3 or "
            "give a number from 0 to 1",
        ),
        (
            "compare.steps=9",
            "compare.steps is 9, but the steps follow from compare.token_budget and compare.batch_size; give one of "
            "these instead",
        ),
        (
            "reference.model=tinny",
            "reference.model: 'tinny' is no preset (tiny, small, 120m, 280m), no path that exists and no "
            "hub name (owner/model); give one of these",
        ),
    ],
)
def test_bad_settings_write_nothing(files, tmp_path, setting, message):
    run_dir = tmp_path / "runs" / "x"
    assert_one_line(invoke("learn", files, "--run-dir", run_dir, "--set", setting), message)
    assert not run_dir.exists()


def test_impossible_budget(files, tmp_path_factory, fast):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    result = invoke("learn", files, "--run-dir", run_dir, "--token-budget", 10**8, *fast)
    assert result.exit_code == 1
    assert "token budget" in result.stderr.splitlines()[-1]
    assert "100,000,000" in result.stderr.splitlines()[-1]
    assert not (run_dir / "reference").exists()


def test_too_many_bad_rows(files, tmp_path_factory, fast):
    rows = [*ROWS[:30], *({"instruction": "x", "output": ["a list"]} for _ in range(10))]
    (files / "a.json").write_text(json.dumps(rows))
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    result = invoke("learn", files, "--run-dir", run_dir, *fast, "--set", "load.max_rejected_share=0.2")
    assert_one_line(
        result,
        f"{files}/a.json: 10 of 40 rows were rejected (25.0%, allowed 20.0%): wrong_type 10; first: row 31: "
        '"output" must be a string, got a list; mend the file, or raise load.max_rejected_share',
    )


def test_usage_errors_exit_2(tmp_path):
    assert invoke("learn").exit_code == 2
    assert invoke("lern", tmp_path).exit_code == 2


def test_a_stage_before_its_input(files, tmp_path_factory, fast):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    assert_one_line(
        invoke("proxy", "--run-dir", run_dir),
        f"{run_dir}: no run was started here; start one with: doremi-mix learn or run",
    )
    config = files / "c.yaml"
    config.write_text(yaml.safe_dump({"sources": [{"path": "a.json"}, {"path": "b.json"}]}))
    result = invoke("load", "--run-dir", run_dir, "--config", config, *fast)
    assert result.exit_code == 0, result.stderr
    assert_one_line(
        invoke("proxy", "--run-dir", run_dir),
        f"tokenize has not finished in {run_dir}; run: doremi-mix tokenize --run-dir {run_dir}",
    )


def test_dry_run_writes_nothing(files, tmp_path_factory, fast):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    result = invoke("learn", files, "--run-dir", run_dir, *fast, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "  a: 40 rows, json, alpaca (instruction, output)" in result.stdout
    assert "plan: 2 domains on cpu" in result.stdout
    assert "training will take about" in result.stdout
    assert not run_dir.exists()
    as_json = invoke("learn", files, "--run-dir", run_dir, *fast, "--dry-run", "--json")
    assert json.loads(as_json.stdout)["config"]["reference"]["steps"] == 12
    assert not run_dir.exists()


def test_init_then_run_each_stage(files, tmp_path_factory, fast):
    """The config that init writes runs; stages one by one give what run gives."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "mine.yaml"
    result = invoke("init", files, "--out", config)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"wrote {config} with 2 domains")
    assert "# json, alpaca (instruction, output)" in config.read_text()
    again = invoke("init", files, "--out", config)
    assert_one_line(again, f"{config}: exists already; choose another --out or delete it")

    whole = invoke("run", config, "--run-dir", folder / "whole", "--token-budget", 500, *fast, "--json")
    assert whole.exit_code == 0, whole.stderr
    summary = json.loads(whole.stdout)
    assert {row["domain"] for row in summary["domains"]} == {"a", "b"}
    assert summary["tokens"]["token_budget"] == 500
    # What run does with its budget: it bounds the weights, too.
    budget = ("--set", "mixture.token_budget=500", "--set", "proxy.token_budget=500")
    for stage in ("load", "tokenize", "reference", "reference-losses", "proxy", "weights", "mixture"):
        step = invoke(stage, "--run-dir", folder / "steps", "--config", config, *fast, *budget)
        assert step.exit_code == 0, step.stderr
    for name in ("weights/domain_weights.json", "mixture/mixture.jsonl"):
        assert (folder / "steps" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    states = json.loads(invoke("status", "--run-dir", folder / "steps", "--json").stdout)
    assert states.pop("compare") == "not started"
    assert set(states.values()) == {"finished"}


def test_status_tells_what_is_outdated(finished_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    data = json.loads((run_dir / "run.json").read_text())
    data["given"]["proxy"] = {"method": "doremi", "step_size": 0.5}
    (run_dir / "run.json").write_text(json.dumps(data))
    (run_dir / "mixture" / "manifest.json").unlink()
    states = json.loads(invoke("status", "--run-dir", run_dir, "--json").stdout)
    assert states == {
        **dict.fromkeys(("load", "tokenize", "reference", "reference_losses"), "finished"),
        **dict.fromkeys(("proxy", "weights"), "outdated"),
        "compare": "not started",
        "mixture": "partial",
    }


def test_closing_table(finished_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    given = RunDirectory(run_dir).describe()["given"]
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(given, allow_unicode=True))
    result = invoke("run", config, "--run-dir", run_dir)
    assert result.exit_code == 0, result.stderr
    for text in ("natural", "learned", "ratio", "excess", "available", "allocated", "epochs", "水"):
        assert text in result.stdout
    assert f"doremi-mix run {run_dir}/config.yaml --run-dir {run_dir} --seeds 3" in result.stdout
    assert f"doremi-mix compare --run-dir {run_dir}" in result.stdout
    assert "verdict: not compared with plain mixtures yet" in result.stdout
    assert f"weights: {run_dir}/weights/domain_weights.json" in result.stdout
    assert result.stderr.count("up to date") == 7


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("doremi-mix ")


def test_a_stage_whose_input_has_other_settings(finished_run, tmp_path):
    """The draws depend on the seed: without fresh reference losses, the proxy must not start, nor be deleted."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    assert_one_line(
        invoke("proxy", "--run-dir", run_dir, "--set", "proxy.seed=1"),
        f"reference_losses in {run_dir} was made with other settings; "
        f"run, with the same --set: doremi-mix reference-losses --run-dir {run_dir}",
    )
    assert (run_dir / "proxy" / "manifest.json").exists()
    for stage in ("reference-losses", "proxy"):
        assert invoke(stage, "--run-dir", run_dir, "--set", "proxy.seed=1").exit_code == 0


def test_an_old_mixture_is_not_shown_with_new_weights(corpus, finished_run, small_settings, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    settings = [
        f"{section}.{key}={value}" for section in small_settings for key, value in small_settings[section].items()
    ]
    sets = [f"--set={setting}" for setting in [*settings, "proxy.step_size=3"]]
    result = invoke("learn", corpus, "--run-dir", run_dir, *sets, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["mixture"] is None


def test_links_keep_their_names(files, tmp_path_factory, fast):
    blobs = tmp_path_factory.mktemp("blobs")
    links = tmp_path_factory.mktemp("links")
    for number, name in enumerate(("a", "b")):
        (files / f"{name}.json").rename(blobs / f"deadbeef{number}")
        (links / f"{name}.json").symlink_to(blobs / f"deadbeef{number}")
    result = invoke("learn", links, "--run-dir", tmp_path_factory.mktemp("runs") / "run", *fast, "--dry-run", "--json")
    assert [domain["domain"] for domain in json.loads(result.stdout)["domains"]] == ["a", "b"]


def test_a_run_killed_in_its_first_moment_can_start_again(files, tmp_path_factory, fast):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    run_dir.mkdir()
    (run_dir / ".lock").touch()
    (run_dir / ".run.json.tmp").write_text("{half")
    assert invoke("learn", files, "--run-dir", run_dir, *fast).exit_code == 0


def test_config_paths_that_yaml_would_misread(tmp_path):
    for name in ("a, b", "c [v2]", "d: {x}"):
        (tmp_path / f"{name}.json").write_text(json.dumps(ROWS))
    result = invoke("init", tmp_path, "--out", tmp_path / "c.yaml")
    assert result.exit_code == 0, result.stderr
    names = [source["name"] for source in yaml.safe_load((tmp_path / "c.yaml").read_text())["sources"]]
    assert names == ["a, b", "c [v2]", "d: {x}"]


def test_a_missing_file_in_a_config(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("sources: [{path: a.json}, {path: b.json}]")
    result = invoke("run", config, "--run-dir", tmp_path / "run")
    assert_one_line(result, f"{tmp_path}/a.json: there is no such file; check the path")
    assert not (tmp_path / "run").exists()
    config.write_text("data_root: [1]\nsources: [{path: a.json}, {path: b.json}]")
    assert_one_line(
        invoke("run", config, "--run-dir", tmp_path / "run"),
        f"{config}: data_root must be a folder's path, got [1]",
    )


def test_a_run_means_the_same_from_any_folder(files, model_config, tmp_path_factory, fast, monkeypatch):
    home = tmp_path_factory.mktemp("home")
    shutil.copy(model_config, home / "config.json")
    monkeypatch.chdir(home)
    arguments = [str(model_config) if argument == "x" else argument for argument in fast]
    arguments = [
        "--set=reference.model=config.json" if str(model_config) in a else a for a in arguments if a != "--set"
    ]
    arguments = [a if a.startswith("--set") else f"--set={a}" for a in arguments]
    run_dir = home / "run"
    assert invoke("learn", files, "--run-dir", run_dir, *arguments).exit_code == 0
    away = tmp_path_factory.mktemp("away")
    (away / "tiny").mkdir()
    monkeypatch.chdir(away)
    states = json.loads(invoke("status", "--run-dir", run_dir, "--json").stdout)
    assert {state for stage, state in states.items() if stage not in ("compare", "mixture")} == {"finished"}
    assert invoke("reference", "--run-dir", run_dir).stderr.splitlines()[-1] == "reference: up to date"


def test_the_closing_table_fits_80_columns():
    import io

    from rich.console import Console

    from doremi_mix.report.table import explain_shortfalls, render_table

    row = {"domain": "gpteacher_toolformer", "natural_weight": 0.06, "domain_weight": 0.19, "ratio": 12.25}
    row |= {"excess_loss": 1.418, "available_tokens": 12_774_902, "allocated_tokens": 1_000_000, "epochs": 0.25}
    stream = io.StringIO()
    Console(file=stream, width=80).print(render_table([row], "Domain weights"))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-2].split() == [
        "gpteacher_toolformer",
        "0.060",
        "0.190",
        "12.25",
        "1.418",
        "12,774,902",
        "1,000,000",
        "0.25",
    ]
    assert "epochs" in stream.getvalue()
    assert explain_shortfalls([{**row, "drawn_tokens": 950_000}]) == []
    assert explain_shortfalls([{**row, "drawn_tokens": 0}]) == [
        "gpteacher_toolformer: 0 of 1,000,000 allocated tokens drawn; the next example is longer than what was left"
    ]


def test_a_budget_that_no_example_fits(finished_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    result = invoke("mixture", "--run-dir", run_dir, "--set", "mixture.token_budget=5")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(
        "error: token budget 5 is smaller than the first example of every domain; raise it to a few examples per domain"
    )
    # The earlier mixture is still there.
    assert (run_dir / "mixture" / "mixture.jsonl").exists()


def test_a_lost_product_is_made_again(finished_run, corpus, small_settings, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    expected = (run_dir / "mixture" / "mixture.jsonl").read_bytes()
    (run_dir / "mixture" / "mixture.jsonl").unlink()
    (run_dir / "weights" / "domain_weights.json").unlink()
    states = json.loads(invoke("status", "--run-dir", run_dir, "--json").stdout)
    assert (states["weights"], states["mixture"]) == ("partial", "partial")
    settings = [f"{name}.{key}={value}" for name, section in small_settings.items() for key, value in section.items()]
    sets = [f"--set={setting}" for setting in settings]
    assert invoke("learn", corpus, "--run-dir", run_dir, "--token-budget", 5000, *sets).exit_code == 0
    assert (run_dir / "mixture" / "mixture.jsonl").read_bytes() == expected


def test_an_ambiguous_file_is_settled_in_the_config_that_init_writes(files, tmp_path_factory, fast):
    rows = [{"instruction": f"say {i}", "prompt": f"tell {i}", "output": f"said {i}"} for i in range(40)]
    (files / "a.json").write_text(json.dumps(rows))
    config = tmp_path_factory.mktemp("configs") / "c.yaml"
    result = invoke("init", files, "--out", config)
    assert result.exit_code == 0, result.stderr
    assert f"settle this in {config}: " in result.stderr
    data = yaml.safe_load(config.read_text())
    data["sources"][0]["columns"] = {"instruction": "instruction"}
    config.write_text(yaml.safe_dump(data))
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    done = invoke("learn", files, "--config", config, "--run-dir", run_dir, *fast, "--dry-run")
    assert done.exit_code == 0, done.stderr

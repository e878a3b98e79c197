"""Which weights a mixture is drawn by: a word or a file, and what the comparison said of the learned ones."""

import json
import shutil

import pytest
import yaml
from conftest import read_log
from test_cli import assert_one_line, invoke

from doremi_mix.atomic import write_json
from doremi_mix.mixture import natural_weights, temperature_weights, uniform_weights
from doremi_mix.run import RunDirectory, read_json
from doremi_mix.stages.training import available_tokens, open_store

NAMES = ("fruit", "metal", "水")
LOST = "Over 3 seeds, learned is worse than natural by 0.1 (0.05 to 0.15): a sentence."
NOT_YET = "  these weights were not compared with plain mixtures yet; run: doremi-mix compare --run-dir {}"


@pytest.fixture
def run_dir(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def draw(run_dir, *sets):
    """Draws a mixture; returns what was said, and ``allocation.json``."""
    result = invoke("mixture", "--run-dir", run_dir, *(f"--set={setting}" for setting in sets))
    assert result.exit_code == 0, result.stderr
    return result.stderr.splitlines(), read_json(run_dir / "mixture" / "allocation.json")


def weights_of(allocation):
    return {name: domain["weight"] for name, domain in allocation["domains"].items()}


def learned(run_dir):
    return read_json(run_dir / "weights" / "domain_weights.json")["domain_weights"]


def give_verdict(run_dir, kind="worse", sentence=LOST, best="natural"):
    """Writes a verdict of a comparison that never was."""
    path = run_dir / "weights" / "domain_weights.json"
    verdict = {"kind": kind, "sentence": sentence, "best": best, "num_seeds": 3}
    write_json(path, {**read_json(path), "verdict": verdict})


def give_results(run_dir, best, pairs=()):
    """Writes the results of a comparison that never was, made with the settings of the run."""
    from doremi_mix.pipeline import resolve
    from doremi_mix.stages import stage_named, wanted_fingerprint

    run = RunDirectory(run_dir)
    config, _ = resolve(run.describe()["given"], run)
    wanted = wanted_fingerprint(stage_named("compare"), config, run)
    run.begin("compare", wanted, resumable=True)
    write_json(run_dir / "compare" / "results.json", {"best": best, "pairs": pairs})
    run.finish("compare", wanted, {}, resumable=True)


@pytest.mark.parametrize("word", ["natural", "uniform", "temperature"])
def test_a_plain_mixture(run_dir, word):
    available = available_tokens(open_store(RunDirectory(run_dir)))
    expected = {
        "natural": natural_weights(available),
        "uniform": uniform_weights(available),
        "temperature": temperature_weights(available, 0.5),
    }[word]
    lines, allocation = draw(run_dir, f"mixture.weights={word}")
    assert allocation["weights"] == word
    assert weights_of(allocation) == pytest.approx(expected, abs=1e-12)
    for name, domain in allocation["domains"].items():
        assert domain["allocated_tokens"] == pytest.approx(5000 * expected[name], abs=1)
    rows = read_log(run_dir / "mixture" / "mixture.jsonl")
    assert {row["domain"] for row in rows} == set(NAMES)
    # Nobody asks whether learned weights help where none are used.
    assert len(lines) == 1
    assert lines[0].startswith(f"mixture: {len(rows)} rows, ")
    # Again, and nothing is done; a word more, and it is.
    assert invoke("mixture", "--run-dir", run_dir).stderr.splitlines() == ["mixture: up to date"]
    _, allocation = draw(run_dir, "mixture.weights=learned")
    assert (allocation["weights"], weights_of(allocation)) == ("learned", learned(run_dir))


def test_another_temperature_is_another_mixture(run_dir):
    draw(run_dir, "mixture.weights=temperature")
    _, allocation = draw(run_dir, "compare.temperature=1")
    natural = natural_weights(available_tokens(open_store(RunDirectory(run_dir))))
    assert weights_of(allocation) == pytest.approx(natural)


def test_learned_is_the_default_and_says_that_it_was_not_compared(run_dir):
    lines, allocation = draw(run_dir, "mixture.seed=1")
    assert allocation["weights"] == "learned"
    assert weights_of(allocation) == learned(run_dir)
    assert lines[0] == NOT_YET.format(run_dir)
    assert len(lines) == 2


def test_weights_that_lost_come_with_a_warning(run_dir):
    give_verdict(run_dir)
    lines, allocation = draw(run_dir, "mixture.seed=1")
    assert lines[:2] == [f"  WARNING: {LOST}", "  draw a better one with: --set mixture.weights=best"]
    assert len(lines) == 3
    assert weights_of(allocation) == learned(run_dir)


@pytest.mark.parametrize("kind", ["better", "better_than_some", "no_reliable_gain", "one_seed"])
def test_weights_that_did_not_lose_come_with_their_verdict(run_dir, kind):
    give_verdict(run_dir, kind=kind, sentence="A sentence.")
    lines, _ = draw(run_dir, "mixture.seed=1")
    assert lines[0] == "  verdict: A sentence."
    assert len(lines) == 2


def pair(mixture, baseline, low, high):
    average = {"estimate": (low + high) / 2, "low": low, "high": high}
    return {"mixture": mixture, "baseline": baseline, "average": average}


@pytest.mark.parametrize(
    ("found", "other"),
    [
        (pair("uniform", "natural", 0.1, 0.3), "natural"),
        (pair("learned", "uniform", -0.3, -0.1), "learned"),
        (pair("uniform", "natural", -0.1, 0.5), None),
        (pair("uniform", "natural", -0.3, -0.1), None),
        (pair("temperature", "natural", 0.1, 0.3), None),
    ],
)
def test_a_plain_mixture_that_lost_comes_with_a_warning_too(run_dir, found, other):
    unknown = {**found, "average": {"estimate": 1.0, "low": None, "high": None}}
    give_results(run_dir, "natural", [unknown, found])
    lines, _ = draw(run_dir, "mixture.weights=uniform")
    warning = (
        f"  WARNING: the comparison found uniform worse than {other} by 0.2000 nats per token; draw a better one with: "
        "--set mixture.weights=best"
    )
    assert lines[:-1] == ([warning] if other else [])


@pytest.mark.parametrize("best", ["natural", "uniform", "temperature", "learned"])
def test_best_draws_what_the_comparison_found_best(run_dir, best):
    give_verdict(run_dir, best=best)
    # Being the best does not need to be explained, whatever the pairs say for themselves.
    give_results(run_dir, best, [pair(best, "uniform" if best == "natural" else "natural", 0.1, 0.3)])
    lines, allocation = draw(run_dir, "mixture.weights=best")
    assert lines[0] == f"  the best mixture of the comparison: {best}"
    assert len(lines) == (4 if best == "learned" else 2)
    by_name = weights_of(allocation)
    _, allocation = draw(run_dir, f"mixture.weights={best}")
    assert weights_of(allocation) == by_name


def test_best_can_be_one_that_was_entered(run_dir, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"水": 1, "metal": 1, "fruit": 2}), encoding="utf-8")
    data = read_json(run_dir / "run.json")
    data["given"]["compare"] = {"also": {"mine": str(path)}}
    write_json(run_dir / "run.json", data)
    give_results(run_dir, "mine")
    _, allocation = draw(run_dir, "mixture.weights=best")
    assert weights_of(allocation) == {"fruit": 0.5, "metal": 0.25, "水": 0.25}
    # By its name, too; and when the file changes, the mixture does.
    draw(run_dir, "mixture.weights=mine")
    path.write_text(json.dumps({"水": 2, "metal": 1, "fruit": 1}), encoding="utf-8")
    _, allocation = draw(run_dir)
    assert weights_of(allocation) == {"fruit": 0.25, "metal": 0.25, "水": 0.5}


def test_best_before_there_is_a_comparison(run_dir):
    assert_one_line(
        invoke("mixture", "--run-dir", run_dir, "--set", "mixture.weights=best"),
        f"compare has not finished in {run_dir}; run: doremi-mix compare --run-dir {run_dir}",
    )


@pytest.mark.parametrize("form", ["ours", "plain"])
def test_a_file_of_weights(run_dir, tmp_path, monkeypatch, form):
    """From any folder, and again when what it holds has changed."""
    weights = {"水": 0.5, "metal": 0.25, "fruit": 0.25}
    content = weights
    if form == "ours":
        content = {**read_json(run_dir / "weights" / "domain_weights.json"), "domain_weights": weights}
    (tmp_path / "w.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    lines, allocation = draw(run_dir, "mixture.weights=w.json")
    assert weights_of(allocation) == weights
    # How a file of another program was read is said.
    assert [": read as {domain: weight} in JSON: " in line for line in lines] == [form == "plain"] * (
        len(lines) - 1
    ) + [False]
    assert allocation["weights"] == str(tmp_path / "w.json")
    monkeypatch.chdir("/")
    assert invoke("mixture", "--run-dir", run_dir).stderr.splitlines() == ["mixture: up to date"]
    content = {"fruit": 1, "metal": 1, "水": 2}
    (tmp_path / "w.json").write_text(json.dumps(content), encoding="utf-8")
    lines, _ = draw(run_dir)
    assert lines[1].startswith(f"  {tmp_path}/w.json: the weights sum to 4")
    assert invoke("mixture", "--run-dir", run_dir).stderr.splitlines() == ["mixture: up to date"]


@pytest.mark.parametrize("command", ["mixture", "learn"])
def test_a_word_that_is_no_file(corpus, run_dir, tmp_path, command):
    place = tmp_path / "new" if command == "learn" else run_dir
    sources = [corpus] if command == "learn" else []
    before = (run_dir / "run.json").read_bytes()
    assert_one_line(
        invoke(command, *sources, "--run-dir", place, "--set", "mixture.weights=lerned"),
        "mixture.weights: 'lerned' is none of learned, natural, uniform, temperature, best, and no file; give one of "
        "these words or a domain_weights.json",
    )
    assert not (tmp_path / "new").exists()
    assert (run_dir / "run.json").read_bytes() == before


def test_a_file_of_other_domains(run_dir, tmp_path):
    path = tmp_path / "w.json"
    path.write_text('{"fruit": 1}', encoding="utf-8")
    assert_one_line(
        invoke("mixture", "--run-dir", run_dir, "--set", f"mixture.weights={path}"),
        f"{path}: 'metal' has no weight; give one weight to each of ['fruit', 'metal', '水']",
    )


def test_a_natural_mixture_needs_no_learning(corpus, tmp_path):
    config = tmp_path / "c.yaml"
    content = {
        "sources": [{"path": str(path)} for path in sorted(corpus.iterdir())],
        "tokenize": {"vocab_size": 400, "context_length": 64},
        "mixture": {"weights": "natural", "token_budget": 2000},
    }
    config.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    run_dir = tmp_path / "run"
    for stage in ("load", "tokenize", "mixture"):
        result = invoke(stage, "--run-dir", run_dir, "--config", config)
        assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in run_dir.iterdir() if not path.name.startswith(".")) == [
        "config.yaml",
        "load",
        "mixture",
        "run.json",
        "tokenize",
    ]
    allocation = read_json(run_dir / "mixture" / "allocation.json")
    available = available_tokens(open_store(RunDirectory(run_dir)))
    assert weights_of(allocation) == natural_weights(available)
    assert json.loads(invoke("status", "--run-dir", run_dir, "--json").stdout)["mixture"] == "finished"


def test_a_relative_file_in_a_config_starts_at_the_configs_folder(corpus, tmp_path, monkeypatch):
    from doremi_mix.config_file import load_config_file

    config = tmp_path / "c.yaml"
    (tmp_path / "w.json").write_text("{}")
    config.write_text("mixture: {weights: w.json}\ncompare: {also: {mine: w.json, gone: x.json}}\n")
    monkeypatch.chdir("/")
    data = load_config_file(config)
    assert data["mixture"]["weights"] == str(tmp_path / "w.json")
    assert data["compare"]["also"] == {"mine": str(tmp_path / "w.json"), "gone": str(tmp_path / "x.json")}
    # A word is a word, also where a file of its name lies about.
    (tmp_path / "best").write_text("{}")
    config.write_text("mixture: {weights: best}\n")
    assert load_config_file(config)["mixture"]["weights"] == "best"

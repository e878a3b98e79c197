"""Rounds and seeds: who trains on what, where it is kept, what is trained again, and that a kill changes nothing."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import read_log
from test_cli import assert_one_line, invoke
from test_resume import KILL_AT, NEVER

from doremi_mix import learn
from doremi_mix.batches import plan_domain_counts
from doremi_mix.errors import BudgetError, ConfigError
from doremi_mix.pipeline import resolve
from doremi_mix.plan import new_model
from doremi_mix.replicas import RoundResult, is_last, replicas
from doremi_mix.run import RunDirectory, read_json
from doremi_mix.stages import stage_states
from doremi_mix.stages.training import open_store, proxy_schedule, token_info
from doremi_mix.uncertainty import summarize_seeds

NAMES = ("fruit", "metal", "水")
ROUND = ["reference", "reference_losses", "proxy"]
SEED = ["reference_losses", "proxy"]
FOLDERS = {
    *ROUND,
    *(f"round-1-seed-1/{stage}" for stage in SEED),
    *(f"round-2-seed-0/{stage}" for stage in ROUND),
    *(f"round-2-seed-1/{stage}" for stage in SEED),
}
RESULTS = (
    *(f"{folder}/{name}" for folder in sorted(FOLDERS) if folder.endswith("proxy") for name in ("trajectory.jsonl",)),
    "round-2-seed-0/reference/model/model.safetensors",
    "round-2-seed-1/proxy/model/model.safetensors",
    "weights/domain_weights.json",
    "mixture/mixture.jsonl",
)


def with_weights(settings, **weights):
    return {**settings, "weights": {"num_seeds": 2, "max_rounds": 2, "round_tolerance": 1e-9, **weights}}


@pytest.fixture(scope="module")
def settings(small_settings):
    """A short run of Algorithm 1, two seeds in each of two rounds."""
    reference = {**small_settings["reference"], "checkpoint_every": 5, "folds": 1}
    proxy = {**small_settings["proxy"], "method": "doremi"}
    return with_weights({**small_settings, "reference": reference, "proxy": proxy})


@pytest.fixture(scope="module")
def two_by_two(corpus, settings, tmp_path_factory):
    """Two seeds in two rounds; read only."""
    run_dir = tmp_path_factory.mktemp("two-by-two") / "run"
    learn(corpus, run_dir, token_budget=5000, quiet=True, **settings)
    return run_dir


@pytest.fixture
def copied(two_by_two, tmp_path):
    shutil.copytree(two_by_two, tmp_path / "run")
    return tmp_path / "run"


def manifests(run_dir):
    """When each replicated stage was made, by its folder."""
    paths = [path for stage in ROUND for path in run_dir.glob(f"**/{stage}/manifest.json")]
    return {str(path.parent.relative_to(run_dir)): path.stat().st_mtime_ns for path in paths}


def averages(run_dir, *folders):
    """The average weights of some proxies, shape [R, K]."""
    found = [read_json(run_dir / folder / "proxy" / "average.json") for folder in folders]
    return np.array([[average[name] for name in NAMES] for average in found])


def said(captured):
    """Lines on stderr, without their seconds."""
    return [line.rpartition(" (")[0] if line.endswith("s)") else line for line in captured.err.splitlines()]


# --- What two seeds and two rounds come to.


def test_every_replica_has_its_folders(two_by_two):
    assert set(manifests(two_by_two)) == FOLDERS
    assert not list(two_by_two.rglob("checkpoint.pt"))
    assert not list(two_by_two.rglob("*.tmp"))
    # A second seed scores with the first one's reference.
    assert not (two_by_two / "round-1-seed-1" / "reference").exists()


def test_a_round_trains_its_reference_on_the_mean_of_the_round_before(two_by_two):
    mean = averages(two_by_two, "", "round-1-seed-1").mean(axis=0)
    reference = two_by_two / "round-2-seed-0" / "reference"
    given = read_json(reference / "weights.json")
    assert list(given) == list(NAMES)
    assert list(given.values()) == pytest.approx(mean.tolist(), abs=1e-12)
    # It is what the batches were drawn by, and not only what the file says.
    epochs = read_json(reference / "metrics.json")["epochs"]
    store = open_store(RunDirectory(two_by_two))
    drawn = [round(epochs[name] * store.num_sequences(i)) for i, name in enumerate(NAMES)]
    assert drawn == plan_domain_counts(mean, 6, 12).sum(axis=0).tolist()
    assert epochs != read_json(two_by_two / "reference" / "metrics.json")["epochs"]


def test_the_weights_are_the_mean_of_the_last_round_and_say_how_sure_they_are(two_by_two):
    weights = read_json(two_by_two / "weights" / "domain_weights.json")
    first = averages(two_by_two, "", "round-1-seed-1")
    last = averages(two_by_two, "round-2-seed-0", "round-2-seed-1")
    summary = summarize_seeds(NAMES, last)
    for name in NAMES:
        assert weights["domain_weights"][name] == pytest.approx(summary.mean[name], abs=1e-12)
        assert weights["intervals"][name] == pytest.approx(summary.intervals[name], abs=1e-9)
    certainty = weights["uncertainty"]
    assert set(certainty) == {"num_seeds", "standard_deviation", "rank_stability", "rounds", "shrink"}
    assert certainty["standard_deviation"] == pytest.approx(dict(summary.standard_deviation), abs=1e-12)
    assert certainty["rank_stability"] == pytest.approx(summary.rank_stability)
    assert (certainty["num_seeds"], certainty["shrink"]) == (2, 0)
    natural = list(read_json(two_by_two / "reference" / "weights.json").values())
    change = [np.abs(first.mean(0) - natural).max(), np.abs(last.mean(0) - first.mean(0)).max()]
    assert certainty["rounds"] == pytest.approx(change, abs=1e-12)
    assert weights["reference_weights"] == read_json(two_by_two / "round-2-seed-0" / "reference" / "weights.json")


def test_seeds_differ_in_initialization_and_order_and_rounds_do_not(two_by_two):
    run = RunDirectory(two_by_two)
    config, _ = resolve(run.describe()["given"], run)
    every = list(replicas(config, run))
    assert [(r.round, r.seed, r.label) for r in every] == [
        (1, 0, ""),
        (1, 1, " (round 1, seed 1)"),
        (2, 0, " (round 2, seed 0)"),
        (2, 1, " (round 2, seed 1)"),
    ]
    store = open_store(run)
    orders = [proxy_schedule(r.config, store).batch(0).tolist() for r in every]
    models = [new_model(r.config.proxy, token_info(run), 64, "proxy") for r in every]
    starts = [torch.cat([parameter.flatten() for parameter in model.parameters()]) for model in models]
    assert orders[0] == orders[2] != orders[1] == orders[3]
    assert torch.equal(starts[0], starts[2])
    assert torch.equal(starts[1], starts[3])
    assert not torch.equal(starts[0], starts[1])
    assert len({(two_by_two / name).read_bytes() for name in RESULTS if "trajectory" in name}) == 4


def test_one_seed_says_nothing_of_certainty(finished_run):
    weights = read_json(finished_run / "weights" / "domain_weights.json")
    assert weights["intervals"] == {}
    certainty = weights["uncertainty"]
    assert (certainty["num_seeds"], certainty["standard_deviation"], certainty["rank_stability"]) == (1, {}, None)
    assert len(certainty["rounds"]) == 1


# --- When rounds end.


@pytest.mark.parametrize(
    ("round_", "tolerance", "last"), [(1, 0.11, True), (1, 0.09, False), (2, 0.09, False), (3, 0.09, True)]
)
def test_rounds_end_at_the_tolerance_or_when_there_were_enough(two_by_two, round_, tolerance, last):
    run = RunDirectory(two_by_two)
    given = {**run.describe()["given"], "weights": {"max_rounds": 3, "round_tolerance": tolerance}}
    config, _ = resolve(given, run)
    # Seeds that moved by 0.2 and not at all: their mean moved by 0.1.
    result = RoundResult(("a", "b"), np.array([[0.7, 0.3], [0.5, 0.5]]), np.array([0.5, 0.5]))
    assert result.change == pytest.approx(0.1)
    assert is_last(config, round_, result) is last


def test_a_large_tolerance_leaves_one_round(corpus, settings, copied, capsys):
    before = manifests(copied)
    weights = learn(corpus, copied, token_budget=5000, **with_weights(settings, round_tolerance=0.9))
    assert manifests(copied) == before
    mean = averages(copied, "", "round-1-seed-1").mean(axis=0)
    assert list(weights.domain_weights.values()) == pytest.approx(mean.tolist(), abs=1e-12)
    assert weights.reference_weights == read_json(copied / "reference" / "weights.json")
    change = weights.uncertainty["rounds"]
    assert len(change) == 1
    assert said(capsys.readouterr())[2:8] == [
        "reference: up to date",
        "reference_losses: up to date",
        "proxy: up to date",
        "reference_losses (round 1, seed 1): up to date",
        "proxy (round 1, seed 1): up to date",
        f"round 1: the weights differ from the reference weights by {change[0]:.4f} at most",
    ]


# --- What is trained again.


def test_a_third_seed_trains_only_the_third(corpus, settings, copied, capsys):
    before = manifests(copied)
    weights = learn(corpus, copied, token_budget=5000, **with_weights(settings, num_seeds=3, max_rounds=1))
    after = manifests(copied)
    assert {folder: after[folder] for folder in before} == before
    assert after.keys() - before == {f"round-1-seed-2/{stage}" for stage in SEED}
    lines = said(capsys.readouterr())
    assert [line for line in lines if line.endswith(": up to date")] == [
        f"{stage}: up to date"
        for stage in (
            "load",
            "tokenize",
            "reference",
            "reference_losses",
            "proxy",
            "reference_losses (round 1, seed 1)",
            "proxy (round 1, seed 1)",
        )
    ]
    expected = averages(copied, "", "round-1-seed-1", "round-1-seed-2").mean(axis=0)
    assert list(weights.domain_weights.values()) == pytest.approx(expected.tolist(), abs=1e-12)
    assert weights.uncertainty["num_seeds"] == 3


def test_a_reference_for_each_seed(corpus, settings, copied):
    before = manifests(copied)
    learn(corpus, copied, quiet=True, **with_weights(settings, vary_reference=True, max_rounds=1))
    after = manifests(copied)
    remade = {folder for folder in after if after[folder] != before.get(folder)}
    # Without a token budget, the proxy learns under other caps.
    assert remade == {"proxy", *(f"round-1-seed-1/{stage}" for stage in ROUND)}
    first, second = (copied / folder / "reference" for folder in ("", "round-1-seed-1"))
    assert read_json(first / "weights.json") == read_json(second / "weights.json")
    name = "model/model.safetensors"
    assert (first / name).read_bytes() != (second / name).read_bytes()
    assert {read_json(folder / "folds.json")["seed"] for folder in (first, second)} == {0, 1}


def test_another_step_size_makes_every_replica_outdated(copied):
    run = RunDirectory(copied)
    data = read_json(copied / "run.json")
    data["given"]["proxy"]["step_size"] = 0.5
    (copied / "run.json").write_text(json.dumps(data), encoding="utf-8")
    states = stage_states(resolve(data["given"], run)[0], run)
    expected = {
        **dict.fromkeys(("load", "tokenize", "reference", "reference_losses"), "finished"),
        **dict.fromkeys(("proxy", "weights"), "outdated"),
        "compare": "not started",
        "mixture": "outdated",
    }
    assert states == expected
    lines = invoke("status", "--run-dir", copied).stdout.splitlines()
    assert {line.split()[0]: line[18:].partition("  (")[0] for line in lines} == expected


def test_a_seed_more_makes_the_stages_partial(copied):
    run = RunDirectory(copied)
    given = run.describe()["given"]
    config, _ = resolve({**given, "weights": {**given["weights"], "num_seeds": 3}}, run)
    states = stage_states(config, run)
    assert (states["reference"], states["reference_losses"], states["proxy"]) == ("finished", "partial", "partial")
    assert states["weights"] == "outdated"


# --- One stage at a time.


def test_single_stages_go_through_the_rounds(corpus, two_by_two, copied, capsys):
    """Each command does what the rounds so far allow, and says how the next one begins."""
    for folder in ("proxy", "round-1-seed-1/proxy", "round-2-seed-0", "round-2-seed-1", "weights", "mixture"):
        shutil.rmtree(copied / folder)

    def run(stage):
        result = invoke(stage, "--run-dir", copied)
        assert result.exit_code == 0, result.stderr
        return result.stderr.splitlines()

    begins = f"round 2 begins with: doremi-mix reference --run-dir {copied}"
    assert run("proxy")[-1] == begins
    assert set(manifests(copied)) == {folder for folder in FOLDERS if "round-2" not in folder}
    assert run("reference-losses")[-1] == begins
    assert_one_line(
        invoke("weights", "--run-dir", copied),
        f"reference (round 2, seed 0) has not finished in {copied}; run: doremi-mix reference --run-dir {copied}",
    )
    run("reference")
    assert_one_line(
        invoke("proxy", "--run-dir", copied),
        f"reference_losses has not finished in {copied}; run: doremi-mix reference-losses --run-dir {copied}",
    )
    for stage in ("reference-losses", "proxy", "weights", "mixture"):
        run(stage)
    assert set(manifests(copied)) == FOLDERS
    for name in RESULTS:
        assert (copied / name).read_bytes() == (two_by_two / name).read_bytes(), name


@pytest.mark.parametrize(
    ("gone", "which"),
    [
        ("proxy", "proxy"),
        ("round-1-seed-1/proxy", "proxy (round 1, seed 1)"),
        ("round-2-seed-0/reference", "reference (round 2, seed 0)"),
        ("round-2-seed-1/proxy", "proxy (round 2, seed 1)"),
    ],
)
def test_weights_before_every_replica_has_finished(copied, gone, which):
    (copied / gone / "manifest.json").unlink()
    stage = which.partition(" ")[0]
    assert_one_line(
        invoke("weights", "--run-dir", copied),
        f"{which} has not finished in {copied}; run: doremi-mix {stage} --run-dir {copied}",
    )
    # What was there is still there.
    assert (copied / "weights" / "domain_weights.json").exists()


# --- Settings that cannot be.


def test_the_spread_over_one_seed(corpus, small_settings, tmp_path):
    with pytest.raises(ConfigError) as caught:
        learn(corpus, tmp_path / "run", quiet=True, **small_settings, weights={"shrink": "evidence"})
    assert str(caught.value) == (
        "weights.shrink is evidence, which is the spread over seeds, but weights.num_seeds is 1; raise it to 3 or "
        "give a number from 0 to 1"
    )
    assert not (tmp_path / "run").exists()


def test_a_budget_to_learn_for_that_the_data_cannot_fill(corpus, small_settings, tmp_path):
    settings = {**small_settings, "proxy": {**small_settings["proxy"], "token_budget": 10**9}}
    with pytest.raises(BudgetError) as caught:
        learn(corpus, tmp_path / "run", quiet=True, **settings)
    most = 4 * sum(open_store(RunDirectory(tmp_path / "run")).available_tokens)
    assert str(caught.value) == (
        f"proxy.token_budget is 1,000,000,000, more than the {most:,} tokens of all domains, each drawn at most 4 "
        "times; lower it or raise mixture.max_epochs"
    )
    assert not (tmp_path / "run" / "reference").exists()


@pytest.mark.parametrize("toward", ["natural", "uniform"])
def test_shrunk_to_the_end_is_the_plain_mixture(copied, toward):
    sets = ("--set", "weights.shrink=1", "--set", f"weights.shrink_toward={toward}")
    result = invoke("weights", "--run-dir", copied, *sets)
    assert result.exit_code == 0, result.stderr
    weights = read_json(copied / "weights" / "domain_weights.json")
    natural = read_json(copied / "reference" / "weights.json")
    expected = natural if toward == "natural" else dict.fromkeys(NAMES, 1 / 3)
    assert weights["domain_weights"] == pytest.approx(expected, abs=1e-12)
    assert weights["uncertainty"]["shrink"] == 1


def test_shrunk_by_the_evidence(copied):
    result = invoke(
        "weights", "--run-dir", copied, "--set", "weights.shrink=evidence", "--set", "weights.shrink_toward=natural"
    )
    assert result.exit_code == 0, result.stderr
    weights = read_json(copied / "weights" / "domain_weights.json")
    natural = np.array(list(read_json(copied / "reference" / "weights.json").values()))
    learned = averages(copied, "round-2-seed-0", "round-2-seed-1")
    noise = learned.var(axis=0, ddof=1).mean() / 2
    strength = noise / max(noise, ((learned.mean(0) - natural) ** 2).mean())
    assert weights["uncertainty"]["shrink"] == pytest.approx(strength)
    expected = (1 - strength) * learned.mean(0) + strength * natural
    assert list(weights["domain_weights"].values()) == pytest.approx(expected.tolist(), abs=1e-9)


# --- Killed and started again.


def start(arguments, run_dir, when=NEVER):
    command = [sys.executable, str(KILL_AT), *when, "--", *arguments, "--run-dir", str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("folder", "count"),
    [
        # Three checkpoints in each training: after 5, 10 and 12 steps.
        ("round-1-seed-1/proxy", 3 + 3 + 2),
        ("round-2-seed-0/reference", 3 + 3 + 3 + 2),
    ],
)
def test_killed_in_a_replica_and_started_again(corpus, settings, two_by_two, tmp_path, folder, count):
    sets = [f"--set={name}.{key}={value}" for name, section in settings.items() for key, value in section.items()]
    arguments = ["learn", str(corpus), "--token-budget", "5000", *sets]
    run_dir = tmp_path / "run"
    killed = start(arguments, run_dir, ("SIGKILL", "doremi_mix.checkpoints:save_checkpoint", str(count)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (run_dir / folder / "started.json").exists()
    assert (run_dir / folder / "checkpoint.pt").exists()
    finished = manifests(run_dir)
    assert folder not in finished
    kept = (run_dir / folder / "metrics.jsonl").read_bytes().splitlines()[:5]
    again = start(arguments, run_dir)
    assert again.returncode == 0, again.stderr
    after = manifests(run_dir)
    assert set(after) == FOLDERS
    assert {name: after[name] for name in finished} == finished
    # The steps before the checkpoint are not made again: their seconds stay.
    assert (run_dir / folder / "metrics.jsonl").read_bytes().splitlines()[:5] == kept
    assert len(read_log(run_dir / folder / "metrics.jsonl")) == 12
    for name in RESULTS:
        assert (run_dir / name).read_bytes() == (two_by_two / name).read_bytes(), name
    assert not list(run_dir.rglob("checkpoint.pt"))
    assert not list(run_dir.rglob("*.tmp"))

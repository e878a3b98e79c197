"""Killed at any moment and started again with the same command, a run ends with the same bytes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from doremi_mix.run import RunDirectory
from doremi_mix.stages import stage_named

KILL_AT = Path(__file__).with_name("kill_at.py")
# Small batches, so that the scoring of the reference losses has something to resume.
PATCHES = ("doremi_mix.stages.reference_losses:SCORE_TOKENS=512", "doremi_mix.stages.reference_losses:SAVE_EVERY=2")
RESULTS = ("weights/domain_weights.json", "proxy/trajectory.jsonl", "mixture/mixture.jsonl", "mixture/allocation.json")
NEVER = ("SIGKILL", "doremi_mix.train:_flush", "1000000")


@pytest.fixture(scope="module")
def arguments(corpus, model_config):
    settings = {
        "tokenize.vocab_size": 400,
        "tokenize.context_length": 64,
        "reference.model": model_config,
        "reference.steps": 12,
        "reference.batch_size": 6,
        "reference.learning_rate": 0.01,
        "reference.checkpoint_every": 5,
        "proxy.checkpoint_every": 5,
        # As many steps as the reference: the kill below falls between two checkpoints.
        "proxy.method": "doremi",
    }
    sets = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    return ["learn", str(corpus), "--token-budget", "5000", *sets]


def run(arguments, run_dir, when=NEVER):
    command = [sys.executable, str(KILL_AT), *when, *PATCHES, "--", *arguments, "--run-dir", str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run(arguments, run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.parametrize(
    ("stage", "target", "count"),
    [
        ("tokenize", "doremi_mix.stages.tokenize:held_out_split", 1),
        ("reference", "doremi_mix.checkpoints:save_checkpoint", 2),
        ("reference", "doremi_mix.train:_flush", 4),
        ("reference_losses", "doremi_mix.stages.reference_losses:load_batch", 4),
        ("proxy", "doremi_mix.train:_flush", 12 + 9),
        ("weights", "doremi_mix.stages.weights:plot_trajectory", 1),
        ("mixture", "doremi_mix.stages.mixture:_rows_at", 2),
        ("mixture", "doremi_mix.stages.mixture:write_json", 2),
    ],
)
def test_killed_and_started_again(arguments, undisturbed, tmp_path, stage, target, count):
    killed = run(arguments, tmp_path / "run", ("SIGKILL", target, str(count)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # It died inside the stage: begun, not finished.
    row = stage_named(stage)
    assert (RunDirectory(tmp_path / "run").work_path(stage, resumable=row.resumable) / "started.json").exists()
    assert not (tmp_path / "run" / stage / "manifest.json").exists()
    metrics = tmp_path / "run" / "proxy" / "metrics.jsonl"
    # The steps before the checkpoint (every five) are not made again: their seconds stay.
    kept = metrics.read_bytes().splitlines()[:5] if stage == "proxy" else []
    again = run(arguments, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    for name in RESULTS:
        assert (tmp_path / "run" / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert metrics.read_bytes().splitlines()[: len(kept)] == kept


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(arguments, undisturbed, tmp_path):
    stopped = run(arguments, tmp_path / "run", ("SIGINT", "doremi_mix.train:_flush", "3"))
    assert stopped.returncode == 130
    assert stopped.stderr.splitlines()[-1] == "stopped; the same command goes on from the last checkpoint"
    assert (tmp_path / "run" / "reference" / "checkpoint.pt").exists()
    assert len((tmp_path / "run" / "reference" / "metrics.jsonl").read_text().splitlines()) in (3, 4)
    again = run(arguments, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    for name in RESULTS:
        assert (tmp_path / "run" / name).read_bytes() == (undisturbed / name).read_bytes(), name

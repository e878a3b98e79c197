"""Several processes, on one machine or two, with whole or split models, learn what one process learns."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import changed, finetune, read_log
from safetensors.torch import load_file

from doremi_mix import learn

STEPS = 50


@pytest.fixture(scope="module")
def settings(model_config):
    return {
        "tokenize": {"vocab_size": 400, "context_length": 64},
        # A batch of seven does not divide by two.
        "reference": {"model": str(model_config), "steps": STEPS, "batch_size": 7, "learning_rate": 0.003, "folds": 1},
        "proxy": {"method": "doremi"},
    }


@pytest.fixture(scope="module")
def one_process(corpus, settings, tmp_path_factory):
    """The same run in one process, in two micro-batches."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    reference = {**settings["reference"], "gradient_accumulation_steps": 2}
    learn(
        corpus,
        run_dir,
        quiet=True,
        tokenize=settings["tokenize"],
        reference=reference,
        proxy={**settings["proxy"], "gradient_accumulation_steps": 2},
    )
    return run_dir


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def command(corpus, settings, run_dir, *more):
    sets = [f"{section}.{key}={value}" for section, values in settings.items() for key, value in values.items()]
    flags = [text for setting in [*sets, *more] for text in ("--set", setting)]
    return ["-m", "doremi_mix", "learn", str(corpus), "--run-dir", str(run_dir), *flags]


def start(launch, rest, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launch, *rest],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def finish(*processes):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)[-5000:]
    return outputs


def processes_of(run_dir):
    """How many processes trained, as the stage itself saw it, and whether they shared the model."""
    metrics = json.loads((run_dir / "proxy" / "metrics.json").read_text())
    return metrics["num_processes"], metrics["split_over_processes"]


def assert_same_learning(one, two):
    """Every update within 1e-5, the same draws, the same tokens."""
    left, right = (read_log(run_dir / "proxy" / "trajectory.jsonl") for run_dir in (one, two))
    assert len(left) == len(right) == STEPS
    for a, b in zip(left, right, strict=True):
        assert b["domain_weights"] == pytest.approx(a["domain_weights"], abs=1e-5)
    draws = [(run_dir / "reference_losses" / "sequence_ids.npy").read_bytes() for run_dir in (one, two)]
    assert draws[0] == draws[1]
    metrics = [read_log(run_dir / "reference" / "metrics.jsonl") for run_dir in (one, two)]
    assert [line["num_tokens"] for line in metrics[0]] == [line["num_tokens"] for line in metrics[1]]
    for a, b in zip(*metrics, strict=True):
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
    losses = [
        json.loads((run_dir / "proxy" / "metrics.json").read_text())["held_out_loss_average"] for run_dir in (one, two)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_two_processes(corpus, settings, one_process, tmp_path):
    launch = ["--nproc-per-node", "2", "--master-port", free_port()]
    finish(start(launch, command(corpus, settings, tmp_path / "run")))
    assert processes_of(one_process) == (1, False)
    assert processes_of(tmp_path / "run") == (2, False)
    assert_same_learning(one_process, tmp_path / "run")


def test_a_model_split_over_two_processes(corpus, settings, one_process, tmp_path):
    """FSDP."""
    launch = ["--nproc-per-node", "2", "--master-port", free_port()]
    finish(start(launch, command(corpus, settings, tmp_path / "run", "reference.shard=true")))
    assert processes_of(tmp_path / "run") == (2, True)
    assert_same_learning(one_process, tmp_path / "run")
    models = [run_dir / "proxy" / "model" for run_dir in (one_process, tmp_path / "run")]
    whole, split = (sorted(path.name for path in model.iterdir()) for model in models)
    assert whole == split


def test_what_two_processes_split_goes_on_in_one(corpus, settings, one_process, tmp_path):
    """Both are killed in the middle of the proxy; one goes on from the checkpoint."""
    driver = [str(Path(__file__).with_name("kill_at.py")), "SIGKILL", "doremi_mix.train:_flush", str(STEPS + 20), "--"]
    _, _, *rest = command(corpus, settings, tmp_path / "run", "reference.shard=true")
    killed = start(["--nproc-per-node", "2", "--master-port", free_port()], [*driver, *rest])
    output = killed.communicate(timeout=300)[0]
    assert "SIGKILL" in output
    assert (tmp_path / "run" / "proxy" / "checkpoint.pt").exists(), output
    # Every third step has a checkpoint, and the killed one may not have been written yet.
    kept = (tmp_path / "run" / "proxy" / "metrics.jsonl").read_bytes().splitlines()[:12]
    learn(corpus, tmp_path / "run", quiet=True, **settings)
    assert processes_of(tmp_path / "run") == (1, False)
    after = (tmp_path / "run" / "proxy" / "metrics.jsonl").read_bytes().splitlines()
    assert after[: len(kept)] == kept  # not made again
    assert_same_learning(one_process, tmp_path / "run")


def test_two_machines(corpus, settings, one_process, tmp_path):
    """Two launchers, each the host of one process, meet over the loopback interface under two addresses."""
    endpoint = f"127.0.0.1:{free_port()}"
    rest = command(corpus, settings, tmp_path / "run")
    machines = [
        start(
            [
                *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "rehearsal"),
                *("--rdzv-endpoint", endpoint, "--local-addr", address),
            ],
            rest,
            GLOO_SOCKET_IFNAME="lo",
        )
        for address in ("127.0.0.1", "127.0.0.2")
    ]
    finish(*machines)
    assert processes_of(tmp_path / "run") == (2, False)
    assert_same_learning(one_process, tmp_path / "run")


def test_machines_that_do_not_share_the_run_directory(corpus, settings, tmp_path):
    """The second machine sees another folder under the same name."""
    endpoint = f"127.0.0.1:{free_port()}"
    launch = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "apart"]
    machines = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        rest = command(corpus, settings, "run")
        machines.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *launch, "--rdzv-endpoint", endpoint, *rest],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=tmp_path / name,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
        )
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert all(machine.returncode for machine in machines)
    assert (
        "error: run: this process does not see the run directory of the first one; "
        "all machines must share the folder (for example over NFS)"
    ) in "".join(outputs)


@pytest.mark.parametrize("shard", ["false", "true"])
def test_a_fine_tune_in_two_processes(drawn, finetune_settings, tmp_path, shard):
    """Adapters with one matrix A for three layers: whole models that exchange gradients, and one that is split."""
    settings = changed(finetune_settings, lora_dropout=0, epochs=2)
    one = finetune(drawn, tmp_path / "one", settings)
    shutil.copytree(drawn, tmp_path / "two")
    config = tmp_path / "settings.json"
    config.write_text(json.dumps(changed(settings, shard=shard == "true")), encoding="utf-8")
    rest = ["finetune", "--run-dir", str(tmp_path / "two"), "--config", str(config)]
    # Both are killed between two checkpoints, and go on.
    killer = [str(Path(__file__).with_name("kill_at.py")), "SIGKILL", "doremi_mix.train:_flush", "9", "--"]
    killed = start(["--nproc-per-node", "2", "--master-port", free_port()], [*killer, *rest])
    assert "SIGKILL" in killed.communicate(timeout=300)[0]
    assert (tmp_path / "two" / "finetune" / "checkpoint.pt").exists()
    finish(start(["--nproc-per-node", "2", "--master-port", free_port()], ["-m", "doremi_mix", *rest]))
    two = tmp_path / "two" / "finetune"
    assert json.loads((two / "metrics.json").read_text())["num_processes"] == 2
    for a, b in zip(read_log(one / "metrics.jsonl"), read_log(two / "metrics.jsonl"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
        assert b["num_tokens"] == a["num_tokens"]
    left, right = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor - right[name]).abs().max() < 1e-3, name
    configs = [(folder / "adapter" / "adapter_config.json").read_bytes() for folder in (one, two)]
    assert configs[0] == configs[1]

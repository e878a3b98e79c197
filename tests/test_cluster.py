"""Workers as tasks of datatrove: on two hosts of one folder, Slurm and Ray; needs doremi-mix[cluster]."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_executors import NUM_ROWS, Execution, Lines, finish_filter, narrator_to
from test_row_jobs import SIZES, is_running, pids, read_parts, wait_until, write_job, write_loaded

from doremi_mix import executors
from doremi_mix.errors import ConfigError, ModelError
from doremi_mix.executors import run_worker
from doremi_mix.row_jobs import Job
from doremi_mix.row_workers import LOGS, Driver, read_error

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def datatrove():
    return pytest.importorskip("datatrove", reason="needs doremi-mix[cluster]")


@pytest.fixture
def run_dir(tmp_path, monkeypatch, datatrove):
    write_loaded(tmp_path / "run")
    monkeypatch.setattr(executors, "FEW_ROWS", 100)
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.05)
    return tmp_path / "run"


@pytest.fixture
def out():
    return Lines()


FAMILY = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from doremi_mix.errors import ModelError
from doremi_mix.filters.scores import FAMILIES, Family

def score(batch):
    rank = int(sys.argv[-2]) if sys.argv[-2:-1] and sys.argv[-2].isdigit() else -1
{body}
    return {{"number": np.arange(batch.num_rows)}}

FAMILIES["stub"] = Family(lambda settings, columns: score, reads=("instruction",))
"""


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Adds the family stub to every Python that is started from now on."""

    def add(body):
        place = tmp_path / "site"
        place.mkdir(exist_ok=True)
        (place / "sitecustomize.py").write_text(FAMILY.format(body=textwrap.indent(body, "    ")))
        monkeypatch.setenv("PYTHONPATH", str(place))

    return add


def key_job(run_dir, unit_rows=20):
    return write_job(run_dir, "text", ("text_key@text",), unit_rows=unit_rows)


def is_complete(folder):
    parts = read_parts(folder, "text_key@text")
    return {domain: positions.tolist() for domain, (positions, _) in parts.items()} == {
        domain: list(range(number)) for domain, number in SIZES.items()
    }


# --- The step.


def test_a_step_hands_on_does_its_share_and_counts(run_dir):
    from datatrove.pipeline.base import PipelineStep

    from doremi_mix.cluster import RowJobStep

    folder = key_job(run_dir)
    steps = [RowJobStep(folder, folder / LOGS, 1) for _ in range(2)]
    assert all(isinstance(step, PipelineStep) for step in steps)
    assert [list(step.run(iter(["a", "b"]), rank, 2)) for rank, step in enumerate(steps)] == [["a", "b"], ["a", "b"]]
    assert is_complete(folder)
    units = Job.read(folder).units
    expected = [sum(unit.stop - unit.start for unit in units[rank::2]) for rank in range(2)]
    assert [step.stats["rows"].total for step in steps] == expected


def test_a_step_leaves_its_error(run_dir, family):
    from doremi_mix.cluster import RowJobStep

    family("raise ModelError('gpt-5: is not here')")
    folder = write_job(run_dir, "stub", ("number",))
    step = RowJobStep(folder, folder / LOGS, 1)
    with pytest.raises(ModelError):
        list(step.run(None, 3, 4))
    assert [path.name for path in (folder / LOGS).glob("error*")] == ["error-00003.json"]
    error = read_error(folder / LOGS)
    assert (type(error), str(error)) == (ModelError, "gpt-5: is not here")


# --- Two hosts on one folder.


def test_two_hosts_do_their_own_ranks(run_dir):
    folder = key_job(run_dir)
    units = Job.read(folder).units
    for host in (1, 0):
        logs = folder / LOGS / f"host-{host}"
        with Driver("hosts", folder, logs, host=host, num_hosts=2, workers=2) as driver:
            wait_until(lambda driver=driver: driver.ended)
        assert not driver.failed, driver.log.read_text()
        ranks = {number % 4 for number, unit in enumerate(units) if unit.path(folder).exists()}
        assert ranks == ({2, 3} if host else {0, 1, 2, 3})
        assert sorted(path.name for path in (logs / "completions").iterdir()) == [
            f"{rank:05d}" for rank in (2 * host, 2 * host + 1)
        ]
    assert is_complete(folder)


def test_hosts_end_to_end(run_dir, out):
    others = Lines()
    worker = threading.Thread(target=run_worker, args=(run_dir, 1, narrator_to(others)), daemon=True)
    worker.start()
    run = Execution(run_dir, out, executor="hosts", num_hosts=2, workers=2)
    folder = key_job(run_dir)
    run(folder)
    finish_filter(run_dir)
    worker.join(60)
    assert not worker.is_alive()
    assert run.rows == NUM_ROWS
    assert is_complete(folder)
    assert others.lines[-1] == "host 1: the filter has finished"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_runs_out_of_memory_is_found_out(run_dir, out, family, workers):
    family("if rank == 0: os.kill(os.getpid(), signal.SIGKILL)")
    run = Execution(run_dir, out, executor="hosts", num_hosts=2, workers=workers)
    with pytest.raises(
        ConfigError, match=r"^a worker was killed \(SIGKILL\), which happens when memory runs out; lower"
    ):
        run(write_job(run_dir, "stub", ("number",)))


def test_a_bug_names_its_log(run_dir, out, family):
    family("if rank == 0: {}['x']")
    run = Execution(run_dir, out, executor="hosts", num_hosts=2, workers=1)
    folder = write_job(run_dir, "stub", ("number",))
    with pytest.raises(RuntimeError) as caught:
        run(folder)
    message, log = str(caught.value).split("; its log: ")
    assert message == "worker 0 ended with 1: KeyError: 'x'"
    assert "Traceback" in Path(log).read_text()


PARENT = """
import sys, time
from pathlib import Path
from doremi_mix.row_workers import Driver

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        with Driver("hosts", folder, folder / ".logs", host=0, num_hosts=2, workers=2) as driver:
            print(driver.process.pid, flush=True)
            while True:
                time.sleep(1)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def members(group):
    """Processes of a process group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_nothing_outlives_the_command(run_dir, tmp_path, family, number, code):
    family("(Path(sys.argv[1]) / f'{os.getpid()}.pid').touch(); time.sleep(300)")
    folder = write_job(run_dir, "stub", ("number",))
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), str(folder)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        group = int(parent.stdout.readline())
        wait_until(lambda: len(pids(folder)) == 2)
        assert set(pids(folder)) < set(members(group))
        (os.killpg if number == signal.SIGINT else os.kill)(parent.pid, number)
        assert parent.wait(60) == code
        wait_until(lambda: not members(group))
        assert not any(map(is_running, pids(folder)))
    finally:
        parent.kill()
        parent.stdout.close()


# --- Slurm, as far as it can be had without one.

PROGRAMS = {
    # Runs the array's tasks one after the other, in the background.
    "sbatch": """
        script=$(mktemp {place}/script-XXXX)
        for last; do :; done
        cp "$last" "$script"
        echo "$@" > {place}/arguments.txt
        count=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
        touch {place}/running
        (
            for i in $(seq 0 "$count"); do
                SLURM_ARRAY_TASK_ID=$i RUN_OFFSET=0 SLURM_NODELIST=node1 bash "$script"
            done
            rm {place}/running
        ) > {place}/output.txt 2>&1 &
        echo "Submitted batch job 77"
    """,
    "srun": """
        while [ "$1" != launch_pickled_pipeline ]; do shift; done
        exec "$@"
    """,
    "scontrol": "echo node1",
    "squeue": "[ ! -e {place}/running ] || echo 77",
    "scancel": "echo $@ > {place}/cancelled.txt",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder of programs of the names of Slurm's, on PATH."""
    place = tmp_path / "slurm"
    place.mkdir()
    # As when the command is called by its path and its environment is not activated.
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")

    def install(**replaced):
        for name, body in {**PROGRAMS, **replaced}.items():
            (place / name).write_text("#!/bin/bash\n" + textwrap.dedent(body.replace("{place}", str(place))))
            (place / name).chmod(0o755)
        return place

    return install


def test_slurm_runs_the_tasks_of_its_script(run_dir, out, slurm):
    place = slurm()
    run = Execution(run_dir, out, executor="slurm", workers=3, slurm_partition="cpu", slurm_time="01:30:00")
    folder = key_job(run_dir)
    run(folder)
    assert run.rows == NUM_ROWS
    assert is_complete(folder)
    wait_until(lambda: not (place / "running").exists())
    (script,) = place.glob("script-*")
    lines = script.read_text().splitlines()
    directives = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH")
    )
    output = directives.pop("output")
    assert directives.pop("error") == output
    assert output.startswith(str(folder / LOGS))
    assert directives == {
        "cpus-per-task": "1",
        "mem-per-cpu": "4G",
        "nodes": "1",
        "partition": "cpu",
        "job-name": "doremi-mix-job-0",
        "time": "01:30:00",
        "array": "0-2",
        "requeue": "",
    }
    assert f'export PATH={Path(sys.executable).parent}:"$PATH"' in script.read_text()
    assert (place / "arguments.txt").read_text().startswith("--export=ALL,RUN_OFFSET=0 ")
    # One submission: datatrove's own job for statistics is left out.
    assert not (place / "cancelled.txt").exists()


def test_what_sbatch_refuses(run_dir, out, slurm):
    slurm(sbatch="echo 'sbatch: error: invalid partition specified: cpu' >&2; exit 1")
    run = Execution(run_dir, out, executor="slurm", workers=3, slurm_partition="cpu")
    with pytest.raises(ConfigError) as caught:
        run(key_job(run_dir))
    assert str(caught.value) == (
        "filter.executor slurm: sbatch: error: invalid partition specified: cpu; see filter.slurm_partition and "
        "filter.slurm_time, and set what else your cluster wants (account, memory) in SBATCH_... of the environment"
    )


def test_an_error_in_a_slurm_task_stops_the_others(run_dir, out, slurm, family):
    place = slurm()
    family("raise ModelError('gpt-5: is not here; choose another')")
    run = Execution(run_dir, out, executor="slurm", workers=2, slurm_partition="cpu")
    with pytest.raises(ModelError, match=r"^gpt-5: is not here; choose another$"):
        run(write_job(run_dir, "stub", ("number",)))
    assert (place / "cancelled.txt").read_text() == "77\n"
    wait_until(lambda: not (place / "running").exists())


# --- Ray.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("raise ModelError('gpt-5: is not here; choose another')", ModelError, r"^gpt-5: is not here; choose another$"),
        ("os.kill(os.getpid(), signal.SIGKILL)", ConfigError, r"^a worker was killed \(SIGKILL\), which happens when"),
    ],
)
def test_an_error_in_a_ray_task_stops_all(run_dir, out, family, body, kind, message):
    pytest.importorskip("ray", reason="needs doremi-mix[cluster]")
    family(body)
    run = Execution(run_dir, out, executor="ray", workers=2)
    with pytest.raises(kind, match=message):
        run(write_job(run_dir, "stub", ("number",)))


# --- The same rows, whoever scores them.


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The programs of an environment with doremi-mix[cluster,filter]: a new one, or that of DOREMI_MIX_CLUSTER_VENV."""
    ready = os.environ.get("DOREMI_MIX_CLUSTER_VENV")
    if ready:
        return Path(ready) / "bin"
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "torch==2.13.0", "-e", f"{ROOT}[cluster,filter]"], check=True)
    return place / "bin"


def make_word(rng):
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Four files of 1,800 rows, and by id the rule that must reject a row of them."""
    rng = random.Random(5)
    folder = tmp_path_factory.mktemp("planted")
    names = ("alder", "beech", "cedar", "杉")
    earlier, rules = [], {}
    for name in names:
        rows = []
        for number in range(1800):
            words = [make_word(rng) for _ in range(30)]
            row = {"instruction": f"Say {words[0]} {words[1]}.", "input": "", "output": " ".join(words)}
            kind = rng.random()
            if kind < 0.04:
                row["output"] = "No."
                rules[f"{name}:{number + 1}"] = "text_length"
            elif kind < 0.08:
                row["output"] = f"{words[0]} " + "ha" * 200
                rules[f"{name}:{number + 1}"] = "character_repetition"
            elif kind < 0.14 and earlier:
                row = {**rng.choice(earlier)}
                row["output"] = row["output"].upper() + "  "  # the same to normalized texts
                rules[f"{name}:{number + 1}"] = "exact_duplicate"
            elif kind < 0.18 and earlier:
                row = {**rng.choice(earlier)}
                row["output"] += f" {words[0]}"
                rules[f"{name}:{number + 1}"] = "near_duplicate"
            else:
                earlier.append(row)
            rows.append(row)
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    sources = [{"path": str(folder / f"{name}.json"), "name": name} for name in names]
    rules_ = {"text_length": {"min": 60}, "character_repetition": {"max": 0.5}}
    filter_ = {"exact_duplicates": "spaces", "near_duplicates": 0.7, "rules": rules_}
    (folder / "config.json").write_text(json.dumps({"sources": sources, "filter": filter_}), encoding="utf-8")
    return folder / "config.json", names, rules


def command(programs, *arguments):
    return [str(programs / "doremi-mix"), *map(str, arguments)]


def filtered(programs, planted, run_dir, *settings):
    """Loads and filters; returns what was kept and rejected, and what was said."""
    config, names, _ = planted
    for arguments in (("load", "--config", config), ("filter", *(x for text in settings for x in ("--set", text)))):
        done = subprocess.run(
            command(programs, *arguments, "--run-dir", run_dir),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    kept = {name: pq.read_table(run_dir / "filter" / f"{name}.parquet").to_pylist() for name in names}
    return kept, pq.read_table(run_dir / "filter" / "rejections.parquet").to_pylist(), done.stderr


@pytest.fixture(scope="module")
def alone(programs, planted, tmp_path_factory):
    """What one process comes to."""
    return filtered(programs, planted, tmp_path_factory.mktemp("alone") / "run", "filter.workers=1")


@pytest.mark.slow
def test_one_process_finds_what_was_planted(alone, planted):
    kept, rejected, _ = alone
    _, names, rules = planted
    assert {row["id"]: row["rule"] for row in rejected} == rules
    every = {f"{name}:{number}" for name in names for number in range(1, 1801)}
    assert {row["id"] for rows in kept.values() for row in rows} == every - rules.keys()


@pytest.mark.slow
def test_two_processes_keep_the_same_rows(programs, planted, alone, tmp_path):
    assert filtered(programs, planted, tmp_path / "run", "filter.workers=2")[:2] == alone[:2]


@pytest.mark.slow
def test_two_hosts_keep_the_same_rows(programs, planted, alone, tmp_path):
    run_dir = tmp_path / "run"
    worker = subprocess.Popen(
        command(programs, "worker", "--run-dir", run_dir, "--host", 1), stderr=subprocess.PIPE, text=True
    )
    settings = ("filter.executor=hosts", "filter.num_hosts=2", "filter.workers=1")
    try:
        *found, said = filtered(programs, planted, run_dir, *settings)
        others = worker.communicate(timeout=60)[1].splitlines()
    finally:
        worker.kill()
    assert found == list(alone[:2])
    assert worker.returncode == 0
    assert f"  this is host 0 of 2; on the others: doremi-mix worker --run-dir {run_dir} --host 1" in said.splitlines()
    assert "host 1: score text, as 1 of 2 workers" in others
    assert others[-1] == "host 1: the filter has finished"


@pytest.mark.slow
def test_ray_keeps_the_same_rows(programs, planted, alone, tmp_path):
    *found, said = filtered(programs, planted, tmp_path / "run", "filter.executor=ray", "filter.workers=2")
    assert found == list(alone[:2])
    assert "  Ray gets 4 pieces; log: " in said

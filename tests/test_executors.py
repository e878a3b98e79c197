"""Who does the work, what is said while others do it, and how it ends; datatrove is replaced by threads here."""

import io
import os
import shutil
import threading
import time
from typing import ClassVar

import numpy as np
import pytest
from rich.console import Console
from test_row_jobs import SIZES, files_of, stub, wait_until, write_job, write_loaded

from doremi_mix import __version__, executors, hosts
from doremi_mix.atomic import write_json
from doremi_mix.config import Config, FilterConfig
from doremi_mix.errors import ConfigError, ModelError
from doremi_mix.executors import check_executor, make_executor, run_worker
from doremi_mix.filters.scores import FAMILIES, Family
from doremi_mix.hosts import CALL_FILE, Call, Watch, announce
from doremi_mix.progress import Narrator
from doremi_mix.row_jobs import JOB_FILE, Job, run_units
from doremi_mix.row_workers import LOGS, SLURM_JOBS, read_error, write_error
from doremi_mix.run import RunDirectory, read_json

assert stub  # a fixture of this module, too
NUM_ROWS = sum(SIZES.values())


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run with loaded rows, of which 100 are already many."""
    write_loaded(tmp_path / "run")
    monkeypatch.setattr(executors, "FEW_ROWS", 100)
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(hosts, "BEAT_SECONDS", 0.02)
    return tmp_path / "run"


@pytest.fixture
def packages(monkeypatch):
    """As if datatrove, Ray and Slurm were here."""
    monkeypatch.setattr(executors, "find_spec", lambda name: True)
    monkeypatch.setattr(executors.shutil, "which", lambda name: f"/usr/bin/{name}")


class Lines(io.StringIO):
    """What a narrator prints."""

    @property
    def lines(self):
        return self.getvalue().splitlines()


@pytest.fixture
def out():
    return Lines()


def narrator_to(stream):
    return Narrator(console=Console(file=stream, width=10_000, soft_wrap=True, highlight=False))


class Execution:
    """Runs one job as a stage would."""

    def __init__(self, run_dir, out, **settings):
        self.run = RunDirectory(run_dir)
        self.narrator = narrator_to(out)
        config = Config(sources=[{"path": "a.json"}, {"path": "b.json"}], filter=settings)
        self.execute = make_executor(config, self.run, self.narrator)
        self.rows = 0

    def __call__(self, folder, num_rows=NUM_ROWS):
        with self.narrator.track("score", num_rows, "rows") as tracker:
            self.execute(folder, num_rows, tracker)
        self.rows += tracker.done


class Driver:
    """Does a machine's share in a thread, or what ``does`` says."""

    started: ClassVar = []
    does = None

    def __init__(self, kind, folder, logs, **options):
        logs.mkdir(parents=True, exist_ok=True)
        self.kind, self.folder, self.logs, self.options = kind, folder, logs, options
        self.log = logs / "driver.log"
        self.error = None
        self.stopped = False
        Driver.started.append(self)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self):
        try:
            (Driver.does or Driver.share)(self)
        except Exception as error:
            self.error = error
            write_error(self.logs, "00000", error)

    def share(self):
        if self.kind == "hosts":
            workers, host = self.options["workers"], self.options["host"]
            for rank in range(host * workers, host * workers + workers):
                run_units(self.folder, rank, workers * self.options["num_hosts"], lambda number: None)
        else:
            run_units(self.folder, 0, 1, lambda number: None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stopped = True
        self.thread.join(10)

    @property
    def ended(self):
        return not self.thread.is_alive()

    @property
    def failed(self):
        return self.ended and self.error is not None

    def failure(self):
        return read_error(self.logs) or RuntimeError(f"log: {self.log}")


@pytest.fixture
def drivers(monkeypatch, packages):
    monkeypatch.setattr(executors, "Driver", Driver)
    monkeypatch.setattr(Driver, "started", [])
    monkeypatch.setattr(Driver, "does", None)
    return Driver


@pytest.fixture
def start():
    """Starts a worker of another machine in a thread; gives where its result will be."""
    threads, places = [], set()

    def worker(run_dir, host, out):
        places.add(run_dir)
        result = []

        def target():
            try:
                result.append(run_worker(run_dir, host, narrator_to(out)))
            except BaseException as error:
                result.append(error)

        threads.append(threading.Thread(target=target, daemon=True))
        threads[-1].start()
        return result

    yield worker
    # Whatever a test did, workers end when the filter has finished.
    for place in places:
        finish_filter(place)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def finish_filter(run_dir):
    (run_dir / "filter").mkdir(exist_ok=True)
    write_json(run_dir / "filter" / "manifest.json", {"stage": "filter", "at": time.time()})


# --- Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"executor": "hosts"},
            "filter.num_hosts is 1, but filter.executor hosts shares the work among several machines; set how many "
            "there are, or filter.executor=local",
        ),
        (
            {"executor": "slurm", "workers": 8},
            "filter.executor slurm needs filter.slurm_partition; for example: --set filter.slurm_partition=cpu",
        ),
        (
            {"executor": "slurm", "slurm_partition": "cpu"},
            "filter.executor slurm needs filter.workers; for example: --set filter.workers=32",
        ),
    ],
)
def test_settings_that_an_executor_lacks(packages, settings, message):
    with pytest.raises(ConfigError) as caught:
        check_executor(FilterConfig(**settings))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("executor", "there", "package"),
    [("hosts", (), "datatrove"), ("slurm", (), "datatrove"), ("ray", (), "datatrove"), ("ray", ("datatrove",), "ray")],
)
def test_packages_that_an_executor_lacks(monkeypatch, executor, there, package):
    monkeypatch.setattr(executors, "find_spec", lambda name: True if name in there else None)
    with pytest.raises(ConfigError) as caught:
        check_executor(FilterConfig(executor=executor, num_hosts=2))
    assert str(caught.value) == (
        f"filter.executor {executor} needs {package}; run, on every machine: pip install 'doremi-mix[cluster]'"
    )
    check_executor(FilterConfig())


def test_slurm_without_slurm(monkeypatch, packages):
    monkeypatch.setattr(executors.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_executor(FilterConfig(executor="slurm", workers=2, slurm_partition="cpu"))
    assert str(caught.value) == "filter.executor slurm: there is no sbatch here; run it on a machine that submits jobs"


# --- This machine.


@pytest.fixture
def started(monkeypatch):
    """The workers that were started as processes."""
    calls = []

    def start_none(folder, ranks, world_size, num_threads, logs, on_rows):
        calls.append((len(ranks), world_size, num_threads))
        run_units(folder, 0, 1, on_rows)

    monkeypatch.setattr(executors, "run_workers", start_none)
    return calls


@pytest.mark.parametrize("executor", ["local", "hosts", "slurm", "ray"])
def test_few_rows_are_done_at_once(run_dir, out, stub, started, drivers, executor):
    settings = {"num_hosts": 2, "slurm_partition": "cpu", "workers": 4}
    run = Execution(run_dir, out, executor=executor, **settings)
    wanted = {domain: np.arange(number) % 5 == 0 for domain, number in SIZES.items()}
    folder = write_job(run_dir, "stub", ("number",), wanted=wanted)
    run(folder, 60)
    assert run.rows == 60
    assert (started, drivers.started, out.lines) == ([], [], [])
    assert len(files_of(folder)) == len(Job.read(folder).units)


@pytest.mark.parametrize(
    ("workers", "uses_gpu", "num_gpus", "unit_rows", "expected"),
    [
        (None, False, 0, 10, (8, 8, 1)),  # one a core
        (3, False, 0, 10, (3, 3, 2)),
        (None, True, 2, 10, (2, 2, 4)),  # one a GPU
        (3, True, 2, 10, (3, 3, 2)),
        (None, False, 0, 100, (4, 4, 2)),  # as many as there are units
        (None, True, 0, 10, None),  # models without a GPU: one, here
        (1, False, 0, 10, None),
    ],
)
def test_how_many_work_on_this_machine(
    run_dir, out, stub, started, monkeypatch, workers, uses_gpu, num_gpus, unit_rows, expected
):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(executors, "num_cores", lambda: 8)
    monkeypatch.setitem(FAMILIES, "stub", Family(FAMILIES["stub"].make, uses_gpu=uses_gpu))
    run = Execution(run_dir, out, workers=workers)
    folder = write_job(run_dir, "stub", ("number",), unit_rows=unit_rows)
    run(folder)
    assert started == ([] if expected is None else [expected])
    assert run.rows == NUM_ROWS


def test_success_leaves_only_the_parts(run_dir, out):
    run = Execution(run_dir, out, workers=2)
    folder = write_job(run_dir, "text", ("text_key@text",))
    (folder / "fruit").mkdir()
    (folder / "fruit" / ".0-1.parquet.0123.tmp").write_bytes(b"half")
    run(folder)
    assert run.rows == NUM_ROWS
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {str(unit.path(folder).relative_to(folder)) for unit in Job.read(folder).units} | {JOB_FILE}
    assert not (folder / LOGS).exists()


# --- Calls.

CALL = Call("c1", "text-0123", "d", 3, 2)


def test_a_call_beats_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "BEAT_SECONDS", 0.01)
    path = tmp_path / CALL_FILE
    with announce(path, CALL):
        first = read_json(path)
        wait_until(lambda: read_json(path)["beat"] >= 3)
    assert first == {
        "id": "c1",
        "folder": "text-0123",
        "digest": "d",
        "num_hosts": 3,
        "workers": 2,
        "version": __version__,
        "beat": 0,
    }
    assert not list(tmp_path.iterdir())


def say(path, beat, call_id="c1"):
    write_json(path, {**hosts.asdict(CALL), "id": call_id, "beat": beat})


def test_a_call_of_a_killed_host_is_not_believed(tmp_path):
    path = tmp_path / CALL_FILE
    say(path, 17)
    watch = Watch(path)
    assert [watch.look() for _ in range(3)] == [None, None, None]
    # It was started again.
    say(path, 0, "c2")
    assert watch.look().id == "c2"
    assert watch.look().id == "c2"
    path.unlink()
    assert watch.look() is None


def test_a_call_that_beats_is_believed(tmp_path):
    path = tmp_path / CALL_FILE
    watch = Watch(path)
    assert watch.look() is None
    say(path, 0)  # it came while we looked
    assert watch.look() == CALL
    say(path, 5)
    late = Watch(path)
    assert late.look() is None
    say(path, 6)
    assert late.look() == CALL
    path.write_text('{"id": "c1", "beat": 7, "unheard": "of"}')
    assert late.look() is None
    path.write_text("[")
    assert late.look() is None


def test_silence_is_counted_from_the_last_change(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(hosts.time, "monotonic", lambda: now[0])
    watch = Watch(tmp_path / CALL_FILE)
    say(watch.path, 0)
    watch.look()
    now[0] = 130.0
    watch.look()
    assert watch.silent_seconds == 30
    say(watch.path, 1)
    watch.look()
    assert watch.silent_seconds == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            CALL,
            "--host 3: the filter shares its work among 3 machines (filter.num_hosts), which are 0 to 2; raise it "
            "there, or take a smaller number here",
        ),
        (
            Call("c", "f", "d", 4, 2, "0.0.9"),
            f"doremi-mix is {__version__} here and 0.0.9 on host 0; install the same version on both",
        ),
    ],
)
def test_machines_that_do_not_fit(call, message):
    with pytest.raises(ConfigError) as caught:
        call.check(3)
    assert str(caught.value) == message
    Call("c", "f", "d", 4, 2).check(3)


# --- Several machines.


def test_two_machines_share_two_jobs(run_dir, out, stub, drivers, start, tmp_path):
    others = Lines()
    shutil.move(run_dir, tmp_path / "moved")
    result = start(run_dir, 1, others)  # before there is a run
    shutil.move(tmp_path / "moved", run_dir)
    run = Execution(run_dir, out, executor="hosts", num_hosts=2, workers=3)
    first = write_job(run_dir, "stub", ("number",), unit_rows=20, name="stub-1")
    second = write_job(run_dir, "stub", ("vector",), unit_rows=20, name="stub-2")
    run(first)
    # As the score store does: a worker that is late finds no job.
    (first / JOB_FILE).unlink()
    run(second)
    finish_filter(run_dir)
    wait_until(lambda: result)
    assert result == [None]
    assert run.rows == 2 * NUM_ROWS
    by_host = {}
    for driver in drivers.started:
        assert (driver.options["num_hosts"], driver.options["workers"]) == (2, 3)
        by_host.setdefault(driver.options["host"], []).append(driver.folder.name)
    assert by_host == {0: ["stub-1", "stub-2"], 1: ["stub-1", "stub-2"]}
    assert len(files_of(first)) == len(files_of(second)) == 16
    assert not (run_dir / "scores" / CALL_FILE).exists()
    place = run_dir.absolute()
    assert out.lines == [f"  this is host 0 of 2; on the others: doremi-mix worker --run-dir {place} --host 1"]
    assert others.lines[0] == (
        f"host 1: waits for work in {place}, from the machine that filters there; Ctrl-C ends it"
    )
    assert others.lines[1] == "host 1: score stub, as 3 of 6 workers"
    assert others.lines[-1] == "host 1: the filter has finished"


def test_a_machine_that_never_comes_is_asked_for(run_dir, out, stub, drivers, monkeypatch):
    monkeypatch.setattr(executors, "LINE_EVERY_SECONDS", 0.05)
    run = Execution(run_dir, out, executor="hosts", num_hosts=3, workers=2)
    folder = write_job(run_dir, "stub", ("number",), unit_rows=20)
    polls = []

    def sleep(seconds):
        polls.append(seconds)
        if len([line for line in out.lines if "waiting" in line]) >= 2:
            raise KeyboardInterrupt  # the person gives up
        threading.Event().wait(seconds)

    with monkeypatch.context() as patched:
        patched.setattr(executors.time, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    place = run_dir.absolute()
    wanted = (
        "  waiting for host 1 (6 pieces) and host 2 (4 pieces); where it does not run, type: "
        f"doremi-mix worker --run-dir {place} --host 1; or stop here and run again with "
        "--set filter.executor=local, which does what is missing"
    )
    assert [line for line in out.lines if "waiting" in line] == [wanted, wanted]
    assert len(files_of(folder)) == 6
    # Nobody is called anymore, and what was done is kept.
    assert not (run_dir / "scores" / CALL_FILE).exists()
    before = files_of(folder)
    run_units(folder, 0, 1, lambda number: None)
    assert before.items() <= files_of(folder).items()


def test_a_worker_that_was_killed_goes_on_where_it_was(run_dir, out, stub, drivers, start):
    run = Execution(run_dir, out, executor="hosts", num_hosts=2, workers=1)
    folder = write_job(run_dir, "stub", ("number",), unit_rows=20)
    run_units(folder, 1, 4, lambda number: None)  # what it had done by then
    before = files_of(folder)
    here = threading.Thread(target=run, args=(folder,), daemon=True)
    here.start()
    wait_until(lambda: len(files_of(folder)) == 8 + 4)
    assert here.is_alive()
    result = start(run_dir, 1, Lines())  # long after host 0
    here.join(30)
    finish_filter(run_dir)
    wait_until(lambda: result)
    assert (result, run.rows) == ([None], NUM_ROWS)
    assert len(files_of(folder)) == 16
    assert before.items() <= files_of(folder).items()


def test_an_error_on_another_machine_stops_all(run_dir, out, stub, drivers, start, monkeypatch):
    def fail_on_host_1(driver):
        if driver.options["host"]:
            raise ModelError("gpt-5: is not here; choose another")
        driver.share()

    monkeypatch.setattr(Driver, "does", fail_on_host_1)
    others = Lines()
    result = start(run_dir, 1, others)
    run = Execution(run_dir, out, executor="hosts", num_hosts=2, workers=1)
    folder = write_job(run_dir, "stub", ("number",), unit_rows=20)
    with pytest.raises(ModelError, match=r"^gpt-5: is not here; choose another$"):
        run(folder)
    assert not (run_dir / "scores" / CALL_FILE).exists()
    wait_until(lambda: result or "wants no more" in others.getvalue() or "is done" in others.getvalue())
    finish_filter(run_dir)
    wait_until(lambda: result)
    assert result[0] is None or isinstance(result[0], ModelError)


def test_an_error_here_stops_all(run_dir, out, stub, drivers, start, monkeypatch):
    def fail_on_host_0(driver):
        if not driver.options["host"]:
            raise ModelError("gpt-5: is not here; choose another")
        while not driver.stopped:
            time.sleep(0.01)

    monkeypatch.setattr(Driver, "does", fail_on_host_0)
    run = Execution(run_dir, out, executor="hosts", num_hosts=2, workers=1)
    folder = write_job(run_dir, "stub", ("number",), unit_rows=20)
    with pytest.raises(ModelError, match=r"^gpt-5: is not here; choose another$"):
        run(folder)


def test_a_worker_that_is_called_off_goes_on_with_the_next_call(run_dir, out, stub, drivers, start, monkeypatch):
    def hang_on_host_1(driver):
        while not driver.stopped:
            time.sleep(0.01)

    monkeypatch.setattr(Driver, "does", hang_on_host_1)
    folder = write_job(run_dir, "stub", ("number",), unit_rows=20)
    others = Lines()
    result = start(run_dir, 1, others)
    call = Call("c1", "job-0", hosts.digest_of(folder), 2, 1)
    with announce(run_dir / "scores" / CALL_FILE, call):
        wait_until(lambda: drivers.started)
    wait_until(lambda: drivers.started[0].stopped)
    monkeypatch.setattr(Driver, "does", None)
    with announce(run_dir / "scores" / CALL_FILE, hosts.Call("c2", "job-0", call.digest, 2, 1)):
        wait_until(lambda: len(files_of(folder)) == 8)
    finish_filter(run_dir)
    wait_until(lambda: result)
    assert result == [None]
    assert others.lines[1:3] == ["host 1: score job, as 1 of 2 workers", "host 1: score job: host 0 wants no more"]


def test_a_worker_waits_for_the_job_that_it_was_called_for(run_dir, stub, drivers, start):
    folder = write_job(run_dir, "stub", ("vector",), unit_rows=20)
    old = (folder / JOB_FILE).read_bytes()
    write_job(run_dir, "stub", ("number",), unit_rows=20)
    call = Call("c1", "job-0", hosts.digest_of(folder), 2, 1)
    new = (folder / JOB_FILE).read_bytes()
    (folder / JOB_FILE).write_bytes(old)
    others = Lines()
    result = start(run_dir, 1, others)
    with announce(run_dir / "scores" / CALL_FILE, call):
        time.sleep(0.3)
        assert drivers.started == []
        (folder / JOB_FILE).write_bytes(new)
        wait_until(lambda: len(files_of(folder)) == 8)
    finish_filter(run_dir)
    wait_until(lambda: result)
    assert result == [None]


def test_a_worker_says_when_host_0_is_not_heard(run_dir, stub, drivers, start, monkeypatch):
    monkeypatch.setattr(executors, "SILENT_SECONDS", 0.2)
    folder = write_job(run_dir, "stub", ("number",), unit_rows=20)
    path = run_dir / "scores" / CALL_FILE
    digest = hosts.digest_of(folder)
    others = Lines()
    result = start(run_dir, 1, others)
    wait_until(lambda: others.lines)
    write_json(path, {**hosts.asdict(Call("c1", "job-0", digest, 2, 1)), "beat": 0})  # and is killed
    silent = "host 1: host 0 is not heard anymore; when it runs again, this goes on"
    wait_until(lambda: silent in others.lines)
    time.sleep(0.4)
    assert others.lines.count(silent) == 1
    with announce(path, Call("c2", "job-0", digest, 2, 1)):
        wait_until(lambda: len(drivers.started) == 2)
    finish_filter(run_dir)
    wait_until(lambda: result)
    assert result == [None]


def test_a_worker_that_does_not_fit_ends(run_dir, stub, drivers, start):
    folder = write_job(run_dir, "stub", ("number",))
    result = start(run_dir, 2, Lines())
    with announce(run_dir / "scores" / CALL_FILE, Call("c1", "job-0", hosts.digest_of(folder), 2, 1)):
        wait_until(lambda: result)
    assert isinstance(result[0], ConfigError)
    assert str(result[0]).startswith("--host 2: the filter shares its work among 2 machines")


def test_a_filter_that_had_finished_before_ends_no_worker(run_dir, drivers, start):
    finish_filter(run_dir)
    others = Lines()
    result = start(run_dir, 1, others)
    time.sleep(0.3)
    assert result == []
    finish_filter(run_dir)
    wait_until(lambda: result)
    assert (result, others.lines[-1]) == ([None], "host 1: the filter has finished")


# --- Ray and Slurm.


def test_ray_gets_the_job(run_dir, out, stub, drivers):
    run = Execution(run_dir, out, executor="ray", workers=5)
    folder = write_job(run_dir, "stub", ("number",))
    run(folder)
    (driver,) = drivers.started
    assert (driver.kind, driver.folder, driver.options) == ("ray", folder, {"tasks": 5})
    assert run.rows == NUM_ROWS


def test_ray_that_leaves_pieces_is_found_out(run_dir, out, stub, drivers, monkeypatch):
    monkeypatch.setattr(executors, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(Driver, "does", lambda driver: None)
    run = Execution(run_dir, out, executor="ray")
    with pytest.raises(RuntimeError, match=r"log: .*driver\.log$"):
        run(write_job(run_dir, "stub", ("number",)))


QUEUE = """#!/bin/sh
echo "$0 $*" >> {calls}
{body}
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch, drivers):
    """Puts a squeue and a scancel on PATH; squeue does what the test says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    calls = tmp_path / "calls.txt"
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(executors, "LINE_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(executors, "GRACE_SECONDS", 0.3)

    def submit(driver):
        (driver.logs / SLURM_JOBS).write_text("41\n42\n")

    monkeypatch.setattr(Driver, "does", submit)

    def install(body):
        for name, text in (("squeue", body), ("scancel", "")):
            (folder / name).write_text(QUEUE.format(calls=calls, body=text))
            (folder / name).chmod(0o755)
        return calls

    return install


@pytest.mark.parametrize("body", ["true", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"])
def test_a_slurm_job_that_ended_too_early(run_dir, out, stub, slurm, body):
    calls = slurm(body)
    run = Execution(run_dir, out, executor="slurm", workers=4, slurm_partition="cpu", slurm_time="01:00:00")
    folder = write_job(run_dir, "stub", ("number",))
    with pytest.raises(ConfigError) as caught:
        run(folder)
    (driver,) = Driver.started
    assert driver.options == {"tasks": 4, "partition": "cpu", "time": "01:00:00"}
    assert str(caught.value) == (
        "Slurm's job 41, 42 has ended and 9 of 9 pieces are missing, as happens when its time (filter.slurm_time) or "
        f"memory ran out; logs: {driver.logs}; run the same command again, which does what is missing"
    )
    asked = [line.partition("bin/")[2] for line in calls.read_text().splitlines()]
    assert set(asked[:-1]) == {"squeue --noheader --jobs 41,42"}
    assert asked[-1] == "scancel 41 42"


@pytest.mark.parametrize(
    "body", ["echo '41_[0-3] cpu doremi PD 0:00'", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1"]
)
def test_a_slurm_job_that_waits_is_waited_for(run_dir, out, stub, slurm, body):
    slurm(body)
    run = Execution(run_dir, out, executor="slurm", workers=4, slurm_partition="cpu")
    folder = write_job(run_dir, "stub", ("number",))
    thread = threading.Thread(target=run, args=(folder,), daemon=True)
    thread.start()
    line = "  Slurm's job 41, 42: 9 of 9 pieces to go; see: squeue --jobs 41,42"
    wait_until(lambda: out.lines.count(line) >= 2)
    time.sleep(0.5)  # longer than the grace of a job that has ended
    run_units(folder, 0, 1, lambda number: None)
    thread.join(20)
    assert run.rows == NUM_ROWS

"""Who scores rows (``filter.executor``): processes of this machine, machines on a shared folder, Slurm, or Ray.

All of them do the same: the units of a job (``row_jobs``) that are missing.  The files that are there are what this
process goes by, so it does not matter how a worker ended, or what another machine's clock says.  What stops a worker is
raised here, in one line.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from doremi_mix.config import Config, FilterConfig
from doremi_mix.errors import ConfigError
from doremi_mix.hosts import CALL_FILE, Call, Watch, announce, digest_of
from doremi_mix.progress import LINE_EVERY_SECONDS, Narrator, Tracker
from doremi_mix.row_jobs import JOB_FILE, Job, run_units
from doremi_mix.row_workers import LOGS, SLURM_JOBS, Driver, num_cores, read_error, run_workers
from doremi_mix.run import MANIFEST, RunDirectory
from doremi_mix.score_store import SCORES, Executor

FEW_ROWS = 5_000
"""Fewer rows than this are not worth the start of another process."""

POLL_SECONDS = 0.5

GRACE_SECONDS = 60.0
"""How long a file may take to be seen here after another machine wrote it: network file systems remember."""

SILENT_SECONDS = 60.0
"""After so long without a beat, host 0 is said not to be heard."""


def check_executor(settings: FilterConfig) -> None:
    """Raises ConfigError when the executor lacks a setting, a package or a program."""
    kind = settings.executor
    if kind == "local":
        return
    _need(kind, "datatrove")
    if kind == "ray":
        _need(kind, "ray")
    if kind == "hosts" and settings.num_hosts < 2:
        raise ConfigError(
            "filter.num_hosts is 1, but filter.executor hosts shares the work among several machines; set how many "
            "there are, or filter.executor=local"
        )
    if kind == "slurm":
        for key, example in (("slurm_partition", "cpu"), ("workers", "32")):
            if getattr(settings, key) is None:
                raise ConfigError(
                    f"filter.executor slurm needs filter.{key}; for example: --set filter.{key}={example}"
                )
        if shutil.which("sbatch") is None:
            raise ConfigError("filter.executor slurm: there is no sbatch here; run it on a machine that submits jobs")


def _need(kind: str, package: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(
            f"filter.executor {kind} needs {package}; run, on every machine: pip install 'doremi-mix[cluster]'"
        )


def make_executor(config: Config, run: RunDirectory, narrator: Narrator) -> Executor:
    """Returns what runs a job as ``filter.executor`` says.

    Args:
        config: of the run.
        run: the run directory, which every machine sees.
        narrator: says what is waited for.

    Raises:
        ConfigError: the executor lacks a setting, a package or a program.
    """
    settings = config.filter
    check_executor(settings)
    runner = {"local": _run_local, "hosts": _run_hosts, "slurm": _run_slurm, "ray": _run_ray}[settings.executor]
    greeted = False

    def execute(folder: Path, num_rows: int, tracker: Tracker) -> None:
        nonlocal greeted
        if num_rows < FEW_ROWS:
            run_units(folder, 0, 1, tracker.advance)
            return
        if settings.executor == "hosts" and not greeted:
            greeted = True
            others = " ".join(worker_command(run, host) for host in range(1, settings.num_hosts))
            narrator.say(f"  this is host 0 of {settings.num_hosts}; on the others: {others}")
        runner(_Work(settings, run, narrator, folder.absolute(), num_rows, tracker))
        # What a killed worker left half written, and logs of what went well.
        for path in folder.glob("*/.*.tmp"):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / LOGS, ignore_errors=True)

    return execute


class _Work:
    """One job to run, and who is told about it."""

    def __init__(
        self,
        settings: FilterConfig,
        run: RunDirectory,
        narrator: Narrator,
        folder: Path,
        num_rows: int,
        tracker: Tracker,
    ) -> None:
        self.settings = settings
        self.run = run
        self.narrator = narrator
        self.folder = folder
        self.job = Job.read(folder)
        self.tracker = tracker
        self.id = uuid.uuid4().hex[:12]
        self._num_rows = num_rows
        self._num_told = 0
        # By domain and name of the file, the position in the job.
        self._missing: dict[str, dict[str, int]] = {}
        for position, unit in enumerate(self.job.units):
            self._missing.setdefault(unit.domain, {})[unit.path(folder).name] = position

    @property
    def logs(self) -> Path:
        """Where this attempt leaves logs."""
        return self.folder / LOGS / self.id

    def workers(self, machines: int = 1) -> int:
        """Returns the number of processes on each machine: as set, else one a core, for models one a GPU."""
        wanted = self.settings.workers
        if wanted is None and self.job.uses_gpu:
            import torch

            wanted = torch.cuda.device_count() or 1
        return min(wanted or num_cores(), math.ceil(len(self.job.units) / machines))

    def missing(self) -> list[int]:
        """Returns the positions of the units that are not there, and tells the tracker of those that are new."""
        for domain, names in self._missing.items():
            with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / domain) as entries:
                for name in names.keys() & {entry.name for entry in entries}:
                    del names[name]
        left = [position for names in self._missing.values() for position in names.values()]
        num_units = len(self.job.units)
        num_done = self._num_rows * (num_units - len(left)) // num_units
        if num_done > self._num_told:
            self.tracker.advance(num_done - self._num_told)
            self._num_told = num_done
        return left

    def wait(self, state: Callable[[list[int]], str | None]) -> None:
        """Waits for all units; says something every 15 seconds in which none came.

        Args:
            state: given the units that are missing, says what is waited for, or raises when nobody works on them.

        Raises:
            DoremiMixError: as a worker raised it.
            RuntimeError: a worker failed otherwise; the message names its log.
        """
        last, spoke = -1, time.monotonic()
        while left := self.missing():
            if (error := read_error(self.logs)) is not None:
                raise error
            line = state(left)
            if len(left) != last:
                last, spoke = len(left), time.monotonic()
            elif line is not None and time.monotonic() - spoke >= LINE_EVERY_SECONDS:
                self.narrator.say(line)
                spoke = time.monotonic()
            time.sleep(POLL_SECONDS)


class _Grace:
    """Says when something has been so for too long."""

    def __init__(self) -> None:
        self._since: float | None = None

    def is_over(self, now_so: bool) -> bool:
        """Says whether it is so, and has been for the whole of the time."""
        if not now_so:
            self._since = None
            return False
        self._since = self._since or time.monotonic()
        return time.monotonic() - self._since > GRACE_SECONDS


def _run_local(work: _Work) -> None:
    workers = work.workers()
    if workers == 1:
        run_units(work.folder, 0, 1, work.tracker.advance)
        return
    num_threads = max(1, num_cores() // workers)
    run_workers(work.folder, range(workers), workers, num_threads, work.logs, work.tracker.advance)


def _run_hosts(work: _Work) -> None:
    num_hosts = work.settings.num_hosts
    workers = work.workers(num_hosts)
    digest = digest_of(work.folder)
    assert digest is not None
    call = Call(work.id, work.folder.name, digest, num_hosts, workers)

    def state(left: list[int]) -> str | None:
        if not driver.ended:
            return None
        by_host = [0] * num_hosts
        for position in left:
            by_host[position % (num_hosts * workers) // workers] += 1
        if by_host[0] and (driver.failed or grace.is_over(True)):
            raise driver.failure()
        waited = {host: number for host, number in enumerate(by_host) if host and number}
        pieces = " and ".join(f"host {host} ({number:,} pieces)" for host, number in waited.items())
        return (
            f"  waiting for {pieces}; where it does not run, type: {worker_command(work.run, next(iter(waited), 1))}; "
            "or stop here and run again with --set filter.executor=local, which does what is missing"
        )

    grace = _Grace()
    with (
        announce(work.run.path / SCORES / CALL_FILE, call),
        Driver("hosts", work.folder, work.logs, host=0, num_hosts=num_hosts, workers=workers) as driver,
    ):
        work.wait(state)


def _run_slurm(work: _Work) -> None:
    def jobs() -> list[str]:
        path = work.logs / SLURM_JOBS
        return path.read_text().split() if path.exists() else []

    def state(left: list[int]) -> str | None:
        if driver.failed:
            raise driver.failure()
        if not driver.ended:
            return None
        name, pieces = ", ".join(jobs()), f"{len(left):,} of {len(work.job.units):,} pieces"
        if grace.is_over(not queue.holds(jobs())):
            raise ConfigError(
                f"Slurm's job {name} has ended and {pieces} are missing, as happens when its time (filter.slurm_time) "
                f"or memory ran out; logs: {work.logs}; run the same command again, which does what is missing"
            )
        return f"  Slurm's job {name}: {pieces} to go; see: squeue --jobs {name.replace(' ', '')}"

    grace, queue = _Grace(), _SlurmQueue()
    options = {"tasks": work.workers(), "partition": work.settings.slurm_partition, "time": work.settings.slurm_time}
    with Driver("slurm", work.folder, work.logs, **options) as driver:
        try:
            work.wait(state)
        except BaseException:
            if numbers := jobs():
                subprocess.run(["scancel", *numbers], check=False, capture_output=True)
            raise


class _SlurmQueue:
    """Which jobs Slurm still has, asked for every 15 seconds at most."""

    def __init__(self) -> None:
        self._next_look = 0.0
        self._holds = True

    def holds(self, jobs: list[str]) -> bool:
        """Says whether any of them waits or runs; when Slurm does not answer, they may."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LINE_EVERY_SECONDS
            command = ["squeue", "--noheader", "--jobs", ",".join(jobs)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            # A job that ended some minutes ago is no valid one anymore.
            self._holds = "Invalid job id" not in done.stderr if done.returncode else bool(done.stdout.strip())
        return self._holds


def _run_ray(work: _Work) -> None:
    def state(left: list[int]) -> str | None:
        if driver.failed or grace.is_over(driver.ended):
            raise driver.failure()
        return f"  Ray: {len(left):,} of {len(work.job.units):,} pieces to go; log: {driver.log}"

    grace = _Grace()
    with Driver("ray", work.folder, work.logs, tasks=work.settings.workers) as driver:
        work.narrator.say(f"  Ray gets {len(work.job.units):,} pieces; log: {driver.log}")
        work.wait(state)


def worker_command(run: RunDirectory, host: int) -> str:
    """Returns what to type on another machine."""
    return f"doremi-mix worker --run-dir {shlex.quote(str(run.path.absolute()))} --host {host}"


def run_worker(run_dir: Path, host: int, narrator: Narrator) -> None:
    """Scores rows for the filter of another machine, job after job, until that filter has finished.

    Takes no lock and needs no run yet; may be stopped and started at any time.

    Args:
        run_dir: the run directory, as this machine sees it.
        host: which of the machines this is; 0 is the one that runs the filter.
        narrator: says what is done.

    Raises:
        ConfigError: the filter does not count so many machines, or has another version of this package.
        DoremiMixError: as a worker raised it.
        RuntimeError: a worker failed otherwise; the message names its log.
    """
    _need("hosts", "datatrove")
    run = RunDirectory(run_dir.absolute())
    watch = Watch(run.path / SCORES / CALL_FILE)
    before = _finished_filter(run)
    heard = ""
    narrator.say(f"host {host}: waits for work in {run.path}, from the machine that filters there; Ctrl-C ends it")
    while True:
        call = watch.look()
        if call is not None and call.id != heard:
            heard = call.id
            call.check(host)
            _do_share(call, host, watch, narrator)
        elif call is None and _finished_filter(run) not in (before, None):
            narrator.say(f"host {host}: the filter has finished")
            return
        if call is not None and heard and watch.silent_seconds > SILENT_SECONDS:
            heard = ""
            narrator.say(f"host {host}: host 0 is not heard anymore; when it runs again, this goes on")
            watch = Watch(watch.path)
        time.sleep(POLL_SECONDS)


def _finished_filter(run: RunDirectory) -> tuple[int, int] | None:
    """Returns what tells the result of a filter from that of another one."""
    try:
        stat = (run.stage_path("filter") / MANIFEST).stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _do_share(call: Call, host: int, watch: Watch, narrator: Narrator) -> None:
    """Does this machine's share of a job, unless it is called off."""
    folder = watch.path.parent / call.folder
    name = call.folder.rpartition("-")[0]

    def called_off() -> bool:
        now = watch.look()
        return now is None or now.id != call.id

    while digest_of(folder) != call.digest:
        if called_off():
            return
        time.sleep(POLL_SECONDS)
    narrator.say(f"host {host}: score {name}, as {call.workers} of {call.num_hosts * call.workers} workers")
    options = {"host": host, "num_hosts": call.num_hosts, "workers": call.workers}
    with Driver("hosts", folder, folder / LOGS / call.id, **options) as driver:
        while not driver.ended and not called_off():
            time.sleep(POLL_SECONDS)
        # Without a call, host 0 has what it waited for or has given up, and last workers may miss the files of the job.
        if driver.failed and not called_off():
            raise driver.failure()
        narrator.say(f"host {host}: score {name}: " + ("its share is done" if driver.ended else "host 0 wants no more"))
    if not (folder / JOB_FILE).exists():
        shutil.rmtree(folder / LOGS, ignore_errors=True)

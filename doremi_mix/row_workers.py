"""Workers of row jobs as processes: started, listened to, and ended together, however one of them ends.

A worker is a process that does its share of a job (``row_jobs.run_units``) and says so on stdout, in JSON lines.  It
ends when the process that started it does, and what it and its libraries print is in a log until the job has succeeded.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import doremi_mix.errors as known_errors
from doremi_mix.atomic import write_json
from doremi_mix.errors import ConfigError, DoremiMixError
from doremi_mix.row_jobs import Job, run_units
from doremi_mix.run import read_json

LOGS = ".logs"
SLURM_JOBS = "slurm_jobs.txt"
"""Among the logs: the numbers of the jobs that Slurm has made of one."""

WORKER = ("-P", "-m", "doremi_mix.row_workers")
"""What Python runs as a worker; -P: what lies about in the current folder is no module of ours."""

LAST_SECONDS = 5.0
"""How long a worker that is told to end may take."""


def run_workers(
    folder: Path, ranks: Iterable[int], world_size: int, num_threads: int, logs: Path, on_rows: Callable[[int], None]
) -> None:
    """Runs workers of a job as processes of this machine, and waits for them; when one fails, the others end.

    Args:
        folder: of the job.
        ranks: of the workers.
        world_size: number of workers, here and elsewhere.
        num_threads: of each worker, unless the environment says otherwise.
        logs: where what they and their libraries print goes, a file for each.
        on_rows: called with the number of rows after each unit.

    Raises:
        DoremiMixError: as a worker raised it, or a worker was killed.
        RuntimeError: a worker failed otherwise; the message names its log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    said: queue.Queue[tuple[int, str | None]] = queue.Queue()
    processes: dict[int, subprocess.Popen[str]] = {}
    try:
        for rank in ranks:
            processes[rank] = _start_worker(folder, rank, world_size, num_threads, log_of(logs, rank))
            threading.Thread(target=_listen, args=(processes[rank], rank, said), daemon=True).start()
        running = len(processes)
        while running:
            rank, line = said.get()
            if line is None:
                running -= 1
                _check_end(rank, processes[rank].wait(), log_of(logs, rank))
                continue
            message = json.loads(line)
            if "error" in message:
                raise named_error(message)
            on_rows(message["rows"])
    finally:
        _end(processes.values())


class Driver:
    """The process in which datatrove runs (``cluster``), in a process group of its own, which ends with the block.

    Attributes:
        logs: where it and its workers leave logs and errors.
        log: its own.
        process: it.
    """

    def __init__(self, kind: str, folder: Path, logs: Path, **options: Any) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = logs
        self.log = logs / "driver.log"
        # Not with -m: what is pickled there must come from the module of its name.
        code = "from doremi_mix.cluster import main; main()"
        command = [sys.executable, "-P", "-c", code, kind, str(folder), str(logs), json.dumps(options)]
        # Slurm's tasks know that they are some by this; we are none, even when the command runs in one.
        environment = {key: value for key, value in os.environ.items() if key != "SLURM_ARRAY_TASK_ID"}
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, process_group=0
            )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            # The last piece is there before datatrove has written its statistics.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(LAST_SECONDS)
        if self.process.poll() is None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(LAST_SECONDS)
                    break
        assert self.process.stdin is not None
        self.process.stdin.close()

    @property
    def ended(self) -> bool:
        """Whether it has ended, well or not."""
        return self.process.poll() is not None

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not well."""
        return bool(self.process.poll())

    def failure(self, who: str = "*") -> Exception:
        """Returns why units are missing that should be there: as a worker said, else as the log says."""
        said = read_error(self.logs, who)
        return said or RuntimeError(f"workers ended before their work: {last_line(self.log)}; log: {self.log}")


def log_of(logs: Path, rank: int) -> Path:
    """Returns what a worker printed."""
    return logs / f"worker-{rank:05d}.log"


def named_error(message: Mapping[str, str]) -> Exception:
    """Makes an error again of what another process said about it."""
    kind = getattr(known_errors, message["error"], RuntimeError)
    error: Exception = kind(message["message"])
    return error


def write_error(logs: Path, who: str, error: Exception) -> None:
    """Leaves what stopped a worker to the process that waits for it, here or on another machine."""
    # Only our own errors keep their kind.
    kind = type(error).__name__ if isinstance(error, DoremiMixError) else RuntimeError.__name__
    message = str(error) if isinstance(error, DoremiMixError | RuntimeError) else f"{type(error).__name__}: {error}"
    write_json(logs / f"error-{who}.json", {"error": kind, "message": message, "machine": socket.gethostname()})


def read_error(logs: Path, who: str = "*") -> Exception | None:
    """Returns what ``write_error`` left, and says where it was if that was another machine."""
    for path in sorted(logs.glob(f"error-{who}.json")):
        message = read_json(path)
        if message["machine"] != socket.gethostname():
            message["message"] += f" (on {message['machine']})"
        return named_error(message)
    return None


def last_line(log: Path) -> str:
    """Returns the last thing that a process printed: of a traceback, its error."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(folder: Path, rank: int, world_size: int, num_threads: int, log: Path) -> subprocess.Popen[str]:
    # Of OpenMP and Arrow, and of the tokenizers.
    threads = {name: str(num_threads) for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")}
    command = [sys.executable, *WORKER, str(folder), str(rank), str(world_size)]
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # tells the worker that we are gone, however we went
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env={**threads, **os.environ},
        )


def _listen(process: subprocess.Popen[str], rank: int, said: queue.Queue[tuple[int, str | None]]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            said.put((rank, line))
    said.put((rank, None))


def _check_end(rank: int, code: int, log: Path) -> None:
    """Raises when a worker did not end well."""
    if code in (-signal.SIGKILL, -signal.SIGTERM):
        raise _short_of_memory(
            f"a worker was killed ({signal.Signals(-code).name}), which happens when memory runs out"
        )
    if code:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
        raise RuntimeError(f"worker {rank} ended {how}: {last_line(log)}; its log: {log}")


def _short_of_memory(what: str) -> ConfigError:
    return ConfigError(
        f"{what}; lower filter.workers or use a machine with more memory, and run the same command again: it goes on "
        "from here"
    )


def _end(processes: Iterable[subprocess.Popen[str]]) -> None:
    """Ends what still runs."""
    for process in processes:
        process.terminate()
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_with_parent(*, whole_group: bool = False) -> None:
    """Ends this process (or its process group) at once when the one that started it is gone, however that went."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        if whole_group:
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str]) -> None:
    """Runs one worker: ``python -m doremi_mix.row_workers FOLDER RANK WORLD_SIZE``; speaks JSON lines on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of the process that started us
    end_with_parent()
    # What libraries print on stdout goes where their warnings go.
    voice = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=voice, flush=True)

    folder, rank, world_size = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    try:
        if Job.read(folder).uses_gpu:
            _take_gpu(rank)
        run_units(folder, rank, world_size, lambda num_rows: tell(rows=num_rows))
    except DoremiMixError as error:
        tell(error=type(error).__name__, message=str(error))
    except MemoryError:
        tell(error=ConfigError.__name__, message=str(_short_of_memory("a worker ran out of memory")))


def _take_gpu(rank: int) -> None:
    """Takes one of several GPUs; models go to the current one."""
    import torch

    if (num_gpus := torch.cuda.device_count()) > 1:
        torch.cuda.set_device(rank % num_gpus)


if __name__ == "__main__":
    main(sys.argv[1:])

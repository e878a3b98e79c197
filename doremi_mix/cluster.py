"""The workers of a job as tasks of datatrove: on machines that share a folder, on Slurm, or on Ray.

Everything here runs in a process of its own (``main``), which ``executors`` starts and watches, so that what datatrove
and Ray print goes to a log, and nothing of theirs outlives the command that the user typed.  A task starts one worker
(``row_workers``) and waits for it: what the system kills for its memory is then the worker, and its task can say so.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from doremi_mix.errors import ConfigError, DoremiMixError, short_reason
from doremi_mix.row_jobs import Job
from doremi_mix.row_workers import SLURM_JOBS, end_with_parent, num_cores, run_workers, write_error

MODEL_CORES = 4
"""Of a Slurm task that runs a model."""

SLURM_GB_PER_CORE = 4


class RowJobStep(PipelineStep):  # type: ignore[misc]
    """Does a task's share of a job, and counts its rows.

    Attributes:
        folder: of the job, as every machine sees it.
        logs: where the worker's log goes, and its error.
        num_threads: of the worker.
    """

    name = "Row scores"
    type = "DoReMi mix"

    def __init__(self, folder: Path, logs: Path, num_threads: int) -> None:
        super().__init__()
        self.folder = folder
        self.logs = logs
        self.num_threads = num_threads

    def run(self, data: Iterable[Any] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Hands on what came in, which it does not look at, and does the share of ``rank``."""
        yield from data or ()
        try:
            run_workers(self.folder, [rank], world_size, self.num_threads, self.logs, self._count)
        except Exception as error:
            write_error(self.logs, f"{rank:05d}", error)
            raise

    def _count(self, num_rows: int) -> None:
        self.stat_update("rows", value=num_rows, unit="piece")


def run_host(folder: Path, logs: Path, *, host: int, num_hosts: int, workers: int) -> None:
    """Does the share of one of several machines.

    Args:
        folder: of the job.
        logs: of this attempt.
        host: which machine this is, from 0.
        num_hosts: how many there are.
        workers: on each of them.
    """
    step = RowJobStep(folder, logs, max(1, num_cores() // workers))
    LocalPipelineExecutor(
        [step],
        tasks=num_hosts * workers,
        workers=workers,
        local_tasks=workers,
        local_rank_offset=host * workers,
        logging_dir=str(logs),
        skip_completed=False,  # the files of units say what is done
    ).run()


class _SlurmExecutor(SlurmPipelineExecutor):  # type: ignore[misc]
    """Without the second job that adds up statistics, which nobody reads."""

    def launch_merge_stats(self) -> None:
        pass


def run_slurm(folder: Path, logs: Path, *, tasks: int, partition: str, time: str) -> None:
    """Hands a job to Slurm, and does not wait for it.

    Args:
        folder: of the job.
        logs: of this attempt.
        tasks: of the job array.
        partition: where they run.
        time: limit of a task, hh:mm:ss.

    Raises:
        ConfigError: Slurm refused it.
    """
    uses_gpu = Job.read(folder).uses_gpu
    cores = MODEL_CORES if uses_gpu else 1
    executor = _SlurmExecutor(
        [RowJobStep(folder, logs, cores)],
        tasks=tasks,
        time=time,
        partition=partition,
        cpus_per_task=cores,
        mem_per_cpu_gb=SLURM_GB_PER_CORE,
        gpus_per_task=int(uses_gpu),
        qos="",  # as the cluster has it
        job_name=f"doremi-mix-{folder.name}",
        # The tasks find datatrove's program where this Python has it, whatever is activated there.
        env_command=f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"',
        job_id_retriever=partial(_note_job, logs / SLURM_JOBS),
        logging_dir=str(logs),
        skip_completed=False,
    )
    try:
        executor.run()
    except subprocess.CalledProcessError:
        said = [line for line in (logs / "driver.log").read_text().splitlines() if line.startswith("sbatch: ")]
        raise ConfigError(
            f"filter.executor slurm: {said[-1] if said else 'sbatch failed'}; see filter.slurm_partition and "
            "filter.slurm_time, and set what else your cluster wants (account, memory) in SBATCH_... of the environment"
        ) from None


def _note_job(path: Path, output: str) -> str:
    """Returns the number of a job out of what sbatch printed, and writes it down."""
    number = output.rsplit(maxsplit=1)[-1]
    with path.open("a") as file:
        file.write(f"{number}\n")
    return number


def run_ray(folder: Path, logs: Path, *, tasks: int | None) -> None:
    """Runs a job on the Ray cluster of this machine or of ``RAY_ADDRESS``; without one, on this machine.

    Args:
        folder: of the job.
        logs: of this attempt.
        tasks: how many; None: one for each core, for models one for each GPU (or each machine, where none has one).

    Raises:
        ConfigError: the cluster of ``RAY_ADDRESS`` does not answer.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local Ray would tell its makers
    job = Job.read(folder)
    try:
        ray.init(log_to_driver=False, include_dashboard=False)
    except ConnectionError as error:
        raise ConfigError(f"filter.executor ray: {short_reason(error)}; see RAY_ADDRESS, or unset it") from None
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = sum(int(machine.get("CPU", 0)) for machine in machines)
    gpus = sum(int(machine.get("GPU", 0)) for machine in machines) if job.uses_gpu else 0
    cores_each = 1
    if job.uses_gpu and not gpus:
        cores_each = min(int(machine["CPU"]) for machine in machines if machine.get("CPU"))
    tasks = tasks or gpus or cores // cores_each
    RayPipelineExecutor(
        [RowJobStep(folder, logs, cores_each)],
        tasks=min(tasks, len(job.units)),
        cpus_per_task=cores_each,
        mem_per_cpu_gb=0,  # reserves none: a machine with less than Ray is told of would wait for ever
        gpus_per_task=1 if gpus else 0,
        logging_dir=str(logs),
        skip_completed=False,
    ).run()


RUNNERS: Mapping[str, Callable[..., None]] = {"hosts": run_host, "slurm": run_slurm, "ray": run_ray}


def main() -> None:
    """Runs one of the above: arguments are its name, folder, logs and further arguments as JSON."""
    end_with_parent(whole_group=True)
    kind, folder, logs, options = sys.argv[1:]
    try:
        RUNNERS[kind](Path(folder), Path(logs), **json.loads(options))
    except DoremiMixError as error:
        write_error(Path(logs), "start", error)
        sys.exit(1)

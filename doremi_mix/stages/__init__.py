"""The pipeline is this table: the stages in order, what each reads, and which settings change its result.

Each stage is the module of its name in this package, with one function ``run(context)`` that reads artifacts, calls the
core and writes artifacts into ``context.folder``.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doremi_mix.config import Config
from doremi_mix.distributed import Processes
from doremi_mix.errors import StageNotFinishedError
from doremi_mix.progress import Narrator, format_seconds
from doremi_mix.run import RunDirectory, fingerprint


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a stage gets: the configuration (nothing left to choose), the run, its own folder, and where to speak."""

    config: Config
    run: RunDirectory
    folder: Path
    narrator: Narrator
    processes: Processes


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of the pipeline.

    Attributes:
        name: of the stage, its module, its folder and its command.
        reads: the earlier stages whose artifacts it reads.
        settings: what of the configuration changes its result; with the fingerprints of ``reads`` this is its
        fingerprint. summary: one line for the help text.
        resumable: whether it goes on from partial work after a kill; the others start again.
        parallel: whether all processes of a distributed run work in it; otherwise the first one does.
        version: raised when the stage's code comes to another result for the same settings.
        scratch: files that are of no use once it has finished.
    """

    name: str
    reads: tuple[str, ...]
    settings: Callable[[Config], Any]
    summary: str
    resumable: bool = False
    parallel: bool = False
    version: int = 1
    scratch: tuple[str, ...] = ()


def _load_settings(config: Config) -> Any:
    from doremi_mix.stages.load import describe_sources

    return {"sources": describe_sources(config), "load": config.load.result_settings()}


def _tokenize_settings(config: Config) -> Any:
    settings = config.tokenize.result_settings()
    if config.tokenize.tokenizer is not None:
        settings["tokenizer"] = {"files": _files_of(config.tokenize.tokenizer)}
        settings.pop("vocab_size")
    return settings


def _model_settings(config: Config, section: str) -> Any:
    settings = getattr(config, section).result_settings()
    return {**settings, "model": {"name": settings["model"], "files": _files_of(settings["model"])}}


def _draw_settings(config: Config) -> Any:
    """What decides which sequences the proxy draws, and so whose reference losses are needed."""
    return config.proxy.model_dump(include={"seed", "steps", "batch_size"})


STAGES: tuple[Stage, ...] = (
    Stage("load", (), _load_settings, "read every source into one schema"),
    Stage("tokenize", ("load",), _tokenize_settings, "text to packed token sequences, and the held-out split"),
    Stage(
        "reference",
        ("tokenize",),
        lambda config: _model_settings(config, "reference"),
        "train the reference model on the reference weights",
        resumable=True,
        parallel=True,
        scratch=("checkpoint.pt",),
    ),
    Stage(
        "reference_losses",
        ("tokenize", "reference"),
        _draw_settings,
        "score with the reference model what the proxy model will draw",
        resumable=True,
        parallel=True,
        scratch=("scored.json",),
    ),
    Stage(
        "proxy",
        ("tokenize", "reference_losses"),
        lambda config: _model_settings(config, "proxy"),
        "train the proxy model with group DRO, which moves the domain weights",
        resumable=True,
        parallel=True,
        scratch=("checkpoint.pt",),
    ),
    Stage(
        "weights", ("tokenize", "reference", "proxy"), lambda _config: {}, "average the trajectory into domain weights"
    ),
    Stage(
        "mixture",
        ("load", "tokenize", "weights"),
        lambda config: config.mixture.result_settings(),
        "draw the training set under the token budget",
    ),
)

STAGE_NAMES = tuple(stage.name for stage in STAGES)


def stage_named(name: str) -> Stage:
    """Returns a row of the table."""
    return STAGES[STAGE_NAMES.index(name)]


def wanted_fingerprint(stage: Stage, config: Config, run: RunDirectory) -> str:
    """Returns the fingerprint that the stage's result must have under this configuration.

    Raises:
        StageNotFinishedError: a stage that it reads from has no result.
    """
    upstream: dict[str, str] = {}
    for name in stage.reads:
        manifest = run.manifest(name)
        if manifest is None:
            raise StageNotFinishedError(
                f"{name} has not finished in {run.path}; run: doremi-mix {command_of(name)} --run-dir {run.path}"
            )
        upstream[name] = manifest["fingerprint"]
    return fingerprint(
        {"stage": stage.name, "version": stage.version, "settings": stage.settings(config), "reads": upstream}
    )


def command_of(name: str) -> str:
    """Returns the command of a stage: ``reference_losses`` is typed ``reference-losses``."""
    return name.replace("_", "-")


def run_stage(stage: Stage, config: Config, run: RunDirectory, narrator: Narrator, processes: Processes) -> bool:
    """Brings one stage up to date.

    Returns:
        Whether there was anything to do.
    """
    wanted = wanted_fingerprint(stage, config, run)
    manifest = run.manifest(stage.name)
    # No process may touch the folder before all have looked at it.
    processes.wait()
    if manifest is not None and manifest["fingerprint"] == wanted:
        narrator.say(f"{stage.name}: up to date")
        return False
    start = time.monotonic()
    if processes.is_main:
        folder = run.begin(stage.name, wanted, resumable=stage.resumable)
    processes.wait()
    folder = run.stage_path(stage.name)
    if stage.parallel or processes.is_main:
        module = importlib.import_module(f"doremi_mix.stages.{stage.name}")
        said = module.run(StageContext(config, run, folder, narrator, processes))
        processes_done = time.monotonic() - start
        if processes.is_main:
            run.finish(stage.name, wanted, {"seconds": round(processes_done, 3), "settings": stage.settings(config)})
            for name in stage.scratch:
                (folder / name).unlink(missing_ok=True)
            narrator.say(f"{stage.name}: {said} ({format_seconds(processes_done)})")
    processes.wait()
    return True


def run_pipeline(config: Config, run: RunDirectory, narrator: Narrator, processes: Processes) -> None:
    """Brings every stage up to date, in order; the mixture only when there is a token budget."""
    from doremi_mix.stages.mixture import check_budget

    for stage in STAGES:
        if stage.name == "mixture" and config.mixture.token_budget is None:
            continue
        run_stage(stage, config, run, narrator, processes)
        if stage.name == "tokenize" and config.mixture.token_budget is not None:
            # Now, and not after hours of training.
            check_budget(config, run)


def stage_states(config: Config, run: RunDirectory) -> dict[str, str]:
    """Says of every stage whether it is ``finished``, ``partial``, ``outdated`` or ``not started``."""
    states: dict[str, str] = {}
    for stage in STAGES:
        manifest = run.manifest(stage.name)
        if manifest is None:
            states[stage.name] = "partial" if run.stage_path(stage.name).exists() else "not started"
            continue
        states[stage.name] = "finished"
        upstream_fresh = all(states[name] == "finished" for name in stage.reads)
        if stage.name == "load":
            continue  # its fingerprint needs the sources, which may be gone by now
        if not upstream_fresh or wanted_fingerprint(stage, config, run) != manifest["fingerprint"]:
            states[stage.name] = "outdated"
    return states


def _files_of(name_or_path: str) -> Mapping[str, Any] | None:
    """Returns names and sizes of a local model's or tokenizer's files, with the content of the small ones."""
    from doremi_mix.sources.files import sha256_of

    path = Path(name_or_path)
    if not path.exists():
        return None
    files = sorted(file for file in ([path] if path.is_file() else path.iterdir()) if file.is_file())
    small = 64 * 2**20
    return {
        file.name: sha256_of(file) if file.stat().st_size < small else {"bytes": file.stat().st_size} for file in files
    }

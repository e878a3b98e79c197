"""The pipeline is this table: the stages in order, what each reads, and which settings change its result.

Each stage is the module of its name in this package, with one function ``run(context)`` that reads artifacts, calls the
core and writes artifacts into ``context.folder``.
"""

from __future__ import annotations

import functools
import gc
import importlib
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doremi_mix.config import Config
from doremi_mix.distributed import Processes
from doremi_mix.errors import ConfigError, DoremiMixError, RunDirectoryError, StageNotFinishedError
from doremi_mix.presets import PRESETS
from doremi_mix.progress import Narrator, format_seconds
from doremi_mix.run import RunDirectory, fingerprint
from doremi_mix.sources.files import sha256_of


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
        outputs: files without which it has not finished, whatever its manifest says.
    """

    name: str
    reads: tuple[str, ...]
    settings: Callable[[Config], Any]
    summary: str
    resumable: bool = False
    parallel: bool = False
    version: int = 1
    scratch: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def manifest(self, run: RunDirectory) -> dict[str, Any] | None:
        """Returns the stage's manifest when it has finished and its files are still there."""
        folder = run.stage_path(self.name)
        return run.manifest(self.name) if all((folder / name).exists() for name in self.outputs) else None


def _load_settings(config: Config) -> Any:
    from doremi_mix.stages.load import describe_sources

    return {"sources": describe_sources(config), "load": config.load.result_settings()}


def _tokenize_settings(config: Config) -> Any:
    settings = config.tokenize.result_settings()
    if config.tokenize.tokenizer is not None:
        settings["tokenizer"] = _contents_of(config.tokenize.tokenizer)
        settings.pop("vocab_size")
    return settings


def _model_settings(config: Config, section: str) -> Any:
    settings = getattr(config, section).result_settings()
    # A preset is a preset, also where a folder of its name lies about.
    return settings if settings["model"] in PRESETS else {**settings, "model": _contents_of(settings["model"])}


def _draw_settings(config: Config) -> Any:
    """What decides which sequences the proxy draws, and so whose reference losses are needed."""
    return config.proxy.model_dump(include={"seed", "steps", "batch_size"})


STAGES: tuple[Stage, ...] = (
    Stage(
        "load",
        (),
        _load_settings,
        "read every source into one schema",
        outputs=("summary.json", "rejections.parquet"),
    ),
    Stage(
        "tokenize",
        ("load",),
        _tokenize_settings,
        "text to packed token sequences, and the held-out split",
        outputs=("domains.json", "tokenizer.json", "tokens.bin", "loss_mask.bin", "sequence_documents.npy"),
    ),
    Stage(
        "reference",
        ("tokenize",),
        lambda config: _model_settings(config, "reference"),
        "train the reference model on the reference weights",
        resumable=True,
        parallel=True,
        scratch=("checkpoint.pt",),
        outputs=("model", "weights.json", "metrics.json", "metrics.jsonl"),
    ),
    Stage(
        "reference_losses",
        ("tokenize", "reference"),
        _draw_settings,
        "score with the reference model what the proxy model will draw",
        resumable=True,
        parallel=True,
        scratch=("scored.json",),
        outputs=("sequence_ids.npy", "losses.f32"),
    ),
    Stage(
        "proxy",
        ("tokenize", "reference_losses"),
        lambda config: _model_settings(config, "proxy"),
        "train the proxy model with group DRO, which moves the domain weights",
        resumable=True,
        parallel=True,
        scratch=("checkpoint.pt",),
        outputs=("trajectory.jsonl", "average.json", "metrics.json"),
    ),
    Stage(
        "weights",
        ("tokenize", "reference", "proxy"),
        lambda _config: {},
        "average the trajectory into domain weights",
        outputs=("domain_weights.json", "weights.png", "trajectory.png"),
    ),
    Stage(
        "mixture",
        ("load", "tokenize", "weights"),
        lambda config: config.mixture.result_settings(),
        "draw the training set under the token budget",
        outputs=("mixture.jsonl", "ratio.json", "allocation.json"),
    ),
)

STAGE_NAMES = tuple(stage.name for stage in STAGES)


def stage_named(name: str) -> Stage:
    """Returns a row of the table."""
    return STAGES[STAGE_NAMES.index(name)]


def wanted_fingerprint(stage: Stage, config: Config, run: RunDirectory) -> str:
    """Returns the fingerprint that the stage's result must have under this configuration.

    Raises:
        StageNotFinishedError: a stage that it reads from has no result, or one that was made with other settings.
    """
    upstream: dict[str, str] = {}
    for name in stage.reads:
        source = stage_named(name)
        manifest = source.manifest(run)
        command = f"doremi-mix {command_of(name)} --run-dir {shlex.quote(str(run.path))}"
        if manifest is None:
            raise StageNotFinishedError(f"{name} has not finished in {run.path}; run: {command}")
        # The sources of load may be gone by now, so what it kept is taken as it is.
        if name != "load" and manifest["fingerprint"] != wanted_fingerprint(source, config, run):
            raise StageNotFinishedError(
                f"{name} in {run.path} was made with other settings; run, with the same --set: {command}"
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
    manifest = stage.manifest(run)
    # No process may touch the folder before all have looked at it.
    processes.wait()
    if manifest is not None and manifest["fingerprint"] == wanted:
        if processes.is_main:
            _remove_scratch(stage, run)
        narrator.say(f"{stage.name}: up to date")
        return False
    start = time.monotonic()
    if processes.is_main:
        run.begin(stage.name, wanted, resumable=stage.resumable)
    processes.wait()
    if stage.parallel or processes.is_main:
        folder = run.work_path(stage.name, resumable=stage.resumable)
        said = _execute(stage, StageContext(config, run, folder, narrator, processes))
        if stage.parallel:
            _free_memory()
    if processes.is_main:
        seconds = time.monotonic() - start
        record = {"seconds": round(seconds, 3), "settings": stage.settings(config)}
        run.finish(stage.name, wanted, record, resumable=stage.resumable)
        _remove_scratch(stage, run)
        narrator.say(f"{stage.name}: {said} ({format_seconds(seconds)})")
    processes.wait()
    return True


def _free_memory() -> None:
    """Frees the stage's model now: it sits in reference cycles, and the next stage brings its own."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _execute(stage: Stage, context: StageContext) -> str:
    """Runs a stage's module; returns its one line.  A full disk or GPU is something that the user can mend."""
    module = importlib.import_module(f"doremi_mix.stages.{stage.name}")
    try:
        said: str = module.run(context)
    except DoremiMixError:
        raise
    except OSError as error:
        raise RunDirectoryError(
            f"{stage.name}: {context.run.path}: cannot read or write ({error.strerror or error}); free some space, "
            "mend the run directory or choose another --run-dir"
        ) from error
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        trains = stage.name in ("reference", "proxy")
        more = (
            f"raise {stage.name}.gradient_accumulation_steps or set {stage.name}.gradient_checkpointing=true "
            "(the result stays the same), or "
            if trains
            else ""
        )
        raise ConfigError(
            f"{stage.name}: the GPU's memory is full; {more}choose a smaller reference.model or tokenize.context_length"
        ) from None
    return said


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
        manifest = stage.manifest(run)
        if manifest is None:
            folders = (run.stage_path(stage.name), run.work_path(stage.name, resumable=stage.resumable))
            states[stage.name] = "partial" if any(folder.exists() for folder in folders) else "not started"
            continue
        states[stage.name] = "finished"
        if stage.name == "load":
            continue  # its fingerprint needs the sources, which may be gone by now
        try:
            wanted = wanted_fingerprint(stage, config, run)
        except StageNotFinishedError:
            wanted = ""
        if wanted != manifest["fingerprint"]:
            states[stage.name] = "outdated"
    return states


def _remove_scratch(stage: Stage, run: RunDirectory) -> None:
    for name in stage.scratch:
        (run.stage_path(stage.name) / name).unlink(missing_ok=True)


def _contents_of(name_or_path: str) -> Any:
    """Returns the sha256 of each file of a local model or tokenizer; the name itself for one on the hub."""
    path = Path(name_or_path).expanduser()
    if not path.exists():
        return name_or_path
    files = sorted(file for file in ([path] if path.is_file() else path.iterdir()) if file.is_file())
    return {file.name: _sha256_once(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files}


@functools.cache
def _sha256_once(path: Path, _size: int, _modified: int) -> str:
    """A checkpoint is large and asked for by several stages: one process reads it once."""
    return sha256_of(path)

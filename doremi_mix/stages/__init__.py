"""The pipeline is this table: the stages in order, what each reads, and which settings change its result.

Each stage is the module of its name in this package, with one function ``run(context)`` that reads artifacts, calls the
core and writes artifacts into ``context.folder``.
"""

from __future__ import annotations

import gc
import importlib
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doremi_mix.config import Config
from doremi_mix.distributed import Processes
from doremi_mix.errors import ConfigError, DoremiMixError, RunDirectoryError, StageNotFinishedError
from doremi_mix.fingerprints import (
    analyze_settings,
    compare_settings,
    draw_settings,
    evaluate_settings,
    export_outputs,
    export_reads,
    export_settings,
    filter_settings,
    filters,
    finetune_reads,
    finetune_settings,
    load_settings,
    mixture_reads,
    mixture_settings,
    model_settings,
    proxy_settings,
    reference_outputs,
    rows_reads,
    tokenize_settings,
    weights_settings,
)
from doremi_mix.progress import Narrator, format_seconds
from doremi_mix.replicas import PER_REPLICA, Replica, is_last, read_round, replicas, replicas_of_round
from doremi_mix.run import RunDirectory, fingerprint


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a stage gets: the configuration (nothing left to choose), the run, its own folder, and where to speak.

    ``label`` says which round and seed this is ("" for the first), to tell them apart in messages and logs.
    """

    config: Config
    run: RunDirectory
    folder: Path
    narrator: Narrator
    processes: Processes
    label: str = ""

    @property
    def name(self) -> str:
        """The stage's name; its folder has another one until it takes the place of an earlier result."""
        return self.folder.name.removeprefix(".").removesuffix(".partial")


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
        outputs: files without which it has not finished, whatever its manifest says; where they depend on what the
            stage came to, a function from its folder to them.
        also_reads: further stages that it reads under some settings.
        in_run: whether learn and run come to it; it is also a command of its own.
    """

    name: str
    reads: tuple[str, ...]
    settings: Callable[[Config], Any]
    summary: str
    resumable: bool = False
    parallel: bool = False
    version: int = 1
    scratch: tuple[str, ...] = ()
    outputs: tuple[str, ...] | Callable[[Path], tuple[str, ...]] = ()
    also_reads: Callable[[Config], tuple[str, ...]] = lambda _config: ()
    in_run: Callable[[Config], bool] = lambda _config: True

    def manifest(self, run: RunDirectory) -> dict[str, Any] | None:
        """Returns the stage's manifest when it has finished and its files are still there."""
        folder = run.stage_path(self.name)
        outputs = self.outputs if isinstance(self.outputs, tuple) else self.outputs(folder)
        return run.manifest(self.name) if all((folder / name).exists() for name in outputs) else None


STAGES: tuple[Stage, ...] = (
    Stage(
        "load",
        (),
        load_settings,
        "read every source into one schema",
        outputs=("summary.json", "rejections.parquet"),
    ),
    Stage(
        "analyze",
        ("load",),
        analyze_settings,
        "what the loaded rows are like: lengths, languages, duplicates, quantiles of every score",
        outputs=("statistics.json",),
        in_run=lambda config: config.analyze.in_run or filters(config),
    ),
    Stage(
        "filter",
        ("load",),
        filter_settings,
        "keep the rows that pass: duplicates, rules, language models, diversity",
        outputs=("summary.json", "rejections.parquet"),
        in_run=filters,
    ),
    Stage(
        "tokenize",
        (),
        tokenize_settings,
        "text to packed token sequences, and the held-out split",
        version=3,
        outputs=("domains.json", "tokenizer.json", "tokens.bin", "loss_mask.bin", "sequence_documents.npy"),
        also_reads=rows_reads,
    ),
    Stage(
        "reference",
        ("tokenize",),
        lambda config: model_settings(config, "reference"),
        "train the reference model on the reference weights",
        resumable=True,
        parallel=True,
        scratch=("checkpoint.pt",),
        outputs=reference_outputs,
    ),
    Stage(
        "reference_losses",
        ("tokenize", "reference"),
        draw_settings,
        "score with the reference model what the proxy model will draw",
        resumable=True,
        parallel=True,
        scratch=("scored.json",),
        outputs=("sequence_ids.npy", "losses.f32"),
    ),
    Stage(
        "proxy",
        ("tokenize", "reference_losses"),
        proxy_settings,
        "train the proxy model, whose excess losses over the reference model become domain weights",
        resumable=True,
        parallel=True,
        scratch=("checkpoint.pt",),
        outputs=("trajectory.jsonl", "average.json", "metrics.json"),
    ),
    Stage(
        "weights",
        ("tokenize", "reference", "proxy"),
        weights_settings,
        "average the trajectories of all seeds into domain weights, and say how sure they are",
        outputs=("domain_weights.json", "weights.png", "trajectory.png"),
    ),
    Stage(
        "compare",
        ("tokenize", "weights"),
        compare_settings,
        "train small models on the learned mixture and on plain ones, and say whether it helps",
        resumable=True,
        parallel=True,
        outputs=("results.json",),
        in_run=lambda config: config.compare.in_run or config.mixture.weights == "best",
    ),
    Stage(
        "mixture",
        ("tokenize",),
        mixture_settings,
        "draw the training set under the token budget",
        version=2,
        outputs=("mixture.jsonl", "rows.npy", "ratio.json", "allocation.json"),
        also_reads=mixture_reads,
        in_run=lambda config: config.mixture.token_budget is not None,
    ),
    Stage(
        "export",
        ("load", "tokenize"),
        export_settings,
        "the weights for other programs, and what each will draw",
        outputs=export_outputs,
        also_reads=export_reads,
        in_run=lambda config: bool(config.export.formats),
    ),
    Stage(
        "finetune",
        (),
        finetune_settings,
        "train LoRA adapters over the main model on the mixture",
        resumable=True,
        parallel=True,
        scratch=("checkpoint.pt",),
        outputs=("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "metrics.json"),
        also_reads=finetune_reads,
        in_run=lambda config: config.finetune.model is not None,
    ),
    Stage(
        "evaluate",
        ("tokenize", "finetune"),
        evaluate_settings,
        "held-out loss and benchmarks of the main model, before and after the fine-tune",
        resumable=True,
        outputs=("metrics.json",),
        also_reads=rows_reads,
        in_run=lambda config: config.finetune.model is not None,
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
    for name in (*stage.reads, *stage.also_reads(config)):
        source = stage_named(name)
        command = f"doremi-mix {command_of(name)} --run-dir {shlex.quote(str(run.path))}"
        for label, source_config, view in _instances(stage, source, config, run):
            manifest = source.manifest(view)
            if manifest is None:
                raise StageNotFinishedError(f"{name}{label} has not finished in {run.path}; run: {command}")
            if not _is_taken_as_it_is(source, source_config) and manifest["fingerprint"] != wanted_fingerprint(
                source, source_config, view
            ):
                raise StageNotFinishedError(
                    f"{name}{label} in {run.path} was made with other settings; run, with the same --set: {command}"
                )
            upstream[f"{name}{label}"] = manifest["fingerprint"]
    return fingerprint(
        {"stage": stage.name, "version": stage.version, "settings": stage.settings(config), "reads": upstream}
    )


def _is_taken_as_it_is(stage: Stage, config: Config) -> bool:
    """Says whether what a stage was made from may be gone by now: the sources of load, models, a fine-tune's data."""
    from doremi_mix.filtering import inputs_are_here

    if stage.name == "finetune":
        return any(
            name is not None and Path(name).is_absolute() and not Path(name).exists()
            for name in (config.finetune.model, config.finetune.tokenizer, config.finetune.data)
        )
    return stage.name == "load" or (stage.name == "filter" and not inputs_are_here(config))


def _instances(
    stage: Stage, source: Stage, config: Config, run: RunDirectory
) -> Iterator[tuple[str, Config, RunDirectory]]:
    """Yields where a stage finds an earlier one: a label for messages, and the configuration and run to look with.

    A stage that comes after all rounds and seeds reads every one of them; within one, a stage sees only its own.
    """
    if source.name not in PER_REPLICA or stage.name in PER_REPLICA:
        yield "", config, run
        return
    for replica in replicas(config, run):
        if replica.wants(source.name):
            yield replica.label, replica.config, replica.run


def command_of(name: str) -> str:
    """Returns the command of a stage: ``reference_losses`` is typed ``reference-losses``."""
    return name.replace("_", "-")


def run_stage(
    stage: Stage, config: Config, run: RunDirectory, narrator: Narrator, processes: Processes, label: str = ""
) -> bool:
    """Brings one stage up to date.

    Args:
        stage: its row of the table.
        config: without choices left.
        run: the run directory, as the stage sees it.
        narrator: who tells the user.
        processes: of a distributed run.
        label: which round and seed this is, for messages.

    Returns:
        Whether there was anything to do.
    """
    if stage.name == "filter":
        from doremi_mix.filtering import check_filter_inputs

        check_filter_inputs(config, run)
    wanted = wanted_fingerprint(stage, config, run)
    manifest = stage.manifest(run)
    # No process may touch the folder before all have looked at it.
    processes.wait()
    if manifest is not None and manifest["fingerprint"] == wanted:
        if processes.is_main:
            _remove_scratch(stage, run)
            if stage.name == "compare":
                # The weights may have been written anew since then, without their verdict.
                importlib.import_module("doremi_mix.stages.compare").restore_verdict(run)
        narrator.say(f"{stage.name}{label}: up to date")
        return False
    if stage.name in ("finetune", "evaluate"):
        from doremi_mix.checks import check_main_model

        check_main_model(config)
    start = time.monotonic()
    if processes.is_main:
        run.begin(stage.name, wanted, resumable=stage.resumable)
    processes.wait()
    if stage.parallel or processes.is_main:
        folder = run.work_path(stage.name, resumable=stage.resumable)
        said = _execute(stage, StageContext(config, run, folder, narrator, processes, label))
        if stage.parallel:
            free_memory()
    if processes.is_main:
        seconds = time.monotonic() - start
        record = {"seconds": round(seconds, 3), "settings": stage.settings(config)}
        run.finish(stage.name, wanted, record, resumable=stage.resumable)
        _remove_scratch(stage, run)
        narrator.say(f"{stage.name}{label}: {said} ({format_seconds(seconds)})")
    processes.wait()
    return True


def free_memory() -> None:
    """Frees a model that is done with now: it sits in reference cycles, and the next one comes at once."""
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
        raise ConfigError(f"{stage.name}: the GPU's memory is full; {_MORE_MEMORY.get(stage.name, _SMALLER)}") from None
    return said


_SMALLER = "choose a smaller reference.model or tokenize.context_length"
_LESS_AT_ONCE = (
    "raise {0}.gradient_accumulation_steps or set {0}.gradient_checkpointing=true (the result stays the same), or "
    + _SMALLER
)
_MORE_MEMORY = {
    "reference": _LESS_AT_ONCE.format("reference"),
    "proxy": _LESS_AT_ONCE.format("proxy"),
    "finetune": "set finetune.gradient_checkpointing=true, give a smaller finetune.micro_batch_size (only which inputs "
    "the dropout drops changes with it), or set finetune.quantization=4bit",
    "evaluate": "lower evaluate.batch_size or evaluate.max_length",
}


def run_pipeline(config: Config, run: RunDirectory, narrator: Narrator, processes: Processes) -> None:
    """Brings every stage of the run up to date, in order."""
    from doremi_mix.stages.mixture import check_budget

    for stage in STAGES:
        if not stage.in_run(config):
            continue
        if stage.name in PER_REPLICA[1:]:
            continue
        if stage.name == PER_REPLICA[0]:
            _run_replicas(PER_REPLICA, config, run, narrator, processes)
            continue
        run_stage(stage, config, run, narrator, processes)
        if stage.name == "tokenize":
            # Now, and not after hours of training.
            check_budget(config, run)


def run_alone(stage: Stage, config: Config, run: RunDirectory, narrator: Narrator, processes: Processes) -> None:
    """Brings one stage up to date, in every round and seed whose earlier stages have finished."""
    if stage.name in PER_REPLICA:
        _run_replicas((stage.name,), config, run, narrator, processes)
    else:
        run_stage(stage, config, run, narrator, processes)


def _run_replicas(
    names: Sequence[str], config: Config, run: RunDirectory, narrator: Narrator, processes: Processes
) -> None:
    """Brings some of the replicated stages up to date, round after round, as far as the proxies allow."""
    before = None
    for round_ in range(1, config.weights.max_rounds + 1):
        round_replicas = replicas_of_round(config, run, round_, before)
        first = PER_REPLICA[0]
        if before is not None and first not in names and round_replicas[0].run.manifest(first) is None:
            # A single stage of a round that has not begun.
            narrator.say(f"round {round_} begins with: doremi-mix {first} --run-dir {shlex.quote(str(run.path))}")
            return
        for replica in round_replicas:
            for name in names:
                if replica.wants(name):
                    run_stage(stage_named(name), replica.config, replica.run, narrator, processes, replica.label)
        if any(not _is_current(replica) for replica in round_replicas):
            return
        before = read_round(round_replicas)
        if config.weights.max_rounds > 1:
            narrator.say(
                f"round {round_}: the weights differ from the reference weights by {before.change:.4f} at most"
            )
        if is_last(config, round_, before):
            return


def _is_current(replica: Replica) -> bool:
    """Says whether a replica's proxy has finished under its settings."""
    proxy = stage_named("proxy")
    manifest = proxy.manifest(replica.run)
    try:
        return manifest is not None and manifest["fingerprint"] == wanted_fingerprint(
            proxy, replica.config, replica.run
        )
    except StageNotFinishedError:
        return False


def stage_states(config: Config, run: RunDirectory) -> dict[str, str]:
    """Says of every stage whether it is ``finished``, ``partial``, ``outdated`` or ``not started``.

    A stage that is run in several rounds and seeds is finished when all of them are.  Analyze, filter, export,
    finetune and evaluate are left out where they neither belong to the run nor were started.
    """
    states: dict[str, str] = {}
    for stage in STAGES:
        if stage.name in PER_REPLICA:
            states[stage.name] = _joint_state(
                [_state(stage, r.config, r.run) for r in replicas(config, run) if r.wants(stage.name)]
            )
        else:
            states[stage.name] = _state(stage, config, run)
    asked_for = ("analyze", "filter", "export", "finetune", "evaluate")
    optional = [name for name in asked_for if not stage_named(name).in_run(config)]
    return {name: state for name, state in states.items() if state != "not started" or name not in optional}


def _joint_state(states: Sequence[str]) -> str:
    if len(set(states)) == 1:
        return states[0]
    return "outdated" if "outdated" in states else "partial"


def _state(stage: Stage, config: Config, run: RunDirectory) -> str:
    manifest = stage.manifest(run)
    if manifest is None:
        folders = (run.stage_path(stage.name), run.work_path(stage.name, resumable=stage.resumable))
        return "partial" if any(folder.exists() for folder in folders) else "not started"
    if _is_taken_as_it_is(stage, config):
        return "finished"
    try:
        wanted = wanted_fingerprint(stage, config, run)
    except StageNotFinishedError:
        wanted = ""
    return "finished" if wanted == manifest["fingerprint"] else "outdated"


def _remove_scratch(stage: Stage, run: RunDirectory) -> None:
    for name in stage.scratch:
        (run.stage_path(stage.name) / name).unlink(missing_ok=True)

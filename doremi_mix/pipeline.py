"""A run from its settings to its result: what the command line and ``learn`` in Python share."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doremi_mix.atomic import write_atomic
from doremi_mix.checks import (
    check_adapters,
    check_compare,
    check_evaluate,
    check_evidence,
    check_export,
    check_finetune,
    check_headroom,
    check_main_model,
    check_mixture_weights,
    check_model_name,
    check_proxy_batch,
    check_reference_weights,
    check_vocab_size,
)
from doremi_mix.config import MIXTURE_WORDS, Config, parse_config
from doremi_mix.config_file import anchor_paths, apply_overrides, dump_yaml, merge
from doremi_mix.distributed import Processes, join_processes
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ConfigError, DataError, RunDirectoryError
from doremi_mix.plan import accumulation, choose, detect_hardware, estimate
from doremi_mix.progress import Narrator, format_seconds
from doremi_mix.replicas import PER_REPLICA, replicas
from doremi_mix.run import RunDirectory
from doremi_mix.sources.files import find_files
from doremi_mix.stages import run_pipeline
from doremi_mix.stages.load import list_sources, peek_sources

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run that is ready to work: locked, its configuration resolved and stored."""

    run: RunDirectory
    config: Config
    narrator: Narrator
    processes: Processes


def learn(
    sources: PathLike | Sequence[PathLike],
    run_dir: PathLike = "runs/learn",
    *,
    token_budget: int | None = None,
    quiet: bool = False,
    **settings: Mapping[str, Any],
) -> DomainWeights:
    """Learns domain weights for some files, and draws the mixture when there is a token budget.

    Each file is a domain, named by its stem; a folder gives one domain per file.  A run that was interrupted goes on,
    and one that finished is read back.

    Args:
        sources: files and folders.
        run_dir: where the run keeps everything that it makes; the README lists its files.
        token_budget: tokens to draw into ``<run_dir>/mixture/mixture.jsonl``; None draws none.
        quiet: print nothing.
        settings: sections of the configuration, for example ``proxy={"steps": 200}, tokenize={"seed": 1}``.

    Returns:
        The weights, as in ``<run_dir>/weights/domain_weights.json``.

    Raises:
        DoremiMixError: anything that the caller can fix; the message says how.
    """
    from doremi_mix.stages.weights import read_weights

    paths = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not all(isinstance(path, str | os.PathLike) for path in paths):
        raise DataError(f"sources must be paths of files and folders, got {sources!r}")
    given = merge(given_sources([Path(path) for path in paths]), settings)
    if token_budget is not None:
        given = merge(given, {"mixture": {"token_budget": token_budget}})
    given = learned_for_budget(anchor_paths(given, Path.cwd()))
    with open_run(Path(run_dir), given, quiet=quiet) as opened:
        announce(opened)
        run_pipeline(opened.config, opened.run, opened.narrator, opened.processes)
        return read_weights(opened.run)


def given_sources(paths: Sequence[Path], config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the settings that name the files, each one a domain.

    Args:
        paths: files and folders.
        config: settings of a config file; what they say of a file (name, schema, columns) is kept.

    Raises:
        SourceNotFoundError: a path does not exist.
        DataError: a folder holds no data, or two files would have the same name.
    """
    known: dict[Path, Mapping[str, Any]] = {}
    for source in (config or {}).get("sources") or ():
        if isinstance(source, Mapping) and isinstance(source.get("path"), str):
            known[Path((config or {}).get("data_root") or ".", source["path"]).absolute()] = source
    files = [path.absolute() for path in find_files(paths)]
    for path in files:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise DataError(f"{str(path)!r}: the name is not UTF-8; rename the file or folder") from None
    return {"sources": [{**known.get(path, {}), "path": str(path)} for path in files]}


def settings_from(
    base: Mapping[str, Any], overrides: Iterable[str] = (), token_budget: int | None = None
) -> dict[str, Any]:
    """Returns settings with those of the command line on top."""
    data = anchor_paths(apply_overrides(base, overrides), Path.cwd())
    if token_budget is not None:
        data = merge(data, {"mixture": {"token_budget": token_budget}})
    return data


def learned_for_budget(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a whole run: what its mixture may use of a domain bounds what the proxy may learn.

    Only learn and run do this.  Drawing a mixture of another size later leaves the weights as they are.
    """
    mixture, proxy = given.get("mixture"), given.get("proxy")
    budget = mixture.get("token_budget") if isinstance(mixture, Mapping) else None
    if budget is None or (isinstance(proxy, Mapping) and proxy.get("token_budget") is not None):
        return dict(given)
    return merge(given, {"proxy": {"token_budget": budget}})


def resolve(given: Mapping[str, Any], run: RunDirectory, where: str = "config") -> tuple[Config, str]:
    """Validates settings, by themselves and against each other, and chooses what is left open.

    Args:
        given: the settings.
        run: when it was started before, choices are made for the hardware that it was started on.
        where: what to name in an error.

    Returns:
        The configuration without choices left, and the kind of hardware.
    """
    config = parse_config(given, where=where)
    names = [source.name for source in list_sources(config)]
    hardware = run.describe()["hardware"] if run.exists() else detect_hardware()
    check_compare(config.compare.steps)
    chosen = choose(config, len(names), hardware)
    check_settings(chosen, names)
    return chosen, hardware


def check_settings(config: Config, names: Sequence[str]) -> None:
    """Finds now what would otherwise stop a run after hours.

    Raises:
        ConfigError: settings contradict each other or the domains.
        ModelError: a model is no preset, no path and no name of the hub.
    """
    from doremi_mix.filtering import check_filter
    from doremi_mix.stages.tokenize import make_template

    make_template(config.tokenize)
    check_filter(config, names)
    check_vocab_size(config.tokenize.vocab_size, given=config.tokenize.tokenizer)
    check_reference_weights(config, names)
    check_proxy_batch(config, len(names))
    check_headroom(config)
    check_evidence(config)
    check_mixture_weights(config)
    check_export(config)
    check_finetune(config)
    check_evaluate(config)
    for section in ("reference", "proxy", "compare"):
        settings = getattr(config, section)
        parts = settings.gradient_accumulation_steps or 1
        if settings.batch_size < parts:
            raise ConfigError(
                f"{section}.gradient_accumulation_steps is {parts}, more than the {settings.batch_size} sequences of "
                f"{section}.batch_size; lower it"
            )
        check_model_name(settings.model, f"{section}.model")
        check_adapters(settings, section)


def check_entered_weights(config: Config) -> None:
    """Finds now whether the files of weights that compare and mixture are to take can serve.

    Raises:
        ConfigError: the name of a mixture is taken.
        DataError: a file holds no domain weights for these domains.
    """
    entered = dict(config.compare.also)
    for name in entered:
        if name in MIXTURE_WORDS or not name or "/" in name or name.startswith("."):
            raise ConfigError(f"compare.also: {name!r} cannot be the name of a mixture; choose another")
    wanted = config.mixture.weights
    if wanted not in MIXTURE_WORDS and wanted not in entered:
        entered[wanted] = wanted
    if entered:
        from doremi_mix.stages.weights import weights_from

        names = [source.name for source in list_sources(config)]
        for path in entered.values():
            weights_from(Path(path), names)


@contextlib.contextmanager
def open_run(
    path: Path, given: Mapping[str, Any], *, quiet: bool = False, where: str = "config", needs_sources: bool = True
) -> Iterator[OpenRun]:
    """Prepares a run: validates, locks the folder against a second process, stores the configuration.

    Args:
        path: the run directory.
        given: the settings.
        quiet: print nothing.
        where: what to name in an error.
        needs_sources: whether every source must be there (not for a stage after load).

    Raises:
        ConfigError: a setting is wrong; nothing was written.
        DataError: a file of weights cannot serve; nothing was written.
        SourceNotFoundError: a source is missing; nothing was written.
        RunDirectoryError: the folder is in use or is something else.
    """
    run = RunDirectory(path)
    config, hardware = resolve(given, run, where)
    check_entered_weights(config)
    if needs_sources:
        from doremi_mix.filtering import check_filter_inputs

        peek_sources(config)
        check_filter_inputs(config, run)
        check_main_model(config)
    # As it was understood: plain values, whatever the caller's types.
    given = parse_config(given).model_dump(mode="json", by_alias=True, exclude_unset=True)
    processes = join_processes()
    narrator = Narrator(quiet=quiet or not processes.is_main)
    # All processes have looked at the folder before the first one writes into it.
    processes.wait()
    with contextlib.ExitStack() as stack:
        if processes.is_main:
            stack.enter_context(run.lock())
            stack.enter_context(run.settings_kept())
            run.save(given, hardware, dump_yaml(config.model_dump(mode="json", by_alias=True)))
        processes.wait()
        _check_shared(run, processes)
        if hardware != detect_hardware():
            narrator.say(f"note: this run was planned for {hardware}, but goes on on {detect_hardware()}")
        yield OpenRun(run, config, narrator, processes)


def _check_shared(run: RunDirectory, processes: Processes) -> None:
    """Raises RunDirectoryError where a process does not see the folder into which the first one writes."""
    token = f"{os.getpid()} {time.time_ns()}"
    path = run.path / ".shared"
    if processes.count > 1 and processes.is_main:
        write_atomic(path, token)
    token = processes.from_main(token)
    seen = processes.count == 1 or (path.exists() and path.read_text(encoding="utf-8") == token)
    # Everybody has looked before the first process goes on.
    processes.wait()
    if not seen:
        raise RunDirectoryError(
            f"{run.path}: this process does not see the run directory of the first one; "
            "all machines must share the folder (for example over NFS)"
        )
    if processes.count > 1 and processes.is_main:
        path.unlink()


def describe_plan(config: Config, hardware: str) -> list[str]:
    """Says in a few lines what was chosen, and what it will take (measured)."""
    from doremi_mix.models import TokenInfo

    names = [source.name for source in list_sources(config)]
    reference, proxy, tokenize = config.reference, config.proxy, config.tokenize
    assert tokenize.vocab_size and tokenize.context_length and proxy.batch_size
    tokens = TokenInfo(tokenize.vocab_size, 1, 0)
    if tokenize.tokenizer is not None:
        from doremi_mix.tokenizer import load_tokenizer

        loaded = load_tokenizer(tokenize.tokenizer, trust_remote_code=tokenize.trust_remote_code)
        tokens = TokenInfo(loaded.vocab_size, loaded.end_id, loaded.pad_id)
    cost = estimate(config, tokens)
    size = f" ({cost.num_parameters / 1e6:.1f} M parameters)" if cost.num_parameters else ""
    parts = accumulation(proxy, tokenize.context_length, 1)
    if reference.folds is None:
        times = " (twice, if it passes over a domain more than once)"
    else:
        times = f" ({reference.folds} times)" if reference.folds > 1 else ""
    lines = [
        f"plan: {len(names)} domains on {hardware} ({os.cpu_count()} cores)",
        f"  model {proxy.model}{size}, sequences of {tokenize.context_length} tokens, vocabulary {tokens.vocab_size:,}",
        f"  reference {reference.steps} steps of {reference.batch_size} sequences{times}, then proxy {proxy.steps} "
        f"steps of {proxy.batch_size}" + (f" in {parts} micro-batches" if parts > 1 else "") + _repeats(config),
    ]
    if cost.seconds:
        shares = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in cost.seconds.items())
        lines.append(f"  training will take about {format_seconds(sum(cost.seconds.values()))} ({shares})")
    else:
        lines.append("  training time: unknown for this model; the progress line will tell")
    return lines


def _repeats(config: Config) -> str:
    """Says how often reference and proxy are trained, where it is more than once."""
    weights = config.weights
    rounds = f"; up to {weights.max_rounds} rounds" if weights.max_rounds > 1 else ""
    return (f"; {weights.num_seeds} seeds" if weights.num_seeds > 1 else "") + rounds


def announce(opened: OpenRun) -> None:
    """Says what was chosen and how long it will take, unless everything is trained already."""
    if not opened.processes.is_main or all(
        replica.run.manifest(stage) for replica in replicas(opened.config, opened.run) for stage in PER_REPLICA
    ):
        return
    for line in describe_plan(opened.config, opened.run.describe()["hardware"]):
        opened.narrator.say(line)

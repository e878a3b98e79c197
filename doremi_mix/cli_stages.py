"""What the commands of single stages share: their options, and the run that they open."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from doremi_mix.run import RunDirectory
from doremi_mix.stages import Stage, run_alone

if TYPE_CHECKING:
    from doremi_mix.pipeline import OpenRun

RunDir = Annotated[Path, typer.Option("--run-dir", help="the folder that keeps everything of the run")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="a YAML file; see doremi-mix init")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a setting, e.g. proxy.steps=200")]


@contextlib.contextmanager
def opened_stage(
    stage: Stage,
    run_dir: Path,
    config: Path | None,
    set_: list[str] | None,
    over: dict[str, Any] | None = None,
) -> Iterator[OpenRun]:
    """Brings one stage up to date with the run's settings, those of a config file, and those of the command line."""
    from doremi_mix.config_file import load_config_file, merge
    from doremi_mix.pipeline import open_run, settings_from

    directory = RunDirectory(run_dir)
    if config is None:
        base = directory.describe()["given"]
    else:
        base = load_config_file(config)
        if directory.exists():
            known = directory.describe()["given"]
            if "rules" in (base.get("filter") or {}):
                # The file's rules are all there are; those of before do not stay between them.
                known = {**known, "filter": {**known.get("filter", {}), "rules": {}}}
            base = merge(known, base)
    given = settings_from(merge(base, over or {}), set_ or ())
    needs_sources = stage.name == "load"
    with open_run(run_dir, given, where=str(config or "settings"), needs_sources=needs_sources) as opened:
        run_alone(stage, opened.config, opened.run, opened.narrator, opened.processes)
        yield opened

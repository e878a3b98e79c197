"""The commands that hand weights, and the mixture, to other programs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from doremi_mix.cli_stages import ConfigOption, Sets, opened_stage
from doremi_mix.errors import ConfigError, DataError
from doremi_mix.stages import stage_named
from doremi_mix.terminal import errors_in_one_line, show

if TYPE_CHECKING:
    from doremi_mix.domain_weights import DomainWeights
    from doremi_mix.export_files import ExportOptions
    from doremi_mix.exporters import Format


def export(
    context: typer.Context,
    weights: Annotated[
        Path | None,
        typer.Argument(metavar="WEIGHTS_JSON", help="a domain_weights.json, or the weights of another pipeline"),
    ] = None,
    format_: Annotated[str | None, typer.Option("--format", metavar="NAME", help="see --list")] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="PATH", help="the file, or a folder (of several files, or with a / at its end)"),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="N", help="what to draw in all: 1000000, 1e6 or 1M")
    ] = None,
    budget_unit: Annotated[
        Literal["tokens", "examples"], typer.Option("--budget-unit", help="what --budget counts")
    ] = "tokens",
    max_epochs: Annotated[
        float, typer.Option("--max-epochs", help="under a budget, no domain is repeated more often")
    ] = 4.0,
    paths: Annotated[
        str | None,
        typer.Option(
            "--paths",
            metavar="TEMPLATE_OR_FILE",
            help="what the program reads: a template such as 'data/{name}.jsonl', or a file of path by domain; "
            "else the files that were loaded, or a placeholder where it reads another kind of file",
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            "--corpus",
            metavar="RUN_DIR_OR_FILE",
            help="what there is of each domain, for weights that do not say: a finished run, or a file of "
            "num_examples and available_tokens by domain",
        ),
    ] = None,
    equal_lengths: Annotated[
        bool, typer.Option("--equal-lengths", help="take all examples to be equally long, where no corpus says more")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="for programs that ask for one")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files that are there")] = False,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="instead of WEIGHTS_JSON: stage export of a run (export.formats)"),
    ] = None,
    config: ConfigOption = None,
    set_: Sets = None,
    list_: Annotated[bool, typer.Option("--list", help="list the formats and stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --list, or of what was written: as JSON")] = False,
) -> None:
    """Hands domain weights to another program, in the unit that it means, and says what it will draw.

    Beside the files lies FORMAT.expected.json: unit, budget, and the composition to expect.  With --run-dir, the
    formats of export.formats are written under export/ of the run, for the weights, budget and epoch cap of its
    mixture.
    """
    from doremi_mix.export_files import ExportOptions, format_named, list_formats
    from doremi_mix.export_inputs import read_count, read_paths

    with errors_in_one_line():
        if list_:
            _print_formats(list_formats(), as_json=as_json)
            return
        if run_dir is not None:
            _refuse(context, beside_run=True)
            over = {"export": {"formats": [*_formats_of(run_dir), format_]}} if format_ else {}
            with opened_stage(stage_named("export"), run_dir, config, set_, over=over) as opened:
                if opened.processes.is_main:
                    _print_exports(opened.run.stage_path("export"), as_json=as_json)
            return
        _refuse(context, beside_run=False)
        if weights is None or format_ is None:
            missing = "WEIGHTS_JSON" if weights is None else "--format NAME"
            raise ConfigError(f"{missing} is missing; for example: doremi-mix export domain_weights.json --format trl")
        row = format_named(format_)
        read = _read(weights, corpus)
        given = read_paths(paths) if paths is not None else None
        _export(
            row,
            read,
            ExportOptions(
                budget=read_count(budget) if budget is not None else None,
                budget_unit=budget_unit,
                max_epochs=max_epochs,
                paths=given,
                equal_lengths=equal_lengths,
                seed=seed,
            ),
            out,
            overwrite=overwrite,
            as_json=as_json,
        )


_OF_A_RUN = ("set_", "config")
_OF_A_FILE = {
    "weights": "--run-dir, or WEIGHTS_JSON",
    "out": "another --run-dir: it writes under export/ of the run",
    "budget": "--set mixture.token_budget=N",
    "budget_unit": "--set mixture.token_budget=N, in tokens",
    "max_epochs": "--set mixture.max_epochs=N",
    "paths": "--set export.paths=TEMPLATE_OR_FILE",
    "corpus": "--run-dir alone: a run knows its corpus",
    "equal_lengths": "--run-dir alone: a run knows its corpus",
    "seed": "--set export.seed=N",
    "overwrite": "--run-dir alone: a stage takes the place of its earlier result",
}
"""Options that go with a file of weights only, and what to give beside --run-dir instead."""


def _refuse(context: typer.Context, *, beside_run: bool) -> None:
    """Raises ConfigError for options that would have no effect."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is None or source.name != "COMMANDLINE":
            continue
        shown = "WEIGHTS_JSON" if parameter.name == "weights" else parameter.opts[0]
        if beside_run and parameter.name in _OF_A_FILE:
            raise ConfigError(f"{shown} does not go with --run-dir; give {_OF_A_FILE[parameter.name]}")
        if not beside_run and parameter.name in _OF_A_RUN:
            raise ConfigError(f"{shown} goes with --run-dir; give that, or leave {shown} out")


def _formats_of(run_dir: Path) -> list[str]:
    """Returns the formats that a run has been asked for so far."""
    from doremi_mix.run import RunDirectory

    return list(RunDirectory(run_dir).describe()["given"].get("export", {}).get("formats", []))


def _print_exports(folder: Path, *, as_json: bool) -> None:
    """Prints what the stage wrote, and how each program takes it."""
    exports = json.loads((folder / "exports.json").read_text(encoding="utf-8"))["formats"]
    if as_json:
        print(json.dumps(exports, indent=2, ensure_ascii=False))
        return
    for name, written in exports.items():
        print(f"{name}: {', '.join(str(folder / path) for path in written['files'])}")
        print(f"  use it: {written['usage']}")


def _read(path: Path, corpus: Path | None) -> DomainWeights:
    """Reads weights of any pipeline, with what is known of the corpus; says on stderr what was made of them."""
    from doremi_mix.export_inputs import corpus_beside, read_corpus
    from doremi_mix.weight_files import read_weights

    read = read_weights(path)
    for notice in read.notices:
        print(f"note: {notice}", file=sys.stderr)
    if corpus is None:
        weights = read.to_domain_weights()
        if weights.corpus or not corpus_beside(path):
            return weights
        corpus = path
    known = read_corpus(corpus)
    for name in known:
        if name not in read.weights:
            print(f"note: {corpus} has domain {name!r}, which has no weight in {path}", file=sys.stderr)
    for name in read.weights:
        if name not in known:
            raise DataError(f"{corpus}: knows nothing of domain {name!r} of {path}; give the corpus of these domains")
    return read.to_domain_weights(known)


def _export(
    row: Format,
    weights: DomainWeights,
    options: ExportOptions,
    out: str | None,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    from doremi_mix.export_files import expectation, plan_for, write_export
    from doremi_mix.exporters import export_plan, facts

    plan = plan_for(row, weights, options)
    if out is None:
        made = export_plan(row, plan)
        result: dict[str, object] = {"files": {file.name: file.text for file in made.files}}
    else:
        if not out.strip():
            raise ConfigError("--out is empty; give a file or a folder, or leave it out")
        made, written = write_export(row, plan, Path(out), overwrite=overwrite, folder=out.endswith("/"))
        result = {"written": [str(path) for path in written]}
    if as_json:
        print(json.dumps({**result, **expectation(row, plan, made)}, indent=2, ensure_ascii=False))
        return
    if out is None:
        for file in made.files:
            if len(made.files) > 1:
                print(f"# ==> {file.name} <==")
            print(file.text, end="")
        # What follows is for people, and comes after the text also where both go to one place.
        sys.stdout.flush()
    else:
        for path in written:
            print(f"wrote {path}", file=sys.stderr)
    for fact in facts(plan, made):
        print(f"note: {fact}", file=sys.stderr)
    print(f"verdict: {plan.verdict or 'these weights were not compared with plain mixtures'}", file=sys.stderr)
    print(f"use it: {made.usage}", file=sys.stderr)


def _print_formats(rows: list[dict[str, object]], *, as_json: bool) -> None:
    from doremi_mix.report.format_table import render_formats

    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        from rich.console import Console

        console = Console()
        show(render_formats(rows, console.width if console.is_terminal else 120))


def dataset(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="a run with a mixture")],
    out: Annotated[Path, typer.Option("--out", help="the folder to write")],
    title: Annotated[str, typer.Option("--title", help="of the dataset card; else the name of the run")] = "",
    license_id: Annotated[
        str | None, typer.Option("--license", help="as the hub knows it; without it the card names none")
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="also upload it to the Hugging Face hub")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="with --push: for everybody to see")] = False,
) -> None:
    """Writes the mixture of a run as a dataset folder that load_dataset reads: Parquet files and a dataset card."""
    from doremi_mix.dataset_folder import push as push_folder
    from doremi_mix.dataset_folder import write_dataset_folder
    from doremi_mix.errors import StageNotFinishedError
    from doremi_mix.progress import Narrator
    from doremi_mix.run import RunDirectory, read_json
    from doremi_mix.stages.weights import read_weights

    with errors_in_one_line():
        if public and push is None:
            raise ConfigError("--public says who may see an upload; give --push OWNER/NAME, or leave it out")
        if push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
            raise ConfigError(f"--push {push}: expected OWNER/NAME")
        run = RunDirectory(run_dir)
        run.describe()
        if run.manifest("mixture") is None:
            command = f"doremi-mix mixture --run-dir {shlex.quote(str(run_dir))}"
            raise StageNotFinishedError(f"mixture has not finished in {run_dir}; run: {command}")
        place = run.stage_path("mixture")
        num_rows = sum(domain["drawn_rows"] for domain in read_json(place / "allocation.json")["domains"].values())
        weights = read_weights(run) if run.manifest("weights") is not None else None
        with Narrator().track("dataset", 2 * num_rows, "rows") as tracker:
            made = write_dataset_folder(
                place,
                out,
                weights=weights,
                title=title or run_dir.resolve().name,
                license_id=license_id,
                advance=tracker.advance,
            )
        files = "1 file" if len(made.shards) == 1 else f"{len(made.shards)} files"
        print(f"{made.path}: {made.num_rows:,} rows in {files}, with a dataset card (README.md)")
        if made.json_columns:
            print(f"values of several types are JSON text in: {', '.join(made.json_columns)}")
        if push is not None:
            print(push_folder(out, push, private=not public))

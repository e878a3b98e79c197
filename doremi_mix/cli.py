"""The command line: parses, calls, prints.  Heavy imports happen in the commands that need them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from doremi_mix import __version__
from doremi_mix.cli_export import dataset, export
from doremi_mix.cli_models import adapter, baichuan_app
from doremi_mix.cli_stages import ConfigOption, RunDir, Sets, opened_stage
from doremi_mix.errors import ConfigError, RunDirectoryError, SchemaError
from doremi_mix.presets import describe_presets
from doremi_mix.stages import STAGES, Stage, command_of, stage_named
from doremi_mix.terminal import errors_in_one_line, show

if TYPE_CHECKING:
    from doremi_mix.pipeline import OpenRun
    from doremi_mix.run import RunDirectory

app = typer.Typer(
    name="doremi-mix",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Learn how much of each dataset to train on.\n\nStart with: doremi-mix demo, or doremi-mix learn FOLDER "
    "--run-dir runs/NAME.\n\nPresets of proxy models (--set reference.model=NAME):\n\n\b\n" + describe_presets(),
)

Paths = Annotated[list[Path], typer.Argument(metavar="FILES_OR_DIRS...", help="files (each one a domain) and folders")]
Budget = Annotated[int | None, typer.Option("--token-budget", help="draw a mixture of so many tokens")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, help="proxies to train; the weights are their mean")]
Compare = Annotated[bool, typer.Option("--compare", help="also compare the learned mixture with plain ones")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check all inputs, print plan and estimate, write nothing")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"doremi-mix {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command()
def learn(
    paths: Paths,
    run_dir: RunDir,
    token_budget: Budget = None,
    seeds: Seeds = None,
    compare: Compare = False,
    config: ConfigOption = None,
    set_: Sets = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Learns domain weights from files, and draws the mixture under --token-budget.

    Every setting is explained in the file that "doremi-mix init" writes; presets of models: "doremi-mix --help".
    """
    from doremi_mix.config_file import load_config_file
    from doremi_mix.pipeline import given_sources, settings_from

    with errors_in_one_line():
        base = load_config_file(config) if config else {}
        base.pop("catalog", None)  # the files on the command line take the place of the config's
        given = settings_from({**base, **given_sources(paths, base)}, set_ or (), token_budget)
        given = _with_options(given, seeds, compare=compare)
        _run_all(given, run_dir, where=str(config or "settings"), dry_run=dry_run, as_json=as_json)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file; see doremi-mix init")],
    run_dir: RunDir,
    token_budget: Budget = None,
    seeds: Seeds = None,
    compare: Compare = False,
    set_: Sets = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Runs every stage of a config, in order."""
    from doremi_mix.config_file import load_config_file
    from doremi_mix.pipeline import settings_from

    with errors_in_one_line():
        given = settings_from(load_config_file(config), set_ or (), token_budget)
        given = _with_options(given, seeds, compare=compare)
        _run_all(given, run_dir, where=str(config), dry_run=dry_run, as_json=as_json)


@app.command()
def init(
    paths: Paths,
    out: Annotated[Path, typer.Option("--out", help="the YAML file to write")],
) -> None:
    """Writes a commented config for some files, with the schema that was detected in each."""
    from doremi_mix.atomic import write_atomic
    from doremi_mix.config_file import write_commented
    from doremi_mix.sources import Source, open_source
    from doremi_mix.sources.files import domain_name, find_files

    with errors_in_one_line():
        if out.exists():
            raise RunDirectoryError(f"{out}: exists already; choose another --out or delete it")
        if not out.parent.is_dir():
            raise RunDirectoryError(f"{out.parent}: no such folder; make it first or choose another --out")
        sources = []
        notes = {}
        for path in find_files(paths):
            entry = {"path": str(path.absolute()), "name": domain_name(path)}
            sources.append(entry)
            try:
                opened = open_source(Source(name=domain_name(path), path=path))
            except SchemaError as error:
                # The config is where this is settled, so it is written all the same.
                notes[entry["path"]] = f"SETTLE THIS: {error}"
                print(f"settle this in {out}: {error}", file=sys.stderr)
            else:
                notes[entry["path"]] = f"{opened.format}, {opened.schema.describe()}"
        write_atomic(out, write_commented(sources, notes))
        print(f"wrote {out} with {len(sources)} domains; run it: doremi-mix run {out} --run-dir runs/{out.stem}")


@app.command()
def status(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Shows which stages of a run have finished."""
    from doremi_mix.pipeline import resolve
    from doremi_mix.run import RunDirectory
    from doremi_mix.stages import stage_states

    with errors_in_one_line():
        directory = RunDirectory(run_dir)
        given = directory.describe()["given"]
        states = stage_states(resolve(given, directory)[0], directory)
        if as_json:
            print(json.dumps(states, indent=2))
            return
        for name, state in states.items():
            seconds = (directory.manifest(name) or {}).get("seconds")
            print(f"{name:<18}{state}" + (f"  ({seconds:,.1f} s)" if seconds is not None else ""))


@app.command()
def demo(run_dir: RunDir = Path("runs/demo"), as_json: AsJson = False) -> None:
    """Runs the whole pipeline on 20 made-up domains with a known answer, in a few minutes."""
    from doremi_mix.demo import DEMO_SETTINGS, demo_sources, write_demo_corpus
    from doremi_mix.distributed import join_processes
    from doremi_mix.pipeline import announce, open_run
    from doremi_mix.stages import run_pipeline

    with errors_in_one_line():
        corpus = run_dir.absolute().with_name(f"{run_dir.name}-corpus")
        processes = join_processes()
        if processes.is_main:
            write_demo_corpus(corpus)
        processes.wait()
        given = {**DEMO_SETTINGS, "sources": demo_sources(corpus)}
        with open_run(run_dir, given) as opened:
            announce(opened)
            run_pipeline(opened.config, opened.run, opened.narrator, opened.processes)
            if opened.processes.is_main:
                _print_result(opened, as_json=as_json)
                if not as_json:
                    _print_planted(opened.run)


@app.command()
def compare(
    run_dir: RunDir,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            metavar="NAME=WEIGHTS_JSON",
            help="enter another mixture: a file of weights, ours or another program's",
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="models to train for each mixture")] = None,
    config: ConfigOption = None,
    set_: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Trains small models on the learned mixture and on plain ones, and says whether it helps."""
    with errors_in_one_line():
        entered = {}
        for entry in also or ():
            name, equals, path = entry.partition("=")
            if not (name and equals and path):
                raise ConfigError(f"--also {entry}: expected NAME=WEIGHTS_JSON, for example --also mine=weights.json")
            entered[name] = str(Path(path).absolute())
        over: dict[str, Any] = {"also": entered} if entered else {}
        if seeds is not None:
            over["num_seeds"] = seeds
        with opened_stage(stage_named("compare"), run_dir, config, set_, over={"compare": over}) as opened:
            if opened.processes.is_main:
                _print_comparison(opened.run, as_json=as_json)


@app.command("filter")
def filter_(run_dir: RunDir, config: ConfigOption = None, set_: Sets = None, as_json: AsJson = False) -> None:
    """Keeps the rows that pass: duplicates, rules, language models, diversity (filter.preset, filter.rules)."""
    with errors_in_one_line(), opened_stage(stage_named("filter"), run_dir, config, set_) as opened:
        _print_rows(opened, "filter", as_json=as_json)


@app.command()
def analyze(run_dir: RunDir, config: ConfigOption = None, set_: Sets = None, as_json: AsJson = False) -> None:
    """Says what the loaded rows are like: lengths, languages, duplicates, quantiles of every score."""
    with errors_in_one_line(), opened_stage(stage_named("analyze"), run_dir, config, set_) as opened:
        _print_rows(opened, "analyze", as_json=as_json)


@app.command()
def rejections(
    run_dir: RunDir,
    rule: Annotated[str | None, typer.Option("--rule", help="only those of this rule")] = None,
    domain: Annotated[str | None, typer.Option("--domain", help="only those of this domain")] = None,
    number: Annotated[int, typer.Option("--num", min=1, help="how many, drawn at random")] = 10,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the draw")] = 0,
    as_json: AsJson = False,
) -> None:
    """Shows rows that the filter rejected, with the reason, for a person to judge."""
    from doremi_mix.pipeline import resolve
    from doremi_mix.rejections import sample_rejections
    from doremi_mix.report.filter_table import render_rejections
    from doremi_mix.run import RunDirectory
    from doremi_mix.stages import stage_states

    with errors_in_one_line():
        directory = RunDirectory(run_dir)
        given = directory.describe()["given"]
        rows = sample_rejections(directory, rule, domain, number, seed)
        if stage_states(resolve(given, directory)[0], directory).get("filter") != "finished":
            print("note: these are of the last filter that finished; the settings have changed since", file=sys.stderr)
        if as_json:
            print(json.dumps(rows, indent=2, ensure_ascii=False))
        elif rows:
            show(render_rejections(rows))
        else:
            print("nothing was rejected")


@app.command()
def rules(as_json: AsJson = False) -> None:
    """Lists the rules of filter.rules: what each looks at, and its default thresholds."""
    from dataclasses import asdict

    from doremi_mix.filters.rules import RULES
    from doremi_mix.report.filter_table import render_rules

    if as_json:
        print(json.dumps([asdict(rule) for rule in RULES], indent=2))
    else:
        show(render_rules(RULES))


@app.command()
def worker(
    run_dir: RunDir,
    host: Annotated[int, typer.Option("--host", min=1, help="which of filter.num_hosts this machine is, from 1")],
) -> None:
    """Scores rows for a filter that runs on another machine with filter.executor=hosts."""
    from doremi_mix.executors import run_worker
    from doremi_mix.progress import Narrator

    with errors_in_one_line():
        run_worker(run_dir, host, Narrator())


@app.command()
def evaluate(run_dir: RunDir, config: ConfigOption = None, set_: Sets = None, as_json: AsJson = False) -> None:
    """Scores the main model before and after the fine-tune: held-out loss of each domain, benchmarks."""
    with errors_in_one_line(), opened_stage(stage_named("evaluate"), run_dir, config, set_) as opened:
        if opened.processes.is_main:
            _print_scores(opened.run, as_json=as_json)


app.command()(export)
app.command()(dataset)
app.command()(adapter)
app.add_typer(baichuan_app)


def _print_rows(opened: OpenRun, stage: str, *, as_json: bool) -> None:
    """Prints what analyze or filter found."""
    from doremi_mix.report.filter_table import render_filter, render_statistics
    from doremi_mix.run import read_json

    if not opened.processes.is_main:
        return
    folder = opened.run.stage_path(stage)
    name = {"filter": "summary.json", "analyze": "statistics.json"}[stage]
    result = read_json(folder / name)
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    show(render_filter(result) if stage == "filter" else render_statistics(result))
    if stage == "filter" and "overlap" in (after := read_json(folder / "statistics.json")["kept"]):
        show(render_statistics(after, "What was kept"))
    print(f"{stage}: {folder / name}")
    if stage == "filter" and any(step["rejected"] for step in result["steps"]):
        path = shlex.quote(str(opened.run.path))
        print(f"look at rejected rows: doremi-mix rejections --run-dir {path} --rule RULE")


def _stage_command(stage: Stage) -> Callable[..., None]:
    def command(run_dir: RunDir, config: ConfigOption = None, set_: Sets = None) -> None:
        with errors_in_one_line(), opened_stage(stage, run_dir, config, set_):
            pass

    command.__doc__ = f"Stage {stage.name}: {stage.summary}."
    return command


for _stage in STAGES:
    if _stage.name not in ("analyze", "filter", "compare", "export", "evaluate"):
        app.command(command_of(_stage.name))(_stage_command(_stage))


def _with_options(given: dict[str, Any], seeds: int | None, *, compare: bool) -> dict[str, Any]:
    """Returns settings with the options of learn and run on top."""
    from doremi_mix.config_file import merge

    if seeds is not None:
        given = merge(given, {"weights": {"num_seeds": seeds}})
    return merge(given, {"compare": {"in_run": True}}) if compare else given


def _run_all(given: dict[str, Any], run_dir: Path, *, where: str, dry_run: bool, as_json: bool) -> None:
    from doremi_mix.pipeline import announce, learned_for_budget, open_run
    from doremi_mix.stages import run_pipeline

    given = learned_for_budget(given)
    if dry_run:
        _dry_run(given, run_dir, where, as_json=as_json)
        return
    with open_run(run_dir, given, where=where) as opened:
        announce(opened)
        run_pipeline(opened.config, opened.run, opened.narrator, opened.processes)
        if opened.processes.is_main:
            _print_result(opened, as_json=as_json)


def _dry_run(given: dict[str, Any], run_dir: Path, where: str, *, as_json: bool) -> None:
    from doremi_mix.checks import check_main_model
    from doremi_mix.pipeline import check_entered_weights, describe_plan, resolve
    from doremi_mix.progress import Narrator
    from doremi_mix.run import RunDirectory
    from doremi_mix.stages.load import check_sources, peek_sources

    config, hardware = resolve(given, RunDirectory(run_dir), where)
    check_entered_weights(config)
    peek_sources(config)
    check_main_model(config)
    counts = check_sources(config, Narrator())
    plan = describe_plan(config, hardware)
    if as_json:
        domains = [
            {"domain": c.domain, "path": c.path, "format": c.format, "schema": c.schema}
            | {"num_rows": c.num_rows, "num_kept": c.num_kept, "rejected": dict(c.rejected)}
            for c in counts
        ]
        result = {"plan": plan, "domains": domains, "config": config.model_dump(mode="json", by_alias=True)}
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    for count in counts:
        print(count.line())
    print("\n".join(plan))
    if config.mixture.token_budget is not None:
        print(
            f"  the budget of {config.mixture.token_budget:,} tokens is checked once they are counted, before training"
        )
    print("nothing was written; leave out --dry-run to run it")


def _print_result(opened: OpenRun, *, as_json: bool) -> None:
    from doremi_mix.report.table import explain_shortfalls, render_table
    from doremi_mix.summary import describe_certainty, next_commands, summarize

    summary = summarize(opened.config, opened.run)
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    show(render_table(summary["domains"], "Domain weights (shares of tokens)"))
    for line in explain_shortfalls(summary["domains"]):
        print(line)
    losses = {stage: loss for stage, loss in summary["held_out_loss"].items() if loss is not None}
    if losses:
        shown = ", ".join(f"{stage} {loss:.3f}" for stage, loss in losses.items())
        print(f"held-out loss, average over domains: {shown} nats per token")
    print("(the proxy's own loss does not judge the mixture: reweighting is not resampling)")
    for line in describe_certainty(summary):
        print(line)
    for label, path in (("weights", summary["domain_weights"]), ("mixture", summary["mixture"])):
        if path is not None:
            print(f"{label}: {path}")
    if summary["tokens"] is not None:
        print(f"tokens:  {summary['tokens']['drawn_tokens']:,} drawn of {summary['tokens']['token_budget']:,}")
    print(f"pictures: {'  '.join(summary['pictures'])}")
    if opened.config.finetune.model is not None:
        _print_scores(opened.run, as_json=False)
    print("next:")
    for command in next_commands(summary):
        print(f"  {command}")


def _print_comparison(directory: RunDirectory, *, as_json: bool) -> None:
    from doremi_mix.report.table import render_comparison
    from doremi_mix.run import read_json

    folder = directory.stage_path("compare")
    results = read_json(folder / "results.json")
    if as_json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return
    show(render_comparison(results))
    print(f"verdict: {results['verdict']}")
    if results["detectable_difference"]:
        smallest = max(results["detectable_difference"].values())
        print(
            f"power: {len(results['seeds'])} seeds find a true difference of {smallest:.4f} nats per token four times "
            "in five (noise of the seeds alone); --seeds N for more"
        )
    print(f"results: {folder / 'results.json'}  picture: {folder / 'comparison.png'}")


def _print_scores(directory: RunDirectory, *, as_json: bool) -> None:
    from doremi_mix.report.score_table import render_held_out, render_scores
    from doremi_mix.run import read_json

    path = directory.stage_path("evaluate") / "metrics.json"
    metrics = read_json(path)
    if as_json:
        print(json.dumps(metrics, indent=2, ensure_ascii=False))
        return
    if metrics["held_out_loss"]:
        average = "average over domains"
        show(render_held_out({**metrics["held_out_loss"], average: metrics["held_out_loss_average"]}, average))
    for name, scores in metrics["benchmarks"].items():
        show(render_scores(scores, f"Benchmark scores, %, {name.replace('_', '-')}"))
    if metrics["final"]:
        error = metrics["final"]["standard_error"]
        shown = "" if error is None else f" ± {error:.3f}"
        print(f"final score: {metrics['final']['score']:.3f}{shown} (half of each round)")
    print(f"scores: {path}")


def _print_planted(directory: Any) -> None:
    from rich.console import Console

    from doremi_mix.demo import planted_table
    from doremi_mix.stages.weights import read_weights

    Console(highlight=False).print(planted_table(read_weights(directory).domain_weights))


def main() -> None:
    """Runs the command line."""
    try:
        app()
    except KeyboardInterrupt:  # outside of a command: while modules load
        print("stopped", file=sys.stderr)
        sys.exit(130)

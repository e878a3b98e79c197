"""Commands around the main model: Baichuan2 to Llama layout, and adapters in other forms."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from doremi_mix.errors import ConfigError
from doremi_mix.terminal import errors_in_one_line

baichuan_app = typer.Typer(name="baichuan", no_args_is_help=True, help="Baichuan2 on today's libraries.")

Form = Literal["peft", "merged", "w-pack"]


@baichuan_app.callback()
def _baichuan() -> None:
    pass


@baichuan_app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="the folder of Baichuan2-7B, as published")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="the folder to write, in Llama layout")],
) -> None:
    """Converts Baichuan2-7B to Llama layout, which current libraries load without remote code.

    One tensor is held in memory at a time.  A conversion that was stopped goes on when it is started again.
    """
    from doremi_mix.baichuan.convert import convert as convert_folder
    from doremi_mix.baichuan.convert import source_bytes
    from doremi_mix.progress import Narrator, format_seconds

    with errors_in_one_line():
        narrator = Narrator()
        with narrator.track("convert", source_bytes(source), "bytes") as tracker:
            made = convert_folder(source, target, say=narrator.say, advance=tracker.advance)
        if made.was_up_to_date:
            print(f"{target}: up to date")
            return
        print(
            f"{target}: {made.num_tensors:,} tensors, {made.num_parameters:,} parameters in {made.num_shards} shards, "
            f"{made.num_bytes / 1e9:.2f} GB, verified ({format_seconds(made.seconds)})"
        )


def adapter(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a run directory, or an adapter's folder")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to write")],
    form: Annotated[
        Form,
        typer.Option(
            "--form",
            help="peft: as it is; merged: a whole model without adapters; w-pack: for Baichuan2's original layout",
        ),
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="the base model's folder, where it moved; w-pack: the original one")
    ] = None,
) -> None:
    """Writes the adapter of a fine-tune for other programs."""
    from doremi_mix.adapter_export import copy_adapter, describe_adapter, export_w_pack_adapter, merge_adapter
    from doremi_mix.progress import Narrator

    with errors_in_one_line():
        folder = _adapter_folder(source)
        narrator = Narrator()
        facts = describe_adapter(folder)
        if form == "w-pack" and base is None:
            raise ConfigError("--form w-pack is for Baichuan2's original layout; say where that lies: --base FOLDER")
        place = base or facts["base"]
        if form == "merged":
            with narrator.track("merge", None, "bytes") as tracker:
                merge_adapter(folder, Path(place), out, say=narrator.say, advance=tracker.advance)
        elif form == "w-pack":
            export_w_pack_adapter(folder, out, place)
        else:
            copy_adapter(folder, out, place)
        print(f"{out}: {form}, {facts['num_parameters']:,} parameters of adapters over {place}")


def _adapter_folder(source: Path) -> Path:
    """Returns the adapter that a run made, or the folder itself where it is one."""
    from doremi_mix.adapters import is_adapter_folder
    from doremi_mix.errors import StageNotFinishedError
    from doremi_mix.run import RUN_FILE, RunDirectory

    if is_adapter_folder(source) or not (source / RUN_FILE).exists():
        return source
    run = RunDirectory(source)
    if run.manifest("finetune") is None:
        command = f"doremi-mix finetune --run-dir {shlex.quote(str(source))}"
        raise StageNotFinishedError(f"finetune has not finished in {source}; run: {command}")
    return run.stage_path("finetune") / "adapter"

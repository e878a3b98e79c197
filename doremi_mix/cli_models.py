"""Commands around the main model: Baichuan2 to Llama layout, and adapters in other forms."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from doremi_mix.errors import ConfigError, DoremiMixError, RunDirectoryError, short_reason
from doremi_mix.terminal import errors_in_one_line

baichuan_app = typer.Typer(name="baichuan", no_args_is_help=True, help="Baichuan2 on today's libraries.")

Form = Literal["peft", "merged", "w-pack"]


@baichuan_app.callback()
def _baichuan() -> None:
    pass


@baichuan_app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="the folder of Baichuan2-7B, as published")],
    target: Annotated[str, typer.Argument(metavar="DST", help="the folder to write, in Llama layout")],
    verify: Annotated[
        bool, typer.Option("--verify", help="read every file of DST again, also where there is nothing to convert")
    ] = False,
) -> None:
    """Converts Baichuan2-7B to Llama layout, which current libraries load without remote code.

    One tensor is held in memory at a time.  A conversion that was stopped goes on when it is started again.
    """
    from doremi_mix.baichuan.convert import convert as convert_folder
    from doremi_mix.baichuan.convert import source_bytes
    from doremi_mix.baichuan.record import folder_of, verify_conversion
    from doremi_mix.progress import Narrator, format_seconds

    with errors_in_one_line():
        folder, out = folder_of(source, "SRC"), folder_of(target, "DST")
        narrator = Narrator()
        with narrator.track("convert", source_bytes(folder), "bytes") as tracker:
            made = convert_folder(folder, out, say=narrator.say, advance=tracker.advance)
        if verify:
            with narrator.track("verify", None, "bytes") as tracker:
                verify_conversion(out, advance=tracker.advance)
        if made.was_up_to_date or made.repaired:
            done = f"repaired {', '.join(made.repaired)}" if made.repaired else "up to date"
            print(f"{out}: {done}{', every file verified' if verify else ''}")
            return
        shards = "1 shard" if made.num_shards == 1 else f"{made.num_shards} shards"
        print(
            f"{out}: {made.num_tensors:,} tensors, {made.num_parameters:,} parameters in {shards}, "
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
    from doremi_mix.adapter_original import check_original
    from doremi_mix.progress import Narrator

    with errors_in_one_line(), _reading(source):
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
            check_original(folder, Path(place), say=narrator.say)
            export_w_pack_adapter(folder, out, place)
        else:
            copy_adapter(folder, out, base or None)
        print(f"{out}: {form}, {facts['num_parameters']:,} parameters of adapters over {place}")


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Says in one line what the system does not let be read."""
    try:
        yield
    except DoremiMixError:
        raise
    except OSError as error:
        place = error.filename or source
        raise RunDirectoryError(
            f"{place}: cannot be read ({short_reason(error)}); change its permissions, or give another"
        ) from None


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

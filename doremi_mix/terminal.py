"""What every command of the command line shares: errors in one line, tables that fit."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import typer

from doremi_mix.errors import DoremiMixError


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turns what the user can fix into one line on stderr and exit code 1; bugs keep their traceback."""
    try:
        yield
    except DoremiMixError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None


def show(table: Any) -> None:
    """Prints a table after an empty line, wider than a terminal's default where there is none."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a log file has room
    console.print()
    console.print(table)

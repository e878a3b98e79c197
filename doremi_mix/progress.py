"""What a person sees while something runs: one line per event, a bar with throughput and ETA on a terminal.

Everything goes to stderr, so that stdout stays free for results.  Where stderr is no terminal (a log file, CI), a line
is printed every few seconds instead of a bar.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 15.0


class Tracker:
    """Counts the work done under one label."""

    def __init__(self, narrator: Narrator, label: str, total: int | None, unit: str, done: int) -> None:
        self.narrator = narrator
        self.label = label
        self.total = total
        self.unit = unit
        self.done = done
        self.note = ""
        self._start_done = done
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def advance(self, amount: int, note: str = "") -> None:
        """Adds finished work; ``note`` is shown beside it, for example the current loss."""
        self.done += amount
        self.note = note or self.note
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], completed=self.done, speed=f"{self.rate():,.0f} {self.unit}/s", note=self.note
            )
        elif now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            self.narrator.say(self.line())

    def resume_at(self, done: int) -> None:
        """Starts counting, and timing, where an earlier process stopped."""
        self.done = self._start_done = done
        self._start = self._last_line = time.monotonic()
        self.advance(0)

    def rate(self) -> float:
        """Returns units per second since the start of this process's work."""
        return (self.done - self._start_done) / max(time.monotonic() - self._start, 1e-9)

    def line(self) -> str:
        """Returns the state as one line of text."""
        parts = [self.label]
        if self.total:
            left = (self.total - self.done) / max(self.rate(), 1e-9)
            parts += [f"{self.done / self.total:.0%}", f"{format_seconds(left)} left"]
        parts.append(f"{self.rate():,.0f} {self.unit}/s")
        if self.note:
            parts.append(self.note)
        return "  ".join(parts)


class Narrator:
    """Prints events and progress; a quiet one prints nothing (other processes of a distributed run, tests)."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Prints one line."""
        if not self.quiet:
            self.console.print(escape(text))

    @contextlib.contextmanager
    def track(self, label: str, total: int | None, unit: str, done: int = 0) -> Iterator[Tracker]:
        """Shows the progress of one piece of work.

        Args:
            label: what is being done.
            total: how many units there are, when that is known.
            unit: what is counted, in the plural.
            done: units that an earlier process finished.
        """
        tracker = Tracker(self, label, total, unit, done)
        if self.quiet or not self.console.is_terminal:
            yield tracker
            return
        columns = [
            SpinnerColumn(),
            TextColumn("{task.description:<18}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%" if total else ""),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
        ]
        with Progress(*columns, console=self.console, transient=True) as bar:
            bar.add_task(label, total=total, completed=done, speed="", note="")
            tracker._bar = bar
            yield tracker


def format_seconds(seconds: float) -> str:
    """Returns a duration as people say it: ``48 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

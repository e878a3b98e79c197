"""What a person sees."""

import io

import pytest
from rich.console import Console

from doremi_mix import progress
from doremi_mix.checkpoints import cut_log
from doremi_mix.progress import Narrator, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7300, "2 h 1 min")]
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def narrator():
    stream = io.StringIO()
    return Narrator(console=Console(file=stream, width=100)), stream


def test_lines_in_a_log_file(monkeypatch):
    voice, stream = narrator()
    clock = iter([0.0, 20.0, 20.0, 20.0, 21.0, 40.0, 40.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with voice.track("proxy", 1000, "tokens") as tracker:
        tracker.advance(500, "loss 3.2")
        tracker.advance(10)
        tracker.advance(240)
    assert stream.getvalue().splitlines() == [
        "proxy  50%  20 s left  25 tokens/s  loss 3.2",
        "proxy  75%  13 s left  19 tokens/s  loss 3.2",
    ]


def test_a_quiet_narrator_prints_nothing_and_brackets_are_text():
    voice, stream = narrator()
    voice.say("[red]domain[/red] 水")
    assert stream.getvalue() == "[red]domain[/red] 水\n"
    quiet = Narrator(quiet=True, console=voice.console)
    quiet.say("nothing")
    with quiet.track("x", 1, "rows") as tracker:
        tracker.advance(1)
    assert stream.getvalue() == "[red]domain[/red] 水\n"


def test_a_log_is_cut_to_its_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    cut_log(log, 0)
    assert log.read_text() == ""
    log.write_text('{"step": 1}\n{"step": 2}\n{"st')
    cut_log(log, 1)
    assert log.read_text() == '{"step": 1}\n'
    cut_log(log, 0)
    assert log.read_text() == ""

"""Memory and time of every stage against the number of tokens.

    python scripts/bench/scale.py [--sizes 1 10 100] [--stages load tokenize mixture] [--json PATH] [--keep DIR]

Writes made-up instruction data of about so many million tokens (eight domains of unequal size, one of them Chinese, in
JSON and JSON Lines; rows of 150 tokens on average, log-normal, as in real sets), then runs the pipeline on them as a
user would, each stage in a fresh process.  Reference and proxy train for a few steps of the tiny preset, whatever the
size, and the reference losses are those that these steps need: their work is fixed, so their memory and time must not
change either.  The mixture is half of the data.

The memory to judge by is the peak of RssAnon, the anonymous resident memory, looked at every 20 ms and summed over the
stage's processes.  It is what the stage has allocated, and so what no other program can have.  The usual "peak memory",
VmHWM, is shown beside it.  That one also counts the pages of mapped files: the token store is read through such a
mapping, of which the kernel keeps as much in memory as happens to be free, and drops it without a write when anybody
needs the room.  So it grows with the data on an idle machine and shrinks on a full one: a property of the machine.

Time is judged by processor seconds, which other users of the machine disturb less than the clock.  Two numbers per
token are shown: the seconds over the start, by all tokens, and the extra seconds by the extra tokens between two sizes.
Time is linear when they do not rise.  (The first falls, as the tokenizer's training is spread over more tokens.)

The tokenizer is trained on 4 MB of text here, an eighth of the default: otherwise that training, which takes the same
550 MiB at 10 and at 100 M tokens, would hide what grows beside it.

Runs on Linux, which alone tells anonymous memory from mapped files.  On 2 cores, 1, 10 and 100 M tokens take about
three minutes in all, and 1.1 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from doremi_mix.stages import STAGES, command_of, stage_named

SHARES = {
    "wiki": 0.30,
    "chat": 0.20,
    "zh": 0.15,
    "math": 0.12,
    "code": 0.10,
    "news": 0.07,
    "poems": 0.04,
    "rare": 0.02,
}
TOKENS_PER_ROW = 150
NUM_WORDS = 30_000
DATA_STAGES = ("load", "tokenize", "mixture")
"""Their work grows with the data; that of the others is fixed by the number of steps."""

STEPS = 4
SAMPLE_EVERY_SECONDS = 0.02
ROWS_AT_A_TIME = 5_000


# --- made-up data ---


@dataclass(frozen=True, slots=True)
class Language:
    """Words with the frequencies of a natural language.

    Attributes:
        words: the vocabulary.
        table: word numbers, each as often as its share of a text asks for.
        separator: between words.
    """

    words: list[str]
    table: NDArray[np.int64]
    separator: str


def make_language(name: str) -> Language:
    """Makes up the language of a domain: its words under Zipf's law, every tenth or so with a mark behind it."""
    rng = np.random.default_rng([*name.encode()])
    if name == "zh":
        syllables = [chr(code) for code in rng.choice(np.arange(0x4E00, 0x9000), 2_500, replace=False)]
        marks, separator, longest = ("，", "。"), "", 3
    else:
        starts, ends = [*"bcdfghjklmnprstvw", "th", "st", "pr"], [*"aeiou", "an", "er", "in"]
        syllables = [start + end for start in starts for end in ends]
        marks, separator, longest = (",", "."), " ", 4
    # Frequent words are short.
    num_syllables = 1 + np.minimum(rng.integers(1 + np.arange(NUM_WORDS) // 500), longest - 1)
    parts = iter(rng.choice(syllables, num_syllables.sum()).tolist())
    words = [
        "".join(islice(parts, count)) + (marks[rank % 2] if rank % 10 == 9 else "")
        for rank, count in enumerate(num_syllables.tolist())
    ]
    share = 1 / (np.arange(NUM_WORDS) + 2.7) ** 1.05
    table = np.searchsorted(np.cumsum(share / share.sum()), (np.arange(1 << 17) + 0.5) / (1 << 17))
    return Language(words, table, separator)


def make_rows(name: str, num_rows: int) -> Iterator[dict[str, str]]:
    """Yields the rows of a domain; one in thirty has the prompt of the row before."""
    language = make_language(name)
    rng = np.random.default_rng([len(name), *name.encode()])
    for start in range(0, num_rows, ROWS_AT_A_TIME):
        count = min(ROWS_AT_A_TIME, num_rows - start)
        # Words of instruction, input and output; half the rows have no input.
        num_words = np.exp(rng.normal([2.3, 2.6, 3.4], [0.5, 0.7, 1.0], (count, 3))).astype(np.int64).clip(1, 1_500)
        num_words[rng.random(count) < 0.5, 1] = 0
        ends = np.cumsum(num_words)
        words = [language.words[i] for i in language.table[rng.integers(len(language.table), size=ends[-1])].tolist()]
        pieces = [language.separator.join(words[a:b]) for a, b in pairwise([0, *ends.tolist()])]
        for row in range(count):
            prompt = row - 1 if row % 30 == 29 else row
            yield {
                "instruction": pieces[3 * prompt],
                "input": pieces[3 * prompt + 1],
                "output": pieces[3 * row + 2] + "\n",
            }


def write_corpus(folder: Path, num_tokens: int) -> list[Path]:
    """Writes one file per domain, JSON arrays and JSON Lines in turn; never holds more than a few thousand rows."""
    folder.mkdir(parents=True)
    paths = []
    for number, (name, share) in enumerate(SHARES.items()):
        rows = make_rows(name, max(40, round(num_tokens * share / TOKENS_PER_ROW)))
        is_array = number % 2 == 0
        path = folder / f"{name}.{'json' if is_array else 'jsonl'}"
        with path.open("wb") as file:
            for i, row in enumerate(rows):
                between = (b",\n" if i else b"[\n") if is_array else b""
                file.write(between + orjson.dumps(row) + (b"" if is_array else b"\n"))
            file.write(b"\n]\n" if is_array else b"")
        paths.append(path)
    return paths


# --- measuring ---


@dataclass(frozen=True, slots=True)
class Cost:
    """What one stage took.

    Attributes:
        wall_seconds: by the clock.
        cpu_seconds: of the processors, in user and system mode.
        anonymous_mib: peak of RssAnon.
        resident_mib: VmHWM.
        num_tokens: what its work is measured by: the tokens of the data, or those that go through the model.
        disk_bytes: of the files that it left.
    """

    wall_seconds: float
    cpu_seconds: float
    anonymous_mib: float
    resident_mib: float
    num_tokens: int = 0
    disk_bytes: int = 0


def measure(command: Sequence[str], log: Path) -> Cost:
    """Runs a command to its end while watching its memory.

    Raises:
        SystemExit: the command failed.
    """
    start = time.perf_counter()
    anonymous = resident = 0
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while True:
            # Not process.wait(): only wait4 tells the processor time of this one child.
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            states = [_memory(one) for one in _processes(process.pid)]
            anonymous = max(anonymous, sum(state.get("RssAnon", 0) for state in states))
            resident = max(resident, sum(state.get("VmHWM", 0) for state in states))
            time.sleep(SAMPLE_EVERY_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-2000:]}")
    seconds = usage.ru_utime + usage.ru_stime
    return Cost(time.perf_counter() - start, seconds, anonymous / 1024, resident / 1024)


def _processes(pid: int) -> Iterator[int]:
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in children:
            yield from _processes(int(child))


def _memory(pid: int) -> dict[str, int]:
    """Returns the lines of a process's status that count kilobytes; none once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(number) for name, number, _ in fields}


def run_size(millions: float, stages: Sequence[str], folder: Path) -> dict[str, Cost]:
    """Writes the data of one size, runs the stages that are asked for, and those that they read from."""
    start = time.perf_counter()
    paths = write_corpus(folder / "corpus", int(millions * 1e6))
    size = sum(path.stat().st_size for path in paths)
    print(f"{millions:g} M tokens: {size / 1e6:,.0f} MB written in {time.perf_counter() - start:.0f} s", flush=True)
    config, run_dir = folder / "config.json", folder / "run"  # JSON is YAML
    config.write_text(json.dumps(make_settings(paths, int(millions * 1e6))), encoding="utf-8")
    costs: dict[str, Cost] = {}
    command: list[str] = []
    wanted = _needed([*stages, "tokenize"])  # which counts the tokens
    for stage in STAGES:
        if stage.name in wanted:
            command = [sys.executable, "-m", "doremi_mix", command_of(stage.name), "--run-dir", str(run_dir)]
            options = ["--config", str(config)] if stage.name == "load" else []
            cost = costs[stage.name] = measure([*command, *options], folder / f"{stage.name}.log")
            print(f"  {stage.name:18}{cost.wall_seconds:7.1f} s {cost.anonymous_mib:7.0f} MiB", flush=True)
    # Once more, now that it is up to date: what any command costs before it works.
    start_cost = measure(command, folder / "start.log")
    described = {
        name: replace(cost, num_tokens=_num_tokens(name, run_dir), disk_bytes=_num_bytes(run_dir / name))
        for name, cost in costs.items()
        if name in stages
    }
    return {"start": start_cost, **described}


def make_settings(paths: Sequence[Path], num_tokens: int) -> dict[str, Any]:
    """Returns the configuration of a run."""
    training = {"model": "tiny", "steps": STEPS, "checkpoint_every": STEPS}
    return {
        "sources": [{"path": str(path)} for path in paths],
        # Few held-out examples, so that scoring them is the same work at every size.
        "tokenize": {"held_out_max_examples": 40, "bpe_sample_megabytes": 4},
        "reference": training,
        "proxy": training,
        "mixture": {"token_budget": num_tokens // 2},
    }


def _needed(stages: Iterable[str]) -> set[str]:
    """Returns the stages and all that they read from."""
    return set().union(*({name} | _needed(stage_named(name).reads) for name in stages))


def _num_tokens(stage: str, run_dir: Path) -> int:
    """Returns the tokens that a stage worked on: those of the data, or those that went through the model."""
    if stage in DATA_STAGES:
        return int(np.load(run_dir / "tokenize" / "example_tokens.npy", mmap_mode="r").sum())
    if stage == "reference_losses":
        return (run_dir / stage / "losses.f32").stat().st_size // 4
    if stage not in ("reference", "proxy"):
        return 0
    settings = json.loads((run_dir / stage / "manifest.json").read_text(encoding="utf-8"))["settings"]
    store = json.loads((run_dir / "tokenize" / "domains.json").read_text(encoding="utf-8"))
    return int(settings["steps"] * settings["batch_size"] * store["context_length"])


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- showing ---


def show(results: dict[float, dict[str, Cost]]) -> None:
    """Prints one table for memory and one for time."""
    sizes = list(results)
    heads = [f"{size:g} M" for size in sizes]
    stages = {name: [results[size][name] for size in sizes] for name in results[sizes[0]]}
    rows = [["stage", *(f"{head} tokens" for head in heads), "last ratio", *(f"{head} VmHWM" for head in heads)]]
    for name, costs in stages.items():
        ratio = f"{costs[-1].anonymous_mib / costs[-2].anonymous_mib:.3f}" if len(sizes) > 1 else ""
        anonymous = [f"{cost.anonymous_mib:,.0f}" for cost in costs]
        rows.append([name, *anonymous, ratio, *(f"{cost.resident_mib:,.0f}" for cost in costs)])
    print("\npeak of RssAnon, MiB (the ratio: the last size to the one before), and VmHWM")
    _print_table(rows)

    between = [f"ns {low:g}-{high:g} M" for low, high in pairwise(sizes)]
    rows = [["stage", *(f"{head} s" for head in heads), *(f"{head} ns" for head in heads), *between]]
    rows[0] += ["M tokens/s", "disk B/token"]
    for name, costs in stages.items():
        row = [name, *(f"{cost.cpu_seconds:.1f}" for cost in costs)]
        last = costs[-1]
        if name in DATA_STAGES:
            starts = zip(costs, stages["start"], strict=True)
            row += [f"{(cost.cpu_seconds - start.cpu_seconds) / cost.num_tokens * 1e9:,.0f}" for cost, start in starts]
            row += [
                f"{(high.cpu_seconds - low.cpu_seconds) / (high.num_tokens - low.num_tokens) * 1e9:,.0f}"
                for low, high in pairwise(costs)
            ]
            row += [f"{last.num_tokens / last.wall_seconds / 1e6:.2f}"]
        if name in (*DATA_STAGES, "reference_losses"):
            row += [""] * (len(rows[0]) - 1 - len(row)) + [f"{last.disk_bytes / last.num_tokens:.2f}"]
        rows.append(row)
    print("\nprocessor seconds; ns per token over the start, and per extra token between sizes; rates at the last size")
    _print_table(rows)


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) if i < len(row) else 0 for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=False)]
        print(f"{row[0]:{widths[0]}}  " + "  ".join(cells))


def describe_machine() -> dict[str, Any]:
    """Returns what the figures depend on besides the code."""
    import torch

    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model.partition(":")[2].strip() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 10, 100], help="millions of tokens, rising")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="which to show")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--keep", type=Path, help="a new folder in which data and runs are left")
    options = parser.parse_args()
    if not Path("/proc/self/status").exists():
        sys.exit("scale.py reads /proc, which only Linux has")
    if options.keep and options.keep.exists():
        sys.exit(f"{options.keep}: exists already; choose another --keep")
    results: dict[float, dict[str, Cost]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for size in sorted(options.sizes):
            folder = (options.keep or Path(temporary)).absolute() / f"{size:g}M"
            results[size] = run_size(size, options.stages, folder)
    show(results)
    if options.json:
        costs = {f"{size:g}": {name: asdict(cost) for name, cost in stages.items()} for size, stages in results.items()}
        content = {"machine": describe_machine(), "millions_of_tokens": costs}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

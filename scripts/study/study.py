"""The study behind the defaults: rules tried on one half of the rows of a pool, the winner confirmed on the other.

    python scripts/study/study.py choose POOL WORK     # enter every candidate of candidates.json into one comparison
    python scripts/study/study.py confirm POOL WORK    # learn and compare on two halves of the domains, on other rows

POOL is a folder of JSON arrays in Alpaca columns (the study used 20 real sets of 36 MB), WORK an empty folder.  Rows
are split by a hash of their prompt, so that no prompt is on both sides; the domains of the second half are split by
turns of the alphabet.  Each command prints the table of ``doremi-mix compare``; on two cores they take hours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

BUDGET = "1000000"
CANDIDATES = Path(__file__).with_name("candidates.json")


def side_of(row: dict[str, str]) -> str:
    """Returns on which side a row is: the same for all rows of a prompt."""
    prompt = " ".join(str(row.get(key, "")) for key in ("instruction", "input")).lower()
    return "choose" if hashlib.sha256(prompt.encode()).digest()[0] & 1 else "confirm"


def split(pool: Path, work: Path) -> None:
    """Writes choose/, half_a/ and half_b/."""
    for number, path in enumerate(sorted(pool.glob("*.json"))):
        rows = json.loads(path.read_text(encoding="utf-8"))
        for folder, side in (("choose", "choose"), (("half_a", "half_b")[number % 2], "confirm")):
            mine = [row for row in rows if side_of(row) == side]
            target = work / folder / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(mine, ensure_ascii=False), encoding="utf-8")
            print(f"{folder}/{path.name}: {len(mine):,} of {len(rows):,} rows", file=sys.stderr)


def doremi_mix(*arguments: str) -> None:
    """Runs a command of ours and stops with it."""
    subprocess.run([sys.executable, "-m", "doremi_mix", *arguments], check=True)


def choose(work: Path) -> None:
    """Compares every candidate's weights, each with the same seeds, on the rows of choose/."""
    run_dir = str(work / "runs" / "choose")
    doremi_mix("learn", str(work / "choose"), "--run-dir", run_dir, "--token-budget", BUDGET, "--seeds", "3")
    entered = []
    for name, candidate in json.loads(CANDIDATES.read_text(encoding="utf-8")).items():
        path = work / "candidates" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(candidate["weights"]), encoding="utf-8")
        entered += ["--also", f"{name}={path}"]
    doremi_mix("compare", "--run-dir", run_dir, *entered)


def confirm(work: Path) -> None:
    """Learns with the defaults on each half of the domains and compares, on rows that chose nothing."""
    for half in ("half_a", "half_b"):
        run_dir = str(work / "runs" / half)
        options = ["--token-budget", BUDGET, "--seeds", "3", "--set", "tokenize.held_out_fraction=0.1"]
        doremi_mix("learn", str(work / half), "--run-dir", run_dir, *options)
        doremi_mix("compare", "--run-dir", run_dir, "--seeds", "4")


def main() -> None:
    """Parses and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("choose", "confirm"))
    parser.add_argument("pool", type=Path)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    if not (arguments.work / "choose").exists():
        split(arguments.pool, arguments.work)
    {"choose": choose, "confirm": confirm}[arguments.part](arguments.work)


if __name__ == "__main__":
    main()

"""How fast a large JSON array becomes Parquet, and in how much memory.

    python scripts/bench/load.py [--megabytes 1000] [--keep FILE]

Writes a synthetic array, then measures in fresh processes: a plain pass of ijson (the yardstick: same machine, same
load), reading alone, and reading into Parquet. Rates count wall time; the ratio to ijson counts processor time, which
other users of the machine disturb less. The aim for Parquet: at least 20 MB/s in less than 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "we",
    "learn",
    "how",
    "much",
    "of",
    "each",
    "dataset",
    "to",
    "train",
    "on",
]
ZH_WORDS = ["数据", "混合", "权重", "学习", "模型", "回答", "问题", "指令", "训练", "领域"]
ROWS_PER_BATCH = 8192


def write_array(path: Path, num_bytes: int) -> None:
    """Writes an array of rows of about 350 bytes, one in five in Chinese, until the file has the size."""
    rng = random.Random(0)
    texts = [json.dumps(_row(rng, i), ensure_ascii=False, indent=1) for i in range(10_000)]
    with path.open("w", encoding="utf-8") as file:
        file.write("[\n")
        while file.tell() < num_bytes:
            file.write(",\n".join(rng.choices(texts, k=1000)) + ",\n")
        file.write(texts[0] + "\n]\n")


def _row(rng: random.Random, number: int) -> dict[str, str]:
    words, counts = (ZH_WORDS, (8, 4, 30)) if number % 5 == 0 else (WORDS, (14, 6, 45))
    instruction, input_, output = (" ".join(rng.choices(words, k=count)) for count in counts)
    # A quotation mark and a line end, as most real answers have: escapes cost time.
    return {"instruction": instruction, "input": input_ if number % 2 else "", "output": f'{output}\n"{number}"'}


def run_ijson(path: Path) -> int:
    import ijson

    with path.open("rb") as file:
        return sum(1 for _ in ijson.items(file, "item", use_float=True))


def run_read(path: Path) -> int:
    from doremi_mix.sources import Source, open_source

    return sum(1 for _ in open_source(Source("bench", path)))


def run_parquet(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from doremi_mix.sources import Source, open_source
    from doremi_mix.types import Example

    columns = ("id", "instruction", "input", "output", "row")
    schema = pa.schema([(column, pa.string()) for column in columns])
    num_rows, batch = 0, []
    with pq.ParquetWriter(path.with_suffix(".parquet"), schema) as writer:
        for example in open_source(Source("bench", path)):
            num_rows += 1
            if isinstance(example, Example):
                batch.append(example)
            if len(batch) == ROWS_PER_BATCH:
                writer.write(pa.table([[getattr(e, c) for e in batch] for c in columns], schema=schema))
                batch.clear()
        writer.write(pa.table([[getattr(e, c) for e in batch] for c in columns], schema=schema))
    return num_rows


RUNS = {"ijson": run_ijson, "read": run_read, "parquet": run_parquet}


def measure(name: str, path: Path) -> dict[str, float]:
    """Runs one measurement in a process of its own and returns what it printed."""
    command = [sys.executable, __file__, "--measure", name, "--keep", str(path)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--keep", type=Path, help="write the array here and leave it there")
    parser.add_argument("--measure", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        start = time.perf_counter()
        num_rows = RUNS[options.measure](options.keep)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time()
        # Linux counts kilobytes, macOS bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(
            json.dumps({"num_rows": num_rows, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak / 2**20})
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder) / "bench.json"
        write_array(path, int(options.megabytes * 1e6))
        megabytes = path.stat().st_size / 1e6
        print(f"{megabytes:,.0f} MB")
        results = {name: measure(name, path) for name in RUNS}
        yardstick = results["ijson"]["cpu_seconds"]
        for name, result in results.items():
            print(
                f"{name:8} {result['num_rows']:>10,.0f} rows  {megabytes / result['seconds']:6.1f} MB/s"
                f"  {result['cpu_seconds'] / yardstick:5.2f} x ijson's CPU time  peak {result['peak_mib']:6.0f} MiB"
            )


if __name__ == "__main__":
    main()

"""How fast a Baichuan2 checkpoint is converted to Llama layout, and in how much memory.

    python scripts/bench/baichuan.py [--gigabytes 1] [--format bin] [--num-shards 3] [--cold] [--folder DIR]

Writes a random bfloat16 checkpoint with the proportions of Baichuan2-7B, which has 15 GB, and measures in the same run
the conversion with all its checks, in a fresh process, and two yardsticks: cp of the weight files to the same disk, and
cp followed by sha256sum of both copies, which is the least that a checked copy costs.  The memory is what is anonymous;
pages of mapped files are the system's to drop.  With --cold the system is asked to forget the files before each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

PUBLISHED_BYTES = 2 * 7_505_973_248


def anonymous_bytes() -> int:
    """Returns the anonymous memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def write_checkpoint(folder: Path, gigabytes: float, form: str, num_shards: int) -> list[Path]:
    """Writes a random checkpoint and returns its weight files."""
    from tiny_baichuan import write_tiny_baichuan

    # 32 layers of 4 h^2 + 3 * 2.69 h^2 numbers, embeddings and head of 30.7 h^2 each, two bytes a number.
    hidden_size = max(128, round((gigabytes * 1e9 / 2 / 447.4) ** 0.5 / 128) * 128)
    write_tiny_baichuan(
        folder,
        vocab_size=125_696 * hidden_size // 4096,
        hidden_size=hidden_size,
        intermediate_size=11_008 * hidden_size // 4096,
        num_layers=32,
        num_heads=hidden_size // 128,
        dtype="bfloat16",
        num_shards=num_shards,
        format=form,
    )
    files = sorted(folder.glob(f"*.{form}"))
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return files


def forget(files: list[Path]) -> None:
    """Asks the system to drop files from its cache."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_conversion(source: Path, target: Path) -> dict[str, float]:
    """Converts in this process and says how long it took and how much memory it needed."""
    import safetensors.torch  # noqa: F401 (so that the memory of the libraries is not counted)

    import doremi_mix.baichuan.tokenizer  # noqa: F401
    from doremi_mix.baichuan.convert import convert

    before = peak = anonymous_bytes()

    def advance(_: int) -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes())

    conversion = convert(source, target, advance=advance)
    return {
        "seconds": conversion.seconds,
        "peak_bytes": peak - before,
        "cpu_seconds": time.process_time(),
        "num_parameters": conversion.num_parameters,
    }


def timed(*commands: list[str]) -> float:
    start = time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--format", choices=("bin", "safetensors"), default="bin")
    parser.add_argument("--num-shards", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="measure with files that are not in the cache")
    parser.add_argument("--folder", type=Path, help="where to work; by default in the folder for temporary files")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure_conversion(*options.measure)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        files = write_checkpoint(folder / "source", options.gigabytes, options.format, options.num_shards)
        num_bytes, largest = sum(path.stat().st_size for path in files), max(path.stat().st_size for path in files)
        print(f"{num_bytes / 1e9:.2f} GB of bfloat16 in {len(files)} files, the largest {largest / 1e6:,.0f} MB")
        names = [str(path) for path in files]
        seconds = {}
        for yardstick in ("cp", "cp and sha256sum"):
            (folder / "copy").mkdir()
            copies = [str(folder / "copy" / path.name) for path in files]
            if options.cold:
                forget(files)
            commands = [["cp", *names, str(folder / "copy")], ["sync", *copies]]
            seconds[yardstick] = timed(*commands, *([["sha256sum", *names, *copies]] if "and" in yardstick else []))
            shutil.rmtree(folder / "copy")
        if options.cold:
            forget(files)
        command = [sys.executable, __file__, "--measure", str(folder / "source"), str(folder / "target")]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rate = num_bytes / result["seconds"]
    print(f"converted  {result['seconds']:6.2f} s  {rate / 1e6:6,.0f} MB/s  {result['num_parameters']:,} parameters")
    for yardstick, value in seconds.items():
        print(f"{yardstick:16} {value:6.2f} s; the conversion takes {result['seconds'] / value:.2f} times as long")
    print(f"peak memory {result['peak_bytes'] / 1e6:,.0f} MB: {result['peak_bytes'] / largest:.2f} x the largest file")
    print(f"Baichuan2-7B ({PUBLISHED_BYTES / 1e9:.1f} GB) at this rate: {PUBLISHED_BYTES / rate:.0f} s")


if __name__ == "__main__":
    main()

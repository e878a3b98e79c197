"""Filtering against Data-Juicer, at the size of the contest, and k-center against the plain algorithm.

    python scripts/bench/filter.py [FILES.json ...] [--part data-juicer scale k-center] [--rows 1000000]
        [--data-juicer-python VENV/bin/python] [--sizes 300000 3400000] [--work DIR] [--json PATH]

data-juicer: the low-level preset (exact duplicates, text length, alphanumeric, special characters, character
repetition) with the same thresholds in both, through the command line of both, 2 processes each on the same 2 cores,
one after the other.  The rows are those of the files (JSON arrays of instruction, input and output), again and again
until there are so many: of every two copies, the first is exact and the second ends with its copy number.  Without
files they are made up.  Ours reads the arrays and keeps all columns; Data-Juicer reads JSON Lines of nothing but an id
and the joined text.  Two times are compared: "whole" is from the start of the first process to the written files, and
"filter" what each gives as the time without reading the input: ours of the stage filter, which reads what load wrote
and writes what is kept, Data-Juicer's of its operators.  Then the kept ids are compared, and rows that differ are shown
with the values of both.  Data-Juicer is in an environment of its own (pip install py-data-juicer aiohttp).

scale: made-up rows of 1,000 bytes on average, log-normal, in 20 domains of unequal size, 7 of them Chinese; one in
thirty has the text of another row, a hundredth of each domain is in others too, and some rows repeat themselves.  Load,
analyze and filter run on two sizes, each stage in a fresh process.  Memory is the peak of RssAnon, looked at every
20 ms and summed over the stage and its workers (see scale.py); the sum of VmHWM, which counts libraries and mapped
files of each process anew, stands beside it.  Rows per second count the whole process; a row takes as long in a large
set as in a small one when the ratio is 1 or more.  Filter finds the scores that analyze has computed.

k-center: whether the selection is that of the plain algorithm on 5,000 random points, and how many distances are saved
on 100,000 points in clusters.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from scale import Cost, describe_machine, make_language, measure

from doremi_mix.filters.diversity import k_center_greedy
from doremi_mix.filters.scores import FAMILIES

PROCESSES = 2
RULES: dict[str, dict[str, float]] = {
    "text_length": {"min": 20, "max": 2000},
    "alphanumeric": {"min": 0.25},
    "special_characters": {"max": 0.4},
    "character_repetition": {"max": 0.2},
}
OPERATORS: dict[str, tuple[str, dict[str, Any], str]] = {
    "text_length": ("text_length_filter", {"min_len": 20, "max_len": 2000}, "text_len"),
    "alphanumeric": ("alphanumeric_filter", {"tokenization": False, "min_ratio": 0.25}, "alnum_ratio"),
    "special_characters": ("special_characters_filter", {"max_ratio": 0.4}, "special_char_ratio"),
    "character_repetition": ("character_repetition_filter", {"rep_len": 10, "max_ratio": 0.2}, "char_rep_ratio"),
}
"""Data-Juicer's operator for each rule, the same thresholds, and the name that the score has in both."""

MAX_JUDGED = 5_000
"""Rows that differ are looked at up to so many."""

MAX_EXAMPLES = 5
"""Rows that differ are shown up to so many, for each pair of reasons."""

NUM_DOMAINS = 20
NUM_CHINESE = 7
MEAN_BYTES = 1_000
BYTES_AT_A_TIME = 8 << 20
PARTS = ("data-juicer", "scale", "k-center")


# --- against Data-Juicer ---


def bench_data_juicer(files: Sequence[Path], num_rows: int, python: Path, folder: Path) -> dict[str, Any]:
    """Filters the same rows with both, and compares times and kept ids."""
    if not files:
        files = write_corpus(folder / "made_up", min(num_rows, 84_000))
    start = time.perf_counter()
    paths = repeat_rows(files, num_rows, folder / "data", folder / "rows.jsonl")
    print(f"{num_rows:,} rows from {len(paths)} files in {time.perf_counter() - start:.0f} s", flush=True)
    with _on_few_cores(PROCESSES):
        ours = _run_stages(("load", "filter"), paths, folder)
        theirs, log = run_data_juicer(python, folder)
    operators = {name: float(value) for name, value in re.findall(r"OP \[(\w+)\] Done in ([\d.]+)s", log)}
    for name, cost in {**ours, "Data-Juicer": theirs}.items():
        print(f"  {name:11} {_show_cost(cost, num_rows)}")
    print("    " + ", ".join(f"{name} {value:.1f} s" for name, value in operators.items()))
    manifest = json.loads((folder / "run" / "filter" / "manifest.json").read_text(encoding="utf-8"))
    times = {
        "whole": (sum(cost.wall_seconds for cost in ours.values()), theirs.wall_seconds),
        "filter": (manifest["seconds"], float(re.findall(r"All OPs are done in ([\d.]+)s", log)[0])),
    }
    for what, (mine, other) in times.items():
        print(
            f"  {what:11} {mine:.1f} s, {num_rows / mine:,.0f} rows/s, against {other:.1f} s, {num_rows / other:,.0f} "
            f"rows/s: {other / mine:.1f} x"
        )
    return {
        "rows": num_rows,
        "ours": {name: asdict(cost) for name, cost in ours.items()},
        "data_juicer": {**asdict(theirs), "operators": operators},
        "times": times,
        "kept": compare_kept(python, folder),
    }


@contextlib.contextmanager
def _on_few_cores(number: int) -> Iterator[None]:
    """Keeps all processes that are started meanwhile on the same few cores, on systems that can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:number])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def repeat_rows(files: Sequence[Path], num_rows: int, folder: Path, lines_path: Path) -> list[Path]:
    """Writes copies of the files' rows for both: arrays, one a domain, and the ids and texts of all as JSON Lines."""
    folder.mkdir()
    pools = [orjson.loads(path.read_bytes()) for path in files]
    ends = np.cumsum([len(rows) for rows in pools]) * num_rows // sum(len(rows) for rows in pools)
    paths = []
    with lines_path.open("wb") as lines:
        for path, pool, count in zip(files, pools, np.diff(ends, prepend=0).tolist(), strict=True):
            # A small trial has copies, too.
            rows = pool[: max(1, count // 4)]
            paths.append(folder / path.name)
            with paths[-1].open("wb") as file:
                for number in range(count):
                    row = _copy_of(rows[number % len(rows)], number // len(rows))
                    file.write((b",\n" if number else b"[\n") + orjson.dumps(row))
                    text = f"{row['instruction']} {row['input']} {row['output']}"
                    lines.write(orjson.dumps({"id": f"{path.stem}:{number + 1}", "text": text}) + b"\n")
                file.write(b"\n]\n")
    return paths


def _copy_of(row: dict[str, Any], copy: int) -> dict[str, str]:
    """Returns a copy of a row with all three columns; each second copy ends with its number."""
    texts = {name: row.get(name) or "" for name in ("instruction", "input", "output")}
    return {**texts, "output": f"{texts['output']} {copy}"} if copy % 2 else texts


def _run_stages(stages: Sequence[str], paths: Sequence[Path], folder: Path) -> dict[str, Cost]:
    """Runs stages as a user would."""
    config = folder / "config.json"  # JSON is YAML
    settings = {
        "sources": [{"path": str(path.absolute()), "name": path.stem} for path in paths],
        "load": {"max_rejected_share": 1.0},
        "filter": {"exact_duplicates": "text", "rules": RULES, "workers": PROCESSES},
    }
    config.write_text(json.dumps(settings), encoding="utf-8")
    costs: dict[str, Cost] = {}
    for stage in stages:
        command = [sys.executable, "-m", "doremi_mix", stage, "--run-dir", str(folder / "run")]
        command += [] if costs else ["--config", str(config)]
        costs[stage] = measure(command, folder / f"{stage}.log")
    return costs


def run_data_juicer(python: Path, folder: Path) -> tuple[Cost, str]:
    """Runs Data-Juicer's command line; returns its cost and its log."""
    config, log = folder / "data_juicer.yaml", folder / "data_juicer.log"
    settings = {
        "project_name": "bench",
        "dataset_path": str((folder / "rows.jsonl").absolute()),
        "export_path": str((folder / "data_juicer" / "kept.jsonl").absolute()),
        "np": PROCESSES,
        "auto_op_parallelism": False,  # else every operator takes as many processes as it likes
        "ds_cache_dir": str((folder / "data_juicer_cache").absolute()),
        "process": [{"document_deduplicator": {}}, *_process_list()],
    }
    config.write_text(json.dumps(settings), encoding="utf-8")
    cache = folder / "data_juicer_cache"
    places = [f"{name}={cache}" for name in ("HF_HOME", "DATA_JUICER_CACHE_HOME")]
    command = ["env", "HF_HUB_OFFLINE=1", *places, str(python.with_name("dj-process")), "--config", str(config)]
    return measure(command, log), log.read_text(encoding="utf-8", errors="replace")


def _process_list() -> list[dict[str, Any]]:
    return [{name: settings} for name, settings, _ in OPERATORS.values()]


def compare_kept(python: Path, folder: Path) -> dict[str, Any]:
    """Compares the kept ids; prints and returns the rows that differ, by the reasons of both."""
    with (folder / "data_juicer" / "kept.jsonl").open("rb") as file:
        theirs = {orjson.loads(line)["id"] for line in file}
    places = {stage: folder / "run" / stage for stage in ("load", "filter")}
    kept = (path for path in places["filter"].glob("*.parquet") if path.stem != "rejections")
    ours = {i for path in kept for i in pq.read_table(path, columns=["id"]).column(0).to_pylist()}
    differ = ours ^ theirs
    print(f"  kept: ours {len(ours):,}, Data-Juicer's {len(theirs):,}; by one alone {len(differ):,}")
    reasons = dict.fromkeys(ours & differ, "kept")
    for stage, place in places.items():
        table = pq.read_table(place / "rejections.parquet", columns=["id", "rule"]).to_pydict()
        pairs = zip(table["id"], table["rule"], strict=True)
        reasons |= {i: rule if stage == "filter" else f"load: {rule}" for i, rule in pairs if i in differ}
    with (folder / "rows.jsonl").open("rb") as file:
        rows = [row for row in map(orjson.loads, file) if row["id"] in differ][:MAX_JUDGED] if differ else []
    counts: Counter[str] = Counter()
    examples: list[dict[str, Any]] = []
    for row, mine, other in zip(rows, our_values(rows), their_values(python, rows), strict=True):
        verdict = f"ours {reasons[row['id']]}, theirs {'kept' if row['id'] in theirs else _reason(other)}"
        counts[verdict] += 1
        if counts[verdict] <= MAX_EXAMPLES:
            examples.append({"id": row["id"], "verdict": verdict, "ours": mine, "theirs": other})
    for verdict, count in counts.most_common():
        print(f"  differ: {count:,} rows: {verdict}")
    for example in examples:
        values = (f"{name} {example['ours'][name]:.6g} / {value:.6g}" for name, value in example["theirs"].items())
        print(f"    {example['id']}: {example['verdict']}: {', '.join(values)}")
    return {"ours": len(ours), "theirs": len(theirs), "differ": len(differ), "by": dict(counts), "examples": examples}


def our_values(rows: Sequence[dict[str, str]]) -> list[dict[str, float]]:
    """Returns our scores of some texts."""
    columns = [column for _, _, column in OPERATORS.values()]
    texts = pa.array([row["text"] for row in rows], pa.string())
    nothing = pa.nulls(len(rows), pa.string())
    batch = pa.RecordBatch.from_arrays([nothing, nothing, texts], names=["instruction", "input", "output"])
    scores = FAMILIES["text"].make({}, columns)(batch)
    return [{column: float(scores[column][i]) for column in columns} for i in range(len(rows))]


JUDGE = """
import json, sys
from data_juicer.ops import load_ops
texts = json.load(sys.stdin)
samples = {"text": texts, "__dj__stats__": [{} for _ in texts]}
for op in load_ops(json.loads(sys.argv[1])):
    samples = op.compute_stats_batched(samples)
print("\\n" + json.dumps([{key: float(value) for key, value in stats.items()} for stats in samples["__dj__stats__"]]))
"""


def their_values(python: Path, rows: Sequence[dict[str, str]]) -> list[dict[str, float]]:
    """Returns Data-Juicer's scores of some texts."""
    if not rows:
        return []
    command = [str(python), "-c", JUDGE, json.dumps(_process_list())]
    texts = json.dumps([row["text"] for row in rows])
    printed = subprocess.run(command, input=texts, stdout=subprocess.PIPE, check=True, text=True).stdout
    return list(json.loads(printed.splitlines()[-1]))


def _reason(values: dict[str, float]) -> str:
    """Returns the first rule that a text fails; what fails none was a duplicate."""
    for rule, (_, _, column) in OPERATORS.items():
        low, high = RULES[rule].get("min", -np.inf), RULES[rule].get("max", np.inf)
        if not low <= values[column] <= high:
            return rule
    return "exact_duplicate"


def _show_cost(cost: Cost, num_rows: int) -> str:
    return (
        f"{cost.wall_seconds:7.1f} s, {num_rows / cost.wall_seconds:9,.0f} rows/s, {cost.cpu_seconds:7.1f} s of CPU, "
        f"{1e6 * cost.cpu_seconds / num_rows:6.1f} us of CPU a row, peak {cost.anonymous_mib:6,.0f} MiB anonymous "
        f"({cost.resident_mib:,.0f} VmHWM)"
    )


# --- at the size of the contest ---


def write_corpus(folder: Path, num_rows: int) -> list[Path]:
    """Writes 20 domains as JSON arrays; nothing is done row by row, and never more than a few MB are held."""
    folder.mkdir(parents=True)
    shares = 0.82 ** np.arange(NUM_DOMAINS)
    counts = np.diff(np.round(np.cumsum(shares / shares.sum()) * num_rows).astype(np.int64), prepend=0)
    makers = {name: RowMaker(name) for name in ("en", "zh")}
    common = {
        name: maker.rows(np.random.default_rng(1_000), 1 + int(counts[0]) // 100).split(b",\n")
        for name, maker in makers.items()
    }
    paths = []
    for number, count in enumerate(counts.tolist()):
        # Every third domain is Chinese, until there are enough.
        language = "zh" if number % 3 == 1 and number // 3 < NUM_CHINESE else "en"
        paths.append(folder / f"{language}_{number:02d}.json")
        rng = np.random.default_rng(number)
        with paths[-1].open("wb") as file:
            # All domains of a language begin with the same rows.
            first = common[language][: 1 + count // 100]
            file.write(b"[\n" + b",\n".join(first))
            left = count - len(first)
            while left > 0:
                some = min(left, BYTES_AT_A_TIME // MEAN_BYTES)
                file.write(b",\n" + makers[language].rows(rng, some))
                left -= some
            file.write(b"\n]\n")
    return paths


class RowMaker:
    """Makes up rows of one language as lines of JSON, many at once."""

    def __init__(self, language: str) -> None:
        made = make_language(language)
        # Escapes cost a reader time: some words end with a line end or a quotation mark, as real ones do.
        ends = ["\\n" if i % 40 == 7 else '\\"' if i % 90 == 8 else "" for i in range(len(made.words))]
        self.words = pa.array([word + end for word, end in zip(made.words, ends, strict=True)])
        self.table = made.table.astype(np.int32)
        self.separator = made.separator
        lengths = pc.binary_length(self.words).to_numpy()[self.table]
        self.mean_word_bytes = float(lengths.mean()) + len(self.separator)

    def rows(self, rng: np.random.Generator, count: int) -> bytes:
        """Returns rows with a comma between each two."""
        # The mean of exp(N(m, 1)) is exp(m + 1/2); some of the bytes are keys and quotation marks.
        mean_words = (MEAN_BYTES - 50) / self.mean_word_bytes
        num_words_B = np.exp(rng.normal(np.log(mean_words) - 0.5, 1.0, count)).clip(3, 20_000)
        shares_B3 = np.array([0.15, 0.25, 0.6]) * np.ones((count, 1))
        shares_B3[rng.random(count) < 0.5] = [0.3, 0.0, 0.7]
        counts_M = np.ceil(num_words_B[:, None] * shares_B3).astype(np.int64).ravel()
        offsets_M1 = np.concatenate([[0], np.cumsum(counts_M)])
        index_N = self.table[rng.integers(len(self.table), size=offsets_M1[-1])]
        self._make_repetitive(rng, index_N, offsets_M1, count)
        words = self.words.take(pa.array(index_N))
        texts = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets_M1, pa.int32()), words), self.separator)
        columns = [texts.take(pa.array(np.arange(i, 3 * count, 3))) for i in range(3)]
        lines = pc.binary_join_element_wise(
            '{"instruction": "', columns[0], '", "input": "', columns[1], '", "output": "', columns[2], '"}', ""
        )
        order_B = np.arange(count)
        again_B = rng.random(count) < 1 / 30
        order_B[again_B] = rng.integers(count, size=int(again_B.sum()))
        joined = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), lines.take(order_B)), ",\n")
        return bytes(joined[0].as_buffer())

    @staticmethod
    def _make_repetitive(
        rng: np.random.Generator, index_N: NDArray[np.int32], offsets_M1: NDArray[np.int64], count: int
    ) -> None:
        """Makes the output of one row in a hundred say the same four words over and over."""
        for row in np.flatnonzero(rng.random(count) < 0.01).tolist():
            first, last = offsets_M1[3 * row + 2], offsets_M1[3 * row + 3]
            index_N[first:last] = np.resize(index_N[first : first + 4], last - first)


def bench_scale(sizes: Sequence[int], folder: Path) -> dict[str, Any]:
    """Runs load, analyze and filter on made-up rows of each size."""
    results: dict[str, Any] = {}
    for num_rows in sorted(sizes):
        place = folder / f"{num_rows}"
        needed, free = 4.5 * MEAN_BYTES * num_rows, shutil.disk_usage(folder).free
        if free < needed:
            sys.exit(
                f"{num_rows:,} rows need {needed / 1e9:.0f} GB in {folder}, which has {free / 1e9:.0f}; use --work"
            )
        start = time.perf_counter()
        paths = write_corpus(place / "data", num_rows)
        size = sum(path.stat().st_size for path in paths)
        seconds = time.perf_counter() - start
        print(f"{num_rows:,} rows, {size / 1e6:,.0f} MB, made in {seconds:.0f} s", flush=True)
        costs = _run_stages(("load", "analyze", "filter"), paths, place)
        for name, cost in costs.items():
            print(f"  {name:8} {_show_cost(cost, num_rows)}", flush=True)
        domains = json.loads((place / "run" / "filter" / "summary.json").read_text(encoding="utf-8"))["domains"]
        rejected: Counter[str] = sum((Counter(domain["rejected"]) for domain in domains), Counter())
        kept = sum(domain["num_kept"] for domain in domains)
        shown = ", ".join(f"{rule} {number:,}" for rule, number in rejected.items())
        print(f"  {sum(domain['num_rows'] for domain in domains):,} rows = {kept:,} kept + rejected: {shown}")
        results[str(num_rows)] = {"bytes": size, "stages": {name: asdict(cost) for name, cost in costs.items()}}
        shutil.rmtree(place)
    _show_scaling(results)
    return results


def _show_scaling(results: dict[str, Any]) -> None:
    """Prints how the rates and the memory of the largest size compare with those of the smallest."""
    small, *_, large = (*results, *results)
    if small == large:
        return
    for stage, after in results[large]["stages"].items():
        before = results[small]["stages"][stage]
        rates = [int(size) / cost["wall_seconds"] for size, cost in ((small, before), (large, after))]
        cpu = 1e6 * before["cpu_seconds"] / int(small)
        further_cpu = 1e6 * (after["cpu_seconds"] - before["cpu_seconds"]) / (int(large) - int(small))
        print(
            f"{stage:8} {rates[0]:,.0f} and {rates[1]:,.0f} rows/s: {rates[1] / rates[0]:.2f} x; {cpu:.1f} us of CPU a "
            f"row and {further_cpu:.1f} a further one; peak {before['anonymous_mib']:,.0f} and "
            f"{after['anonymous_mib']:,.0f} MiB"
        )


# --- k-center ---


def bench_k_center(num_points: int) -> dict[str, Any]:
    """Compares selections, numbers of distances and times."""
    rng = np.random.default_rng(0)
    random_ND = rng.normal(size=(5_000, 64)).astype(np.float32)
    num_selected = len(random_ND) - 1  # all but one, as all would be returned as they stand
    same = k_center_greedy(random_ND, num_selected, device="cpu").selected_K.tolist()
    is_same = same == plain_selection(random_ND, num_selected)
    print(f"5,000 x 64 random points: {'the same' if is_same else 'ANOTHER'} selection as the plain algorithm's")
    num_selected, num_clusters = num_points // 50, num_points // 200
    centers_KD = rng.normal(size=(num_clusters, 64))
    members_N = rng.integers(num_clusters, size=num_points)
    points_ND = (centers_KD[members_N] + 0.1 * rng.normal(size=(num_points, 64))).astype(np.float32)
    start = time.perf_counter()
    result = k_center_greedy(points_ND, num_selected, device="cpu")
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    selection_by_products(points_ND, num_selected)
    plain_seconds = time.perf_counter() - start
    saved = num_selected * num_points / result.num_distances
    is_same_too = result.selected_K.tolist() == selection_by_products(points_ND.astype(np.float64), num_selected)
    print(
        f"{num_points:,} x 64 points in {num_clusters:,} clusters, {num_selected:,} selected: {saved:.1f} x fewer "
        f"distances ({num_selected * num_points:,} / {result.num_distances:,}); {seconds:.1f} s against "
        f"{plain_seconds:.1f} s by one float32 product with all points per selected one ({plain_seconds / seconds:.1f} "
        f"x); {'the same' if is_same_too else 'ANOTHER'} selection as by float64 products"
    )
    figures: dict[str, float] = {"distances_saved": saved, "seconds": seconds, "plain_seconds": plain_seconds}
    return {"points": num_points, "same_on_random": is_same, "same_on_clusters": is_same_too, **figures}


def plain_selection(points_ND: NDArray[np.float32], num: int) -> list[int]:
    """Gonzalez' algorithm as one writes it down, in float64."""
    points = points_ND.astype(np.float64)
    selected = [int(np.square(points - points.mean(0)).sum(1).argmin())]
    distance_N = np.full(len(points), np.inf)
    while len(selected) < num:
        np.minimum(distance_N, np.sqrt(np.square(points - points[selected[-1]]).sum(1)), out=distance_N)
        distance_N[selected[-1]] = -1.0
        selected.append(int(distance_N.argmax()))
    return selected


def selection_by_products(points_ND: NDArray[Any], num: int) -> list[int]:
    """The same with squared distances by matrix products, which is the fastest that the plain algorithm gets."""
    norm_N = np.square(points_ND).sum(1)
    selected = [int(np.square(points_ND - points_ND.mean(0)).sum(1).argmin())]
    distance_N = np.full(len(points_ND), np.inf, dtype=points_ND.dtype)
    while len(selected) < num:
        new_N = points_ND @ (-2 * points_ND[selected[-1]])
        new_N += norm_N
        new_N += norm_N[selected[-1]]
        np.minimum(distance_N, new_N, out=distance_N)
        distance_N[selected[-1]] = -np.inf
        selected.append(int(distance_N.argmax()))
    return selected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="JSON arrays of instruction, input and output")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="all if not given")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the part data-juicer")
    parser.add_argument("--data-juicer-python", type=Path, help="of an environment with py-data-juicer")
    parser.add_argument("--sizes", type=int, nargs="+", default=[300_000, 3_400_000], help="rows of the part scale")
    parser.add_argument("--points", type=int, default=100_000, help="of the part k-center")
    parser.add_argument("--work", type=Path, help="a folder with room, instead of the system's temporary one")
    parser.add_argument("--keep", action="store_true", help="leave the working folder and say where it is")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    parts = list(options.part or PARTS)
    if "data-juicer" in parts and options.data_juicer_python is None:
        if options.part:
            parser.error("--part data-juicer needs --data-juicer-python, that of an environment with py-data-juicer")
        parts.remove("data-juicer")
        print("the part data-juicer is left out: it needs --data-juicer-python")
    if "data-juicer" not in parts and options.files:
        parser.error("files are for the part data-juicer")
    machine = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    results: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="bench-filter-", dir=options.work)).absolute()
    try:
        for part in parts:
            place = folder / part
            place.mkdir()
            if part == "scale":
                results[part] = bench_scale(options.sizes, place)
            elif part == "k-center":
                results[part] = bench_k_center(options.points)
            else:
                results[part] = bench_data_juicer(options.files, options.rows, options.data_juicer_python, place)
    finally:
        if options.keep:
            print(f"left in {folder}")
        else:
            shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

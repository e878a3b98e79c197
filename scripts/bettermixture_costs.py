"""What each step of scripts/bettermixture.sh takes on one H100 80 GB, as a Markdown table with its assumptions.

    python scripts/bettermixture_costs.py [--config CONFIG]
    python scripts/bettermixture_costs.py --only STEP...     the sum of some rows, in one line

Rows of language models are computed by doremi_mix.costs from shapes and the settings of the config (by default
configs/baichuan2_lora.yaml, with every choice made as on a GPU), with the shares of a GPU's rate that training was
measured to reach; scoring was not measured.  Rows of data stages and of the conversion are rates that were measured on
two CPU cores, times the amount.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from doremi_mix.benchmarks import CONTEST_LIMIT, CONTEST_MAX_LENGTH
from doremi_mix.config import Config, parse_config
from doremi_mix.config_file import load_config_file, merge
from doremi_mix.costs import (
    BAICHUAN2_7B,
    H100,
    LOGIT_BLOCK,
    RESERVE_BYTES,
    SCORING_UTILIZATION,
    SMALL_MODEL_UTILIZATION,
    TRAINING_UTILIZATION,
    ModelShape,
    generation_seconds,
    inference_operations,
    scoring_memory,
    seconds,
    training_memory,
    training_operations,
)
from doremi_mix.finetune_plan import finetune_lora
from doremi_mix.plan import choose
from doremi_mix.presets import PRESETS

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "baichuan2_lora.yaml"
NUM_DOMAINS = 20
NUM_ROWS = 3_389_174
ROW_BYTES = 3.4e9

# Measured on two cores of an AMD EPYC; the commands are in README.
CONVERT_BYTES_PER_SECOND = 267e6
CONVERT_GB = 0.1
ROWS_PER_SECOND = {"load": 44_738, "analyze": 14_471, "filter": 94_202}
DATA_GB = {"load": 0.15, "analyze": 1.03, "filter": 1.19, "tokenize": 0.40, "mixture": 0.27}
BAICHUAN_TOKENS_PER_SECOND = 1.36e6
"""Of 3,231 real rows; ``bettermixture.sh --tiny`` takes 7 s for 9.4 M tokens of other rows, with packing."""
MIXTURE_SECONDS_PER_TOKEN = 22e-9
BYTES_PER_TOKEN = 3.1
"""Of text in real rows of the contest, under the tokenizer of Baichuan2; those of JSON are a little more."""

LABEL_SHARE = 0.6
"""Assumed: tokens of the answers, of all after the template.  Of the characters of 20 real sets it is .2 to .9."""
MICRO_BATCHES = (8, 64)
SCORE_BATCH = 4
EVALUATE_BATCH = 8
GENERATED_TOKENS = 256
STEP_SECONDS = 0.025
"""Assumed: what transformers takes at least to launch the kernels of one forward pass through 32 blocks."""


class Task(NamedTuple):
    """A benchmark: how often the model reads how many tokens for an item, and how many it writes."""

    name: str
    num_items: int
    num_passes: float
    prompt_tokens: int
    written_tokens: int = 0


TASKS = (
    Task("arc_challenge", CONTEST_LIMIT, 4, CONTEST_MAX_LENGTH),
    Task("hellaswag", CONTEST_LIMIT, 4, CONTEST_MAX_LENGTH),
    Task("truthfulqa_mc2", CONTEST_LIMIT, 7.2, 300),  # 5,882 answers to 817 questions
    Task("mmlu", 57 * CONTEST_LIMIT, 1, CONTEST_MAX_LENGTH),
    Task("cmmlu", 67 * CONTEST_LIMIT, 1, CONTEST_MAX_LENGTH),
    Task("gsm8k", CONTEST_LIMIT, 1, CONTEST_MAX_LENGTH - GENERATED_TOKENS, GENERATED_TOKENS),
    Task("scrolls_summscreenfd", CONTEST_LIMIT, 1, CONTEST_MAX_LENGTH - GENERATED_TOKENS, GENERATED_TOKENS),
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    step: str
    quantity: str
    formula: str
    seconds: float
    gigabytes: float
    source: str


def chosen_config(path: Path) -> Config:
    """Reads a config and makes every choice as a run on a GPU does."""
    given = load_config_file(path)
    budget = given.get("mixture", {}).get("token_budget")
    config = parse_config(merge(given, {"proxy": {"token_budget": budget}}), where=str(path))
    return choose(config, NUM_DOMAINS, "cuda")


def data_rows() -> list[Row]:
    """Returns the steps that need no GPU."""
    num_bytes = 2.0 * BAICHUAN2_7B.num_parameters
    rows = [
        Row(
            "convert",
            f"{num_bytes / 1e9:.1f} GB of weights",
            f"bytes / {CONVERT_BYTES_PER_SECOND / 1e6:,.0f} MB/s",
            num_bytes / CONVERT_BYTES_PER_SECOND,
            CONVERT_GB,
            "measured on 1 GB, CPU",
        )
    ]
    for stage, rows_per_second in ROWS_PER_SECOND.items():
        rows.append(
            Row(
                stage,
                f"{NUM_ROWS / 1e6:.2f} M rows, {ROW_BYTES / 1e9:.1f} GB",
                f"rows / {rows_per_second:,} rows/s",
                NUM_ROWS / rows_per_second,
                DATA_GB[stage],
                "measured on 3.4 M made-up rows, 2 cores",
            )
        )
    tokens = ROW_BYTES / BYTES_PER_TOKEN
    rows.append(
        Row(
            "tokenize",
            f"{tokens / 1e9:.1f} G tokens",
            f"bytes / {BYTES_PER_TOKEN} / {BAICHUAN_TOKENS_PER_SECOND / 1e6:.2f} M tokens/s",
            tokens / BAICHUAN_TOKENS_PER_SECOND,
            DATA_GB["tokenize"],
            "measured on 3,231 real rows, 2 cores",
        )
    )
    return rows


def learning_rows(config: Config) -> list[Row]:
    """Returns reference, its losses, and the proxy."""
    reference, proxy = config.reference, config.proxy
    T = config.tokenize.context_length
    assert T is not None
    preset = PRESETS[str(reference.model)]
    shape = ModelShape(
        preset.hidden_size,
        preset.intermediate_size,
        preset.num_layers,
        preset.num_heads,
        preset.num_heads,
        BAICHUAN2_7B.vocab_size,
        tied_embeddings=True,
    )
    context = (T + 1) / 2
    rows = []
    for stage, section in (("reference", reference), ("reference_losses", proxy), ("proxy", proxy)):
        assert section.steps is not None
        assert section.batch_size is not None
        tokens = section.steps * section.batch_size * T
        if stage == "reference_losses":
            operations = inference_operations(shape, tokens, context, label_share=LABEL_SHARE)
            parts = scoring_memory(shape, tokens_per_pass=section.batch_size * T, num_logits=LOGIT_BLOCK, base_bits=32)
        else:
            operations = training_operations(shape, tokens, context, label_share=LABEL_SHARE)
            parts = training_memory(shape, tokens_per_pass=section.batch_size * T, label_share=LABEL_SHARE)
        passes = "forward" if stage == "reference_losses" else "forward and backward"
        rows.append(
            Row(
                stage,
                f"{shape.num_parameters / 1e6:.0f} M parameters ({reference.model}), {section.steps:,} steps x "
                f"{section.batch_size} x {T:,} = {tokens / 1e6:.1f} M tokens",
                f"{passes}, {operations:.1e} operations / {rate(SMALL_MODEL_UTILIZATION)}",
                seconds(operations, H100, SMALL_MODEL_UTILIZATION),
                sum(parts.values()) / 1e9,
                "computed",
            )
        )
    available = ROW_BYTES / BYTES_PER_TOKEN
    budget = config.mixture.token_budget or 0
    rows.append(
        Row(
            "mixture",
            f"{budget / 1e6:.0f} M of {available / 1e9:.1f} G tokens",
            f"available tokens x {MIXTURE_SECONDS_PER_TOKEN * 1e9:.0f} ns",
            available * MIXTURE_SECONDS_PER_TOKEN,
            DATA_GB["mixture"],
            "measured on 100 M tokens, 2 cores",
        )
    )
    return rows


def finetune_rows(config: Config) -> list[Row]:
    """Returns the fine-tune, for each size of a micro-batch."""
    section = config.finetune
    budget, length = section.token_budget or config.mixture.token_budget, section.max_example_tokens
    assert budget is not None
    assert length is not None
    lora = finetune_lora(section)
    tokens = budget * section.epochs
    checkpointing = bool(section.gradient_checkpointing)
    operations = training_operations(
        BAICHUAN2_7B,
        tokens,
        (length + 1) / 2,
        lora=lora,
        gradient_checkpointing=checkpointing,
        label_share=LABEL_SHARE,
    )
    rows = []
    for sequences in MICRO_BATCHES:
        parts = training_memory(
            BAICHUAN2_7B,
            tokens_per_pass=sequences * length,
            lora=lora,
            gradient_checkpointing=checkpointing,
            label_share=LABEL_SHARE,
        )
        rows.append(
            Row(
                f"finetune, micro-batch {sequences}",
                f"{budget / 1e6:.0f} M tokens x {section.epochs} epochs, sequences of {length:,}",
                f"{operations / tokens / 1e9:.1f} G operations a token / {rate(TRAINING_UTILIZATION)}: "
                f"{tokens / seconds(operations, H100, TRAINING_UTILIZATION):,.0f} tokens/s; GB are {listed(parts)}",
                seconds(operations, H100, TRAINING_UTILIZATION),
                sum(parts.values()) / 1e9,
                "computed",
            )
        )
    return rows


def evaluate_rows(config: Config) -> list[Row]:
    """Returns held-out losses and benchmarks, each for base and tuned model."""
    length = config.finetune.max_example_tokens
    assert length
    examples = config.evaluate.held_out_examples
    tokens = 2 * NUM_DOMAINS * examples * length
    operations = inference_operations(BAICHUAN2_7B, tokens, (length + 1) / 2, label_share=LABEL_SHARE)
    parts = scoring_memory(BAICHUAN2_7B, tokens_per_pass=SCORE_BATCH * length, num_logits=LOGIT_BLOCK)
    rows = [
        Row(
            "evaluate: held-out losses",
            f"2 models x {NUM_DOMAINS} domains x {examples} examples x at most {length:,} tokens",
            f"forward, {operations:.1e} operations / {rate(SCORING_UTILIZATION)}",
            seconds(operations, H100, SCORING_UTILIZATION),
            sum(parts.values()) / 1e9,
            "computed",
        )
    ]
    parts = scoring_memory(BAICHUAN2_7B, tokens_per_pass=EVALUATE_BATCH * CONTEST_MAX_LENGTH)
    least = generation_seconds(BAICHUAN2_7B, 1, H100)
    for what, tasks in (("scored", TASKS[:5]), ("written", TASKS[5:])):
        passes = [2 * task.num_items * task.num_passes for task in tasks]
        operations = sum(
            inference_operations(BAICHUAN2_7B, number * task.prompt_tokens, (task.prompt_tokens + 1) / 2)
            for number, task in zip(passes, tasks, strict=True)
        )
        num_steps = sum(2 * math.ceil(task.num_items / EVALUATE_BATCH) * task.written_tokens for task in tasks)
        steps = (
            f" + {num_steps:,} steps x {STEP_SECONDS * 1e3:.0f} ms (reading the weights alone: {least * 1e3:.1f} ms)"
        )
        listed_tasks = ", ".join(
            f"{task.name} {task.num_items:,} x {task.num_passes:g} x {task.prompt_tokens:,}" for task in tasks
        )
        rows.append(
            Row(
                f"evaluate: {what} answers",
                f"2 models x items x passes x tokens: {listed_tasks}",
                f"forward, {operations:.1e} operations / {rate(SCORING_UTILIZATION)}{steps if num_steps else ''}",
                seconds(operations, H100, SCORING_UTILIZATION) + num_steps * max(least, STEP_SECONDS),
                sum(parts.values()) / 1e9,
                "computed",
            )
        )
    return rows


def rate(utilization: float) -> str:
    """Names the operations per second that are reckoned with."""
    return f"({utilization} x {H100.flops / 1e12:.0f} TFLOP/s)"


def listed(parts: dict[str, float]) -> str:
    """Lists the parts of a memory."""
    return ", ".join(f"{name} {part / 1e9:.1f}" for name, part in parts.items())


ASSUMPTIONS = (
    f"An H100 multiplies {H100.flops / 1e12:.0f} TFLOP/s in bf16 and copies {H100.copy_bytes_per_second / 1e12:.1f} "
    f"TB/s. Shares of that: fine-tune {TRAINING_UTILIZATION}, with the operations that checkpointing repeats counted "
    f"(measured, without torch.compile); small models {SMALL_MODEL_UTILIZATION} (measured, with it); scoring "
    f"{SCORING_UTILIZATION} (assumed).",
    f"Assumed: {LABEL_SHARE:.0%} of the tokens are learned (the head computes nothing for the others). Sequences are "
    "taken as full, for memory and attention; micro-batches hold sequences of like length, so padding is left out.",
    f"Computed memory is for fused attention and holds {RESERVE_BYTES / 1e9:.0f} GB for the CUDA context and "
    "fragmentation (assumed); that of data stages is the process's anonymous memory.",
    f"Benchmarks: prompts are at the cut of {CONTEST_MAX_LENGTH:,} tokens, {GENERATED_TOKENS} of which are left for "
    "written answers, all of them used; truthfulqa_mc2 has 300 (assumed). Answers of one token to one question share a "
    f"pass. Batches of {EVALUATE_BATCH}, with the logits of whole prompts in bf16 and float32. A step of writing takes "
    f"{STEP_SECONDS * 1e3:.0f} ms, as launched from Python (assumed).",
    "The filter is the config's (duplicates and rules); scores by language models are extra. Not counted: starting "
    "processes, reading 15 GB of weights for fine-tune and evaluate, downloads. Writing the merged model is about "
    "another convert.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--only", nargs="+", metavar="STEP", help="rows whose step begins with one of these")
    arguments = parser.parse_args()
    config = chosen_config(arguments.config)
    rows = [*data_rows(), *learning_rows(config), *finetune_rows(config), *evaluate_rows(config)]
    if arguments.only:
        chosen = [row for row in rows if row.step.startswith(tuple(arguments.only))]
        kinds = sorted({row.source.split()[0] for row in chosen})
        hours = sum(row.seconds for row in chosen) / 3600
        print(f"1 x H100 80 GB: {hours:.2f} h, {max(row.gigabytes for row in chosen):.1f} GB; {', '.join(kinds)}")
        return
    print("| step | what | how | hours | GB | source |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.step} | {row.quantity} | {row.formula} | {row.seconds / 3600:.3f} | {row.gigabytes:.1f} "
            f"| {row.source} |"
        )
    # The fine-tune is in the table once for each micro-batch.
    total = sum(row.seconds for row in rows) - sum(row.seconds for row in finetune_rows(config)[1:])
    print(f"| all | | | {total / 3600:.2f} | {max(row.gigabytes for row in rows):.1f} at most | |\n")
    for line in ASSUMPTIONS:
        print(f"- {line}")


if __name__ == "__main__":
    main()

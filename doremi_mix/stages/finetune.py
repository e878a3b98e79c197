"""Stage finetune: train LoRA adapters over the main model on the mixture.

Writes ``adapter/`` (peft's layout), ``metrics.jsonl`` (loss, learning rate and throughput of each step),
``domain_losses.jsonl`` (training loss of each domain in each step) and ``metrics.json`` (what was trained on what).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from transformers import AutoConfig

from doremi_mix.adapters import num_trainable_parameters, set_adapter_dropout
from doremi_mix.atomic import write_json
from doremi_mix.batches import EpochSchedule
from doremi_mix.config import FinetuneConfig
from doremi_mix.costs import ModelShape, training_memory
from doremi_mix.engine import EngineSettings, has_bf16
from doremi_mix.errors import ConfigError, ModelError
from doremi_mix.finetune_data import (
    ExampleCounts,
    ExampleStore,
    SequenceStore,
    is_complete,
    remove_examples,
    write_examples,
)
from doremi_mix.finetune_plan import BETAS, finetune_lora, micro_batches
from doremi_mix.fingerprints import rows_stage
from doremi_mix.models import TokenInfo, TokenLossModel, build_model, num_parameters
from doremi_mix.objectives import FinetuneObjective, MicroBatch
from doremi_mix.plan import MICRO_BATCH_TOKENS, UNKNOWN_MODEL_TOKENS, tokens_that_fit
from doremi_mix.run import read_json
from doremi_mix.sources import Source, open_source
from doremi_mix.stages import StageContext
from doremi_mix.stages.mixture import read_mixture
from doremi_mix.stages.tokenize import make_template
from doremi_mix.stages.training import make_trackers, save_trained
from doremi_mix.tokenizer import Tokenizer, load_tokenizer
from doremi_mix.train import METRICS, TrainingPlan, train
from doremi_mix.types import Example

ADAPTER = "adapter"
EXAMPLES = "examples"
CHUNK_SIZE = 512
CPU_TOKENS = 16_384
"""Tokens in one forward pass on a CPU at most."""
FEW_STEPS = 20
LEAST_TOKENS = 512
"""Tokens in one forward pass on a GPU that is tried, however small its memory."""


def run(context: StageContext) -> str:
    """Trains the adapters; returns one line about them."""
    section = context.config.finetune
    if section.model is None:
        raise ConfigError(
            "finetune.model is missing; give the main model's folder, for example: --set finetune.model=Baichuan2-llama"
        )
    tokenizer = load_tokenizer(section.tokenizer or section.model, trust_remote_code=section.trust_remote_code)
    names = domain_names(context)
    counts = _encode(context, tokenizer, names)
    assert section.packing and section.max_example_tokens and section.batch_size and section.learning_rate
    sequences = SequenceStore(
        ExampleStore(context.folder / EXAMPLES), packing=section.packing, max_tokens=section.max_example_tokens
    )
    schedule = EpochSchedule(sequences.lengths_S, section.batch_size, section.epochs, section.seed)
    model = finetune_model(section, tokenizer, ADAPTER)
    set_adapter_dropout(model.model, on=True)
    _describe(context, counts, sequences, schedule, model)
    engine = EngineSettings(bool(section.gradient_checkpointing), section.shard, section.compile)
    plan = TrainingPlan(
        stage="finetune",
        steps=schedule.num_steps,
        learning_rate=section.learning_rate,
        warmup_share=section.warmup_share,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        gradient_accumulation_steps=int(
            context.processes.from_main(str(_micro_batches(context, section, sequences, schedule)))
        ),
        checkpoint_every=section.checkpoint_every or max(1, math.ceil(schedule.num_steps / 20)),
        engine=engine,
        final_share=0.0,
        betas=BETAS,
        warmup_from_zero=True,
    )

    def read(ids: NDArray[Any]) -> MicroBatch:
        return {name: torch.from_numpy(array) for name, array in sequences.batch(ids).items()}

    num_tokens = sum(map(schedule.num_tokens, range(schedule.num_steps)))
    trackers = make_trackers(context, section.result_settings(), "finetune")
    objective = FinetuneObjective(names, section.seed)
    with context.narrator.track("finetune", num_tokens, "tokens") as tracker:
        accelerator = train(
            model, objective, schedule, read, plan, context.folder, tracker, trackers, schedule.num_tokens
        )
    set_adapter_dropout(model.model, on=False)
    save_trained(model, engine, accelerator, context.folder / ADAPTER)
    if context.processes.is_main:
        _write_metrics(context, counts, sequences, schedule, model)
        remove_examples(context.folder / EXAMPLES)
    return (
        f"{schedule.num_steps:,} steps on {counts.num_kept:,} examples, {counts.num_tokens:,} tokens; "
        f"adapter in {context.run.stage_path('finetune') / ADAPTER}"
    )


def finetune_model(section: FinetuneConfig, tokenizer: Tokenizer, adapter: str) -> TokenLossModel:
    """Builds the main model with a fresh adapter.

    Args:
        section: of the stage.
        tokenizer: of the model.
        adapter: what to call the adapter.
    """
    assert section.model and section.max_example_tokens
    return build_model(
        section.model,
        TokenInfo(tokenizer.vocab_size, tokenizer.end_id, tokenizer.pad_id),
        section.max_example_tokens,
        section.seed,
        trust_remote_code=section.trust_remote_code,
        lora=finetune_lora(section),
        adapter=adapter,
        base_dtype=torch.bfloat16 if has_bf16() else None,
        quantization=section.quantization,
    )


def domain_names(context: StageContext) -> tuple[str, ...]:
    """Returns the names that domain ids of the fine-tune's examples stand for."""
    data = context.config.finetune.data
    if data is not None:
        return (Path(data).stem,)
    return tuple(read_json(context.run.stage_path("mixture") / "allocation.json")["domains"])


def _encode(context: StageContext, tokenizer: Tokenizer, names: tuple[str, ...]) -> ExampleCounts:
    """Writes the examples as tokens, unless an earlier process did; the first process works, all wait."""
    section = context.config.finetune
    folder = context.folder / EXAMPLES
    if context.processes.is_main and not is_complete(folder):
        assert section.max_example_tokens and section.packing
        folder.mkdir(exist_ok=True)
        with context.narrator.track("encode", None, "rows") as tracker:
            write_examples(
                _batches(context, names),
                folder,
                tokenizer,
                make_template(context.config.tokenize),
                max_example_tokens=section.max_example_tokens,
                token_budget=section.token_budget,
                skip_empty_query=bool(section.skip_plain_text),
                packing=section.packing,
                advance=tracker.advance,
            )
    context.processes.wait()
    return ExampleStore(folder).counts


def _batches(context: StageContext, names: tuple[str, ...]) -> Iterator[tuple[list[Example], list[int]]]:
    """Yields the examples in order, with their domain ids."""
    data = context.config.finetune.data
    if data is None:
        rows_folder = context.run.stage_path(rows_stage(context.config))
        yield from read_mixture(context.run, rows_folder, names)
        return
    kept: list[Example] = []
    rejected: Counter[str] = Counter()
    for item in open_source(Source(name=names[0], path=Path(data))):
        if isinstance(item, Example):
            kept.append(item)
        else:
            rejected[item.rule] += 1
        if len(kept) == CHUNK_SIZE:
            yield kept, [0] * len(kept)
            kept = []
    yield kept, [0] * len(kept)
    if rejected:
        context.narrator.say(f"  {data}: {rejected.total():,} rows cannot be used ({_listed(rejected)})")


def _micro_batches(
    context: StageContext, section: FinetuneConfig, sequences: SequenceStore, schedule: EpochSchedule
) -> int:
    """Returns the micro-batches per step and process, so that each fits the memory."""
    tokens = tokens_that_fit(
        str(section.model),
        adapters=True,
        gradient_checkpointing=bool(section.gradient_checkpointing),
        trust_remote_code=section.trust_remote_code,
    )
    # Attention on a CPU holds a score for every pair of tokens.
    tokens = min(tokens, _tokens_in_memory(section) if torch.cuda.is_available() else CPU_TOKENS)
    size = max(1, tokens // int(sequences.lengths_S.max()))
    return micro_batches(section, schedule.smallest_batch, context.processes.count, size)


def _tokens_in_memory(section: FinetuneConfig) -> int:
    """Returns the tokens of the largest pass whose counted memory leaves a tenth of the GPU's free."""
    settings = AutoConfig.from_pretrained(section.model, trust_remote_code=section.trust_remote_code).to_dict()
    try:
        shape = ModelShape.from_config(settings)
    except ModelError:  # not Llama-like
        return UNKNOWN_MODEL_TOKENS
    bits = {"none": 16, "8bit": 8, "4bit": 4}[section.quantization]
    tokens = MICRO_BATCH_TOKENS
    available = 0.9 * torch.cuda.get_device_properties(0).total_memory
    while tokens > LEAST_TOKENS:
        parts = training_memory(
            shape,
            tokens_per_pass=tokens,
            lora=finetune_lora(section),
            gradient_checkpointing=bool(section.gradient_checkpointing),
            base_bits=bits,
        )
        if sum(parts.values()) < available:
            break
        tokens //= 2
    return tokens


def _describe(
    context: StageContext,
    counts: ExampleCounts,
    sequences: SequenceStore,
    schedule: EpochSchedule,
    model: TokenLossModel,
) -> None:
    """Says what is trained on what, before it takes hours."""
    section = context.config.finetune
    say = context.narrator.say
    cut = "go on after the last block" if section.packing == "blocks" else f"cut at {section.max_example_tokens:,}"
    note = f"; left out: {_listed(counts.skipped)}" if counts.skipped else ""
    say(
        f"  {counts.num_kept:,} of {counts.num_rows:,} rows, {counts.num_tokens:,} tokens, of which "
        f"{counts.num_loss_tokens:,} are learned ({counts.num_truncated:,} rows {cut}){note}"
    )
    if section.data is not None:
        say("  note: rows of it may be among the run's held-out ones, whose losses evaluate would then find too good")
    for domain_id, (name, drawn) in enumerate(_drawn_tokens(context).items()):
        if drawn and not counts.num_tokens_by_domain.get(domain_id):
            say(
                f"  WARNING: none of the {drawn:,} tokens of {name} in the mixture is trained on; where it is plain "
                "text: --set finetune.skip_plain_text=false"
            )
    say(
        f"  {sequences.num_sequences:,} sequences x {section.epochs} epochs = {schedule.num_steps:,} steps of "
        f"{schedule.smallest_batch:,}"
        + (f"; {schedule.num_left_out:,} of the last epoch stay out" if schedule.num_left_out else "")
    )
    if schedule.num_steps < FEW_STEPS:
        say(f"  note: {schedule.num_steps} steps teach little; smaller batches make more: --set finetune.batch_size=N")
    say(
        f"  {num_trainable_parameters(model):,} parameters of adapters over "
        f"{num_parameters(model) - num_trainable_parameters(model):,} frozen ones"
    )


def _drawn_tokens(context: StageContext) -> dict[str, int]:
    """Returns the tokens of each domain in the run's mixture; none where the data come from elsewhere."""
    if context.config.finetune.data is not None:
        return {}
    domains = read_json(context.run.stage_path("mixture") / "allocation.json")["domains"]
    return {name: domain["drawn_tokens"] for name, domain in domains.items()}


def _write_metrics(
    context: StageContext,
    counts: ExampleCounts,
    sequences: SequenceStore,
    schedule: EpochSchedule,
    model: TokenLossModel,
) -> None:
    write_json(
        context.folder / "metrics.json",
        {
            "examples": _describe_counts(counts, domain_names(context)),
            "num_sequences": sequences.num_sequences,
            "num_steps": schedule.num_steps,
            "num_left_out": schedule.num_left_out,
            "num_trained_parameters": num_trainable_parameters(model),
            "num_parameters": num_parameters(model),
            "num_processes": context.processes.count,
            "metrics": METRICS,
        },
    )


def _describe_counts(counts: ExampleCounts, names: tuple[str, ...]) -> dict[str, Any]:
    values = dataclasses.asdict(counts)
    tokens = values.pop("num_tokens_by_domain")
    return {**values, "tokens_by_domain": {name: tokens.get(i, 0) for i, name in enumerate(names)}}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in counts.items())

"""Stage evaluate: the main model before and after the fine-tune, by held-out loss and by benchmarks.

Writes ``metrics.json``: for every domain the loss on held-out examples of the base, of the tuned model, and their
difference; for every benchmark both scores and their ratio; and for the contest's seven tasks its score.  The scores
of single tasks lie in ``task_scores/`` of the run, by what they depend on, so that none is made twice: not of an
evaluation that was stopped, not of the base model for another fine-tune, not when another task is added.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from doremi_mix.adapters import adapters_disabled, base_fingerprint
from doremi_mix.atomic import write_json
from doremi_mix.baichuan.tokenizer import load_hf_tokenizer
from doremi_mix.benchmarks import (
    CONTEST_TASKS,
    ContestScore,
    TaskScore,
    contest_score,
    final_score,
    published_base,
    summarize_scores,
)
from doremi_mix.engine import EngineSettings, has_bf16, make_accelerator, prepare_to_score
from doremi_mix.errors import DataError
from doremi_mix.evaluation import score_sequences, summarize_losses
from doremi_mix.finetune_data import ExampleStore, SequenceStore, remove_examples, write_examples
from doremi_mix.fingerprints import evaluate_settings, rows_stage, tokenizer_contents
from doremi_mix.models import TokenLossModel, load_trained
from doremi_mix.objectives import MicroBatch
from doremi_mix.run import fingerprint, read_json
from doremi_mix.stages import StageContext
from doremi_mix.stages.load import read_examples_at
from doremi_mix.stages.tokenize import make_template
from doremi_mix.stages.training import make_scorer, number_or_none, open_store
from doremi_mix.tokenizer import load_tokenizer
from doremi_mix.types import Example

if TYPE_CHECKING:
    from doremi_mix.harness import LoadedTask

HELD_OUT = "held_out"
TASK_SCORES = "task_scores"
"""Of the run directory: scores of tasks, which outlive changed settings."""
SCORE_BATCH = 4
"""Held-out examples in a forward pass; they are short, and a whole domain takes seconds."""
ROUNDS = {"preliminary": "task_folder", "semi_final": "semi_final_task_folder"}
"""The contest's two sets of items, and the setting that names the folder of each."""


def run(context: StageContext) -> str:
    """Scores base and tuned model; returns one line about them."""
    section, finetune = context.config.evaluate, context.config.finetune
    # Everything that can fail before a large model is loaded.
    tasks = _load_tasks(context)
    tokenizer = load_hf_tokenizer(str(finetune.tokenizer or finetune.model)) if tasks else None
    held_out = _held_out(context) if section.held_out_examples else None
    accelerator = make_accelerator()
    model = load_trained(
        context.run.stage_path("finetune") / "adapter",
        trust_remote_code=finetune.trust_remote_code,
        adapter="adapter",
        base=finetune.model,
        base_dtype=torch.bfloat16 if has_bf16() else None,
        quantization=finetune.quantization,
    )
    model = prepare_to_score(model, EngineSettings(), accelerator, alone=True)
    losses = {} if held_out is None else _held_out_losses(context, model, accelerator, *held_out)
    scores = _benchmarks(context, model, tokenizer, accelerator, tasks)
    metrics: dict[str, Any] = {
        "trained_on": finetune.data or "mixture",
        "held_out_loss": losses,
        "held_out_loss_average": _average(losses),
        "tasks": {name: _describe_tasks(context, of_round) for name, of_round in tasks.items()},
        "benchmarks": {name: summarize_scores(*pair) for name, pair in scores.items()},
        "final": _final(scores),
    }
    write_json(context.folder / "metrics.json", metrics)
    remove_examples(context.folder / HELD_OUT)
    return _line(metrics)


def _line(metrics: Mapping[str, Any]) -> str:
    parts = []
    if metrics["held_out_loss_average"]:
        average = metrics["held_out_loss_average"]
        parts.append(
            f"held-out loss {average['base']:.3f} -> {average['tuned']:.3f} nats per token, average over domains"
        )
    for name, scores in metrics["benchmarks"].items():
        if scores["contest"]:
            parts.append(f"{name.replace('_', '-')} score {scores['contest']['mean_ratio']:.3f}")
    if metrics["final"]:
        parts.append(f"final score {metrics['final']['score']:.3f}")
    return "; ".join(parts) or f"{sum(len(s['tasks']) for s in metrics['benchmarks'].values())} tasks scored"


def _load_tasks(context: StageContext) -> dict[str, dict[str, LoadedTask]]:
    """Reads the items of every task, by the contest's round."""
    section = context.config.evaluate
    if not section.tasks:
        return {}
    from doremi_mix.harness import check_task, choose_shots, load_tasks

    names = [task.name for task in CONTEST_TASKS] if section.tasks == ("contest",) else list(section.tasks)
    rounds = {}
    for name, key in ROUNDS.items():
        folder = getattr(section, key)
        if name == "preliminary" or folder is not None:
            context.narrator.say(f"  reading the items of {len(names)} tasks")
            rounds[name] = load_tasks(names, None if folder is None else Path(folder))
            for task in rounds[name].values():
                check_task(task, choose_shots(task.name, section.num_fewshot))
    return rounds


def _describe_tasks(context: StageContext, tasks: Mapping[str, LoadedTask]) -> dict[str, Any]:
    """Returns where each task is defined, and the worked examples asked for (None: as its definition has it)."""
    from doremi_mix.harness import choose_shots

    setting = context.config.evaluate.num_fewshot
    return {name: {"source": task.source, "num_fewshot": choose_shots(name, setting)} for name, task in tasks.items()}


def _benchmarks(
    context: StageContext,
    model: TokenLossModel,
    tokenizer: Any,
    accelerator: Any,
    rounds: Mapping[str, Mapping[str, LoadedTask]],
) -> dict[str, tuple[dict[str, TaskScore], dict[str, TaskScore]]]:
    """Returns the scores of base and tuned model by round and task."""
    if not rounds:
        return {}
    from doremi_mix.harness import choose_shots, count_requests, run_task, wrap_model

    section = context.config.evaluate
    # lm-eval calls the model itself, and tells it nothing of documents.
    model.attention = "sdpa"
    wrapped = wrap_model(
        model.model,
        tokenizer,
        max_length=section.max_length,
        batch_size=section.batch_size,
        autocast_dtype=torch.bfloat16 if accelerator.mixed_precision == "bf16" else None,
    )

    def score(path: Path, task: LoadedTask, label: str) -> TaskScore:
        if path.exists():
            return TaskScore.from_dict(read_json(path))
        with context.narrator.track(label, count_requests(task, section.limit), "answers") as tracker:
            scored = run_task(
                task,
                wrapped,
                num_fewshot=choose_shots(task.name, section.num_fewshot),
                limit=section.limit,
                seed=section.seed,
                advance=tracker.advance,
            )
        path.parent.mkdir(exist_ok=True)
        write_json(path, scored.to_dict())
        context.narrator.say(f"  {label}: {scored.value:.1f} % of {scored.num_items:,} items")
        return scored

    results: dict[str, tuple[dict[str, TaskScore], dict[str, TaskScore]]] = {}
    for name, tasks in rounds.items():
        by_model: list[dict[str, TaskScore]] = []
        for whose in ("base", "tuned"):
            if whose == "base" and section.base_scores == "published":
                by_model.append(published_base())
                continue
            with adapters_disabled(model.model) if whose == "base" else contextlib.nullcontext():
                by_model.append(
                    {
                        task_name: score(_score_path(context, name, whose, task_name), task, f"{task_name} {whose}")
                        for task_name, task in tasks.items()
                    }
                )
        results[name] = (by_model[0], by_model[1])
    return results


def _score_path(context: StageContext, round_: str, whose: str, task: str) -> Path:
    """Returns where the score of a task is kept.

    Args:
        context: of the stage.
        round_: of the contest.
        whose: base or tuned.
        task: its name.
    """
    from doremi_mix.harness import choose_shots

    finetune = context.config.finetune
    assert finetune.model is not None
    settings = evaluate_settings(context.config)
    manifest = context.run.manifest("finetune")
    key = {name: settings[name] for name in ("limit", "max_length", "seed", "lm_eval")} | {
        "model": base_fingerprint(finetune.model) or finetune.model,
        "adapter": manifest["fingerprint"] if manifest and whose == "tuned" else None,
        "tokenizer": tokenizer_contents(finetune.tokenizer or finetune.model),
        "quantization": finetune.quantization,
        "bf16": has_bf16(),
        "tasks": settings[ROUNDS[round_]],
        "num_fewshot": choose_shots(task, context.config.evaluate.num_fewshot),
    }
    return context.run.path / TASK_SCORES / f"{task}-{whose}-{fingerprint(key)[:16]}.json"


def _final(
    scores: Mapping[str, tuple[Mapping[str, TaskScore], Mapping[str, TaskScore]]],
) -> dict[str, float | None] | None:
    """Returns the contest's final score where both of its rounds have one."""
    if set(scores) != set(ROUNDS):
        return None
    rounds: list[ContestScore] = []
    for name in ROUNDS:
        try:
            rounds.append(contest_score(*scores[name]))
        except DataError:
            return None
    final = final_score(*rounds)
    return {"score": final.value, "standard_error": final.standard_error}


def _held_out_losses(
    context: StageContext,
    model: TokenLossModel,
    accelerator: Any,
    names: Sequence[str],
    domain_ids: NDArray[np.int64],
    sequences: SequenceStore,
) -> dict[str, Any]:
    """Returns by domain the loss of base and tuned model on held-out examples, and the difference (tuned - base)."""
    with context.narrator.track("held-out loss", 2 * len(domain_ids), "examples") as tracker:

        def read(ids: NDArray[np.int64]) -> MicroBatch:
            tracker.advance(len(ids))
            return {name: torch.from_numpy(array) for name, array in sequences.batch(ids).items()}

        score = make_scorer(model, accelerator, read)
        ids = np.arange(len(domain_ids))
        tuned_N2 = score_sequences(ids, score, SCORE_BATCH)
        with adapters_disabled(model.model):
            base_N2 = score_sequences(ids, score, SCORE_BATCH)
    result = {}
    for domain_id, name in enumerate(names):
        mine = domain_ids == domain_id
        if mine.any():
            count = base_N2[mine, 1]
            base, tuned = (summarize_losses(scores_N2[mine, 0], count) for scores_N2 in (base_N2, tuned_N2))
            # Both saw the same examples: what makes some harder than others drops out of the difference.
            difference = summarize_losses(tuned_N2[mine, 0] - base_N2[mine, 0], count)
            result[name] = {
                "base": base.loss,
                "tuned": tuned.loss,
                "difference": difference.loss,
                "standard_error": number_or_none(difference.standard_error),
                "base_standard_error": number_or_none(base.standard_error),
                "tuned_standard_error": number_or_none(tuned.standard_error),
                "num_examples": base.num_sequences,
                "num_tokens": base.num_tokens,
            }
    return result


def _average(losses: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None] | None:
    """Returns the averages over domains, and the standard error of the average difference."""
    if not losses:
        return None
    rows = list(losses.values())
    errors = [row["standard_error"] for row in rows if row["standard_error"] is not None]
    return {
        **{key: math.fsum(row[key] for row in rows) / len(rows) for key in ("base", "tuned", "difference")},
        "standard_error": math.hypot(*errors) / len(rows) if len(errors) == len(rows) else None,
    }


def _held_out(context: StageContext) -> tuple[tuple[str, ...], NDArray[np.int64], SequenceStore] | None:
    """Encodes held-out examples of every domain for the main model; returns the domains, domain ids, and sequences."""
    finetune, section = context.config.finetune, context.config.evaluate
    assert finetune.model and finetune.max_example_tokens
    store = open_store(context.run)
    rows_folder = context.run.stage_path(rows_stage(context.config))
    tokenizer = load_tokenizer(finetune.tokenizer or finetune.model, trust_remote_code=finetune.trust_remote_code)
    if not store.example_held_out[:].any():
        context.narrator.say("  no domain has held-out examples to measure a loss on")
        return None

    def batches() -> Iterator[tuple[list[Example], list[int]]]:
        for domain_id, name in enumerate(store.domains):
            documents = store.document_ids(domain_id)
            rows = np.flatnonzero(store.example_held_out[documents.start : documents.stop])
            order = np.random.default_rng([section.seed, domain_id]).permutation(len(rows))
            chosen = np.sort(rows[order[: section.held_out_examples]])
            for examples in read_examples_at(rows_folder, name, chosen):
                yield examples, [domain_id] * len(examples)

    folder = context.folder / HELD_OUT
    folder.mkdir(exist_ok=True)
    write_examples(
        batches(),
        folder,
        tokenizer,
        make_template(context.config.tokenize),
        max_example_tokens=finetune.max_example_tokens,
        token_budget=None,
        skip_empty_query=False,
    )
    examples = ExampleStore(folder)
    sequences = SequenceStore(examples, packing="none", max_tokens=finetune.max_example_tokens)
    return store.domains.names, np.asarray(examples.domain_ids_E), sequences

"""Stage export: the weights that the mixture is drawn with, for other programs.

Writes ``<format>/`` for each of ``export.formats``, with ``<format>.expected.json`` beside the files; ``exports.json``,
the list of what was written and how it is used; and with ``export.data`` the rows to train on, ``data/<domain>.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doremi_mix.atomic import write_json
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ConfigError
from doremi_mix.export_files import ExportOptions, format_named, plan_for, write_export
from doremi_mix.export_inputs import read_paths
from doremi_mix.exporters import facts
from doremi_mix.fingerprints import rows_stage
from doremi_mix.run import read_json
from doremi_mix.stages import StageContext
from doremi_mix.stages.load import read_examples_at, read_summary
from doremi_mix.stages.mixture import chosen_weights
from doremi_mix.stages.training import open_store
from doremi_mix.stages.weights import corpus_of, read_weights
from doremi_mix.store import TokenStore
from doremi_mix.types import Example

EXPORTS = "exports.json"
DATA = "data"
WINDOW = 100_000
"""Rows that are shuffled in memory at a time."""


def run(context: StageContext) -> str:
    """Writes every format that is asked for; returns one line."""
    settings, mixture = context.config.export, context.config.mixture
    if not settings.formats:
        raise ConfigError(
            "export.formats is empty; name some, for example: --set export.formats=[trl,megatron] (all of them: "
            "doremi-mix export --list)"
        )
    store = open_store(context.run)
    weights = _weights(context, store)
    if settings.data:
        weights = _with_data(context, store, weights)
        context.narrator.say("  rows have instruction, input, output, system, and messages, which alone have all turns")
    else:
        _say_other_schemas(context)
    options = ExportOptions(
        budget=mixture.token_budget,
        max_epochs=mixture.max_epochs,
        paths=read_paths(settings.paths) if settings.paths is not None else None,
        seed=settings.seed,
    )
    formats = {}
    said: set[str] = set()
    for name in settings.formats:
        row = format_named(name)
        plan = plan_for(row, weights, options)
        (context.folder / name).mkdir()
        export, paths = write_export(row, plan, context.folder / name, folder=True)
        formats[name] = {"files": [str(path.relative_to(context.folder)) for path in paths], "usage": export.usage}
        for fact in facts(plan, export):
            if fact not in said:
                context.narrator.say(f"  {name}: {fact}")
            said.add(fact)
    # Files name each other by where they are now.
    place = str(context.run.stage_path("export").absolute()) if settings.data else None
    write_json(context.folder / EXPORTS, {"place": place, "formats": formats})
    return f"{', '.join(settings.formats)} in {context.run.stage_path('export')}"


def _weights(context: StageContext, store: TokenStore) -> DomainWeights:
    """Returns the weights that the mixture is drawn with, with what there is of each domain."""
    chosen = dict(chosen_weights(context, store))
    corpus = corpus_of(context.run, store)
    wanted = context.config.mixture.weights
    if wanted == "learned":
        return replace(read_weights(context.run), corpus=corpus)
    results = context.run.stage_path("compare") / "results.json"
    compared = read_json(results) if results.exists() else None
    if compared and wanted == "best":
        wanted = f"best, which is {compared['best']}"
    sentence = f"these are not the learned weights, but mixture.weights={wanted}"
    if compared:
        sentence += f"; what was found of the mixtures that were compared: {compared['verdict']}"
    return DomainWeights(
        chosen,
        dict.fromkeys(chosen, 1 / len(chosen)),
        method=wanted,
        corpus=corpus,
        verdict={"kind": "other", "sentence": sentence, "best": ""},
    )


def _say_other_schemas(context: StageContext) -> None:
    """Says which sources are not in Alpaca's columns, which most programs are told to expect."""
    others = [
        f"{domain['domain']} ({domain['schema']})"
        for domain in read_summary(context.run.stage_path("load"))
        if domain["schema"] != "alpaca (instruction, input, output)"
    ]
    if others:
        context.narrator.say(
            f"  not every source has instruction, input and output: {', '.join(others)}; with --set export.data=true "
            "the rows are written anew, with these and with messages"
        )


def _with_data(context: StageContext, store: TokenStore, weights: DomainWeights) -> DomainWeights:
    """Writes the rows to train on, and returns weights whose corpus is these files."""
    rows_folder = context.run.stage_path(rows_stage(context.config))
    folder = context.folder / DATA
    folder.mkdir()
    corpus = {}
    total = sum(statistics.num_examples for statistics in weights.corpus.values())
    with context.narrator.track("export", total, "rows") as tracker:
        for domain_id, name in enumerate(store.domains):
            documents = store.document_ids(domain_id)
            rows_N = np.flatnonzero(~np.asarray(store.example_held_out[documents.start : documents.stop]))
            # Some programs take the first rows, in their order.
            rows_N = np.random.default_rng([context.config.export.seed, domain_id]).permutation(rows_N)
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                for start in range(0, len(rows_N), WINDOW):
                    window = rows_N[start : start + WINDOW]
                    file.writelines(_lines(rows_folder, name, window))
                    tracker.advance(len(window))
            path = context.run.stage_path("export") / DATA / f"{name}.jsonl"
            corpus[name] = replace(weights.corpus[name], path=str(path.absolute()), num_rows=len(rows_N))
    return replace(weights, corpus=corpus)


def _lines(rows_folder: Path, name: str, rows_W: NDArray[np.int64]) -> list[str]:
    """Returns rows of a domain as lines of JSON, in the order asked for."""
    order_W = np.argsort(rows_W)
    lines = [""] * len(rows_W)
    read = (example for chunk in read_examples_at(rows_folder, name, rows_W[order_W]) for example in chunk)
    for place, example in zip(order_W.tolist(), read, strict=True):
        lines[place] = json.dumps(as_row(example), ensure_ascii=False) + "\n"
    return lines


def as_row(example: Example) -> Mapping[str, Any]:
    """Returns an example with the keys that programs look for: Alpaca's, and messages.

    Every row has the same keys with values of the same types, so that files of several domains can be read as one.
    Only messages have the earlier turns of a conversation.  Plain text is an answer to nothing.
    """
    question = "\n".join(text for text in (example.instruction, example.input) if text)
    system = [{"role": "system", "content": example.system}] if example.system else []
    turns = [*example.history, (question, example.output)]
    said = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    return {
        "instruction": example.instruction or "",
        "input": example.input,
        "output": example.output,
        "system": example.system,
        "messages": [*system, *said],
        "domain": example.domain,
    }

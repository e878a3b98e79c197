"""Stage export: the weights that the mixture is drawn with, for other programs.

Writes ``<format>/`` for each of ``export.formats``, with ``expected.json`` beside the files; ``exports.json``, the list
of what was written and how it is used; and with ``export.data`` the rows to train on, ``data/<domain>.jsonl``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from doremi_mix.atomic import write_json
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ConfigError
from doremi_mix.export_files import ExportOptions, format_named, plan_for, read_paths, write_export
from doremi_mix.fingerprints import rows_stage
from doremi_mix.stages import StageContext
from doremi_mix.stages.load import read_rows
from doremi_mix.stages.mixture import chosen_weights
from doremi_mix.stages.training import open_store
from doremi_mix.stages.weights import corpus_of, read_weights
from doremi_mix.store import TokenStore

EXPORTS = "exports.json"
DATA = "data"


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
    options = ExportOptions(
        budget=mixture.token_budget,
        max_epochs=mixture.max_epochs,
        paths=read_paths(settings.paths) if settings.paths is not None else None,
        seed=settings.seed,
    )
    written = {}
    for name in settings.formats:
        row = format_named(name)
        plan = plan_for(row, weights, options)
        (context.folder / name).mkdir()
        export, paths = write_export(row, plan, context.folder / name, folder=True)
        written[name] = {"files": [str(path.relative_to(context.folder)) for path in paths], "usage": export.usage}
        for note in export.notes:
            context.narrator.say(f"  {name}: {note}")
    write_json(context.folder / EXPORTS, written)
    return f"{', '.join(settings.formats)} in {context.run.stage_path('export')}"


def _weights(context: StageContext, store: TokenStore) -> DomainWeights:
    """Returns the weights that the mixture is drawn with, with what there is of each domain."""
    chosen = dict(chosen_weights(context, store))
    corpus = corpus_of(context.run, store)
    if context.config.mixture.weights == "learned":
        return replace(read_weights(context.run), corpus=corpus)
    return DomainWeights(
        chosen, dict.fromkeys(chosen, 1 / len(chosen)), method=context.config.mixture.weights, corpus=corpus
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
            kept_N = ~np.asarray(store.example_held_out[documents.start : documents.stop])
            _write_rows(folder / f"{name}.jsonl", rows_folder, name, kept_N)
            tracker.advance(int(kept_N.sum()))
            path = context.run.stage_path("export") / DATA / f"{name}.jsonl"
            corpus[name] = replace(weights.corpus[name], path=str(path.absolute()), num_rows=int(kept_N.sum()))
    return replace(weights, corpus=corpus)


def _write_rows(path: Path, rows_folder: Path, name: str, kept_N: np.ndarray) -> None:
    """Writes those rows of a domain that are marked, one line of JSON each."""
    first = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for texts in read_rows(rows_folder, name):
            kept = kept_N[first : first + len(texts)]
            file.writelines(f"{text}\n" for text, wanted in zip(texts, kept, strict=True) if wanted)
            first += len(texts)

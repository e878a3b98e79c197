"""LLaMA-Factory: counts in ``dataset_info.json``, probabilities in the training YAML, or the YAML of its v1 stack.

Several programs look a file up first, and then have the datasets library read it: their rules for paths are here too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from doremi_mix.errors import ExportError
from doremi_mix.exporters.counts import not_reached, of_counts, passes
from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.paths import check_paths
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".arrow")
_RUN = "stage=sft do_train=true model_name_or_path=MODEL template=TEMPLATE output_dir=OUT"
_USAGE = f"llamafactory-cli train llama_factory.yaml {_RUN}"
_PASSES = ("A domain of which more is drawn than it has is listed once for each pass over it.",)
_COLUMNS = "Rows are taken to have instruction, input and output; for others set formatting and columns in"


def _write_counts(plan: ExportPlan) -> Export:
    counts = plan.counts()
    _check(plan, counts)
    parts = passes(plan, counts)
    entries = {key: {**_entry(domain), "num_samples": rows} for key, (domain, rows) in parts.items()}
    return Export(
        _files(entries, {"mix_strategy": "concat"}),
        of_counts(counts),
        _USAGE,
        num_drawn=sum(counts.values()),
        notes=(
            *_PASSES,
            "num_samples does nothing with streaming: true, and max_samples cuts each domain: leave both out.",
            *_BESIDE,
            *not_reached(plan, counts),
        ),
    )


def _write_probabilities(plan: ExportPlan) -> Export:
    shares = plan.example_shares()
    _check(plan, shares)
    mixing = {"mix_strategy": "interleave_under", "interleave_probs": list(shares.values())}
    return Export(
        _files({name: _entry(plan.named(name)) for name in shares}, mixing),
        shares,
        _USAGE,
        notes=(
            "Rows are drawn at random by these shares until one domain has come once: no row comes twice, and a budget "
            "changes the shares only. For a size of your own: --format llama-factory.",
            *_BESIDE,
        ),
    )


_BESIDE = (
    f"{_COLUMNS} dataset_info.json.",
    "Run it in the folder of dataset_info.json, or set dataset_dir to that folder: file names are relative to it.",
)


def _check(plan: ExportPlan, names: Iterable[str]) -> None:
    names = list(names)
    check_paths(plan, names, _SUFFIXES)
    for name in names:
        if "${" in name:
            raise ExportError(
                f'domain {name!r}: its name holds "${{", for which its configs put in another value; rename it'
            )


def _entry(domain: PlannedDomain) -> dict[str, Any]:
    return {"file_name": domain.path, "formatting": "alpaca"}


def _files(entries: Mapping[str, Any], mixing: Mapping[str, Any]) -> tuple[ExportedFile, ...]:
    """Returns the training YAML and the description of the datasets.

    The YAML has lists, of which nothing is split at commas, and the JSON no character outside of ASCII, because it is
    read in the encoding of the machine.
    """
    training = {"dataset_dir": ".", "dataset": list(entries), **mixing, "streaming": False}
    return (
        ExportedFile("llama_factory.yaml", yaml_text(training)),
        ExportedFile("dataset_info.json", json.dumps(entries, indent=2) + "\n", comment=None),
    )


def _write_v1(plan: ExportPlan) -> Export:
    counts = plan.counts()
    _check(plan, counts)
    entries = {key: _entry_v1(domain, rows) for key, (domain, rows) in passes(plan, counts).items()}
    return Export(
        (ExportedFile("llama_factory_v1.yaml", yaml_text(entries)),),
        of_counts(counts),
        "USE_V1=1 llamafactory-cli sft TRAINING.yaml train_dataset=llama_factory_v1.yaml",
        num_drawn=sum(counts.values()),
        notes=(
            *_PASSES,
            "Entries without size are drawn whole, those with it at random with repeats; without repeats: --format "
            "llama-factory.",
            "Rows are taken to have instruction, input and output; for others set converter. Keep the suffix .yaml.",
            *not_reached(plan, counts),
        ),
    )


def _entry_v1(domain: PlannedDomain, count: int) -> dict[str, Any]:
    entry = {"path": domain.path, "source": "local", "converter": "alpaca"}
    return entry if count == domain.file_examples else {**entry, "size": count}


FORMATS = (
    Format(
        name="llama-factory",
        consumer="llama-factory",
        title="LLaMA-Factory (num_samples in dataset_info.json)",
        unit="examples",
        meaning="count",
        oversamples="up to the epoch cap: a domain is listed once for each pass",
        write=_write_counts,
        needs_budget=True,
    ),
    Format(
        name="llama-factory-probabilities",
        consumer="llama-factory",
        title="LLaMA-Factory (interleave_probs)",
        unit="examples",
        meaning="share",
        oversamples="never: it stops when one domain has come once",
        write=_write_probabilities,
    ),
    Format(
        name="llama-factory-v1",
        consumer="llama-factory",
        title="LLaMA-Factory with USE_V1=1 (size in the YAML of datasets)",
        unit="examples",
        meaning="count",
        oversamples="up to the epoch cap: whole passes, and the rest with replacement",
        write=_write_v1,
        needs_budget=True,
    ),
)

"""LLaMA-Factory: counts in ``dataset_info.json``, probabilities in the training YAML, or the YAML of its v1 stack.

Several programs look a file up first, and then have the datasets library read it: their rules for paths are here too.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from doremi_mix.errors import ExportError
from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.huggingface import builder_of, check_files_differ, not_reached, of_counts
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".arrow")
_RUN = "stage=sft do_train=true model_name_or_path=MODEL template=TEMPLATE output_dir=OUT"
_USAGE = f"llamafactory-cli train llama_factory.yaml {_RUN}"
_PASSES = ("A domain of which more is drawn than it has is listed once for each pass over it.",)
_COLUMNS = "Rows are taken to have instruction, input and output; for others set formatting and columns in"


def check_paths(plan: ExportPlan, names: Iterable[str], suffixes: Collection[str]) -> None:
    """Raises unless the datasets library reads from each path the one file that is found there.

    Args:
        plan: what is to be drawn.
        names: of the domains that are written.
        suffixes: by which the program knows the kind of a file, as they must be spelled.

    Raises:
        ExportError: names the domain and its path.
    """
    check_files_differ(plan)
    for domain in map(plan.named, names):
        builder_of(domain)
        # The program asks whether the file exists, so that the pattern cannot be escaped.
        if any(character in domain.path for character in "*?["):
            raise ExportError(
                f"domain {domain.name!r}: its path {domain.path!r} holds *, ? or [, with which the datasets library "
                f"reads all files that match; give other paths: --paths"
            )
        if posixpath.splitext(domain.path)[1] not in suffixes:
            raise ExportError(
                f"domain {domain.name!r}: its path {domain.path!r} does not end in {' or '.join(suffixes)}, by which "
                f"the kind of a file is known; give other paths: --paths"
            )


def check_arguments(plan: ExportPlan, names: Iterable[str]) -> None:
    """Raises when a path would be taken for an option of a command line.

    Raises:
        ExportError: names the domain and its path.
    """
    for domain in map(plan.named, names):
        if domain.path.startswith("-"):
            raise ExportError(
                f'domain {domain.name!r}: its path {domain.path!r} starts with "-", as options do; give other paths, '
                f"with ./ in front: --paths"
            )


def passes(plan: ExportPlan, counts: Mapping[str, int]) -> dict[str, tuple[PlannedDomain, int]]:
    """Divides what is drawn of a domain into passes over it, for programs that would repeat rows at random.

    Args:
        plan: what is to be drawn.
        counts: examples to draw, by domain.

    Returns:
        By a name of their own, the domain of each pass and the rows to draw in it: all but the last are whole. A domain
        of unknown size has one.
    """
    parts: dict[str, tuple[PlannedDomain, int]] = {}
    for name, count in counts.items():
        domain = plan.named(name)
        size = domain.file_examples or count
        for number, start in enumerate(range(0, count, size), 1):
            key = name if number == 1 else f"{name} pass {number}"
            while number > 1 and (key in counts or key in parts):
                key += "+"
            parts[key] = domain, min(size, count - start)
    return parts


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

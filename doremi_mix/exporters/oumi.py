"""Oumi: ``data: train: datasets:`` of a training config.

With a budget each entry has its ``sample_count``, drawn exactly, with repeats where the file has fewer rows; otherwise
its ``mixture_proportion``.
"""

from __future__ import annotations

import posixpath
from typing import Any

from doremi_mix.errors import ExportError
from doremi_mix.exporters.counts import not_reached, of_counts, planned_counts
from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.paths import check_different_paths
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

_USAGE = "oumi train -c oumi.yaml --model.model_name MODEL"
_KINDS = (
    "The file is the data: of a training config; add the rest of yours to it.",
    "text_sft reads rows with messages, or with instruction, input and output; for other rows change dataset_name.",
)


def _write(plan: ExportPlan) -> Export:
    check_different_paths(plan)
    counts = planned_counts(plan)
    if counts is not None:
        entries = [{**_entry(plan, plan.named(name)), "sample_count": count} for name, count in counts.items()]
        return Export(
            _files({"datasets": entries, "seed": plan.seed}),
            of_counts(counts),
            _USAGE,
            num_drawn=sum(counts.values()),
            notes=(*_KINDS, *not_reached(plan, counts)),
            meaning="count",
        )
    shares = plan.example_shares()
    entries = [{**_entry(plan, domain), "mixture_proportion": shares[domain.name]} for domain in plan.domains]
    return Export(
        _files({"datasets": entries, "mixture_strategy": "first_exhausted", "seed": plan.seed}),
        shares,
        _USAGE,
        notes=(
            "Rows are drawn at random by these shares, and drawing ends when one domain has come once; for a size of "
            "your own, with repeats: --budget.",
            *_KINDS,
        ),
    )


def _entry(plan: ExportPlan, domain: PlannedDomain) -> dict[str, Any]:
    """Returns the dataset without its amount.

    Raises:
        ExportError: Oumi would read another path.
    """
    path = domain.path
    if posixpath.splitext(path)[1].lower() not in {".jsonl", ".json"}:
        raise ExportError(
            f"domain {domain.name!r}: its path {path!r} does not end in .jsonl or .json, the only files that "
            f"text_sft reads; give other paths: --paths"
        )
    if "${" in path:
        raise ExportError(
            f'domain {domain.name!r}: its path {path!r} holds "${{", which its configs take for a reference, or '
            f"cannot parse in double quotes; give other paths: --paths"
        )
    return {"dataset_name": "text_sft", "dataset_path": path, "split": "train", "shuffle": True, "seed": plan.seed}


def _files(train: dict[str, Any]) -> tuple[ExportedFile, ...]:
    return (ExportedFile("oumi.yaml", yaml_text({"data": {"train": {**train, "stream": False}}})),)


FORMATS = (
    Format(
        name="oumi",
        consumer="oumi",
        title="Oumi (data: train: of a training config)",
        unit="examples",
        meaning="share",
        oversamples="with a budget, up to the epoch cap; without one, never",
        write=_write,
    ),
)

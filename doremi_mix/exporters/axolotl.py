"""Axolotl: ``datasets:`` of a config, each with the ``weight`` that is the part of its own rows to draw.

A weight is at most 1 and no row of an entry is repeated, so that a domain is listed once for each pass over it.
"""

from __future__ import annotations

from typing import Any

from doremi_mix.exporters.counts import fraction_for, not_reached, of_counts, passes
from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.paths import builder_of, check_paths
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

_PLAIN = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".arrow")


def _write(plan: ExportPlan) -> Export:
    sizes = {domain.name: domain.file_examples or 1 for domain in plan.domains}
    counts = {name: int(part * sizes[name]) for name, part in plan.multipliers().items()}
    check_paths(plan, counts, (*_PLAIN, ".gz", ".zst"))
    entries = [
        {**_entry(domain), "weight": fraction_for(rows, sizes[domain.name])}
        for domain, rows in passes(plan, counts).values()
    ]
    config = {"datasets": entries, "shuffle_merged_datasets": True, "seed": plan.seed}
    return Export(
        (ExportedFile("axolotl.yaml", yaml_text(config)),),
        of_counts(counts),
        "add the keys of axolotl.yaml to your config; then: axolotl preprocess CONFIG.yaml",
        num_drawn=sum(counts.values()),
        notes=(
            "Needs axolotl 0.20 or newer: older ones ignore weight without a word, and draw every entry whole.",
            "A domain of which more is drawn than it has is listed once for each pass over it: leave "
            "dataset_exact_deduplication out.",
            "Rows are taken to have instruction, input and output; for others set type. Leave streaming out, with "
            "which weight does nothing.",
            *not_reached(plan, counts),
        ),
    )


def _entry(domain: PlannedDomain) -> dict[str, Any]:
    # Without ds_type it looks for ".csv" and the like anywhere in the path.
    return {"path": domain.path, "ds_type": builder_of(domain), "type": "alpaca"}


FORMATS = (
    Format(
        name="axolotl",
        consumer="axolotl",
        title="axolotl (weight of each dataset)",
        unit="examples",
        meaning="multiplier",
        oversamples="up to the epoch cap: a domain is listed once for each pass",
        write=_write,
        needs_budget=True,
    ),
)

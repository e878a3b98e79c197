"""Axolotl: ``datasets:`` of a config, each with the ``weight`` that is the part of its own rows to draw.

A weight is at most 1 and no row of an entry is repeated, so that a domain is listed once for each pass over it.
"""

from __future__ import annotations

import math
from typing import Any

from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.huggingface import builder_of, not_reached, of_counts
from doremi_mix.exporters.llama_factory import check_paths, passes
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

_PLAIN = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".arrow")


def fraction_for(count: int, size: int) -> float:
    """Returns a float of which ``int(size * fraction)`` is the count: what programs do that take a part of a file.

    Example:
        >>> 29 / 100 * 100, int(100 * fraction_for(29, 100))
        (28.999999999999996, 29)
    """
    fraction = count / size
    while int(size * fraction) < count:
        fraction = math.nextafter(fraction, math.inf)
    while int(size * fraction) > count:
        fraction = math.nextafter(fraction, 0.0)
    return fraction


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

"""TRL: ``datasets:`` of the file that ``trl sft --config`` takes.

Its ``fraction`` never repeats a row, so that the smallest domain, by its share, decides how much is drawn in all.  With
a budget, rows are named by ``split`` instead: ``train[:100]`` are the first 100, and an entry may come several times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doremi_mix.exporters.counts import not_reached, of_counts, planned_counts
from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.paths import builder_of, check_different_paths, data_files
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

_USAGE = "trl sft --config trl.yaml --model_name_or_path MODEL"
_FIRST_ROWS = (
    "TRL takes the first rows of each file, in its order (shuffle files that are sorted), and trains on messages, on "
    "prompt and completion, or on text: rows must have them."
)


def _write(plan: ExportPlan) -> Export:
    check_different_paths(plan)
    builders = {domain.name: builder_of(domain) for domain in plan.domains}
    counts = planned_counts(plan)
    sizes = {domain.name: domain.file_examples or 0 for domain in plan.domains}
    if counts is not None:
        plan.multipliers()  # refuses where the sizes of the files are not known: a slice past the end gives fewer rows
        return _write_counts(plan, builders, counts)
    shares = plan.example_shares()
    entries = [{**_file(d, builders[d.name]), "split": "train", "fraction": shares[d.name]} for d in plan.domains]
    notes = [_FIRST_ROWS, "TRL draws no row twice."]
    if not all(sizes.values()):
        notes[1] += " The domain that is smallest by its share decides how many rows it draws."
        return Export(_files(entries), shares, _USAGE, notes=tuple(notes))
    drawn = rows_of_fractions(shares, sizes)
    smallest = min(shares, key=lambda name: sizes[name] / shares[name])
    notes[1] += (
        f" {smallest}, with {sizes[smallest]:,} rows, limits it to {sum(drawn.values()):,}; for more, with repeats: "
        f"--budget."
    )
    return Export(
        _files(entries),
        of_counts(drawn),
        _USAGE,
        num_drawn=sum(drawn.values()),
        notes=(*notes, *not_reached(plan, {n: c for n, c in drawn.items() if c}, "This size")),
    )


def rows_of_fractions(fractions: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns the rows that TRL keeps of each domain, in its own float arithmetic."""
    total_fraction = sum(fractions.values())
    weights = {name: fraction / total_fraction for name, fraction in fractions.items()}
    total = min(sizes[name] / weight for name, weight in weights.items())
    return {name: round(weight * total) for name, weight in weights.items()}


def _write_counts(plan: ExportPlan, builders: Mapping[str, str], counts: Mapping[str, int]) -> Export:
    entries = []
    for name, count in counts.items():
        domain = plan.named(name)
        size = domain.file_examples or 1
        passes, rest = divmod(count, size)
        # A whole pass names its rows as well: a file that has grown since must not bring more than was planned.
        for num_rows in [size] * passes + ([rest] if rest else []):
            entries.append({**_file(domain, builders[name]), "split": f"train[:{num_rows}]"})
    return Export(
        _files(entries),
        of_counts(counts),
        _USAGE,
        num_drawn=sum(counts.values()),
        notes=(
            "train[:100] are the first 100 rows, and a domain that is repeated has several entries.",
            _FIRST_ROWS,
            *not_reached(plan, counts),
        ),
        meaning="count",
    )


def _file(domain: PlannedDomain, builder: str) -> dict[str, Any]:
    return {"path": builder, "data_files": [data_files(domain.path)]}


def _files(entries: list[dict[str, Any]]) -> tuple[ExportedFile, ...]:
    # Neither slices nor fractions work on streams.
    return (ExportedFile("trl.yaml", yaml_text({"datasets": entries, "streaming": False})),)


FORMATS = (
    Format(
        name="trl",
        consumer="trl",
        title="TRL (datasets: of its config)",
        unit="examples",
        meaning="share",
        oversamples="with a budget, up to the epoch cap; without one, never",
        write=_write,
    ),
)

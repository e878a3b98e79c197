"""The datasets library of Hugging Face: a Python file that builds the mixture, or JSON with its arguments.

Programs that load files through this library (TRL, OpenRLHF) share its rules for paths, which are here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doremi_mix.exporters.counts import not_reached, of_counts, planned_counts
from doremi_mix.exporters.export import Export, ExportedFile, Format, json_text
from doremi_mix.exporters.paths import builder_of, check_different_paths, data_files
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

_COUNTS_FILE = '''"""Draws the mixture: from mixture import build; rows = build()."""

from glob import escape

import numpy
from datasets import Dataset, concatenate_datasets, load_dataset

SEED = {seed}

# The name of a domain, the kind of its file, its file, the rows that the file has at least, and the rows to draw.
DOMAINS = [
{domains}]


def build(columns: list[str] | None = None) -> Dataset:
    """Draws each domain's rows, and shuffles all. No row comes a second time before all of its domain came once.

    Give columns where the files have others in common than these, or of other types.
    """
    parts = []
    for position, (name, kind, file, num_expected, num_drawn) in enumerate(DOMAINS):
        rows = load_dataset(kind, data_files=[escape(file)], split="train")
        if len(rows) < num_expected:
            raise ValueError(f"{{name}}: {{file}} has {{len(rows)}} rows, expected at least {{num_expected}}")
        random = numpy.random.default_rng([SEED, position])
        passes = [random.permutation(len(rows)) for _ in range(-(-num_drawn // len(rows)))]
        rows = rows.select(numpy.concatenate(passes)[:num_drawn])
        parts.append(rows.select_columns(columns) if columns else rows)
    return concatenate_datasets(parts).shuffle(seed=SEED)
'''

_SHARES_FILE = '''"""Draws the mixture: from mixture import build; rows = build()."""

from glob import escape

from datasets import Dataset, interleave_datasets, load_dataset

SEED = {seed}

# The name of a domain, the kind of its file, its file, and its share of the examples. The shares sum to 1.0 exactly.
DOMAINS = [
{domains}]


def build(columns: list[str] | None = None) -> Dataset:
    """Draws rows by share until one domain has come once; no row comes twice.

    Give columns where the files have others in common than these, or of other types.
    """
    parts = []
    for _, kind, file, _ in DOMAINS:
        rows = load_dataset(kind, data_files=[escape(file)], split="train").shuffle(seed=SEED)
        parts.append(rows.select_columns(columns) if columns else rows)
    shares = [share for *_, share in DOMAINS]
    return interleave_datasets(parts, probabilities=shares, seed=SEED, stopping_strategy="first_exhausted")
'''


def _write_python(plan: ExportPlan) -> Export:
    check_different_paths(plan)
    builders = {domain.name: builder_of(domain) for domain in plan.domains}
    counts = planned_counts(plan)
    usage = "from mixture import build; rows = build()"
    if counts is None:
        shares = plan.example_shares()
        lines = [(d.name, builders[d.name], d.path, shares[d.name]) for d in plan.domains]
        text = _SHARES_FILE.format(seed=plan.seed, domains=_rows(lines))
        return Export((ExportedFile("mixture.py", text),), shares, usage, notes=_stops_at_first(plan, shares))
    domains = [plan.named(name) for name in counts]
    rows = [(d.name, builders[d.name], d.path, _num_known(d), counts[d.name]) for d in domains]
    text = _COUNTS_FILE.format(seed=plan.seed, domains=_rows(rows))
    return Export(
        (ExportedFile("mixture.py", text),),
        of_counts(counts),
        usage,
        num_drawn=sum(counts.values()),
        notes=not_reached(plan, counts),
        meaning="count",
    )


def _rows(rows: list[tuple[Any, ...]]) -> str:
    return "".join(f"    {row!r},\n" for row in rows)


def _num_known(domain: PlannedDomain) -> int:
    """Returns how many rows the file must have: fewer means that the library does not read it as we did."""
    return domain.statistics.num_examples if domain.statistics else 1


def _write_json(plan: ExportPlan) -> Export:
    check_different_paths(plan)
    builders = {domain.name: builder_of(domain) for domain in plan.domains}
    counts = planned_counts(plan)
    if counts is not None:
        plan.multipliers()  # refuses where the sizes of the files, and so the passes over them, are not known
        return _json_of_counts(plan, builders, counts)
    shares = plan.example_shares()
    mixture = {
        "format": "doremi-mix/datasets",
        "unit": "examples",
        "domains": [
            {"name": d.name, "load_dataset": _load_arguments(d, builders[d.name]), "probability": shares[d.name]}
            for d in plan.domains
        ],
        "interleave_datasets": {
            "probabilities": list(shares.values()),
            "seed": plan.seed,
            "stopping_strategy": "first_exhausted",
        },
    }
    return Export(
        (ExportedFile("mixture.json", json_text(mixture), comment=None),),
        shares,
        'mix = json.load(open("mixture.json", encoding="utf-8")); rows = interleave_datasets([load_dataset('
        '**domain["load_dataset"]) for domain in mix["domains"]], **mix["interleave_datasets"])',
        notes=(*_stops_at_first(plan, shares), _FIRST_ROWS),
    )


def _json_of_counts(plan: ExportPlan, builders: Mapping[str, str], counts: Mapping[str, int]) -> Export:
    mixture = {
        "format": "doremi-mix/datasets",
        "unit": "examples",
        "seed": plan.seed,
        "domains": [
            {
                "name": name,
                "load_dataset": _load_arguments(plan.named(name), builders[name]),
                "num_passes": -(-count // (plan.named(name).file_examples or 1)),
                "num_examples": count,
            }
            for name, count in counts.items()
        ],
    }
    return Export(
        (ExportedFile("mixture.json", json_text(mixture), comment=None),),
        of_counts(counts),
        'mix = json.load(open("mixture.json", encoding="utf-8")); rows = concatenate_datasets([load_dataset('
        '**domain["load_dataset"]).shuffle(seed=mix["seed"]).repeat(domain["num_passes"]).select(range('
        'domain["num_examples"])) for domain in mix["domains"]]).shuffle(seed=mix["seed"])',
        num_drawn=sum(counts.values()),
        notes=not_reached(plan, counts),
        meaning="count",
    )


_FIRST_ROWS = "The first rows of each file are drawn, in its order; shuffle files that are sorted."


def _load_arguments(domain: PlannedDomain, builder: str) -> dict[str, Any]:
    return {"path": builder, "data_files": [data_files(domain.path)], "split": "train"}


def _stops_at_first(plan: ExportPlan, shares: Mapping[str, float]) -> tuple[str, ...]:
    """Returns a note on where the drawing ends, with the number of rows where the sizes are known."""
    sizes = {domain.name: domain.file_examples for domain in plan.domains}
    known = {name: size for name, size in sizes.items() if size}
    note = "Rows are drawn at random by these shares, and drawing ends when one domain has come once"
    if len(known) < len(sizes):
        return (f"{note}.",)
    name = min(known, key=lambda name: known[name] / shares[name])
    about = round(known[name] / shares[name])
    return (f"{note}: {name}, after about {about:,} rows. For a size of your own, with repeats: --budget.",)


FORMATS = (
    Format(
        name="datasets",
        consumer="datasets",
        title="the datasets library (a Python file)",
        unit="examples",
        meaning="share",
        oversamples="with a budget, up to the epoch cap; without one, never",
        write=_write_python,
    ),
    Format(
        name="datasets-json",
        consumer="datasets",
        title="the datasets library (JSON arguments)",
        unit="examples",
        meaning="share",
        oversamples="with a budget, up to the epoch cap; without one, never",
        write=_write_json,
    ),
)

"""XTuner V1: a Python file with a ``DatasetConfig`` for each domain; ``sample_ratio`` multiplies its own rows."""

from __future__ import annotations

from doremi_mix.errors import ExportError
from doremi_mix.exporters.counts import fraction_for, not_reached, of_counts
from doremi_mix.exporters.export import Export, ExportedFile, Format
from doremi_mix.exporters.paths import check_different_paths
from doremi_mix.exporters.plan import ExportPlan

_HEAD = "from xtuner.v1.datasets.config import DatasetConfig\n\nDATASETS = [\n"


def _write(plan: ExportPlan) -> Export:
    check_different_paths(plan)
    lines, counts = [], {}
    for name, part in plan.multipliers().items():
        domain = plan.named(name)
        # A folder it would divide into its files, each with a part of its own, rounded down.
        if not domain.path.endswith(".jsonl"):
            raise ExportError(
                f"domain {name!r}: its path {domain.path!r} does not end in .jsonl, the only files that it reads; give "
                f"other paths: --paths"
            )
        size = domain.file_examples or 1
        counts[name] = int(part * size)
        ratio = fraction_for(counts[name], size)
        lines.append(f"    DatasetConfig(name={name!r}, anno_path={domain.path!r}, sample_ratio={ratio!r}),\n")
    return Export(
        (ExportedFile("xtuner_datasets.py", f"{_HEAD}{''.join(lines)}]\n"),),
        of_counts(counts),
        'from xtuner_datasets import DATASETS; loader = DataloaderConfig(dataset_config_list=[{"dataset": dataset, '
        '"tokenize_fn": tokenize_fn} for dataset in DATASETS])',
        num_drawn=sum(counts.values()),
        notes=(
            "A domain comes whole as often as it fits in, and the rest of the rows are drawn without repeats.",
            "It counts the rows that it can use: those that it filters out lower the numbers drawn in proportion.",
            *not_reached(plan, counts),
        ),
    )


FORMATS = (
    Format(
        name="xtuner",
        consumer="xtuner",
        title="XTuner V1 (sample_ratio of each DatasetConfig)",
        unit="examples",
        meaning="multiplier",
        oversamples="up to the epoch cap: whole passes, and the rest at random",
        write=_write,
        needs_budget=True,
    ),
)

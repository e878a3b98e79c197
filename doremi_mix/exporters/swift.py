"""ms-swift: ``--dataset path#count``, in the YAML that ``swift sft`` takes."""

from __future__ import annotations

from doremi_mix.errors import ExportError
from doremi_mix.exporters.counts import not_reached, of_counts
from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.paths import check_arguments, check_paths
from doremi_mix.exporters.plan import ExportPlan


def _write(plan: ExportPlan) -> Export:
    counts = plan.counts()
    check_paths(plan, counts, (".json", ".jsonl", ".parquet", ".csv", ".arrow"))
    check_arguments(plan, counts)
    for name in counts:
        path = plan.named(name).path
        if path != path.lstrip():
            raise ExportError(
                f"domain {name!r}: its path {path!r} starts with white space, which it strips; give others: --paths"
            )
    # The count is what follows the last "#", so that paths may hold others.
    datasets = [f"{plan.named(name).path}#{count}" for name, count in counts.items()]
    arguments = {"dataset": datasets, "dataset_shuffle": True, "data_seed": plan.seed}
    return Export(
        (ExportedFile("ms_swift.yaml", yaml_text(arguments)),),
        of_counts(counts),
        "swift sft ms_swift.yaml --model MODEL",
        num_drawn=sum(counts.values()),
        notes=(
            "The number after # counts rows: a domain with fewer comes whole as often as it fits in, and the rest is "
            "drawn without repeats.",
            "Leave streaming and split_dataset_ratio out: the first rows would be drawn, or fewer.",
            *not_reached(plan, counts),
        ),
    )


FORMATS = (
    Format(
        name="ms-swift",
        consumer="ms-swift",
        title="ms-swift (path#count)",
        unit="examples",
        meaning="count",
        oversamples="up to the epoch cap: whole passes, and the rest at random",
        write=_write,
        needs_budget=True,
    ),
)

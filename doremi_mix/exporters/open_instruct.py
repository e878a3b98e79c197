"""open-instruct: ``--dataset_mixer_list path count ...``, as a file for the shell.

An amount with a point is a part of the domain's own rows, one without is a number of rows; ``1e-05`` is neither.
"""

from __future__ import annotations

import shlex

from doremi_mix.exporters.counts import not_reached, of_counts
from doremi_mix.exporters.export import Export, ExportedFile, Format
from doremi_mix.exporters.paths import check_arguments, check_paths
from doremi_mix.exporters.plan import ExportPlan


def _write(plan: ExportPlan) -> Export:
    counts = plan.counts()
    # Any other file it takes for the name of a dataset to download.
    check_paths(plan, counts, (".jsonl", ".parquet"))
    check_arguments(plan, counts)
    lines = [f"    {shlex.quote(plan.named(name).path)} {count}\n" for name, count in counts.items()]
    text = "MIXTURE=(\n  --dataset_mixer_list\n" + "".join(lines) + "  --dataset_mixer_list_splits train\n)\n"
    return Export(
        (ExportedFile("open_instruct.sh", text),),
        of_counts(counts),
        'source open_instruct.sh; python open_instruct/finetune.py "${MIXTURE[@]}" --model_name_or_path MODEL',
        num_drawn=sum(counts.values()),
        notes=(
            "The numbers count rows: a domain with fewer comes whole as often as it fits in, and the rest is drawn "
            "without repeats. Keep them whole: 1 is one row, 1.0 is all rows.",
            "Rows are taken to have messages. The file is for bash.",
            *not_reached(plan, counts),
        ),
    )


FORMATS = (
    Format(
        name="open-instruct",
        consumer="open-instruct",
        title="open-instruct (--dataset_mixer_list)",
        unit="examples",
        meaning="count",
        oversamples="up to the epoch cap: whole passes, and the rest at random",
        write=_write,
        needs_budget=True,
    ),
)

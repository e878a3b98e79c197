"""Ray Data: a dataset of exact counts, mixed by ``Dataset.mix``.

``mix`` weighs blocks, not rows, and its default stopping condition reads every dataset to its end, so that its weights
change the order alone; the other one stops at the first dataset that runs out, a block too early or late.  So each
domain is first brought to its count, and then the default is exact.
"""

from __future__ import annotations

from doremi_mix.exporters.counts import of_counts
from doremi_mix.exporters.export import Export, ExportedFile, Format, python_dict
from doremi_mix.exporters.paths import check_different_paths, path_error
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

_PYTHON = '''\
import os

import ray
from ray.data import MixStoppingCondition

DOMAINS = {domains}


def build_dataset(seed={seed}, block_rows=64):
    """Returns the mixture; the domains alternate in blocks of at most block_rows rows."""
    parts = [take(read(domain["path"]), domain["count"], seed, block_rows) for domain in DOMAINS.values()]
    # Every part has its count already: this condition reads all of them to the end, so the counts are exact.
    weights = [domain["count"] for domain in DOMAINS.values()]
    return parts[0].mix(*parts[1:], weights=weights, stopping_condition=MixStoppingCondition.STOP_ON_LONGEST_DROP)


def read(path):
    """Reads a JSON, JSON Lines or Parquet file (or folder); no column is made of folder names like key=value."""
    path = path if "://" in path else os.path.abspath(path)
    read_any = ray.data.read_parquet if path.endswith(".parquet") else ray.data.read_json
    return read_any(path, partitioning=None)


def take(dataset, count, seed, block_rows):
    """Returns exactly count rows: whole passes, then a part drawn without replacement."""
    passes, rest = divmod(count, dataset.count())
    parts = [dataset] * passes
    if rest:
        # Stored at once: a union of shuffles that are still to run can wait for ever on few CPUs.
        parts.append(dataset.random_shuffle(seed=seed).limit(rest).materialize())
    whole = parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]
    return whole.repartition(target_num_rows_per_block=block_rows).materialize()
'''


def write_ray(plan: ExportPlan) -> Export:
    """Writes a Python file whose ``build_dataset`` returns a Ray dataset of exact counts.

    Args:
        plan: what is to be drawn; it needs a budget.

    Returns:
        The file, and the shares of the examples.

    Raises:
        ExportError: there are no counts, or a path is one that Ray would change, or two domains have the same.
    """
    counts = plan.counts()
    check_different_paths(plan)
    domains = {name: {"path": plan.named(name).path, "count": count} for name, count in counts.items()}
    for name in domains:
        _check_path(plan.named(name))
    total = sum(counts.values())
    return Export(
        files=(ExportedFile("ray_mixture.py", _PYTHON.format(domains=python_dict(domains), seed=plan.seed)),),
        expected=of_counts(counts),
        usage="from ray_mixture import build_dataset; dataset = build_dataset()",
        num_drawn=total,
        notes=(
            "It needs Ray 2.60 or later, and all files must have the same columns.",
            "Without order (the default of Ray) rows of a block stay together: shuffle them where you train, for "
            "example with iter_torch_batches(local_shuffle_buffer_size=...).",
        ),
    )


def _check_path(domain: PlannedDomain) -> None:
    if not domain.path.isprintable():
        raise path_error(domain, "has a character that cannot be printed; Ray drops some of them from paths")
    if "?" in domain.path:
        raise path_error(domain, "has ?, which Ray takes for the start of a query")
    if domain.path.endswith(";"):
        raise path_error(domain, "ends with a semicolon, which Ray drops")


FORMATS = (
    Format(
        name="ray",
        consumer="ray",
        title="Ray Data (Dataset.mix)",
        unit="examples",
        meaning="count",
        oversamples="yes: whole passes, then rows drawn without replacement",
        write=write_ray,
        needs_budget=True,
    ),
)

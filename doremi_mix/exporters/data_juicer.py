"""Data-Juicer: a configuration whose weights and ``max_sample_num`` come out as the exact counts.

Weights have no effect without ``max_sample_num``.  With it, each domain but the last gets its share rounded up, and the
last what is left, so the shares are written so that rounding up is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from doremi_mix.errors import ExportError
from doremi_mix.exporters.counts import of_counts
from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.paths import check_different_paths, path_error
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

_SLACK = 2.0**-40
"""Shares are smaller by this part, so that no rounding of float64 lifts a count; far less than one example."""


def write_data_juicer(plan: ExportPlan) -> Export:
    """Writes a configuration that reads the domains' files and samples exact counts of them.

    Args:
        plan: what is to be drawn; it needs a budget.

    Returns:
        The YAML, and the shares of the examples.

    Raises:
        ExportError: there are no counts, or a path is one that Data-Juicer would not read as it is, or two domains
            have the same, or the counts are too large for its arithmetic.
    """
    counts = plan.counts()
    check_different_paths(plan)
    total = sum(counts.values())
    weights = _weights(counts)
    configs = []
    for name in counts:
        domain = plan.named(name)
        _check_path(domain)
        configs.append({"type": "local", "path": domain.path, "weight": weights[name]})
    config = {
        "project_name": "doremi_mix",
        "dataset": {"max_sample_num": total, "configs": configs},
        "export_path": "mixture/mixture.jsonl",
        "process": [],
    }
    return Export(
        files=(ExportedFile("data_juicer.yaml", yaml_text(config)),),
        expected=of_counts(counts),
        usage="dj-process --config data_juicer.yaml --text_keys COLUMN",
        num_drawn=total,
        notes=(
            "Name a column of text that every file has as text_keys (its default is text); rows without it are dropped "
            "before any are drawn.",
            "dataset.max_sample_num belongs to the weights: without it all rows of all files are taken.",
            "The rows of a domain lie together in the output: shuffle them where you train.",
            "It needs the default executor: Data-Juicer's Ray executor takes one dataset only, and no max_sample_num.",
        ),
    )


def _weights(counts: Mapping[str, int]) -> dict[str, float]:
    """Returns shares that Data-Juicer turns into exactly these counts."""
    total = sum(counts.values())
    shares = [count / total * (1 - _SLACK) for count in counts.values()]
    # The last domain gets what the others leave, whatever its weight says, as long as it says enough.
    shares[-1] = 1.0 - sum(shares[:-1])
    if sample_numbers(shares, total) != list(counts.values()):
        raise ExportError(f"Data-Juicer's arithmetic cannot hold a total of {total:,} examples; lower --budget")
    return dict(zip(counts, shares, strict=True))


def sample_numbers(weights: Sequence[float], max_sample_num: int) -> list[int]:
    """Returns what Data-Juicer 1.6 draws: shares rounded up, in order, while the total is not reached.

    Example:
        >>> sample_numbers([0.34, 0.33, 0.33], 10)
        [4, 4, 2]
    """
    values = np.array(weights, dtype=np.float64)
    values /= np.sum(values)
    numbers: list[int] = []
    for value in values:
        numbers.append(min(int(np.ceil(max_sample_num * value)), max_sample_num - sum(numbers)))
    return numbers


def _check_path(domain: PlannedDomain) -> None:
    for sign in ("*", "?", "[", "::", "://"):
        if sign in domain.path:
            raise path_error(domain, f"has {sign}, which Data-Juicer's reader takes for a pattern or a protocol")
    if "$" in domain.path:
        raise path_error(domain, "has $, which Data-Juicer's reader takes for an environment variable")


FORMATS = (
    Format(
        name="data-juicer",
        consumer="data-juicer",
        title="Data-Juicer (dataset configuration)",
        unit="examples",
        meaning="count",
        oversamples="yes: whole passes, then rows drawn without replacement",
        write=write_data_juicer,
        needs_budget=True,
    ),
)

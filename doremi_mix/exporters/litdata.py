"""LitData (LitGPT): a combined dataset that draws an exact number of items of each domain.

``CombinedStreamingDataset(weights=...)`` is an error together with its default ``iterate_over_all=True``, and without
that it ends with the first domain that runs out, whatever the budget.  Instead each domain is subsampled (or repeated)
to its count, and all of them are read to the end.
"""

from __future__ import annotations

from doremi_mix.errors import ExportError
from doremi_mix.exporters.counts import of_counts
from doremi_mix.exporters.export import Export, ExportedFile, Format, python_dict
from doremi_mix.exporters.paths import check_different_paths, path_error
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

_PYTHON = '''\
from litdata import CombinedStreamingDataset, StreamingDataset

DOMAINS = {domains}


def build_dataset(seed={seed}, **settings):
    """Returns the mixture; settings are those of StreamingDataset, for example item_loader."""
    parts = []
    for domain in DOMAINS.values():
        whole = StreamingDataset(domain["path"], **settings)
        size = sum(end - start for start, end in whole.region_of_interest)
        fraction = subsample(domain["count"], size)
        parts.append(StreamingDataset(domain["path"], **{{"shuffle": True, **settings}}, subsample=fraction, seed=seed))
    return CombinedStreamingDataset(parts, seed=seed, iterate_over_all=True)


def subsample(count, size):
    """Returns what LitData turns into exactly count items: whole passes, then int(size * rest)."""
    passes, rest = divmod(count, size)
    return passes + (rest + 0.5) / size if rest else float(passes)
'''


def write_litdata(plan: ExportPlan) -> Export:
    """Writes a Python file whose ``build_dataset`` returns a ``CombinedStreamingDataset`` of exact counts.

    Args:
        plan: what is to be drawn; it needs a budget.

    Returns:
        The file, and the shares of the examples of an epoch.

    Raises:
        ExportError: there are no counts, or a path is one that LitData would replace, or two domains have the same.
    """
    counts = plan.counts()
    check_different_paths(plan)
    if not 0 <= plan.seed < 2**32:
        raise ExportError(f"the seed must be at least 0 and below 2**32, got {plan.seed}; give another --seed")
    domains = {name: {"path": plan.named(name).path, "count": count} for name, count in counts.items()}
    for name in domains:
        _check_path(plan.named(name))
    total = sum(counts.values())
    return Export(
        files=(ExportedFile("litdata_mixture.py", _PYTHON.format(domains=python_dict(domains), seed=plan.seed)),),
        expected=of_counts(counts),
        usage="from litdata_mixture import build_dataset; loader = litdata.StreamingDataLoader(build_dataset())",
        num_drawn=total,
        notes=(
            "Each path is a folder that litdata.optimize wrote, with one item for each example of the domain.",
            "A part of a domain is whole chunks in shuffled order, so let optimize write many chunks of shuffled rows.",
            "With several devices LitData drops the last items, so that all of them get as many.",
        ),
    )


def _check_path(domain: PlannedDomain) -> None:
    if "{%" in domain.path:
        raise path_error(domain, "has {%...}, which LitData replaces by the date")
    if domain.path.startswith("local:"):
        raise path_error(domain, "starts with local:, which LitData takes for a place to copy from")
    if domain.path.endswith(".parquet"):
        raise path_error(domain, "ends with .parquet, which LitData takes for a pattern of file names in a folder")


FORMATS = (
    Format(
        name="litdata",
        consumer="litdata",
        title="LitData (CombinedStreamingDataset)",
        unit="examples",
        meaning="count",
        oversamples="yes: whole passes, then whole chunks",
        write=write_litdata,
        needs_budget=True,
        path="litdata/{name}",
    ),
)

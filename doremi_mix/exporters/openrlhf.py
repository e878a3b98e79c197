"""OpenRLHF: a comma-separated list of files, one of probabilities, and how many rows to keep of what they give.

It interleaves by probability until every domain has been read once, whatever the size of the training set: domains that
are small or heavy are repeated, and a tiny share of a large domain takes it forever.
"""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Mapping

from doremi_mix.errors import ExportError
from doremi_mix.exporters.counts import not_reached, of_counts, planned_counts
from doremi_mix.exporters.export import Export, ExportedFile, Format
from doremi_mix.exporters.paths import builder_of, check_different_paths, data_files
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
_MOST_DRAWS = 10**8
"""Rows that it may draw before it stops; each takes 8 bytes several times over, and minutes in older versions."""
_LONGEST_ARGUMENT = 128 * 1024 - 1
"""Bytes that Linux allows in one argument."""


def _write(plan: ExportPlan) -> Export:
    check_different_paths(plan)
    counts = planned_counts(plan)
    shares = plan.example_shares() if counts is None else of_counts(counts)
    budget = None if counts is None else sum(counts.values())
    domains = [plan.named(name) for name in shares]
    paths = ",".join(_file(domain) for domain in domains)
    if len(paths.encode()) > _LONGEST_ARGUMENT:
        raise ExportError(
            f"the list of {len(domains):,} files takes {len(paths.encode()):,} bytes, more than the "
            f"{_LONGEST_ARGUMENT:,} of one argument; give shorter paths: --paths"
        )
    draws = _draws_until_all_were_read(domains, shares, budget)
    probabilities = ",".join(repr(share) for share in shares.values())
    lines = [f"DATASET={shlex.quote(paths)}", f"DATASET_PROBS={shlex.quote(probabilities)}"]
    options = '--data.dataset="$DATASET" --data.dataset_probs="$DATASET_PROBS"'
    notes = [
        "OpenRLHF draws at random by these probabilities, and repeats domains until it has read each one once.",
        "For train_ppo_ray: --data.prompt_dataset and --data.prompt_probs take the same values.",
        "Rows of a domain come in the order of its file; shuffle files that are sorted. Say which columns are trained "
        "on: --data.input_key and --data.output_key.",
    ]
    num_drawn = None
    if budget is None:
        about = f", here about {draws:,} rows" if all(domain.file_examples for domain in domains) else ""
        notes[0] = f"{notes[0][:-1]}{about}; it keeps the first --data.max_samples of them (1,000,000 unless set)."
    else:
        lines.append(f"MAX_SAMPLES={budget}")
        options += ' --data.max_samples="$MAX_SAMPLES"'
        notes.append("Of what it draws, it keeps the first MAX_SAMPLES, which is the budget: set it, or more is used.")
        sizes = [min(domain.file_examples, budget) if domain.file_examples else 0 for domain in domains]
        if sum(sizes) >= budget:
            num_drawn = budget
        elif draws < 2 * budget:
            notes.append(
                f"It may stop before, at about {draws:,} rows; train the rest as further epochs: --train.max_epochs."
            )
    return Export(
        (ExportedFile("openrlhf.sh", "".join(f"{line}\n" for line in lines)),),
        shares,
        f". ./openrlhf.sh && deepspeed --module openrlhf.cli.train_sft {options}",
        num_drawn=num_drawn,
        notes=(*notes, *not_reached(plan, shares)),
    )


def _file(domain: PlannedDomain) -> str:
    """Returns a path as OpenRLHF's list takes it.

    Raises:
        ExportError: it would be read as something else.
    """
    builder_of(domain)
    path = domain.path
    for character, reason in ((",", "at which its list is divided"), ("@", "after which it expects a folder")):
        if character in path:
            raise ExportError(
                f'domain {domain.name!r}: its path {path!r} holds "{character}", {reason}; give other paths: --paths'
            )
    if path != path.strip():
        raise ExportError(
            f"domain {domain.name!r}: its path {path!r} starts or ends with a space, which is cut off; give other "
            f"paths: --paths"
        )
    if posixpath.splitext(path)[1] not in _SUFFIXES:
        raise ExportError(
            f"domain {domain.name!r}: its path {path!r} is taken for a dataset on the Hub, as it does not end in "
            f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]} (in small letters, not compressed); give other paths: "
            f"--paths"
        )
    return data_files(path)


def _draws_until_all_were_read(domains: list[PlannedDomain], shares: Mapping[str, float], budget: int | None) -> int:
    """Returns about how many rows are drawn until every domain has been read once.

    Raises:
        ExportError: it would take so many that OpenRLHF does not come to an end.
    """
    sizes = {domain.name: domain.file_examples or 1 for domain in domains}
    if budget is not None:
        # --data.max_samples also cuts each domain to its first rows.
        sizes = {name: min(size, budget) for name, size in sizes.items()}
    last = max(shares, key=lambda name: sizes[name] / shares[name])
    draws = sizes[last] / shares[last]  # infinite for the smallest floats
    if draws > _MOST_DRAWS:
        raise ExportError(
            f"domain {last!r}: OpenRLHF draws until every domain was read once, which takes more than "
            f"{_MOST_DRAWS:,} rows for a share of {shares[last]:.3g} of the examples; leave the domain out, or use "
            "--format datasets"
        )
    return round(draws)


FORMATS = (
    Format(
        name="openrlhf",
        consumer="openrlhf",
        title="OpenRLHF (--data.dataset and --data.dataset_probs)",
        unit="examples",
        meaning="share",
        oversamples="always, until every domain was read once",
        write=_write,
    ),
)

"""Levanter, in its two forms: ``levanter`` as released on its own (``configs``), and Marin's (``components``).

Both mix in blocks: of each block of ``mixture_block_size`` sequences, every dataset gets the same whole number, its
weight times the size rounded DOWN, and the largest dataset what is left.  A small weight thus becomes 0 of a block.
We do the rounding instead, so that the weights in the file are exactly what is drawn.
"""

from __future__ import annotations

import posixpath
from fractions import Fraction
from typing import Any

from doremi_mix.conversions import whole_counts
from doremi_mix.errors import ExportError
from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.paths import check_characters, check_different_paths, path_error
from doremi_mix.exporters.plan import ExportPlan

# Powers of two, so that count / block is exact in float64 and its product with the block is the count again.  The first
# is Levanter's default; it packs the place in a block into 16 bits, so that 2**16 is too large.
_BLOCKS = (2**11, 2**12, 2**13, 2**14, 2**15)
_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")


def write_levanter(plan: ExportPlan) -> Export:
    """Writes the ``data`` section for the package ``levanter``: ``configs`` and ``train_weights``."""
    sources = {
        domain.name: {
            "train_urls": [domain.path],
            "format": {"type": "chat", "messages_field": "messages", "pack": True},
        }
        for domain in plan.domains
    }
    return _export(plan, "levanter.yaml", "configs", sources)


def write_marin(plan: ExportPlan) -> Export:
    """Writes the ``data`` section for the package ``marin-levanter``: ``components`` and ``train_weights``."""
    sources = {
        domain.name: {
            "source": {"type": "url", "train_urls": [domain.path]},
            "format": {"type": "chat", "messages_field": "messages"},
            "pack": True,
        }
        for domain in plan.domains
    }
    return _export(plan, "marin.yaml", "components", sources)


def _export(plan: ExportPlan, file: str, key: str, sources: dict[str, dict[str, Any]]) -> Export:
    _check(plan)
    block, counts = _block(plan.token_shares())
    shares = {name: count / block for name, count in counts.items()}
    data = {
        key: sources,
        "train_weights": shares,
        # The only strategy that every release has: a dataset that ends starts again.
        "stop_strategy": "restart",
        "mixture_block_size": block,
    }
    return Export(
        files=(ExportedFile(file, yaml_text({"data": data})),),
        expected=shares,
        usage=f"python -m levanter.main.train_lm --configs TRAIN.yaml {file}",
        notes=(
            f"Weights are whole numbers of 1/{block}: of each block of {block:,} sequences Levanter draws exactly so "
            "many of each domain.",
            "The files of --configs are joined: TRAIN.yaml must have no data section of its own; add tokenizer and "
            "cache_dir to this one.",
            "Rows must hold chat messages; for plain text set format: {type: text}, which draws tokens alike. "
            "pack: false would draw examples, not tokens.",
            "A domain that ends is started again, as often as the number of steps asks: no epoch cap holds.",
        ),
    )


def _block(shares: dict[str, float]) -> tuple[int, dict[str, int]]:
    """Returns the smallest block that holds the shares well, and how many sequences of it each domain gets."""
    total = sum(map(Fraction, shares.values()), Fraction(0))  # 1.0 to a float, but not always 1.
    for block in _BLOCKS:
        exact = {name: Fraction(share) * block / total for name, share in shares.items()}
        counts = whole_counts(exact)
        moved = sum((abs(counts[name] - exact[name]) for name in counts), Fraction(0)) / 2
        if min(exact.values()) >= 10 and moved * 1000 <= block:
            return block, counts
    # The largest block: good enough when each domain is in it at all.
    name, least = min(exact.items(), key=lambda item: item[1])
    if least < 1:
        raise ExportError(
            f"domain {name!r} has {shares[name]:.3g} of the tokens, less than one sequence in the largest block that "
            f"Levanter mixes ({block:,}), which would draw nothing of it; give it at least {1 / block:.3g}, or weight 0"
        )
    return block, counts


def _check(plan: ExportPlan) -> None:
    check_different_paths(plan)
    check_characters(plan.domains, "[]\\", "Levanter reads as part of a pattern")
    check_characters(plan.domains, "*?{}", "Levanter expands as a pattern", patterns=True)
    for domain in plan.domains:
        if "::" in domain.path:
            raise path_error(domain, "has '::', which Levanter reads as a chain of file systems")
        first = posixpath.splitext(domain.path)
        if not {first[1], posixpath.splitext(first[0])[1]} & set(_SUFFIXES):
            suffixes = ", ".join(_SUFFIXES)
            raise path_error(
                domain,
                f"ends in none of {suffixes} (or one of them compressed), by which Levanter knows how to read it",
            )
        # The name is a folder of the cache; "a/train" would lie inside the cache of "a".
        parts = domain.name.split("/")
        if {"", ".", ".."} & set(parts) or (len(parts) > 1 and {"train", "validation"} & set(parts[1:])):
            raise ExportError(
                f"the name {domain.name!r} is no folder of its own in Levanter's cache, where each domain has one; "
                "rename the domain"
            )


FORMATS: tuple[Format, ...] = (
    Format(
        name="levanter",
        consumer="levanter-classic",
        title="Levanter (the package levanter: data.configs)",
        unit="sequences",
        meaning="share",
        oversamples="yes, restarts a domain without limit",
        write=write_levanter,
    ),
    Format(
        name="marin",
        consumer="levanter",
        title="Marin's Levanter (the package marin-levanter: data.components)",
        unit="sequences",
        meaning="share",
        oversamples="yes, restarts a domain without limit",
        write=write_marin,
    ),
)

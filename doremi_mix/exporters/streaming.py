"""MosaicML Streaming and LLM Foundry: one stream a domain, each with the exact number of samples of an epoch.

Of the three ways to weight a stream, ``choose`` is the one whose numbers come out as they are written: ``proportion``
rounds down and gives what is left over to streams drawn at random, and draws as many samples as the streams have
together unless ``epoch_size`` says otherwise.
"""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import urlsplit

from doremi_mix.errors import ExportError
from doremi_mix.exporters.counts import of_counts
from doremi_mix.exporters.export import Export, ExportedFile, Format, python_dict, yaml_text
from doremi_mix.exporters.paths import check_different_paths, path_error
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

REMOTE_SCHEMES = ("s3", "sftp", "gs", "oci", "hf", "azure", "azure-dl", "dbfs", "alipan")
"""What Streaming can download from; anything else must be a local folder."""

_PYTHON = '''\
from streaming import Stream, StreamingDataset

STREAMS = {streams}


def build_dataset(batch_size, **settings):
    """Returns the mixture; batch_size is what one device takes, as its DataLoader is told."""
    settings = {{"shuffle": True, "shuffle_seed": {seed}, **settings}}
    streams = [Stream(**stream) for stream in STREAMS.values()]
    return StreamingDataset(streams=streams, batch_size=batch_size, **settings)
'''


def write_streaming(plan: ExportPlan) -> Export:
    """Writes a Python file whose ``build_dataset`` returns a ``StreamingDataset`` of exact counts.

    Args:
        plan: what is to be drawn; it needs a budget.

    Returns:
        The file, and the shares of the examples of an epoch.

    Raises:
        ExportError: there are no counts, or a path is not one that Streaming reads, or two domains have the same.
    """
    streams = _streams(plan)
    _check_seed(plan.seed)
    text = _PYTHON.format(streams=python_dict(streams), seed=plan.seed)
    return Export(
        files=(ExportedFile("streaming_mixture.py", text),),
        expected=of_counts(_counts(streams)),
        usage="from streaming_mixture import build_dataset; dataset = build_dataset(batch_size=8)",
        num_drawn=sum(_counts(streams).values()),
        notes=(
            "Each path is a folder of shards in one of Streaming's formats, with one sample for each example of the "
            "domain: write it with streaming.MDSWriter.",
            "Do not give epoch_size: it contradicts `choose`. One epoch draws the counts, the rows of a last partial "
            "pass being drawn anew each epoch.",
            "Shuffling is on; without it the domains come one after another.",
        ),
    )


def write_llm_foundry(plan: ExportPlan) -> Export:
    """Writes the ``train_loader`` of an LLM Foundry configuration: its finetuning loader over weighted streams.

    Args:
        plan: what is to be drawn; it needs a budget.

    Returns:
        The YAML, and the shares of the examples of an epoch.

    Raises:
        ExportError: as ``write_streaming``, or a name or path is one that OmegaConf would replace.
    """
    streams = _streams(plan)
    _check_seed(plan.seed)
    for name in streams:
        domain, why = plan.named(name), "OmegaConf takes ${...} and ??? for values to be filled in"
        if "${" in domain.path or domain.path == "???":
            raise path_error(domain, f"would not be read as it is: {why}")
        if "${" in name or name == "???":
            raise ExportError(f"the name {name!r} would not be read as it is: {why}; rename the domain")
    dataset = {"streams": streams, "shuffle": True, "shuffle_seed": plan.seed}
    text = yaml_text({"train_loader": {"name": "finetuning", "dataset": dataset}})
    return Export(
        files=(ExportedFile("train_loader.yaml", text),),
        expected=of_counts(_counts(streams)),
        usage="copy train_loader into the YAML that composer train.py reads",
        num_drawn=sum(_counts(streams).values()),
        notes=(
            "Each path is a folder of MDS shards with one sample for each example (prompt and response, or a chat).",
            "Set beside it what is yours: dataset.max_seq_len, dataset.decoder_only_format, drop_last, num_workers.",
            "Do not set dataset.epoch_size: it contradicts `choose`; and set no dataset.packing_ratio that discards "
            "examples.",
            "For the text loader over sequences of equal length, the shares to use are those of tokens (last column).",
        ),
    )


def _streams(plan: ExportPlan) -> dict[str, dict[str, Any]]:
    """Returns the keyword arguments of each stream, by the domain's name."""
    counts = plan.counts()
    # Two domains in one folder would share their samples, and Streaming refuses it.
    check_different_paths(plan)
    return {name: {**_place(plan.named(name)), "choose": count} for name, count in counts.items()}


def _place(domain: PlannedDomain) -> dict[str, str]:
    """Returns where a stream lies: a local folder, or a remote one and the folder that caches it."""
    path = domain.path
    if "://" not in path and not path.startswith("dbfs:/"):
        return {"local": path}
    scheme = urlsplit(path).scheme
    if scheme not in REMOTE_SCHEMES:
        raise path_error(domain, f"is none that Streaming downloads from ({', '.join(REMOTE_SCHEMES)})")
    # A name of the remote's own: an index in the cache is believed, whatever remote is asked for.
    cache = hashlib.sha256(path.encode("utf-8")).hexdigest()[:16]
    return {"remote": path, "local": f"streaming_cache/{cache}"}


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ExportError(f"shuffle_seed must be at least 0, got {seed}; give another --seed")


def _counts(streams: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {name: stream["choose"] for name, stream in streams.items()}


FORMATS = (
    Format(
        name="streaming",
        consumer="streaming",
        title="MosaicML Streaming (Stream with choose)",
        unit="examples",
        meaning="count",
        oversamples="yes: whole passes, then rows drawn without replacement",
        write=write_streaming,
        needs_budget=True,
        path="mds/{name}",
    ),
    Format(
        name="llm-foundry",
        consumer="streaming",
        title="LLM Foundry (train_loader with streams)",
        unit="examples",
        meaning="count",
        oversamples="yes: whole passes, then rows drawn without replacement",
        write=write_llm_foundry,
        needs_budget=True,
        path="mds/{name}",
    ),
)

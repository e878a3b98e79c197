"""torchtitan, whose data sections are Python: the released package, and its later pipeline on Grain."""

from __future__ import annotations

from glob import escape

from doremi_mix.exporters.export import Export, ExportedFile, Format
from doremi_mix.exporters.paths import builder_of, check_characters, check_different_paths, path_error
from doremi_mix.exporters.plan import ExportPlan

_NOTES = (
    "Each domain is packed before it is mixed, so that weights count sequences: shares of tokens, up to padding; the "
    "last sequence of each pass over a domain is padded, which shows in domains of few sequences.",
    "Change messages() where rows hold something else than chat messages.",
    "A domain that ends is started again: no epoch cap holds.",
)


def write_torchtitan(plan: ExportPlan) -> Export:
    """Writes Python for torchtitan 0.3: an ``InterleavedChatDataLoader`` of weighted sources without end."""
    check_different_paths(plan)
    check_characters(plan.domains, "[]", "datasets.load_dataset reads as part of a pattern")
    check_characters(plan.domains, "*?", "datasets.load_dataset expands as a pattern", patterns=True)
    shares = plan.token_shares()
    rows = "".join(
        f"    ({domain.name!r}, {builder_of(domain)!r}, {domain.path!r}, {shares[domain.name]!r}),\n"
        for domain in plan.domains
    )
    return Export(
        files=(ExportedFile("torchtitan_mixture.py", _RELEASED.format(rows=rows, seed=plan.seed)),),
        expected=shares,
        usage="from torchtitan_mixture import dataloader; in a config function: config.dataloader = dataloader()",
        notes=(*_NOTES, "Rows longer than the sequence are dropped, and a row must be one turn of user and assistant."),
    )


_RELEASED = '''\
from torchtitan.hf_datasets.text_datasets import ChatDataSource, InterleavedChatDataLoader

# name, reader of datasets.load_dataset, file, share of sequences
DOMAINS = [
{rows}]
SEED = {seed}


def messages(row):
    """Returns the messages of one row: the user's and the assistant's."""
    return row["messages"]


def dataloader(**options):
    """Returns the config of the mixed data loader; options are those of InterleavedChatDataLoader.Config."""
    return InterleavedChatDataLoader.Config(
        sources=[
            ChatDataSource(
                dataset_path=reader,
                load_dataset_kwargs={{"data_files": path, "split": "train"}},
                sample_processor=messages,
                infinite=True,
                weight=share,
            )
            for name, reader, path, share in DOMAINS
        ],
        seed=SEED,
        **options,
    )
'''


def write_torchtitan_grain(plan: ExportPlan) -> Export:
    """Writes Python for torchtitan after 0.3: a ``DatasetMixConfig`` of packed datasets."""
    check_different_paths(plan)
    for domain in plan.domains:
        if domain.path.endswith((".parquet", ".json")):
            raise path_error(domain, "is not that of a JSONL file, the only one that IndexedJsonlSource reads")
    shares = plan.token_shares()
    rows = "".join(
        f"    ({domain.name!r}, {escape(domain.path)!r}, {shares[domain.name]!r}),\n" for domain in plan.domains
    )
    return Export(
        files=(ExportedFile("torchtitan_grain_mixture.py", _GRAIN.format(rows=rows, seed=plan.seed)),),
        expected=shares,
        usage=(
            "from torchtitan_grain_mixture import dataloader; in your config function: config.dataloader = dataloader()"
        ),
        notes=(*_NOTES, "This interface is not in a release yet (0.3.0 has it not), and may change."),
    )


_GRAIN = '''\
from torchtitan.components.data import (
    DatasetMixConfig,
    FirstFitPackingConfig,
    GrainDataLoader,
    IndexedJsonlSource,
    SingleDatasetConfig,
    WeightedDataset,
)
from torchtitan.hf_datasets.text_datasets import ChatProcessor

# name, pattern of files, share of sequences
DOMAINS = [
{rows}]
SEED = {seed}


def messages(row):
    """Returns the messages of one row: the user's and the assistant's."""
    return row["messages"]


def dataloader(**options):
    """Returns the config of the mixed data loader; options are those of GrainDataLoader.Config."""
    return GrainDataLoader.Config(
        dataset=DatasetMixConfig(
            datasets=tuple(
                WeightedDataset(
                    dataset=FirstFitPackingConfig(
                        dataset=SingleDatasetConfig(
                            source=IndexedJsonlSource.Config(patterns=(pattern,)),
                            processor=ChatProcessor.Config(messages_fn=messages),
                            post_filters=(lambda sample: sample is not None,),
                        ),
                    ),
                    weight=share,
                )
                for name, pattern, share in DOMAINS
            ),
        ),
        seed=SEED,
        repeat=True,
        **options,
    )
'''


FORMATS: tuple[Format, ...] = (
    Format(
        name="torchtitan",
        consumer="torchtitan",
        title="torchtitan 0.3 (InterleavedChatDataLoader)",
        unit="sequences",
        meaning="share",
        oversamples="yes, restarts a domain without limit",
        write=write_torchtitan,
    ),
    Format(
        name="torchtitan-grain",
        consumer="torchtitan-main",
        title="torchtitan after 0.3 (DatasetMixConfig)",
        unit="sequences",
        meaning="share",
        oversamples="yes, restarts a domain without limit",
        write=write_torchtitan_grain,
    ),
)

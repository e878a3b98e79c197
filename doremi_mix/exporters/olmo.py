"""OLMo-core (a list of sources as YAML; composable sources as Python) and Dolma's resharding (rates of files)."""

from __future__ import annotations

import posixpath
from pathlib import PurePosixPath
from urllib.parse import urlparse

from doremi_mix.errors import ExportError
from doremi_mix.exporters.counts import of_counts
from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.paths import check_characters, check_different_paths, path_error
from doremi_mix.exporters.plan import ExportPlan

_TOKENIZED = "tokenized/{name}/*.npy"


def write_olmo_core(plan: ExportPlan) -> Export:
    """Writes a ``SourceMixtureList``: target ratios of tokens, with the epoch cap as the largest repetition."""
    _check_npy(plan)
    shares = plan.token_shares()
    sources = [
        {
            "source_name": domain.name,
            "target_ratio": shares[domain.name],
            "paths": [domain.path],
            # OLMo-core draws at most tokens x max_source_fraction x max_repetition_ratio of a source, or stops.
            "max_repetition_ratio": max(float(plan.max_epochs), 1.0),
            "max_source_fraction": min(float(plan.max_epochs), 1.0),
        }
        for domain in plan.domains
    ]
    tokens = "NUM_TOKENS" if plan.token_budget is None else str(plan.token_budget)
    return Export(
        files=(ExportedFile("olmo-core.yaml", yaml_text({"sources": sources})),),
        expected=shares,
        usage=(
            'SourceMixtureDatasetConfig(source_list=SourceMixtureList.from_yaml("olmo-core.yaml"), '
            f"requested_tokens={tokens}, global_batch_size=BATCH_TOKENS, seed={plan.seed})"
        ),
        notes=(
            f"A source that would be repeated more than {plan.max_epochs:g} times is an error of OLMo-core "
            '("Insufficient tokens for source"): lower requested_tokens then.',
            "It draws whole sequences of each file, and gives what is missing to the last whole batch evenly to files "
            "that have room: make requested_tokens a multiple of global_batch_size, and give a source few large files.",
            "Of each file it takes the first sequences: shuffle the documents before tokenizing.",
        ),
    )


def write_olmo_core_composable(plan: ExportPlan) -> Export:
    """Writes Python for OLMo-core's composable data loader: a ``MixingInstanceSource`` of chunked sources."""
    _check_npy(plan)
    if plan.max_epochs < 1:
        raise ExportError(
            f"its smallest limit of repetition is 1, so that a cap of {plan.max_epochs:g} epochs cannot be said; use "
            "--max-epochs 1, or --format olmo-core"
        )
    shares = plan.token_shares()
    rows = "".join(f"    ({domain.name!r}, {domain.path!r}, {shares[domain.name]!r}),\n" for domain in plan.domains)
    return Export(
        files=(
            ExportedFile(
                "olmo_core_mixture.py",
                _COMPOSABLE.format(
                    rows=rows, tokens=plan.token_budget, repetition=float(plan.max_epochs), seed=plan.seed
                ),
            ),
        ),
        expected=shares,
        usage="from olmo_core_mixture import mixture; source = mixture(tokenizer, sequence_length).build(work_dir)",
        notes=(
            "Each sequence is of one domain; a NUM_TOKENS that needs more repetition is an error of OLMo-core.",
            *(
                ()
                if plan.token_budget
                else ("NUM_TOKENS is None: the mixture is as large as the smallest source in proportion allows.",)
            ),
        ),
    )


_COMPOSABLE = '''\
from olmo_core.data.composable import ConcatAndChunkInstanceSource, MixingInstanceSource

# name, token arrays, share of tokens
DOMAINS = [
{rows}]
NUM_TOKENS = {tokens}
MAX_REPETITION = {repetition!r}
SEED = {seed}


def mixture(tokenizer, sequence_length, **options):
    """Returns the config of the mixed source; options are those of ConcatAndChunkInstanceSource.Config.from_npy."""
    return MixingInstanceSource.Config(
        source_specs=[
            MixingInstanceSource.Spec.Config(
                source=ConcatAndChunkInstanceSource.Config.from_npy(
                    path, tokenizer=tokenizer, sequence_length=sequence_length, label=name, **options
                ),
                ratio=share,
                max_repetition_factor=MAX_REPETITION,
                label=name,
            )
            for name, path, share in DOMAINS
        ],
        num_tokens=None if NUM_TOKENS is None else NUM_TOKENS // sequence_length * sequence_length,
        seed=SEED,
    )
'''


def write_dolma(plan: ExportPlan) -> Export:
    """Writes a config for ``dolma.tokenizer.reshard``: how often each source's own files are taken."""
    check_different_paths(plan)
    for domain in plan.domains:
        if urlparse(domain.path).scheme not in ("", "s3"):
            scheme = urlparse(domain.path).scheme
            raise path_error(domain, f"starts with '{scheme}:', which Dolma takes for a protocol that it does not know")
    _check_nested(plan)
    multipliers = plan.multipliers()
    rates = {name: float(multiplier) for name, multiplier in multipliers.items()}
    parts = [rate - int(rate) for rate in rates.values()]
    least = min((part for part in parts if part), default=1.0)
    config = {
        "source_prefixes": [
            {"prefix": domain.path, "sample_rate": rates[domain.name]}
            for domain in plan.domains
            if domain.name in rates
        ],
        "destination_prefix": "mixed",
        "max_size_bytes": 2**30,
        "random_seed": plan.seed,
    }
    return Export(
        files=(ExportedFile("dolma.yaml", yaml_text(config)),),
        expected=of_counts(plan.counts()),
        usage="python -m dolma.tokenizer.reshard dolma.yaml",
        notes=(
            "Dolma takes whole .npy files: of a source with F files it rounds the part of a pass to a multiple of 1/F, "
            f"and takes at least one file; the smallest part here is {least:.3g} of a pass, so give each source many "
            "files of one size.",
            "Each .npy needs its .csv.gz beside it; set no local_tempdir that holds anything: Dolma deletes it.",
            "tokenizer_name_or_path in this file is ignored: the tokens' type is that of allenai/dolma2-tokenizer.",
        ),
    )


def _check_npy(plan: ExportPlan) -> None:
    check_different_paths(plan)
    check_characters(plan.domains, "*", "OLMo-core expands as a pattern", patterns=True)
    for domain in plan.domains:
        if "*" in domain.path and "://" not in domain.path and str(PurePosixPath(domain.path)) != domain.path:
            plain = str(PurePosixPath(domain.path))
            raise path_error(domain, f"is a pattern that OLMo-core never matches ({plain!r} is one that it can)")
        if domain.path.startswith("file://") or (domain.path.endswith("/") and "*" not in domain.path):
            raise path_error(domain, f"must be that of token arrays, for example {_TOKENIZED!r}")


def _check_nested(plan: ExportPlan) -> None:
    """Raises when the files of one source lie inside the folder of another, which is read with all that is in it."""
    folders = {PurePosixPath(posixpath.normpath(domain.path)): domain.name for domain in plan.domains}
    for folder, name in folders.items():
        outer = next((parent for parent in folder.parents if parent in folders), None)
        if outer is not None:
            raise ExportError(
                f"the folder of domain {name!r} lies inside that of domain {folders[outer]!r}, of which Dolma takes "
                "everything; give other paths: --paths"
            )


FORMATS: tuple[Format, ...] = (
    Format(
        name="olmo-core",
        consumer="olmo-core",
        title="OLMo-core (SourceMixtureList)",
        unit="tokens",
        meaning="share",
        oversamples="up to max_repetition_ratio, else an error",
        write=write_olmo_core,
        path=_TOKENIZED,
    ),
    Format(
        name="olmo-core-composable",
        consumer="olmo-core",
        title="OLMo-core (composable MixingInstanceSource)",
        unit="sequences",
        meaning="share",
        oversamples="up to max_repetition_factor, else an error",
        write=write_olmo_core_composable,
        path=_TOKENIZED,
    ),
    Format(
        name="dolma",
        consumer="dolma",
        title="Dolma (dolma.tokenizer.reshard)",
        unit="examples",
        meaning="multiplier",
        oversamples="yes, whole files again",
        write=write_dolma,
        needs_budget=True,
        path="tokenized/{name}",
    ),
)

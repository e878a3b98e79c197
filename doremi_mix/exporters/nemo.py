"""Domain weights for NVIDIA's trainers over Megatron-Core: NeMo 2, Megatron-Bridge and NeMo-Automodel."""

from __future__ import annotations

import ast
import warnings
from fractions import Fraction

import numpy as np

from doremi_mix.conversions import exact_shares
from doremi_mix.errors import ExportError
from doremi_mix.exporters.counts import of_counts
from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.megatron import OVERSAMPLES, PREFIX, check_prefixes, tokens_note, zipped_blend
from doremi_mix.exporters.paths import builder_of, check_different_paths, data_files
from doremi_mix.exporters.plan import ExportPlan


def _write_nemo(plan: ExportPlan) -> Export:
    blend = zipped_blend(plan)
    for domain in plan.domains:
        if "${" in domain.path:
            raise ExportError(
                f"the path of domain {domain.name!r} has '${{' ({domain.path!r}), which NeMo's configuration takes for "
                "a reference; give other paths: --paths"
            )
    return Export(
        files=(ExportedFile("nemo_paths.yaml", yaml_text({"paths": blend})),),
        expected=plan.token_shares(),
        usage='PreTrainingDataModule(paths=yaml.safe_load(open("nemo_paths.yaml"))["paths"], split="1,0,0", ...)',
        notes=(
            *tokens_note(plan, "num_train_samples"),
            'split="1,0,0" trains on the whole of every prefix; the default holds out the last tenth of each.',
            "Configurations of NeMo 1 take the same list as model.data.data_prefix.",
        ),
    )


def _write_bridge(plan: ExportPlan) -> Export:
    check_prefixes(plan)
    shares = plan.token_shares()
    paths = "".join(f"        {domain.path!r},\n" for domain in plan.domains)
    weights = "".join(f"        {shares[domain.name]!r},\n" for domain in plan.domains)
    return Export(
        files=(
            ExportedFile("megatron_bridge_blend.py", f"BLEND = (\n    [\n{paths}    ],\n    [\n{weights}    ],\n)\n"),
        ),
        expected=shares,
        usage="from megatron_bridge_blend import BLEND; config.dataset.blend = BLEND; config.dataset.split = '1,0,0'",
        notes=(
            *tokens_note(plan, "train.train_samples"),
            "dataset.blend is the pair of paths and weights; there is no dataset.blend_weights.",
            "split '1,0,0' trains on the whole of every prefix; other splits hold out the end of each.",
        ),
    )


def passes(count: int, size: int) -> float:
    """Returns the passes over a source of which Megatron-Bridge draws exactly count rows.

    It takes all rows int(passes) times, and round(size * (passes - int(passes))) of them once more.

    Example:
        >>> passes(250, 100)
        2.5
    """
    exact = value = float(Fraction(count, size))
    for _ in range(8):
        rest = size * (value - int(value))
        # Not above the whole number, so that a version which rounds up draws as many.
        if int(value) * size + round(rest) == count and rest <= round(rest):
            return value
        value = float(np.nextafter(value, 0.0))
    return exact


def _write_bridge_sft(plan: ExportPlan) -> Export:
    counts = plan.counts()
    sizes = {name: int(counts[name] / ratio) for name, ratio in plan.multipliers().items()}
    check_different_paths(plan)
    sources, weights = "", ""
    for name, count in counts.items():
        domain = plan.named(name)
        sources += (
            f"    HFDatasetSourceConfig(\n        path_or_dataset={builder_of(domain)!r},\n"
            f"        load_kwargs={{'data_files': {data_files(domain.path)!r}}},\n        split='train',\n    ),\n"
        )
        weights += f"    {passes(count, sizes[name])!r},\n"
    text = (
        "from megatron.bridge.data.builders import HFDatasetSourceConfig\n\n"
        f"SOURCES = [\n{sources}]\nSOURCE_WEIGHTS = [\n{weights}]\nBLEND_SEED = {plan.seed}\n"
    )
    total = sum(counts.values())
    return Export(
        files=(ExportedFile("megatron_bridge_sft.py", text),),
        expected=of_counts(counts),
        usage=(
            "DirectHFSFTDatasetConfig(source=SOURCES, source_weights=SOURCE_WEIGHTS, blend_seed=BLEND_SEED, "
            "validation_source=..., test_source=..., ...)"
        ),
        num_drawn=total,
        notes=(
            "source_weights needs a Megatron-Bridge that has it (0.6.2 has not).",
            f"One pass over the mixture is {total} rows; a schema_adapter that drops rows changes the counts.",
            "Several sources need validation_source and test_source, or do_validation=False and do_test=False.",
        ),
    )


def _write_automodel(plan: ExportPlan) -> Export:
    _check_all_are_planned(plan)
    if len(plan.domains) < 2:
        raise ExportError("domain_mixture takes at least two domains, and only one is drawn; train without weights")
    if any(domain.statistics is None for domain in plan.domains):
        raise ExportError(
            "it samples domains as the corpus has them and weights their losses, but the sizes of the domains are not "
            "known; give --corpus RUN_DIR (or a file of num_examples and available_tokens by domain)"
        )
    check_prefixes(plan)
    for domain in plan.domains:
        if domain.name == "weighted":
            raise ExportError("the domain name 'weighted' is reserved for the weighted loss; rename the domain")
        for what, text, remedy in (
            ("the name", domain.name, "rename it"),
            ("the path", domain.path, "give other paths: --paths"),
        ):
            if changed_by_automodel(text):
                raise ExportError(
                    f"{what} of domain {domain.name!r} ({text!r}) is empty, a Python literal or has a '$', which the "
                    f"configuration loader replaces; {remedy}"
                )
    # Budget and epoch cap are for drawing; the corpus is sampled as it is, and a loss can be weighted as learned.
    objective = exact_shares({domain.name: domain.weight for domain in plan.domains})
    sampling = exact_shares(
        {domain.name: Fraction(domain.statistics.available_tokens) for domain in plan.domains if domain.statistics}
    )
    config = {
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.megatron_dataset.MegatronPretraining",
            "paths": {"train": [item for d in plan.domains for item in (sampling[d.name], d.path)]},
            "splits_to_build": "train",
        },
        "domain_mixture": {
            "domains": [
                {
                    "name": domain.name,
                    "sampling_weight": sampling[domain.name],
                    "objective_weight": objective[domain.name],
                    "path": domain.path,
                }
                for domain in plan.domains
            ]
        },
    }
    strongest = max(objective, key=lambda name: objective[name] / sampling[name])
    return Export(
        files=(ExportedFile("nemo_automodel.yaml", yaml_text(config)),),
        expected=sampling,
        usage="merge nemo_automodel.yaml into the recipe's configuration (keep its tokenizer and seq_length)",
        notes=(
            "Domains are sampled as the corpus has them (sampling_weight); the domain weights are objective_weight, "
            "the shares of the loss, which is multiplied by objective_weight / sampling_weight.",
            f"The largest multiplier is {objective[strongest] / sampling[strongest]:.3g} ({strongest}).",
            "It takes a loss with reduction sum (MaskedCrossEntropy), and no packing, pipeline or context parallelism; "
            "with validation, one block validation_dataset_NAME for each domain.",
            "All domains are repeated alike, as often as the recipe's own number of steps asks.",
        ),
        second=objective,
    )


def _check_all_are_planned(plan: ExportPlan) -> None:
    """Raises when the budget is too small to draw from a domain: without it, the others would be sampled more."""
    missing = next((name for name in plan.left_out if plan.learned[name]), None)
    if missing is not None:
        raise ExportError(
            f"the budget of {plan.budget:,} {plan.budget_unit} draws nothing of domain {missing!r} "
            f"({plan.learned[missing]:.3g} of the objective), but domains are sampled as the corpus has them whatever "
            "the budget; raise the budget, leave it out, or give the domain weight 0"
        )


def changed_by_automodel(text: str) -> bool:
    """Says whether NeMo-Automodel's loader makes something else of a string: it evaluates literals and ``$NAME``."""
    if not text or "$" in text or text in ("none", "true", "false"):
        return True
    try:
        with warnings.catch_warnings():
            # Text such as '\d' is a literal with an invalid escape, which Python warns of.
            warnings.simplefilter("ignore")
            ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


FORMATS = (
    Format(
        name="nemo",
        consumer="megatron-core",
        title="NVIDIA NeMo 2 (PreTrainingDataModule)",
        unit="sequences",
        meaning="share",
        oversamples=OVERSAMPLES,
        write=_write_nemo,
        path=PREFIX,
    ),
    Format(
        name="megatron-bridge",
        consumer="megatron-core",
        title="NVIDIA Megatron-Bridge, pretraining (GPTDatasetConfig)",
        unit="sequences",
        meaning="share",
        oversamples=OVERSAMPLES,
        write=_write_bridge,
        path=PREFIX,
    ),
    Format(
        name="megatron-bridge-sft",
        consumer="megatron-bridge",
        title="NVIDIA Megatron-Bridge, fine-tuning (DirectHFSFTDatasetConfig)",
        unit="examples",
        meaning="multiplier",
        oversamples="yes: whole passes, and a random part of one more",
        write=_write_bridge_sft,
        needs_budget=True,
    ),
    Format(
        name="nemo-automodel",
        consumer="nemo-automodel",
        title="NVIDIA NeMo-Automodel (domain_mixture)",
        unit="sequences",
        meaning="objective",
        oversamples="no: domains are sampled as the corpus has them",
        write=_write_automodel,
        path=PREFIX,
    ),
)

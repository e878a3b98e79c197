"""nanotron: folders of tokenized data and their weights, in a stage of the training config."""

from __future__ import annotations

from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.paths import check_characters, check_different_paths
from doremi_mix.exporters.plan import ExportPlan


def write_nanotron(plan: ExportPlan) -> Export:
    """Writes ``data_stages`` with one stage: ``dataset_folder`` and ``dataset_weights`` in the same order."""
    check_different_paths(plan)
    check_characters(plan.domains, "*?[", "nanotron reads as a pattern of file names")
    shares = plan.token_shares()
    stage = {
        "name": "doremi_mix",
        "start_training_step": 1,
        "data": {
            "seed": plan.seed,
            "num_loading_workers": 1,
            "dataset": {
                "dataset_folder": [domain.path for domain in plan.domains],
                "dataset_weights": [shares[domain.name] for domain in plan.domains],
            },
        },
    }
    return Export(
        files=(ExportedFile("nanotron.yaml", yaml_text({"data_stages": [stage]})),),
        expected=shares,
        usage="put data_stages into the config of: torchrun run_train.py --config-file CONFIG.yaml",
        notes=(
            "nanotron keeps the shares over as many sequences as all folders hold together, and repeats that order: a "
            "domain of which such a pass needs only a part shows the same part in every pass.",
            "Each folder holds *.ds files and their *.metadata, all made with one tokenizer.",
            "A domain that ends is started again: no epoch cap holds.",
        ),
    )


FORMATS: tuple[Format, ...] = (
    Format(
        name="nanotron",
        consumer="nanotron",
        title="nanotron (Nanoset)",
        unit="sequences",
        meaning="share",
        oversamples="yes, restarts a domain without limit",
        write=write_nanotron,
        path="tokenized/{name}",
    ),
)

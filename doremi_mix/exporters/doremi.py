"""The official DoReMi code (sangmichaelxie/doremi): a JSON file of domain weights, one folder of sequences a domain."""

from __future__ import annotations

from doremi_mix.exporters.export import Export, ExportedFile, Format, json_text
from doremi_mix.exporters.paths import check_folder_names
from doremi_mix.exporters.plan import ExportPlan


def write_doremi(plan: ExportPlan) -> Export:
    """Writes both keys that its training script asks for, with the names sorted, as it sorts them."""
    check_folder_names(plan.domains, "is not that of one folder, where the official code looks for the domain's data")
    shares = dict(sorted(plan.token_shares().items()))
    config = {"train_domain_weights": shares, "eval_domain_weights": shares}
    return Export(
        files=(ExportedFile("doremi.json", json_text(config), comment=None),),
        expected=plan.token_shares(),
        usage="python doremi/train.py --domain_config_path doremi.json --dataset_dir PREPROCESSED ...",
        notes=(
            "PREPROCESSED/train/NAME holds the packed sequences of domain NAME; with --dataset_name pile there must be "
            "no other folder.",
            "A domain that ends is started again: no epoch cap holds.",
        ),
    )


FORMATS: tuple[Format, ...] = (
    Format(
        name="doremi",
        consumer="doremi",
        title="official DoReMi code (configs/NAME.json)",
        unit="sequences",
        meaning="share",
        oversamples="yes, restarts a domain without limit",
        write=write_doremi,
        path="{name}",
    ),
)

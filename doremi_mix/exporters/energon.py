"""Domain weights for Megatron-Energon: a MetadatasetV2 that blends prepared datasets.

A weight is the probability of a sample, and a sample is an example (a row of a JSONL file, an entry of a webdataset).
"""

from __future__ import annotations

from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.paths import check_different_paths, path_error
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

_PROTOCOLS = ("msc", "dss", "rclone")
_FLOAT32_STEP = 2.0**-24


def _check_path(domain: PlannedDomain) -> None:
    """Raises when Energon would look for another place than the one that is meant."""
    protocol, separator, rest = domain.path.partition("://")
    if separator and (protocol not in _PROTOCOLS or not rest or rest.startswith("/")):
        raise path_error(
            domain,
            "has '://' but is no address that Energon knows (msc://PROFILE/FOLDER): it would look for a local folder "
            "of that name",
        )


def _write(plan: ExportPlan) -> Export:
    shares = plan.example_shares()
    check_different_paths(plan)
    for domain in plan.domains:
        _check_path(domain)
    blend = [{"weight": shares[domain.name], "path": domain.path} for domain in plan.domains]
    text = yaml_text({"__module__": "megatron.energon", "__class__": "MetadatasetV2"})
    text += yaml_text({"splits": {"train": {"blend": blend}}})
    notes = [
        "Paths are folders that `energon prepare` was run on, or JSONL files; relative ones start at this file's "
        "folder.  The file's name must end in .yaml.",
        "Samples are drawn at random without end, and a domain that is through starts again; set the length of the run "
        "in the trainer.",
        "A domain with fewer samples than there are workers over all ranks is missing on some of them, which draw the "
        "others more often.",
    ]
    rare = [name for name, share in shares.items() if share < _FLOAT32_STEP]
    if rare and len(shares) > 1:
        notes.append(f"Energon adds weights up in float32, so that it may never draw: {', '.join(rare)}.")
    return Export(
        files=(ExportedFile("energon.yaml", text),),
        expected=shares,
        usage='get_train_dataset("energon.yaml", ...)',
        notes=tuple(notes),
    )


FORMATS = (
    Format(
        name="energon",
        consumer="energon",
        title="Megatron-Energon (MetadatasetV2, blend)",
        unit="examples",
        meaning="share",
        oversamples="yes: a domain that is through starts again",
        write=_write,
        path="energon/{name}",
    ),
)

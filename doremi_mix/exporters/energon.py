"""Domain weights for Megatron-Energon: a MetadatasetV2 that blends prepared datasets.

A weight is the probability of a sample, and a sample is an example (a row of a JSONL file, an entry of a webdataset).
"""

from __future__ import annotations

import posixpath

from doremi_mix.errors import ExportError
from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain

_PROTOCOLS = ("msc", "dss", "rclone")
_FLOAT32_STEP = 2.0**-24


def _resolved(domain: PlannedDomain) -> str:
    """Returns the path as Energon resolves it, to compare paths.

    Raises:
        ExportError: Energon would not find it, or would find another.
    """
    name, path = domain.name, domain.path
    if not path:
        raise ExportError(f"the path of domain {name!r} is empty; give other paths: --paths")
    protocol, separator, rest = path.partition("://")
    if separator and (protocol not in _PROTOCOLS or not rest or rest.startswith("/")):
        raise ExportError(
            f"the path of domain {name!r} ({path!r}) has '://' but is no address that Energon knows "
            "(msc://PROFILE/FOLDER): it would look for a local folder of that name; give other paths: --paths"
        )
    return f"{protocol}://{posixpath.normpath(rest)}" if separator else posixpath.normpath(path)


def _write(plan: ExportPlan) -> Export:
    shares = plan.example_shares()
    owners: dict[str, str] = {}
    for domain in plan.domains:
        resolved = _resolved(domain)
        if resolved in owners:
            raise ExportError(
                f"domains {owners[resolved]!r} and {domain.name!r} have one path ({domain.path!r}), so that Energon "
                "would draw the same samples for both; give other paths: --paths"
            )
        owners[resolved] = domain.name
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

"""Meta Lingua: folders of JSONL chunks and their weights.  It chooses a source for each document, then packs."""

from __future__ import annotations

from doremi_mix.exporters.export import Export, ExportedFile, Format, yaml_text
from doremi_mix.exporters.paths import check_different_paths
from doremi_mix.exporters.plan import ExportPlan


def write_lingua(plan: ExportPlan) -> Export:
    """Writes the ``data`` section: ``sources``, from a folder below ``root_dir`` to its share of documents."""
    check_different_paths(plan)
    shares = plan.example_shares()
    data = {
        "root_dir": ".",
        "sources": {domain.path: shares[domain.name] for domain in plan.domains},
        "seed": plan.seed,
    }
    return Export(
        files=(ExportedFile("lingua.yaml", yaml_text({"data": data})),),
        expected=shares,
        usage="put data into the config of: torchrun -m apps.main.train config=CONFIG.yaml",
        notes=(
            "Lingua draws documents, not sequences: these are shares of examples, which give the planned shares of "
            "tokens.",
            "Each folder holds NAME.chunk.NN.jsonl files of rows with text or content; chunks beyond the number of "
            "ranks are not read.",
            "A domain that ends is started again: no epoch cap holds.",
        ),
    )


FORMATS: tuple[Format, ...] = (
    Format(
        name="lingua",
        consumer="lingua",
        title="Meta Lingua (data.sources)",
        unit="examples",
        meaning="share",
        oversamples="yes, restarts a domain without limit",
        write=write_lingua,
        path="shuffled/{name}",
    ),
)

"""Tasks for LitData: write chunks, import what we exported, and draw from it."""

import os

os.environ["DO_NOT_TRACK"] = "1"

import importlib.util
from collections import Counter
from pathlib import Path

from asked import main
from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset
from litdata.streaming.writer import BinaryWriter


def write(request):
    """Writes each domain in LitData's format, one item a row, in chunks of 32."""
    for path, rows in request["rows"].items():
        Path(path).mkdir(parents=True)
        writer = BinaryWriter(path, chunk_size=32)
        for number, domain in enumerate(rows):
            writer[number] = {"domain": domain, "number": number}
        writer.done()
        writer.merge(1)


def count(dataset):
    """Counts domains, and how often the most frequent row of each comes."""
    domains, rows, most = Counter(), Counter(), {}
    for row in dataset:
        domains[row["domain"]] += 1
        rows[row["domain"], int(row["number"])] += 1
    for (domain, _), times in rows.items():
        most[domain] = max(most.get(domain, 0), times)
    return {"drawn": domains, "most_often": most}


def mixture(request):
    """Imports the exported file and draws one epoch, directly or through LitData's loader."""
    spec = importlib.util.spec_from_file_location("exported", request["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dataset = module.build_dataset()
    if "num_workers" not in request:
        return count(dataset)
    loader = StreamingDataLoader(dataset, batch_size=8, num_workers=request["num_workers"])
    batches = list(loader)
    return {"drawn": Counter(domain for batch in batches for domain in batch["domain"])}


def naive(request):
    """Draws from a combined dataset made by hand."""
    parts = [StreamingDataset(path, shuffle=True) for path in request["paths"]]
    return count(CombinedStreamingDataset(parts, weights=request["weights"], **request["settings"]))


if __name__ == "__main__":
    main({"write": write, "mixture": mixture, "naive": naive})

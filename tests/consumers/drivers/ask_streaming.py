"""Tasks for MosaicML Streaming: write shards, import what we exported, and draw from it."""

import importlib.util
import sys
import types
from collections import Counter
from pathlib import Path

import transformers.feature_extraction_utils  # noqa: F401  (looks for torchvision, so before the stubs)

# Streaming imports torchvision for vision datasets, which we do not use; its wheel is for CUDA only.
for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
    module = types.ModuleType(name)
    module.__path__ = []
    module.VisionDataset = module.to_tensor = object
    sys.modules[name] = module

import yaml  # noqa: E402
from asked import main  # noqa: E402
from streaming import MDSWriter, Stream, StreamingDataset  # noqa: E402


def write(request):
    """Writes each domain as MDS, one sample a row."""
    for path, rows in request["rows"].items():
        with MDSWriter(out=path, columns={"domain": "str", "number": "int"}, size_limit=4096) as writer:
            for number, domain in enumerate(rows):
                writer.write({"domain": domain, "number": number})


def draw(dataset):
    """Draws one epoch: how often each domain, the longest run of one domain, and how often each row."""
    domains, rows, longest, run, last = Counter(), Counter(), 0, 0, None
    for row in dataset:
        domain = row["domain"]
        domains[domain] += 1
        rows[domain, int(row["number"])] += 1
        run = run + 1 if domain == last else 1
        longest, last = max(longest, run), domain
    most = {}
    for (domain, _), count in rows.items():
        most[domain] = max(most.get(domain, 0), count)
    return {"drawn": domains, "longest_run": longest, "most_often": most, "size": len(dataset)}


def mixture(request):
    """Imports the exported Python file and draws from its dataset."""
    spec = importlib.util.spec_from_file_location("exported", request["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answer = draw(module.build_dataset(batch_size=8, **request.get("settings", {})))
    return {**answer, "streams": module.STREAMS}


def foundry(request):
    """Builds the streams of a train_loader as LLM Foundry's build_streams does, and draws from them."""
    config = yaml.safe_load(Path(request["file"]).read_text(encoding="utf-8"))["train_loader"]["dataset"]
    streams = [Stream(**stream) for stream in config.pop("streams").values()]
    return draw(StreamingDataset(streams=streams, batch_size=8, **config))


def naive(request):
    """Draws from streams written by hand."""
    streams = [Stream(**stream) for stream in request["streams"]]
    dataset = StreamingDataset(streams=streams, batch_size=8, **request["settings"])
    answer = draw(dataset)
    return {**answer, "chosen": [int(stream.choose) for stream in dataset.streams]}


main({"write": write, "mixture": mixture, "foundry": foundry, "naive": naive})

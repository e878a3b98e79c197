"""Asks Megatron-Energon: prepares JSONL files as its command does, loads the metadataset and draws from it."""

import json
from collections import Counter

from asked import main
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    MetadatasetV2,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_train_dataset,
    stateless,
)
from megatron.energon.dataset_config import load_config
from megatron.energon.epathlib import EPath
from megatron.energon.tools.prepare import command as prepare


@edataclass
class Row(Sample):
    """A row, of which only its domain is kept."""

    domain: str


@stateless
def cook(sample):
    """Makes a row of what a JSONL file holds."""
    return Row(**basic_sample_keys(sample), domain=sample["json"]["domain"])


class Rows(DefaultTaskEncoder):
    """Rows one by one."""

    cookers = (Cooker(cook),)


def parse(request):
    """What it makes of the file: paths as it resolves them, and weights."""
    path = EPath(request["path"])
    metadataset = load_config(path, default_type=MetadatasetV2, default_kwargs={"path": path})
    blend = metadataset.splits["train"].blend
    for reference in blend:
        reference._resolve_path(path)
    return [[str(reference.path), reference.weight] for reference in blend]


def draw(request):
    """Counts the samples of each domain."""
    for path in request["prepare"]:
        prepare.main([path, "--non-interactive", "--no-progress"], standalone_mode=False)
    dataset = get_train_dataset(
        request["path"],
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Rows(),
    )
    return count(dataset, request["num_samples"])


def count(dataset, num_samples):
    """Draws as a worker does."""
    counts = Counter()
    worker = dataset.worker_config
    worker.worker_activate(0)
    try:
        for sample in dataset:
            counts[sample.domain] += 1
            if sum(counts.values()) == num_samples:
                break
    finally:
        worker.worker_deactivate()
    return counts


def probabilities(request):
    """How often its generator draws each of two weights, in float32 as it adds them."""
    import torch
    from megatron.energon.rng import WorkerRng

    worker = WorkerConfig(rank=0, world_size=1, num_workers=0)
    worker.worker_activate(0)
    generator = WorkerRng(worker)
    weights = torch.tensor(request["weights"], dtype=torch.float32)
    drawn = Counter(generator.choice_idx(weights) for _ in range(request["num_samples"]))
    return [json.loads(json.dumps(torch.cumsum(weights, 0).tolist())), [drawn[i] for i in range(len(weights))]]


main({"parse": parse, "draw": draw, "probabilities": probabilities})

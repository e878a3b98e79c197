"""Asks Megatron-Core: its own parser of blends, and its own builder of blended datasets on files made here."""

import json
from pathlib import Path

import numpy
import torch
from asked import main
from megatron.core.datasets import helpers_cpp
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import get_blend_from_list, normalize

SEQUENCE_LENGTH = 8


class Tokenizer:
    """Only what GPTDataset asks for."""

    eod = 0
    vocab_size = 1000

    def __init__(self):
        self.unique_identifiers = {"class": "none"}


def write_prefix(prefix, token, num_documents):
    """Writes documents of nine tokens, all the same, so that a sample says where it is from."""
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for _ in range(num_documents):
        builder.add_document(torch.full((SEQUENCE_LENGTH + 1,), token, dtype=torch.int32), [SEQUENCE_LENGTH + 1])
    builder.finalize(f"{prefix}.idx")


def arguments_file(path):
    """What megatron.training does with --data-args-path; that layer is in later packages (0.19.2)."""
    return get_blend_from_list(Path(path).read_text().split())


def per_split_file(path):
    """What megatron.training does with --per-split-data-args-path."""
    splits = json.loads(Path(path).read_text())
    for split in ("train", "valid", "test"):
        if isinstance(splits[split], str):
            splits[split] = splits[split].split()
    return [get_blend_from_list(splits[split]) for split in ("train", "valid", "test")]


def draw(num_samples, surplus, **blend):
    """Builds the datasets of a run and counts the samples of the training split by the token that they hold."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQUENCE_LENGTH,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=surplus,
        **blend,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config)
    train = builder.build()[0]
    counts = {}
    for index in range(num_samples):
        token = int(train[index]["tokens"][0])
        counts[token] = counts.get(token, 0) + 1
    return counts


def schedule(weights, num_samples):
    """The compiled schedule alone: samples of each dataset."""
    weights = normalize(weights)
    dataset_index = numpy.zeros(num_samples, dtype=numpy.int16)
    sample_index = numpy.zeros(num_samples, dtype=numpy.int64)
    helpers_cpp.build_blending_indices(dataset_index, sample_index, weights, len(weights), num_samples, False)
    return numpy.bincount(dataset_index, minlength=len(weights)).tolist()


def run(job):
    """Does one job: its key says how the blend is given."""
    for number, (prefix, num_documents) in enumerate(job.get("write", {}).items(), start=1):
        write_prefix(prefix, number, num_documents)
    num_samples, surplus = job.get("num_samples", 0), job.get("surplus", 0.005)
    if job["how"] == "schedule":
        return schedule(job["weights"], num_samples)
    if job["how"] == "per-split":
        blends = per_split_file(job["path"])
        return (
            {"parsed": blends, "drawn": draw(num_samples, surplus, blend_per_split=blends)} if num_samples else blends
        )
    if job["how"] == "arguments":
        blend = arguments_file(job["path"])
    elif job["how"] == "zipped":
        blend = get_blend_from_list(job["zipped"])
    else:
        blend = tuple(job["blend"])
    return {"parsed": blend, "drawn": draw(num_samples, surplus, blend=blend, split="1,0,0")} if num_samples else blend


def jobs(request):
    """Does several jobs in one process, because the import takes seconds; a failure is an answer."""
    answers = []
    for job in request["jobs"]:
        try:
            answers.append(run(job))
        except (AssertionError, KeyError, IndexError, ValueError, OSError) as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    return answers


main({"jobs": jobs})

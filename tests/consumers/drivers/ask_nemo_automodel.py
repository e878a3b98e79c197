"""Asks NeMo-Automodel: its loader of configurations, its datasets on files made here, its objective and its loss."""

from pathlib import Path

import numpy
import torch
from asked import main
from nemo_automodel.components.config.loader import ConfigNode, load_yaml_config
from nemo_automodel.components.datasets.llm.megatron.indexed_dataset import IndexedDatasetBuilder
from nemo_automodel.components.datasets.llm.megatron.megatron_utils import get_blend_from_list
from nemo_automodel.components.datasets.loader import DatasetBuildSchedule, make_dataset_config
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.recipes._typed_config import RecipeConfig

SEQUENCE_LENGTH = 8


class Tokenizer:
    """Only what its GPTDataset asks for."""

    name_or_path = "none"
    pad_token_id = 1
    eos_token_id = 0


def read(path):
    """Returns the objective as the recipe builds it, and the configuration of the dataset."""
    raw = load_yaml_config(path)
    node = raw.dataset.to_dict()
    config = make_dataset_config(node.pop("_target_"), node | {"seq_length": SEQUENCE_LENGTH})
    mixture = RecipeConfig(raw).domain_mixture
    return mixture.build(blend=get_blend_from_list(list(config.paths["train"]))), config


def parse(request):
    """What it makes of the file."""
    mixture, _ = read(request["path"])
    return {
        "names": mixture.names,
        "paths": mixture.paths,
        "sampling": mixture.sampling_weights,
        "objective": mixture.objective_weights,
        "multipliers": mixture.loss_multipliers,
    }


def draw(request):
    """Draws samples from documents of one token each, and sums the weighted loss by domain."""
    for number, (prefix, num_documents) in enumerate(request["write"].items(), start=2):
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
        for _ in range(num_documents):
            document = torch.full((SEQUENCE_LENGTH + 1,), number, dtype=torch.int32)
            builder.add_document(document, [SEQUENCE_LENGTH + 1])
        builder.finalize(f"{prefix}.idx")
    mixture, config = read(request["path"])
    schedule = DatasetBuildSchedule(
        local_batch_size=1, global_batch_size=1, max_steps=request["num_samples"], val_check_interval=None
    )
    dataset = config.build(tokenizer=Tokenizer(), training_schedule=schedule)
    counts = [0] * len(mixture.names)
    losses = [0.0] * len(mixture.names)
    loss = MaskedCrossEntropy()
    for index in range(request["num_samples"]):
        sample = dataset[index]
        domain = int(sample["dataset_id"])
        labels = torch.as_tensor(sample["labels"]).reshape(1, -1).long()
        assert set(labels.flatten().tolist()) <= {domain + 2, -100}, (domain, labels)
        counts[domain] += 1
        ids = torch.tensor([domain])
        logits = torch.zeros(1, labels.shape[1], 16)
        losses[domain] += float(loss(logits, labels, loss_weights=mixture.loss_weights(ids, labels)))
    return {
        "drawn": dict(zip(mixture.names, counts, strict=True)),
        "losses": dict(zip(mixture.names, losses, strict=True)),
    }


def translate(request):
    """What the loader makes of strings, or the name of the error."""
    answers = []
    for text in request["texts"]:
        try:
            answers.append(ConfigNode({"name": text}).name == text)
        except KeyError:
            answers.append(False)
    return answers


main({"parse": parse, "draw": draw, "translate": translate})

"""Asks Oumi: its own config reads our file, and its own builder makes the mixture.

The builders of trainers and callbacks are left out: they import the services that training reports to.
"""
# ruff: noqa: E402, because what is absent must be so before the imports

import json
import os
import sys
import types
from collections import Counter
from pathlib import Path

os.environ["HF_DATASETS_CACHE"] = str(Path("cache").resolve())
os.environ["HF_HUB_OFFLINE"] = "1"


class _Absent(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


sys.modules.update({name: _Absent(name) for name in ("oumi.builders.training", "oumi.builders.callbacks")})

import datasets
from asked import main
from oumi.builders.data import build_dataset_mixture
from oumi.core.configs import DatasetSplit, TrainingConfig

datasets.disable_progress_bars()


def _mixture(file):
    # As ``oumi train -c FILE --model.model_name MODEL`` reads it.
    config = TrainingConfig.from_yaml_and_arg_list(file, ["model.model_name=some/model"])
    config.data.finalize_and_validate()
    entries = config.data.train.datasets
    for entry in entries:
        # Rows as conversations, for which no tokenizer is needed.
        entry.dataset_kwargs["return_conversations"] = True
    rows = build_dataset_mixture(config.data, None, DatasetSplit.TRAIN)
    drawn = [json.loads(text)["messages"] for text in rows["conversation_json"]]
    number_of = Counter((messages[1]["content"], messages[0]["content"]) for messages in drawn)
    most_often = {}
    for (domain, _), times in number_of.items():
        most_often[domain] = max(times, most_often.get(domain, 0))
    return {
        "paths": [entry.dataset_path for entry in entries],
        "counts": [entry.sample_count for entry in entries],
        "shares": [entry.mixture_proportion for entry in entries],
        "drawn": Counter(messages[1]["content"] for messages in drawn),
        "most_often": most_often,
    }


def mixtures(request):
    """Builds each config; an exception is an answer as well."""
    answers = []
    for file in request["files"]:
        try:
            answers.append(_mixture(file))
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


if __name__ == "__main__":
    main({"mixtures": mixtures})

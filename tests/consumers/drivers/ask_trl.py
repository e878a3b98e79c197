"""Asks TRL: its own parser reads a config, and its own code loads the mixture."""

import os
from collections import Counter
from pathlib import Path

os.environ["HF_DATASETS_CACHE"] = str(Path("cache").resolve())
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
from asked import main
from trl import DatasetMixtureConfig, TrlParser, get_dataset

datasets.disable_progress_bars()


def _mixture(file):
    [config] = TrlParser((DatasetMixtureConfig,)).parse_args_and_config(["--config", file])
    rows = get_dataset(config)["train"]
    number_of = Counter(zip(rows["domain"], rows["instruction"], strict=True))
    most_often = {}
    for (domain, _), times in number_of.items():
        most_often[domain] = max(times, most_often.get(domain, 0))
    return {
        "fractions": [entry.fraction for entry in config.datasets],
        "drawn": Counter(rows["domain"]),
        "most_often": most_often,
    }


def mixtures(request):
    """Loads each config; an exception is an answer as well."""
    answers = []
    for file in request["files"]:
        try:
            answers.append(_mixture(file))
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


if __name__ == "__main__":
    main({"mixtures": mixtures})

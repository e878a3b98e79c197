"""Asks axolotl: it validates a config with what an export adds, loads and merges the rows, and we count them."""

import contextlib
import os
from collections import Counter
from pathlib import Path

os.environ["HF_DATASETS_CACHE"] = str(Path("cache").resolve())
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"

import datasets
import yaml
from asked import main
from axolotl.utils.config import validate_config
from axolotl.utils.data.sft import _load_raw_datasets
from axolotl.utils.dict import DictDefault

datasets.disable_progress_bars()

REST = {"base_model": "x", "micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-5}


def draw(file):
    """Reads a config as ``axolotl train`` does, and merges its datasets without making tokens of them."""
    with contextlib.chdir(Path(file).parent):
        config = DictDefault(yaml.safe_load(Path(file).read_text("utf-8")))
        config = validate_config(DictDefault({**REST, **config}))
        config.skip_prepare_dataset = True
        # None is the tokenizer, which nothing asks for.
        rows, _ = _load_raw_datasets(config, config.datasets, None, "train")
    number_of = Counter(zip(rows["domain"], rows["instruction"], strict=True))
    drawn = Counter(rows["domain"])
    most_often = {domain: max(times for (of, _), times in number_of.items() if of == domain) for domain in drawn}
    first = rows["domain"][:50]
    return {"drawn": drawn, "most_often": most_often, "first": Counter(first)}


def several(request):
    """Answers several asks; what raises is answered by its type and text."""
    answers = []
    for ask in request["asks"]:
        try:
            answers.append(draw(**ask))
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


main({"several": several})

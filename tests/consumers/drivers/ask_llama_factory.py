"""Asks LLaMA-Factory: it parses what an export says, builds the mixed training set, and we count its rows."""
# ruff: noqa: E402, because the stub must be there before the imports

import contextlib
import os
import signal
import sys
import types
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest import mock

os.environ["HF_DATASETS_CACHE"] = str(Path("cache").resolve())
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DISABLE_VERSION_CHECK"] = "1"  # of packages that have no part in this
sys.modules["torchaudio"] = types.ModuleType("torchaudio")  # imported, but used for sound only
sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

import datasets
import transformers
from asked import main
from llamafactory.data.loader import _get_merged_dataset
from llamafactory.hparams.parser import _parse_train_args
from llamafactory.v1.config.arg_parser import get_args
from llamafactory.v1.core.data_engine import DataEngine

datasets.disable_progress_bars()


def _count(rows):
    number_of = Counter(rows)
    most_often = {}
    for (domain, _), times in number_of.items():
        most_often[domain] = max(times, most_often.get(domain, 0))
    return {"drawn": Counter(domain for domain, _ in rows), "most_often": most_often}


def _arguments(*arguments):
    return mock.patch.object(sys, "argv", ["llamafactory-cli", *arguments])


def draw(file, usage):
    """Parses as ``llamafactory-cli train`` does, and mixes; a row says in its prompt where it comes from."""
    command = [word for word in usage.split() if not word.startswith("do_train")]
    with contextlib.chdir(Path(file).parent), _arguments(file, *command[3:]):
        model, data, training, finetuning, _ = _parse_train_args()
        transformers.set_seed(training.seed)
        rows = _get_merged_dataset(data.dataset, model, data, training, finetuning.stage)
    prompts = [prompt[0]["content"].split("\n") for prompt in rows["_prompt"]]
    return _count([(prompt.removeprefix("From "), number) for prompt, number in prompts]) | {"names": data.dataset}


def draw_v1(file, usage):
    """Parses as ``USE_V1=1 llamafactory-cli sft`` does, and builds the index of rows."""
    with contextlib.chdir(Path(file).parent):
        Path("TRAINING.yaml").write_text("seed: 1\n", encoding="utf-8")
        with _arguments(*usage.split()[3:]):
            _, data, *_ = get_args()
        engine = DataEngine(data.train_dataset)
        converted = engine[0]
    assert converted["messages"][0]["role"] == "user"
    rows = [(engine.datasets[name][row]["instruction"], row) for name, row in engine.data_index]
    return _count([(prompt.removeprefix("From "), row) for prompt, row in rows])


def _late(*_):
    raise TimeoutError("it does not end")


def several(request):
    """Answers several asks; what raises is answered by its type and text."""
    signal.signal(signal.SIGALRM, _late)
    answers = []
    for ask in request["asks"]:
        task = {"draw": draw, "draw_v1": draw_v1}[ask.pop("task")]
        signal.alarm(ask.pop("seconds", 0))
        try:
            answers.append(task(**ask))
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
        signal.alarm(0)
    return answers


main({"several": several})

"""Asks the datasets library: it builds what an export says, and counts the rows by their domain."""

import contextlib
import importlib.util
import json
import os
import signal
from collections import Counter
from pathlib import Path

os.environ["HF_DATASETS_CACHE"] = str(Path("cache").resolve())
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
from asked import main
from datasets import concatenate_datasets, interleave_datasets, load_dataset

datasets.disable_progress_bars()


def _count(rows):
    number_of = Counter(zip(rows["domain"], rows["instruction"], strict=True))
    most_often = {}
    for (domain, _), times in number_of.items():
        most_often[domain] = max(times, most_often.get(domain, 0))
    return {"drawn": Counter(rows["domain"]), "most_often": most_often}


def python(file, columns=None):
    """Imports the file and builds."""
    spec = importlib.util.spec_from_file_location("mixture", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _count(module.build(columns))


def usage(file, line):
    """Runs the line of usage as it stands, in the folder of the file."""
    scope = {
        "json": json,
        "load_dataset": load_dataset,
        "interleave_datasets": interleave_datasets,
        "concatenate_datasets": concatenate_datasets,
    }
    with contextlib.chdir(Path(file).parent):
        exec(line, scope)
    return _count(scope["rows"])


def interleave(paths, arguments):
    """Interleaves files with whatever it is told; gives up after two seconds."""
    parts = [load_dataset("json", data_files=[path], split="train") for path in paths]
    signal.alarm(2)
    rows = interleave_datasets(parts, seed=0, **arguments)
    signal.alarm(0)
    return _count(rows)


def load(arguments):
    """Loads with whatever arguments, and counts."""
    return Counter(load_dataset(**arguments)["domain"])


def _give_up(number, frame):
    raise TimeoutError("it does not end")


def several(request):
    """Runs tasks one after another; an exception is an answer as well."""
    signal.signal(signal.SIGALRM, _give_up)
    answers = []
    for ask in request["asks"]:
        task = {"python": python, "usage": usage, "interleave": interleave, "load": load}[ask.pop("task")]
        try:
            answers.append(task(**ask))
        except Exception as error:
            signal.alarm(0)
            answers.append(f"{type(error).__name__}: {error}")
    return answers


if __name__ == "__main__":
    main({"several": several})

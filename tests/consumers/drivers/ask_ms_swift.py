"""Asks ms-swift: it makes arguments of a YAML, loads the mixed training set, and we count its rows."""

import contextlib
import os
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ["MODELSCOPE_CACHE"] = str(Path("cache").resolve())
os.environ["HF_DATASETS_CACHE"] = str(Path("cache").resolve())
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
from asked import main
from swift.arguments.base_args.base_args import BaseArguments
from swift.arguments.base_args.data_args import DataArguments
from swift.cli.main import parse_yaml_args
from swift.utils import parse_args

datasets.disable_progress_bars()


@dataclass
class Arguments(DataArguments):
    """The arguments for data, without those that need a model."""

    model: str = ""
    use_hf: bool = True
    hub_token: str = ""
    load_dataset = BaseArguments.load_dataset


def draw(file, usage):
    """Parses as ``swift sft`` does, and loads; a row says from which path it comes and in its first message which."""
    arguments = usage.split()[2:]
    with contextlib.chdir(Path(file).parent), mock.patch.dict(os.environ):
        parse_yaml_args(arguments)
        parsed, rest = parse_args(Arguments, arguments)
        assert not rest, rest
        rows, _ = parsed.load_dataset()
    drawn, number_of, last = Counter(), Counter(), {}
    for row in rows:
        path, number = row["dataset"], int(row["messages"][0]["content"].strip("Say ."))
        drawn[path] += 1
        number_of[path, number] += 1
        last[path] = max(number, last.get(path, 0))
    most_often = {path: max(times for (of, _), times in number_of.items() if of == path) for path in drawn}
    return {"drawn": drawn, "most_often": most_often, "last": last}


def _late(*_):
    raise TimeoutError("it does not end")


def several(request):
    """Answers several asks; what raises is answered by its type and text."""
    signal.signal(signal.SIGALRM, _late)
    answers = []
    for ask in request["asks"]:
        signal.alarm(ask.pop("seconds", 0))
        try:
            answers.append(draw(**ask))
        except (Exception, SystemExit) as error:
            answers.append(f"{type(error).__name__}: {error}")
        signal.alarm(0)
    return answers


main({"several": several})

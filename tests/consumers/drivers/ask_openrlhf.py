"""Asks OpenRLHF: a shell runs our command, the trainer's own parser reads it, and its own code blends the files.

The package cannot be imported without a GPU's libraries, so that its files are loaded one by one.
"""

import ast
import importlib.util
import os
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_DATASETS_CACHE"] = str(Path("cache").resolve())
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
from asked import main

datasets.disable_progress_bars()
PACKAGE = Path(sysconfig.get_paths()["purelib"]) / "openrlhf"


def _parser(trainer):
    """Builds the parser of a trainer: the lines of its script that say what options there are."""
    tree = ast.parse((PACKAGE / "cli" / f"{trainer}.py").read_text(encoding="utf-8"))
    script = next(node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))
    lines = [line for line in script.body if ast.unparse(line).startswith(("parser =", "parser.add_argument"))]
    scope = {}
    exec("import argparse\nfrom datetime import datetime", scope)
    exec(compile(ast.Module(lines, []), trainer, "exec"), scope)
    return scope["parser"]


def _arguments(folder, command):
    """Runs a command in a shell, with a deepspeed that only says what it was given."""
    binaries = Path("bin")
    binaries.mkdir(exist_ok=True)
    (binaries / "deepspeed").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    (binaries / "deepspeed").chmod(0o755)
    path = f"{binaries.resolve()}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, check=True, cwd=folder, env={**os.environ, "PATH": path}
    )
    return done.stdout.decode().split("\0")[:-1]


def _blend(paths, probabilities, max_samples):
    spec = importlib.util.spec_from_file_location("utils", PACKAGE / "datasets" / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    strategy = SimpleNamespace(print=lambda text: None, is_rank_0=lambda: False, args=SimpleNamespace(use_ms=False))
    rows = utils.blending_datasets(paths, probabilities, strategy, 42, max_count=max_samples, dataset_split="train")
    # As the trainers do it with the result.
    return rows.select(range(min(max_samples, len(rows))))


def train(request):
    """What train_sft would train on after our command."""
    module, name, *options = _arguments(Path(request["file"]).parent, request["command"])
    assert (module, name) == ("--module", "openrlhf.cli.train_sft")
    known = vars(_parser("train_sft").parse_args(options))
    rows = _blend(known["data.dataset"], known["data.dataset_probs"], known["data.max_samples"])
    return {"drawn": Counter(rows["domain"]), "probabilities": known["data.dataset_probs"]}


def options(request):
    """The options of train_ppo_ray that take the same values."""
    wanted = ["--data.prompt_dataset", "--data.prompt_probs", "--data.max_samples"]
    return [option for option in wanted if option in _parser("train_ppo_ray")._option_string_actions]


def blend(request):
    """Blends whatever it is told."""
    rows = _blend(request["paths"], request["probabilities"], request.get("max_samples", 10**8))
    return {"drawn": Counter(rows["domain"])}


if __name__ == "__main__":
    main({"train": train, "options": options, "blend": blend})

"""Shared fixtures: a small corpus, a model that trains in a second, and where real data may lie."""

import json
import os
import random
import shutil
from pathlib import Path

# Tests run side by side; more threads than cores make everything slower, and one thread makes sums repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

WORDS = {
    "fruit": ["apple", "pear", "plum", "fig", "lemon", "cherry", "grape", "melon", "quince", "date"],
    "metal": ["iron", "gold", "zinc", "lead", "copper", "tin", "nickel", "silver", "cobalt", "chrome"],
    "水": "江河湖海溪泉雨雪冰云",
}


def make_rows(name, num_rows, seed=0):
    """Rows of one domain: lists of its own words in a noisy cycle."""
    rng = random.Random(f"{name}-{seed}")
    words = WORDS[name]
    rows = []
    for number in range(num_rows):
        start = rng.randrange(len(words))
        answer = [words[(start + i + (rng.random() < 0.1)) % len(words)] for i in range(rng.randint(5, 15))]
        rows.append(
            {"instruction": f"Continue the list number {number} of {name}.", "input": "", "output": " ".join(answer)}
        )
    return rows


def read_log(path):
    """Reads a log of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of three domains of unequal size."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, num_rows in (("fruit", 120), ("metal", 60), ("水", 30)):
        (folder / f"{name}.json").write_text(json.dumps(make_rows(name, num_rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def model_config(tmp_path_factory):
    """A Hugging Face config of a model that trains in a second."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "vocab_size": 300,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_settings(model_config):
    """Settings under which the whole pipeline takes a few seconds."""
    return {
        "tokenize": {"vocab_size": 400, "context_length": 64},
        "reference": {"model": str(model_config), "steps": 12, "batch_size": 6, "learning_rate": 0.01},
        "proxy": {"method": "doremi", "checkpoint_every": 5},
    }


@pytest.fixture(scope="session")
def finished_run(corpus, small_settings, tmp_path_factory):
    """A finished run with a mixture; read only."""
    from doremi_mix import learn

    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    learn(corpus, run_dir, token_budget=5000, quiet=True, **small_settings)
    return run_dir


@pytest.fixture(scope="session")
def shared_data():
    """Real data, where a checkout has it beside it."""
    root = Path(os.environ.get("DOREMI_MIX_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
    if not root.is_dir():
        pytest.skip("the real data are not beside this checkout (set DOREMI_MIX_SHARED)")
    return root


@pytest.fixture(scope="session")
def main_model(tmp_path_factory):
    """A folder with a small random Baichuan2 in Llama layout, with its tokenizer: the main model of a fine-tune."""
    from tiny_baichuan import write_tiny_baichuan

    from doremi_mix.baichuan.convert import convert

    folder = tmp_path_factory.mktemp("main")
    convert(write_tiny_baichuan(folder / "original"), folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def finetune_settings(corpus, small_settings, main_model):
    """Settings of a run that ends in a fine-tune of ``main_model``."""
    files = [{"path": str(corpus / f"{name}.json")} for name in ("fruit", "metal", "水")]
    return {
        **small_settings,
        "sources": files,
        "tokenize": {"tokenizer": str(main_model), "context_length": 64, "max_example_tokens": 96},
        "mixture": {"token_budget": 6_000},
        "finetune": {"model": str(main_model), "batch_size": 8, "learning_rate": 0.02, "checkpoint_every": 5},
        "evaluate": {"held_out_examples": 4},
    }


@pytest.fixture(scope="session")
def drawn(finetune_settings, tmp_path_factory):
    """A run with a mixture and nothing trained on it yet; read only."""
    from doremi_mix.pipeline import open_run
    from doremi_mix.stages import run_pipeline

    run_dir = tmp_path_factory.mktemp("drawn") / "run"
    with open_run(run_dir, {**finetune_settings, "finetune": {}}, quiet=True) as opened:
        run_pipeline(opened.config, opened.run, opened.narrator, opened.processes)
    return run_dir


@pytest.fixture(scope="session")
def tuned(drawn, finetune_settings, tmp_path_factory):
    """The folder of stage finetune of a run that has come so far; read only."""
    return finetune(drawn, tmp_path_factory.mktemp("tuned") / "run", finetune_settings)


def changed(settings, **given):
    """Settings with others of the fine-tune."""
    return {**settings, "finetune": {**settings["finetune"], **given}}


def finetune(drawn, folder, settings, stage="finetune"):
    """Runs a stage of a copy of a run; returns the stage's folder."""
    from doremi_mix.pipeline import open_run
    from doremi_mix.stages import run_alone, stage_named

    if not folder.exists():
        shutil.copytree(drawn, folder)
    with open_run(folder, settings, quiet=True, needs_sources=False) as opened:
        run_alone(stage_named(stage), opened.config, opened.run, opened.narrator, opened.processes)
    return folder / stage

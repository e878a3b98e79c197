"""Stage evaluate: held-out losses of base and tuned model, benchmarks, the contest's score, resume."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import finetune
from local_tasks import write_local_tasks

from doremi_mix.errors import ConfigError
from doremi_mix.pipeline import open_run
from doremi_mix.stages.load import read_examples
from doremi_mix.store import TokenStore
from doremi_mix.tokenizer import load_tokenizer
from doremi_mix.tokens import CONTEST_TEMPLATE, encode_examples, truncate


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def evaluated(tuned, finetune_settings, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    return finetune(tuned.parent, run_dir, {**finetune_settings, "evaluate": {"held_out_examples": 500}}, "evaluate")


def test_held_out_losses_by_another_way(evaluated, main_model):
    """transformers and peft, one example at a time, over the rows that were held out of training."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = evaluated.parent
    store, tokenizer = TokenStore(run / "tokenize"), load_tokenizer(str(main_model))
    metrics = metrics_of(evaluated)
    base = AutoModelForCausalLM.from_pretrained(main_model)
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        model = PeftModel.from_pretrained(base, str(run / "finetune" / "adapter")).eval()
    for domain_id, name in enumerate(store.domains):
        documents = store.document_ids(domain_id)
        held_out = store.example_held_out[documents.start : documents.stop]
        examples = [example for chunk in read_examples(run / "load", name) for example in chunk]
        mine = [example for example, held in zip(examples, held_out, strict=True) if held]
        assert len(mine) == metrics["held_out_loss"][name]["num_examples"] > 0
        encoded = truncate(encode_examples(mine, tokenizer, CONTEST_TEMPLATE), 96)
        sums = {"base": [], "tuned": []}
        counts = []
        for start, end in zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True):
            ids = torch.from_numpy(encoded.token_ids[start:end].astype(np.int64))
            mask = torch.from_numpy(encoded.loss_mask[start:end].astype(bool))[1:]
            with torch.no_grad():
                for whose, values in sums.items():
                    with model.disable_adapter() if whose == "base" else contextlib.nullcontext():
                        logits = model(ids[None]).logits[0]
                    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
                    values.append(float(losses[mask].sum()))
            counts.append(int(mask.sum()))
        row = metrics["held_out_loss"][name]
        assert row["num_tokens"] == sum(counts)
        for whose, values in sums.items():
            assert row[whose] == pytest.approx(sum(values) / sum(counts), rel=1e-5)
        assert row["difference"] == pytest.approx(row["tuned"] - row["base"], abs=1e-9)
    rows = list(metrics["held_out_loss"].values())
    average = metrics["held_out_loss_average"]
    assert average["difference"] == pytest.approx(math.fsum(row["difference"] for row in rows) / 3)
    # It was trained on these domains, and learned something.
    assert average["difference"] < -5 * average["standard_error"] < 0


def test_nothing_that_is_held_out_was_trained_on(evaluated):
    run = evaluated.parent
    store = TokenStore(run / "tokenize")
    for domain_id, row in np.load(run / "mixture" / "rows.npy"):
        assert not store.example_held_out[store.document_ids(int(domain_id)).start + int(row)]


def test_fewer_examples_are_the_same_ones_each_time(evaluated, finetune_settings, tmp_path):
    folders = [
        finetune(
            evaluated.parent, tmp_path / str(i), {**finetune_settings, "evaluate": {"held_out_examples": 2}}, "evaluate"
        )
        for i in range(2)
    ]
    first, second = map(metrics_of, folders)
    assert first == second
    assert {row["num_examples"] for row in first["held_out_loss"].values()} <= {1, 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"held_out_examples": 0},
            "evaluate has nothing to do: evaluate.tasks is empty and evaluate.held_out_examples is 0; give one of them",
        ),
        (
            {"tasks": ["contest", "gsm8k"]},
            "evaluate.tasks: contest stands for its seven tasks; give it alone, or tasks by name",
        ),
        (
            {"tasks": ["gsm8k"], "semi_final_task_folder": "."},
            "evaluate.semi_final_task_folder is for evaluate.tasks=contest; leave it out",
        ),
        (
            {"tasks": ["contest"], "semi_final_task_folder": ".", "base_scores": "published"},
            "evaluate.base_scores is published, but scores were published for the contest's preliminary items only; "
            "set it to measured, or evaluate.tasks to contest without semi_final_task_folder",
        ),
    ],
)
def test_wrong_settings(finetune_settings, tmp_path, monkeypatch, given, message):
    monkeypatch.setattr("doremi_mix.checks.find_spec", lambda name: object())
    with (
        pytest.raises(ConfigError) as caught,
        open_run(tmp_path / "run", {**finetune_settings, "evaluate": given}, quiet=True),
    ):
        pass
    assert str(caught.value) == message


def run_command(*arguments):
    command = [sys.executable, "-W", "ignore", "-m", "doremi_mix", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_the_contest_from_local_tasks(tuned, tmp_path):
    """Two rounds of the seven tasks through lm-eval itself, stopped in between, to the final score."""
    pytest.importorskip("lm_eval", reason="the extra evaluate is not installed")
    run_dir = tmp_path / "run"
    shutil.copytree(tuned.parent, run_dir)
    write_local_tasks(tmp_path / "preliminary")
    write_local_tasks(tmp_path / "semi_final", num_items=5)
    shots = json.dumps({"arc_challenge": 2, "hellaswag": 2, "mmlu": 2, "cmmlu": 2, "gsm8k": 2})
    arguments = [
        "evaluate", "--run-dir", run_dir, "--set", "evaluate.tasks=contest", "--set", f"evaluate.num_fewshot={shots}",
        "--set", f"evaluate.task_folder={tmp_path / 'preliminary'}", "--set", "evaluate.limit=2",
        "--set", f"evaluate.semi_final_task_folder={tmp_path / 'semi_final'}", "--json",
    ]  # fmt: skip
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert [row["task"] for row in metrics["benchmarks"]["preliminary"]["tasks"]] == [
        *("arc_challenge", "hellaswag", "truthfulqa_mc2", "mmlu", "cmmlu", "gsm8k", "scrolls_summscreenfd"),
    ]
    for scores in metrics["benchmarks"].values():
        for row in scores["tasks"]:
            ratio = None if row["base"]["score"] == 0 else row["tuned"]["score"] / row["base"]["score"]
            assert row["ratio"] == (None if ratio is None else pytest.approx(ratio))
        # A random model solves no problem of gsm8k, so there is no ratio to that, and this is said.
        assert (scores["contest"] is None) == any(row["ratio"] is None for row in scores["tasks"])
        assert (scores["contest"] is None) == (scores["why_no_contest"] is not None)
    assert metrics["tasks"]["preliminary"]["gsm8k"] == {
        "source": str(tmp_path / "preliminary" / "gsm8k.yaml"),
        "num_fewshot": 2,
    }
    # What was scored is not scored again.
    before = {path: path.read_bytes() for path in (run_dir / "task_scores").iterdir()}
    assert len(before) == 2 * 2 * 7
    (run_dir / "evaluate" / "manifest.json").unlink()
    (run_dir / "evaluate" / "metrics.json").unlink()
    gone = min((run_dir / "task_scores").glob("gsm8k-tuned-*.json"))
    gone.unlink()
    again = run_command(*arguments)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == metrics
    assert {path: path.read_bytes() for path in before} == before
    assert [line for line in again.stderr.splitlines() if "% of" in line] == [
        f"  gsm8k tuned: {json.loads(before[gone])['value']:.1f} % of 2 items"
    ]
    # Another adapter is compared with the base as it was scored.
    other = run_command("finetune", "--run-dir", run_dir, "--set", "finetune.learning_rate=0.01")
    assert other.returncode == 0, other.stderr
    # Python may have left its files beside the tasks' code by now; they are no other tasks.
    table = run_command("evaluate", "--run-dir", run_dir)
    assert [line.split(":")[0] for line in table.stderr.splitlines() if "% of" in line] == [
        f"  {task} tuned" for task in 2 * [row["task"] for row in metrics["benchmarks"]["preliminary"]["tasks"]]
    ]
    assert "Held-out loss, nats per token" in table.stdout
    assert "Benchmark scores, %, semi-final" in table.stdout


def test_a_wrong_setting_costs_nothing(evaluated, tmp_path):
    """Neither the evaluation that is there nor the settings of the run."""
    pytest.importorskip("lm_eval", reason="the extra evaluate is not installed")
    run_dir = tmp_path / "run"
    shutil.copytree(evaluated.parent, run_dir)
    before = {path: path.read_bytes() for path in (run_dir / "evaluate").iterdir()}
    write_local_tasks(tmp_path / "tasks")
    for settings, words in (
        (["evaluate.tasks=no_such_task"], "lm-eval has no task 'no_such_task'"),
        (["evaluate.tasks=gsm8k", f"evaluate.task_folder={tmp_path / 'tasks'}"], "gsm8k: its prompts need 5 worked"),
    ):
        failed = run_command("evaluate", "--run-dir", run_dir, *[x for s in settings for x in ("--set", s)])
        assert failed.returncode == 1
        assert words in failed.stderr
        assert {path: path.read_bytes() for path in (run_dir / "evaluate").iterdir()} == before
    again = run_command("evaluate", "--run-dir", run_dir)
    assert again.returncode == 0
    assert "evaluate: up to date" in again.stderr


def test_lm_eval_gets_a_model_that_asks_for_no_documents(tuned, finetune_settings, tmp_path, monkeypatch):
    """On a GPU, kernels that keep packed documents apart are chosen, and lm-eval has nothing to tell them."""
    pytest.importorskip("lm_eval", reason="the extra evaluate is not installed")
    import doremi_mix.stages.evaluate as stage

    def prepared(model, *arguments, **options):
        model = prepare_to_score(model, *arguments, **options)
        model.attention = "varlen"
        return model

    prepare_to_score = stage.prepare_to_score
    monkeypatch.setattr(stage, "prepare_to_score", prepared)
    write_local_tasks(tmp_path / "tasks")
    settings = {"held_out_examples": 0, "tasks": ["arc_challenge"], "task_folder": str(tmp_path / "tasks")}
    run_dir = tmp_path / "run"
    folder = finetune(
        tuned.parent, run_dir, {**finetune_settings, "evaluate": {**settings, "num_fewshot": 1, "limit": 2}}, "evaluate"
    )
    (row,) = metrics_of(folder)["benchmarks"]["preliminary"]["tasks"]
    assert row["tuned"]["num_items"] == 2


def test_published_base_scores(tuned, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra evaluate is not installed")
    run_dir = tmp_path / "run"
    shutil.copytree(tuned.parent, run_dir)
    write_local_tasks(tmp_path / "tasks")
    shots = json.dumps({"arc_challenge": 2, "hellaswag": 2, "mmlu": 2, "cmmlu": 2, "gsm8k": 2})
    done = run_command(
        "evaluate", "--run-dir", run_dir, "--set", "evaluate.tasks=contest", "--set", f"evaluate.num_fewshot={shots}",
        "--set", f"evaluate.task_folder={tmp_path / 'tasks'}", "--set", "evaluate.limit=2", "--json",
        "--set", "evaluate.base_scores=published",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)["benchmarks"]["preliminary"]
    assert [row["base"]["score"] for row in scores["tasks"]] == [40.0, 80.0, 47.973, 54.4098, 59.2946, 20.0, 2.7047]
    mean = math.fsum(row["tuned"]["score"] / row["base"]["score"] for row in scores["tasks"]) / 7
    assert scores["contest"]["mean_ratio"] == pytest.approx(mean)
    assert not list((run_dir / "task_scores").glob("*-base-*"))

"""Stage finetune: what is trained on what, what is written, resume, and what is refused."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import changed, finetune, make_rows, read_log

from doremi_mix.errors import ConfigError, DataError, DivergedError, ModelError
from doremi_mix.pipeline import open_run, resolve
from doremi_mix.run import RunDirectory
from doremi_mix.stages import run_pipeline, stage_states
from doremi_mix.stages.mixture import read_mixture
from doremi_mix.tokenizer import load_tokenizer
from doremi_mix.tokens import CONTEST_TEMPLATE, count_tokens

KILL_AT = Path(__file__).with_name("kill_at.py")
NEVER = ("SIGKILL", "doremi_mix.train:_flush", "1000000")


def test_it_trains_on_the_mixture_in_its_order_under_the_budget(tuned, main_model):
    run = tuned.parent
    allocation = json.loads((run / "mixture" / "allocation.json").read_text(encoding="utf-8"))
    metrics = json.loads((tuned / "metrics.json").read_text(encoding="utf-8"))
    examples = metrics["examples"]
    rows = read_log(run / "mixture" / "mixture.jsonl")
    assert examples["num_rows"] == examples["num_kept"] == len(rows)
    assert examples["num_tokens"] == sum(examples["tokens_by_domain"].values()) <= 6_000
    # Budget and training cut examples at the same length, so both count the same.
    assert examples["num_truncated"] > 0
    assert examples["num_tokens"] == allocation["drawn_tokens"]
    assert examples["tokens_by_domain"] == {
        name: domain["drawn_tokens"] for name, domain in allocation["domains"].items()
    }


@pytest.mark.parametrize("window", [7, 100_000])
def test_the_mixture_is_read_back_in_its_order(drawn, window):
    run = RunDirectory(drawn)
    written = read_log(drawn / "mixture" / "mixture.jsonl")
    names = list(json.loads((drawn / "mixture" / "allocation.json").read_text(encoding="utf-8"))["domains"])
    read = [
        (example, names[domain_id])
        for examples, domain_ids in read_mixture(run, drawn / "load", names, window)
        for example, domain_id in zip(examples, domain_ids, strict=True)
    ]
    assert [{**json.loads(example.row), "domain": name} for example, name in read] == written
    assert len({name for _, name in read}) == 3


def test_what_it_says_of_each_step(tuned):
    steps = read_log(tuned / "metrics.jsonl")
    domains = read_log(tuned / "domain_losses.jsonl")
    metrics = json.loads((tuned / "metrics.json").read_text(encoding="utf-8"))
    assert [step["step"] for step in steps] == list(range(1, metrics["num_steps"] + 1))
    assert metrics["num_steps"] == metrics["num_sequences"] * 3 // 8
    for step, by_domain in zip(steps, domains, strict=True):
        assert by_domain["step"] == step["step"]
        assert sum(by_domain["num_tokens"].values()) == step["num_tokens"]
        total = sum(by_domain["loss"][name] * by_domain["num_tokens"][name] for name in by_domain["loss"])
        assert total / step["num_tokens"] == pytest.approx(step["loss"], rel=1e-6)
    # Three epochs, warm-up, and a cosine down to nothing.
    rates = [step["learning_rate"] for step in steps]
    assert max(rates) == pytest.approx(0.02)
    assert rates[-1] < 0.02 * 0.01
    assert sum(step["loss"] for step in steps[-5:]) / 5 < steps[0]["loss"] - 0.3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_adapter_is_peft_s(tuned, main_model):
    """peft itself loads it, and it changes what the base says."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = json.loads((tuned / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16.0, 0.1)
    assert config["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    base = AutoModelForCausalLM.from_pretrained(main_model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, str(tuned / "adapter"))(ids).logits
    assert (before - after).abs().max() > 0.01


def test_packed_forms(drawn, finetune_settings, tmp_path):
    """Blocks are the contest's packing: whole blocks of a group's tokens; documents lose nothing."""
    blocks = finetune(drawn, tmp_path / "blocks", changed(finetune_settings, packing="blocks", epochs=1))
    metrics = json.loads((blocks / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["num_sequences"] * 96 == metrics["examples"]["num_tokens"]
    documents = finetune(
        drawn, tmp_path / "documents", changed(finetune_settings, preset="modern", max_example_tokens=512, epochs=1)
    )
    metrics = json.loads((documents / "metrics.json").read_text(encoding="utf-8"))
    config = json.loads((documents / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    examples = metrics["examples"]
    assert examples["num_tokens"] / 512 <= metrics["num_sequences"] <= (examples["num_rows"] + 1) // 2


def test_a_file_of_ones_own_in_its_order(drawn, finetune_settings, main_model, tmp_path):
    """The first rows that fill the budget, as an independent count has it; the rest is left out and counted."""
    rows = [
        *make_rows("fruit", 30, seed=5),
        {"instruction": "", "input": "", "output": "no question"},
        *make_rows("metal", 30, seed=5),
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = finetune(drawn, tmp_path / "run", changed(finetune_settings, data=str(path), token_budget=2_500, epochs=1))
    examples = json.loads((own / "metrics.json").read_text(encoding="utf-8"))["examples"]
    from doremi_mix.types import Example

    made = [Example(id=str(i), domain="own", **row, row="{}") for i, row in enumerate(rows) if row["instruction"]]
    costs = count_tokens(made, load_tokenizer(str(main_model)), CONTEST_TEMPLATE, 96).tolist()
    num_kept = max(n for n in range(len(costs) + 1) if sum(costs[:n]) <= 2_500)
    assert examples["num_kept"] == num_kept
    assert examples["num_tokens"] == sum(costs[:num_kept])
    assert examples["num_kept"] + sum(examples["skipped"].values()) == examples["num_rows"]
    assert examples["tokens_by_domain"] == {"own": sum(costs[:num_kept])}


def test_micro_batches_do_not_change_the_result_without_dropout(drawn, finetune_settings, tmp_path):
    """With dropout each micro-batch draws its own; without, the gradient is that of the whole batch."""
    whole = finetune(drawn, tmp_path / "whole", changed(finetune_settings, lora_dropout=0, epochs=1))
    parts = finetune(
        drawn, tmp_path / "parts", changed(finetune_settings, lora_dropout=0, epochs=1, micro_batch_size=3)
    )
    for one, other in zip(read_log(whole / "metrics.jsonl"), read_log(parts / "metrics.jsonl"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_gradient_checkpointing_gives_the_same_adapter(drawn, finetune_settings, tuned, tmp_path):
    """The recomputed block draws the same dropout again."""
    again = finetune(drawn, tmp_path / "run", changed(finetune_settings, gradient_checkpointing=True))
    # A setting that changes no result remakes nothing; so it is made in another run, to the same bytes.
    assert (again / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tuned / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("target", "count"), [("doremi_mix.train:_flush", 9), ("doremi_mix.stages.finetune:_write_metrics", 1)]
)
def test_killed_and_started_again_it_ends_with_the_same_adapter(
    drawn, tuned, finetune_settings, tmp_path, target, count
):
    shutil.copytree(drawn, tmp_path / "run")
    config = tmp_path / "finetune.json"
    config.write_text(json.dumps(finetune_settings), encoding="utf-8")

    def run(when):
        command = [sys.executable, str(KILL_AT), *when, "--", "finetune", "--run-dir", str(tmp_path / "run")]
        return subprocess.run(
            [*command, "--config", str(config)], capture_output=True, text=True, timeout=300, check=False
        )

    killed = run(("SIGKILL", target, str(count)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "finetune" / "manifest.json").exists()
    again = run(NEVER)
    assert again.returncode == 0, again.stderr
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "domain_losses.jsonl"):
        assert (tmp_path / "run" / "finetune" / name).read_bytes() == (tuned / name).read_bytes(), name
    assert sorted(path.name for path in (tmp_path / "run" / "finetune").iterdir()) == sorted(
        path.name for path in tuned.iterdir()
    )


def test_the_same_again_is_up_to_date_and_another_rate_is_not(tuned, finetune_settings):
    run = RunDirectory(tuned.parent)
    with open_run(run.path, finetune_settings, quiet=True, needs_sources=False) as opened:
        assert stage_states(opened.config, opened.run)["finetune"] == "finished"
    with open_run(run.path, changed(finetune_settings, learning_rate=0.01), quiet=True, needs_sources=False) as opened:
        assert stage_states(opened.config, opened.run)["finetune"] == "outdated"
    with open_run(run.path, finetune_settings, quiet=True, needs_sources=False):
        pass


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (
            {"model": "tiny"},
            ModelError,
            "finetune.model: tiny starts from random weights; give a trained checkpoint",
        ),
        (
            {"model": "no/such/model"},
            ModelError,
            "finetune.model: no/such/model does not exist, and is no hub name (owner/model); give the main model's "
            "folder",
        ),
        (
            {"data": "nowhere.jsonl"},
            ConfigError,
            "finetune.data: nowhere.jsonl does not exist; give a file of examples, or leave it out",
        ),
        (
            {"lora_target_modules": ["o_proj"], "lora_shared_input": True},
            ConfigError,
            "finetune.lora_shared_input is for q_proj, k_proj and v_proj, but finetune.lora_target_modules is o_proj; "
            "name the three, or set it to false",
        ),
        (
            {"lora_dropout": 1},
            ConfigError,
            "config: finetune.lora_dropout must be less than 1, got 1",
        ),
    ],
)
def test_wrong_settings_stop_a_run_before_it_starts(finetune_settings, tmp_path, given, kind, message):
    with pytest.raises(kind) as caught, open_run(tmp_path / "run", changed(finetune_settings, **given), quiet=True):
        pass
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_mixture_cannot_be_tuned(finetune_settings, tmp_path):
    without = {key: value for key, value in finetune_settings.items() if key != "mixture"}
    with pytest.raises(ConfigError) as caught, open_run(tmp_path / "run", without, quiet=True):
        pass
    assert str(caught.value) == (
        "finetune trains on the mixture, but mixture.token_budget is missing; give it, for example: "
        "--set mixture.token_budget=1000000, or finetune.data"
    )


def test_a_budget_below_the_first_example(drawn, finetune_settings, tmp_path):
    with pytest.raises(DataError) as caught:
        finetune(drawn, tmp_path / "run", changed(finetune_settings, token_budget=5))
    num_rows = len(read_log(drawn / "mixture" / "mixture.jsonl"))
    assert str(caught.value) == (
        f"no example to fine-tune on: expected at least 1 of {num_rows} rows, got 0 ({num_rows} over budget); "
        "give rows with a question and an answer, or a larger token budget"
    )


def test_blocks_longer_than_all_there_is(drawn, finetune_settings, tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text('{"instruction": "a", "input": "", "output": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        finetune(
            drawn,
            tmp_path / "run",
            changed(finetune_settings, packing="blocks", data=str(path), max_example_tokens=256),
        )
    assert str(caught.value) == (
        "no example to fine-tune on: expected at least 1 of 1 rows, got 0 (1 remainder of a group); a group of 1,000 "
        "rows must fill a block of 256 tokens: give more or longer rows, or choose another packing"
    )


def state_of(run_dir, settings):
    with open_run(run_dir, settings, quiet=True, needs_sources=False) as opened:
        return stage_states(opened.config, opened.run)["finetune"]


def test_a_run_outlives_its_main_model(drawn, finetune_settings, main_model, tmp_path):
    """A model that moved away after the training blocks nothing; another tokenizer in its folder is seen."""
    model = tmp_path / "model"
    shutil.copytree(main_model, model)
    settings = changed(finetune_settings, model=str(model), epochs=1)
    finetune(drawn, tmp_path / "run", settings)
    assert state_of(tmp_path / "run", settings) == "finished"
    (model / "special_tokens_map.json").write_text('{"eos_token": "<reserved_107>"}')
    assert state_of(tmp_path / "run", settings) == "outdated"
    model.rename(tmp_path / "elsewhere")
    assert state_of(tmp_path / "run", settings) == "finished"
    with pytest.raises(ModelError, match=r"^finetune\.model: .* does not exist, and is no hub name"):
        finetune(drawn, tmp_path / "run", changed(settings, epochs=2))


def test_stopped_while_it_tidies_up_it_can_go_on(drawn, tuned, finetune_settings, tmp_path, monkeypatch):
    """What is left of the encoded examples must not pass for all of them."""
    remove = shutil.rmtree

    def half(folder, **options):
        if folder.name != "examples":
            remove(folder, **options)
            return
        (folder / "tokens.bin").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            finetune(drawn, tmp_path / "run", finetune_settings)
    again = finetune(drawn, tmp_path / "run", finetune_settings)
    name = "adapter/adapter_model.safetensors"
    assert (again / name).read_bytes() == (tuned / name).read_bytes()
    assert not (again / "examples").exists()


def test_what_fails_leaves_the_adapter_that_was_there(tuned, finetune_settings, tmp_path):
    """A typo, data that are empty, a training that diverges: the earlier result stands until the next is complete."""
    shutil.copytree(tuned.parent, tmp_path / "run")
    path = tmp_path / "own.jsonl"
    path.write_text('{"instruction": "a", "input": "", "output": ""}\n' * 3, encoding="utf-8")
    before = {file: file.read_bytes() for file in (tmp_path / "run" / "finetune").rglob("*") if file.is_file()}
    for given, kind in (
        ({"data": str(path)}, DataError),
        ({"learning_rate": 1e30}, DivergedError),
        ({"max_example_tokens": 5_000}, ConfigError),
        ({"lora_target_modules": ["foo"]}, ModelError),
    ):
        with pytest.raises(kind):
            finetune(tuned.parent, tmp_path / "run", changed(finetune_settings, **given))
        after = {file: file.read_bytes() for file in (tmp_path / "run" / "finetune").rglob("*") if file.is_file()}
        assert after == before
        # And the next command, which does not give it, finds the settings of before.
        run = RunDirectory(tmp_path / "run")
        assert resolve(run.describe()["given"], run)[0].finetune.learning_rate == 0.02
        assert state_of(tmp_path / "run", run.describe()["given"]) == "finished"


def test_plain_text_is_trained_on_when_it_is_asked_for(small_settings, main_model, corpus, tmp_path, capsys):
    """Under the contest's preset a domain of plain text comes to nothing, and this is said."""
    texts = [{"text": row["output"] * 3} for row in make_rows("metal", 60, seed=3)]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    settings = {
        **small_settings,
        "sources": [{"path": str(corpus / "fruit.json")}, {"path": str(tmp_path / "web.jsonl")}],
        "tokenize": {"tokenizer": str(main_model), "context_length": 64, "max_example_tokens": 96},
        "mixture": {"token_budget": 4_000},
        "finetune": {"model": str(main_model), "batch_size": 8, "epochs": 1},
    }
    with open_run(tmp_path / "run", settings) as opened:
        run_pipeline(opened.config, opened.run, opened.narrator, opened.processes)
    said = capsys.readouterr().err
    examples = json.loads((tmp_path / "run" / "finetune" / "metrics.json").read_text())["examples"]
    drawn = json.loads((tmp_path / "run" / "mixture" / "allocation.json").read_text())["domains"]["web"]
    assert examples["skipped"] == {"plain text": drawn["drawn_rows"]}
    assert examples["tokens_by_domain"]["web"] == 0
    assert (
        f"WARNING: none of the {drawn['drawn_tokens']:,} tokens of web in the mixture is trained on; where it is plain "
        "text: --set finetune.skip_plain_text=false"
    ) in said
    with open_run(tmp_path / "run", changed(settings, skip_plain_text=False), quiet=True) as opened:
        run_pipeline(opened.config, opened.run, opened.narrator, opened.processes)
    examples = json.loads((tmp_path / "run" / "finetune" / "metrics.json").read_text())["examples"]
    assert examples["tokens_by_domain"]["web"] == drawn["drawn_tokens"]


@pytest.fixture(scope="module")
def gpt2(main_model, tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2") / "model"
    shutil.copytree(main_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "conversion.json"))
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "evaluate", "kind", "message"),
    [
        (
            {},
            {},
            ModelError,
            "finetune.lora_target_modules: q_proj names no linear layer of the blocks of GPT2LMHeadModel; choose from "
            "c_attn, c_fc, c_proj, or set finetune.preset=modern",
        ),
        (
            {"preset": "modern", "max_example_tokens": 129},
            {},
            ConfigError,
            "finetune.max_example_tokens is 129, but MODEL takes 128 tokens; lower it",
        ),
        (
            {"preset": "modern"},
            {"tasks": ["gsm8k"]},
            ConfigError,
            "evaluate.max_length is 1,024, but MODEL takes 128 tokens; lower it",
        ),
        (
            {"preset": "modern"},
            {"tasks": ["contest"], "task_folder": "nowhere"},
            ConfigError,
            "evaluate.task_folder: nowhere is no folder; give one with task files of lm-eval",
        ),
    ],
)
def test_a_main_model_that_does_not_fit_stops_a_run_before_it_starts(
    finetune_settings, gpt2, tmp_path, monkeypatch, given, evaluate, kind, message
):
    monkeypatch.setattr("doremi_mix.checks.find_spec", lambda name: object())
    settings = {**changed(finetune_settings, model=str(gpt2), **given), "evaluate": evaluate}
    with pytest.raises(kind) as caught, open_run(tmp_path / "run", settings, quiet=True):
        pass
    assert str(caught.value) == message.replace("MODEL", str(gpt2))
    assert not (tmp_path / "run").exists()


def test_any_causal_model_can_be_tuned(drawn, finetune_settings, gpt2, tmp_path):
    folder = finetune(drawn, tmp_path / "run", changed(finetune_settings, model=str(gpt2), preset="modern", epochs=1))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]


def test_settings_of_the_presets(finetune_settings, tmp_path):
    from doremi_mix.config import parse_config
    from doremi_mix.finetune_plan import choose_finetune

    def chosen(hardware="cpu", **given):
        return choose_finetune(parse_config({"catalog": "bettermixture", "finetune": given}), hardware)

    contest = chosen(model="m")
    assert (contest.epochs, contest.batch_size, contest.max_example_tokens) == (3, 256, 1024)
    assert (contest.lora_rank, contest.lora_alpha, contest.lora_dropout) == (8, 16.0, 0.1)
    assert (contest.token_budget, contest.packing, contest.seed) == (10_000_000, "none", 42)
    assert (contest.warmup_share, contest.weight_decay, contest.max_grad_norm) == (0.03, 0.0, 1.0)
    assert (contest.lora_target_modules, contest.lora_shared_input) == (("q_proj", "k_proj", "v_proj"), True)
    assert (contest.tokenizer, contest.gradient_checkpointing) == ("m", False)
    assert chosen("cuda").gradient_checkpointing is True
    modern = chosen(preset="modern")
    assert (modern.lora_target_modules, modern.lora_shared_input, modern.packing) == (None, False, "documents")
    # The preset's sharing is about its own layers; rank and batch that are given stay.
    own = chosen(lora_target_modules=["o_proj"], lora_rank=4, batch_size=2)
    assert (own.lora_shared_input, own.lora_rank, own.batch_size) == (False, 4, 2)

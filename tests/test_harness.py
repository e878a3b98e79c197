"""Benchmark tasks through lm-eval: rigged models with known answers, a real small one against its own logits."""

# The imports below need lm-eval.
# ruff: noqa: E402

import copy
import json
import re
import shutil
import zipfile
from functools import partial
from pathlib import Path

import pytest

lm_model = pytest.importorskip(
    "lm_eval.api.model", reason="lm-eval is not installed: pip install 'doremi-mix[evaluate]'"
)

import datasets
import lm_eval.tasks.manager
import peft
import torch
from local_tasks import write_local_tasks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from doremi_mix import harness
from doremi_mix.benchmarks import CONTEST_TASKS
from doremi_mix.errors import ConfigError, DataError, SourceNotFoundError
from doremi_mix.harness import PACKAGED_TASKS, choose_shots, count_requests, load_tasks, run_task, wrap_model
from doremi_mix.summaries import rouge_l

NAMES = [task.name for task in CONTEST_TASKS]


class Rigged(lm_model.LM):
    """Prefers choices by a rule and writes what it is told to."""

    def __init__(self, prefer=lambda context, choice, number: -number, answers=()):
        super().__init__()
        self.prefer = prefer
        self.answers = list(answers)
        self.prompts = []

    def loglikelihood(self, requests, disable_tqdm=False):
        self.prompts += [request.args[0] for request in requests]
        answers = []
        for request in requests:
            answers.append((float(self.prefer(*request.args, request.idx)), False))
            self.cache_hook.add_partial("loglikelihood", request.args, answers[-1])
        return answers

    def generate_until(self, requests, disable_tqdm=False):
        self.prompts += [request.args[0] for request in requests]
        for request in requests:
            self.cache_hook.add_partial("generate_until", request.args, "")
        return self.answers[: len(requests)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Keeps the data library from filling the cache of whoever runs the tests."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    write_local_tasks(path, num_items=6)
    return path


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return write_local_tasks(tmp_path_factory.mktemp("shots"))


@pytest.fixture(scope="module")
def tasks(folder):
    return load_tasks(NAMES, folder)


@pytest.fixture(scope="module")
def byte_model():
    """A random model over bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config), tokenizer


def read_rows(folder, name):
    return [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_who_always_takes_the_first_choice_is_right_where_it_is(tasks, folder):
    for name, num_choices in (("arc_challenge", 4), ("hellaswag", 4)):
        score = run_task(tasks[name], Rigged(), num_fewshot=2)
        right = [100.0 * (row["answer"] == 0) for row in read_rows(folder, name)]
        assert score.items == tuple(right)
        # The items start with D: the answers are D A B C D A.
        assert score.value == pytest.approx(100 * 2 / 6)
        assert score.num_items == 6
        assert count_requests(tasks[name], None) == 6 * num_choices


def test_a_group_is_scored_as_a_whole(tasks):
    for name in ("mmlu", "cmmlu"):
        score = run_task(tasks[name], Rigged(lambda context, choice, number: choice.endswith("D")), num_fewshot=2)
        assert score.items == (100.0, 0.0, 0.0, 0.0, 100.0, 0.0) * 2
        assert score.value == pytest.approx(100 / 3)
        # Of two tasks of six, each with p = 1/3: lm-eval pools their variances p (1 - p) 6 / 5.
        assert score.standard_error == pytest.approx(100 * ((2 / 9) * 1.2 / 12) ** 0.5)
        # With a limit, that many of each of the group's tasks.
        assert run_task(tasks[name], Rigged(), num_fewshot=2, limit=2).num_items == 4


def test_true_answers_share_the_probability(tasks):
    # e**0 for the true answer and e**-1 for three others.
    score = run_task(tasks["truthfulqa_mc2"], Rigged(lambda context, choice, number: -float(number > 0)))
    assert score.value == pytest.approx(100 / (1 + 3 * 2.718281828459045**-1))
    assert score.standard_error == pytest.approx(0, abs=1e-9)


def test_an_answer_is_what_follows_the_marks(tasks):
    # The right answers are 11, 13, 15, 17, 19, 21.
    answers = ["6 + 5 #### 11", "#### 13.", "15", "#### 71", "#### 1,9", "I see.\n\n#### 21 and more"]
    score = run_task(tasks["gsm8k"], Rigged(answers=answers), num_fewshot=2)
    # The contest's pattern takes the full stop along, which the comparison then leaves out, as it does commas.
    assert score.items == (100.0, 100.0, 0.0, 0.0, 100.0, 100.0)
    assert score.metric == "exact_match,strict-match"


def test_rouge_l_by_hand():
    # Three of three words, three of six: F = 2 * 1 * .5 / 1.5.
    assert rouge_l("The cat sat.", ["the cat sat on the mat"]) == pytest.approx(200 / 3)
    # In order: "the mat" of three and six: P = 2/3, R = 1/3.  The better of two references counts.
    assert rouge_l("the mat cat", ["the cat sat on the mat"]) == pytest.approx(100 * 4 / 9)
    assert rouge_l("the mat cat", ["the cat sat on the mat", "mat cat"]) == pytest.approx(80)
    assert rouge_l("", ["a reference"]) == 0


def test_summaries_of_one_scene_are_references_of_one_item(tasks):
    model = Rigged(answers=["Ben sees a robin", *["Spring is here"] * 5])
    score = run_task(tasks["scrolls_summscreenfd"], model)
    # "Ben", "a" and "robin" are three of four words, and three of six of the second reference.
    assert score.items == (pytest.approx(100 * rouge_f(3, 4, 6)), 100.0, 100.0, 100.0, 100.0, 100.0)
    assert score.metric == "rougeL,none"
    assert model.prompts[0] == (
        "Scene 0. Ann: The robin is back. Ben: Then it is spring. They open the window.\n\n"
        "Question: What is a summary of the preceding text?\nAnswer:"
    )


def rouge_f(common, num_words, num_reference_words):
    precision, recall = common / num_words, common / num_reference_words
    return 2 * precision * recall / (precision + recall)


def test_the_packaged_summaries_are_read_as_published(tmp_path, monkeypatch):
    """The published rows are a file inside a zip; here the zip lies beside the task."""
    text = (PACKAGED_TASKS / "scrolls_summscreenfd.yaml").read_text(encoding="utf-8")
    hub = "https://huggingface.co/datasets/tau/scrolls/resolve/main/"
    assert text.count(hub) == 1
    rows = [
        {"id": "b", "pid": "b_0", "input": "Two.", "output": "the second"},
        {"id": "a", "pid": "a_0", "input": "One.", "output": "the first"},
        {"id": "b", "pid": "b_1", "input": "Two.", "output": "number two"},
    ]
    with zipfile.ZipFile(tmp_path / "summ_screen_fd.zip", "w") as archive:
        archive.writestr("summ_screen_fd/validation.jsonl", "\n".join(json.dumps(row) for row in rows))
    (tmp_path / "scrolls_summscreenfd.yaml").write_text(text.replace(hub, f"{tmp_path}/"), encoding="utf-8")
    # Offline, the data library refuses all addresses, also those of this machine.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    task = load_tasks(["scrolls_summscreenfd"], tmp_path)["scrolls_summscreenfd"]
    model = Rigged(answers=["number two", "the second"])
    score = run_task(task, model)
    assert score.items == (100.0, pytest.approx(50.0))
    question = "\n\nQuestion: What is a summary of the preceding text?\nAnswer:"
    assert model.prompts == [f"Two.{question}", f"One.{question}"]
    assert task.source == str(tmp_path / "scrolls_summscreenfd.yaml")


@pytest.mark.parametrize("with_adapters", [False, True])
def test_a_real_model_is_scored_by_its_own_logits(tasks, folder, byte_model, with_adapters):
    model, tokenizer = byte_model
    if with_adapters:
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
        model = peft.inject_adapter_in_model(lora, copy.deepcopy(model))
    one = run_task(tasks["arc_challenge"], wrap_model(model, tokenizer, max_length=1024), num_fewshot=0)
    four = run_task(tasks["arc_challenge"], wrap_model(model, tokenizer, max_length=1024, batch_size=4), num_fewshot=0)
    assert one == four

    def loglikelihood(context, continuation):
        ids = tokenizer(context + continuation, return_tensors="pt").input_ids
        start = len(tokenizer(context).input_ids)
        with torch.no_grad():
            log_probabilities = model(ids).logits.double().log_softmax(-1)[0]
        return sum(float(log_probabilities[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))

    expected = []
    for row in read_rows(folder, "arc_challenge"):
        context = f"Question: {row['question']}\nAnswer:"
        by_length = [loglikelihood(context, f" {choice}") / len(choice) for choice in row["choices"]]
        expected.append(100.0 * (by_length.index(max(by_length)) == row["answer"]))
    assert one.items == tuple(expected)
    assert len(set(expected)) == 2  # a test in which every item scores alike would show little


def test_all_seven_run_on_a_small_model_without_a_word(tasks, shots, byte_model, capfd):
    model = wrap_model(*byte_model, max_length=512)
    first = {}
    for name in NAMES:
        finished = []
        first[name] = run_task(
            tasks[name], model, num_fewshot=choose_shots(name, shots), limit=3, advance=finished.append
        )
        assert sum(finished) == count_requests(tasks[name], 3)
        assert first[name].metric == next(task.metric for task in CONTEST_TASKS if task.name == name)
        assert len(first[name].items) == first[name].num_items == (6 if name.endswith("mmlu") else 3)
    # The same again: neither the order nor an earlier run changes the prompts.
    for name in reversed(NAMES):
        assert run_task(tasks[name], model, num_fewshot=choose_shots(name, shots), limit=3) == first[name]
    assert capfd.readouterr() == ("", "")


def test_worked_examples_are_those_asked_for(tasks):
    def prompts(name, **settings):
        model = Rigged(answers=["1"] * 6)
        run_task(tasks[name], model, **settings)
        return model.prompts

    for num_fewshot in (2, 0, 3):
        assert {prompt.count("Question:") for prompt in prompts("arc_challenge", num_fewshot=num_fewshot)} == {
            num_fewshot + 1
        }
    assert {prompt.count("Question:") for prompt in prompts("gsm8k", num_fewshot=2)} == {3}
    # Without a number the definition decides: no examples, where it does not say.
    assert {prompt.count("Question:") for prompt in prompts("arc_challenge")} == {1}
    # truthfulqa's examples are in its prompt.
    assert {prompt.count("Q:") for prompt in prompts("truthfulqa_mc2", num_fewshot=5)} == {2}
    assert prompts("arc_challenge", num_fewshot=2, seed=1) == prompts("arc_challenge", num_fewshot=2, seed=1)
    assert prompts("arc_challenge", num_fewshot=2, seed=1) != prompts("arc_challenge", num_fewshot=2, seed=2)


def test_how_many_worked_examples():
    contest = dict(zip(NAMES, (25, 25, 0, 5, 5, 5, 0), strict=True))
    assert {name: choose_shots(name, None) for name in NAMES} == contest
    assert {name: choose_shots(name, {"mmlu": 1}) for name in NAMES} == contest | {"mmlu": 1}
    assert choose_shots("mmlu", 0) == 0
    assert choose_shots("sciq", {"mmlu": 1}) is None


def test_the_task_folder_comes_first(tasks, folder):
    assert [task.source for task in tasks.values()] == [str(folder / f"{name}.yaml") for name in NAMES]


def test_a_relative_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    task = load_tasks(["arc_challenge"], Path(folder.name))["arc_challenge"]
    assert count_requests(task, None) == 24
    assert Path.cwd() == folder.parent


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def write_broken(tmp_path, folder, **files):
    for name in ("data/arc_challenge.jsonl", "arc_challenge.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((folder / name).read_text("utf-8"), encoding="utf-8")
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")


def test_a_task_folder_that_cannot_be_used(folder, tmp_path):
    load = partial(load_tasks, ["arc_challenge"], tmp_path)
    missing = tmp_path / "missing"
    with raises(
        SourceNotFoundError,
        f"evaluate.task_folder: {missing} is no folder; give one with <task>.yaml files",
    ):
        load_tasks(["arc_challenge"], missing)
    with raises(
        DataError, f"evaluate.task_folder: {tmp_path} has no task; it needs <task>.yaml files in lm-eval's format"
    ):
        load()
    write_broken(tmp_path, folder, other="task: [", listed="- 1")
    with raises(DataError, f"{tmp_path}/listed.yaml must hold a task in lm-eval's YAML, got list"):
        load()
    write_broken(tmp_path, folder, listed="include: other.yaml")
    with raises(DataError, f"{tmp_path}/other.yaml is no YAML (while parsing a flow node); mend it, or take it out"):
        load()
    write_broken(tmp_path, folder, other="task: arc_challenge")
    with raises(
        DataError,
        f"{tmp_path}/other.yaml and {tmp_path}/arc_challenge.yaml both define arc_challenge; keep one of them",
    ):
        load()


def test_files_that_lm_eval_would_leave_out(folder, tmp_path):
    write_broken(tmp_path, folder, arc_challenge="task: arc_challenge\ninclude: missing.yaml")
    with raises(
        DataError,
        f"{tmp_path}/arc_challenge.yaml: lm-eval cannot read arc_challenge; look at the files that it includes",
    ):
        load_tasks(["scrolls_summscreenfd"], tmp_path)
    (tmp_path / "arc_challenge.yaml").rename(tmp_path / "arc_challenge.yml")
    with raises(DataError, f"{tmp_path}/arc_challenge.yml: lm-eval reads *.yaml alone; rename the file"):
        load_tasks(["scrolls_summscreenfd"], tmp_path)


def test_data_that_are_not_there(folder, tmp_path):
    write_broken(tmp_path, folder)
    with pytest.raises(DataError) as caught:
        load_tasks(["arc_challenge"], tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/arc_challenge.yaml: arc_challenge cannot be loaded: Unable to find "
        f"'{tmp_path}/data/arc_challenge_shots.jsonl'"
    )


def test_too_few_worked_examples(tasks):
    with raises(
        DataError,
        "arc_challenge: its prompts need 25 worked examples, but there are 3 to choose from; lower "
        "evaluate.num_fewshot.arc_challenge, or add rows",
    ):
        run_task(tasks["arc_challenge"], Rigged(), num_fewshot=25)


def test_no_room_for_a_prompt(tasks, byte_model):
    with raises(
        ConfigError,
        "evaluate.max_length is 8, but an answer of gsm8k may take 8 tokens, which leaves no room for its prompt; "
        "raise evaluate.max_length, or give the task a lower max_gen_toks",
    ):
        run_task(tasks["gsm8k"], wrap_model(*byte_model, max_length=8), num_fewshot=2)


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with raises(ConfigError, "evaluate.tasks: benchmark tasks need lm-eval; run: pip install 'doremi-mix[evaluate]'"):
        load_tasks(["arc_challenge"])


@pytest.fixture
def few_of_lm_eval_s_own(tmp_path, monkeypatch):
    """Lets lm-eval know the families of the contest's tasks alone: reading all 15,000 takes long."""
    own = Path(lm_eval.tasks.__file__).parent
    for family in ("arc", "hellaswag", "truthfulqa", "mmlu/default", "cmmlu", "gsm8k", "scrolls"):
        shutil.copytree(own / family, tmp_path / family)
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(tmp_path / "manager.py"))


def test_lm_eval_s_own_tasks(few_of_lm_eval_s_own, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name, hub in (("arc_challenge", "allenai/ai2_arc"), ("mmlu", "cais/mmlu")):
        with raises(
            DataError,
            f"{name}: its data cannot be had from the hub (Couldn't reach '{hub}' on the Hub (OfflineModeIsEnabled)); "
            "connect this machine, fill the cache on another (HF_HOME), or give a local task file "
            "(evaluate.task_folder)",
        ):
            load_tasks([name])
    with pytest.raises(
        ConfigError, match=r"^evaluate\.tasks: lm-eval has no task 'hellaswagg'; did you mean hellaswag( or \w+)*\?$"
    ):
        load_tasks(["hellaswagg"])
    with raises(ConfigError, "evaluate.tasks: lm-eval has no task '*'; list all with: lm-eval ls tasks"):
        load_tasks(["*"])
    with pytest.raises(
        ConfigError, match=r"^evaluate\.tasks: 'ai2_arc' is a label of several tasks .*; name the tasks$"
    ):
        load_tasks(["ai2_arc"])
    # All of the contest's names exist there, and the summaries are ours.
    index = lm_eval.tasks.TaskManager(include_path=[PACKAGED_TASKS]).task_index
    assert set(NAMES) <= set(index)
    assert index["scrolls_summscreenfd"].yaml_path.parent == PACKAGED_TASKS

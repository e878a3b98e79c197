"""Made-up small versions of the contest's seven tasks as a task folder: evaluation without a connection in seconds.

Write them with ``python tests/local_tasks.py FOLDER``.  They say nothing about a model; they run everything that the
real tasks run: multiple choice, groups, answers that are written and searched, summaries.
"""

import json
import random
import sys
from pathlib import Path

SHOTS = {"arc_challenge": 2, "hellaswag": 2, "mmlu": 2, "cmmlu": 2, "gsm8k": 2}
"""Worked examples to ask for: the folder has three rows for each task."""

THINGS = {
    "en": [("robin", "bird"), ("salmon", "fish"), ("hammer", "tool"), ("violin", "instrument"), ("oak", "tree")],
    "zh": [("知更鸟", "鸟"), ("鲑鱼", "鱼"), ("锤子", "工具"), ("小提琴", "乐器"), ("橡树", "树")],
}

MULTIPLE_CHOICE = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/{task}.jsonl
    shots: data/{task}_shots.jsonl
test_split: test
fewshot_split: shots
output_type: multiple_choice
doc_to_text: "{prompt}"
doc_to_choice: {choices}
doc_to_target: answer
metric_list:
{metrics}
"""

TRUTHFUL = """\
task: truthfulqa_mc2
dataset_path: json
dataset_kwargs:
  data_files:
    validation: data/truthfulqa_mc2.jsonl
validation_split: validation
output_type: multiple_choice
num_fewshot: 0
doc_to_text: "Q: What is a stone?\\nA: A stone is a piece of rock.\\n\\nQ: {{question}}\\nA:"
doc_to_choice: "{{mc2_targets.choices}}"
doc_to_target: 0
process_results: !function answers.share_of_true
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""

# Python of the folder itself, as a user may have it.
ANSWERS = """\
import math


def share_of_true(document, results):
    probabilities = [math.exp(loglikelihood) for loglikelihood, _ in results]
    labels = document["mc2_targets"]["labels"]
    return {"acc": sum(p for p, label in zip(probabilities, labels) if label) / sum(probabilities)}
"""

SUMS = """\
task: gsm8k
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/gsm8k.jsonl
    train: data/gsm8k_shots.jsonl
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["Question:", "</s>"]
  do_sample: false
  max_gen_toks: MAX_GEN_TOKS
filter_list:
  - name: strict-match
    filter:
      - {function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}
      - {function: take_first}
  - name: flexible-extract
    filter:
      - {function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"}
      - {function: take_first}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]
"""

SUMMARIES = """\
task: scrolls_summscreenfd
dataset_path: json
dataset_kwargs:
  data_files:
    validation: data/scrolls_summscreenfd.jsonl
validation_split: validation
process_docs: !function doremi_mix.summaries.merge_references
output_type: generate_until
num_fewshot: 0
doc_to_text: "{{input}}\\n\\nQuestion: What is a summary of the preceding text?\\nAnswer:"
doc_to_target: " {{outputs | join(', ')}}"
generation_kwargs:
  until: ["\\n"]
  do_sample: false
  max_gen_toks: MAX_GEN_TOKS
process_results: !function doremi_mix.summaries.score_summary
metric_list:
  - {metric: rougeL, aggregation: mean, higher_is_better: true}
"""

ACC = "  - {metric: acc, aggregation: mean, higher_is_better: true}"
ACC_NORM = f"{ACC}\n  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}"
LETTERS = '["A", "B", "C", "D"]'


def write_local_tasks(folder: Path, num_items: int = 6, max_gen_toks: int = 8) -> dict[str, int]:
    """Writes the task folder and returns the worked examples to ask for, by task.

    Args:
        folder: is made if it does not exist.
        num_items: items of each task; of mmlu and cmmlu, of each of their two tasks.
        max_gen_toks: tokens that the model may write for one answer.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    full = "Question: {{question}}\\nAnswer:"
    _write_choice(folder, "arc_challenge", full, '"{{choices}}"', ACC_NORM, _questions("arc", num_items))
    _write_choice(folder, "hellaswag", "{{question}}", '"{{choices}}"', ACC_NORM, _questions("hellaswag", num_items))
    listed = "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. {{choices[3]}}\\n"
    for group, language, end, metrics in (("mmlu", "en", "Answer:", ACC), ("cmmlu", "zh", "答案：", ACC_NORM)):
        members = [f"{group}_nature", f"{group}_crafts"]
        for member in members:
            _write_choice(folder, member, listed + end, LETTERS, metrics, _questions(member, num_items, language))
        names = [line.partition("metric: ")[2].partition(",")[0] for line in metrics.splitlines()]
        aggregates = "".join(f"  - {{metric: {name}, weight_by_size: true}}\n" for name in names)
        (folder / f"{group}.yaml").write_text(
            f"group: {group}\ntask:\n  - {members[0]}\n  - {members[1]}\naggregate_metric_list:\n{aggregates}",
            encoding="utf-8",
        )
    (folder / "answers.py").write_text(ANSWERS, encoding="utf-8")
    (folder / "truthfulqa_mc2.yaml").write_text(TRUTHFUL, encoding="utf-8")
    _write_rows(folder, "truthfulqa_mc2", [_truth(row) for row in _questions("truth", num_items)[3:]])
    for task, text in (("gsm8k", SUMS), ("scrolls_summscreenfd", SUMMARIES)):
        (folder / f"{task}.yaml").write_text(text.replace("MAX_GEN_TOKS", str(max_gen_toks)), encoding="utf-8")
    sums = _sums(num_items + 3)
    _write_rows(folder, "gsm8k", sums[3:])
    _write_rows(folder, "gsm8k_shots", sums[:3])
    _write_rows(folder, "scrolls_summscreenfd", _scenes(num_items))
    return dict(SHOTS)


def _write_choice(folder, task, prompt, choices, metrics, rows):
    text = MULTIPLE_CHOICE.format(task=task, prompt=prompt, choices=choices, metrics=metrics)
    (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
    _write_rows(folder, task, rows[3:])
    _write_rows(folder, f"{task}_shots", rows[:3])


def _write_rows(folder, name, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _questions(seed, num_items, language="en"):
    """Three rows to show and then the items; the right answers go round A, B, C, D."""
    rng = random.Random(seed)
    kinds = [kind for _, kind in THINGS[language]]
    rows = []
    for number in range(num_items + 3):
        thing, kind = THINGS[language][number % len(kinds)]
        choices = rng.sample([other for other in kinds if other != kind], 3)
        choices.insert(number % 4, kind)
        question = f"Which is number {number}, a {thing}?" if language == "en" else f"第{number}题：{thing}是什么？"
        rows.append({"question": question, "choices": choices, "answer": number % 4})
    return rows


def _truth(row):
    right = row["choices"][row["answer"]]
    choices = [right, *(choice for choice in row["choices"] if choice != right)]
    return {"question": row["question"], "mc2_targets": {"choices": choices, "labels": [1, 0, 0, 0]}}


def _sums(num_items):
    return [
        {
            "question": f"Ann has {n + 2} pears and buys {n + 3}. How many now?",
            "answer": f"{n + 2} + {n + 3}. #### {2 * n + 5}",
        }
        for n in range(num_items)
    ]


def _scenes(num_items):
    """The first scene has two reference summaries, in two rows."""
    rows = []
    for number in range(num_items):
        text = f"Scene {number}. Ann: The robin is back. Ben: Then it is spring. They open the window."
        rows.append({"id": f"scene-{number}", "pid": f"scene-{number}_0", "input": text, "output": "Spring is here."})
    return [*rows, rows[0] | {"pid": "scene-0_1", "output": "Ann and Ben see a robin."}]


if __name__ == "__main__":
    print(json.dumps(write_local_tasks(Path(sys.argv[1]))))

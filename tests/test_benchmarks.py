"""The contest's score: published ratios, hand-worked errors, results that lm-eval recorded."""

import json
import math
import random
import re
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doremi_mix.benchmarks import (
    CONTEST_TASKS,
    Estimate,
    TaskScore,
    compare_tasks,
    contest_score,
    final_score,
    published_base,
    read_results,
    summarize_scores,
)
from doremi_mix.errors import DataError

NAMES = ["arc_challenge", "hellaswag", "truthfulqa_mc2", "mmlu", "cmmlu", "gsm8k", "scrolls_summscreenfd"]
# The ratios that the contest's first team published, and their means.
PRELIMINARY = [1.018868, 0.986842, 1.262384, 1.002243, 1.000792, 2.000000, 3.610803]
SEMI_FINAL = [0.959184, 0.938272, 1.247911, 1.476190, 0.996764, 1.006272, 4.561853]


def scores(values, error=None, items=None):
    metrics = {task.name: task.metric for task in CONTEST_TASKS}
    return {
        name: TaskScore(name, metrics[name], value, error, 100, items)
        for name, value in zip(NAMES, values, strict=True)
    }


def score(values):
    """A score from its items, as lm-eval makes one."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return {
        "gsm8k": TaskScore(
            "gsm8k", "exact_match,strict-match", statistics.fmean(values), error, len(values), tuple(values)
        )
    }


def test_the_contest_s_tasks():
    assert [(task.name, task.num_fewshot, task.metric, task.base_score) for task in CONTEST_TASKS] == [
        ("arc_challenge", 25, "acc_norm,none", 40.0),
        ("hellaswag", 25, "acc_norm,none", 80.0),
        ("truthfulqa_mc2", 0, "acc,none", 47.973),
        ("mmlu", 5, "acc,none", 54.4098),
        ("cmmlu", 5, "acc_norm,none", 59.2946),
        ("gsm8k", 5, "exact_match,strict-match", 20.0),
        ("scrolls_summscreenfd", 0, "rougeL,none", 2.7047),
    ]


def test_the_published_ratios_give_the_published_scores():
    base = published_base()
    tuned = [
        scores([task.base_score * ratio for task, ratio in zip(CONTEST_TASKS, ratios, strict=True)])
        for ratios in (PRELIMINARY, SEMI_FINAL)
    ]
    preliminary, semi_final = (contest_score(base, each) for each in tuned)
    assert [row.name for row in preliminary.tasks] == NAMES
    assert [row.ratio for row in preliminary.tasks] == pytest.approx(PRELIMINARY)
    assert preliminary.mean == pytest.approx(1.554562, abs=1e-6)
    assert semi_final.mean == pytest.approx(1.598064, abs=1e-6)
    assert final_score(preliminary, semi_final) == Estimate(pytest.approx(1.576313, abs=1e-6), None)
    assert preliminary.standard_error is None


def test_errors_by_hand():
    # 20 -> 30 with errors 3 and 4: var = (16 + 2.25 * 9) / 400 = 0.090625; seven of them: sqrt(7 * 0.090625) / 7.
    base, tuned = scores([20.0] * 7, 3.0), scores([30.0] * 7, 4.0)
    contest = contest_score(base, tuned)
    assert {(row.ratio, row.standard_error, row.paired) for row in contest.tasks} == {(1.5, math.sqrt(0.090625), False)}
    assert (contest.mean, contest.standard_error) == (1.5, pytest.approx(math.sqrt(0.090625 / 7)))
    # Against a score that is taken as given: 4 / 20.
    assert compare_tasks(scores([20.0] * 7, 0.0), tuned)[0].standard_error == pytest.approx(0.2)
    # Half of each: sqrt(e1**2 + e2**2) / 2.
    assert final_score(contest, contest) == Estimate(1.5, pytest.approx(contest.standard_error / math.sqrt(2)))


def test_the_same_items_share_their_error():
    # All that differs is one item of four.  Deviations d = tuned - ratio * base have mean 0; by the textbook formula
    # of a ratio of means the error is sqrt(sum d**2 / (n (n - 1))) / mean(base).
    base, tuned = [100.0, 0.0, 100.0, 0.0], [100.0, 0.0, 100.0, 100.0]
    (row,) = compare_tasks(score(base), score(tuned))
    deviations = [t - 1.5 * b for b, t in zip(base, tuned, strict=True)]
    assert row.paired
    assert row.ratio == 1.5
    assert row.standard_error == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 12) / 50)
    # The same answers have a ratio without error.
    (same,) = compare_tasks(score(tuned), score(tuned))
    assert (same.ratio, same.standard_error) == (1.0, pytest.approx(0, abs=1e-9))


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(0, 100)), min_size=3, max_size=12))
def test_the_paired_error_is_that_of_a_ratio_of_means(pairs):
    base, tuned = ([pair[side] for pair in pairs] for side in (0, 1))
    (row,) = compare_tasks(score(base), score(tuned))
    ratio, n = statistics.fmean(tuned) / statistics.fmean(base), len(pairs)
    deviations = [t - ratio * b for b, t in pairs]
    expected = math.sqrt(sum(d * d for d in deviations) / (n * (n - 1))) / statistics.fmean(base)
    assert row.standard_error == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_paired_error_covers_what_new_items_do():
    rng = random.Random(0)

    def draw():
        skills = [rng.random() for _ in range(200)]
        base = [100.0 * (skill < 0.5) for skill in skills]
        tuned = [100.0 * (skill < 0.6 and rng.random() < 0.95) for skill in skills]
        return compare_tasks(score(base), score(tuned))[0]

    rows = [draw() for _ in range(400)]
    spread = statistics.stdev(row.ratio for row in rows)
    assert statistics.fmean(row.standard_error for row in rows) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        (
            scores([20.0] * 7),
            {name: score for name, score in scores([20.0] * 7).items() if name not in ("mmlu", "gsm8k")},
            "the contest's score needs all of its 7 tasks, but the tuned model has no score for mmlu, gsm8k; "
            "evaluate these too",
        ),
        (
            scores([20.0] * 6 + [0.0]),
            scores([20.0] * 7),
            "scrolls_summscreenfd: the base model scores 0 on all 100 items, so the ratio is undefined; score more "
            "items (evaluate.limit), or compare with the published base scores",
        ),
        (
            scores([20.0] * 7, items=(20.0,) * 100),
            {**scores([20.0] * 7), "gsm8k": TaskScore("gsm8k", "exact_match,strict-match", 1.0, None, 2, (0.0, 2.0))},
            "gsm8k: the base model was scored on 100 items, the tuned model on 2; score both with the same "
            "evaluate.limit",
        ),
        (
            scores([20.0] * 7),
            {**scores([20.0] * 7), "gsm8k": TaskScore("gsm8k", "acc,none", 1.0, None, 2)},
            "gsm8k: the base model was scored on exact_match,strict-match, the tuned model on acc,none; score both "
            "with the same task",
        ),
    ],
)
def test_scores_that_cannot_be_compared(base, tuned, message):
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        contest_score(base, tuned)


def test_a_summary_keeps_what_there_is():
    base, tuned = scores([0.0] + [20.0] * 6, 2.0), scores([10.0] * 7, 1.0)
    summary = json.loads(json.dumps(summarize_scores(base, tuned)))
    assert summary["contest"] is None
    assert summary["why_no_contest"].startswith("arc_challenge: the base model scores 0 on all 100 items")
    assert summary["tasks"][:2] == [
        {
            "task": "arc_challenge",
            "metric": "acc_norm,none",
            "base": {"score": 0.0, "standard_error": 2.0, "num_items": 100},
            "tuned": {"score": 10.0, "standard_error": 1.0, "num_items": 100},
            "ratio": None,
            "ratio_standard_error": None,
            "paired": False,
        },
        {
            "task": "hellaswag",
            "metric": "acc_norm,none",
            "base": {"score": 20.0, "standard_error": 2.0, "num_items": 100},
            "tuned": {"score": 10.0, "standard_error": 1.0, "num_items": 100},
            "ratio": 0.5,
            "ratio_standard_error": pytest.approx(math.sqrt(1 + 0.25 * 4) / 20),
            "paired": False,
        },
    ]
    whole = summarize_scores(scores([20.0] * 7, 2.0), tuned)
    assert whole["contest"] == {"mean_ratio": 0.5, "standard_error": pytest.approx(math.sqrt(2 / 7) / 20)}
    assert whole["why_no_contest"] is None


def test_a_score_comes_back_from_json():
    for each in (*score([100.0, 0.0, 50.0]).values(), *published_base().values()):
        assert TaskScore.from_dict(json.loads(json.dumps(each.to_dict()))) == each


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((math.nan, 1.0, 2, None), "x: the score must be finite, got nan"),
        ((1.0, -1.0, 2, None), "x: a standard error is 0 or more, got -1.0"),
        ((1.0, 1.0, 2, (1.0,)), "x: 2 items with 1 values"),
        ((1.0, 1.0, 0, None), "x: 0 items with no values"),
    ],
)
def test_no_score_is_nonsense(given, message):
    value, error, num_items, items = given
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TaskScore("x", "acc,none", value, error, num_items, items)


# What the command line of lm-eval 0.4.13 wrote for a random model (numbers of mmlu's tasks made unequal by hand), with
# a label over two tasks and an ungrouped task as earlier versions wrote them.
RECORDED = """
{
  "results": {
    "arc_challenge": {"name": "arc_challenge", "alias": "arc_challenge", "sample_len": 4, "acc,none": 0.0,
      "acc_stderr,none": 0.0, "acc_norm,none": 0.25, "acc_norm_stderr,none": 0.25},
    "mmlu": {"alias": "mmlu", "name": "mmlu", "sample_len": 8, "acc,none": 0.375,
      "acc_stderr,none": 0.18298126367784995, "sample_count": {"acc,none": 8}},
    "mmlu_stem": {"alias": "stem", "acc,none": 0.375, "acc_stderr,none": 0.18298126367784995},
    "mmlu_nature": {"alias": "mmlu_nature", "sample_len": 4, "acc,none": 0.25, "acc_stderr,none": 0.25},
    "mmlu_crafts": {"alias": "mmlu_crafts", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": 0.28867513459481287},
    "gsm8k": {"alias": "gsm8k", "sample_len": 4, "exact_match,flexible-extract": 0.5,
      "exact_match_stderr,flexible-extract": 0.28867513459481287, "exact_match,strict-match": 0.25,
      "exact_match_stderr,strict-match": 0.25},
    "truthfulqa_mc2": {"alias": "truthfulqa_mc2", "sample_len": 4, "acc,none": 0.24689235260815218,
      "acc_stderr,none": "N/A"},
    "scrolls": {"alias": "scrolls"},
    "scrolls_summscreenfd": {"alias": " - scrolls_summscreenfd", "rouge1,none": 10.5, "rouge1_stderr,none": "N/A",
      "rougeL,none": 2.7047, "rougeL_stderr,none": "N/A"},
    "word_perplexity_only": {"alias": "x", "word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A"}
  },
  "group_subtasks": {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_nature", "mmlu_crafts"],
    "scrolls": ["scrolls_summscreenfd"], "gsm8k": []},
  "n-samples": {
    "arc_challenge": {"original": 6, "effective": 4}, "mmlu_nature": {"original": 6, "effective": 4},
    "mmlu_crafts": {"original": 6, "effective": 4}, "gsm8k": {"original": 6, "effective": 4},
    "scrolls_summscreenfd": {"original": 338, "effective": 100}
  }
}
"""


def recorded(*without):
    results = json.loads(RECORDED)
    for name in without:
        del results["results"][name]
    return results


def test_recorded_results():
    read = read_results(recorded("word_perplexity_only"))
    assert read == {
        "arc_challenge": TaskScore("arc_challenge", "acc_norm,none", 25.0, 25.0, 4),
        "mmlu": TaskScore("mmlu", "acc,none", 37.5, 18.298126367784995, 8),
        "gsm8k": TaskScore("gsm8k", "exact_match,strict-match", 25.0, 25.0, 4),
        "truthfulqa_mc2": TaskScore("truthfulqa_mc2", "acc,none", 24.689235260815218, None, 4),
        "scrolls_summscreenfd": TaskScore("scrolls_summscreenfd", "rougeL,none", 2.7047, None, 100),
    }


def test_logged_samples_give_the_items_in_order():
    results = recorded("word_perplexity_only", "scrolls")
    results["samples"] = {
        "gsm8k": [
            {"doc_id": number, "filter": name, "exact_match": float(right)}
            for name, answers in (("flexible-extract", [1, 1, 0, 0]), ("strict-match", [0, 1, 0, 0]))
            for number, right in reversed(list(enumerate(answers)))
        ],
        "mmlu_nature": [{"doc_id": number, "filter": "none", "acc": float(number == 2)} for number in range(4)],
        "mmlu_crafts": [{"doc_id": number, "filter": "none", "acc": float(number < 2)} for number in range(4)],
        "truthfulqa_mc2": [{"doc_id": number, "filter": "none", "acc": 0.1 * number} for number in range(4)],
        # lm-eval's own task logs texts, which are no scores.
        "scrolls_summscreenfd": [{"doc_id": 0, "filter": "none", "rougeL": ["a summary", ["its reference"]]}],
    }
    read = read_results(results)
    assert read["gsm8k"].items == (0.0, 100.0, 0.0, 0.0)
    assert read["mmlu"].items == (0.0, 0.0, 100.0, 0.0, 100.0, 100.0, 0.0, 0.0)
    # A missing error is made up from the items.
    assert read["truthfulqa_mc2"].standard_error == pytest.approx(statistics.stdev([0, 10, 20, 30]) / 2)
    assert read["arc_challenge"].items is None
    assert read["scrolls_summscreenfd"].items is None


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (
            {"arc": 1},
            'these are no results of lm-eval: there is no "results"; give the content of a results_*.json',
        ),
        (
            recorded(),
            "word_perplexity_only: none of its metrics (word_perplexity,none) is known here; score a task with one of "
            "acc_norm, acc, mc2, exact_match, rougeL",
        ),
        (
            {"results": {"arc": {"acc,none": "N/A"}}, "n-samples": {"arc": {"effective": 3}}},
            "arc: acc,none must be a number, got 'N/A'; evaluate it again",
        ),
        (
            {"results": {"arc": {"acc,none": 0.5}}},
            'arc: lm-eval\'s results do not say how many items arc has; they lack "n-samples"',
        ),
    ],
)
def test_results_that_cannot_be_read(results, message):
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        read_results(results)

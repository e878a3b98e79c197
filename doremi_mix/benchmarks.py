"""The contest's score: seven benchmark tasks, each as a ratio to the score of the base model.

Scores are percentages from 0 to 100.  Nothing here runs a model or imports lm-eval: what was scored comes in as plain
values, from lm-eval's results or from a file of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from doremi_mix.errors import DataError


@dataclass(frozen=True, slots=True)
class ContestTask:
    """One task of the contest.

    Attributes:
        name: the name of the task or group in lm-eval, and in our output.
        num_fewshot: worked examples in each prompt.
        metric: what is scored, as lm-eval names it (``metric,filter``).
        base_score: the published score of Baichuan2-7B-Base, in percent.
    """

    name: str
    num_fewshot: int
    metric: str
    base_score: float


CONTEST_TASKS = (
    ContestTask("arc_challenge", 25, "acc_norm,none", 40.0),
    ContestTask("hellaswag", 25, "acc_norm,none", 80.0),
    ContestTask("truthfulqa_mc2", 0, "acc,none", 47.973),
    ContestTask("mmlu", 5, "acc,none", 54.4098),
    ContestTask("cmmlu", 5, "acc_norm,none", 59.2946),
    ContestTask("gsm8k", 5, "exact_match,strict-match", 20.0),
    ContestTask("scrolls_summscreenfd", 0, "rougeL,none", 2.7047),
)
"""The seven tasks, in the contest's order.

``acc`` of truthfulqa_mc2 is what was called mc2: the probability given to the true answers.  gsm8k is answered
greedily, and its answer is what ``#### (\\-?[0-9\\.\\,]+)`` finds.  The base scores are those on the development set
in the contest's public toolkit.
"""

CONTEST_LIMIT = 100
"""Items of each task; of a group such as mmlu, of each of its tasks."""

CONTEST_MAX_LENGTH = 1024
"""Tokens of a prompt and its answer; longer prompts lose their beginning."""

METRIC_PREFERENCE = ("acc_norm", "acc", "mc2", "exact_match", "rougeL")
"""The contest's order of preference; gsm8k's accuracy has since been named exact_match."""

_FILTER_PREFERENCE = ("strict-match", "none")

_PERCENT = {"acc_norm": 100.0, "acc": 100.0, "mc2": 100.0, "exact_match": 100.0, "rougeL": 1.0}
"""What turns lm-eval's value into percent: its ROUGE is in percent already."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """How one model did on one task.

    Attributes:
        name: the task or group.
        metric: what was scored, as lm-eval names it (``metric,filter``).
        value: the score in percent.
        standard_error: of the score, over items; None where it is unknown, 0 for a score that is taken as given.
        num_items: how many items were scored.
        items: the score of each item, in percent and in the task's order, if it is known; of a group, of one task
            after the other.
    """

    name: str
    metric: str
    value: float
    standard_error: float | None
    num_items: int
    items: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.name}: the score must be finite, got {self.value}")
        if self.standard_error is not None and not 0 <= self.standard_error < math.inf:
            raise ValueError(f"{self.name}: a standard error is 0 or more, got {self.standard_error}")
        if self.num_items < 1 or (self.items is not None and len(self.items) != self.num_items):
            given = "no" if self.items is None else len(self.items)
            raise ValueError(f"{self.name}: {self.num_items} items with {given} values")

    def to_dict(self) -> dict[str, Any]:
        """Returns what a JSON file can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskScore:
        """Reads what `to_dict` wrote."""
        items = values.get("items")
        return cls(**{**values, "items": None if items is None else tuple(items)})


@dataclass(frozen=True, slots=True)
class TaskRatio:
    """One task's score of the tuned model over that of the base model.

    Attributes:
        name: the task or group.
        base: the base model's score.
        tuned: the tuned model's score.
        ratio: tuned over base; None where the base score is zero.
        standard_error: of the ratio; None where it is undefined or an error is unknown.
        paired: whether the error counts that both models answered the same items; if not, the two scores are taken as
            independent, which makes the error too large for models that fail on the same items.
    """

    name: str
    base: TaskScore
    tuned: TaskScore
    ratio: float | None
    standard_error: float | None
    paired: bool


@dataclass(frozen=True, slots=True)
class ContestScore:
    """The contest's score of a model: the mean of its seven ratios.

    Attributes:
        tasks: the ratios, in the contest's order.
        mean: their mean.
        standard_error: of the mean, from the items of each task; None where one of the tasks' is unknown.  It says
            how far other items would move the score, not how far another training run would.
    """

    tasks: tuple[TaskRatio, ...]
    mean: float
    standard_error: float | None


class Estimate(NamedTuple):
    """A number and its standard error (None where unknown)."""

    value: float
    standard_error: float | None


def published_base() -> dict[str, TaskScore]:
    """Returns the published scores of Baichuan2-7B-Base, by task.

    Their error was not published: they are taken as given (standard error 0), so that the error of a ratio to them is
    that of the tuned model alone.
    """
    return {task.name: TaskScore(task.name, task.metric, task.base_score, 0.0, CONTEST_LIMIT) for task in CONTEST_TASKS}


def compare_tasks(base: Mapping[str, TaskScore], tuned: Mapping[str, TaskScore]) -> tuple[TaskRatio, ...]:
    """Returns the ratio of the scores of each task that both models were scored on.

    By the delta method, with r = tuned / base and the variances and covariance of the two scores::

        variance(r) = (var(tuned) - 2 * r * cov(base, tuned) + r**2 * var(base)) / base**2

    The covariance is the correlation over items times the two standard errors.  The errors are those of a normal
    approximation: a score of 0 % or 100 % has an error of 0.

    Args:
        base: scores of the base model, by task.
        tuned: scores of the tuned model, by task.

    Raises:
        DataError: a task was scored on different metrics or numbers of items.

    Example:
        >>> base = {"gsm8k": TaskScore("gsm8k", "exact_match,strict-match", 20.0, 3.0, 100)}
        >>> tuned = {"gsm8k": TaskScore("gsm8k", "exact_match,strict-match", 30.0, 4.0, 100)}
        >>> [(row.ratio, round(row.standard_error, 6), row.paired) for row in compare_tasks(base, tuned)]
        [(1.5, 0.30104, False)]
    """
    return tuple(_compare(score, tuned[name]) for name, score in base.items() if name in tuned)


def contest_score(base: Mapping[str, TaskScore], tuned: Mapping[str, TaskScore]) -> ContestScore:
    """Returns the contest's score: the mean over its seven tasks of tuned over base.

    The tasks' errors are independent: variance(mean) = sum of variance(ratio) / 7**2.

    Args:
        base: scores of the base model, by task; `published_base` has the published ones.  Other tasks are left out.
        tuned: scores of the tuned model, by task.

    Raises:
        DataError: a task is missing or was scored differently, or a base score is zero, so that a ratio is undefined.
    """
    names = [task.name for task in CONTEST_TASKS]
    for whose, scores in (("base", base), ("tuned", tuned)):
        if missing := [name for name in names if name not in scores]:
            raise DataError(
                f"the contest's score needs all of its {len(names)} tasks, but the {whose} model has no score for "
                f"{', '.join(missing)}; evaluate these too"
            )
    ratios = compare_tasks({name: base[name] for name in names}, tuned)
    values = []
    for row in ratios:
        if row.ratio is None:
            raise DataError(
                f"{row.name}: the base model scores 0 on all {row.base.num_items} items, so the ratio is undefined; "
                "score more items (evaluate.limit), or compare with the published base scores"
            )
        values.append(row.ratio)
    errors = [row.standard_error for row in ratios if row.standard_error is not None]
    error = math.hypot(*errors) / len(names) if len(errors) == len(names) else None
    return ContestScore(ratios, math.fsum(values) / len(values), error)


def final_score(preliminary: ContestScore, semi_final: ContestScore) -> Estimate:
    """Returns the contest's final score: half the preliminary one and half that of the semi-final."""
    error = None
    if preliminary.standard_error is not None and semi_final.standard_error is not None:
        error = math.hypot(preliminary.standard_error, semi_final.standard_error) / 2
    return Estimate((preliminary.mean + semi_final.mean) / 2, error)


def summarize_scores(base: Mapping[str, TaskScore], tuned: Mapping[str, TaskScore]) -> dict[str, Any]:
    """Returns what a results file says of two models: each task's scores and ratio, and the contest's score.

    The items' scores are left out.  ``contest`` is None where the contest's score cannot be had, and ``why_no_contest``
    says why.  A ratio is None where the base score is zero.

    Args:
        base: scores of the base model, by task.
        tuned: scores of the tuned model, by task.

    Raises:
        DataError: a task was scored on different metrics or numbers of items.
    """
    tasks = [
        {
            "task": row.name,
            "metric": row.base.metric,
            "base": _plain(row.base),
            "tuned": _plain(row.tuned),
            "ratio": row.ratio,
            "ratio_standard_error": row.standard_error,
            "paired": row.paired,
        }
        for row in compare_tasks(base, tuned)
    ]
    summary: dict[str, Any] = {"unit": "percent", "tasks": tasks, "contest": None, "why_no_contest": None}
    try:
        contest = contest_score(base, tuned)
    except DataError as error:
        summary["why_no_contest"] = str(error)
    else:
        summary["contest"] = {"mean_ratio": contest.mean, "standard_error": contest.standard_error}
    return summary


def _plain(score: TaskScore) -> dict[str, Any]:
    return {"score": score.value, "standard_error": score.standard_error, "num_items": score.num_items}


def _compare(base: TaskScore, tuned: TaskScore) -> TaskRatio:
    if base.metric != tuned.metric:
        raise DataError(
            f"{base.name}: the base model was scored on {base.metric}, the tuned model on {tuned.metric}; score both "
            "with the same task"
        )
    paired = base.items is not None and tuned.items is not None
    if paired and base.num_items != tuned.num_items:
        raise DataError(
            f"{base.name}: the base model was scored on {base.num_items:,} items, the tuned model on "
            f"{tuned.num_items:,}; score both with the same evaluate.limit"
        )
    if base.value == 0:
        return TaskRatio(base.name, base, tuned, None, None, paired)
    ratio = tuned.value / base.value
    if base.standard_error is None or tuned.standard_error is None:
        return TaskRatio(base.name, base, tuned, ratio, None, paired)
    covariance = _correlate(base.items, tuned.items) * base.standard_error * tuned.standard_error
    variance = tuned.standard_error**2 - 2 * ratio * covariance + (ratio * base.standard_error) ** 2
    return TaskRatio(base.name, base, tuned, ratio, math.sqrt(max(variance, 0.0)) / base.value, paired)


def _correlate(base: Sequence[float] | None, tuned: Sequence[float] | None) -> float:
    """Returns the correlation over items; 0 where there is none to know, or all items of a model score alike."""
    if base is None or tuned is None or np.ptp(base) == 0 or np.ptp(tuned) == 0:
        return 0.0
    return float(np.corrcoef(base, tuned)[0, 1])


def read_results(results: Mapping[str, Any]) -> dict[str, TaskScore]:
    """Reads the scores out of lm-eval's results, as it returns them or as its command line writes them.

    Of a group, such as mmlu, the group's own score is read, not those of its tasks.  With logged samples the items'
    scores are read too.

    Args:
        results: the value of ``lm_eval.simple_evaluate``, or the content of a ``results_*.json``.

    Raises:
        DataError: these are no results of lm-eval, or a task has no metric that is known here.
    """
    if not isinstance(results.get("results"), Mapping):
        raise DataError('these are no results of lm-eval: there is no "results"; give the content of a results_*.json')
    subtasks: Mapping[str, Sequence[str]] = results.get("group_subtasks") or {}
    rows: Mapping[str, Any] = results["results"]
    members = {member for group in subtasks if group in rows for member in subtasks[group]}
    scores = {}
    for name in (name for name in rows if name not in members):
        for scored in _with_metric(name, rows, subtasks):
            scores[scored] = _read_score(scored, results, subtasks)
    return scores


def _with_metric(name: str, rows: Mapping[str, Any], subtasks: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yields a task or group, or the members of a group that has no score of its own."""
    if subtasks.get(name) and _find_metric(rows.get(name, {})) is None:
        for member in subtasks[name]:
            yield from _with_metric(member, rows, subtasks)
    else:
        yield name


def _find_metric(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the preferred metric of a task's results and its filter."""
    for metric in METRIC_PREFERENCE:
        filters = [key.partition(",")[2] for key in row if key.partition(",")[0] == metric]
        if filters:
            known = [name for name in _FILTER_PREFERENCE if name in filters]
            return metric, (known or sorted(filters))[0]
    return None


def _read_score(name: str, results: Mapping[str, Any], subtasks: Mapping[str, Sequence[str]]) -> TaskScore:
    row = results["results"][name]
    found = _find_metric(row)
    if found is None:
        there = ", ".join(key for key in row if "," in key and "_stderr" not in key) or "none"
        raise DataError(
            f"{name}: none of its metrics ({there}) is known here; score a task with one of "
            f"{', '.join(METRIC_PREFERENCE)}"
        )
    metric, filter_name = found
    scale = _PERCENT[metric]
    leaves = list(_leaves(name, subtasks))
    items = _read_items(leaves, results.get("samples") or {}, metric, filter_name, scale)
    value, error = row[f"{metric},{filter_name}"], row.get(f"{metric}_stderr,{filter_name}")
    if not _is_number(value):
        raise DataError(f"{name}: {metric},{filter_name} must be a number, got {value!r}; evaluate it again")
    if _is_number(error):
        error = float(error) * scale
    else:
        error = float(np.std(items, ddof=1)) / math.sqrt(len(items)) if items and len(items) > 1 else None
    num_items = len(items) if items else _count_items(name, leaves, results)
    return TaskScore(name, f"{metric},{filter_name}", float(value) * scale, error, num_items, items)


def _leaves(name: str, subtasks: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yields the tasks of a group in their order; a task is its own only one."""
    if not subtasks.get(name):
        yield name
    for member in subtasks.get(name, ()):
        yield from _leaves(member, subtasks)


def _read_items(
    leaves: Sequence[str], samples: Mapping[str, Any], metric: str, filter_name: str, scale: float
) -> tuple[float, ...] | None:
    """Returns the items' scores; None unless every item of every task has a number."""
    items: list[float] = []
    for leaf in leaves:
        rows = [row for row in samples.get(leaf, ()) if row.get("filter", filter_name) == filter_name]
        values = [row.get(metric) for row in sorted(rows, key=lambda row: int(row["doc_id"]))]
        if not values or not all(_is_number(value) for value in values):
            return None
        items += [float(value) * scale for value in values]
    return tuple(items)


def _count_items(name: str, leaves: Sequence[str], results: Mapping[str, Any]) -> int:
    counts = results.get("n-samples") or {}
    rows = results["results"]
    total = 0
    for leaf in leaves:
        count = counts[leaf]["effective"] if leaf in counts else rows.get(leaf, {}).get("sample_len")
        if not isinstance(count, int):
            raise DataError(f'{name}: lm-eval\'s results do not say how many items {leaf} has; they lack "n-samples"')
        total += count
    return total


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(float(value))

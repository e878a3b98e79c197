"""Benchmark tasks on one model, with lm-eval as the engine; the only module that imports it.

Tasks come from three places, the first of which wins: the user's task folder, `benchmark_tasks` beside this module, and
lm-eval's own list.  A **task folder** holds tasks in lm-eval's YAML, one ``<task>.yaml`` each, and their data.  It is
how a machine without a connection evaluates::

    my_tasks/arc_challenge.yaml       task: arc_challenge
    my_tasks/data/arc_challenge.jsonl dataset_path: json
                                      dataset_kwargs: {data_files: {test: data/arc_challenge.jsonl}}

Relative data files are read from the task folder.  ``!function module.name`` runs Python of the folder, or of any
installed package.

Memory: lm-eval holds the logits of a whole batch and their log-softmax in float32, about
``batch_size * max_length * vocabulary * 10`` bytes: 1.3 GB a row of 1,024 tokens with a vocabulary of 125,696.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from doremi_mix.benchmarks import CONTEST_TASKS, TaskScore, read_results
from doremi_mix.errors import ConfigError, DataError, SourceNotFoundError, short_reason

PACKAGED_TASKS = Path(__file__).with_name("benchmark_tasks")

DEFAULT_SEED = 1234
"""Of the choice of worked examples: lm-eval's own, so that its published numbers can be met."""


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task or group with its data, ready to run on any number of models.

    Attributes:
        name: the task or group.
        source: where it is defined: a path, or ``lm-eval <version>/<path>``.
        loaded: what lm-eval's task manager returned.
        own_shots: by member, the worked examples that its definition asks for; None where it does not say.
    """

    name: str
    source: str
    loaded: Mapping[str, Any]
    own_shots: Mapping[str, int | None]


def check_lm_eval() -> None:
    """Raises ConfigError when lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError("evaluate.tasks: benchmark tasks need lm-eval; run: pip install 'doremi-mix[evaluate]'")


def load_tasks(names: Sequence[str], task_folder: Path | None = None) -> dict[str, LoadedTask]:
    """Finds tasks and reads their data: everything that can fail before a model is loaded.

    Args:
        names: tasks or groups, as lm-eval or the task folder names them.
        task_folder: the user's own tasks, which come before all others of the same name.

    Returns:
        The tasks by name, in the order given.

    Raises:
        ConfigError: lm-eval is not installed, a name is unknown, or a task cannot be built.
        SourceNotFoundError: the task folder does not exist.
        DataError: a file of the task folder cannot be read, or the data of a task cannot be had.
    """
    check_lm_eval()
    folders = [PACKAGED_TASKS]
    local: dict[str, Path] = {}
    if task_folder is not None:
        task_folder = task_folder.expanduser().resolve()
        local = _check_folder(task_folder)
        folders.append(task_folder)
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=folders, include_defaults=False)
        if not _closed(names, manager.task_index):
            # Reading lm-eval's own list takes seconds, which a folder of one's own does not need.
            manager = TaskManager(include_path=folders)
        for name, path in local.items():
            # What lm-eval cannot read it leaves out, and would take its own task of that name.
            if name not in manager.task_index or manager.task_index[name].yaml_path != path:
                raise DataError(f"{path}: lm-eval cannot read {name}; look at the files that it includes")
        for name in names:
            _check_name(name, manager)
        return {name: _load(name, manager, task_folder) for name in names}


def _check_folder(folder: Path) -> dict[str, Path]:
    """Returns the files of a task folder by task or group, and raises what is wrong with them: lm-eval would not."""
    if not folder.is_dir():
        raise SourceNotFoundError(f"evaluate.task_folder: {folder} is no folder; give one with <task>.yaml files")
    if (other := next(iter(sorted(folder.glob("**/*.yml"))), None)) is not None:
        raise DataError(f"{other}: lm-eval reads *.yaml alone; rename the file")
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskYaml)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"{path} is no YAML ({short_reason(error)}); mend it, or take it out") from error
        if not isinstance(content, dict):
            raise DataError(f"{path} must hold a task in lm-eval's YAML, got {type(content).__name__}")
        # A file without a name is included by others.
        name = content.get("task") if isinstance(content.get("task"), str) else content.get("group")
        if name is None:
            continue
        if name in found:
            raise DataError(f"{path} and {found[name]} both define {name}; keep one of them")
        found[name] = path
    if not found:
        raise DataError(f"evaluate.task_folder: {folder} has no task; it needs <task>.yaml files in lm-eval's format")
    return found


class _TaskYaml(yaml.SafeLoader):
    """Reads lm-eval's YAML without running what ``!function`` names."""


_TaskYaml.add_constructor("!function", lambda _loader, node: node.value)


def _closed(names: Sequence[str], index: Mapping[str, Any]) -> bool:
    """Says whether tasks, and the members of groups, are all in an index."""
    for name in names:
        if name not in index:
            return False
        members = (index[name].cfg or {}).get("task")
        if isinstance(members, list):
            inner = [
                member if isinstance(member, str) else member.get("group", member.get("task")) for member in members
            ]
            if not _closed(inner, index):
                return False
    return True


def _check_name(name: str, manager: Any) -> None:
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "list all with: lm-eval ls tasks"
        raise ConfigError(f"evaluate.tasks: lm-eval has no task {name!r}; {hint}")
    if name in manager.all_tags:
        members = ", ".join(sorted(manager.task_index[name].tags)[:3])
        raise ConfigError(f"evaluate.tasks: {name!r} is a label of several tasks ({members}, ...); name the tasks")


def _load(name: str, manager: Any, task_folder: Path | None) -> LoadedTask:
    """Reads the data of one task."""
    path = manager.task_index[name].yaml_path
    source = _describe_source(path)
    try:
        # lm-eval hands relative paths to a library that knows nothing of the YAML file they are in.
        with contextlib.chdir(task_folder) if task_folder is not None else contextlib.nullcontext():
            loaded = manager.load([name])
    except ImportError as error:
        raise ConfigError(f"evaluate.tasks: {name} ({source}) cannot be built: {short_reason(error)}") from error
    except Exception as error:
        if task_folder is not None and path.is_relative_to(task_folder):
            # datasets hides what it found behind an error that says that there was one.
            raise DataError(f"{source}: {name} cannot be loaded: {short_reason(error.__cause__ or error)}") from error
        if not isinstance(error, OSError | ValueError):
            raise
        raise DataError(
            f"{name}: its data cannot be had from the hub ({short_reason(error)}); connect this machine, fill the "
            "cache on another (HF_HOME), or give a local task file (evaluate.task_folder)"
        ) from error
    shots = {leaf: task.get_config("num_fewshot") for leaf, task in loaded["tasks"].items()}
    return LoadedTask(name, source, loaded, shots)


def _describe_source(path: Path) -> str:
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks"
    if path.is_relative_to(root):
        return f"lm-eval {lm_eval.__version__}/{path.relative_to(root)}"
    return f"doremi-mix/{path.name}" if path.parent == PACKAGED_TASKS else str(path)


def choose_shots(name: str, setting: Mapping[str, int] | int | None) -> int | None:
    """Returns how many worked examples a prompt of a task gets.

    Args:
        name: the task or group.
        setting: one number for all tasks, numbers by task, or None.

    Returns:
        What the setting says; else the contest's number; else None, which leaves it to the task's definition.
    """
    if isinstance(setting, int):
        return setting
    contest = {task.name: task.num_fewshot for task in CONTEST_TASKS}
    return (setting or {}).get(name, contest.get(name))


def wrap_model(
    model: Any,
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int | None = None,
    autocast_dtype: Any = None,
) -> Any:
    """Makes a causal LM what lm-eval can ask.

    Args:
        model: a transformers model on its device, with or without adapters in it; it is put into evaluation mode.
        tokenizer: its transformers tokenizer.
        max_length: tokens of a prompt and its answer; longer prompts lose their beginning.
        batch_size: prompts in a forward pass; by default 8 on an accelerator and 1 on a CPU.
        autocast_dtype: the dtype to compute in, if not that of the weights (for example ``torch.bfloat16``).

    Returns:
        The language model for `run_task`.  Log-softmax is always computed in float32.
    """
    check_lm_eval()
    with _quiet():
        import torch
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size or (1 if model.device.type == "cpu" else 8),
            mixed_precision_dtype=autocast_dtype,
            softmax_dtype=torch.float32,
        )
    # A run has one progress bar, and it is ours.
    for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(wrapped, request, partial(getattr(wrapped, request), disable_tqdm=True))
    return wrapped


def count_requests(task: LoadedTask, limit: int | None) -> int:
    """Returns how many answers the model is asked to score or to write: the total for `run_task`'s ``advance``."""
    total = 0
    for member in task.loaded["tasks"].values():
        documents = [document for _, document in member.doc_iterator(limit=limit)]
        if member.OUTPUT_TYPE == "multiple_choice":
            total += sum(len(member.doc_to_choice(document)) for document in documents)
        else:
            total += len(documents) * int(member.get_config("repeats") or 1)
    return total


def run_task(
    task: LoadedTask,
    language_model: Any,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = DEFAULT_SEED,
    advance: Callable[[int], object] | None = None,
) -> TaskScore:
    """Scores a model on one task.

    Two models are asked the same prompts, if the arguments are the same.

    Args:
        task: the task or group with its data.
        language_model: from `wrap_model`, or any ``lm_eval.api.model.LM``.
        num_fewshot: worked examples in a prompt; None leaves it to the task's definition.  As in lm-eval, a definition
            that says 0 has its examples in the prompt and gets no others.
        limit: items of the task, from the first on; of a group, of each of its tasks.  None takes all.
        seed: of the choice of worked examples.
        advance: called with the number of answers that were just finished.

    Returns:
        The score with its error and the items' scores.

    Raises:
        ConfigError: an answer may be longer than the model's ``max_length`` allows.
        DataError: there are fewer worked examples than asked for, or the task has no metric that is known.
    """
    with _quiet():
        from lm_eval import evaluate

        check_task(task, num_fewshot)
        for name, member in task.loaded["tasks"].items():
            _check_answer_length(name, member, language_model)
            member.set_config("num_fewshot", _shots_of(task, name, num_fewshot))
            member.set_fewshot_seed(seed)
        language_model.set_cache_hook(_Progress(advance or (lambda _: None)))
        results = evaluate(language_model, task.loaded, limit=limit, bootstrap_iters=1000, log_samples=True)
    return read_results(results)[task.name]


def check_task(task: LoadedTask, num_fewshot: int | None) -> None:
    """Raises DataError when a task has fewer worked examples than its prompts are to hold.

    Args:
        task: the task or group with its data.
        num_fewshot: as for `run_task`.
    """
    for name, member in task.loaded["tasks"].items():
        _check_shots(task, name, member, _shots_of(task, name, num_fewshot))


def _shots_of(task: LoadedTask, name: str, num_fewshot: int | None) -> int:
    own = task.own_shots[name]
    return (own if own == 0 or num_fewshot is None else num_fewshot) or 0


class _Progress:
    """Stands where lm-eval would store a finished answer."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        self.advance = advance

    def add_partial(self, _kind: str, _request: Any, _answer: Any) -> None:
        """Counts one answer."""
        self.advance(1)


def _check_shots(task: LoadedTask, name: str, member: Any, shots: int) -> None:
    if shots == 0:
        return
    split = member.fewshot_cfg.split or member.get_config("training_split") or member.get_config("validation_split")
    # An item must not be its own example.
    available = len(member.sampler.df) - (split in (None, member.get_config("test_split")))
    if available < shots:
        raise DataError(
            f"{name}: its prompts need {shots} worked examples, but there are {available} to choose from; lower "
            f"evaluate.num_fewshot.{task.name}, or add rows"
        )


def _check_answer_length(name: str, member: Any, language_model: Any) -> None:
    max_length = getattr(language_model, "max_length", None)
    if member.OUTPUT_TYPE != "generate_until" or max_length is None:
        return
    longest = (member.get_config("generation_kwargs") or {}).get("max_gen_toks", language_model.max_gen_toks)
    if longest >= max_length:
        raise ConfigError(
            f"evaluate.max_length is {max_length}, but an answer of {name} may take {longest} tokens, which leaves no "
            "room for its prompt; raise evaluate.max_length, or give the task a lower max_gen_toks"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-eval and the libraries under it from printing: a run has one voice."""
    with contextlib.ExitStack() as undo:
        for name in ("lm_eval", "datasets", "transformers", "absl"):
            logger = logging.getLogger(name)
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        import datasets
        import lm_eval.api.task as task_module

        if not datasets.are_progress_bars_disabled():
            undo.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        undo.callback(setattr, task_module, "tqdm", task_module.tqdm)
        task_module.tqdm = partial(task_module.tqdm, disable=True)
        yield

"""Filters of Data-Juicer, run on batches of rows, in this process and without its dataset, files and messages.

Data-Juicer would install packages and download models and word lists when an operator wants them.  Here it may not:
what is missing is an error that names it.  What arguments of an operator name, such as a hub model, is used as named.

B rows in a batch.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from doremi_mix.errors import ConfigError, DataError, short_reason
from doremi_mix.filters.texts import example_texts

if TYPE_CHECKING:
    import pyarrow as pa

MISSING_DATA_JUICER = "Data-Juicer, which is not installed; run: pip install 'doremi-mix[data-juicer]'"

_COLUMNS = ("text", "instruction", "input", "output", "system", "history", "query", "response")
_STATS = "__dj__stats__"
_NOT_PASSED_ON = (_STATS, "__dj__context__")  # those of an earlier run; statistics that are there are not computed anew


def data_juicer_installed() -> bool:
    """Returns whether py-data-juicer is installed; does not import it."""
    return importlib.util.find_spec("data_juicer") is not None


class ForeignScorer:
    """A filter of Data-Juicer as a scorer: for each row whether it is kept, and its statistic.

    The operator sees the columns ``text`` (``example_texts``), ``instruction``, ``input``, ``output``, ``system``,
    ``history`` ([user, assistant] pairs), ``query`` (instruction and input, a line each) and ``response`` (the output).
    Where the batch has the column ``row``, it also sees the other columns of the row as it was in its file; a
    ``field_key`` that a row lacks counts as null.

    Args:
        name: of the operator.
        arguments: its arguments in a recipe.

    Raises:
        ConfigError: Data-Juicer is not installed; it has no such filter, or the filter no such argument; an argument is
            wrong; or a package or a file that the filter needs is missing.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        if not data_juicer_installed():
            raise ConfigError(f"{name} runs through {MISSING_DATA_JUICER}")
        self._name = name
        self._field_path = [part for part in str(arguments.get("field_key") or "").split(".") if part]
        with _nothing_fetched(name):
            op_class = _find_filter(name, arguments)
            try:
                self._op = op_class(**arguments)
            except ConfigError:
                raise
            except Exception as error:  # whatever the library raises
                raise ConfigError(f"{name}: Data-Juicer refuses its arguments: {_reason(error)}") from error

    def __call__(self, batch: pa.RecordBatch) -> dict[str, NDArray[Any]]:
        """Scores rows.

        Args:
            batch: examples with the columns of a loaded domain; system, history and row may be missing.

        Returns:
            ``keep``, bool [B], and ``value``, float32 [B]: the first number among the operator's statistics of a row,
            NaN where there is none.

        Raises:
            ConfigError: a package or a file that the filter needs is missing.
            DataError: the filter fails on these rows.
            ValueError: the filter looks at a field of the row as it was, and the batch has no column ``row``.
        """
        if self._field_path and self._field_path[0] not in _COLUMNS and "row" not in batch.schema.names:
            raise ValueError(
                f"{self._name} looks at {'.'.join(self._field_path)}, so the batch must have the column row"
            )
        samples = list(_samples(batch, self._field_path))
        with _nothing_fetched(self._name):
            try:
                keep, stats = _run_batched(self._op, samples) if self._op.is_batched_op() else _run(self._op, samples)
            except ConfigError:
                raise
            except Exception as error:  # whatever the library raises
                where = f" from {batch.column('id')[0]} on" if "id" in batch.schema.names and samples else ""
                raise DataError(
                    f"{self._name} of Data-Juicer fails on the rows{where}: {_reason(error)}; correct its arguments or "
                    "take it out of the recipe"
                ) from error
        return {
            "keep": np.fromiter(map(bool, keep), np.bool_, len(samples)),
            "value": np.fromiter(map(_first_number, stats), np.float32, len(samples)),
        }


def _run_batched(op: Any, samples: list[dict[str, Any]]) -> tuple[list[Any], list[dict[str, Any]]]:
    if not samples:
        return [], []
    columns = dict.fromkeys(key for sample in samples for key in sample)
    table = {key: [sample.get(key) for sample in samples] for key in columns}
    table = op.compute_stats_batched(table)
    return list(op.process_batched(table)), table[_STATS]


def _run(op: Any, samples: list[dict[str, Any]]) -> tuple[list[Any], list[dict[str, Any]]]:
    scored = [op.compute_stats_single(sample) for sample in samples]
    return [op.process_single(sample) for sample in scored], [sample[_STATS] for sample in scored]


def _first_number(stats: Mapping[str, Any]) -> float:
    for value in stats.values():
        if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
            return float(value)
    return float("nan")


def _samples(batch: pa.RecordBatch, field_path: list[str]) -> Iterator[dict[str, Any]]:
    """Gives each row as Data-Juicer has rows."""
    import orjson

    def column(name: str) -> list[Any]:
        return batch.column(name).to_pylist() if name in batch.schema.names else [None] * len(batch)

    texts = example_texts(batch).to_pylist()
    rest = (column(name) for name in ("instruction", "input", "output", "system", "history", "row"))
    for text, instruction, given, output, system, history, row in zip(texts, *rest, strict=True):
        sample = orjson.loads(row) if row else {}
        for name in _NOT_PASSED_ON:
            sample.pop(name, None)
        sample |= {
            "text": text,
            "instruction": instruction or "",
            "input": given or "",
            "output": output or "",
            "system": system or "",
            "history": [[turn["user"], turn["assistant"]] for turn in history or ()],
            "query": "\n".join(part for part in (instruction, given) if part),
            "response": output or "",
            _STATS: {},
        }
        _fill(sample, field_path)
        yield sample


def _fill(sample: dict[str, Any], path: list[str]) -> None:
    """Puts a null where a row lacks a field, as a dataset of rows with different fields has it."""
    for part in path[:-1]:
        if not isinstance(sample.get(part), dict):
            sample[part] = {}
        sample = sample[part]
    if path:
        sample.setdefault(path[-1], None)


def _find_filter(name: str, arguments: Mapping[str, Any]) -> Any:
    """Returns the class of a filter, once its arguments are known to it: Data-Juicer passes over others unsaid."""
    try:
        from data_juicer.ops import OPERATORS, Filter
        from loguru import logger
    except ImportError as error:
        raise _cannot_be_imported(name, error) from error

    logger.disable("data_juicer")
    op_class = OPERATORS.modules.get(name)
    if op_class is None or not issubclass(op_class, Filter):
        filters = [known for known, each in OPERATORS.modules.items() if issubclass(each, Filter)]
        raise ConfigError(f"Data-Juicer has no filter {name}{_nearest(name, filters)}")
    own = [
        argument
        for each in op_class.__mro__
        if "__init__" in vars(each)
        for argument, kind in inspect.signature(each.__init__).parameters.items()
        if argument != "self" and kind.kind in (kind.POSITIONAL_OR_KEYWORD, kind.KEYWORD_ONLY)
    ]
    for argument in arguments:
        if argument not in (*own, *op_class._BASE_PARAMS):
            raise ConfigError(f"{name} of Data-Juicer has no argument {argument}{_nearest(argument, own)}")
    return op_class


def _cannot_be_imported(name: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{name} runs through Data-Juicer, which cannot be imported ({_reason(error)}); run: pip install "
        "'doremi-mix[data-juicer]'"
    )


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _reason(error: Exception) -> str:
    said = short_reason(error)
    return said if said == type(error).__name__ else f"{type(error).__name__}: {said}"


@contextmanager
def _nothing_fetched(name: str) -> Iterator[None]:
    """Keeps Data-Juicer from installing packages and from downloading its own models and word lists.

    Raises:
        ConfigError: it wanted to, even if it then went on without; or it cannot be imported.
    """
    try:
        from data_juicer.utils import asset_utils, model_utils
        from data_juicer.utils.lazy_loader import LazyLoader
    except ImportError as error:
        raise _cannot_be_imported(name, error) from error
    refusals: list[str] = []

    def refuse(what: str) -> NoReturn:
        refusals.append(what)
        raise ConfigError(what)

    def refuse_package(package: str, _options: object = None) -> NoReturn:
        refuse(f"{name} of Data-Juicer needs the package {package}, which is not installed; run: pip install {package}")

    check_model = model_utils.check_model

    def check_model_here(model_name: str, force: bool = False) -> Any:
        if force:
            refuse(
                f"{name} of Data-Juicer needs the file {model_name}, which is not there or broken; put it into "
                f"{model_utils.DJMC}"
            )
        return check_model(model_name)

    class NoRequests:
        @staticmethod
        def get(address: str) -> NoReturn:
            refuse(
                f"{name} of Data-Juicer needs {address}, which is not there; put it into its folder of word "
                f"lists, which is {asset_utils.ASSET_DIR} unless its arguments name another"
            )

    replaced: list[tuple[Any, str, Any]] = [
        (LazyLoader, "_install_package", staticmethod(refuse_package)),
        (model_utils, "check_model", check_model_here),
        (asset_utils, "requests", NoRequests),
    ]
    before = [vars(owner)[attribute] for owner, attribute, _ in replaced]
    for owner, attribute, value in replaced:
        setattr(owner, attribute, value)
    try:
        yield
    except Exception:
        if not refusals:
            raise
    finally:
        for (owner, attribute, _), value in zip(replaced, before, strict=True):
            setattr(owner, attribute, value)
    if refusals:
        raise ConfigError(refusals[0])

"""Filters that run through Data-Juicer: on a small stand-in for the library, and slowly on the real one."""

import importlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import doremi_mix
from doremi_mix.errors import ConfigError, DataError
from doremi_mix.filters.data_juicer import ForeignScorer, data_juicer_installed
from doremi_mix.filters.recipe_ops import HOW_IT_RUNS, RECIPE_OPS, REFUSED_KINDS, SAME_IF

# What of the library is relied on, and filters that do what its own do.
STAND_IN = {
    "loguru.py": "class logger:\n    disabled = []\n    disable = disabled.append\n",
    "data_juicer/__init__.py": "",
    "data_juicer/utils/__init__.py": "",
    "data_juicer/utils/lazy_loader.py": """
class LazyLoader:
    @classmethod
    def _install_package(cls, package_spec, pip_args=None):
        raise AssertionError("a package was installed")
""",
    "data_juicer/utils/model_utils.py": """
DJMC = "/models"
def check_model(model_name, force=False):
    assert not force, "a model was downloaded"
    return "/models/" + model_name
""",
    "data_juicer/utils/asset_utils.py": """
ASSET_DIR = "/assets"
class requests:
    def get(address):
        raise AssertionError("a word list was downloaded")
""",
    "data_juicer/ops.py": """
from data_juicer.utils import asset_utils, model_utils
from data_juicer.utils.lazy_loader import LazyLoader

STATS = "__dj__stats__"

class Filter:
    _BASE_PARAMS = {"text_key": (str, "text"), "num_proc": (None, None)}
    batched = False
    def __init__(self, *args, **kwargs):
        self.text_key = kwargs.get("text_key", "text")
    def is_batched_op(self):
        return self.batched

class Mapper:
    pass

class LengthFilter(Filter):
    batched = True
    def __init__(self, min_len=10, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if min_len < 0:
            raise ValueError("min_len must not be negative.")
        self.min_len = min_len
    def compute_stats_batched(self, samples):
        for text, stats in zip(samples[self.text_key], samples[STATS]):
            if "num" not in stats:  # as the library has it: what is there is not computed anew
                stats["note"], stats["num"] = "no number", len(text)
        return samples
    def process_batched(self, samples):
        return map(lambda stats: stats["num"] >= self.min_len, samples[STATS])

class FieldFilter(Filter):
    def __init__(self, field_key="", target_value=(), *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.field_key, self.target_value = field_key, target_value
    def compute_stats_single(self, sample):
        value = sample
        for key in self.field_key.split("."):
            assert key in value
            value = value[key]
        sample[STATS][self.field_key] = value
        return sample
    def process_single(self, sample):
        return sample[STATS][self.field_key] in self.target_value

class SeenFilter(Filter):
    seen = []
    def compute_stats_single(self, sample):
        self.seen.append({key: value for key, value in sample.items()})
        sample[STATS]["answer"] = True
        return sample
    def process_single(self, sample):
        return True

class PackageFilter(Filter):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        LazyLoader._install_package("spacy", "--no-deps")

class ModelFilter(Filter):
    def compute_stats_single(self, sample):
        try:
            sample[STATS]["path"] = model_utils.check_model("found.bin")
            raise OSError("broken file")
        except:
            sample[STATS]["path"] = model_utils.check_model("model.bin", force=True)
    def process_single(self, sample):
        return True

class CarefreeFilter(Filter):
    def compute_stats_single(self, sample):
        try:
            asset_utils.requests.get("https://example.com/words.json")
        except Exception:
            pass
        return sample
    def process_single(self, sample):
        return True

class BrokenFilter(Filter):
    def compute_stats_single(self, sample):
        raise KeyError("suffix")

class OPERATORS:
    modules = {
        "length_filter": LengthFilter, "field_filter": FieldFilter, "seen_filter": SeenFilter,
        "package_filter": PackageFilter, "model_filter": ModelFilter, "carefree_filter": CarefreeFilter,
        "broken_filter": BrokenFilter, "clean_mapper": Mapper,
    }
""",
}

ROWS = [
    {
        "id": "d:0",
        "instruction": "Add.",
        "input": "1 and 3",
        "output": "4",
        "system": "Be brief.",
        "history": [{"user": "Hi", "assistant": "Hello"}],
        "row": json.dumps({"meta": {"lang": "en", "score": 3}, "output": "old", "__dj__stats__": {"num": 99}}),
    },
    {
        "id": "d:1",
        "instruction": None,
        "input": "",
        "output": "Plain text.",
        "system": "",
        "history": [],
        "row": json.dumps({"text": "Another text.", "meta": {"lang": "zh"}}),
    },
    {
        "id": "d:2",
        "instruction": "Write.",
        "input": "",
        "output": "A",
        "system": "",
        "history": [],
        "row": '{"meta": 1}',
    },
]
BATCH = pa.RecordBatch.from_pylist(ROWS)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    for name, text in STAND_IN.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("data_juicer", "loguru")]:
        del sys.modules[name]


def message(make):
    with pytest.raises((ConfigError, DataError)) as caught:
        make()
    return type(caught.value).__name__, str(caught.value)


def test_a_batched_filter(stand_in):
    scores = ForeignScorer("length_filter", {"min_len": 12})(BATCH)
    texts = ["Hi Hello Add. 1 and 3 4", "Plain text.", "Write.  A"]
    assert scores["keep"].dtype == np.bool_
    assert scores["value"].dtype == np.float32
    assert scores["keep"].tolist() == [len(text) >= 12 for text in texts]
    assert scores["value"].tolist() == list(map(len, texts))  # not the 99 that an earlier run left in the row


def test_a_filter_of_single_rows_looks_at_the_row_as_it_was(stand_in):
    scores = ForeignScorer("field_filter", {"field_key": "meta.lang", "target_value": ["en"]})(BATCH)
    assert scores["keep"].tolist() == [True, False, False]
    assert np.isnan(scores["value"]).all()
    scores = ForeignScorer("field_filter", {"field_key": "meta.score", "target_value": [3]})(BATCH)
    assert scores["keep"].tolist() == [True, False, False]
    assert scores["value"][0] == 3
    assert np.isnan(scores["value"][1:]).all()


def test_what_filters_see(stand_in):
    ForeignScorer("seen_filter", {})(BATCH)
    seen = sys.modules["data_juicer.ops"].SeenFilter.seen
    assert seen[0] == {
        "text": "Hi Hello Add. 1 and 3 4",
        "instruction": "Add.",
        "input": "1 and 3",
        "output": "4",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
        "query": "Add.\n1 and 3",
        "response": "4",
        "meta": {"lang": "en", "score": 3},
        "__dj__stats__": {"answer": True},
    }
    assert {key: seen[1][key] for key in ("text", "instruction", "query", "response")} == {
        "text": "Plain text.",
        "instruction": "",
        "query": "",
        "response": "Plain text.",
    }


def test_a_batch_need_not_have_all_columns(stand_in):
    bare = BATCH.select(["instruction", "input", "output"])
    scores = ForeignScorer("length_filter", {})(bare)
    assert scores["value"].tolist() == [len("Add. 1 and 3 4"), len("Plain text."), len("Write.  A")]
    scores = ForeignScorer("field_filter", {"field_key": "response", "target_value": ["4"]})(bare)
    assert scores["keep"].tolist() == [True, False, False]
    with pytest.raises(ValueError, match=r"^field_filter looks at meta.lang, so the batch must have the column row$"):
        ForeignScorer("field_filter", {"field_key": "meta.lang"})(bare)


@pytest.mark.parametrize("op", ["length_filter", "seen_filter"])
def test_batches_without_rows(stand_in, op):
    scores = ForeignScorer(op, {})(BATCH.slice(0, 0))
    assert (scores["keep"].shape, scores["value"].shape) == ((0,), (0,))


def test_rows_are_scored_alike_in_any_batches(stand_in):
    for op, arguments in [("length_filter", {}), ("field_filter", {"field_key": "meta.score", "target_value": [3]})]:
        scorer = ForeignScorer(op, arguments)
        whole, parts = scorer(BATCH), [scorer(BATCH.slice(place, 1)) for place in range(len(BATCH))]
        for name in ("keep", "value"):
            np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))


def test_messages_of_the_library_are_off(stand_in):
    ForeignScorer("length_filter", {})
    assert sys.modules["loguru"].logger.disabled == ["data_juicer"]


@pytest.mark.parametrize(
    ("op", "arguments", "expected"),
    [
        ("length_filtre", {}, ("ConfigError", "Data-Juicer has no filter length_filtre; did you mean length_filter?")),
        ("clean_mapper", {}, ("ConfigError", "Data-Juicer has no filter clean_mapper")),
        (
            "length_filter",
            {"min_length": 3},
            ("ConfigError", "length_filter of Data-Juicer has no argument min_length; did you mean min_len?"),
        ),
        (
            "length_filter",
            {"min_len": -1},
            (
                "ConfigError",
                "length_filter: Data-Juicer refuses its arguments: ValueError: min_len must not be negative",
            ),
        ),
        (
            "package_filter",
            {},
            (
                "ConfigError",
                "package_filter of Data-Juicer needs the package spacy, which is not installed; run: pip install spacy",
            ),
        ),
        (
            "model_filter",
            {},
            (
                "ConfigError",
                "model_filter of Data-Juicer needs the file model.bin, which is not there or broken; put it into "
                "/models",
            ),
        ),
        (
            "carefree_filter",
            {},
            (
                "ConfigError",
                "carefree_filter of Data-Juicer needs https://example.com/words.json, which is not there; put it into "
                "its folder of word lists, which is /assets unless its arguments name another",
            ),
        ),
        (
            "broken_filter",
            {},
            (
                "DataError",
                "broken_filter of Data-Juicer fails on the rows from d:0 on: KeyError: 'suffix'; correct its arguments "
                "or take it out of the recipe",
            ),
        ),
    ],
)
def test_what_cannot_be(stand_in, op, arguments, expected):
    assert message(lambda: ForeignScorer(op, arguments)(BATCH)) == expected


def test_the_library_is_as_before_afterwards(stand_in):
    ForeignScorer("length_filter", {})(BATCH)
    message(lambda: ForeignScorer("package_filter", {}))
    utils = importlib.import_module("data_juicer.utils.model_utils")
    assert utils.check_model("x") == "/models/x"
    loader = importlib.import_module("data_juicer.utils.lazy_loader").LazyLoader
    assert isinstance(vars(loader)["_install_package"], classmethod)
    with pytest.raises(AssertionError, match="a package was installed"):
        loader._install_package("spacy")


def test_general_arguments_are_known(stand_in):
    bare = ForeignScorer("length_filter", {"num_proc": 4, "text_key": "output"})(BATCH)
    assert bare["value"].tolist() == [1, len("Plain text."), 1]


def test_whether_it_is_installed(stand_in):
    assert data_juicer_installed()
    assert "data_juicer" not in sys.modules


def test_without_the_library(monkeypatch):
    monkeypatch.setattr("doremi_mix.filters.data_juicer.data_juicer_installed", lambda: False)
    assert message(lambda: ForeignScorer("length_filter", {})) == (
        "ConfigError",
        "length_filter runs through Data-Juicer, which is not installed; run: pip install 'doremi-mix[data-juicer]'",
    )


@pytest.mark.parametrize("module", ["ops.py", "utils/asset_utils.py"])
def test_a_library_that_lacks_a_package(stand_in, tmp_path, module):
    (tmp_path / "data_juicer" / module).write_text("import a_package_that_nobody_has\n", encoding="utf-8")
    assert message(lambda: ForeignScorer("length_filter", {})) == (
        "ConfigError",
        "length_filter runs through Data-Juicer, which cannot be imported (ModuleNotFoundError: No module named "
        "'a_package_that_nobody_has'); run: pip install 'doremi-mix[data-juicer]'",
    )


# --- the real library, in an environment of its own ---

REAL = r"""
import inspect, json, sys
import numpy as np
import pyarrow as pa
from doremi_mix.errors import DoremiMixError
from doremi_mix.filters.data_juicer import ForeignScorer

batch = pa.RecordBatch.from_pylist(json.load(sys.stdin))

def score(name, **arguments):
    try:
        scores = ForeignScorer(name, arguments)(batch)
    except DoremiMixError as error:
        return [type(error).__name__, str(error)]
    return [scores["keep"].tolist(), [None if np.isnan(value) else round(float(value), 4) for value in scores["value"]]]

results = {
    "lines": score("average_line_length_filter", min_len=12),
    "field": score("specified_field_filter", field_key="meta.lang", target_value=["en"]),
    "number": score("specified_numeric_field_filter", field_key="meta.score", min_value=3),
    "condition": score("general_field_filter", filter_condition="output == '4' or query == 'Write.'"),
    "open": score("text_length_filter", min_len=9, min_closed_interval=False),
    "suffix": score("suffix_filter", suffixes=[".txt"]),
    "package": score("text_action_filter"),
    "words": score("flagged_words_filter", flagged_words_dir=sys.argv[1]),
}

from data_juicer.ops import OPERATORS, Deduplicator, Filter
from data_juicer.ops.base_op import OP

def arguments(op):
    signature = inspect.signature(op.__init__).parameters.values()
    return {p.name: repr(p.default) for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

kinds = {name: next(kind.__name__ for kind in op.__mro__ if kind.__module__.endswith("base_op"))
         for name, op in OPERATORS.modules.items()}
results["kinds"] = kinds
results["arguments"] = {name: arguments(op) for name, op in OPERATORS.modules.items()}
results["base"] = sorted(Filter._BASE_PARAMS)
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """What the real library says; its environment takes a minute to build."""
    folder = tmp_path_factory.mktemp("real")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    # It imports aiohttp and ray, and does not say so in what it requires.
    packages = ["py-data-juicer==1.6.1", "aiohttp", "ray", "orjson"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, stdout=sys.stderr)
    environment = {**os.environ, "PYTHONPATH": str(Path(doremi_mix.__file__).parent.parent)}
    done = subprocess.run(
        [python, "-c", REAL, folder / "no_words"],
        input=json.dumps(ROWS),
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(path.name for path in folder.iterdir()) in (["env"], ["env", "no_words"])
    return json.loads(done.stdout.partition("RESULTS")[2])


@pytest.mark.slow
def test_real_filters_score_rows(real):
    assert real["lines"] == [[True, False, False], [23.0, 11.0, 9.0]]
    assert real["field"] == [[True, False, False], [None, None, None]]
    assert real["number"] == [[True, False, False], [3.0, None, None]]
    assert real["condition"] == [[True, False, True], [None, None, None]]
    assert real["open"] == [[True, True, False], [23.0, 11.0, 9.0]]


@pytest.mark.slow
def test_the_real_library_fetches_nothing(real):
    name, text = real["package"]
    assert (name, text.partition(",")[0]) == (
        "ConfigError",
        "text_action_filter of Data-Juicer needs the package spacy",
    )
    name, text = real["words"]
    assert name == "ConfigError"
    assert text.startswith("flagged_words_filter of Data-Juicer needs https://")
    assert real["suffix"] == [
        "DataError",
        "suffix_filter of Data-Juicer fails on the rows from d:0 on: KeyError: '__dj__suffix__'; correct its arguments "
        "or take it out of the recipe",
    ]


@pytest.mark.slow
def test_the_table_of_recipes_is_that_of_the_real_library(real):
    for name, op in RECIPE_OPS.items():
        arguments = real["arguments"][name]
        own = [each for each in (op.min, op.max, op.parameter) if each]
        for argument, default in own:
            said = arguments[argument]
            assert said == str(sys.maxsize) if default is None else float(said) == default, (name, argument)
        for argument, value in op.same_if.items():
            assert arguments[argument] == repr(value), (name, argument)
        if op.becomes != "foreign":
            listed = {argument for argument, _ in own} | op.same_if.keys() | set(op.passed_over)
            assert arguments.keys() - {"self"} <= listed, name
    missing = [
        name
        for name, kind in real["kinds"].items()
        if name not in RECIPE_OPS
        and not any(name.startswith(p) if p.endswith("_") else name.endswith(p) for p in REFUSED_KINDS)
    ]
    assert missing == []
    # Nothing that rewrites or selects is taken for a filter.
    taken = {real["kinds"][name] for name in RECIPE_OPS}
    assert taken == {"Filter", "Deduplicator"}
    assert set(real["base"]) == {*HOW_IT_RUNS, *SAME_IF, "text_key"}

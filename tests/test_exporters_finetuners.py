"""Formats of programs for fine-tuning: whole files, whole refusals, and what they make of any weights."""

import math
from fractions import Fraction
from importlib import import_module

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ExportError
from doremi_mix.exporters import FORMATS, export_plan
from doremi_mix.exporters.counts import fraction_for
from doremi_mix.exporters.plan import make_plan
from doremi_mix.types import DomainStatistics

MODULES = ("llama_factory", "swift", "axolotl", "open_instruct", "xtuner")
READERS = {name: read for module in MODULES for name, read in import_module(f"grammars.{module}").READERS.items()}
COUNTED = [name for name in READERS if name != "llama-factory-probabilities"]


def weights_of(paths, shares=(0.25, 0.5, 0.25), examples=(100, 30, 500), tokens=(1000, 600, 2500), rows=(100, 40, 500)):
    """Weights of domains of which the second is small: a budget of 2000 tokens takes 50 of its 40 rows."""
    corpus = {
        name: DomainStatistics(num_examples=count, available_tokens=total, path=path, num_rows=size)
        for (name, path), count, total, size in zip(paths.items(), examples, tokens, rows, strict=False)
    }
    return DomainWeights(dict(zip(corpus, shares, strict=True)), dict.fromkeys(corpus, 1 / len(corpus)), corpus=corpus)


WEIGHTS = weights_of({"math": "/data/math.jsonl", "中文": "/data/zh, #1.jsonl", "1e5": "/data/it's.jsonl"})


def export(name, weights=WEIGHTS, **how):
    return export_plan(FORMATS[name], make_plan(weights, **{"budget": 2000, **how}))


def without_header(file):
    """The text of a file after its first comment."""
    lines = file.text.splitlines(keepends=True)
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    return "".join(lines)


GOLDEN = {
    "llama-factory": {
        "llama_factory.yaml": """\
dataset_dir: "."
dataset:
- math
- "中文"
- "中文 pass 2"
- "1e5"
mix_strategy: concat
streaming: false
""",
        "dataset_info.json": """\
{
  "math": {
    "file_name": "/data/math.jsonl",
    "formatting": "alpaca",
    "num_samples": 50
  },
  "\\u4e2d\\u6587": {
    "file_name": "/data/zh, #1.jsonl",
    "formatting": "alpaca",
    "num_samples": 40
  },
  "\\u4e2d\\u6587 pass 2": {
    "file_name": "/data/zh, #1.jsonl",
    "formatting": "alpaca",
    "num_samples": 10
  },
  "1e5": {
    "file_name": "/data/it's.jsonl",
    "formatting": "alpaca",
    "num_samples": 100
  }
}
""",
    },
    "llama-factory-probabilities": {
        "llama_factory.yaml": """\
dataset_dir: "."
dataset:
- math
- "中文"
- "1e5"
mix_strategy: interleave_under
interleave_probs:
- 0.25
- 0.25
- 0.5
streaming: false
""",
        "dataset_info.json": """\
{
  "math": {
    "file_name": "/data/math.jsonl",
    "formatting": "alpaca"
  },
  "\\u4e2d\\u6587": {
    "file_name": "/data/zh, #1.jsonl",
    "formatting": "alpaca"
  },
  "1e5": {
    "file_name": "/data/it's.jsonl",
    "formatting": "alpaca"
  }
}
""",
    },
    "llama-factory-v1": {
        "llama_factory_v1.yaml": """\
math:
  path: "/data/math.jsonl"
  source: local
  converter: alpaca
  size: 50
"中文":
  path: "/data/zh, #1.jsonl"
  source: local
  converter: alpaca
"中文 pass 2":
  path: "/data/zh, #1.jsonl"
  source: local
  converter: alpaca
  size: 10
"1e5":
  path: "/data/it's.jsonl"
  source: local
  converter: alpaca
  size: 100
"""
    },
    "ms-swift": {
        "ms_swift.yaml": """\
dataset:
- "/data/math.jsonl#50"
- "/data/zh, #1.jsonl#50"
- "/data/it's.jsonl#100"
dataset_shuffle: true
data_seed: 0
"""
    },
    "axolotl": {
        "axolotl.yaml": """\
datasets:
- path: "/data/math.jsonl"
  ds_type: json
  type: alpaca
  weight: 0.5
- path: "/data/zh, #1.jsonl"
  ds_type: json
  type: alpaca
  weight: 1.0
- path: "/data/zh, #1.jsonl"
  ds_type: json
  type: alpaca
  weight: 0.25
- path: "/data/it's.jsonl"
  ds_type: json
  type: alpaca
  weight: 0.2
shuffle_merged_datasets: true
seed: 0
"""
    },
    "open-instruct": {
        "open_instruct.sh": """\
MIXTURE=(
  --dataset_mixer_list
    /data/math.jsonl 50
    '/data/zh, #1.jsonl' 50
    '/data/it'"'"'s.jsonl' 100
  --dataset_mixer_list_splits train
)
"""
    },
    "xtuner": {
        "xtuner_datasets.py": """\
from xtuner.v1.datasets.config import DatasetConfig

DATASETS = [
    DatasetConfig(name='math', anno_path='/data/math.jsonl', sample_ratio=0.5),
    DatasetConfig(name='中文', anno_path='/data/zh, #1.jsonl', sample_ratio=1.25),
    DatasetConfig(name='1e5', anno_path="/data/it's.jsonl", sample_ratio=0.2),
]
"""
    },
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_whole_text(name):
    assert {file.name: without_header(file) for file in export(name).files} == GOLDEN[name]


def test_the_header_and_what_is_said_beside_it():
    file, information = export("llama-factory").files
    assert file.text.startswith(
        "# Domain weights for LLaMA-Factory (num_samples in dataset_info.json), written by doremi_mix.\n"
        "# Each number is a number of examples to draw.\n"
    )
    assert information.comment is None
    got = export("llama-factory")
    assert got.usage == (
        "llamafactory-cli train llama_factory.yaml stage=sft do_train=true model_name_or_path=MODEL template=TEMPLATE "
        "output_dir=OUT"
    )
    assert got.notes == (
        "A domain of which more is drawn than it has is listed once for each pass over it.",
        "num_samples does nothing with streaming: true, and max_samples cuts each domain: leave both out.",
        "Rows are taken to have instruction, input and output; for others set formatting and columns in "
        "dataset_info.json.",
        "Run it in the folder of dataset_info.json, or set dataset_dir to that folder: file names are relative to it.",
    )


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_those_of_the_plan(name):
    got = export(name)
    assert got.num_drawn == 200
    assert got.expected == {"math": 0.25, "中文": 0.25, "1e5": 0.5}


@pytest.mark.parametrize("name", COUNTED)
def test_a_domain_that_the_budget_does_not_reach_is_left_out_and_named(name):
    weights = weights_of({"math": "/m.jsonl", "rare": "/r.jsonl", "code": "/c.jsonl"}, shares=(0.499, 0.001, 0.5))
    got = export(name, weights)
    assert set(got.expected) == {"math", "code"}
    assert got.notes[-1] == "The budget does not reach for one example of: rare."
    assert "/r.jsonl" not in "".join(file.text for file in got.files)


def test_the_seed_is_written_where_there_is_one():
    assert yaml.safe_load(export("ms-swift", seed=7).files[0].text)["data_seed"] == 7
    assert yaml.safe_load(export("axolotl", seed=7).files[0].text)["seed"] == 7


def test_passes_have_names_of_their_own():
    paths = {"a": "/a.jsonl", "a pass 2": "/b.jsonl", "a pass 2+": "/c.jsonl"}
    weights = weights_of(paths, shares=(0.6, 0.2, 0.2), examples=(10, 400, 400), tokens=(10, 400, 400), rows=(0, 0, 0))
    for name in ("llama-factory", "llama-factory-v1"):
        got = export(name, weights, budget=50)
        text = got.files[0].text
        names = yaml.safe_load(text)
        assert list(names.get("dataset", names)) == [
            "a",
            "a pass 2++",
            "a pass 3",
            "a pass 2",
            "a pass 2+",
        ]


def test_a_corpus_of_unknown_size_gives_counts_but_no_multipliers():
    weights = DomainWeights({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.5})
    how = {"equal_lengths": True, "budget": 100, "budget_unit": "examples"}
    for name in ("llama-factory", "llama-factory-v1", "ms-swift", "open-instruct"):
        assert export(name, weights, **how).num_drawn == 100
    for name in ("axolotl", "xtuner"):
        with pytest.raises(ExportError) as caught:
            export(name, weights, **how)
        assert str(caught.value) == (
            f"{name}: it takes multipliers of each domain's own size, which are not known; give --corpus RUN_DIR (or a "
            "file of num_examples and available_tokens by domain)"
        )


PATTERN = (
    "domain '中文': its path '{path}' holds *, ? or [, with which the datasets library reads all files that match; "
    "give other paths: --paths"
)
HOP = (
    "domain '中文': its path '{path}' holds \"::\", at which the datasets library divides a path into the parts of an "
    "address; give other paths: --paths"
)
SAME = (
    "domains 'math' and '中文' have the same path '/data/math.jsonl', so that both would draw the same data; "
    "give other paths: --paths"
)
SUFFIX = (
    "domain '中文': its path '{path}' does not end in {ends}, by which the kind of a file is known; give other paths: "
    "--paths"
)
OPTION = (
    "domain '中文': its path '{path}' starts with \"-\", as options do; give other paths, with ./ in front: --paths"
)
FIVE = ".json or .jsonl or .parquet or .csv or .arrow"
LOADED = ("llama-factory", "llama-factory-probabilities", "llama-factory-v1", "ms-swift", "axolotl", "open-instruct")
REFUSED = [
    *((name, f"/d/{sign}.jsonl", PATTERN) for name in LOADED for sign in ("a[1]", "a*", "a?")),
    *((name, "/d/a::b.jsonl", HOP) for name in LOADED),
    *((name, "/data/math.jsonl", SAME) for name in (*LOADED, "xtuner")),
    *((name, "/d/a.jsonl.gz", SUFFIX.replace("{ends}", FIVE)) for name in LOADED[:4]),
    *((name, "/d/a.JSONL", SUFFIX.replace("{ends}", FIVE)) for name in LOADED[:4]),
    ("open-instruct", "/d/a.json", SUFFIX.replace("{ends}", ".jsonl or .parquet")),
    ("ms-swift", "-a.jsonl", OPTION),
    ("open-instruct", "-a.jsonl", OPTION),
    (
        "ms-swift",
        " a.jsonl",
        "domain '中文': its path ' a.jsonl' starts with white space, which it strips; give others: --paths",
    ),
    (
        "xtuner",
        "/d/a.json",
        "domain '中文': its path '/d/a.json' does not end in .jsonl, the only files that it reads; give other paths: "
        "--paths",
    ),
]


@pytest.mark.parametrize(("name", "path", "message"), REFUSED)
def test_paths_that_would_be_misread_are_refused(name, path, message):
    paths = {"math": "/data/math.jsonl", "中文": path, "1e5": "/data/1.jsonl"}
    with pytest.raises(ExportError) as caught:
        export(name, paths=paths)
    assert str(caught.value) == f"{name}: {message.replace('{path}', path)}"


def test_names_that_configs_would_replace_are_refused():
    weights = weights_of({"a": "/a.jsonl", "${b}": "/b.jsonl", "c": "/c.jsonl"})
    for name in LOADED[:3]:
        with pytest.raises(ExportError) as caught:
            export(name, weights)
        assert str(caught.value) == (
            f"{name}: domain '${{b}}': its name holds \"${{\", for which its configs put in another value; rename it"
        )


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("break_", ["\x85", "\u2028", "\u2029", "\ufeff", "\n", "\r", "\t", "\x1b"], ids=ascii)
def test_line_breaks_in_paths_stay_what_they_are(name, break_):
    paths = {"math": f"/d/a{break_}b.jsonl", "中文": "/d/2.jsonl", "1e5": "/d/3.jsonl"}
    sizes = dict.fromkeys(paths.values(), 100)
    drawn = READERS[name]({file.name: file.text for file in export(name, paths=paths).files}, sizes)
    assert set(drawn) == set(paths.values())


def test_trap_open_instruct_tells_parts_from_counts_by_the_point():
    """By a transcription of its rule: it is in no package index."""
    sizes = {"/data/a.jsonl": 1000}

    def drawn(amount):
        text = f"MIXTURE=(\n --dataset_mixer_list /data/a.jsonl {amount} --dataset_mixer_list_splits train\n)"
        return READERS["open-instruct"]({"open_instruct.sh": text}, sizes)["/data/a.jsonl"]

    assert [drawn(amount) for amount in ("1", "1.0", "0.5", "200.0")] == [1, 1000, 500, 200_000]
    with pytest.raises(ValueError, match="invalid literal for int"):
        drawn(1e-05)
    amounts = without_header(export("open-instruct").files[0]).split("\n")[2:5]
    assert [line.split()[-1] for line in amounts] == ["50", "50", "100"]


def test_axolotl_takes_packed_files():
    paths = {"math": "/data/math.json.gz", "中文": "/data/a.jsonl.zst", "1e5": "/data/1.parquet"}
    entries = yaml.safe_load(export("axolotl", paths=paths).files[0].text)["datasets"]
    assert {entry["path"]: entry["ds_type"] for entry in entries} == {
        "/data/math.json.gz": "json",
        "/data/a.jsonl.zst": "json",
        "/data/1.parquet": "parquet",
    }


@given(size=st.integers(1, 10**9), data=st.data())
def test_a_part_of_a_file_is_the_count_in_the_arithmetic_of_programs(size, data):
    count = data.draw(st.integers(1, 4 * size))
    part = fraction_for(count, size)
    assert int(size * part) == count
    assert (part <= 1) == (count <= size)
    # Whole passes stay whole.
    assert int(part) == count // size
    assert abs(Fraction(part) - Fraction(count, size)) <= 2 * math.ulp(count / size)


NAMES = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), names=st.lists(NAMES, min_size=2, max_size=12, unique=True), passes=st.floats(0.1, 3.5))
@pytest.mark.parametrize("name", READERS)
def test_any_names_and_sizes_are_read_right_or_refused(name, data, names, passes):
    sizes = data.draw(st.lists(st.integers(1, 400), min_size=len(names), max_size=len(names)))
    weights = weights_of(
        {domain: f"/data/{domain}.jsonl" for domain in names},
        shares=[1 / len(names)] * len(names),
        examples=sizes,
        tokens=[size * (1 + number) for number, size in enumerate(sizes)],
        rows=[size + number for number, size in enumerate(sizes)],
    )
    budget = int(passes * sum(s.available_tokens for s in weights.corpus.values())) + 1
    try:
        plan = make_plan(weights, budget=budget)
        got = export_plan(FORMATS[name], plan)
    except ExportError:
        return
    units = READERS[name](
        {file.name: file.text for file in got.files}, {domain.path: domain.file_examples for domain in plan.domains}
    )
    total = sum(units.values())
    assert got.num_drawn in (None, total)
    shares = {plan.named(domain).path: share for domain, share in got.expected.items()}
    assert {path: units[path] / total for path in units} == pytest.approx(shares, rel=1e-12)

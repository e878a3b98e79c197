"""The formats that read files through Hugging Face's datasets library, as text: whole files, whole refusals."""

from fractions import Fraction

import pytest
from grammars import huggingface, openrlhf, oumi, trl
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ExportError
from doremi_mix.exporters import FORMATS, export_plan
from doremi_mix.exporters.paths import data_files
from doremi_mix.exporters.plan import make_plan
from doremi_mix.exporters.trl import rows_of_fractions
from doremi_mix.types import DomainStatistics

READERS = {**huggingface.READERS, **openrlhf.READERS, **oumi.READERS, **trl.READERS}
NAMES = list(READERS)

CORPUS = {
    "dolly": DomainStatistics(100, 1000, path="/d/dolly.jsonl", num_rows=110),
    "gsm8k": DomainStatistics(300, 1500, path="/d/gsm8k.json", num_rows=300),
    "code": DomainStatistics(40, 1600, path="/d/code[1].jsonl", num_rows=40),
}
WEIGHTS = DomainWeights({"dolly": 0.25, "gsm8k": 0.25, "code": 0.5}, dict.fromkeys(CORPUS, 1 / 3), corpus=CORPUS)


def write(name, weights=WEIGHTS, **how):
    return FORMATS[name].write(make_plan(weights, **how))


def two(path, weights=None, *, corpus=True, sizes=(100, 100)):
    """Weights of two domains, the second of which has a path of interest."""
    weights = weights or {"plain": 0.5, "odd": 0.5}
    statistics = {
        "plain": DomainStatistics(sizes[0], sizes[0] * 10, path="/d/plain.jsonl", num_rows=sizes[0]),
        "odd": DomainStatistics(sizes[1], sizes[1] * 10, path=path, num_rows=sizes[1]),
    }
    return DomainWeights(weights, {"plain": 0.5, "odd": 0.5}, corpus=statistics if corpus else {})


def refusal(name, weights, **how):
    with pytest.raises(ExportError) as caught:
        export_plan(FORMATS[name], make_plan(weights, **how))
    return str(caught.value)


# Whole files.


def test_datasets_with_a_budget():
    export = write("datasets", budget=4000, seed=7)
    assert export.files[0].name == "mixture.py"
    head, _, code = export.files[0].text.partition("\n\n\ndef build(")
    assert (
        head
        == '''"""Draws the mixture: from mixture import build; rows = build()."""

from glob import escape

import numpy
from datasets import Dataset, concatenate_datasets, load_dataset

SEED = 7

# The name of a domain, the kind of its file, its file, the rows that the file has at least, and the rows to draw.
DOMAINS = [
    ('dolly', 'json', '/d/dolly.jsonl', 100, 100),
    ('gsm8k', 'json', '/d/gsm8k.json', 300, 200),
    ('code', 'json', '/d/code[1].jsonl', 40, 50),
]'''
    )
    assert (
        code
        == '''columns: list[str] | None = None) -> Dataset:
    """Draws each domain's rows, and shuffles all. No row comes a second time before all of its domain came once.

    Give columns where the files have others in common than these, or of other types.
    """
    parts = []
    for position, (name, kind, file, num_expected, num_drawn) in enumerate(DOMAINS):
        rows = load_dataset(kind, data_files=[escape(file)], split="train")
        if len(rows) < num_expected:
            raise ValueError(f"{name}: {file} has {len(rows)} rows, expected at least {num_expected}")
        random = numpy.random.default_rng([SEED, position])
        passes = [random.permutation(len(rows)) for _ in range(-(-num_drawn // len(rows)))]
        rows = rows.select(numpy.concatenate(passes)[:num_drawn])
        parts.append(rows.select_columns(columns) if columns else rows)
    return concatenate_datasets(parts).shuffle(seed=SEED)
'''
    )
    assert (export.num_drawn, export.meaning) == (350, "count")
    assert export.expected == pytest.approx({"dolly": 100 / 350, "gsm8k": 200 / 350, "code": 50 / 350}, abs=1e-15)


def test_datasets_without_a_budget():
    export = write("datasets")
    assert (
        export.files[0].text
        == '''"""Draws the mixture: from mixture import build; rows = build()."""

from glob import escape

from datasets import Dataset, interleave_datasets, load_dataset

SEED = 0

# The name of a domain, the kind of its file, its file, and its share of the examples. The shares sum to 1.0 exactly.
DOMAINS = [
    ('dolly', 'json', '/d/dolly.jsonl', 0.2857142857142857),
    ('gsm8k', 'json', '/d/gsm8k.json', 0.5714285714285714),
    ('code', 'json', '/d/code[1].jsonl', 0.1428571428571429),
]


def build(columns: list[str] | None = None) -> Dataset:
    """Draws rows by share until one domain has come once; no row comes twice.

    Give columns where the files have others in common than these, or of other types.
    """
    parts = []
    for _, kind, file, _ in DOMAINS:
        rows = load_dataset(kind, data_files=[escape(file)], split="train").shuffle(seed=SEED)
        parts.append(rows.select_columns(columns) if columns else rows)
    shares = [share for *_, share in DOMAINS]
    return interleave_datasets(parts, probabilities=shares, seed=SEED, stopping_strategy="first_exhausted")
'''
    )
    assert export.num_drawn is None
    assert export.notes == (
        "Rows are drawn at random by these shares, and drawing ends when one domain has come once: code, after about "
        "280 rows. For a size of your own, with repeats: --budget.",
    )


def test_datasets_json_with_a_budget():
    export = write("datasets-json", budget=4000)
    assert (
        export.files[0].text
        == """{
  "format": "doremi-mix/datasets",
  "unit": "examples",
  "seed": 0,
  "domains": [
    {
      "name": "dolly",
      "load_dataset": {
        "path": "json",
        "data_files": [
          "/d/dolly.jsonl"
        ],
        "split": "train"
      },
      "num_passes": 1,
      "num_examples": 100
    },
    {
      "name": "gsm8k",
      "load_dataset": {
        "path": "json",
        "data_files": [
          "/d/gsm8k.json"
        ],
        "split": "train"
      },
      "num_passes": 1,
      "num_examples": 200
    },
    {
      "name": "code",
      "load_dataset": {
        "path": "json",
        "data_files": [
          "/d/code[[]1].jsonl"
        ],
        "split": "train"
      },
      "num_passes": 2,
      "num_examples": 50
    }
  ]
}
"""
    )
    assert export.files[0].comment is None


def test_datasets_json_without_a_budget():
    [file] = write("datasets-json", seed=3).files
    assert file.text.endswith("""
      "probability": 0.1428571428571429
    }
  ],
  "interleave_datasets": {
    "probabilities": [
      0.2857142857142857,
      0.5714285714285714,
      0.1428571428571429
    ],
    "seed": 3,
    "stopping_strategy": "first_exhausted"
  }
}
""")


def test_trl_with_a_budget_names_rows():
    export = write("trl", budget=4000)
    assert (
        export.files[0].text
        == """\
datasets:
- path: json
  data_files:
  - "/d/dolly.jsonl"
  split: "train[:100]"
- path: json
  data_files:
  - "/d/gsm8k.json"
  split: "train[:200]"
- path: json
  data_files:
  - "/d/code[[]1].jsonl"
  split: "train[:40]"
- path: json
  data_files:
  - "/d/code[[]1].jsonl"
  split: "train[:10]"
streaming: false
"""
    )
    assert export.num_drawn == 350


def test_trl_without_a_budget_gives_fractions():
    export = write("trl")
    assert (
        export.files[0].text
        == """\
datasets:
- path: json
  data_files:
  - "/d/dolly.jsonl"
  split: train
  fraction: 0.2857142857142857
- path: json
  data_files:
  - "/d/gsm8k.json"
  split: train
  fraction: 0.5714285714285714
- path: json
  data_files:
  - "/d/code[[]1].jsonl"
  split: train
  fraction: 0.1428571428571429
streaming: false
"""
    )
    assert export.num_drawn == 280
    assert export.notes == (
        "TRL takes the first rows of each file, in its order (shuffle files that are sorted), and trains on messages, "
        "on prompt and completion, or on text: rows must have them.",
        "TRL draws no row twice. code, with 40 rows, limits it to 280; for more, with repeats: --budget.",
    )


def test_openrlhf():
    export = write("openrlhf", budget=4000)
    assert (
        export.files[0].text
        == """\
DATASET='/d/dolly.jsonl,/d/gsm8k.json,/d/code[[]1].jsonl'
DATASET_PROBS=0.2857142857142857,0.5714285714285714,0.1428571428571429
MAX_SAMPLES=350
"""
    )
    assert export.usage == (
        '. ./openrlhf.sh && deepspeed --module openrlhf.cli.train_sft --data.dataset="$DATASET" '
        '--data.dataset_probs="$DATASET_PROBS" --data.max_samples="$MAX_SAMPLES"'
    )
    assert export.num_drawn == 350
    assert "MAX_SAMPLES" not in write("openrlhf").files[0].text + write("openrlhf").usage
    assert write("openrlhf").notes[0] == (
        "OpenRLHF draws at random by these probabilities, and repeats domains until it has read each one once, here "
        "about 525 rows; it keeps the first --data.max_samples of them (1,000,000 unless set)."
    )


def test_openrlhf_says_that_it_may_stop_before_the_budget():
    # 880 rows are more than one pass over all 450, and the 110 of dolly come last, after about 385.
    export = write("openrlhf", budget=10_000, max_epochs=10)
    assert export.num_drawn is None
    assert export.notes[-1] == (
        "It may stop before, at about 525 rows; train the rest as further epochs: --train.max_epochs."
    )


def test_oumi_with_a_budget():
    export = write("oumi", budget=4000, seed=5)
    assert (
        export.files[0].text
        == """\
data:
  train:
    datasets:
    - dataset_name: text_sft
      dataset_path: "/d/dolly.jsonl"
      split: train
      shuffle: true
      seed: 5
      sample_count: 100
    - dataset_name: text_sft
      dataset_path: "/d/gsm8k.json"
      split: train
      shuffle: true
      seed: 5
      sample_count: 200
    - dataset_name: text_sft
      dataset_path: "/d/code[1].jsonl"
      split: train
      shuffle: true
      seed: 5
      sample_count: 50
    seed: 5
    stream: false
"""
    )


def test_oumi_without_a_budget():
    assert (
        write("oumi")
        .files[0]
        .text.endswith("""\
    - dataset_name: text_sft
      dataset_path: "/d/code[1].jsonl"
      split: train
      shuffle: true
      seed: 0
      mixture_proportion: 0.1428571428571429
    mixture_strategy: first_exhausted
    seed: 0
    stream: false
""")
    )


# What is drawn, and what is said of it.


@pytest.mark.parametrize("name", [name for name in NAMES if name != "openrlhf"])
def test_numbers_are_counts_with_a_budget_and_shares_without(name):
    assert (write(name, budget=4000).meaning or FORMATS[name].meaning) == "count"
    assert (write(name).meaning or FORMATS[name].meaning) == "share"


@pytest.mark.parametrize("name", ["datasets", "trl", "openrlhf", "oumi"])
def test_the_header_stays_a_comment(name):
    weights = two("/d/odd.jsonl", {"plain": 0.5, "odd": 0.5})
    text = export_plan(FORMATS[name], make_plan(weights, budget=500)).files[0].text
    assert text.endswith(write(name, weights, budget=500).files[0].text)
    header = text.removesuffix(write(name, weights, budget=500).files[0].text)
    assert all(line.startswith("# ") for line in header.splitlines())
    assert "Each number is a" in header


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_that_reaches_for_no_example_of_a_domain_says_so(name):
    weights = two("/d/odd.jsonl", {"plain": 0.994, "odd": 0.006})
    # Three tokens, and an example has ten.
    export = write(name, weights, budget=500)
    assert export.expected == {"plain": 1.0}
    assert export.num_drawn == 50
    assert export.notes[-1] == "The budget does not reach for one example of: odd."


@pytest.mark.parametrize("name", NAMES)
def test_lengths_that_are_not_known_are_refused_or_said_to_be_equal(name):
    weights = two("/d/odd.jsonl", {"plain": 0.25, "odd": 0.75}, corpus=False)
    assert refusal(name, weights) == (
        f"{name}: it draws whole examples, so that shares of tokens must become shares of examples, for which the "
        "lengths of examples are not known; give --corpus RUN_DIR (or a file of num_examples and available_tokens by "
        "domain), or say --equal-lengths"
    )
    for budget in (None, 5000):
        export = write(name, weights, budget=budget, equal_lengths=True)
        assert export.expected == {"plain": 0.25, "odd": 0.75}
        assert export.num_drawn is None


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_in_examples_is_drawn_whole(name):
    export = write(name, budget=330, budget_unit="examples")
    assert export.num_drawn == 330


def test_fractions_of_trl_are_what_it_computes():
    fractions = {"a": 0.2, "b": 0.5, "c": 0.3}
    assert rows_of_fractions(fractions, {"a": 1000, "b": 300, "c": 50}) == {"a": 33, "b": 83, "c": 50}


# Refusals, whole.

ANY_PATH = [
    (
        "/d/a::b.jsonl",
        'holds "::", at which the datasets library divides a path into the parts of an address; give other paths: '
        "--paths",
    ),
    (
        "s3://d/a.jsonl",
        'holds "://", at which the datasets library divides a path into the parts of an address; give other paths: '
        "--paths",
    ),
    (
        "/d/$HOME/a.jsonl",
        'holds "$", after which the datasets library puts in the value of an environment variable; give other paths: '
        "--paths",
    ),
]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "oumi"])
@pytest.mark.parametrize(("path", "reason"), ANY_PATH)
def test_paths_that_the_library_takes_for_something_else(name, path, reason):
    assert refusal(name, two(path)) == f"{name}: domain 'odd': its path {path!r} {reason}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "oumi"])
@pytest.mark.parametrize("path", ["/d/odd", "/d.jsonl/odd", "/d/odd.txt", "/d/odd.parquet.gz", "/d/odd.jsonl ", "é"])
def test_files_of_a_kind_that_is_not_known(name, path):
    assert refusal(name, two(path)) == (
        f"{name}: domain 'odd': the kind of its file {path!r} is not known, expected .json, .jsonl or .ndjson, each "
        "also with .gz or .zst, or .parquet, .csv or .arrow; give other paths: --paths"
    )


@pytest.mark.parametrize("path", ["/d/odd.txt", "/d/odd.parquet", "/d/.jsonl", "/d/odd.jsonl.gz", "odd"])
def test_oumi_refuses_what_its_dataset_does_not_read(path):
    assert refusal("oumi", two(path)) == (
        f"oumi: domain 'odd': its path {path!r} does not end in .jsonl or .json, the only files that text_sft reads; "
        "give other paths: --paths"
    )


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/d/a,b.jsonl", 'holds ",", at which its list is divided; give other paths: --paths'),
        ("/d/a@b.jsonl", 'holds "@", after which it expects a folder; give other paths: --paths'),
        (" d/a.jsonl", "starts or ends with a space, which is cut off; give other paths: --paths"),
        (
            "/d/a.jsonl.gz",
            "is taken for a dataset on the Hub, as it does not end in .json, .jsonl, .csv, .parquet or .arrow (in "
            "small letters, not compressed); give other paths: --paths",
        ),
        (
            "/d/a.JSON",
            "is taken for a dataset on the Hub, as it does not end in .json, .jsonl, .csv, .parquet or .arrow (in "
            "small letters, not compressed); give other paths: --paths",
        ),
    ],
)
def test_openrlhf_refuses_what_its_list_cannot_hold(path, reason):
    assert refusal("openrlhf", two(path)) == f"openrlhf: domain 'odd': its path {path!r} {reason}"


def test_openrlhf_refuses_a_share_that_takes_it_forever():
    weights = two("/d/odd.jsonl", {"plain": 1 - 1e-9, "odd": 1e-9}, sizes=(100, 5000))
    assert refusal("openrlhf", weights) == (
        "openrlhf: domain 'odd': OpenRLHF draws until every domain was read once, which takes more than 100,000,000 "
        "rows for a share of 1e-09 of the examples; leave the domain out, or use --format datasets"
    )
    # The smallest float: rows divided by it are more than a float holds.
    weights = two("/d/odd.jsonl", {"plain": 1.0, "odd": 5e-324}, sizes=(100, 5000))
    assert refusal("openrlhf", weights).endswith(
        "takes more than 100,000,000 rows for a share of 4.94e-324 of the examples; leave the domain out, or use "
        "--format datasets"
    )


def test_openrlhf_refuses_a_list_that_is_longer_than_an_argument_may_be():
    names = [f"{'x' * 200}{number}" for number in range(1000)]
    weights = DomainWeights(dict.fromkeys(names, 1 / 1000), dict.fromkeys(names, 1 / 1000))
    assert refusal("openrlhf", weights, equal_lengths=True) == (
        "openrlhf: the list of 1,000 files takes 214,889 bytes, more than the 131,071 of one argument; give shorter "
        "paths: --paths"
    )


@pytest.mark.parametrize("name", NAMES)
def test_one_file_for_two_domains(name):
    assert refusal(name, two("/d/plain.jsonl")) == (
        f"{name}: domains 'plain' and 'odd' have the same path '/d/plain.jsonl', so that both would draw the same "
        "data; give other paths: --paths"
    )


# Any weights, any paths.


@given(st.text(max_size=20))
def test_patterns_stand_for_one_path_alone(text):
    file = f"/d/{text}x.jsonl"
    if "::" not in file and "://" not in file and "$" not in file:
        assert huggingface.load({file: 3}, "json", [data_files(file)]) == (file, 3)


@st.composite
def problems(draw):
    count = draw(st.integers(2, 30))
    names = [
        f"{number}-{draw(st.text(max_size=4))}".replace("\0", "").encode("utf-8", "ignore").decode()
        for number in range(count)
    ]
    raw = [Fraction(draw(st.one_of(st.sampled_from([1e-12, 1.0]), st.floats(0, 1)))) for _ in names]
    raw[0] += 1
    shares = {name: float(value / sum(raw)) for name, value in zip(names, raw, strict=True)}
    corpus = {
        name: DomainStatistics(size, size * draw(st.integers(1, 50)), path=f"/d/{name}.jsonl", num_rows=size + extra)
        for name, size, extra in zip(
            names,
            draw(st.lists(st.integers(1, 2000), min_size=count, max_size=count)),
            draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)),
            strict=True,
        )
    }
    weights = DomainWeights(shares, dict.fromkeys(names, 1 / count), corpus=corpus)
    available = sum(statistics.available_tokens for name, statistics in corpus.items() if shares[name])
    return weights, draw(st.sampled_from([None, max(1, available // 3), available]))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_any_export_is_read_as_planned_or_refused(name, problem):
    weights, budget = problem
    plan = make_plan(weights, budget=budget)
    sizes = {domain.path: domain.file_examples for domain in plan.domains}
    try:
        export = export_plan(FORMATS[name], plan)
    except ExportError:
        # Its text is tested above; names with "$", "::" and the like are among these.
        return
    drawn = READERS[name]({file.name: file.text for file in export.files}, sizes)
    if export.num_drawn is not None and name != "openrlhf":
        assert sum(drawn.values()) == export.num_drawn
    total = sum(drawn.values())
    by_name = {domain.name: drawn[domain.path] / total for domain in plan.domains if drawn.get(domain.path)}
    assert by_name == pytest.approx(dict(export.expected), rel=1e-12, abs=1e-16)

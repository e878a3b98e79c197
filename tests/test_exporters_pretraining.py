"""Exports for Levanter, OLMo-core, Dolma, nanotron, torchtitan, Lingua and the official DoReMi code."""

import ast
import math
from collections import Counter
from fractions import Fraction

import pytest
import yaml
from grammars import doremi as doremi_grammar
from grammars import levanter as levanter_grammar
from grammars import lingua as lingua_grammar
from grammars import nanotron as nanotron_grammar
from grammars import olmo as olmo_grammar
from grammars import torchtitan as torchtitan_grammar
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ExportError
from doremi_mix.exporters import doremi, export_plan, levanter, lingua, nanotron, olmo, torchtitan
from doremi_mix.exporters.export import yaml_text
from doremi_mix.exporters.plan import make_plan
from doremi_mix.types import DomainStatistics

MODULES = (levanter, olmo, nanotron, torchtitan, lingua, doremi)
GRAMMARS = (levanter_grammar, olmo_grammar, nanotron_grammar, torchtitan_grammar, lingua_grammar, doremi_grammar)
ROWS = {row.name: row for module in MODULES for row in module.FORMATS}
READERS = {name: reader for grammar in GRAMMARS for name, reader in grammar.READERS.items()}

SHARES = {"alpha": 0.25, "1e5, beta": 0.625, "zero": 0.0, "gamma": 0.125}
SIZES = {"alpha": (1000, 5), "1e5, beta": (300, 10), "zero": (7, 7), "gamma": (50, 20)}


def weights_of(shares, sizes, path="rows/{}.jsonl"):
    corpus = {
        name: DomainStatistics(count, count * mean, 1, path.format(name), count)
        for name, (count, mean) in sizes.items()
    }
    return DomainWeights(shares, dict.fromkeys(shares, 1 / len(shares)), corpus=corpus)


def export(name, weights, paths=None, **how):
    """Exports as the command does: where a program reads something else than the rows, its paths are filled in."""
    row = ROWS[name]
    if paths is None and row.path:
        paths = {domain: row.path.format(name=domain) for domain in weights.domain_weights}
    return export_plan(row, make_plan(weights, paths=paths, **how))


def text_of(name, budget=2000):
    (file,) = export(name, weights_of(SHARES, SIZES), budget=budget).files
    body = [line for line in file.text.splitlines(keepends=True) if not line.startswith("# ")]
    return file.name, "".join(body)


def constants(text):
    """Returns what a Python file assigns literally."""
    assignments = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


def test_every_format_has_a_reader():
    assert set(ROWS) == set(READERS)


def test_levanter_text():
    assert text_of("levanter") == (
        "levanter.yaml",
        """\
data:
  configs:
    alpha:
      train_urls:
      - rows/alpha.jsonl
      format:
        type: chat
        messages_field: messages
        pack: true
    "1e5, beta":
      train_urls:
      - "rows/1e5, beta.jsonl"
      format:
        type: chat
        messages_field: messages
        pack: true
    gamma:
      train_urls:
      - rows/gamma.jsonl
      format:
        type: chat
        messages_field: messages
        pack: true
  train_weights:
    alpha: 0.25
    "1e5, beta": 0.625
    gamma: 0.125
  stop_strategy: restart
  mixture_block_size: 2048
""",
    )


def test_marin_text():
    assert text_of("marin") == (
        "marin.yaml",
        """\
data:
  components:
    alpha:
      source:
        type: url
        train_urls:
        - rows/alpha.jsonl
      format:
        type: chat
        messages_field: messages
      pack: true
    "1e5, beta":
      source:
        type: url
        train_urls:
        - "rows/1e5, beta.jsonl"
      format:
        type: chat
        messages_field: messages
      pack: true
    gamma:
      source:
        type: url
        train_urls:
        - rows/gamma.jsonl
      format:
        type: chat
        messages_field: messages
      pack: true
  train_weights:
    alpha: 0.25
    "1e5, beta": 0.625
    gamma: 0.125
  stop_strategy: restart
  mixture_block_size: 2048
""",
    )


def test_olmo_core_text():
    assert text_of("olmo-core") == (
        "olmo-core.yaml",
        """\
sources:
- source_name: alpha
  target_ratio: 0.25
  paths:
  - "tokenized/alpha/*.npy"
  max_repetition_ratio: 4.0
  max_source_fraction: 1.0
- source_name: "1e5, beta"
  target_ratio: 0.625
  paths:
  - "tokenized/1e5, beta/*.npy"
  max_repetition_ratio: 4.0
  max_source_fraction: 1.0
- source_name: gamma
  target_ratio: 0.125
  paths:
  - "tokenized/gamma/*.npy"
  max_repetition_ratio: 4.0
  max_source_fraction: 1.0
""",
    )
    usage = export("olmo-core", weights_of(SHARES, SIZES), budget=2000, seed=7).usage
    assert usage == (
        'SourceMixtureDatasetConfig(source_list=SourceMixtureList.from_yaml("olmo-core.yaml"), requested_tokens=2000, '
        "global_batch_size=BATCH_TOKENS, seed=7)"
    )


def test_olmo_core_says_the_epoch_cap_below_one_as_a_fraction():
    (file,) = export("olmo-core", weights_of(SHARES, SIZES), budget=400, max_epochs=0.5).files
    sources = yaml.safe_load(file.text)["sources"]
    assert [(source["max_repetition_ratio"], source["max_source_fraction"]) for source in sources] == [(1.0, 0.5)] * 3


def test_olmo_core_composable_text():
    name, text = text_of("olmo-core-composable")
    assert name == "olmo_core_mixture.py"
    assert (
        text
        == '''\
from olmo_core.data.composable import ConcatAndChunkInstanceSource, MixingInstanceSource

DOMAINS = [
    ('alpha', 'tokenized/alpha/*.npy', 0.25),
    ('1e5, beta', 'tokenized/1e5, beta/*.npy', 0.625),
    ('gamma', 'tokenized/gamma/*.npy', 0.125),
]
NUM_TOKENS = 2000
MAX_REPETITION = 4.0
SEED = 0


def mixture(tokenizer, sequence_length, **options):
    """Returns the config of the mixed source; options are those of ConcatAndChunkInstanceSource.Config.from_npy."""
    return MixingInstanceSource.Config(
        source_specs=[
            MixingInstanceSource.Spec.Config(
                source=ConcatAndChunkInstanceSource.Config.from_npy(
                    path, tokenizer=tokenizer, sequence_length=sequence_length, label=name, **options
                ),
                ratio=share,
                max_repetition_factor=MAX_REPETITION,
                label=name,
            )
            for name, path, share in DOMAINS
        ],
        num_tokens=None if NUM_TOKENS is None else NUM_TOKENS // sequence_length * sequence_length,
        seed=SEED,
    )
'''
    )


def test_dolma_text():
    assert text_of("dolma") == (
        "dolma.yaml",
        """\
source_prefixes:
- prefix: tokenized/alpha
  sample_rate: 0.1
- prefix: "tokenized/1e5, beta"
  sample_rate: 0.4166666666666667
- prefix: tokenized/gamma
  sample_rate: 0.24
destination_prefix: mixed
max_size_bytes: 1073741824
random_seed: 0
""",
    )


def test_nanotron_text():
    assert text_of("nanotron") == (
        "nanotron.yaml",
        """\
data_stages:
- name: doremi_mix
  start_training_step: 1
  data:
    seed: 0
    num_loading_workers: 1
    dataset:
      dataset_folder:
      - tokenized/alpha
      - "tokenized/1e5, beta"
      - tokenized/gamma
      dataset_weights:
      - 0.25
      - 0.625
      - 0.125
""",
    )


def test_lingua_text_has_shares_of_documents():
    assert text_of("lingua") == (
        "lingua.yaml",
        """\
data:
  root_dir: "."
  sources:
    shuffled/alpha: 0.42105263157894735
    "shuffled/1e5, beta": 0.5263157894736842
    shuffled/gamma: 0.05263157894736842
  seed: 0
""",
    )


def test_doremi_text_has_both_keys_and_sorted_names():
    assert text_of("doremi") == (
        "doremi.json",
        """\
{
  "train_domain_weights": {
    "1e5, beta": 0.625,
    "alpha": 0.25,
    "gamma": 0.125
  },
  "eval_domain_weights": {
    "1e5, beta": 0.625,
    "alpha": 0.25,
    "gamma": 0.125
  }
}
""",
    )


def test_torchtitan_text():
    name, text = text_of("torchtitan")
    assert name == "torchtitan_mixture.py"
    assert (
        text
        == '''\
from torchtitan.hf_datasets.text_datasets import ChatDataSource, InterleavedChatDataLoader

DOMAINS = [
    ('alpha', 'json', 'rows/alpha.jsonl', 0.25),
    ('1e5, beta', 'json', 'rows/1e5, beta.jsonl', 0.625),
    ('gamma', 'json', 'rows/gamma.jsonl', 0.125),
]
SEED = 0


def messages(row):
    """Returns the messages of one row: the user's and the assistant's."""
    return row["messages"]


def dataloader(**options):
    """Returns the config of the mixed data loader; options are those of InterleavedChatDataLoader.Config."""
    return InterleavedChatDataLoader.Config(
        sources=[
            ChatDataSource(
                dataset_path=reader,
                load_dataset_kwargs={"data_files": path, "split": "train"},
                sample_processor=messages,
                infinite=True,
                weight=share,
            )
            for name, reader, path, share in DOMAINS
        ],
        seed=SEED,
        **options,
    )
'''
    )


def test_torchtitan_grain_text():
    weights = weights_of({"a[1]": 0.5, "b": 0.5}, {"a[1]": (9, 9), "b": (9, 9)})
    (file,) = export("torchtitan-grain", weights, seed=3).files
    assert file.name == "torchtitan_grain_mixture.py"
    assert constants(file.text) == {
        "DOMAINS": [("a[1]", "rows/a[[]1].jsonl", 0.5), ("b", "rows/b.jsonl", 0.5)],
        "SEED": 3,
    }
    assert (
        """\
        dataset=DatasetMixConfig(
            datasets=tuple(
                WeightedDataset(
                    dataset=FirstFitPackingConfig(
                        dataset=SingleDatasetConfig(
                            source=IndexedJsonlSource.Config(patterns=(pattern,)),
                            processor=ChatProcessor.Config(messages_fn=messages),
                            post_filters=(lambda sample: sample is not None,),
                        ),
                    ),
                    weight=share,
                )
                for name, pattern, share in DOMAINS
            ),
        ),
"""
        in file.text
    )


def test_the_header_of_a_file():
    (file,) = export("marin", weights_of(SHARES, SIZES), budget=2000).files
    header = [line for line in file.text.splitlines() if line.startswith("# ")]
    assert header[:2] == [
        "# Domain weights for Marin's Levanter (the package marin-levanter: data.components), written by doremi_mix.",
        "# Each number is a share of what is drawn.",
    ]
    assert (
        "# Weights are whole numbers of 1/2048: of each block of 2,048 sequences Levanter draws exactly so many of "
        "each domain." in header
    )
    assert "# Left out, because nothing of them is to be drawn: zero." in header
    assert header[-3:] == [
        "#   alpha      0.250000  0.250000",
        "#   1e5, beta  0.625000  0.625000",
        "#   gamma      0.125000  0.125000",
    ]


@pytest.mark.parametrize(
    ("least", "block"),
    [(0.01, 2**11), (1 / 204, 2**11), (1 / 206, 2**12), (0.001, 2**14), (4e-5, 2**15), (2**-15, 2**15)],
)
def test_levanter_takes_the_smallest_block_that_holds_the_smallest_weight(least, block):
    weights = DomainWeights({"large": 1 - least, "small": least}, {"large": 0.5, "small": 0.5})
    made = export("levanter", weights)
    assert yaml.safe_load(made.files[0].text)["data"]["mixture_block_size"] == block
    assert abs(made.expected["small"] - least) * block < 1
    assert sum(made.expected.values()) == 1.0


def test_levanter_gives_what_rounding_leaves_to_no_single_domain():
    names = [f"d{number}" for number in range(150)]
    equal = DomainWeights(dict.fromkeys(names, 1 / 150), dict.fromkeys(names, 1 / 150))
    drawn = levanter_grammar.mix(export("levanter", equal).expected, 2**15)
    assert max(drawn.values()) - min(drawn.values()) == 1
    # What the same program draws of weights that were not rounded for it.
    naive = levanter_grammar.mix(dict(equal.domain_weights), 2**11)
    assert sorted(Counter(naive.values()).items()) == [(13, 149), (111, 1)]


def test_nanotron_draws_the_shares_in_each_pass_over_all_folders():
    lengths = [100, 30, 20]
    shares = list(export("nanotron", weights_of(SHARES, SIZES)).expected.values())
    drawn = Counter(folder for folder, _ in nanotron_grammar.schedule(shares, lengths))
    for folder, share in enumerate(shares):
        assert abs(drawn[folder] - share * sum(lengths)) <= 1
    # Of the first folder a pass takes a part, and every pass the same one: the note says so.
    assert len({number for folder, number in nanotron_grammar.schedule(shares, lengths) if folder == 0}) < 40


def test_dolma_rates_give_the_planned_counts():
    weights = weights_of(SHARES, SIZES)
    plan = make_plan(weights, budget=7000, paths={name: f"tok/{name}" for name in SHARES})
    rates = {source["prefix"]: source["sample_rate"] for source in yaml.safe_load(rates_text(plan))["source_prefixes"]}
    for name, count in plan.counts().items():
        assert round(Fraction(rates[f"tok/{name}"]) * SIZES[name][0], 6) == count


def rates_text(plan):
    return export_plan(ROWS["dolma"], plan).files[0].text


def refusal(name, weights, **how):
    with pytest.raises(ExportError) as caught:
        export(name, weights, **how)
    return str(caught.value)


def two(first, second="b"):
    return DomainWeights({first: 0.5, second: 0.5}, {first: 0.5, second: 0.5})


def test_levanter_refuses_a_weight_that_no_block_holds():
    weights = DomainWeights({"large": 1 - 1e-5, "small": 1e-5}, {"large": 0.5, "small": 0.5})
    assert refusal("marin", weights) == (
        "marin: domain 'small' has 1e-05 of the tokens, less than one sequence in the largest block that Levanter "
        "mixes (32,768), which would draw nothing of it; give it at least 3.05e-05, or weight 0"
    )


@pytest.mark.parametrize("name", sorted(set(ROWS) - {"doremi", "dolma"}))
def test_two_domains_of_one_path_are_refused(name):
    paths = {"a": "x/rows.jsonl", "b": "x/./rows.jsonl"}
    assert refusal(name, two("a"), paths=paths, equal_lengths=True) == (
        f"{name}: domains 'a' and 'b' have the same path 'x/./rows.jsonl', so that both would draw the same data; give "
        "other paths: --paths"
    )


def test_an_empty_path_is_refused():
    assert refusal("nanotron", two("a"), paths={"a": " ", "b": "tok"}) == (
        "nanotron: the path of domain 'a' is empty; give other paths: --paths"
    )


@pytest.mark.parametrize(
    ("name", "domain", "message"),
    [
        ("levanter", "{a,c}", "has '{', which Levanter expands as a pattern"),
        ("marin", "wh?t", "has '?', which Levanter expands as a pattern"),
        ("marin", "a[1]", "has '[', which Levanter reads as part of a pattern"),
        ("marin", "a\\c", "has '\\\\', which Levanter reads as part of a pattern"),
        ("levanter", "a::c", "has '::', which Levanter reads as a chain of file systems"),
        ("torchtitan", "a*", "has '*', which datasets.load_dataset expands as a pattern"),
        ("torchtitan", "a[1]", "has '[', which datasets.load_dataset reads as part of a pattern"),
    ],
)
def test_names_that_make_a_path_a_pattern_are_refused(name, domain, message):
    assert refusal(name, two(domain)) == (
        f"{name}: the path of domain {domain!r}, {f'data/{domain}.jsonl'!r}, {message}; give another path: --paths"
    )


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        (
            "levanter",
            "rows/a.csv",
            "ends in none of .jsonl, .json, .parquet, .txt (or one of them compressed), by which Levanter knows how to "
            "read it",
        ),
        ("nanotron", "tok/a*", "has '*', which nanotron reads as a pattern of file names"),
        ("olmo-core", "./tok/*.npy", "is a pattern that OLMo-core never matches ('tok/*.npy' is one that it can)"),
        ("olmo-core-composable", "tok/", "must be that of token arrays, for example 'tokenized/{name}/*.npy'"),
        ("torchtitan-grain", "a.parquet", "is not that of a JSONL file, the only one that IndexedJsonlSource reads"),
    ],
)
def test_paths_that_a_program_misreads_are_refused(name, path, message):
    assert refusal(name, two("a"), paths={"a": path, "b": "tok/b.npy"}) == (
        f"{name}: the path of domain 'a', {path!r}, {message}; give another path: --paths"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "${HOME}/a.jsonl",
            'holds "$", after which the datasets library puts in the value of an environment variable',
        ),
        ("a::c.jsonl", 'holds "::", at which the datasets library divides a path into the parts of an address'),
    ],
)
def test_torchtitan_refuses_what_the_datasets_library_expands(path, message):
    assert refusal("torchtitan", two("a"), paths={"a": path, "b": "b.csv"}) == (
        f"torchtitan: domain 'a': its path {path!r} {message}; give other paths: --paths"
    )


def test_torchtitan_names_the_reader_of_each_kind_of_file():
    paths = {"a": "rows/a.CSV", "b": "rows/*.parquet"}
    (file,) = export("torchtitan", two("a"), paths=paths).files
    assert constants(file.text)["DOMAINS"] == [
        ("a", "csv", "rows/a.CSV", 0.5),
        ("b", "parquet", "rows/*.parquet", 0.5),
    ]
    assert refusal("torchtitan", two("a"), paths=paths | {"a": "rows/a.txt"}) == (
        "torchtitan: domain 'a': the kind of its file 'rows/a.txt' is not known, expected .json, .jsonl or .ndjson, "
        "each also with .gz or .zst, or .parquet, .csv or .arrow; give other paths: --paths"
    )


@pytest.mark.parametrize("name", ["torchtitan", "torchtitan-grain", "levanter", "marin"])
@pytest.mark.parametrize("path", ["d/a*.jsonl", "d/?b.jsonl", "d/[ab].jsonl", "d/nowhere.jsonl"])
def test_the_readers_see_a_path_that_opens_other_files(name, path):
    """So that a path which is written as it stands, although the program expands it, does not pass for right."""
    (file,) = export(name, two("a"), paths={"a": "d/ab.jsonl", "b": "d/b.jsonl"}).files
    sizes = {"d/ab.jsonl": 3, "d/b.jsonl": 3, "d/bb.jsonl": 3, "d/a.jsonl": 3, "d/abc.jsonl": 3, "d/abb.jsonl": 3}
    assert READERS[name]({file.name: file.text}, sizes)
    text = file.text.replace("d/ab.jsonl", path)
    assert text != file.text
    with pytest.raises((ValueError, AssertionError, FileNotFoundError)):
        READERS[name]({file.name: text}, sizes)


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("a{b,{c,d}}", ["ab", "ac", "ad"]),
        ("x{08..10}y", ["x08y", "x09y", "x10y"]),
        ("{a..c}", ["a", "b", "c"]),
        ("{a}\\b", ["{a}b"]),
        ("{,a}", ["", "a"]),
    ],
)
def test_braces_are_expanded_as_levanter_expands_them(text, paths):
    assert levanter_grammar.expand_braces(text) == paths


def test_a_pattern_that_was_meant_is_let_through():
    paths = {"a": "gs://bucket/a/train_{00..29}.jsonl.gz", "b": "gs://bucket/b/*.jsonl.gz"}
    (file,) = export("marin", two("a"), paths=paths).files
    components = yaml.safe_load(file.text)["data"]["components"]
    assert {name: component["source"]["train_urls"] for name, component in components.items()} == {
        name: [path] for name, path in paths.items()
    }


@pytest.mark.parametrize("name", ["/abs", "..", "a/../b", "a/", "a/train"])
def test_levanter_refuses_names_that_are_no_folder_of_its_cache(name):
    paths = {name: "x.jsonl", "b": "y.jsonl"}
    assert refusal("levanter", two(name), paths=paths) == (
        f"levanter: the name {name!r} is no folder of its own in Levanter's cache, where each domain has one; rename "
        "the domain"
    )


@pytest.mark.parametrize("name", ["org/name", "..", "a\\b"])
def test_doremi_refuses_names_that_are_no_folder(name):
    assert refusal("doremi", two(name)) == (
        f"doremi: the name {name!r} is not that of one folder, where the official code looks for the domain's data; "
        "rename the domain"
    )


def test_dolma_refuses_folders_within_folders_and_other_protocols():
    weights = weights_of({"a": 0.5, "a/b": 0.5}, {"a": (9, 9), "a/b": (9, 9)})
    assert refusal("dolma", weights, budget=50) == (
        "dolma: the folder of domain 'a/b' lies inside that of domain 'a', of which Dolma takes everything; give other "
        "paths: --paths"
    )
    assert refusal("dolma", weights, budget=50, paths={"a": "x:y", "a/b": "z"}) == (
        "dolma: the path of domain 'a', 'x:y', starts with 'x:', which Dolma takes for a protocol that it does not "
        "know; give another path: --paths"
    )
    assert refusal("dolma", weights, paths={"a": "x", "a/b": "z"}) == (
        "dolma: it takes numbers of examples, which need a budget; give --budget"
    )


def test_olmo_core_composable_refuses_a_cap_below_one():
    assert refusal("olmo-core-composable", weights_of(SHARES, SIZES), budget=100, max_epochs=0.5) == (
        "olmo-core-composable: its smallest limit of repetition is 1, so that a cap of 0.5 epochs cannot be said; use "
        "--max-epochs 1, or --format olmo-core"
    )


def test_lingua_needs_the_lengths_of_examples():
    message = refusal("lingua", two("a"))
    assert message.startswith(
        "lingua: it draws whole examples, so that shares of tokens must become shares of examples"
    )


@pytest.mark.parametrize(
    "text",
    [
        "1e5",
        "yes",
        "NULL",
        "~",
        "2024-01-01",
        "0x1F",
        "1_000",
        ".5",
        "-a",
        "=",
        "<<",
        " a",
        "a ",
        "a: b",
        "#",
        "\u2028",
    ],
)
def test_quoted_yaml_keeps_strings_strings(text):
    written = yaml_text({text: [text]})
    assert yaml.safe_load(written) == {text: [text]}
    assert yaml.load(written, lingua_grammar.OmegaLoader) == {text: [text]}


AWKWARD = [
    "yes",
    "1e5",
    "null",
    "~",
    "two words",
    "a,b",
    "a:b",
    "#",
    "@",
    "::",
    "中文",
    "-x",
    "'",
    '"',
    "{}",
    "$X",
    "😀",
]
AWKWARD += ["a/b", "..", "*", "[0]", "2024-01-01", "0x1F", "<<", "=", "\\", "a\nb", " lead", "trail ", "\u2028", "\x85"]

hostile = st.one_of(
    st.sampled_from(AWKWARD),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12),
)


@st.composite
def problems(draw):
    names = draw(st.lists(hostile, min_size=2, max_size=200, unique=True))
    magnitudes = st.one_of(st.floats(1e-3, 1.0), st.floats(1e-12, 1.0), st.just(0.0), st.just(1e-12))
    values = draw(st.lists(magnitudes, min_size=len(names), max_size=len(names)))
    assume(sum(value > 0 for value in values) >= 1)
    total = math.fsum(values)
    shares = {name: value / total for name, value in zip(names, values, strict=True)}
    assume(abs(math.fsum(shares.values()) - 1.0) < 1e-12)
    sizes = {name: (draw(st.integers(1, 10**6)), draw(st.integers(1, 5000))) for name in names}
    return weights_of(shares, sizes)


def export_or_refusal(row, plan):
    try:
        return export_plan(row, plan)
    except ExportError as error:
        return str(error)


@pytest.mark.parametrize("name", sorted(ROWS))
@settings(max_examples=60, deadline=None)
@given(weights=problems(), data=st.data())
def test_a_program_draws_what_is_expected_or_the_export_is_refused(name, weights, data):
    row = ROWS[name]
    available = sum(statistics.available_tokens for statistics in weights.corpus.values())
    budget = data.draw(st.none() | st.integers(1, available)) if not row.needs_budget else available // 2 + 1
    given_paths = data.draw(st.booleans())
    template = "given/{name}.jsonl" if given_paths and not row.path else row.path
    paths = {domain: template.format(name=domain) for domain in weights.domain_weights} if template else None
    try:
        plan = make_plan(weights, paths=paths, budget=budget, max_epochs=4.0)
    except ValueError:
        assume(False)
    made = export_or_refusal(row, plan)
    if isinstance(made, str):
        # One line that says what to do.
        assert made.startswith(f"{name}: ")
        assert made.isprintable()
        assert "; " in made
        return
    sizes = {domain.path: domain.file_examples for domain in plan.domains}
    drawn = READERS[name]({file.name: file.text for file in made.files}, sizes)
    by_name = {domain.name: drawn.get(domain.path, drawn.get(domain.name)) for domain in plan.domains}
    by_name = {domain: units for domain, units in by_name.items() if units is not None}
    total = math.fsum(by_name.values())
    assert set(by_name) == set(made.expected)
    for domain, share in made.expected.items():
        assert by_name[domain] / total == pytest.approx(share, rel=1e-9)
    assert math.fsum(made.expected.values()) == pytest.approx(1.0, abs=1e-12)

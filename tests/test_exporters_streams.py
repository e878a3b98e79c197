"""Streaming, LLM Foundry, LitData, Ray Data and Data-Juicer: exact counts in each program's own arithmetic."""

from dataclasses import replace

import pytest
from grammars import data_juicer, litdata, ray_data, streaming
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ExportError
from doremi_mix.exporters import FORMATS, export_plan
from doremi_mix.exporters.plan import PlannedDomain, make_plan
from doremi_mix.types import DomainStatistics

READERS = {**streaming.READERS, **litdata.READERS, **ray_data.READERS, **data_juicer.READERS}
NAMES = sorted(READERS)

DOWNLOADS = "is none that Streaming downloads from (s3, sftp, gs, oci, hf, azure, azure-dl, dbfs, alipan)"
FILLED_IN = "would not be read as it is: OmegaConf takes ${...} and ??? for values to be filled in"

WEIGHTS = DomainWeights(
    {"alpha": 0.2, "beta's": 0.5, "中": 0.3},
    {"alpha": 0.3, "beta's": 0.3, "中": 0.4},
    corpus={
        "alpha": DomainStatistics(1000, 5000, 80, "data/alpha.jsonl", 1000),
        "beta's": DomainStatistics(300, 3000, 50, "data/beta's.jsonl", 310),
        "中": DomainStatistics(50, 1000, 16, "data/中.jsonl", 50),
    },
)


def make(format_name, weights=WEIGHTS, budget=6000, **how):
    row = FORMATS[format_name]
    if row.path:
        how.setdefault("paths", {name: row.path.format(name=name) for name in weights.domain_weights})
    plan = make_plan(weights, budget=budget, **how)
    return plan, export_plan(row, plan)


def body(export):
    """The text of the only file without its header."""
    [file] = export.files
    lines = file.text.splitlines(keepends=True)
    return "".join(lines[next(i for i, line in enumerate(lines) if not line.startswith("#")) :])


def plan_of(counts, sizes):
    """A plan that draws these numbers of examples, whatever would lead to them."""
    total = sum(counts)
    domains = tuple(
        PlannedDomain(
            name=f"d{number}",
            path=f"folder/d{number}",
            weight=count / total,
            token_share=count / total,
            example_share=count / total,
            tokens=count,
            examples=count,
            statistics=None,
            file_examples=size,
        )
        for number, (count, size) in enumerate(zip(counts, sizes, strict=True))
    )
    plan, _ = make("ray")
    return replace(plan, domains=domains, left_out=())


@st.composite
def amounts(draw):
    """Counts and sizes: up to five passes over up to 10**8 rows, and the counts around whole passes."""
    size = draw(st.integers(1, 60) | st.integers(1, 10**8))
    count = draw(st.integers(1, 5 * size) | st.builds(lambda n, d: n * size + d, st.integers(1, 5), st.integers(-1, 1)))
    return max(1, count), size


@settings(deadline=None)
@given(st.lists(amounts(), min_size=1, max_size=200))
def test_every_program_draws_exactly_the_counts(pairs):
    counts, sizes = zip(*pairs, strict=True)
    plan = plan_of(counts, sizes)
    rows = {domain.path: domain.file_examples for domain in plan.domains}
    for name in NAMES:
        export = FORMATS[name].write(plan)
        read = READERS[name]({file.name: file.text for file in export.files}, rows)
        assert read == {domain.path: domain.examples for domain in plan.domains}
        assert export.num_drawn == sum(counts)
        assert sum(export.expected.values()) == 1.0
        for i, count in enumerate(counts):
            assert export.expected[f"d{i}"] == pytest.approx(count / sum(counts), rel=1e-15, abs=1.2e-16)


def test_data_juicer_refuses_what_its_arithmetic_cannot_hold():
    with pytest.raises(ExportError) as error:
        FORMATS["data-juicer"].write(plan_of([10**17, 10**17 + 1, 1], [1, 1, 1]))
    assert str(error.value) == (
        "Data-Juicer's arithmetic cannot hold a total of 200,000,000,000,000,002 examples; lower --budget"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_is_needed(name):
    with pytest.raises(ExportError) as error:
        make(name, budget=None)
    assert str(error.value) == f"{name}: it takes numbers of examples, which need a budget; give --budget"
    assert FORMATS[name].needs_budget


@pytest.mark.parametrize("name", NAMES)
def test_a_domain_of_which_the_budget_draws_no_example_is_left_out(name):
    tiny = replace(WEIGHTS, domain_weights={"alpha": 1e-12, "beta's": 0.5, "中": 0.5 - 1e-12})
    _, export = make(name, tiny, budget=100)
    assert list(export.expected) == ["beta's", "中"]
    assert "alpha'" not in body(export)


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_is_drawn(name):
    _, export = make(name)
    [file] = export.files
    assert "# Each number is a number of examples to draw.\n" in file.text
    expected = "# Expected shares of the 630 examples drawn, and of the tokens:\n#   alpha   0.380952  0.200000\n"
    assert expected in file.text


def test_the_python_of_streaming():
    assert (
        body(make("streaming")[1])
        == '''\
from streaming import Stream, StreamingDataset

STREAMS = {
    'alpha': {'local': 'mds/alpha', 'choose': 240},
    "beta's": {'local': "mds/beta's", 'choose': 300},
    '中': {'local': 'mds/中', 'choose': 90},
}


def build_dataset(batch_size, **settings):
    """Returns the mixture; batch_size is what one device takes, as its DataLoader is told."""
    settings = {"shuffle": True, "shuffle_seed": 0, **settings}
    streams = [Stream(**stream) for stream in STREAMS.values()]
    return StreamingDataset(streams=streams, batch_size=batch_size, **settings)
'''
    )


def test_remote_streams_have_a_cache_of_their_own():
    """The cache's name depends on the remote alone: an index that lies in a cache is believed."""
    remotes = {"alpha": "s3://bucket/alpha", "beta's": "gs://bucket/beta", "中": "dbfs:/Volumes/x"}
    first = body(make("streaming", paths=remotes)[1])
    assert "'alpha': {'remote': 's3://bucket/alpha', 'local': 'streaming_cache/f04ec1202f7fa634', 'choose'" in first
    swapped = {"alpha": "gs://bucket/beta", "beta's": "s3://bucket/alpha", "中": "dbfs:/Volumes/x"}
    second = body(make("streaming", paths=swapped)[1])
    assert "\"beta's\": {'remote': 's3://bucket/alpha', 'local': 'streaming_cache/f04ec1202f7fa634'" in second


def test_the_yaml_of_llm_foundry():
    assert (
        body(make("llm-foundry", seed=3)[1])
        == """\
train_loader:
  name: finetuning
  dataset:
    streams:
      alpha:
        local: mds/alpha
        choose: 240
      "beta's":
        local: "mds/beta's"
        choose: 300
      "中":
        local: "mds/中"
        choose: 90
    shuffle: true
    shuffle_seed: 3
"""
    )


def test_the_python_of_litdata():
    assert (
        body(make("litdata", seed=3)[1])
        == '''\
from litdata import CombinedStreamingDataset, StreamingDataset

DOMAINS = {
    'alpha': {'path': 'litdata/alpha', 'count': 240},
    "beta's": {'path': "litdata/beta's", 'count': 300},
    '中': {'path': 'litdata/中', 'count': 90},
}


def build_dataset(seed=3, **settings):
    """Returns the mixture; settings are those of StreamingDataset, for example item_loader."""
    parts = []
    for domain in DOMAINS.values():
        whole = StreamingDataset(domain["path"], **settings)
        size = sum(end - start for start, end in whole.region_of_interest)
        fraction = subsample(domain["count"], size)
        parts.append(StreamingDataset(domain["path"], **{"shuffle": True, **settings}, subsample=fraction, seed=seed))
    return CombinedStreamingDataset(parts, seed=seed, iterate_over_all=True)


def subsample(count, size):
    """Returns what LitData turns into exactly count items: whole passes, then int(size * rest)."""
    passes, rest = divmod(count, size)
    return passes + (rest + 0.5) / size if rest else float(passes)
'''
    )


def test_the_python_of_ray():
    text = body(make("ray")[1])
    assert text.startswith("""\
import os

import ray
from ray.data import MixStoppingCondition

DOMAINS = {
    'alpha': {'path': 'data/alpha.jsonl', 'count': 240},
    "beta's": {'path': "data/beta's.jsonl", 'count': 300},
    '中': {'path': 'data/中.jsonl', 'count': 90},
}


def build_dataset(seed=0, block_rows=64):
""")
    assert text.endswith("""\
    whole = parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]
    return whole.repartition(target_num_rows_per_block=block_rows).materialize()
""")


def test_the_yaml_of_data_juicer():
    assert (
        body(make("data-juicer")[1])
        == """\
project_name: doremi_mix
dataset:
  max_sample_num: 630
  configs:
  - type: local
    path: data/alpha.jsonl
    weight: 0.38095238095203443
  - type: local
    path: "data/beta's.jsonl"
    weight: 0.47619047619004307
  - type: local
    path: "data/中.jsonl"
    weight: 0.1428571428579225
export_path: mixture/mixture.jsonl
process: []
"""
    )


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        (
            "streaming",
            "http://x/y",
            DOWNLOADS,
        ),
        (
            "llm-foundry",
            "x/${y}",
            FILLED_IN,
        ),
        ("llm-foundry", "???", FILLED_IN),
        ("litdata", "x/{%Y}", "has {%...}, which LitData replaces by the date"),
        ("litdata", "local:/x", "starts with local:, which LitData takes for a place to copy from"),
        ("litdata", "x/*.parquet", "ends with .parquet, which LitData takes for a pattern of file names in a folder"),
        ("ray", "a\nb", "has a character that cannot be printed; Ray drops some of them from paths"),
        ("ray", "a?b", "has ?, which Ray takes for the start of a query"),
        ("ray", "a;", "ends with a semicolon, which Ray drops"),
        ("data-juicer", "a*", "has *, which Data-Juicer's reader takes for a pattern or a protocol"),
        ("data-juicer", "a::b", "has ::, which Data-Juicer's reader takes for a pattern or a protocol"),
        ("data-juicer", "$HOME/a", "has $, which Data-Juicer's reader takes for an environment variable"),
    ],
)
def test_paths_that_would_be_misread_are_refused(name, path, message):
    with pytest.raises(ExportError) as error:
        make(name, paths={"alpha": path, "beta's": "b", "中": "c"})
    assert str(error.value) == (f"{name}: the path of domain 'alpha', {path!r}, {message}; give another path: --paths")


def test_names_that_omegaconf_replaces_are_refused():
    weights = DomainWeights({"${x}": 0.5, "b": 0.5}, {"${x}": 0.5, "b": 0.5})
    paths = {"${x}": "a", "b": "b"}
    with pytest.raises(ExportError) as error:
        make("llm-foundry", weights, budget=10, budget_unit="examples", equal_lengths=True, paths=paths)
    assert str(error.value) == f"llm-foundry: the name '${{x}}' {FILLED_IN}; rename the domain"


@pytest.mark.parametrize("name", NAMES)
def test_one_path_for_two_domains_is_refused(name):
    with pytest.raises(ExportError) as error:
        make(name, paths={"alpha": "x/a", "beta's": "x/./a/", "中": "c"})
    assert str(error.value) == (
        f"{name}: domains 'alpha' and \"beta's\" have the same path 'x/./a/', so that both would draw the same data; "
        "give other paths: --paths"
    )


def test_seeds_that_numpy_refuses_are_refused():
    for name, seed, message in [
        ("streaming", -1, "shuffle_seed must be at least 0, got -1; give another --seed"),
        ("litdata", 2**32, "the seed must be at least 0 and below 2**32, got 4294967296; give another --seed"),
    ]:
        with pytest.raises(ExportError) as error:
            make(name, seed=seed)
        assert str(error.value) == f"{name}: {message}"

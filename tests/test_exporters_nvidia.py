"""Exports for Megatron-LM, NeMo, Megatron-Bridge, NeMo-Automodel and Megatron-Energon."""

import math

import pytest
from grammars import energon, megatron, nemo
from hypothesis import example, given, settings
from hypothesis import strategies as st

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import BudgetError, ExportError
from doremi_mix.export_files import expectation
from doremi_mix.exporters import FORMATS, export_plan
from doremi_mix.exporters.export import ExportedFile
from doremi_mix.exporters.nemo import passes
from doremi_mix.exporters.plan import make_plan
from doremi_mix.types import DomainStatistics

READERS = {**megatron.READERS, **nemo.READERS, **energon.READERS}
CORPUS = {"a": DomainStatistics(100, 1000), "b": DomainStatistics(50, 1000), "c d": DomainStatistics(200, 2000)}
SHARES = {"a": 0.25, "b": 0.5, "c d": 0.25}


def weights_of(shares, corpus=None):
    return DomainWeights(shares, dict.fromkeys(shares, 1 / len(shares)), corpus=corpus or {})


def export(name, shares=SHARES, corpus=CORPUS, budget=3000, **how):
    return export_plan(FORMATS[name], make_plan(weights_of(shares, corpus), budget=budget, **how))


def paths_of(template="/d/{}", names=SHARES):
    return {name: template.format(name.replace(" ", "_")) for name in names}


def refusal(name, **how):
    with pytest.raises(ExportError) as caught:
        export(name, **how)
    return str(caught.value)


def written(name, shares=SHARES, corpus=CORPUS, budget=3000, **how):
    """Returns an export without the header, which is the same for all formats."""
    return FORMATS[name].write(make_plan(weights_of(shares, corpus), budget=budget, **how))


def test_megatron_arguments_file():
    result = written("megatron", paths=paths_of())
    assert result.files == (ExportedFile("megatron_blend.txt", "0.25 /d/a\n0.5 /d/b\n0.25 /d/c_d\n", comment=None),)
    assert result.expected == SHARES
    assert result.usage == "pretrain_gpt.py --data-args-path megatron_blend.txt --split 100,0,0"
    assert result.notes == (
        "To draw the budget set --train-samples to 3000 / sequence length.",
        "--split 100,0,0 trains on the whole of every prefix; other splits hold out the end of each.",
        "If building the datasets raises IndexError (oversamples), raise mid_level_dataset_surplus: for short runs of "
        "many domains its default of 0.005 can be too little.",
    )
    assert written("megatron", budget=None, paths=paths_of()).notes == result.notes[1:]


def test_megatron_per_split_file():
    result = written("megatron-per-split", paths=paths_of("/d/my {}"))
    text = """\
{
  "train": [
    "0.25",
    "/d/my a",
    "0.5",
    "/d/my b",
    "0.25",
    "/d/my c_d"
  ],
  "valid": null,
  "test": null
}
"""
    assert result.files == (ExportedFile("megatron_blend_per_split.json", text, comment=None),)
    assert result.expected == SHARES
    assert result.usage == "pretrain_gpt.py --per-split-data-args-path megatron_blend_per_split.json"


def test_nemo_list():
    result = written("nemo", paths=paths_of())
    text = """\
paths:
- "0.25"
- "/d/a"
- "0.5"
- "/d/b"
- "0.25"
- "/d/c_d"
"""
    assert result.files == (ExportedFile("nemo_paths.yaml", text),)
    assert result.expected == SHARES
    assert result.notes == (
        "To draw the budget set num_train_samples to 3000 / sequence length.",
        'split="1,0,0" trains on the whole of every prefix; the default holds out the last tenth of each.',
        "Configurations of NeMo 1 take the same list as model.data.data_prefix.",
    )


def test_megatron_bridge_blend():
    result = written("megatron-bridge", paths=paths_of())
    text = """\
BLEND = (
    [
        '/d/a',
        '/d/b',
        '/d/c_d',
    ],
    [
        0.25,
        0.5,
        0.25,
    ],
)
"""
    assert result.files == (ExportedFile("megatron_bridge_blend.py", text),)
    assert result.expected == SHARES
    assert result.notes[0] == "To draw the budget set train.train_samples to 3000 / sequence length."


def test_megatron_bridge_sft_sources():
    result = written("megatron-bridge-sft", paths=paths_of("/d/{}.parquet") | {"a": "/d/a.json"}, seed=7)
    text = """\
from megatron.bridge.data.builders import HFDatasetSourceConfig

SOURCES = [
    HFDatasetSourceConfig(
        path_or_dataset='json',
        load_kwargs={'data_files': '/d/a.json'},
        split='train',
    ),
    HFDatasetSourceConfig(
        path_or_dataset='parquet',
        load_kwargs={'data_files': '/d/b.parquet'},
        split='train',
    ),
    HFDatasetSourceConfig(
        path_or_dataset='parquet',
        load_kwargs={'data_files': '/d/c_d.parquet'},
        split='train',
    ),
]
SOURCE_WEIGHTS = [
    0.75,
    1.5,
    0.375,
]
BLEND_SEED = 7
"""
    assert result.files == (ExportedFile("megatron_bridge_sft.py", text),)
    assert result.num_drawn == 225
    assert result.expected == pytest.approx(dict.fromkeys(SHARES, 1 / 3), rel=1e-15)
    assert sum(result.expected.values()) == 1.0
    assert result.notes[1] == (
        "One pass over the mixture is 225 rows; a schema_adapter that drops rows changes the counts."
    )


def test_nemo_automodel_objective():
    result = written("nemo-automodel", paths=paths_of())
    text = """\
dataset:
  _target_: nemo_automodel.components.datasets.llm.megatron_dataset.MegatronPretraining
  paths:
    train:
    - 0.25
    - "/d/a"
    - 0.25
    - "/d/b"
    - 0.5
    - "/d/c_d"
  splits_to_build: train
domain_mixture:
  domains:
  - name: a
    sampling_weight: 0.25
    objective_weight: 0.25
    path: "/d/a"
  - name: b
    sampling_weight: 0.25
    objective_weight: 0.5
    path: "/d/b"
  - name: "c d"
    sampling_weight: 0.5
    objective_weight: 0.25
    path: "/d/c_d"
"""
    assert result.files == (ExportedFile("nemo_automodel.yaml", text),)
    assert result.expected == {"a": 0.25, "b": 0.25, "c d": 0.5}
    assert result.notes == (
        "Domains are sampled as the corpus has them (sampling_weight); the domain weights are objective_weight, the "
        "shares of the loss, which is multiplied by objective_weight / sampling_weight.",
        "The largest multiplier is 2 (b).",
        "It takes a loss with reduction sum (MaskedCrossEntropy), and no packing, pipeline or context parallelism; "
        "with validation, one block validation_dataset_NAME for each domain.",
        "All domains are repeated alike, as often as the recipe's own number of steps asks.",
    )
    assert result.second == SHARES


def test_energon_metadataset():
    shares = {"a": 0.5, "b": 0.25, "c d": 0.25}
    result = written("energon", shares={"a": 0.4, "b": 0.4, "c d": 0.2}, budget=None, paths=paths_of("energon/{}"))
    text = """\
__module__: megatron.energon
__class__: MetadatasetV2
splits:
  train:
    blend:
    - weight: 0.5
      path: energon/a
    - weight: 0.25
      path: energon/b
    - weight: 0.25
      path: energon/c_d
"""
    assert result.files == (ExportedFile("energon.yaml", text),)
    assert result.expected == shares
    assert result.usage == 'get_train_dataset("energon.yaml", ...)'
    assert result.notes == (
        "Paths are folders that `energon prepare` was run on, or JSONL files; relative ones start at this file's "
        "folder.  The file's name must end in .yaml.",
        "Samples are drawn at random without end, and a domain that is through starts again; set the length of the run "
        "in the trainer.",
        "A domain with fewer samples than there are workers over all ranks is missing on some of them, which draw the "
        "others more often.",
    )


def test_neither_budget_nor_epoch_cap_changes_what_automodel_samples_and_weights():
    plan = make_plan(weights_of(SHARES, CORPUS), budget=3900, max_epochs=1.0)
    assert plan.capped == ("a", "b")
    result = export_plan(FORMATS["nemo-automodel"], plan)
    free = export("nemo-automodel", budget=None)
    assert (result.expected, result.second) == (free.expected, free.second)
    heads, bodies = zip(*(one.files[0].text.split("dataset:\n") for one in (result, free)), strict=True)
    assert bodies[0] == bodies[1]
    head = heads[0].splitlines()
    assert "# Neither the budget of 3,900 tokens nor the epoch cap changes these numbers." in head
    assert not any(word in heads[0] for word in ("Cut by", "passes over a domain"))
    assert head[-4:] == [
        "# Expected shares of the sequences drawn, and of the objective:",
        "#   a    0.250000  0.250000",
        "#   b    0.250000  0.500000",
        "#   c d  0.500000  0.250000",
    ]
    entry = expectation(FORMATS["nemo-automodel"], plan, result)
    assert entry["domains"]["b"] == {
        "weight": 0.5,
        "expected_share": 0.25,
        "objective_share": 0.5,
        "token_share": 0.25,
        "example_share": None,
        "tokens": None,
        "examples": None,
        "epochs": None,
        "path": "data/b.jsonl",
    }
    assert (entry["budget"], entry["max_epochs"], entry["capped_domains"]) == (3900, None, [])


def test_automodel_refuses_a_budget_that_drops_a_domain():
    corpus = {"a": DomainStatistics(100, 1000), "b": DomainStatistics(800, 8000), "c": DomainStatistics(100, 1000)}
    shares = {"a": 0.5, "b": 1e-9, "c": 0.5 - 1e-9}
    assert export("nemo-automodel", shares, corpus, budget=None).expected == {"a": 0.1, "b": 0.8, "c": 0.1}
    assert refusal("nemo-automodel", shares=shares, corpus=corpus, budget=1000) == (
        "nemo-automodel: the budget of 1,000 tokens draws nothing of domain 'b' (1e-09 of the objective), but domains "
        "are sampled as the corpus has them whatever the budget; raise the budget, leave it out, or give the domain "
        "weight 0"
    )


def test_refuses_prefixes_that_megatron_would_misread():
    paths = paths_of()
    assert refusal("megatron", paths=paths | {"b": "/d/my b"}) == (
        "megatron: the path of domain 'b' has a space ('/d/my b'), at which Megatron cuts this file into arguments; "
        "give other paths: --paths, or use --format megatron-per-split"
    )
    for name in ("megatron", "megatron-per-split", "nemo", "megatron-bridge", "nemo-automodel"):
        assert refusal(name, paths=paths | {"b": ""}) == (
            f"{name}: the path of domain 'b' is empty; give other paths: --paths"
        )
        assert refusal(name, paths=paths | {"b": "/d/b\u2003"}) == (
            f"{name}: the path of domain 'b', '/d/b\\u2003', has spaces around it, which Megatron strips; give another "
            "path: --paths"
        )
        assert refusal(name, paths=paths | {"b": "/d/b.idx"}) == (
            f"{name}: the path of domain 'b', '/d/b.idx', ends in .idx, but Megatron adds .bin and .idx to it; give "
            "another path: --paths"
        )
        assert refusal(name, paths=paths | {"b": "/d/./a"}) == (
            f"{name}: domains 'a' and 'b' have the same path '/d/./a', so that both would draw the same data; give "
            "other paths: --paths"
        )
    assert refusal("nemo", paths=paths | {"b": "${oc.env:HOME}/b"}) == (
        "nemo: the path of domain 'b' has '${' ('${oc.env:HOME}/b'), which NeMo's configuration takes for a reference; "
        "give other paths: --paths"
    )


def test_refuses_what_megatron_bridge_cannot_load():
    paths = paths_of("/d/{}.jsonl")
    assert refusal("megatron-bridge-sft", paths=paths | {"b": "$HOME/b.jsonl"}) == (
        "megatron-bridge-sft: domain 'b': its path '$HOME/b.jsonl' holds \"$\", after which the datasets library puts "
        "in the value of an environment variable; give other paths: --paths"
    )
    for path in ("/d/b", "/d/b.txt", "/d/b.tsv"):
        assert refusal("megatron-bridge-sft", paths=paths | {"b": path}) == (
            f"megatron-bridge-sft: domain 'b': the kind of its file {path!r} is not known, expected .json, .jsonl or "
            ".ndjson, each also with .gz or .zst, or .parquet, .csv or .arrow; give other paths: --paths"
        )
    assert refusal("megatron-bridge-sft", paths=paths | {"b": "/d/./a.jsonl"}) == (
        "megatron-bridge-sft: domains 'a' and 'b' have the same path '/d/./a.jsonl', so that both would draw the same "
        "data; give other paths: --paths"
    )
    assert refusal("megatron-bridge-sft", budget=None) == (
        "megatron-bridge-sft: it takes numbers of examples, which need a budget; give --budget"
    )


def test_megatron_bridge_reads_files_of_each_kind_and_no_others():
    """The datasets library itself finds with these arguments the one file, whatever its name."""
    paths = {"a": "/d/a*.PARQUET", "b": "/d/b[1].csv", "c d": "/d/c.jsonl.gz"}
    (file,) = written("megatron-bridge-sft", paths=paths).files
    assert [line.strip() for line in file.text.splitlines() if "path_or" in line or "load_kwargs" in line] == [
        "path_or_dataset='parquet',",
        "load_kwargs={'data_files': '/d/a[*].PARQUET'},",
        "path_or_dataset='csv',",
        "load_kwargs={'data_files': '/d/b[[]1].csv'},",
        "path_or_dataset='json',",
        "load_kwargs={'data_files': '/d/c.jsonl.gz'},",
    ]


def test_refuses_what_automodel_would_change():
    assert refusal("nemo-automodel", shares={"a": 1.0, "b": 0.0, "c d": 0.0}) == (
        "nemo-automodel: domain_mixture takes at least two domains, and only one is drawn; train without weights"
    )
    assert refusal("nemo-automodel", corpus=None) == (
        "nemo-automodel: it samples domains as the corpus has them and weights their losses, but the sizes of the "
        "domains are not known; give --corpus RUN_DIR (or a file of num_examples and available_tokens by domain)"
    )
    two = {"a": DomainStatistics(1, 1000), "weighted": DomainStatistics(1, 1000)}
    assert refusal("nemo-automodel", shares=dict.fromkeys(two, 0.5), corpus=two, budget=100) == (
        "nemo-automodel: the domain name 'weighted' is reserved for the weighted loss; rename the domain"
    )
    two = {"a": DomainStatistics(1, 1000), "1e5": DomainStatistics(1, 1000)}
    assert refusal("nemo-automodel", shares=dict.fromkeys(two, 0.5), corpus=two, budget=100) == (
        "nemo-automodel: the name of domain '1e5' ('1e5') is empty, a Python literal or has a '$', which the "
        "configuration loader replaces; rename it"
    )
    assert refusal("nemo-automodel", paths=paths_of() | {"b": "$DATA/b"}) == (
        "nemo-automodel: the path of domain 'b' ('$DATA/b') is empty, a Python literal or has a '$', which the "
        "configuration loader replaces; give other paths: --paths"
    )


def test_refuses_what_energon_would_not_find():
    paths = paths_of()
    assert refusal("energon", paths=paths | {"b": ""}) == (
        "energon: the path of domain 'b' is empty; give other paths: --paths"
    )
    assert refusal("energon", paths=paths | {"b": "s3://x/b"}) == (
        "energon: the path of domain 'b', 's3://x/b', has '://' but is no address that Energon knows "
        "(msc://PROFILE/FOLDER): it would look for a local folder of that name; give another path: --paths"
    )
    assert refusal("energon", paths=paths | {"b": "/d//e/../a"}) == (
        "energon: domains 'a' and 'b' have the same path '/d//e/../a', so that both would draw the same data; give "
        "other paths: --paths"
    )
    assert refusal("energon", corpus=None).startswith("energon: it draws whole examples, so that shares of tokens must")
    addresses = {name: f"msc://store/{name}" for name in SHARES}
    assert READERS["energon"]({file.name: file.text for file in export("energon", paths=addresses).files}, {}) == (
        pytest.approx({addresses[name]: share for name, share in export("energon").expected.items()})
    )


@given(size=st.integers(1, 10**9), epochs=st.floats(0, 8), data=st.data())
def test_passes_draw_exactly_the_count(size, epochs, data):
    count = data.draw(st.integers(1, max(1, int(size * epochs))))
    value = passes(count, size)
    rest = size * (value - int(value))
    assert int(value) * size + round(rest) == count
    # As many rows where the fraction of a pass is rounded up.
    assert int(value) * size + math.ceil(rest) == count


NAMES = st.one_of(
    st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=0, max_size=6),
    st.sampled_from(["1e5", "yes", "null", "~", "-x", "a b", " a", "a#b", "# a", "a: b", "${x}", "$x", "{name}", "٣"]),
    st.sampled_from(["a.bin", "1", "nan", "weighted", "[1]", "*", "a\nb", "'", '"', "\\", "b'x'", "中文", "s3://x/y"]),
)


@st.composite
def problems(draw):
    names = draw(st.lists(NAMES, min_size=2, max_size=draw(st.sampled_from([3, 8, 200])), unique=True))
    raw = draw(st.lists(st.floats(1e-12, 1) | st.just(1e-12) | st.just(0.0), min_size=len(names), max_size=len(names)))
    raw[0] = raw[0] or 1.0
    total = math.fsum(raw)
    shares = {name: value / total for name, value in zip(names, raw, strict=True)}
    sizes = draw(st.lists(st.integers(1, 10**6), min_size=len(names), max_size=len(names)))
    lengths = draw(st.lists(st.integers(1, 500), min_size=len(names), max_size=len(names)))
    corpus = {
        name: DomainStatistics(size, size * length) for name, size, length in zip(names, sizes, lengths, strict=True)
    }
    budget = draw(st.none() | st.integers(1000, 10**8))
    return shares, corpus, budget, draw(st.sampled_from(["{}", "/data/{}", "/data/{}.jsonl", "data/{}_text_document"]))


@settings(max_examples=60, deadline=None)
@given(problem=problems(), name=st.sampled_from(sorted(READERS)))
@example(problem=({"a": 1.0, "b": 0.0}, {n: DomainStatistics(5, 50) for n in "ab"}, 40, "{}"), name="megatron")
def test_exports_are_read_back_or_refused(problem, name):
    shares, corpus, budget, template = problem
    paths = {domain: template.replace("{}", domain) for domain in shares}
    try:
        result = export(name, shares, corpus, budget, paths=paths)
    except BudgetError:
        return
    except ExportError as error:
        message = str(error)
        assert message.startswith(f"{name}: ")
        assert message.isprintable()
        return
    sizes = {paths[domain]: statistics.num_examples for domain, statistics in corpus.items()}
    units = READERS[name]({file.name: file.text for file in result.files}, sizes)
    total = math.fsum(units.values())
    keys = {domain: domain if name == "nemo-automodel" else paths[domain] for domain in result.expected}
    assert set(units) == set(keys.values())
    for domain, share in result.expected.items():
        assert units[keys[domain]] / total == pytest.approx(share, rel=1e-9)
    if result.num_drawn is not None:
        assert total == result.num_drawn


@settings(max_examples=60, deadline=None)
@given(problem=problems(), name=st.sampled_from(sorted(READERS)))
def test_harmless_names_are_never_refused(problem, name):
    _, corpus, _, _ = problem
    statistics = {f"domain {number}": entry for number, entry in enumerate(corpus.values())}
    ending = ".jsonl" if name == "megatron-bridge-sft" else ""
    paths = {domain: f"/data/{number}/中文{ending}" for number, domain in enumerate(statistics)}
    shares = {domain: 1 / len(statistics) for domain in statistics}
    budget = min(entry.available_tokens for entry in statistics.values()) * len(statistics)
    result = export(name, shares, statistics, budget, paths=paths)
    assert math.fsum(result.expected.values()) == 1.0

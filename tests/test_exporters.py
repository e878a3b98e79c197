"""Every format: what it writes is read back by the program's own rules, or it refuses with a reason."""

import re
import string
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import grammars
import pytest
import yaml
from grammars import WANTED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import doremi_mix.exporters
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import DoremiMixError
from doremi_mix.export_files import ExportOptions, plan_for
from doremi_mix.exporters import FORMATS, export_plan
from doremi_mix.types import DomainStatistics

MODULES = [path.stem for path in Path(grammars.__file__).parent.glob("*.py") if path.stem != "__init__"]
READERS = {name: reader for module in MODULES for name, reader in import_module(f"grammars.{module}").READERS.items()}

HOSTILE = [
    # Characters that some reader splits at, quotes with or expands.
    *(
        "a b",
        " lead",
        "trail ",
        "it's",
        'say "hi"',
        "a'b\"c",
        "a,b",
        "a:b",
        "a: b",
        "#no",
        "x #y",
        "a@b",
        "ms::x",
        "a;b",
    ),
    *(
        "-",
        "- a",
        "-dash",
        "--flag",
        "*",
        "&a",
        "!t",
        "%d",
        "?",
        "|",
        ">",
        "{a}",
        "[b]",
        "${x}",
        "$HOME",
        "`w`",
        "@LINK",
    ),
    *("\\", "a\\nb", "a|b", "a;b", "@LINK", "<<", "=1+1", "+1", "a/b", "../up", ".", "..", "{name}"),
    # What YAML takes for something else than text.
    *(
        "yes",
        "No",
        "null",
        "~",
        "true",
        "1",
        "1.5",
        "1e5",
        ".5",
        "0x1F",
        "1_000",
        "2024-01-01",
        "12:30:45",
        "NaN",
        "inf",
    ),
    # Line ends, control characters, other scripts.
    *("a\nb", "a\tb", "a\rb", "\x85", "\u2028", "\x1b[0m", "\ufeff", "a\u202eb", "中文", "é", "😀"),
    # Words that some format uses.
    *("train", "test", "path", "weighted", "a_text_document"),
]

PATHS = (None, "/d/{name}.jsonl", "/d/{name}", "{name}")
"""What --paths may be; None is the default of a format."""

plain = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)
wild = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12)
names = st.sampled_from(HOSTILE) | plain | wild
weight = st.one_of(st.just(0.0), st.just(1e-12), st.floats(1e-12, 1.0))


@st.composite
def problems(draw, name=names):
    """Weights of 2 to 200 domains over a corpus, and a budget that one to three passes would give."""
    count = draw(st.one_of(st.integers(2, 8), st.integers(2, 200)))
    chosen = draw(st.lists(name, min_size=count, max_size=count, unique=True))
    raw = draw(st.lists(weight, min_size=count, max_size=count).filter(any))
    total = sum(raw)
    corpus = {}
    for number, domain in enumerate(chosen):
        examples = draw(st.integers(1, 3000)) if number < 8 else 100 + number
        extra = draw(st.integers(0, 50)) if number < 8 else 0
        corpus[domain] = DomainStatistics(
            num_examples=examples,
            available_tokens=examples * (1 + number % 37),
            num_sequences=max(1, examples // 3),
            path=f"/data/{number}.jsonl",
            num_rows=examples + extra,
        )
    shares = dict(zip(chosen, (value / total for value in raw), strict=True))
    shares[max(shares, key=shares.get)] += 1 - sum(shares.values())
    weights = DomainWeights(shares, dict.fromkeys(chosen, 1 / count), corpus=corpus)
    passes = draw(st.floats(0.05, 3))
    budget = max(1, int(passes * sum(s.available_tokens for n, s in corpus.items() if shares[n])))
    sources = {domain: statistics.path for domain, statistics in corpus.items()}
    paths = draw(st.sampled_from([*PATHS, sources]))
    options = {"max_epochs": draw(st.sampled_from([4.0, 2.5])), "paths": paths}
    return weights, ExportOptions(budget=draw(st.sampled_from([None, budget])), **options)


def rows_of(path, statistics):
    """Rows of a file: the one that the domain was loaded from has all, others have those that are trained on."""
    return statistics.num_rows if path == statistics.path else statistics.num_examples


def read_back(row, plan, export):
    """What the program would draw of each domain, by the domain's name, and what else the files say."""
    paths = {domain.path: domain.name for domain in plan.domains}
    sizes = {domain.path: rows_of(domain.path, domain.statistics) for domain in plan.domains}
    drawn = READERS[row.name]({file.name: file.text for file in export.files}, sizes)

    def by_name(units):
        named = {}
        for key, value in units.items():
            name = paths.get(key, key)
            assert name in plan.learned.domain_weights, f"it would read {key!r}, which is no domain"
            assert name not in named, f"it would read {name!r} twice"
            named[name] = value
        return named

    said = {
        what: by_name(value) if isinstance(value, dict) else value for what, value in getattr(drawn, "said", {}).items()
    }
    requested = re.search(r"requested_tokens=(\d*)", export.usage)
    if requested:
        said["tokens"] = int(requested[1]) if requested[1] else None
    if all(type(value) is int for value in drawn.values()):
        said["total"] = sum(drawn.values())
    return by_name(drawn), said


WHOLE_FILES = {"dolma"}
"""Programs that draw about the counts, as near as the sizes of their files let them."""


def compare(row, plan, export):
    """Fails unless the program draws what the export says, which is what was planned."""
    units, said = read_back(row, plan, export)
    total = sum(units.values())
    got = {name: float(value / total) for name, value in units.items() if value}
    assert set(got) == {name for name, share in export.expected.items() if share}
    for name, share in export.expected.items():
        assert got.get(name, 0) == pytest.approx(share, rel=1e-9, abs=1e-15)
    if row.needs_budget:
        assert said["total"] == sum(plan.counts().values())
    if row.name in WHOLE_FILES:
        assert export.num_drawn is None
        del said["total"]
    # A number of units is known where the files fix one.
    said.setdefault("total", None)
    for what, value in said.items():
        wanted = WANTED[what](plan, export)
        if isinstance(value, dict):
            wanted = pytest.approx(wanted, rel=1e-9, abs=1e-15)
        assert value == wanted, what


def assert_one_clear_line(message):
    assert message.isprintable()
    assert "; " in message, "a message says what is wrong and what to do"


def check(row, weights, options):
    """Writes a format and reads it back; returns False when it was refused."""
    try:
        plan = plan_for(row, weights, options)
        export = export_plan(row, plan)
    except DoremiMixError as error:
        assert_one_clear_line(str(error))
        return False
    compare(row, plan, export)
    return True


def test_every_format_has_a_reader_and_every_reader_a_format():
    assert set(READERS) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(problem=problems())
def test_any_weights_and_names_are_read_right_or_refused(name, problem):
    check(FORMATS[name], *problem)


@pytest.mark.parametrize("name", FORMATS)
def test_each_hostile_name_is_read_right_or_refused(name):
    row, accepted = FORMATS[name], set()
    for hostile in HOSTILE:
        corpus = {
            hostile: DomainStatistics(100, 1000, 10, "/data/1.jsonl", 110),
            "other": DomainStatistics(50, 1000, 10, "/data/2.jsonl", 50),
        }
        weights = DomainWeights({hostile: 0.25, "other": 0.75}, {hostile: 0.5, "other": 0.5}, corpus=corpus)
        for paths in PATHS:
            try:
                done = check(row, weights, ExportOptions(budget=1500, paths=paths))
            except Exception as error:
                raise AssertionError(f"name {hostile!r}, paths {paths!r}") from error
            if done and "{name}" in (paths or row.path):
                accepted.add(hostile)
    # Refusing everything would be easy.
    assert len(accepted) >= len(HOSTILE) / 3, sorted(set(HOSTILE) - accepted)


@pytest.fixture(scope="module")
def ordinary():
    """Weights of three domains, of which two have rows that are not trained on."""
    corpus = {
        "dolly": DomainStatistics(100, 1000, 10, "/data/dolly.jsonl", 110),
        "gsm8k": DomainStatistics(300, 1500, 10, "/data/gsm8k.jsonl", 304),
        "code": DomainStatistics(50, 1000, 10, "/data/code.jsonl", 50),
    }
    return DomainWeights({"dolly": 0.2, "gsm8k": 0.5, "code": 0.3}, dict.fromkeys(corpus, 1 / 3), corpus=corpus)


@pytest.mark.parametrize("name", FORMATS)
def test_an_ordinary_mixture_can_be_told_to_every_program(name, ordinary):
    row = FORMATS[name]
    for budget in (1200, None):
        assert check(row, ordinary, ExportOptions(budget=budget))
        assert any(check(row, ordinary, ExportOptions(budget=budget, paths=paths)) for paths in PATHS if paths)


def exported(name, weights, budget=4000):
    """An export that is right; under this budget, two passes over the rows of a domain are more than there are."""
    plan = plan_for(FORMATS[name], weights, ExportOptions(budget=budget, max_epochs=3.0))
    export = export_plan(FORMATS[name], plan)
    compare(FORMATS[name], plan, export)
    return plan, export


def assert_caught(name, plan, export):
    """A wrong export must fail by what it says, not by being no YAML or Python any more."""
    for file in export.files:
        if file.name.endswith(".py"):
            compile(file.text, file.name, "exec")
        if file.name.endswith((".yaml", ".json")):
            yaml.safe_load(file.text)
    with pytest.raises((AssertionError, ValueError, LookupError)):
        compare(FORMATS[name], plan, export)


@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_number_of_units_is_caught(name, ordinary):
    plan, export = exported(name, ordinary)
    assert_caught(name, plan, replace(export, num_drawn=7))
    if export.num_drawn is not None:
        assert_caught(name, plan, replace(export, num_drawn=export.num_drawn + 1))
        assert_caught(name, plan, replace(export, num_drawn=None))


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_of_the_wrong_domains_are_caught(name, ordinary):
    plan, export = exported(name, ordinary)

    def swapped(text):
        return text.replace("dolly", "\0").replace("code", "dolly").replace("\0", "code")

    # The words of a program are not names.
    texts = [swapped(file.text).replace("dollycs", "codecs") for file in export.files]
    files = tuple(replace(file, text=text) for file, text in zip(export.files, texts, strict=True))
    assert_caught(name, plan, replace(export, files=files))


def times(factor):
    return lambda match: f"{match[1]}{float(match[2]) * factor!r}"


def as_whole(change):
    return lambda match: f"{match[1]}{change(int(match[2]))}"


MUTATIONS = {
    "axolotl": [(r"(weight: )(\S+)", times(0.5)), (r"(weight: )(\S+)", times(0.99))],
    "data-juicer": [("max_sample_num: .*", "max_sample_num: 7"), (r"(weight: )(0\.1\S*)", times(1.5))],
    "datasets": [
        (r"\[:num_drawn\]", "[:1]"),
        (r"\[:num_drawn\]", ""),
        (r"passes = \[.*", "passes = [numpy.zeros(num_drawn, int)]"),
    ],
    "datasets-json": [
        (r'("num_examples": )(\d+)', as_whole(lambda count: count - 1)),
        (r'("num_passes": )\d+', r"\g<1>1"),
    ],
    "doremi": [("0.5", "0.4")],
    "dolma": [(r"(sample_rate: )(\S+)", times(100)), (r"(sample_rate: )(\S+)", times(1.1))],
    "energon": [(r"weight: 0\.1\S+", "weight: 0.9")],
    "levanter": [
        ("restart", "first_exhausted"),
        ("pack: true", "pack: false"),
        (r"(mixture_block_size: )(\d+)", r"\g<1>8"),
    ],
    "litdata": [("subsample=fraction", "subsample=1.0"), ("rest . 0.5", "rest - 0.5")],
    "llama-factory": [
        ("streaming: false", "streaming: true"),
        (r'("num_samples": )(\d+)', as_whole(lambda count: count + 1)),
    ],
    "llama-factory-v1": [(r"(size: )(\d+)", as_whole(lambda count: 0)), ("size: ", "weight: ")],
    "llm-foundry": [("shuffle: true", "shuffle: false"), (r"(choose: )(\d+)", as_whole(lambda count: count * 2))],
    "marin": [("pack: true", "pack: false")],
    "megatron": [("0.5", "0.4")],
    "megatron-bridge": [("0.5", "0.4")],
    "megatron-bridge-sft": [
        ("(        )()split='train'", "\\1split='train[:10]'"),
        (r"(SOURCE_WEIGHTS = \[\n    )([\d.]+)", times(2)),
    ],
    "megatron-per-split": [("0.5", "0.4")],
    "ms-swift": [(r"(#)(\d+)", as_whole(lambda count: count + 1)), (r"#\d+", "")],
    "nanotron": [("0.5", "0.4")],
    "nemo": [("0.5", "0.4")],
    "nemo-automodel": [
        (r"objective_weight: .*", "objective_weight: 0.5"),
        (r"(objective_weight: )(0\.2)", times(1.1)),
        (r"(sampling_weight: )(0\.4\S*)", times(1.1)),
    ],
    "olmo-core": [
        ("max_repetition_ratio: .*", "max_repetition_ratio: 1000000.0"),
        ("max_repetition_ratio: .*", "max_repetition_ratio: 1.0"),
        ("max_source_fraction: .*", "max_source_fraction: 0.5"),
        ("requested_tokens=[0-9]+", "requested_tokens=5"),
    ],
    "olmo-core-composable": [
        ("NUM_TOKENS = .*", "NUM_TOKENS = 5"),
        ("NUM_TOKENS = .*", "NUM_TOKENS = None"),
        ("MAX_REPETITION = .*", "MAX_REPETITION = 1000000.0"),
        ("ratio=share", "ratio=0.5"),
        ("ratio=share", "ratio=1 / 3"),
        ("num_tokens=None if", "num_tokens=None if True or"),
    ],
    "open-instruct": [
        (r"(.jsonl )(\d+)", as_whole(lambda count: f"{count}.0")),
        (r"(.jsonl )(\d+)", as_whole(lambda count: 1)),
    ],
    "openrlhf": [("MAX_SAMPLES=.*", "MAX_SAMPLES=3"), ("MAX_SAMPLES=.*", ""), (",", ",,")],
    "oumi": [(r"(sample_count: )(\d+)", as_whole(lambda count: count + 1))],
    "ray": [('domain."count".', "1"), ("STOP_ON_LONGEST_DROP", "STOP_ON_SHORTEST"), (r"\* passes", "* 1")],
    "streaming": [('"shuffle": True', '"shuffle": False'), (r"('choose': )(\d+)", as_whole(lambda count: 1))],
    "torchtitan": [("weight=share", "weight=1.0"), ("infinite=True", "infinite=False"), ('row."messages".', "[]")],
    "torchtitan-grain": [
        ("weight=share", "weight=1.0"),
        ("repeat=True", "repeat=False"),
        ("sample is not None", "True"),
        ('row."messages".', "[]"),
    ],
    "trl": [(r"train\[:\d+\]", "train"), (r"(train\[:)(\d+)", as_whole(lambda count: count - 1))],
    "xtuner": [(r"(sample_ratio=)([\d.]+)", times(2)), (r", sample_ratio=[\d.]+", "")],
}
"""Changes of what is exported that make its program draw something else."""


@pytest.mark.parametrize(
    ("name", "pattern", "text"),
    [(name, *change) for name, changes in MUTATIONS.items() for change in changes],
    ids=lambda part: part if isinstance(part, str) else "number",
)
def test_a_wrong_file_is_caught(name, pattern, text, ordinary):
    plan, export = exported(name, ordinary)
    files = tuple(replace(file, text=re.sub(pattern, text, without_header(file))) for file in export.files)
    changed = replace(export, files=files, usage=re.sub(pattern, text, export.usage))
    assert changed.usage != export.usage or any(
        file.text != without_header(before) for file, before in zip(files, export.files, strict=True)
    ), "the change changes nothing"
    assert_caught(name, plan, changed)


def without_header(file):
    lines = file.text.splitlines(keepends=True)
    return "".join(line for line in lines if file.comment is None or not line.startswith(file.comment))


def test_every_program_has_a_change_that_must_be_caught():
    # What the others say to people or to programs in general has its own checks.
    others = {"csv", "markdown", "ratio", "domain-weights", "yaml", "lingua", "llama-factory-probabilities"}
    assert set(FORMATS) - set(MUTATIONS) == others


def test_every_module_of_the_package_is_in_the_table():
    folder = Path(doremi_mix.exporters.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "counts", "export", "paths", "plan"}
    assert modules == set(doremi_mix.exporters._MODULES)

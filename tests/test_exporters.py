"""Every format: what it writes is read back by the program's own rules, or it refuses with a reason."""

import string
from importlib import import_module
from pathlib import Path

import grammars
import pytest
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
    paths = draw(st.sampled_from([None, "/d/{name}.jsonl", "{name}"]))
    return weights, ExportOptions(budget=draw(st.sampled_from([None, budget])), paths=paths)


def read_back(name, plan, export):
    """What the program would draw of each domain, as shares by the domain's name."""
    paths = {domain.path: domain.name for domain in plan.domains}
    known = {domain.name for domain in plan.domains}
    sizes = {domain.path: domain.file_examples for domain in plan.domains}
    units = READERS[name]({file.name: file.text for file in export.files}, sizes)
    by_name = {}
    for key, value in units.items():
        domain = paths.get(key, key)
        assert domain in known, f"{name} would read {key!r}, which is no domain of the plan"
        assert domain not in by_name, f"{name} would read {domain!r} twice"
        by_name[domain] = value
    total = sum(by_name.values())
    return {domain: float(value / total) for domain, value in by_name.items() if value}


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
    got = read_back(row.name, plan, export)
    assert set(got) == {name for name, share in export.expected.items() if share}
    for name, share in export.expected.items():
        assert got.get(name, 0) == pytest.approx(share, rel=1e-9, abs=1e-15)
    return True


def test_every_format_has_a_reader_and_every_reader_a_format():
    assert set(READERS) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(problem=problems())
def test_any_weights_and_names_are_read_right_or_refused(name, problem):
    check(FORMATS[name], *problem)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_each_hostile_name_is_read_right_or_refused(name, hostile):
    corpus = {
        hostile: DomainStatistics(100, 1000, 10, "/data/1.jsonl", 110),
        "other": DomainStatistics(50, 1000, 10, "/data/2.jsonl", 50),
    }
    weights = DomainWeights({hostile: 0.25, "other": 0.75}, {hostile: 0.5, "other": 0.5}, corpus=corpus)
    for paths in (None, "/d/{name}", "{name}"):
        check(FORMATS[name], weights, ExportOptions(budget=1500, paths=paths))


@pytest.mark.parametrize("name", FORMATS)
def test_an_ordinary_mixture_can_be_told_to_every_program(name):
    corpus = {
        "dolly": DomainStatistics(100, 1000, 10, "/data/dolly.jsonl", 110),
        "gsm8k": DomainStatistics(300, 1500, 10, "/data/gsm8k.jsonl", 300),
        "code": DomainStatistics(50, 1000, 10, "/data/code.jsonl", 50),
    }
    weights = DomainWeights({"dolly": 0.25, "gsm8k": 0.5, "code": 0.25}, dict.fromkeys(corpus, 1 / 3), corpus=corpus)
    assert check(FORMATS[name], weights, ExportOptions(budget=1200))
    assert check(FORMATS[name], weights, ExportOptions())


def test_every_module_of_the_package_is_in_the_table():
    folder = Path(doremi_mix.exporters.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "counts", "export", "paths", "plan"}
    assert modules == set(doremi_mix.exporters._MODULES)

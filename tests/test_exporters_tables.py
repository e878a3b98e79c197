"""Tables: the whole text of each, what they do with zeros, gaps and hostile names, and what reads them."""

import csv
import io
import json

import pandas
import pytest
import yaml
from grammars.tables import READERS
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ExportError
from doremi_mix.export_files import ExportOptions, plan_for
from doremi_mix.exporters import FORMATS, export_plan
from doremi_mix.types import DomainStatistics
from doremi_mix.weight_files import parse_weights

CORPUS = {
    "dolly": DomainStatistics(100, 1000, 10, "/data/dolly.jsonl", 110),
    "gsm8k": DomainStatistics(300, 1500, 10, "/data/gsm8k.jsonl", 300),
    "code": DomainStatistics(50, 1000, 10, "/data/code.jsonl", 50),
}
SHARES = {"dolly": 0.25, "gsm8k": 0.75, "code": 0.0}
LOST = {"kind": "worse", "sentence": "Learned is worse than natural.", "best": "natural"}
WEIGHTS = DomainWeights(SHARES, dict.fromkeys(SHARES, 1 / 3), corpus=CORPUS, verdict=LOST)
UNKNOWN = DomainWeights(SHARES, dict.fromkeys(SHARES, 1 / 3))
TABLES = ["csv", "markdown", "ratio", "domain-weights", "yaml"]
ZEROS = "Domains of which nothing is drawn are listed here with a share of 0."

any_name = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=10)
shown_name = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), min_size=1, max_size=10)
hostile = st.text("=+-@'\",;|\\`*_[]<>&$# \n\r\t\f:{}%!?.a1中", min_size=1, max_size=6)


def export(name, weights, **how):
    return export_plan(FORMATS[name], plan_for(FORMATS[name], weights, ExportOptions(**how)))


def of(names, **how):
    """Weights of domains with hostile names."""
    corpus = {name: DomainStatistics(10 + i, 100 + 7 * i) for i, name in enumerate(names)}
    shares = dict(zip(names, [1 - (len(names) - 1) / 16, *[1 / 16] * (len(names) - 1)], strict=True))
    return DomainWeights(shares, shares, corpus=corpus, **how)


def test_csv():
    made = export("csv", WEIGHTS, budget=1200)
    assert made.files[0].text == (
        '"name","weight","token_share","example_share","tokens","examples","epochs"\n'
        '"dolly",0.25,0.25,0.14285714285714285,300,30,0.3\n'
        '"gsm8k",0.75,0.75,0.8571428571428571,900,180,0.6\n'
        '"code",,0.0,0.0,0,0,0.0\n'
    )
    assert (made.files[0].name, made.files[0].comment, made.num_drawn) == ("domain_weights.csv", None, None)
    assert made.expected == {"dolly": 0.25, "gsm8k": 0.75}
    assert made.notes == (
        ZEROS,
        "The weight of a domain of which the budget draws nothing is left blank: it may be 0, or too small for one "
        "token.",
    )


def test_csv_without_a_budget_and_without_a_corpus():
    header = '"name","weight","token_share","example_share","tokens","examples","epochs"\n'
    made = export("csv", WEIGHTS)
    assert made.files[0].text == header + (
        '"dolly",0.25,0.25,0.14285714285714285,,,\n"gsm8k",0.75,0.75,0.8571428571428571,,,\n"code",0.0,0.0,0.0,,,\n'
    )
    assert made.notes == (ZEROS,)
    made = export("csv", UNKNOWN, budget=1000)
    assert made.files[0].text == header + ('"dolly",0.25,0.25,,250,,\n"gsm8k",0.75,0.75,,750,,\n"code",,0.0,,0,,\n')


def test_csv_under_the_epoch_cap():
    """Both what was learned and what is planned stand in the table; what is read again is the plan."""
    weights = DomainWeights({"dolly": 0.9, "gsm8k": 0.05, "code": 0.05}, SHARES, corpus=CORPUS)
    text = export("csv", weights, budget=2000, max_epochs=1.0).files[0].text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["weight"], row["token_share"], row["tokens"], row["epochs"]) for row in rows] == [
        ("0.9", "0.5", "1000", "1.0"),
        ("0.05", "0.25", "500", "0.3333333333333333"),
        ("0.05", "0.25", "500", "0.5"),
    ]
    assert dict(parse_weights(text).weights) == {"dolly": 0.5, "gsm8k": 0.25, "code": 0.25}


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "＠x", "'quoted", "''"]


def test_csv_starts_no_formula():
    names = [*FORMULAS, "a=b", "x-y"]
    made = export("csv", of(names))
    rows = list(csv.reader(io.StringIO(made.files[0].text, newline="")))[1:]
    assert [row[0] for row in rows] == [*(f"'{name}" for name in FORMULAS), "a=b", "x-y"]
    assert made.notes == (
        "A ' stands before names that a spreadsheet would run as formulas: " + ", ".join(map(repr, FORMULAS)) + ".",
    )
    assert list(parse_weights(made.files[0].text).weights) == names


def test_csv_as_pandas_reads_it():
    """By the line that the export says; without it, names such as NA and 1e5 are lost."""
    names = ["NA", "1e5", "nan", " a ", 'a,"b"', "a\nb\rc", "中文", "#x", "a;b\tc"]
    made = export("csv", of(names), budget=100)
    assert made.usage.startswith(
        'pandas.read_csv("domain_weights.csv", dtype={"name": str}, keep_default_na=False, na_values=[""]), or '
    )
    table = pandas.read_csv(
        io.StringIO(made.files[0].text, newline=""), dtype={"name": str}, keep_default_na=False, na_values=[""]
    )
    assert list(table["name"]) == names
    assert dict(zip(table["name"], table["token_share"], strict=True)) == made.expected
    assert {str(table[column].dtype) for column in ("tokens", "examples")} == {"int64"}


def test_markdown():
    made = export("markdown", WEIGHTS, budget=1_200)
    assert made.files[0].text == (
        "| domain | weight | share of tokens | share of examples | tokens | examples | epochs |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| dolly | 0.25 | 0.25 | 0.142857 | 300 | 30 | 0.3 |\n"
        "| gsm8k | 0.75 | 0.75 | 0.857143 | 900 | 180 | 0.6 |\n"
        "| code |  | 0 | 0 | 0 | 0 | 0 |\n"
    )
    assert (made.files[0].name, made.files[0].comment) == ("domain_weights.md", None)


def test_markdown_shows_names_as_they_are():
    names = {
        "alpaca_gpt4_data_zh": "alpaca_gpt4_data_zh",
        "_a_": r"\_a\_",
        "a|b\\|c": r"a\|b\\\|c",
        "**a** `b` [c](d) <e> ~f~ &amp; $g$": r"\*\*a\*\* \`b\` \[c\](d) \<e\> \~f\~ \&amp; \$g\$",
        "a\nb\r\tc\u2028d": "a&#10;b&#13;&#9;c&#8232;d",
        " a  ": "&#32;a&#32;&#32;",
        "  ": "&#32;&#32;",
        "---": "---",
        "# a": "# a",
    }
    made = export("markdown", of(list(names)))
    lines = made.files[0].text.split("\n")[2:-1]
    assert [line.partition(" | ")[0].removeprefix("| ") for line in lines] == list(names.values())
    assert set(READERS["markdown"]({"x": made.files[0].text}, {})) == set(names)


def rendered_names(text):
    """The first column as a renderer of Markdown shows it; fails where a name became markup."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    assert [tokens[0].type, tokens[-1].type] == ["table_open", "table_close"]
    cells = [tokens[i + 1].children for i, token in enumerate(tokens) if token.type in ("th_open", "td_open")]
    assert {child.type for cell in cells for child in cell} == {"text"}
    return ["".join(child.content for child in cell) for cell in cells[7::7]]


@given(st.lists(shown_name | hostile, min_size=2, max_size=8, unique=True))
def test_markdown_as_a_renderer_shows_it(names):
    assert rendered_names(export("markdown", of(names)).files[0].text) == names


@pytest.mark.parametrize("name", ["a\x1b[0m", "\x85", "\x7f", "a\ufffe", "\ufdd0", "\U0001ffff"])
def test_markdown_refuses_what_no_page_can_show(name):
    with pytest.raises(ExportError) as caught:
        export("markdown", of(["a", name]))
    assert str(caught.value) == (
        f"markdown: the name of domain {name!r} has a character that no web page can show; rename the domain, or use "
        "--format csv"
    )


def test_markdown_says_what_its_rounded_shares_give():
    shares = {"a": 0.1234567891, "b": 1e-12, "c": 1 - 0.1234567891 - 1e-12}
    made = export("markdown", DomainWeights(shares, shares))
    assert [line.split(" | ")[2] for line in made.files[0].text.splitlines()[2:]] == ["0.123457", "1e-12", "0.876543"]
    assert made.expected == pytest.approx({"a": 0.123457, "b": 1e-12, "c": 0.876543}, rel=1e-11)
    assert sum(made.expected.values()) == 1.0


def test_ratio():
    made = export("ratio", WEIGHTS, budget=1200)
    assert made.files[0].text == '{\n  "dolly.jsonl": 0.25,\n  "gsm8k.jsonl": 0.75,\n  "code.jsonl": 0.0\n}\n'
    assert (made.files[0].name, made.files[0].comment) == ("ratio.json", None)


@pytest.mark.parametrize("name", ["a/b", "..\\a"])
def test_ratio_names_files_of_one_folder(name):
    with pytest.raises(ExportError) as caught:
        export("ratio", of([name, "c"]))
    assert str(caught.value) == (
        f"ratio: domain {name!r} would be the file {name + '.jsonl'!r}, which is in another folder; rename the domain, "
        "or use --format yaml"
    )


def test_domain_weights_of_a_budget_keep_what_holds_of_any_weights():
    # Four passes over gsm8k are 6,000 tokens; the rest is dolly.
    made = export("domain-weights", WEIGHTS, budget=9000)
    assert (made.files[0].name, made.files[0].comment) == ("domain_weights.json", None)
    written = json.loads(made.files[0].text)
    token, example = written["shares"]["token"], written["shares"]["example"]
    assert written == {
        **WEIGHTS.to_dict(),
        "domain_weights": token,
        "shares": {"token": token, "example": example},
        # These are of the weights that were learned.
        "intervals": {},
        "uncertainty": {},
        "verdict": {},
        "diagnoses": [
            "These shares were planned for 9,000 tokens from the weights that were learned.",
            "Learned is worse than natural.",
        ],
    }
    assert token == pytest.approx({"dolly": 1 / 3, "gsm8k": 2 / 3, "code": 0.0})
    # 300 and 1,200 examples.
    assert example == pytest.approx({"dolly": 0.2, "gsm8k": 0.8, "code": 0.0})


def test_domain_weights_without_a_budget_are_the_learned_ones():
    names = ["a", "b", "c"]
    read = parse_weights(export("domain-weights", of(names)).files[0].text).domain_weights
    assert read.to_dict() == {**of(names).to_dict(), "shares": read.to_dict()["shares"]}
    # So that it can be exported further, into any unit.
    assert export("csv", read, budget=100).files[0].text == export("csv", of(names), budget=100).files[0].text
    unknown = json.loads(export("domain-weights", UNKNOWN).files[0].text)
    assert (unknown["corpus"], list(unknown["shares"])) == ({}, ["token"])


def test_yaml():
    made = export("yaml", WEIGHTS, budget=1200)
    assert made.files[0].text == (
        "# Domain weights for scripts (flat YAML), written by doremi_mix.\n"
        "# Each number is a share of what is drawn.\n"
        "# Verdict of the comparison: Learned is worse than natural.\n"
        "# Budget: 1,200 tokens, planned for at most 4 passes over a domain.\n"
        "# Left out, because nothing of them is to be drawn: code.\n"
        f"# {ZEROS}\n"
        "# Expected shares of the tokens drawn:\n"
        "#   dolly  0.250000\n"
        "#   gsm8k  0.750000\n"
        "dolly: 0.25\ngsm8k: 0.75\ncode: 0.0\n"
    )
    assert made.files[0].name == "domain_weights.yaml"


def test_yaml_quotes_what_any_reader_takes_for_something_else():
    names = ["yes", "1e5", "0o7", "null", "2024-01-01", "a: b", "#c", "- d", "x" * 300, "\x85\ufeff"]
    text = export("yaml", of(names)).files[0].text
    assert list(yaml.safe_load(text)) == names
    body = [line for line in text.splitlines() if not line.startswith("#")]
    assert body[:7] == [
        '"yes": 0.4375',
        '"1e5": 0.0625',
        '"0o7": 0.0625',
        '"null": 0.0625',
        '"2024-01-01": 0.0625',
        '"a: b": 0.0625',
        '"#c": 0.0625',
    ]


@given(
    st.lists(any_name | hostile, min_size=2, max_size=12, unique=True),
    st.lists(st.one_of(st.just(0.0), st.just(1e-12), st.floats(1e-12, 1)), min_size=12, max_size=12),
    st.sampled_from([None, 100, 10_000]),
    st.booleans(),
)
def test_any_names_and_weights_are_read_back(names, raw, budget, known):
    raw = [1.0, *raw][: len(names)]
    shares = {name: weight / sum(raw) for name, weight in zip(names, raw, strict=True)}
    corpus = {name: DomainStatistics(100 + i, 10_000 * (i + 1)) for i, name in enumerate(names)} if known else {}
    weights = DomainWeights(shares, shares, corpus=corpus)
    plan = plan_for(FORMATS["csv"], weights, ExportOptions(budget=budget))
    for table in TABLES:
        try:
            made = export_plan(FORMATS[table], plan)
        except ExportError:
            assert table in ("ratio", "markdown")
            continue
        text = made.files[0].text
        read = READERS[table]({made.files[0].name: text}, {})
        assert set(read) == set(made.expected)
        total = sum(read.values())
        for name, share in made.expected.items():
            assert read[name] / total == pytest.approx(share, rel=1e-9)
        if table != "markdown":
            # By our own reader, each domain has a share again, zeros included.
            again = parse_weights(text).weights
            assert {name: again[name] for name in shares} == pytest.approx(
                {**dict.fromkeys(shares, 0.0), **made.expected}, rel=1e-9, abs=0
            )

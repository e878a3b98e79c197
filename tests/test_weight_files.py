"""Weights of other pipelines: every form is read as its program means it, or refused in one line that says why."""

import csv
import io
import json
import math
import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import DataError
from doremi_mix.exporters import FORMATS, export_plan
from doremi_mix.exporters.plan import make_plan
from doremi_mix.stages.weights import weights_from
from doremi_mix.types import DomainStatistics
from doremi_mix.weight_files import MAX_BYTES, match_domains, parse_weights, read_weights

GIVE = "give a domain_weights.json, or {domain: weight}"
UNSAID = "the file does not say in which unit; they are taken for shares of tokens"
SEQUENCES = "shares of fixed-length sequences, which are shares of tokens"
LAST_PART = "domains are called as the last part of their prefix"


AS_THEY_ARE = "not of tokens; they are taken as they are, unless a corpus converts them"


def not_read(caps):
    return f"its caps on single domains ({caps}) were not read; one max_epochs caps all"


def summed(total):
    return f"the weights sum to {total}, not to 1, and were divided by that"


OURS = DomainWeights(
    {"a": 0.25, "b": 0.75}, {"a": 0.5, "b": 0.5}, method="doremi", corpus=dict.fromkeys("ab", DomainStatistics(3, 30))
)


def test_ours():
    read = parse_weights(json.dumps(OURS.to_dict()))
    assert read.domain_weights == OURS
    assert (dict(read.weights), read.kind, read.notices) == (OURS.domain_weights, "doremi-mix domain weights", ())


READINGS = {
    "flat JSON": (
        '{"a": 0.25, "b": 0.75}',
        {"a": 0.25, "b": 0.75},
        [f"read as {{domain: weight}} in JSON: {UNSAID}"],
    ),
    "counts": (
        '{"a": 300, "b": 900, "c": 0}',
        {"a": 0.25, "b": 0.75, "c": 0},
        [f"read as {{domain: weight}} in JSON: {UNSAID}", summed(1200)],
    ),
    "a sum within the error of floats": (
        '{"a": 0.3333333333, "b": 0.6666666667}',
        {"a": 0.3333333333, "b": 0.6666666667},
        [f"read as {{domain: weight}} in JSON: {UNSAID}"],
    ),
    "a sum that was rounded": (
        '{"a": 0.3333, "b": 0.6666}',
        {"a": 0.3333 / 0.9999, "b": 0.6666 / 0.9999},
        [f"read as {{domain: weight}} in JSON: {UNSAID}", summed("0.9999")],
    ),
    "percent": (
        '{"a": "20%", "b": "80 %"}',
        {"a": 0.2, "b": 0.8},
        [f"read as {{domain: weight}} in JSON: {UNSAID}", summed("100 (percent)")],
    ),
    "percent without a sign": (
        "a: 99.5\nb: 0.5\n",
        {"a": 0.995, "b": 0.005},
        [f"read as {{domain: weight}} in YAML: {UNSAID}", summed("100 (percent)")],
    ),
    "more than a float can hold": (
        '{"a": 1e308, "b": 1e308}',
        {"a": 0.5, "b": 0.5},
        [f"read as {{domain: weight}} in JSON: {UNSAID}", summed("more than 1e300")],
    ),
    "a domain called format": (
        '{"format": 0.5, "data": 0.25, "mix": 0.25}',
        {"format": 0.5, "data": 0.25, "mix": 0.25},
        [f"read as {{domain: weight}} in JSON: {UNSAID}"],
    ),
    "a domain called format, in percent": (
        '{"format": "20%", "text": "80%"}',
        {"format": 0.2, "text": 0.8},
        [f"read as {{domain: weight}} in JSON: {UNSAID}", summed("100 (percent)")],
    ),
    "a node called format": (
        "format: {weight: 0.25}\ntext: {weight: 0.75}\n",
        {"format": 0.25, "text": 0.75},
        ["read as olmix mix: shares of tokens"],
    ),
    "ours, without a format": (
        '{"domain_weights": {"a": 0.25, "b": 0.75}}',
        {"a": 0.25, "b": 0.75},
        [f"read as domain_weights without a format: {UNSAID}"],
    ),
    "ours, without a format, with more": (
        '{"unit": "tokens", "domain_weights": {"a": 1, "b": 3}, "note": ""}',
        {"a": 0.25, "b": 0.75},
        [
            f"read as domain_weights without a format: {UNSAID}",
            "of its keys only 'domain_weights' was read, not 'unit', 'note'",
            summed(4),
        ],
    ),
    "YAML's words, as names": (
        "NO: 0.25\n1e5: 0.125\n2024-01-01: 0.125\n~: 0.25\n'x: y': 2.5e-1\n",
        {"NO": 0.25, "1e5": 0.125, "2024-01-01": 0.125, "~": 0.25, "x: y": 0.25},
        [f"read as {{domain: weight}} in YAML: {UNSAID}"],
    ),
    "YAML without the point that YAML 1.1 wants": (
        "a: 1e-1\nb: 9E-1\n",
        {"a": 0.1, "b": 0.9},
        [f"read as {{domain: weight}} in YAML: {UNSAID}"],
    ),
    "YAML that begins like JSON": (
        "{a: 0.5, b: 0.5}",
        {"a": 0.5, "b": 0.5},
        [f"read as {{domain: weight}} in YAML: {UNSAID}"],
    ),
    "YAML that inherits": (
        "<<: {a: 0.25, b: 1}\nb: 0.75\n",
        {"a": 0.25, "b": 0.75},
        [f"read as {{domain: weight}} in YAML: {UNSAID}"],
    ),
    "ratio.json": (
        '{"dolly.jsonl": 0.25, "code.v2.jsonl": 0.75}',
        {"dolly": 0.25, "code.v2": 0.75},
        ['read as ratio.json: shares of tokens, by file; domains are called as the files without ".jsonl"'],
    ),
    "official DoReMi": (
        '{"train_domain_weights": {"b": 3, "a": 1}, "eval_domain_weights": {"a": 3, "b": 1}}',
        {"b": 0.75, "a": 0.25},
        [
            f"read as official DoReMi: {SEQUENCES}",
            "its eval_domain_weights differ, and were not read",
            summed(4),
        ],
    ),
    "olmix, nested": (
        "name: x\ndata: {sources: []}\nmix:\n  dclm:\n    weight: 0.75\n    repetition_factor: 1.0\n    code:\n"
        "      weight: 0.5\n      high: {weight: 0.25}\n      low: 0.75\n    math: {weight: 0.5}\n"
        "  wiki: {weight: 0.25, repetition_factor: 1.5}\n",
        {"dclm:code:high": 0.09375, "dclm:code:low": 0.28125, "dclm:math": 0.375, "wiki": 0.25},
        ["read as olmix mix: shares of tokens", not_read("repetition_factor")],
    ),
    "olmix, flat and alone": (
        "dclm:code: {weight: 0.5}\nwiki: {weight: 0.5}\n",
        {"dclm:code": 0.5, "wiki": 0.5},
        ["read as olmix mix: shares of tokens"],
    ),
    "Levanter": (
        "trainer: {seed: 0}\ndata:\n  components: {a: {}, b: {}}\n  train_weights: {a: 0.25, b: 0.75}\n",
        {"a": 0.25, "b": 0.75},
        [f"read as train_weights of Levanter: {SEQUENCES}"],
    ),
    "Levanter, in stages": (
        "train_weights:\n- [0, {a: 0.5, c: 0.5}]\n- - 1000\n  - {a: 1, b: 3}\n",
        {"a": 0.25, "c": 0, "b": 0.75},
        [
            f"read as train_weights of Levanter: {SEQUENCES}",
            "the weights change during training: read were those of the last of 2 stages, from 1000",
            summed(4),
        ],
    ),
    "Megatron's arguments file": (
        "30 /d/a_text_document\n70\t/d/b.v1_content_document\n",
        {"a": 0.3, "b.v1_content_document": 0.7},
        [f"read as Megatron blend: {SEQUENCES}", LAST_PART, summed("100 (percent)")],
    ),
    "Megatron's arguments as one quoted string": (
        '"0.5 a_text_sentence 0.5 x/b/"',
        {"a": 0.5, "b": 0.5},
        [f"read as Megatron blend: {SEQUENCES}", LAST_PART],
    ),
    "a prefix that looks like YAML": (
        "0.5 /d/x: 0.5 /d/[y",
        {"x:": 0.5, "[y": 0.5},
        [f"read as Megatron blend: {SEQUENCES}", LAST_PART],
    ),
    "Megatron per split": (
        '{"train": ["0.25", "/d/a_text_document", "0.75", "/d/b"], "valid": ["1.0", "/d/v"], "test": null}',
        {"a": 0.25, "b": 0.75},
        [f"read as Megatron blend: {SEQUENCES}", LAST_PART, "only its training split was read, not 'valid'"],
    ),
    "Megatron per split, as text": (
        '{"train": "0.25 /d/a 0.75 /d/b", "valid": null, "test": null}',
        {"a": 0.25, "b": 0.75},
        [f"read as Megatron blend: {SEQUENCES}", LAST_PART],
    ),
    "NeMo's zipped list": (
        "- 30\n- /d/a_text_document\n- 10\n- /d/b_text_document\n",
        {"a": 0.75, "b": 0.25},
        [f"read as Megatron blend: {SEQUENCES}", LAST_PART, summed(40)],
    ),
    "NeMo's paths, per split": (
        "seed: 0\npaths: {train: [0.5, /d/a, 0.5, /d/b], validation: [1, /d/v]}\n",
        {"a": 0.5, "b": 0.5},
        [f"read as Megatron blend: {SEQUENCES}", LAST_PART, "only its training split was read, not 'validation'"],
    ),
    "OLMo-core": (
        "sources:\n- {source_name: a, target_ratio: 0.25, paths: [x]}\n- {source_name: b, target_ratio: 0.75}\n",
        {"a": 0.25, "b": 0.75},
        ["read as source mixture of OLMo-core: shares of tokens"],
    ),
    "OLMo-core, with caps": (
        "sources:\n- {source_name: a, target_ratio: 0.25, max_source_fraction: 0.5}\n"
        "- {source_name: b, target_ratio: 0.75, max_repetition_ratio: 4.0}\n",
        {"a": 0.25, "b": 0.75},
        [
            "read as source mixture of OLMo-core: shares of tokens",
            not_read("max_repetition_ratio, max_source_fraction"),
        ],
    ),
    "lingua": (
        "data: {root_dir: ., sources: {a: 80.0, b: 20.0}}\n",
        {"a": 0.8, "b": 0.2},
        [
            f"read as sources of lingua: shares of documents, {AS_THEY_ARE}",
            summed("100 (percent)"),
        ],
    ),
    "CSV": (
        'Domain,Tokens,Weight\r\n"a, ""b""", 10,0.25\r\n\r\nc,20, 7.5e-1\r\n',
        {'a, "b"': 0.25, "c": 0.75},
        [
            f"read as a table with the columns 'domain' and 'weight': {UNSAID}",
            "the column 'weight' was read, not 'tokens'",
        ],
    ),
    "tab-separated, with a comment": (
        "# from somewhere, weight of name\nsource\texamples\na\t10\nb\t30\n",
        {"a": 0.25, "b": 0.75},
        [
            f"read as a table with the columns 'source' and 'examples': numbers of examples, {AS_THEY_ARE}",
            summed(40),
        ],
    ),
    "semicolons": (
        "percent;dataset\n25%;a\n75%;b\n",
        {"a": 0.25, "b": 0.75},
        [f"read as a table with the columns 'dataset' and 'percent': {UNSAID}", summed("100 (percent)")],
    ),
    "JSON records": (
        '[{"name": "a", "probability": 0.25}, {"probability": 0.75, "name": "b"}]',
        {"a": 0.25, "b": 0.75},
        [f"read as a table with the columns 'name' and 'probability': {UNSAID}"],
    ),
    "two columns without names": (
        "a, 0.25\n\nb:c, 0.75\n",
        {"a": 0.25, "b:c": 0.75},
        [f"read as a table of two columns without names: {UNSAID}"],
    ),
    "two columns without names, numbers first": (
        "1\ta\n3\tb\n",
        {"a": 0.25, "b": 0.75},
        [f"read as Megatron blend: {SEQUENCES}", LAST_PART, summed(4)],
    ),
    "two columns without names, numbers first, commas": (
        "1,a\n3,b\n",
        {"a": 0.25, "b": 0.75},
        [f"read as a table of two columns without names: {UNSAID}", summed(4)],
    ),
    "two columns with spaces between": (
        "a  0.25\nb  0.75",
        {"a": 0.25, "b": 0.75},
        [f"read as a table of two columns without names: {UNSAID}"],
    ),
    "our own CSV": (
        '"name","weight","token_share","example_share","tokens","examples","epochs"\n'
        '"\'=1+1",0.5,0.25,0.1,1,,\n"\'\'q",0.5,0.75,0.9,3,,\n" x\n",,0.0,0.0,0,,\n',
        {"=1+1": 0.25, "'q": 0.75, " x\n": 0},
        [
            "read as a table with the columns 'name' and 'token_share': shares of tokens",
            "the column 'token_share' was read, not 'weight', 'tokens', 'example_share', 'examples'",
        ],
    ),
}


@pytest.mark.parametrize(("text", "weights", "notices"), READINGS.values(), ids=READINGS)
def test_every_form(text, weights, notices):
    read = parse_weights(text)
    assert list(read.weights.items()) == list(weights.items())
    assert list(read.notices) == notices
    assert notices[0].startswith(f"read as {read.kind}: ")
    assert read.domain_weights is None
    assert read.unit == ("examples" if AS_THEY_ARE in notices[0] else "tokens")
    assert math.fsum(read.weights.values()) == pytest.approx(1, abs=1e-9)


def test_shares_of_examples_become_shares_of_tokens_by_the_corpus():
    corpus = {"a": DomainStatistics(10, 300), "b": DomainStatistics(10, 100), "c": DomainStatistics(1, 1)}
    read = parse_weights("name,example_share\na,0.25\nb,0.75\n")
    assert read.to_domain_weights(corpus).domain_weights == {"a": 0.5, "b": 0.5}
    assert read.to_domain_weights().domain_weights == {"a": 0.25, "b": 0.75}
    # Shares of tokens stay.
    read = parse_weights('{"a": 1, "b": 3}')
    learned = read.to_domain_weights(corpus)
    assert (learned.domain_weights, learned.corpus) == ({"a": 0.25, "b": 0.75}, {n: corpus[n] for n in "ab"})
    assert (learned.reference_weights, learned.method) == ({"a": 0.5, "b": 0.5}, "{domain: weight} in JSON")
    ours = parse_weights(json.dumps(OURS.to_dict()))
    assert ours.to_domain_weights() == OURS
    assert ours.to_domain_weights(corpus).corpus == {n: corpus[n] for n in "ab"}
    with pytest.raises(DataError, match=r"^the corpus knows nothing of domain 'b'; give the corpus of these domains$"):
        read.to_domain_weights({"a": corpus["a"]})


NEITHER = "is no JSON, YAML, table of domains and weights, or Megatron blend"
TWO_WAYS = 'its two columns can be read in two ways; name them in a first line "name,weight"'
REFUSED = [
    ("", "is empty"),
    (" \n\t\n", "is empty"),
    ("{half", "is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
    ('{"a": 1}\n{"a": 2}', "is not JSON (Extra data: line 2 column 1 (char 9))"),
    ("{}", "no weight is above 0"),
    ('{"a": 0, "b": 0.0}', "no weight is above 0"),
    ("[]", "domain weights must be an object, got a list"),
    ("[1, 2]", "domain weights must be an object, got a list"),
    ("hello", NEITHER),
    ("42", NEITHER),
    ("# nothing\n", NEITHER),
    ("a: b: c", f"{NEITHER} (mapping values are not allowed here: line 1)"),
    ("a\0", f"{NEITHER} (unacceptable character #x0000: special characters are not allowed)"),
    ("? [a]\n: 1\n", f"{NEITHER} (a key must be text: line 1)"),
    (
        "a: !!python/object:os.system 1",
        f"{NEITHER} (could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object:os.system': line 1)",
    ),
    ("[" * 100_000, "is nested too deeply"),
    ("a: &a {weight: 1, b: *a}", "is nested too deeply"),
    ('{"a": 1, "b": 2, "a": 3}', "'a' is given twice, and must be given once"),
    ("a: 1\nb: 2\n'a': 3\n", "'a' is given twice, and must be given once"),
    ("name,weight\na,1\nb,1\na,1", "'a' is given twice, and must be given once"),
    ("a,1\na,2", "'a' is given twice, and must be given once"),
    ("mix: {a: {b: {weight: 1}}, 'a:b': {weight: 1}}", "'a:b' is given twice, and must be given once"),
    (
        "sources: [{source_name: a, target_ratio: 1}, {source_name: a, target_ratio: 1}]",
        "'a' is given twice, and must be given once",
    ),
    ('{"a": "1"}', "the weight of 'a' must be a number, got '1'"),
    ('{"a": true}', "the weight of 'a' must be a number, got True"),
    ('{"a": null}', "the weight of 'a' must be a number, got nothing"),
    ('{"a": {"b": 1}}', "the weight of 'a' must be a number, got an object"),
    ('{"a": [1, 2]}', "the weight of 'a' must be a number, got [1, 2]"),
    (json.dumps({"a": list(range(9))}), "the weight of 'a' must be a number, got a list of 9"),
    (json.dumps({"a": "x" * 99}), f"the weight of 'a' must be a number, got '{'x' * 56}..."),
    ("a: yes", "the weight of 'a' must be a number, got True"),
    ("a: 0,5\nb: 0,5", "the weight of 'a' must be a number, got '0,5'"),
    # YAML 1.1 reads 8, 31, 90 and 1000 here, other readers text or other numbers.
    ("a: 010", "the weight of 'a' must be a number, got '010'"),
    ("a: 0x1F", "the weight of 'a' must be a number, got '0x1F'"),
    ("a: 1:30", "the weight of 'a' must be a number, got '1:30'"),
    ("a: 1_000", "the weight of 'a' must be a number, got '1_000'"),
    ("a: '0.5'", "the weight of 'a' must be a number, got '0.5'"),
    ("a: 2024-01-01", "the weight of 'a' must be a number, got '2024-01-01'"),
    ("a: 2024-13-99", "the weight of 'a' must be a number, got '2024-13-99'"),
    ("name;weight\na;0,5", "the weight of 'a' must be a number, got '0,5'"),
    ("name,weight\na,", "the weight of 'a' must be a number, got ''"),
    ("name,weight\na,nan", "the weight of 'a' must be a number, got 'nan'"),
    ('{"a": 2, "b": -1}', "the weight of 'b' must be finite and at least 0, got -1"),
    ('{"a": NaN}', "the weight of 'a' must be finite and at least 0, got nan"),
    ('{"a": 1e999}', "the weight of 'a' must be finite and at least 0, got inf"),
    ("a: -.inf", "the weight of 'a' must be finite and at least 0, got -inf"),
    ("a: .NaN", "the weight of 'a' must be finite and at least 0, got nan"),
    ('{"a": 1' + "0" * 400 + "}", f"the weight of 'a' must be finite and at least 0, got 1{'0' * 56}..."),
    ("nan /d/a 1 /d/b", "the weight of 'a' must be finite and at least 0, got nan"),
    ("a,-10%\nb,110%", "the weight of 'a' must be finite and at least 0, got '-10%'"),
    ('{"a": "20%", "b": 0.8}', "some weights have a % sign, and some have none; give all in the same unit"),
    ("mix: {a: {weight: 50%, b: 1}}", "the weight of 'a' must be a share of what is above it, without a % sign"),
    ('{"": 1}', "a domain has an empty name"),
    ('{"\\ud800": 1}', "the name '\\ud800' has a character that no file can hold"),
    ("a;0,5\nb;0,5", TWO_WAYS),
    ("1,0.5\n2,0.5", TWO_WAYS),
    ("1\t0.5\n2\t0.5", 'numbers stand where names should; name the columns in a first line "name,weight"'),
    ("name,weight\na,1,2", "the row ['a', '1', '2'] has 3 cells, and the first line 2"),
    ('name,weight\na,"1', "is a broken CSV (unexpected end of data)"),
    ('[{"name": "a", "weight": 1}, {"name": "b"}]', "record 2 has the keys 'name', and the first one 'name', 'weight'"),
    ('[{"a": 1}]', "a record must have a name and a weight, got the keys 'a'"),
    ('[{"name": 1, "weight": 1}]', "the name of a domain must be text, got 1"),
    ("train_weights: [[0, {a: 1}], [0, {b: 1}]]", "the stages of train_weights must start at rising steps, got [0, 0]"),
    ("train_weights: []", "the stages of train_weights must start at rising steps, got []"),
    ("train_weights: [{a: 1}]", "a stage of train_weights must be [step, {domain: weight}], got an object"),
    (
        "train_weights: [[true, {a: 1}]]",
        "a stage of train_weights must be [step, {domain: weight}], got [True, {'a': 1}]",
    ),
    ('{"train": ["/d/a", "/d/b"]}', "\"train\" must be a blend, weight and prefix by turns, got ['/d/a', '/d/b']"),
    ('{"train": "0.5 /d/a 0.5"}', "\"train\" must be a blend, weight and prefix by turns, got '0.5 /d/a 0.5'"),
    (
        "0.5 /x/a_text_document 0.5 /y/a",
        "domains are called as the last part of their prefix, and 'a' ends two, '/x/a_text_document', '/y/a'",
    ),
    ('{"format": "theirs"}', '"format" must be "doremi-mix/domain-weights", got \'theirs\''),
    (
        json.dumps({**OURS.to_dict(), "domain_weights": {"a": 0.5, "b": 0.6}}),
        "domain weights must sum to 1, got 1.1",
    ),
]


@pytest.mark.parametrize(("text", "problem"), REFUSED, ids=[ascii(text[:40]) for text, _ in REFUSED])
def test_what_holds_no_weights(text, problem):
    with pytest.raises(DataError) as caught:
        parse_weights(text, "w.json")
    assert str(caught.value) == f"w.json: {problem}; {GIVE}"
    assert str(caught.value).isprintable()


def test_a_mix_that_unfolds_without_end(monkeypatch):
    """Nine lines of YAML whose aliases stand for a billion leaves."""
    lines = ["mix:", "  a0: &a0 {x: 1, y: 1}"]
    lines += [f"  a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 30)]
    monkeypatch.setattr("doremi_mix.weight_forms.MAX_DOMAINS", 1000)
    with pytest.raises(DataError, match=r"^weights: has more than 1,000 domains; give a domain_weights.json"):
        parse_weights("\n".join(lines))


def test_files(tmp_path):
    path = tmp_path / "w.json"
    path.write_bytes(b'\xef\xbb\xbf{"\xe6\xb0\xb4": 1}')  # the mark that spreadsheets write
    assert dict(read_weights(path).weights) == {"水": 1.0}
    for content, problem in {
        b"": f"is empty; {GIVE}",
        '{"中文": 1}'.encode("gbk"): (
            f"is not JSON ('utf-8' codec can't decode byte 0xd6 in position 2: invalid continuation byte); {GIVE}"
        ),
        b" " * (MAX_BYTES + 1): f"is longer than the 16 MB of a file of weights; {GIVE}",
        b"a: 1\n" * 300_000: f"is no JSON, and longer than the 1 MB that are read as YAML; {GIVE}",
        b"{" + b" " * (2 << 20): (
            f"is not JSON (Expecting property name enclosed in double quotes: line 1 column {(2 << 20) + 2} (char "
            f"{(2 << 20) + 1})); {GIVE}"
        ),
    }.items():
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_weights(path)
        assert str(caught.value) == f"{path}: {problem}"
    for place, problem in {tmp_path / "gone": "No such file or directory", tmp_path: "Is a directory"}.items():
        with pytest.raises(DataError) as caught:
            read_weights(place)
        assert str(caught.value) == f"{place}: cannot be read ({problem}); give a domain_weights.json"


def test_weights_for_the_domains_of_a_run(tmp_path):
    path = tmp_path / "w"
    path.write_text("2 /d/b_text_document 6 /d/a_text_document\n")
    said = []
    assert list(weights_from(path, ["a", "b"], said.append).items()) == [("a", 0.75), ("b", 0.25)]
    assert said == [
        f"  {path}: read as Megatron blend: {SEQUENCES}",
        f"  {path}: {LAST_PART}",
        f"  {path}: {summed(8)}",
    ]
    assert dict(weights_from(path, ["a", "b"])) == {"a": 0.75, "b": 0.25}
    for names, problem in {
        ("a", "b", "c"): "'c' has no weight; give one weight to each of ['a', 'b', 'c']",
        ("a",): "'b' is no domain of this run; give one weight to each of ['a']",
    }.items():
        said.clear()
        with pytest.raises(DataError) as caught:
            weights_from(path, names, said.append)
        assert (str(caught.value), said) == (f"{path}: {problem}", [])


def test_domains_that_are_called_like_files(tmp_path):
    weights = parse_weights('{"a.jsonl": 0.25, "b.jsonl": 0.75}').weights
    assert match_domains(weights, ["b", "a"], tmp_path) == {"b": 0.75, "a": 0.25}
    assert match_domains(weights, ["b.jsonl", "a.jsonl"], tmp_path) == {"b.jsonl": 0.75, "a.jsonl": 0.25}
    with pytest.raises(DataError, match=r"'c\.jsonl' has no weight"):
        match_domains(weights, ["a.jsonl", "b.jsonl", "c.jsonl"], tmp_path)


# --------------------------------------------------------------------------------------------------- any weights at all

any_name = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)
printable = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8)
number = st.one_of(st.just(0.0), st.floats(1e-12, 1e12), st.integers(1, 10**20))


def mixtures(name):
    return st.dictionaries(name, number, min_size=1, max_size=20).filter(lambda weights: any(weights.values()))


def assert_same(read, weights):
    total = sum(weights.values())
    assert list(read.weights) == list(weights)
    assert math.fsum(read.weights.values()) == pytest.approx(1, abs=1e-9)
    for name, weight in weights.items():
        assert read.weights[name] == pytest.approx(weight / total, rel=1e-9, abs=0)


@given(mixtures(any_name).filter(lambda weights: not all(name.endswith(".jsonl") for name in weights)))
def test_any_flat_json(weights):
    assert_same(parse_weights(json.dumps(weights)), weights)
    assert_same(parse_weights(json.dumps(weights, ensure_ascii=False, indent=1)), weights)


@given(mixtures(any_name).filter(lambda weights: not all(name.endswith(".jsonl") for name in weights)))
def test_any_flat_yaml(weights):
    # PyYAML does not read back every character that it writes.
    kept = {name: weight for name, weight in weights.items() if name in yaml.safe_load(yaml.safe_dump({name: 0}))}
    if any(kept.values()):
        assert_same(parse_weights(yaml.safe_dump(kept, sort_keys=False)), kept)


@given(mixtures(any_name))
def test_any_official_file_and_any_levanter_config(weights):
    assert_same(parse_weights(json.dumps({"train_domain_weights": weights, "eval_domain_weights": weights})), weights)
    assert_same(parse_weights(json.dumps({"data": {"train_weights": weights}})), weights)
    assert_same(parse_weights(json.dumps({"data": {"train_weights": [[0, {}], [5, weights]]}})), weights)


@given(mixtures(any_name))
def test_any_ratio_json(weights):
    assert_same(parse_weights(json.dumps({f"{name}.jsonl": weight for name, weight in weights.items()})), weights)


@given(mixtures(printable), st.sampled_from([",", ";", "\t"]), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_any_csv(weights, delimiter, first, end):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end)
    for name, weight in {"name": "weight", **weights}.items() if "name" not in weights else ():
        writer.writerow([weight, name] if first else [name, weight])
    if out.getvalue():
        assert_same(parse_weights(out.getvalue()), weights)


@given(mixtures(st.text(string.ascii_letters + ".:-=中", min_size=1, max_size=8).filter(lambda n: n.strip("."))))
def test_any_blend(weights):
    items = [str(item) for name, weight in weights.items() for item in (weight, f"/data/{name}_text_document")]
    read = parse_weights(" ".join(items))
    assert read.kind == "Megatron blend"
    assert_same(read, weights)
    assert_same(parse_weights(json.dumps({"train": items, "valid": None, "test": None})), weights)


@settings(max_examples=300)
@given(
    st.one_of(
        st.text(max_size=40),
        st.text("{}[]\":,a1.e-\n %'&*#\t", max_size=40),
        st.lists(st.sampled_from(["name", "weight", "a", "0.5", "1e-3", ",", "\n", "\t", ": ", "%", '"', "- "])).map(
            "".join
        ),
    )
)
def test_any_text_is_read_or_refused_in_one_line(text):
    problem = ""
    try:
        read = parse_weights(text)
    except DataError as error:
        problem = str(error)
    if problem:
        assert problem.isprintable()
        assert problem.endswith(f"; {GIVE}")
    else:
        assert math.fsum(read.weights.values()) == pytest.approx(1, abs=1e-9)
        assert min(read.weights.values()) >= 0
        assert all(notice.isprintable() for notice in read.notices)


@pytest.mark.parametrize(
    "name",
    [
        *("csv", "ratio", "domain-weights", "yaml", "doremi", "levanter", "marin"),
        *("megatron", "megatron-per-split", "nemo", "olmo-core"),
    ],
)
def test_what_we_export_as_shares_of_tokens_is_read_again(name):
    corpus = {"code": DomainStatistics(100, 1000, 10), "中文": DomainStatistics(30, 900, 10)}
    # Levanter draws whole sequences of each block, and its weights are nudged to that.
    tiny, error = (1 / 256, 1e-3) if name in ("levanter", "marin") else (1e-12, 1e-9)
    weights = DomainWeights({"code": 1 - tiny, "中文": tiny}, {"code": 0.5, "中文": 0.5}, corpus=corpus)
    suffix = ".jsonl" if name in ("levanter", "marin") else "_text_document"
    plan = make_plan(weights, paths={domain: f"/tok/{domain}{suffix}" for domain in corpus})
    read = parse_weights(export_plan(FORMATS[name], plan).files[0].text)
    assert dict(read.weights) == pytest.approx(plan.token_shares(), rel=error, abs=0)
    # Nobody must be told that the sum is not 1 where it is.
    assert not [notice for notice in read.notices if "sum" in notice]

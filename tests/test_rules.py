"""The table of rules: what each rejects, at its very bounds, and what it says."""

import math
import string

import numpy as np
import pytest

from doremi_mix.errors import ConfigError
from doremi_mix.filters.rules import RULES, describe, failed, rule_named
from doremi_mix.filters.text_scores import TEXT_SCORES

NAMES = [
    "broken_turns", "placeholder_answer", "refusal_answer", "answer_equals_instruction", "text_length", "output_length",
    "instruction_length", "token_num", "words_num", "alphanumeric", "special_characters", "character_repetition",
    "word_repetition", "average_line_length", "maximum_line_length", "urls", "html", "arithmetic", "languages",
    "language_id_score", "flagged_words", "stopwords", "perplexity", "answer_perplexity",
    "instruction_following_difficulty",
]  # fmt: skip

# The defaults of py-data-juicer 1.6.1; a bound that every value meets is None here.
DATA_JUICER = {
    "text_length_filter": (10, None),
    "token_num_filter": (10, None),
    "words_num_filter": (10, None),
    "alphanumeric_filter": (0.25, None),
    "special_characters_filter": (None, 0.25),
    "character_repetition_filter": (None, 0.5),
    "word_repetition_filter": (None, 0.5),
    "average_line_length_filter": (10, None),
    "maximum_line_length_filter": (10, None),
    "language_id_score_filter": (0.8, None),
    "flagged_words_filter": (None, 0.045),
    "stopwords_filter": (0.3, None),
    "perplexity_filter": (None, 1500),
    "instruction_following_difficulty_filter": (None, None),
}
ELSEWHERE = {"num_token", "lang", "lang_score", "flagged_words_ratio", "stopwords_ratio", "perplexity"}
ELSEWHERE |= {"answer_perplexity", "ifd"}


def test_the_order_is_the_order_of_application():
    assert [rule.name for rule in RULES] == NAMES


def test_defaults_are_those_of_data_juicer():
    got = {rule.op: (rule.min, rule.max) for rule in RULES if rule.op and rule.kind == "range"}
    assert got == DATA_JUICER
    assert all((rule.min, rule.max) == (None, None) for rule in RULES if not rule.op)


def test_every_column_exists_and_every_detail_can_be_filled_in():
    assert {rule.column for rule in RULES} - ELSEWHERE <= set(TEXT_SCORES)
    for rule in RULES:
        fields = {field for _, field, _, _ in string.Formatter().parse(rule.detail) if field is not None}
        assert fields == (set() if rule.kind == "flag" else {"value"}), rule.name


def test_rule_named():
    assert [rule_named(name) for name in NAMES] == list(RULES)
    with pytest.raises(ConfigError) as error:
        rule_named("character_repetitions")
    assert str(error.value) == "unknown rule 'character_repetitions'; did you mean 'character_repetition'?"


def test_a_range_includes_both_ends():
    values = np.array([9, 10, 11, 12], dtype=np.int32)
    rule = rule_named("text_length")
    assert failed(rule, values, low=10, high=11).tolist() == [True, False, False, True]
    assert failed(rule, values, low=10).tolist() == [True, False, False, False]
    assert failed(rule, values, high=10.5).tolist() == [False, False, True, True]
    assert failed(rule, values, high=2**63 - 1).tolist() == [False] * 4
    assert failed(rule, values).tolist() == [False] * 4


@pytest.mark.parametrize("bound", [0.1, 0.2, 0.25, 0.3, 0.6, 0.7, 0.9])
def test_a_ratio_equal_to_its_bound_passes_in_float32_too(bound):
    rule = rule_named("alphanumeric")
    values = np.array([bound, np.nextafter(np.float32(bound), 0), np.nextafter(np.float32(bound), 1)], np.float32)
    assert failed(rule, values, low=bound).tolist() == [False, True, False]
    assert failed(rule, values, high=bound).tolist() == [False, False, True]


def test_what_could_not_be_computed_is_kept():
    values = np.array([math.nan, 5.0, 2000.0])
    assert failed(rule_named("perplexity"), values, low=20, high=1000).tolist() == [False, True, True]


def test_flags_reject_what_is_true():
    rule = rule_named("refusal_answer")
    assert failed(rule, np.array([True, False])).tolist() == [True, False]
    assert failed(rule, np.array([1, 0], dtype=np.uint8)).tolist() == [True, False]


def test_languages():
    values = np.array(["zh", "en", "fr", ""], dtype=object)
    rule = rule_named("languages")
    assert failed(rule, values, allowed=("zh", "en")).tolist() == [False, False, True, True]
    assert failed(rule, values, allowed={"fr"}).tolist() == [True, True, False, True]
    assert failed(rule, values).tolist() == [False] * 4


def test_a_rule_may_apply_to_some_rows_only():
    values = np.array([1, 1, 50])
    applies = np.array([True, False, True])
    assert failed(rule_named("text_length"), values, low=10, applies=applies).tolist() == [True, False, False]
    flags = np.array([True, True, False])
    assert failed(rule_named("arithmetic"), flags, applies=applies).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("name", "value", "bounds", "sentence"),
    [
        ("text_length", 2417, {"low": 20, "high": 2000}, "2,417 characters, expected 20 to 2,000"),
        ("text_length", np.int32(3), {"low": 10}, "3 characters, expected at least 10"),
        ("output_length", 1234567, {"high": 1000000}, "1,234,567 characters in the answer, expected at most 1,000,000"),
        (
            "special_characters",
            np.float32(0.26041666),
            {"high": 0.25},
            "a share of special characters of 0.2604, expected at most 0.25",
        ),
        ("perplexity", 1501.26, {"low": 20, "high": 1500}, "a perplexity of 1,501, expected 20 to 1,500"),
        ("languages", "fr", {"allowed": ("zh", "en")}, "the language is fr, expected zh or en"),
        ("languages", "", {"allowed": ("zh",)}, "the language is unknown, expected zh"),
        ("refusal_answer", True, {}, "the answer begins as a refusal or with a disclaimer of a model"),
    ],
)
def test_sentences(name, value, bounds, sentence):
    assert describe(rule_named(name), value, **bounds) == sentence

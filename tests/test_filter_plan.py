"""Presets and the settings on top of them, against what they must come to."""

import pytest

from doremi_mix.errors import ConfigError
from doremi_mix.filters.plan import FilterPlan, RuleSetting, override_rules
from doremi_mix.filters.presets import PRESETS

BASE = (
    RuleSetting("text_length", min=30, applies="other", source="paper"),
    RuleSetting("text_length", min=10, applies="zh", source="paper"),
    RuleSetting("perplexity", min_quantile=0.25, max_quantile=0.75, source="paper"),
)


def test_nothing_on_top_changes_nothing():
    assert override_rules(BASE, {}) == BASE


def test_an_override_keeps_what_it_does_not_name():
    rules = override_rules(BASE, {"text_length": {"max": 99.0}})
    assert [(rule.min, rule.max, rule.applies) for rule in rules[:2]] == [(30, 99, "other"), (10, 99, "zh")]
    assert {rule.source for rule in rules[:2]} == {"settings"}
    assert rules[2] == BASE[2]


def test_null_drops_a_rule():
    assert override_rules(BASE, {"text_length": None}) == BASE[2:]


def test_a_threshold_takes_the_place_of_a_quantile_and_the_other_way_round():
    (rule,) = override_rules(BASE[2:], {"perplexity": {"min": 20.0}})
    assert (rule.min, rule.min_quantile, rule.max, rule.max_quantile) == (20, None, None, 0.75)
    (rule,) = override_rules((RuleSetting("perplexity", min=20, max=1000),), {"perplexity": {"max_quantile": 0.9}})
    assert (rule.min, rule.min_quantile, rule.max, rule.max_quantile) == (20, None, None, 0.9)


def test_a_new_rule_has_its_defaults_unless_thresholds_are_given():
    (plain,) = override_rules((), {"character_repetition": {}})
    assert (plain.min, plain.max, plain.source) == (None, 0.5, "rule's default")
    (given,) = override_rules((), {"character_repetition": {"min": 0.1}})
    assert (given.min, given.max) == (0.1, None)
    (grams,) = override_rules((), {"character_repetition": {"parameter": 5}})
    assert (grams.column, grams.max) == ("char_rep_ratio@5", 0.5)


def test_rules_stand_in_the_order_of_the_table_whatever_the_settings_say():
    rules = override_rules(BASE, {"language_id_score": {}, "alphanumeric": {}})
    assert [rule.rule for rule in rules] == [
        "text_length", "text_length", "alphanumeric", "language_id_score", "perplexity",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (RuleSetting("text_length", min=9, max=3), "filter.rules.text_length: min 9 is larger than max 3"),
        (RuleSetting("text_length", min=9, min_quantile=0.1), "give min or min_quantile, got both"),
        (RuleSetting("text_length"), "needs min, max or a quantile; set it to null to switch it off"),
        (RuleSetting("languages"), "allowed is empty; list what is kept"),
        (RuleSetting("text_length", min=9, allowed=("en",)), r"takes no allowed, got \['en'\]"),
        (RuleSetting("broken_turns", min=1), "takes no min and max"),
    ],
)
def test_thresholds_that_cannot_work(rule, message):
    with pytest.raises(ConfigError, match=message):
        FilterPlan(rules=(rule,))


def test_the_presets_hold_the_published_numbers():
    ke = {rule.rule: (rule.min, rule.max) for rule in PRESETS["ke_data_juicer"].rules}
    assert ke == {
        "text_length": (20, 2000),
        "language_id_score": (0.2, None),
        "perplexity": (20, 1000),
        "instruction_following_difficulty": (0.2, 0.9),
    }
    assert PRESETS["ke_data_juicer"].diversity.num_examples == 60_000
    second = {rule.rule: rule for rule in PRESETS["second_place"].rules}
    assert (second["token_num"].min, second["token_num"].max) == (10, 500)
    assert (second["perplexity"].min_quantile, second["perplexity"].max_quantile) == (0.25, 0.75)
    assert second["language_id_score"].min == 0.9
    refine = [(rule.rule, rule.applies, rule.min, rule.max) for rule in PRESETS["data_juicer_refine"].rules]
    assert ("flagged_words", "all", None, 0.017) in refine
    assert ("maximum_line_length", "other", 20, None) in refine
    assert PRESETS["none"].is_empty
    assert all(rule.source for plan in PRESETS.values() for rule in plan.rules)


def test_only_rules_over_models_are_model_rules():
    plan = PRESETS["ke_data_juicer"]
    assert [rule.rule for rule in plan.model_rules] == ["perplexity", "instruction_following_difficulty"]
    assert set(plan.text_rules) | set(plan.model_rules) == set(plan.rules)
    assert not plan.is_empty


def test_null_lifts_a_single_threshold():
    (rule,) = override_rules((RuleSetting("text_length", min=20, max=2000),), {"text_length": {"max": None}})
    assert (rule.min, rule.max) == (20, None)


def test_a_script_is_named_to_change_its_thresholds_alone():
    rules = override_rules(BASE[:2], {"text_length": {"min": 5.0, "applies": "zh"}})
    assert [(rule.min, rule.applies) for rule in rules] == [(30, "other"), (5, "zh")]
    (rule,) = override_rules(BASE[:2], {"text_length": {"min": 5.0, "applies": "all"}})
    assert (rule.min, rule.applies) == (5, "all")


def test_a_parameter_is_for_repetition_only():
    with pytest.raises(ConfigError, match=r"filter\.rules\.text_length: takes no parameter; only character_repetition"):
        FilterPlan(rules=(RuleSetting("text_length", min=3, parameter=7),))

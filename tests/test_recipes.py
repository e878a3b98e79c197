"""Recipes of Data-Juicer: what each of its operators becomes, and what is said of those that become nothing."""

import pytest

from doremi_mix.errors import ConfigError
from doremi_mix.filters import recipes
from doremi_mix.filters.plan import FilterPlan, ForeignOp, NearDuplicateSettings
from doremi_mix.filters.recipe_ops import NOTES, RECIPE_OPS
from doremi_mix.filters.recipes import plan_from_recipe
from doremi_mix.filters.rules import RULES, rule_named

REFUSAL = "; take the op out, or run Data-Juicer on the files and give what it exports as sources"
MISSING = (
    "runs through Data-Juicer, which is not installed; run: pip install 'doremi-mix[data-juicer]', or take the op out"
)
WORDS = (
    "; its words stand between white space, and here each Chinese, Japanese or Korean letter is a word and punctuation "
    "ends one"
)


@pytest.fixture(autouse=True)
def without_data_juicer(monkeypatch):
    monkeypatch.setattr(recipes, "data_juicer_installed", lambda: False)


def plan_of(*process, **top_level):
    return plan_from_recipe({"process": list(process), **top_level}, where="recipe.yaml")


def thresholds(plan):
    return [
        (setting.rule, setting.min, setting.max, setting.parameter)
        if not setting.allowed
        else (setting.rule, setting.allowed)
        for setting in plan.rules
    ]


def refusal(*process, **top_level):
    with pytest.raises(ConfigError) as caught:
        plan_of(*process, **top_level)
    assert str(caught.value).startswith("recipe.yaml: ")
    return str(caught.value).removeprefix("recipe.yaml: ")


# --- rules ---


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("alphanumeric_filter", ("alphanumeric", 0.25, None, None)),
        ("average_line_length_filter", ("average_line_length", 10, None, None)),
        ("character_repetition_filter", ("character_repetition", 0.0, 0.5, None)),
        ("flagged_words_filter", ("flagged_words", 0.0, 0.045, None)),
        ("instruction_following_difficulty_filter", ("instruction_following_difficulty", 1.0, 100.0, None)),
        ("language_id_score_filter", ("language_id_score", 0.8, None, None)),
        ("llm_perplexity_filter", ("perplexity", 1.0, 100.0, None)),
        ("maximum_line_length_filter", ("maximum_line_length", 10, None, None)),
        ("perplexity_filter", ("perplexity", 0, 1500, None)),
        ("special_characters_filter", ("special_characters", 0.0, 0.25, None)),
        ("stopwords_filter", ("stopwords", 0.3, 1.0, None)),
        ("text_length_filter", ("text_length", 10, None, None)),
        ("token_num_filter", ("token_num", 10, None, None)),
        ("word_repetition_filter", ("word_repetition", 0.0, 0.5, None)),
        ("words_num_filter", ("words_num", 10, None, None)),
    ],
)
@pytest.mark.parametrize("written", ["name", "no arguments", "empty arguments"])
def test_an_operator_without_arguments_has_the_defaults_of_data_juicer(op, expected, written):
    plan = plan_of({"name": op, "no arguments": {op: None}, "empty arguments": {op: {}}}[written])
    assert thresholds(plan) == [expected]
    assert [setting.source for setting in plan.rules] == [f"recipe.yaml: {op}"]


def test_arguments_go_to_thresholds():
    plan = plan_of(
        {"character_repetition_filter": {"rep_len": 5, "max_ratio": 0.6}},
        {"word_repetition_filter": {"rep_len": 10, "min_ratio": 0.1, "lang": "zh"}},
        {"text_length_filter": {"max_len": 2000}},
        {"maximum_line_length_filter": {"min_len": 20, "max_len": 9223372036854775807}},
        {"alphanumeric_filter": {"tokenization": False, "min_ratio": 0.1, "max_ratio": None}},
        {"perplexity_filter": {"lang": "en", "min_ppl": 20, "max_ppl": 1000}},
    )
    assert thresholds(plan) == [
        ("text_length", 10, 2000, None),
        ("alphanumeric", 0.1, None, None),
        ("character_repetition", 0.0, 0.6, 5),
        ("word_repetition", 0.1, 0.5, None),
        ("maximum_line_length", 20, None, None),
        ("perplexity", 20, 1000, None),
    ]
    assert plan.rules[2].column == "char_rep_ratio@5"
    # Ours come in the order of our table.
    order = [rule.name for rule in RULES]
    assert [setting.rule for setting in plan.rules] == sorted((s.rule for s in plan.rules), key=order.index)


def test_the_same_operator_twice_stays_twice():
    plan = plan_of({"text_length_filter": {"min_len": 20}}, "words_num_filter", {"text_length_filter": {"max_len": 99}})
    assert thresholds(plan) == [
        ("text_length", 20, None, None),
        ("text_length", 10, 99, None),
        ("words_num", 10, None, None),
    ]


@pytest.mark.parametrize(
    ("lang", "expected"),
    [
        ("", []),
        (None, []),
        ([], []),
        ("en", [("languages", ("en",))]),
        (["zh", "en"], [("languages", ("zh", "en"))]),
    ],
)
def test_languages_of_the_language_filter_become_a_rule_of_their_own(lang, expected):
    plan = plan_of({"language_id_score_filter": {"lang": lang, "min_score": 0.5}})
    assert thresholds(plan) == [*expected, ("language_id_score", 0.5, None, None)]


@pytest.mark.parametrize(
    ("op", "templates", "rule"),
    [
        ("llm_perplexity_filter", {"query_template": "{instruction}\n", "response_template": "{output}"}, "answer_"),
        ("llm_perplexity_filter", {"query_template": "{query}", "response_template": "{response}"}, "answer_"),
        ("llm_perplexity_filter", {"query_template": "", "response_template": "{text}"}, ""),
    ],
)
def test_templates_decide_which_perplexity_it_is(op, templates, rule):
    plan = plan_of({op: {"hf_model": "some/model", "max_score": 50, **templates}})
    assert thresholds(plan) == [(f"{rule}perplexity", 1.0, 50, None)]
    assert plan.notes == ("llm_perplexity_filter scores with some/model; here filter.models do",)


def test_length_of_a_column_is_the_rule_of_that_column():
    plan = plan_of(
        {"text_length_filter": {"text_key": "output", "min_len": 2}},
        {"text_length_filter": {"text_key": "instruction"}},
        {"text_length_filter": {"text_key": "text", "max_len": 5, "min_len": 1}},
    )
    assert thresholds(plan) == [
        ("text_length", 1, 5, None),
        ("output_length", 2, None, None),
        ("instruction_length", 10, None, None),
    ]


def test_how_an_operator_runs_does_not_matter():
    arguments = {"num_proc": 4, "batch_size": 100, "turbo": True, "reversed_range": False, "min_closed_interval": True}
    assert plan_of({"text_length_filter": arguments}) == plan_of("text_length_filter")


def test_keys_that_do_not_concern_rows_are_passed_over():
    top_level = {"project_name": "p", "dataset_path": "x.jsonl", "np": 4, "export_path": "y", "text_keys": ["text"]}
    assert plan_of("text_length_filter", **top_level) == plan_of("text_length_filter")


def test_another_text_key_for_all_is_noted_and_means_the_text():
    plan = plan_of({"text_length_filter": {"text_key": "content"}}, text_keys=["content", "other"])
    assert thresholds(plan) == [("text_length", 10, None, None)]
    assert plan.notes == (
        'text_keys is "content"; here operators look at the text of an example: instruction, input and output',
    )


def test_what_differs_is_noted_once():
    plan = plan_of("flagged_words_filter", "flagged_words_filter", "words_num_filter", "token_num_filter")
    assert plan.notes == (
        f"flagged_words_filter brings lists of words; here filter.flagged_words names yours{WORDS}",
        f"words_num_filter counts words{WORDS}",
        "token_num_filter counts the tokens of EleutherAI/pythia-6.9b-deduped; here those of tokenize.tokenizer are "
        "counted",
    )
    assert plan_of("text_length_filter", "special_characters_filter").notes == ()


# --- duplicates ---


@pytest.mark.parametrize(
    ("arguments", "normalization", "note"),
    [
        ({}, "text", None),
        ({"lowercase": True, "ignore_non_character": True}, "characters", None),
        (
            {"lowercase": True},
            "spaces",
            "folds case alone; here the width of characters and white space are folded too",
        ),
        ({"ignore_non_character": True}, "characters", "tells upper from lower case; here both count as the same"),
    ],
)
@pytest.mark.parametrize("op", ["document_deduplicator", "ray_document_deduplicator"])
def test_exact_deduplication(op, arguments, normalization, note):
    plan = plan_of({op: arguments})
    assert plan == FilterPlan(exact_duplicates=normalization, notes=(f"{op} {note}",) if note else ())


def test_of_two_exact_deduplications_the_one_that_finds_more_stands():
    thorough = {"document_deduplicator": {"lowercase": True, "ignore_non_character": True}}
    for process in ([thorough, "document_deduplicator"], ["document_deduplicator", thorough]):
        assert plan_of(*process).exact_duplicates == "characters"


def test_near_deduplication_by_characters_is_ours():
    arguments = {
        "tokenization": "character",
        "window_size": 7,
        "jaccard_threshold": 0.8,
        "num_permutations": 64,
    }
    plan = plan_of({"document_minhash_deduplicator": arguments})
    assert plan == FilterPlan(near_duplicates=NearDuplicateSettings(0.8, 7, 64))


def test_near_deduplication_otherwise_is_noted():
    op = "document_minhash_deduplicator"
    plan = plan_of({op: {"lowercase": False, "ignore_pattern": r"\p{P}", "num_bands": 8, "num_rows_per_band": 4}})
    assert plan.near_duplicates == NearDuplicateSettings(0.7, 5, 256)
    assert plan.notes == (
        f"{op} compares runs of 5 words; here it is runs of 5 characters, of which similar texts share more",
        f"{op} tells upper from lower case; here both count as the same",
        f"{op} leaves out what its ignore_pattern matches; here all characters are compared",
        f"{op} sets its bands; here they follow from similarity and num_permutations",
    )


def test_simhash_becomes_minhash_and_gives_way_to_one():
    simhash = {"document_simhash_deduplicator": {"tokenization": "character", "window_size": 6}}
    minhash = {"document_minhash_deduplicator": {"tokenization": "character", "jaccard_threshold": 0.9}}
    note = "document_simhash_deduplicator compares by SimHash; here MinHash stands in for it"
    assert plan_of(simhash) == FilterPlan(near_duplicates=NearDuplicateSettings(0.7, 6, 128), notes=(note,))
    for process in ([simhash, minhash], [minhash, simhash]):
        assert plan_of(*process) == FilterPlan(near_duplicates=NearDuplicateSettings(0.9, 5, 256), notes=(note,))


def test_two_near_deduplications_are_one_or_none():
    def by_characters(window_size, **arguments):
        arguments |= {"tokenization": "character", "window_size": window_size}
        return {"document_minhash_deduplicator": arguments}

    plan = plan_of(by_characters(5, jaccard_threshold=0.9, num_permutations=512), by_characters(5))
    assert plan.near_duplicates == NearDuplicateSettings(0.7, 5, 512)
    assert refusal(by_characters(5), by_characters(6)) == (
        "document_minhash_deduplicator and document_minhash_deduplicator compare runs of 5 and of 6 characters, and "
        "near duplicates are found once; keep one of them"
    )


def test_an_order_that_may_keep_other_rows_is_noted():
    minhash = {"document_minhash_deduplicator": {"tokenization": "character"}}
    assert plan_of("document_deduplicator", "text_length_filter", minhash).notes == ()
    assert plan_of("text_length_filter", "document_deduplicator").notes == (
        "document_deduplicator comes after a filter in the recipe and first here: where copies that count as equal get "
        "different verdicts, fewer rows may be kept here",
    )
    assert plan_of(minhash, "text_length_filter").notes == (
        "document_minhash_deduplicator comes before a filter in the recipe and last here: a near duplicate of a row "
        "that the filter rejects may be kept here",
    )


# --- through Data-Juicer ---

FOREIGN = sorted(name for name, op in RECIPE_OPS.items() if op.becomes == "foreign")


@pytest.mark.parametrize("op", FOREIGN)
def test_filters_without_a_counterpart_need_data_juicer(op, monkeypatch):
    assert refusal({op: {"x": 1}}) == f"{op} has no counterpart here and {MISSING}"
    monkeypatch.setattr(recipes, "data_juicer_installed", lambda: True)
    assert plan_of({op: {"x": 1}}) == FilterPlan(foreign=(ForeignOp(op, {"x": 1}),))


@pytest.mark.parametrize(
    ("op", "arguments", "shown"),
    [
        ("alphanumeric_filter", {"tokenization": True, "min_ratio": 0.1}, "tokenization: true"),
        ("words_num_filter", {"tokenization": True}, "tokenization: true"),
        ("stopwords_filter", {"use_words_aug": True, "lang": "zh"}, "use_words_aug: true"),
        ("text_length_filter", {"text_key": "title"}, "text_key: title"),
        ("alphanumeric_filter", {"text_key": "output"}, "text_key: output"),
        ("text_length_filter", {"reversed_range": True, "max_len": 5}, "reversed_range: true"),
        ("text_length_filter", {"min_closed_interval": False}, "min_closed_interval: false"),
        ("language_id_score_filter", {"max_closed_interval": False}, "max_closed_interval: false"),
        (
            "llm_perplexity_filter",
            {"query_template": "Q", "response_template": "{x}"},
            "query_template: Q, response_template: {x}",
        ),
        (
            "instruction_following_difficulty_filter",
            {"response_template": "{output}"},
            "response_template: {output}",
        ),
    ],
)
def test_arguments_that_change_the_meaning_make_it_foreign(op, arguments, shown, monkeypatch):
    assert refusal({op: arguments}) == f"{op} with {shown} has no counterpart here and {MISSING}"
    monkeypatch.setattr(recipes, "data_juicer_installed", lambda: True)
    assert plan_of({op: arguments}) == FilterPlan(foreign=(ForeignOp(op, arguments),))


# --- what is refused ---


@pytest.mark.parametrize(
    ("op", "why"),
    [
        ("clean_links_mapper", "changes texts, and a filter here only keeps or drops rows"),
        ("video_captioning_from_audio_mapper", "changes texts, and a filter here only keeps or drops rows"),
        ("document_line_deduplicator", "changes texts, and a filter here only keeps or drops rows"),
        ("general_fused_op", "changes texts, and a filter here only keeps or drops rows"),
        ("random_selector", "chooses among all rows, for which there is filter.num_examples here"),
        ("naive_grouper", "makes one row of several, and a filter here only keeps or drops rows"),
        ("nested_aggregator", "makes one row of several, and a filter here only keeps or drops rows"),
        ("ray_repartition_pipeline", "runs an engine of its own"),
        ("image_shape_filter", "looks at images, sound or video, and examples here are text"),
        ("ray_video_deduplicator", "looks at images, sound or video, and examples here are text"),
    ],
)
def test_what_cannot_run_here_is_refused_by_name(op, why, monkeypatch):
    monkeypatch.setattr(recipes, "data_juicer_installed", lambda: True)
    assert refusal("text_length_filter", {op: {"anything": 1}}) == f"{op} {why}{REFUSAL}"


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (["text_lenght_filter"], "there is no op text_lenght_filter; did you mean text_length_filter?"),
        (["zzz"], "there is no op zzz"),
        (
            [{"alphanumeric_filter": {"min_ration": 0.1}}],
            "alphanumeric_filter has no argument min_ration; did you mean min_ratio?",
        ),
        ([{"text_length_filter": {"min_len": "20"}}], "min_len of text_length_filter must be a number, got '20'"),
        ([{"text_length_filter": {"min_len": True}}], "min_len of text_length_filter must be a number, got True"),
        (
            [{"text_length_filter": {"min_len": 30, "max_len": 20}}],
            "text_length_filter keeps values from 30 to 20, so no row could be kept",
        ),
        (
            [{"character_repetition_filter": {"rep_len": 2.5}}],
            "rep_len of character_repetition_filter must be a whole number of at least 1, got 2.5",
        ),
        (
            [{"document_deduplicator": {"lowercase": "yes"}}],
            "lowercase of document_deduplicator must be true or false, got 'yes'",
        ),
        (
            [{"document_deduplicator": {"text_key": "output"}}],
            "document_deduplicator compares the column output, and here whole examples are compared; take text_key "
            "out, or the op",
        ),
        (
            [{"document_minhash_deduplicator": {"jaccard_threshold": 0}}],
            "jaccard_threshold of document_minhash_deduplicator must be above 0 and at most 1, got 0",
        ),
        (
            [{"document_minhash_deduplicator": {"num_permutations": 8}}],
            "num_permutations of document_minhash_deduplicator must be 16 to 1024, got 8",
        ),
        (
            [{"text_length_filter": {}, "words_num_filter": {}}],
            "process must list operators, as name or {name: {argument: value}}, got "
            "{'text_length_filter': {}, 'words_num_filter': {}}",
        ),
        ([3], "process must list operators, as name or {name: {argument: value}}, got 3"),
    ],
)
def test_recipes_with_mistakes(process, message):
    assert refusal(*process) == message


@pytest.mark.parametrize(
    "recipe", [{}, {"process": None}, {"process": {"text_length_filter": None}}, ["process"], None]
)
def test_a_file_that_is_no_recipe(recipe):
    with pytest.raises(ConfigError) as caught:
        plan_from_recipe(recipe, where="r.yaml")
    assert str(caught.value) == "r.yaml: has no list of operators named process; is it a recipe of Data-Juicer?"


def test_a_recipe_without_operators_filters_nothing():
    assert plan_of().is_empty


# --- the table ---


def test_the_table_names_rules_and_operators_that_exist():
    for name, op in RECIPE_OPS.items():
        if op.becomes == "rule":
            assert rule_named(op.rule).kind == "range", name
        else:
            assert not op.rule, name
    assert NOTES.keys() <= RECIPE_OPS.keys()
    # Each rule that says which operator it follows is what that operator becomes.
    followed = {rule.op: rule.name for rule in RULES if rule.op and rule.kind == "range"}
    assert followed == {name: RECIPE_OPS[name].rule for name in followed}


def test_a_recipe_is_not_changed_by_reading_it():
    recipe = {"process": [{"text_length_filter": {"text_key": "text", "min_len": 3}}]}
    plan_from_recipe(recipe, where="r.yaml")
    assert recipe == {"process": [{"text_length_filter": {"text_key": "text", "min_len": 3}}]}

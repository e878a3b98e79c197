"""The operators of Data-Juicer 1.6 and what becomes of each in a plan; ``recipes`` goes by this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Argument = tuple[str, float | None]
"""The name of an argument and its default in Data-Juicer; None: no bound."""


@dataclass(frozen=True, slots=True)
class RecipeOp:
    """What becomes of an operator of a recipe.

    Attributes:
        becomes: a rule, one of the two deduplications, a filter run by Data-Juicer (``foreign``), or nothing.
        rule: the name of the rule; where arguments decide which one, the usual one.
        min: the argument that gives the smallest value kept.
        max: likewise the largest.
        parameter: the argument that gives the rule's parameter.
        same_if: the values of other arguments for which the rule means the same; with others, a filter is foreign.
        passed_over: its other arguments; they do not change the rule, or a note says how.
    """

    becomes: Literal["rule", "exact_duplicates", "near_duplicates", "foreign", "refused"]
    rule: str = ""
    min: Argument | None = None
    max: Argument | None = None
    parameter: Argument | None = None
    same_if: Mapping[str, Any] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()


_WORDS = {"tokenization": False}
_LISTED = {"tokenization": False, "use_words_aug": False}
_FLAGGED = ("lang", "flagged_words_dir", "words_aug_group_sizes", "words_aug_join_char")
_STOP = ("lang", "stopwords_dir", "words_aug_group_sizes", "words_aug_join_char")
_SHINGLES = ("tokenization", "window_size", "lowercase", "ignore_pattern")
_EXACT = ("lowercase", "ignore_non_character")
_MINHASH = (*_SHINGLES, "tokenizer_model", "num_permutations", "jaccard_threshold", "num_bands", "num_rows_per_band")
_RAY_MINHASH = (
    *_MINHASH,
    *("union_find_parallel_num", "union_threshold", "max_pending_edge_buffer_task", "num_edge_buffer_task_returns"),
    *("max_pending_filter_tasks", "num_filter_task_returns", "merge_batch_size", "minhash_batch_size"),
    *("memory_per_sample", "actor_memory", "task_memory", "tmp_file_name"),
)

TEMPLATED = ("hf_model", "model_params", "query_template", "response_template")
"""Arguments of filters that ask a model; the templates decide which rule they are."""

RECIPE_OPS: Mapping[str, RecipeOp] = {
    "alphanumeric_filter": RecipeOp("rule", "alphanumeric", ("min_ratio", 0.25), ("max_ratio", None), None, _WORDS),
    "average_line_length_filter": RecipeOp("rule", "average_line_length", ("min_len", 10), ("max_len", None)),
    "character_repetition_filter": RecipeOp(
        "rule", "character_repetition", ("min_ratio", 0.0), ("max_ratio", 0.5), ("rep_len", 10)
    ),
    "flagged_words_filter": RecipeOp(
        "rule", "flagged_words", ("min_ratio", 0.0), ("max_ratio", 0.045), None, _LISTED, _FLAGGED
    ),
    "instruction_following_difficulty_filter": RecipeOp(
        "rule", "instruction_following_difficulty", ("min_score", 1.0), ("max_score", 100.0), passed_over=TEMPLATED
    ),
    "language_id_score_filter": RecipeOp("rule", "language_id_score", ("min_score", 0.8), passed_over=("lang",)),
    "llm_perplexity_filter": RecipeOp(
        "rule", "perplexity", ("min_score", 1.0), ("max_score", 100.0), passed_over=TEMPLATED
    ),
    "maximum_line_length_filter": RecipeOp("rule", "maximum_line_length", ("min_len", 10), ("max_len", None)),
    "perplexity_filter": RecipeOp("rule", "perplexity", ("min_ppl", 0), ("max_ppl", 1500), passed_over=("lang",)),
    "special_characters_filter": RecipeOp("rule", "special_characters", ("min_ratio", 0.0), ("max_ratio", 0.25)),
    "stopwords_filter": RecipeOp("rule", "stopwords", ("min_ratio", 0.3), ("max_ratio", 1.0), None, _LISTED, _STOP),
    "text_length_filter": RecipeOp("rule", "text_length", ("min_len", 10), ("max_len", None)),
    "token_num_filter": RecipeOp(
        "rule", "token_num", ("min_num", 10), ("max_num", None), passed_over=("hf_tokenizer",)
    ),
    "word_repetition_filter": RecipeOp(
        "rule", "word_repetition", ("min_ratio", 0.0), ("max_ratio", 0.5), ("rep_len", 10), _WORDS, ("lang",)
    ),
    "words_num_filter": RecipeOp("rule", "words_num", ("min_num", 10), ("max_num", None), None, _WORDS, ("lang",)),
    "document_deduplicator": RecipeOp("exact_duplicates", passed_over=_EXACT),
    "ray_document_deduplicator": RecipeOp(
        "exact_duplicates", passed_over=(*_EXACT, "backend", "redis_address", "dedup_set_num")
    ),
    "document_minhash_deduplicator": RecipeOp("near_duplicates", passed_over=_MINHASH),
    "document_minhash_deduplicator_with_uid": RecipeOp("near_duplicates", passed_over=_MINHASH),
    "document_simhash_deduplicator": RecipeOp(
        "near_duplicates", passed_over=(*_SHINGLES, "num_blocks", "hamming_distance")
    ),
    "ray_bts_minhash_cpp_deduplicator": RecipeOp("near_duplicates", passed_over=_RAY_MINHASH),
    "ray_bts_minhash_deduplicator": RecipeOp("near_duplicates", passed_over=_RAY_MINHASH),
    "ray_bts_minhash_deduplicator_with_uid": RecipeOp("near_duplicates", passed_over=_RAY_MINHASH),
    "general_field_filter": RecipeOp("foreign"),
    "in_context_influence_filter": RecipeOp("foreign"),
    "llm_analysis_filter": RecipeOp("foreign"),
    "llm_condition_filter": RecipeOp("foreign"),
    "llm_difficulty_score_filter": RecipeOp("foreign"),
    "llm_quality_score_filter": RecipeOp("foreign"),
    "llm_task_relevance_filter": RecipeOp("foreign"),
    "specified_field_filter": RecipeOp("foreign"),
    "specified_numeric_field_filter": RecipeOp("foreign"),
    "suffix_filter": RecipeOp("foreign"),
    "text_action_filter": RecipeOp("foreign"),
    "text_embd_similarity_filter": RecipeOp("foreign"),
    "text_entity_dependency_filter": RecipeOp("foreign"),
    "text_pair_similarity_filter": RecipeOp("foreign"),
}

_OTHER_WORDS = (
    "; its words stand between white space, and here each Chinese, Japanese or Korean letter is a word and punctuation "
    "ends one"
)

NOTES: Mapping[str, str] = {
    "flagged_words_filter": (
        "flagged_words_filter brings lists of words; here filter.flagged_words names yours" + _OTHER_WORDS
    ),
    "instruction_following_difficulty_filter": (
        "instruction_following_difficulty_filter takes the ratio of losses under {hf_model}; here filter.models score, "
        "and filter.ifd must be loss_ratio for the ratio to be the same"
    ),
    "language_id_score_filter": (
        "language_id_score_filter asks fastText's large model; here its compressed one scores, a little differently"
    ),
    "llm_perplexity_filter": "llm_perplexity_filter scores with {hf_model}; here filter.models do",
    "perplexity_filter": (
        "perplexity_filter scores with a KenLM of n-grams; here filter.models score, whose perplexities are on another "
        "scale, so choose bounds of your own: filter.rules.perplexity"
    ),
    "stopwords_filter": "stopwords_filter brings lists of words; here filter.stopwords names yours" + _OTHER_WORDS,
    "token_num_filter": (
        "token_num_filter counts the tokens of {hf_tokenizer}; here those of tokenize.tokenizer are counted"
    ),
    "word_repetition_filter": "word_repetition_filter looks at words" + _OTHER_WORDS,
    "words_num_filter": "words_num_filter counts words" + _OTHER_WORDS,
    "document_simhash_deduplicator": (
        "document_simhash_deduplicator compares by SimHash; here MinHash stands in for it"
    ),
}
"""What is different here of an operator that has a counterpart; its arguments are filled in."""

_REWRITES = "changes texts, and a filter here only keeps or drops rows"
_MERGES = "makes one row of several, and a filter here only keeps or drops rows"
_MEDIA = "looks at images, sound or video, and examples here are text"

REFUSED_KINDS: Mapping[str, str] = {
    "document_line_deduplicator": _REWRITES,
    "_mapper": _REWRITES,
    "_fused_op": _REWRITES,
    "_sequential_batch_op": _REWRITES,
    "_selector": "chooses among all rows, for which there is filter.num_examples here",
    "_grouper": _MERGES,
    "_aggregator": _MERGES,
    "_pipeline": "runs an engine of its own",
    "audio_": _MEDIA,
    "image_": _MEDIA,
    "phrase_grounding_": _MEDIA,
    "video_": _MEDIA,
    "ray_image_": _MEDIA,
    "ray_video_": _MEDIA,
}
"""Why operators are refused whose name ends in this, or, where it ends in an underscore, begins with this."""

SAME_IF: Mapping[str, Any] = {"min_closed_interval": True, "max_closed_interval": True, "reversed_range": False}
"""Arguments of every filter; with other values than these it is foreign."""

HOW_IT_RUNS = (
    *("accelerator", "adaptive_batching", "audio_key", "auto_op_parallelism", "batch_mode", "batch_size"),
    *("cpu_required", "gpu_required", "history_key", "image_bytes_key", "image_key", "index_key", "input_columns"),
    *("instruction_key", "mem_required", "memory", "num_cpus", "num_gpus", "num_proc", "output_columns", "prompt_key"),
    *("query_key", "ray_execution_mode", "response_key", "runtime_env", "skip_op_error", "stats_export_path"),
    *("system_key", "turbo", "video_key", "work_dir"),
)
"""Arguments of every operator that do not change what a rule means."""

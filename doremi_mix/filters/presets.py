"""Published recipes for instruction data, as plans.  Each row cites where its numbers come from."""

from __future__ import annotations

from collections.abc import Mapping

from doremi_mix.filters.plan import Diversity, FilterPlan, NearDuplicateSettings, RuleSetting

KE = "Ke-Data-Juicer, arXiv 2403.13233"
REFINE = "Data-Juicer's refined Alpaca-CoT recipes"
SECOND = "BetterMixture, second place"

PRESETS: Mapping[str, FilterPlan] = {
    "none": FilterPlan(),
    "ke_data_juicer": FilterPlan(
        exact_duplicates="text",  # MD5 of the text
        rules=(
            RuleSetting("text_length", min=20, max=2000, source=KE),
            RuleSetting("language_id_score", min=0.2, source=KE),
            RuleSetting("perplexity", min=20, max=1000, source=KE),
            RuleSetting("instruction_following_difficulty", min=0.2, max=0.9, source=KE),
        ),
        diversity=Diversity(num_examples=60_000),
        notes=(
            "the report names neither the models that scored perplexity and IFD, nor how they voted, nor the embedding "
            "of k-center: filter.models, filter.min_votes and filter.embedding are yours to choose",
        ),
    ),
    "data_juicer_refine": FilterPlan(
        exact_duplicates="characters",  # lowercase: true, ignore_non_character: true
        rules=(
            RuleSetting("text_length", min=30, applies="other", source=REFINE),
            RuleSetting("text_length", min=10, applies="zh", source=REFINE),
            RuleSetting("alphanumeric", min=0.1, source=REFINE),
            RuleSetting("character_repetition", max=0.6, source=REFINE),
            RuleSetting("maximum_line_length", min=20, applies="other", source=REFINE),
            RuleSetting("flagged_words", max=0.017, source=REFINE),
        ),
        near_duplicates=NearDuplicateSettings(),
        notes=("the recipe removes near duplicates by SimHash; here it is MinHash at a similarity of 0.7",),
    ),
    "second_place": FilterPlan(
        exact_duplicates="text",
        rules=(
            RuleSetting("token_num", min=10, max=500, source=SECOND),
            RuleSetting("arithmetic", source=SECOND),
            RuleSetting("language_id_score", min=0.9, source=SECOND),
            RuleSetting("perplexity", min_quantile=0.25, max_quantile=0.75, source=SECOND),
        ),
        notes=("the recipe's perplexity is a KenLM's; here it is that of filter.models, by quantiles of each domain",),
    ),
}

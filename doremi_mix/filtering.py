"""From settings to what a filter does and which scores it needs: what the stages analyze and filter share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from doremi_mix.config import Config, FilterConfig
from doremi_mix.config_file import load_yaml
from doremi_mix.errors import ConfigError, StageNotFinishedError
from doremi_mix.filters.plan import Diversity, FilterPlan, NearDuplicateSettings, RuleSetting, override_rules
from doremi_mix.filters.presets import PRESETS
from doremi_mix.filters.scores import FAMILIES, TEXT_KEY, read_words
from doremi_mix.run import RunDirectory
from doremi_mix.score_store import ScoreRequest

LOSSES_OF_RULE: Mapping[str, tuple[str, ...]] = {
    "perplexity": ("text_loss",),
    "answer_perplexity": ("answer_loss", "answer_alone_loss"),
    "instruction_following_difficulty": ("answer_loss", "answer_alone_loss"),
}
"""What a language model must be asked for each rule."""

IFD = "instruction_following_difficulty"

WORD_LISTS = ("flagged_words", "stopwords")
"""Rules over lists of words that the user gives."""


def filter_plan(settings: FilterConfig) -> FilterPlan:
    """Settles preset or recipe and the settings on top of it.

    Raises:
        ConfigError: they contradict each other, or a rule lacks what it needs.
    """
    plan = _base_plan(settings)
    overrides = {
        name: None if rule is None else rule.model_dump(exclude_unset=True) for name, rule in settings.rules.items()
    }
    rules, notes = _without_lists(override_rules(plan.rules, overrides), settings)
    exact, near = plan.exact_duplicates, plan.near_duplicates
    if settings.exact_duplicates is not None:
        exact = None if settings.exact_duplicates == "off" else settings.exact_duplicates
    if settings.near_duplicates is not None:
        near = None if settings.near_duplicates == "off" else NearDuplicateSettings(similarity=settings.near_duplicates)
    if near is not None:
        near = dataclasses.replace(near, shingle_size=settings.shingle_size, num_permutations=settings.num_permutations)
    plan = dataclasses.replace(
        plan,
        rules=rules,
        exact_duplicates=exact,
        near_duplicates=near,
        diversity=_diversity(plan.diversity, settings),
        notes=(*plan.notes, *notes),
    )
    _check_models(plan, settings)
    return plan


def _base_plan(settings: FilterConfig) -> FilterPlan:
    if settings.recipe is None:
        return PRESETS[settings.preset]
    if settings.preset != "none":
        raise ConfigError("filter.recipe and filter.preset are both given; give one of them")
    from doremi_mix.filters.recipes import plan_from_recipe

    recipe = settings.recipe if isinstance(settings.recipe, dict) else load_yaml(Path(settings.recipe))
    return plan_from_recipe(recipe, where="filter.recipe")


def _without_lists(rules: tuple[RuleSetting, ...], settings: FilterConfig) -> tuple[tuple[RuleSetting, ...], list[str]]:
    """Returns the rules without those of word lists that are not there, and a note on each of them."""
    notes = []
    for name in WORD_LISTS:
        if getattr(settings, name) is None and any(rule.rule == name for rule in rules):
            if settings.rules.get(name) is not None:
                raise ConfigError(
                    f"filter.rules.{name} needs a list of words; give the file, one a line: filter.{name}"
                )
            rules = tuple(rule for rule in rules if rule.rule != name)
            notes.append(f"the rule {name} is left out: it needs a list of words (filter.{name})")
    return rules, notes


def _diversity(base: Diversity | None, settings: FilterConfig) -> Diversity | None:
    if settings.num_examples == "all" or (settings.num_examples is None and base is None):
        return None
    num_examples = settings.num_examples or (base.num_examples if base else 0)
    return Diversity(
        num_examples, settings.per_domain, settings.diversity, settings.quality_weighted, settings.diversity_shards
    )


def _check_models(plan: FilterPlan, settings: FilterConfig) -> None:
    """Raises ConfigError when something needs language models and there are none, or fewer than votes."""
    needing = [f"filter.rules.{rule.rule}" for rule in plan.model_rules]
    if plan.diversity is not None and plan.diversity.quality_weighted:
        needing.append("filter.quality_weighted")
    if needing and not settings.models:
        of = f" of the preset {settings.preset}" if settings.preset != "none" else ""
        off = needing[0] + ("=false" if needing[0].endswith("weighted") else "=null")
        raise ConfigError(
            f"{needing[0]}{of} needs a language model, and filter.models is empty; give one or more (a folder, a hub "
            f"name, a .gguf file, or a finished run), or switch it off: --set {off}"
        )
    if settings.min_votes is not None and settings.min_votes > len(settings.models):
        raise ConfigError(
            f"filter.min_votes is {settings.min_votes}, more than the {len(settings.models)} filter.models; lower it"
        )


def check_filter(config: Config, names: Sequence[str]) -> None:
    """Finds settings that contradict each other or the domains.

    Raises:
        ConfigError: they do.
    """
    settings = config.filter
    plan = filter_plan(settings)
    for name in settings.priority:
        if name not in names:
            raise ConfigError(f"filter.priority: {name!r} is no domain; the domains: {', '.join(names)}")
    if len(set(settings.priority)) < len(settings.priority):
        raise ConfigError("filter.priority names a domain twice; name each once")
    if len(set(settings.models)) < len(settings.models):
        raise ConfigError("filter.models names a model twice, which would vote twice; name each once")
    if plan.diversity is not None and plan.diversity.method == "facility_location":
        if plan.diversity.quality_weighted:
            raise ConfigError("filter.quality_weighted goes with filter.diversity k_center; set one of them otherwise")
        if find_spec("submodlib") is None:
            raise ConfigError(
                "filter.diversity facility_location needs submodlib; run: pip install 'doremi-mix[submodular]'"
            )


def check_filter_inputs(config: Config, run: RunDirectory) -> None:
    """Finds now what the filter would miss when it comes to it.

    Raises:
        ConfigError: a word list is missing, an executor lacks something, or the run is to score itself.
        StageNotFinishedError: a run that is to score has no reference model yet.
    """
    from doremi_mix.executors import check_executor

    settings = config.filter
    plan = filter_plan(settings)
    if plan.is_empty:
        return
    check_executor(settings)
    for key in WORD_LISTS:
        path = getattr(settings, key)
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"filter.{key}: {path}: there is no such file; give a file with one word a line")
    models = [("filter.models", model) for model in settings.models]
    if settings.embedding != "ngrams":
        models.append(("filter.embedding", settings.embedding))
    for key, model in models:
        if Path(model).expanduser().resolve() == run.path.resolve():
            raise ConfigError(
                f"{key}: {model} is this very run, whose reference model is trained on what it would filter; give "
                "another run that has finished, for example one without a filter"
            )
        model_place(model)


def inputs_are_here(config: Config) -> bool:
    """Says whether all that the filter was made with can still be read; if not, its result is taken as it is."""
    settings = config.filter
    files = [getattr(settings, key) for key in WORD_LISTS if getattr(settings, key) is not None]
    models = [name for name in (*settings.models, settings.embedding) if name != "ngrams"]
    paths = [name for name in models if Path(name).expanduser().is_absolute()]
    return all(Path(path).expanduser().exists() for path in (*files, *paths))


def priority_of(config: Config, domains: Sequence[str]) -> list[int]:
    """Returns the domain ids, the one that keeps shared rows first."""
    order = [*config.filter.priority, *(name for name in domains if name not in config.filter.priority)]
    return [list(domains).index(name) for name in order]


def model_place(name: str) -> dict[str, str | None]:
    """Returns where a scoring model and its tokenizer are; a finished run of ours gives its reference model.

    Raises:
        StageNotFinishedError: the run has no reference model yet.
    """
    path = Path(name).expanduser()
    if path.is_absolute() and not path.exists():
        raise ConfigError(f"{name}: there is no such model; give a folder, a hub name, a .gguf file, or a finished run")
    if not (path / "run.json").exists():
        return {"model": name, "tokenizer": None}
    run = RunDirectory(path)
    if run.manifest("reference") is None or run.manifest("tokenize") is None:
        raise StageNotFinishedError(
            f"{name}: this run has no reference model yet; run: doremi-mix reference --run-dir {name}"
        )
    trained = run.stage_path("tokenize") / "bpe" / "tokenizer.json"
    given = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))["tokenize"]["tokenizer"]
    return {
        "model": str(run.stage_path("reference") / "model"),
        "tokenizer": str(trained) if trained.exists() else given,
    }


def request_of(setting: RuleSetting, config: Config) -> ScoreRequest:
    """Returns the scores that a rule without language models looks at."""
    if setting.rule in WORD_LISTS:
        path = getattr(config.filter, setting.rule)
        return ScoreRequest("words", (setting.column,), {"words": list(read_words(Path(path)))})
    return request_of_column(setting.column, config)


def request_of_column(column: str, config: Config) -> ScoreRequest:
    """Returns who computes a column of the text of rows."""
    if column in ("lang", "lang_score"):
        return ScoreRequest("language", ("lang", "lang_score"))
    if column == "num_token":
        from doremi_mix.fingerprints import contents_of

        tokenizer = config.tokenize.tokenizer
        if tokenizer is None:
            # Without the main model's tokenizer, words are the unit that is nearest to tokens.
            return ScoreRequest("text", ("num_words",))
        settings = {"tokenizer": tokenizer, "trust_remote_code": config.tokenize.trust_remote_code}
        return ScoreRequest("tokens", ("num_token",), {**settings, "contents": contents_of(tokenizer)})
    return ScoreRequest("text", (column,))


def score_settings(config: Config) -> dict[str, Any]:
    """Returns what decides the scores that the filter of a configuration reads, as plain values."""
    plan, settings = filter_plan(config.filter), config.filter
    requests = [request_of(rule, config) for rule in plan.text_rules]
    asked = {rule.rule for rule in plan.model_rules}
    if plan.diversity is not None and plan.diversity.quality_weighted:
        asked.add(IFD)
    requests += [
        model_request(name, LOSSES_OF_RULE[rule], config) for name in settings.models for rule in sorted(asked)
    ]
    if plan.diversity is not None:
        requests.append(embedding_request(config))
    found: dict[str, Any] = {
        "requests": [
            [r.family, FAMILIES[r.family].version, list(r.columns), _by_contents(r.settings)] for r in requests
        ]
    }
    if asked:
        found |= {"ifd": settings.ifd, "min_votes": settings.min_votes}
    if plan.near_duplicates is not None or plan.diversity is not None:
        found["seed"] = settings.seed
    return found


def _by_contents(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings in which a model is what its files hold, wherever they lie."""
    if "contents" not in settings:
        return dict(settings)
    return {key: value for key, value in settings.items() if key not in ("model", "tokenizer")}


def analysis_requests(config: Config) -> tuple[list[ScoreRequest], ScoreRequest]:
    """Returns the scores that describe rows, and the keys by which their texts are compared."""
    from doremi_mix.filters.text_scores import TEXT_SCORES

    requests = [ScoreRequest("text", tuple(TEXT_SCORES)), request_of_column("lang", config)]
    if config.tokenize.tokenizer is not None:
        requests.append(request_of_column("num_token", config))
    return requests, key_request(filter_plan(config.filter).exact_duplicates or "spaces")


def key_request(normalization: str) -> ScoreRequest:
    """Returns the keys by which texts are compared."""
    return ScoreRequest("text", (f"{TEXT_KEY}{normalization}",))


def signature_request(near: NearDuplicateSettings, seed: int) -> ScoreRequest:
    """Returns the MinHash signatures."""
    settings = {"num_permutations": near.num_permutations, "shingle_size": near.shingle_size, "seed": seed}
    return ScoreRequest("signature", ("signature",), settings)


def embedding_request(config: Config) -> ScoreRequest:
    """Returns the embeddings among which diverse examples are chosen."""
    settings = config.filter
    if settings.embedding == "ngrams":
        return ScoreRequest("ngrams", ("embedding",), {"seed": settings.seed})
    return ScoreRequest("embedding", ("embedding",), _model_settings(settings.embedding, config))


def model_request(model: str, columns: tuple[str, ...], config: Config) -> ScoreRequest:
    """Returns the losses of one language model."""
    from doremi_mix.stages.tokenize import make_template

    template = dataclasses.asdict(make_template(config.tokenize))
    settings = {**_model_settings(model, config), "dtype": config.filter.model_dtype, "template": template}
    return ScoreRequest("model", columns, settings)


def _model_settings(model: str, config: Config) -> dict[str, Any]:
    from doremi_mix.fingerprints import contents_of

    place = model_place(model)
    return {
        **place,
        "contents": {key: contents_of(name) for key, name in place.items() if name is not None},
        "max_tokens": config.filter.max_model_tokens,
        "trust_remote_code": config.filter.trust_remote_code,
    }

"""What a filter does, settled: the steps in the order in which they are applied, and the thresholds of each.

A preset gives a plan, a Data-Juicer recipe may give one, and single settings go on top.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from doremi_mix.errors import ConfigError
from doremi_mix.filters.exact_duplicates import Normalization
from doremi_mix.filters.rules import RULES, rule_named

MODEL_RULES = ("perplexity", "answer_perplexity", "instruction_following_difficulty")
"""Rules over what language models say; they see only rows that all other rules keep."""


THRESHOLDS = ("min", "max", "min_quantile", "max_quantile")

WITH_PARAMETER = ("character_repetition", "word_repetition")
"""Rules whose score takes a number: the items of an n-gram."""


@dataclass(frozen=True, slots=True)
class RuleSetting:
    """The thresholds of one rule.

    Attributes:
        rule: its name in ``rules.RULES``.
        min: the smallest value that is kept; None: any.
        max: the largest value that is kept; None: any.
        min_quantile: instead of ``min``, the quantile of each domain's values.
        max_quantile: instead of ``max``, likewise.
        allowed: for rules of that kind, the values that are kept.
        applies: to rows of any script, or only to Chinese ones (``zh``), or only to others (``other``).
        parameter: of the score, where it has one (the length of n-grams); None: the usual one.
        source: where the numbers come from.
    """

    rule: str
    min: float | None = None
    max: float | None = None
    min_quantile: float | None = None
    max_quantile: float | None = None
    allowed: tuple[str, ...] = ()
    applies: Literal["all", "zh", "other"] = "all"
    parameter: int | None = None
    source: str = ""

    @property
    def column(self) -> str:
        """The score column that the rule looks at."""
        column = rule_named(self.rule).column
        return column if self.parameter is None else f"{column}@{self.parameter}"


@dataclass(frozen=True, slots=True)
class NearDuplicateSettings:
    """How near duplicates are found: MinHash over character shingles.

    Attributes:
        similarity: two texts of this Jaccard similarity or more are near duplicates.
        shingle_size: characters in a shingle.
        num_permutations: length of a signature.
    """

    similarity: float = 0.7
    shingle_size: int = 5
    num_permutations: int = 128


@dataclass(frozen=True, slots=True)
class Diversity:
    """Which examples stand for all of them.

    Attributes:
        num_examples: how many are kept.
        per_domain: so many of each domain instead of all together.
        method: ``k_center`` or ``facility_location``.
        quality_weighted: prefer examples of larger instruction-following difficulty among distant ones.
        num_shards: of ``k_center``: choose in so many parts, and then among the chosen.
    """

    num_examples: int
    per_domain: bool = False
    method: Literal["k_center", "facility_location"] = "k_center"
    quality_weighted: bool = False
    num_shards: int = 1


@dataclass(frozen=True, slots=True)
class ForeignOp:
    """An operator of a Data-Juicer recipe that has no counterpart here and runs through that library.

    Attributes:
        name: of the operator.
        arguments: its arguments in the recipe.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FilterPlan:
    """Every step of a filter.

    Attributes:
        exact_duplicates: how texts are compared; None: duplicates are kept.
        rules: in the order of ``rules.RULES``; a rule may stand more than once, for different scripts.
        foreign: operators that run through Data-Juicer, after the rules.
        near_duplicates: None: they are kept.
        diversity: None: all are kept.
        notes: what of a preset or recipe is not applied, and why; one sentence each.
    """

    exact_duplicates: Normalization | None = None
    rules: tuple[RuleSetting, ...] = ()
    foreign: tuple[ForeignOp, ...] = ()
    near_duplicates: NearDuplicateSettings | None = None
    diversity: Diversity | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for setting in self.rules:
            _check(setting)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is filtered."""
        return self == FilterPlan(notes=self.notes)

    @property
    def text_rules(self) -> tuple[RuleSetting, ...]:
        """The rules that need no language model."""
        return tuple(setting for setting in self.rules if setting.rule not in MODEL_RULES)

    @property
    def model_rules(self) -> tuple[RuleSetting, ...]:
        """The rules over what language models say."""
        return tuple(setting for setting in self.rules if setting.rule in MODEL_RULES)


def _check(setting: RuleSetting) -> None:
    """Raises ConfigError for thresholds that no value, or every value, could meet."""
    rule = rule_named(setting.rule)
    key = f"filter.rules.{setting.rule}"
    for low, high in (("min", "max"), ("min_quantile", "max_quantile")):
        least, most = getattr(setting, low), getattr(setting, high)
        if least is not None and most is not None and least > most:
            raise ConfigError(f"{key}: {low} {least:g} is larger than {high} {most:g}, so no row could be kept")
    for bound in ("min", "max"):
        if getattr(setting, bound) is not None and getattr(setting, f"{bound}_quantile") is not None:
            raise ConfigError(f"{key}: give {bound} or {bound}_quantile, got both; drop one: --set {key}.{bound}=null")
    ranged = any(v is not None for v in (setting.min, setting.max, setting.min_quantile, setting.max_quantile))
    if setting.parameter is not None and setting.rule not in WITH_PARAMETER:
        raise ConfigError(f"{key}: takes no parameter; only {' and '.join(WITH_PARAMETER)} do (items of an n-gram)")
    if rule.kind == "allowed" and not setting.allowed:
        raise ConfigError(f"{key}: allowed is empty; list what is kept, for example allowed: [en, zh]")
    if rule.kind != "allowed" and setting.allowed:
        raise ConfigError(f"{key}: takes no allowed, got {list(setting.allowed)}")
    if rule.kind != "range" and ranged:
        raise ConfigError(f"{key}: takes no min and max; set it to null to switch it off")
    if rule.kind == "range" and not ranged:
        raise ConfigError(f"{key}: needs min, max or a quantile; set it to null to switch it off")


def override_rules(
    rules: tuple[RuleSetting, ...], overrides: Mapping[str, Mapping[str, Any] | None]
) -> tuple[RuleSetting, ...]:
    """Returns rules with single settings on top.

    Args:
        rules: of a preset or recipe.
        overrides: by rule, what replaces its thresholds; None drops the rule.  A rule that ``rules`` does not have
            starts from its defaults (``rules.RULES``), unless thresholds are given.

    Raises:
        ConfigError: there is no such rule.
    """
    by_rule: dict[str, list[RuleSetting]] = {}
    for setting in rules:
        by_rule.setdefault(setting.rule, []).append(setting)
    for name, override in overrides.items():
        rule = rule_named(name)
        if override is None:
            by_rule.pop(name, None)
            continue
        # None lifts a threshold; elsewhere it says nothing.
        given = {key: value for key, value in override.items() if value is not None or key in THRESHOLDS}
        # A quantile in place of a threshold, and the other way round.
        for one, other in (("min", "min_quantile"), ("max", "max_quantile")):
            for new, old in ((one, other), (other, one)):
                if given.get(new) is not None:
                    given.setdefault(old, None)
        base = by_rule.get(name)
        if base is None:
            open_ends = not any(given.get(key) is not None for key in THRESHOLDS)
            low, high = (rule.min, rule.max) if open_ends else (None, None)
            base = [RuleSetting(name, min=low, max=high, source="rule's default")]
        if given:
            base = _replace(base, {**given, "source": "settings"})
        by_rule[name] = base
    order = {rule.name: position for position, rule in enumerate(RULES)}
    return tuple(setting for name in sorted(by_rule, key=order.__getitem__) for setting in by_rule[name])


def _replace(base: list[RuleSetting], given: Mapping[str, Any]) -> list[RuleSetting]:
    """Changes settings of one rule: all of them, or where a script is named, that of this script."""
    script = given.get("applies")
    if script is None or len(base) == 1:
        return [dataclasses.replace(setting, **given) for setting in base]
    if script == "all":
        return [dataclasses.replace(base[0], **given)]
    return [dataclasses.replace(setting, **given) if setting.applies == script else setting for setting in base]

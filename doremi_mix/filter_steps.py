"""The steps of a filter: each reads scores, which are computed first where they are missing, and takes rows away.

They stand in one order: exact duplicates, rules, operators of Data-Juicer, rules over language models, near duplicates,
diversity.  The dearer a score is, the fewer rows are left that need it; near duplicates come after the models because
the best of them is to stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from doremi_mix.config import Config
from doremi_mix.filtering import (
    IFD,
    LOSSES_OF_RULE,
    embedding_request,
    key_request,
    model_request,
    priority_of,
    request_of,
    signature_request,
)
from doremi_mix.filters.funnel import Funnel, Step
from doremi_mix.filters.languages import MIN_CJK_SHARE
from doremi_mix.filters.plan import Diversity, FilterPlan, ForeignOp, NearDuplicateSettings, RuleSetting
from doremi_mix.filters.quantiles import exact_quantiles
from doremi_mix.filters.rules import Rule, describe, failed, rule_named
from doremi_mix.progress import Narrator
from doremi_mix.score_store import ScoreRequest, ScoreStore
from doremi_mix.stages.load import read_ids

if TYPE_CHECKING:
    import pyarrow as pa

BUCKET_ROWS = 20_000_000
"""More rows than this are compared in parts, by ranges of their keys: about 2 GB at a time."""

Columns = list[NDArray[Any]]
"""One array per domain, one value per row."""

Positions = NDArray[np.int64]


class Ids:
    """The ids of rows by their global number: rows of all domains, one domain after the other."""

    def __init__(self, folder: Path, domains: Sequence[str], num_rows: Sequence[int]) -> None:
        self._folder = folder
        self._domains = domains
        self.starts_K1 = np.concatenate([[0], np.cumsum(num_rows)])

    @cached_property
    def _all(self) -> pa.ChunkedArray:
        import pyarrow as pa

        columns = [read_ids(self._folder, name) for name in self._domains]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())

    def take(self, numbers: NDArray[np.int64]) -> list[str]:
        """Returns the ids of rows by their global numbers."""
        import pyarrow as pa

        ids: list[str] = self._all.take(pa.array(numbers)).to_pylist()
        return ids

    def of_domain(self, domain_id: int, positions: NDArray[np.int64]) -> list[str]:
        """Returns the ids of a domain's rows by their positions."""
        return self.take(positions + self.starts_K1[domain_id])


@dataclass
class FilterWork:
    """What the steps share.

    Attributes:
        config: of the run.
        plan: what is to be done.
        store: the scores.
        funnel: the fate of every row.
        narrator: who tells the user.
        ids: of the rows.
        report: what the steps have to say for ``summary.json``, by step.
        clusters: of near duplicates: arrays for ``near_duplicates.parquet``.
        scores: score columns that decided something, for statistics.
    """

    config: Config
    plan: FilterPlan
    store: ScoreStore
    funnel: Funnel
    narrator: Narrator
    ids: Ids
    report: dict[str, Any] = field(default_factory=dict)
    clusters: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Columns] = field(default_factory=dict)

    def read(self, request: ScoreRequest, column: str, *, kept_only: bool = False) -> Columns:
        """Returns a column by domain; it is computed first where it is not there yet, on all rows or the kept ones."""
        self.store.ensure(request, self.funnel.kept() if kept_only else None)
        return self.store.read(request, column)


def apply_steps(work: FilterWork) -> None:
    """Applies every step of the plan."""
    plan = work.plan
    _score_texts(work)
    if plan.exact_duplicates is not None:
        _drop_exact_duplicates(work, plan.exact_duplicates)
    for setting in plan.text_rules:
        _apply_rule(work, setting)
    for op in plan.foreign:
        _apply_foreign(work, op)
    for setting in plan.model_rules:
        _apply_model_rule(work, setting)
    if plan.near_duplicates is not None:
        _drop_near_duplicates(work, plan.near_duplicates)
    if plan.diversity is not None:
        _choose_diverse(work, plan.diversity)


def _score_texts(work: FilterWork) -> None:
    """Computes in one pass over the rows all that is wanted of their texts alone."""
    requests = [request_of(setting, work.config) for setting in work.plan.text_rules]
    if work.plan.exact_duplicates is not None:
        requests.append(key_request(work.plan.exact_duplicates))
    columns = {column for request in requests if request.family == "text" for column in request.columns}
    if any(setting.applies != "all" for setting in work.plan.rules):
        columns.add("cjk_ratio")
    if columns:
        work.store.ensure(ScoreRequest("text", tuple(sorted(columns))))


def _drop_exact_duplicates(work: FilterWork, normalization: str) -> None:
    from doremi_mix.filters.exact_duplicates import find_exact_duplicates

    request = key_request(normalization)
    keys = work.read(request, request.columns[0])
    priority = priority_of(work.config, work.store.domains)
    num_rows = sum(work.store.num_rows)
    found = find_exact_duplicates(keys, priority, num_buckets=1 + num_rows // BUCKET_ROWS)

    def details(domain_id: int, positions: Positions) -> list[str]:
        return [f"the same text as {name}" for name in work.ids.take(found.survivor_of[domain_id][positions])]

    work.funnel.apply(Step("exact_duplicate", _no_values, details), _lost(work, found.survivor_of))
    work.report["exact_duplicates"] = {
        "compared_by": normalization,
        "priority": [work.store.domains[i] for i in priority],
        "lost_to": found.lost_to_KK.tolist(),
    }


def _lost(work: FilterWork, survivor_of: Sequence[Positions]) -> list[NDArray[np.bool_]]:
    """Returns by domain the rows that are not their own survivors."""
    starts = work.ids.starts_K1
    return [survivors != np.arange(len(survivors)) + starts[i] for i, survivors in enumerate(survivor_of)]


def _no_values(_domain_id: int, positions: Positions) -> NDArray[np.float64]:
    return np.full(len(positions), np.nan)


def _apply_rule(work: FilterWork, setting: RuleSetting) -> None:
    request = request_of(setting, work.config)
    column = setting.column if setting.column in request.columns else request.columns[0]
    values = work.read(request, column)
    work.scores[column] = values
    _apply_thresholds(work, setting, values)


def _apply_thresholds(work: FilterWork, setting: RuleSetting, values: Columns) -> None:
    """Rejects the rows whose value the rule does not accept; quantiles are those of what the rule is for."""
    rule = rule_named(setting.rule)
    bounds = _bounds(work, setting, values)
    applies = _applies(work, setting)
    masks = [
        failed(rule, column, low=low, high=high, allowed=setting.allowed, applies=where)
        for column, (low, high), where in zip(values, bounds, applies, strict=True)
    ]
    work.funnel.apply(_rule_step(rule, setting, values, bounds), masks)


def _rule_step(rule: Rule, setting: RuleSetting, columns: Columns, bounds: Sequence[tuple[Any, Any]]) -> Step:
    def values(domain_id: int, positions: Positions) -> NDArray[np.float64]:
        found = columns[domain_id][positions]
        return _no_values(domain_id, positions) if found.dtype.kind == "O" else found.astype(np.float64)

    def details(domain_id: int, positions: Positions) -> list[str]:
        low, high = bounds[domain_id]
        found = columns[domain_id][positions].tolist()
        return [describe(rule, value, low, high, setting.allowed) for value in found]

    return Step(rule.name, values, details, setting.applies)


def _bounds(work: FilterWork, setting: RuleSetting, values: Columns) -> list[tuple[float | None, float | None]]:
    """Returns the thresholds of each domain."""
    result = []
    for column, kept, where in zip(values, work.funnel.kept(), _applies(work, setting), strict=True):
        low, high = setting.min, setting.max
        wanted = [q for q in (setting.min_quantile, setting.max_quantile) if q is not None]
        if wanted:
            found = dict(zip(wanted, _quantiles(column[kept if where is None else kept & where], wanted), strict=True))
            low = found.get(setting.min_quantile, low) if setting.min_quantile is not None else low
            high = found.get(setting.max_quantile, high) if setting.max_quantile is not None else high
        result.append((low, high))
    return result


def _quantiles(values: NDArray[Any], probabilities: Sequence[float]) -> list[float]:
    shards = [values.astype(np.float32)]
    found: list[float] = exact_quantiles(lambda: shards, probabilities).tolist()
    return found


def _applies(work: FilterWork, setting: RuleSetting) -> list[NDArray[np.bool_] | None]:
    """Returns by domain the rows that the rule is for; None: all."""
    if setting.applies == "all":
        return [None] * len(work.store.domains)
    shares = work.read(ScoreRequest("text", ("cjk_ratio",)), "cjk_ratio")
    return [(share > MIN_CJK_SHARE) == (setting.applies == "zh") for share in shares]


def _apply_foreign(work: FilterWork, op: ForeignOp) -> None:
    request = ScoreRequest("foreign", ("keep", "value"), {"name": op.name, "arguments": dict(op.arguments)})
    keep = work.read(request, "keep", kept_only=True)
    values = work.store.read(request, "value")

    def shown(domain_id: int, positions: Positions) -> NDArray[np.float64]:
        return values[domain_id][positions].astype(np.float64)

    def details(domain_id: int, positions: Positions) -> list[str]:
        found = shown(domain_id, positions).tolist()
        text = f"Data-Juicer's {op.name} rejects it"
        return [text if math.isnan(value) else f"{text} at {value:.4g}" for value in found]

    work.funnel.apply(Step(op.name, shown, details), [mask == 0 for mask in keep])


def _drop_near_duplicates(work: FilterWork, near: NearDuplicateSettings) -> None:
    from doremi_mix.filters.near_duplicates import find_near_duplicates

    signatures = work.read(signature_request(near, work.config.filter.seed), "signature", kept_only=True)
    priority = priority_of(work.config, work.store.domains)
    found = find_near_duplicates(
        signatures,
        similarity=near.similarity,
        alive=work.funnel.kept(),
        priority=priority,
        quality=work.scores.get(rule_named(IFD).column),
    )

    def values(domain_id: int, positions: Positions) -> NDArray[np.float64]:
        return found.similarity[domain_id][positions].astype(np.float64)

    def details(domain_id: int, positions: Positions) -> list[str]:
        names = work.ids.take(found.survivor_of[domain_id][positions])
        shown = zip(values(domain_id, positions).tolist(), names, strict=True)
        return [f"similarity {value:.2f} to {name}, expected less than {near.similarity:g}" for value, name in shown]

    work.funnel.apply(Step("near_duplicate", values, details), _lost(work, found.survivor_of))
    work.report["near_duplicates"] = {
        "similarity": near.similarity,
        "priority": [work.store.domains[i] for i in priority],
        "num_clusters": found.num_clusters,
        "lost_to": found.lost_to_KK.tolist(),
    }
    work.clusters = {"cluster": found.cluster_of, "survivor_of": found.survivor_of, "similarity": found.similarity}


def _quality(work: FilterWork) -> Columns:
    """Returns the instruction-following difficulty of the kept rows, by which the better of two rows is told."""
    return _model_values(work, IFD)[0]


def _model_values(work: FilterWork, rule: str) -> tuple[Columns, list[Columns]]:
    """Returns what the models say of the kept rows: their median, and each one's values."""
    from doremi_mix.filters.model_scores import derive
    from doremi_mix.filters.votes import vote

    column = rule_named(rule).column
    by_model = []
    for model in work.config.filter.models:
        request = model_request(model, LOSSES_OF_RULE[rule], work.config)
        losses = {name: work.read(request, name, kept_only=True) for name in request.columns}
        by_model.append(
            [
                derive({name: losses[name][i] for name in losses}, work.config.filter.ifd)[column]
                for i in range(len(work.store.domains))
            ]
        )
    medians = [
        vote(np.stack([values[i] for values in by_model]), None, None)[1] for i in range(len(work.store.domains))
    ]
    return medians, by_model


def _apply_model_rule(work: FilterWork, setting: RuleSetting) -> None:
    """Rejects by what the models say: their median, or the votes of each."""
    from doremi_mix.filters.votes import vote

    rule = rule_named(setting.rule)
    medians, by_model = _model_values(work, setting.rule)
    work.scores[rule.column] = medians
    min_votes = work.config.filter.min_votes
    if min_votes is None:
        _apply_thresholds(work, setting, medians)
        return
    bounds = [_bounds(work, setting, values) for values in by_model]
    applies = _applies(work, setting)
    masks, counts = [], []
    for i, where in enumerate(applies):
        # Thresholds may differ from model to model (quantiles), so each one's verdict is what is voted on.
        verdicts = np.stack([_verdicts(rule, values[i], *bounds[m][i]) for m, values in enumerate(by_model)])
        keep, _ = vote(verdicts, 1.0, 1.0, min_votes=min_votes)
        masks.append(~keep if where is None else ~keep & where)
        counts.append(np.nansum(verdicts, axis=0).astype(np.int64))

    def values(domain_id: int, positions: Positions) -> NDArray[np.float64]:
        return medians[domain_id][positions].astype(np.float64)

    def details(domain_id: int, positions: Positions) -> list[str]:
        shown = zip(counts[domain_id][positions].tolist(), values(domain_id, positions).tolist(), strict=True)
        return [
            f"{votes} of {len(by_model)} models find it within the range (median {median:.4g}), expected {min_votes} "
            "or more"
            for votes, median in shown
        ]

    work.funnel.apply(Step(rule.name, values, details, setting.applies), masks)


def _verdicts(rule: Rule, values: NDArray[Any], low: float | None, high: float | None) -> NDArray[np.floating[Any]]:
    """Returns 1 where a model finds a row within the range, 0 where not, and NaN where it says nothing."""
    in_range = ~failed(rule, values, low=low, high=high)
    return np.where(np.isnan(values), np.nan, in_range.astype(np.float64))


def _choose_diverse(work: FilterWork, diversity: Diversity) -> None:
    """Keeps the examples that stand for all that are left."""
    kept = work.funnel.kept()
    embeddings = work.read(embedding_request(work.config), "embedding", kept_only=True)
    quality = _quality(work) if diversity.quality_weighted else None
    groups = [[i] for i in range(len(kept))] if diversity.per_domain else [list(range(len(kept)))]
    chosen = [np.zeros(len(mask), dtype=bool) for mask in kept]
    radii: list[float | None] = []
    for group in groups:
        positions = [np.flatnonzero(kept[i]) for i in group]
        points = np.concatenate([embeddings[i][at] for i, at in zip(group, positions, strict=True)])
        weights = None
        if quality is not None:
            weights = np.concatenate([quality[i][at] for i, at in zip(group, positions, strict=True)])
        selected, radius = _select(points, diversity, weights, work.narrator)
        radii.append(radius)
        ends = np.cumsum([len(at) for at in positions])
        for i, at, end in zip(group, positions, ends, strict=True):
            inside = selected[(selected >= end - len(at)) & (selected < end)] - (end - len(at))
            chosen[i][at[inside]] = True
    what = f"the {diversity.num_examples:,} diverse examples" + (" of its domain" if diversity.per_domain else "")

    def details(_domain_id: int, positions: Positions) -> list[str]:
        return [f"not one of {what}: others are like it"] * len(positions)

    work.funnel.apply(Step("diversity", _no_values, details), [~mask for mask in chosen])
    work.report["diversity"] = {
        "method": diversity.method,
        "num_examples": diversity.num_examples,
        "embedding": work.config.filter.embedding,
        "radius": radii if diversity.per_domain else radii[0],
    }


def _select(
    points: NDArray[np.float32], diversity: Diversity, quality: NDArray[Any] | None, narrator: Narrator
) -> tuple[NDArray[np.int64], float | None]:
    from doremi_mix.filters.diversity import facility_location, k_center_greedy, k_center_sharded

    if len(points) <= diversity.num_examples:
        return np.arange(len(points)), 0.0
    if diversity.method == "facility_location":
        return facility_location(points, diversity.num_examples), None
    if quality is not None:
        # A row that no model could score is neither better nor worse than the others.
        known = np.isfinite(quality)
        quality = np.where(known, quality, np.median(quality[known]) if known.any() else 0.0)
    num_rounds = 1 if diversity.num_shards == 1 else diversity.num_shards + 1
    with narrator.track("k-center", num_rounds * diversity.num_examples, "examples") as tracker:
        progress: Callable[[int], None] = tracker.advance
        if diversity.num_shards == 1:
            result = k_center_greedy(points, diversity.num_examples, quality_N=quality, progress=progress)
            return result.selected_K, result.radius
        shards = np.array_split(points, diversity.num_shards)
        qualities = None if quality is None else np.array_split(quality, diversity.num_shards)
        chosen = k_center_sharded(shards, diversity.num_examples, quality=qualities, progress=progress)
        return chosen, None

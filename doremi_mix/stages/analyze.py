"""Stage analyze: what the loaded rows are like, before anything is filtered.

Writes ``statistics.json``: by domain rows, characters, words or tokens, turns, languages, flags (placeholder answers,
refusals and the like), quantiles of every score and the longest rows; duplicates inside domains, and how many texts any
two domains share.  The texts are read once for each kind of score; everything else is computed from the scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from doremi_mix.executors import make_executor
from doremi_mix.filtering import filter_plan, key_request, request_of_column
from doremi_mix.filters.analysis import PROBABILITIES, describe_domain
from doremi_mix.filters.exact_duplicates import overlap_matrix
from doremi_mix.filters.text_scores import TEXT_SCORES
from doremi_mix.run import write_json
from doremi_mix.score_store import ScoreRequest, ScoreStore
from doremi_mix.stages import StageContext
from doremi_mix.stages.load import read_ids


def run(context: StageContext) -> str:
    """Describes what was loaded; returns one line about it."""
    config = context.config
    store = ScoreStore(context.run, make_executor(config, context.run, context.narrator), context.narrator)
    normalization = filter_plan(config.filter).exact_duplicates or "spaces"
    keys = key_request(normalization)
    store.ensure(ScoreRequest("text", (*TEXT_SCORES, *keys.columns)))
    requests = [ScoreRequest("text", tuple(TEXT_SCORES)), request_of_column("lang", config)]
    if config.tokenize.tokenizer is not None:
        requests.append(request_of_column("num_token", config))
    for request in requests:
        store.ensure(request)
    domains: dict[str, Any] = {}
    columns: list[dict[str, Any]] = [{} for _ in store.domains]
    for request in requests:
        for column in request.columns:
            for i, values in enumerate(store.read(request, column)):
                columns[i][column] = values
    for i, name in enumerate(store.domains):
        ids = read_ids(context.run.stage_path("load"), name)
        every = np.ones(store.num_rows[i], dtype=bool)
        domains[name] = describe_domain(columns[i], every, ids, config.analyze.num_longest)
    shared = overlap_matrix(store.read(keys, keys.columns[0]))
    distinct = np.diag(shared)
    for i, name in enumerate(store.domains):
        domains[name]["num_duplicates"] = store.num_rows[i] - int(distinct[i])
    write_json(
        context.folder / "statistics.json",
        {
            "probabilities": list(PROBABILITIES),
            "domains": domains,
            "overlap": {"compared_by": normalization, "domains": list(store.domains), "shared_texts": shared.tolist()},
        },
    )
    characters = sum(domain["totals"]["text_len"] for domain in domains.values())
    repeated = sum(domain["num_duplicates"] for domain in domains.values())
    pairs = int(np.count_nonzero(np.triu(shared, k=1)))
    return (
        f"{sum(store.num_rows):,} rows, {characters:,} characters; {repeated:,} rows repeat another of their domain, "
        f"{pairs} pairs of domains share texts"
    )

"""Stage analyze: what the loaded rows are like, before anything is filtered.

Writes ``statistics.json``: by domain rows, characters, words or tokens, turns, languages, flags (placeholder answers,
refusals and the like), quantiles of every score and the longest rows; duplicates inside domains, and how many texts any
two domains share.  The texts are read once for each kind of score; everything else is computed from the scores.
"""

from __future__ import annotations

import numpy as np

from doremi_mix.atomic import write_json
from doremi_mix.executors import make_executor
from doremi_mix.filtering import analysis_requests
from doremi_mix.row_statistics import describe_rows
from doremi_mix.score_store import ScoreRequest, ScoreStore
from doremi_mix.stages import StageContext


def run(context: StageContext) -> str:
    """Describes what was loaded; returns one line about it."""
    config = context.config
    store = ScoreStore(context.run, make_executor(config, context.run, context.narrator), context.narrator)
    (texts, *others), keys = analysis_requests(config)
    # One pass over the rows for all that is wanted of their texts alone.
    store.ensure(ScoreRequest("text", (*texts.columns, *keys.columns)))
    for request in others:
        store.ensure(request)
    every = [np.ones(num_rows, dtype=bool) for num_rows in store.num_rows]
    statistics = describe_rows(config, store, context.run.stage_path("load"), every)
    write_json(context.folder / "statistics.json", statistics)
    domains = statistics["domains"].values()
    characters = sum(domain["totals"]["text_len"] for domain in domains)
    repeated = sum(domain["num_duplicates"] for domain in domains)
    pairs = int(np.count_nonzero(np.triu(np.array(statistics["overlap"]["shared_texts"]), k=1)))
    return (
        f"{sum(store.num_rows):,} rows, {characters:,} characters; {repeated:,} rows repeat another of their domain, "
        f"{pairs} pairs of domains share texts"
    )

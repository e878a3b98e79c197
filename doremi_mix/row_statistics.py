"""What the loaded rows, or those that a filter kept, are like: counts, languages, quantiles, duplicates, overlaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doremi_mix.config import Config
from doremi_mix.filtering import analysis_requests
from doremi_mix.filters.analysis import PROBABILITIES, describe_domain
from doremi_mix.filters.exact_duplicates import overlap_matrix
from doremi_mix.score_store import ScoreStore
from doremi_mix.stages.load import read_ids

MORE = Mapping[str, Sequence[NDArray[Any]]]


def describe_rows(
    config: Config, store: ScoreStore, load_folder: Path, kept: Sequence[NDArray[np.bool_]], more: MORE | None = None
) -> dict[str, Any]:
    """Describes rows by their scores, which must be there.

    Args:
        config: of the run.
        store: the scores.
        load_folder: for the ids of the longest rows.
        kept: by domain, which rows are meant.
        more: further score columns, by domain.

    Returns:
        ``probabilities`` (of the quantiles), ``domains`` (see ``analysis.describe_domain``, and ``num_duplicates``, the
        rows that repeat another of their domain) and ``overlap`` (how many texts any two domains share).
    """
    requests, keys = analysis_requests(config)
    columns: list[dict[str, NDArray[Any]]] = [{} for _ in store.domains]
    for request in requests:
        for column in request.columns:
            for i, values in enumerate(store.read(request, column)):
                columns[i][column] = values
    for column, by_domain in (more or {}).items():
        for i, values in enumerate(by_domain):
            columns[i][column] = values
    texts = store.read(keys, keys.columns[0])
    shared = overlap_matrix([text[mask] for text, mask in zip(texts, kept, strict=True)])
    domains: dict[str, Any] = {}
    for i, name in enumerate(store.domains):
        ids = read_ids(load_folder, name)
        domains[name] = describe_domain(columns[i], kept[i], ids, config.analyze.num_longest)
        domains[name]["num_duplicates"] = domains[name]["num_rows"] - int(shared[i, i])
    compared_by = keys.columns[0].partition("@")[2]
    overlap = {"compared_by": compared_by, "domains": list(store.domains), "shared_texts": shared.tolist()}
    return {"probabilities": list(PROBABILITIES), "domains": domains, "overlap": overlap}

"""Rejected rows for a person to read: which row, by what rule, why, and its text."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from doremi_mix.errors import DataError, StageNotFinishedError
from doremi_mix.filters.scores import TEXTS
from doremi_mix.run import RunDirectory, read_json
from doremi_mix.stages.load import REJECTIONS, loaded_path


def sample_rejections(
    run: RunDirectory, rule: str | None, domain: str | None, number: int, seed: int
) -> list[dict[str, Any]]:
    """Draws rejected rows for a person to read.

    Returns:
        For each its ``id``, ``domain``, ``rule``, ``value``, ``detail`` and the ``text`` that was judged.

    Raises:
        StageNotFinishedError: nothing was filtered here.
        DataError: the rule or domain rejected nothing.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    command = f"doremi-mix filter --run-dir {shlex.quote(str(run.path))}"
    if run.manifest("filter") is None:
        raise StageNotFinishedError(f"filter has not finished in {run.path}; run: {command}")
    loaded = run.manifest("load")
    if loaded is None or read_json(run.stage_path("filter") / "summary.json")["loaded"] != loaded["fingerprint"]:
        raise StageNotFinishedError(f"filter in {run.path} is older than what was loaded; run: {command}")
    table = pq.read_table(run.stage_path("filter") / f"{REJECTIONS}.parquet")
    for key, wanted in (("rule", rule), ("domain", domain)):
        if wanted is not None:
            found = sorted(set(table.column(key).unique().to_pylist()))
            if wanted not in found:
                raise DataError(f"no rejected row has the {key} {wanted!r}; there are: {', '.join(found) or 'none'}")
            table = table.filter(pc.equal(table.column(key), wanted))
    order = np.sort(np.random.default_rng(seed).permutation(table.num_rows)[:number])
    rows: list[dict[str, Any]] = table.take(order).to_pylist()
    for row in rows:
        row["text"] = _text_at(run.stage_path("load"), row["domain"], row["position"])
    return rows


def _text_at(load_folder: Path, domain: str, position: int) -> str:
    """Reads the text of one row."""
    import pyarrow.parquet as pq

    from doremi_mix.filters.texts import example_texts

    with pq.ParquetFile(loaded_path(load_folder, domain)) as file:
        first = 0
        for number in range(file.num_row_groups):
            count = file.metadata.row_group(number).num_rows
            if position < first + count:
                rows = file.read_row_group(number, columns=list(TEXTS)).slice(position - first, 1)
                return str(example_texts(rows.combine_chunks().to_batches()[0])[0])
            first += count
    raise DataError(
        f"{loaded_path(load_folder, domain)}: has no row at {position}; run the load and filter stages again"
    )

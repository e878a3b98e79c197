"""Stage filter: which of the loaded rows are kept, and why the others are not.

Writes ``<domain>.parquet`` (the kept rows, as load wrote them), ``rejections.parquet`` (id, domain, position, rule,
value, detail), ``clusters/near_duplicates.parquet``, ``statistics.json`` (what was kept is like) and
``summary.json`` (rows before and after, by domain and by rule; who lost rows to whom).  Rows in = kept + rejected.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from doremi_mix.atomic import write_json
from doremi_mix.errors import DataError
from doremi_mix.executors import make_executor
from doremi_mix.filter_steps import FilterWork, Ids, apply_steps
from doremi_mix.filtering import analysis_requests, filter_plan
from doremi_mix.filters.analysis import PROBABILITIES, describe_domain
from doremi_mix.filters.funnel import KEPT, Funnel
from doremi_mix.row_statistics import describe_rows
from doremi_mix.score_store import ScoreStore
from doremi_mix.stages import StageContext
from doremi_mix.stages.load import REJECTIONS, loaded_path, read_summary

if TYPE_CHECKING:
    import pyarrow as pa

NEAR_DUPLICATES = Path("clusters", "near_duplicates.parquet")
CHUNK_ROWS = 65_536


def run(context: StageContext) -> str:
    """Filters what was loaded; returns one line about it."""
    config = context.config
    plan = filter_plan(config.filter)
    load_folder = context.run.stage_path("load")
    store = ScoreStore(context.run, make_executor(config, context.run, context.narrator), context.narrator)
    ids = Ids(load_folder, store.domains, store.num_rows)
    work = FilterWork(config, plan, store, Funnel(store.num_rows), context.narrator, ids)
    notes = list(plan.notes)
    if config.tokenize.tokenizer is None and any(rule.rule == "token_num" for rule in plan.rules):
        notes.append("token_num counts words, for want of a tokenizer (tokenize.tokenizer)")
    for note in notes:
        context.narrator.say(f"  note: {note}")
    apply_steps(work)
    summary = {"loaded": store.loaded, "notes": notes} | summarize(work, read_summary(load_folder))
    _check_left(summary["domains"])
    with (
        context.narrator.track("write", len(store.domains), "domains") as tracker,
        ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
    ):
        writing = pool.map(lambda i: _write_kept(work, load_folder, context.folder, i), range(len(store.domains)))
        # Beside it, since threads that write need the interpreter only now and then.
        _write_rejections(work, context.folder / f"{REJECTIONS}.parquet")
        for _ in writing:
            tracker.advance(1)
    if work.clusters:
        _write_clusters(work, context.folder / NEAR_DUPLICATES)
    write_json(context.folder / "statistics.json", _statistics(work, load_folder))
    write_json(context.folder / "summary.json", summary)
    num_rows, num_kept = sum(store.num_rows), work.funnel.num_kept
    return f"{num_rows:,} rows = {num_kept:,} kept + {num_rows - num_kept:,} rejected"


def summarize(work: FilterWork, loaded: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what became of the rows: by domain, by step, and who lost rows to whom."""
    domains = []
    for domain_id, entry in enumerate(loaded):
        fates = work.funnel.fates[domain_id]
        counts = {"num_rows": len(fates), "num_kept": int(np.count_nonzero(fates == KEPT))}
        domains.append({**entry, **counts, "rejected": work.funnel.rejected_of(domain_id)})
    plan = {key: value for key, value in asdict(work.plan).items() if key != "notes"}
    return {
        "preset": work.config.filter.preset,
        "plan": plan,
        "steps": work.funnel.describe_steps(),
        "domains": domains,
        **work.report,
    }


def _check_left(domains: list[dict[str, Any]]) -> None:
    """Raises DataError when nothing is left of a domain, with what took most of it."""
    empty = [domain for domain in domains if domain["num_kept"] == 0]
    if not empty:
        return
    first = empty[0]
    rules = ", ".join(f"{rule} {count:,}" for rule, count in first["rejected"].items())
    advice = {
        "exact_duplicate": "put it first in filter.priority or loosen filter.exact_duplicates",
        "near_duplicate": "put it first in filter.priority or raise filter.near_duplicates",
        "diversity": "raise filter.num_examples or set filter.per_domain=true",
    }.get(max(first["rejected"], key=first["rejected"].__getitem__), "loosen these rules (filter.rules)")
    others = ", ".join(domain["domain"] for domain in empty[1:])
    raise DataError(
        f"{first['domain']}: none of its {first['num_rows']:,} rows is left after filtering ({rules}); {advice}, or "
        "leave the source out" + (f"; the same holds for {others}" if others else "")
    )


def _write_kept(work: FilterWork, load_folder: Path, folder: Path, domain_id: int) -> None:
    """Writes a domain's kept rows, one row group after the other; a domain that lost nothing shares load's file."""
    import pyarrow.parquet as pq

    name = work.store.domains[domain_id]
    source, target = loaded_path(load_folder, name), loaded_path(folder, name)
    kept = work.funnel.fates[domain_id] == KEPT
    if kept.all():
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            pass
        else:
            return
    first = 0
    with pq.ParquetFile(source, pre_buffer=False) as file:
        schema = file.schema_arrow
        with pq.ParquetWriter(target, schema, compression="zstd", write_statistics=False) as writer:
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, use_threads=False)
                mask = kept[first : first + table.num_rows]
                first += table.num_rows
                if mask.any():
                    writer.write_table(table.filter(_mask(mask)))


def _mask(mask: NDArray[np.bool_]) -> pa.Array:
    import pyarrow as pa

    return pa.array(mask)


def _write_rejections(work: FilterWork, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("id", pa.string()),
            ("domain", pa.string()),
            ("position", pa.int64()),
            ("rule", pa.string()),
            ("value", pa.float64()),
            ("detail", pa.string()),
        ]
    )
    with pq.ParquetWriter(path, schema, compression="zstd", write_statistics=False) as writer:
        for domain_id, fates in enumerate(work.funnel.fates):
            rejected = np.flatnonzero(fates != KEPT)
            for start in range(0, len(rejected), CHUNK_ROWS):
                positions = rejected[start : start + CHUNK_ROWS]
                writer.write_table(_rejections(work, domain_id, positions, schema))


def _rejections(work: FilterWork, domain_id: int, positions: NDArray[np.int64], schema: pa.Schema) -> pa.Table:
    """Makes the table of some rejected rows of a domain, in the order of rows."""
    import pyarrow as pa

    numbers = work.funnel.fates[domain_id][positions]
    values = np.full(len(positions), np.nan)
    details = np.empty(len(positions), dtype=object)
    for number in np.unique(numbers).tolist():
        step, mask = work.funnel.steps[number], numbers == number
        values[mask] = step.values(domain_id, positions[mask])
        details[mask] = step.details(domain_id, positions[mask])
    columns = {
        "id": work.ids.of_domain(domain_id, positions),
        "domain": [work.store.domains[domain_id]] * len(positions),
        "position": positions,
        "rule": [work.funnel.steps[number].name for number in numbers.tolist()],
        "value": pa.array(values, mask=np.isnan(values)),
        "detail": pa.array(details, pa.string()),
    }
    return pa.table(columns, schema=schema)


def _write_clusters(work: FilterWork, path: Path) -> None:
    """Writes the rows that are near another: cluster, id, who stayed, and how like it the row is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for domain_id, clusters in enumerate(work.clusters["cluster"]):
        positions = np.flatnonzero(clusters >= 0)
        survivors = work.clusters["survivor_of"][domain_id][positions]
        similarity = work.clusters["similarity"][domain_id][positions]
        columns = {
            "cluster": clusters[positions],
            "id": pa.array(work.ids.of_domain(domain_id, positions), pa.string()),
            "domain": pa.array([work.store.domains[domain_id]] * len(positions), pa.string()),
            "kept": survivors == positions + work.ids.starts_K1[domain_id],
            "survivor": pa.array(work.ids.take(survivors), pa.string()),
            "similarity": pa.array(similarity, mask=np.isnan(similarity)),
        }
        tables.append(pa.table(columns))
    path.parent.mkdir()
    table = pa.concat_tables(tables).sort_by([("cluster", "ascending"), ("kept", "descending")])
    pq.write_table(table, path, compression="zstd")


def _statistics(work: FilterWork, load_folder: Path) -> dict[str, Any]:
    """Returns what the scores that decided something are like, among the rows that had them and among the kept ones.

    Where the rows were analyzed before, ``kept`` says of the kept ones all that was said of the loaded ones.
    """
    kept = work.funnel.kept()
    every = [np.ones(len(mask), dtype=bool) for mask in kept]
    requests, keys = analysis_requests(work.config)
    if all(work.store.has(request) for request in (*requests, keys)):
        after = describe_rows(work.config, work.store, load_folder, kept, work.scores)
    else:
        after = {"domains": _describe_scores(work, kept)}
    return {"probabilities": list(PROBABILITIES), "scored": {"domains": _describe_scores(work, every)}, "kept": after}


def _describe_scores(work: FilterWork, masks: Sequence[NDArray[np.bool_]]) -> dict[str, Any]:
    return {
        name: describe_domain({column: values[i] for column, values in work.scores.items()}, masks[i], (), 0)
        for i, name in enumerate(work.store.domains)
    }

"""Stage mixture: draw the training set under the token budget.

Writes ``mixture.jsonl`` (the input rows, unchanged, plus their domain), ``rows.npy`` (where each of them comes from:
domain id and row of the loaded or filtered domain, shape [N, 2]), ``ratio.json`` (the contest's form) and
``allocation.json`` (what was asked for and what was drawn).
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from doremi_mix.atomic import write_json
from doremi_mix.config import MIXTURE_WORDS, Config
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import BudgetError, ConfigError
from doremi_mix.fingerprints import rows_stage
from doremi_mix.mixture import allocate, draw_examples, mixture_order, uniform_weights
from doremi_mix.progress import Tracker
from doremi_mix.run import RunDirectory, read_json
from doremi_mix.stages import StageContext
from doremi_mix.stages.load import read_examples_at, read_rows
from doremi_mix.stages.training import available_tokens, open_store, weight_caps
from doremi_mix.stages.weights import mean_tokens, plain_weights, read_weights, weights_from
from doremi_mix.store import TokenStore
from doremi_mix.types import Allocation, Example

BUCKET_ROWS = 8_192
"""Rows that are shuffled in memory at a time; a larger mixture goes through temporary files."""

MAX_BUCKETS = 128
"""Temporary files that are open at a time: macOS allows a process 256.  Beyond a million rows, buckets grow."""

DOMAIN_KEY = "domain"
ROWS = "rows.npy"


def check_budget(config: Config, run: RunDirectory) -> None:
    """Raises BudgetError when no weights could meet the budget, before anything is trained."""
    store = open_store(run)
    if config.mixture.token_budget is not None:
        available = available_tokens(store)
        allocate(uniform_weights(available), available, config.mixture.token_budget, config.mixture.max_epochs)
    weight_caps(config, store)


def run(context: StageContext) -> str:
    """Draws the mixture; returns one line about it."""
    config = context.config.mixture
    if config.token_budget is None:
        raise ConfigError("mixture.token_budget is missing; give it, for example: --set mixture.token_budget=1000000")
    store = open_store(context.run)
    weights = chosen_weights(context, store)
    allocation = allocate(weights, available_tokens(store), config.token_budget, config.max_epochs)
    draws = draw_domains(store, allocation, config.seed)
    positions = mixture_order([len(rows) for rows, _ in draws.values()], config.seed)
    rows_folder = context.run.stage_path(rows_stage(context.config))
    drawn = {name: tokens for name, (_, tokens) in draws.items()}
    total = sum(drawn.values())
    if total == 0:
        raise BudgetError(
            f"token budget {config.token_budget:,} is smaller than the first example of every domain; raise it to a "
            f"few examples per domain or more (an example has about {_mean_tokens(store):,.0f} tokens)"
        )
    with context.narrator.track("mixture", len(positions), "rows") as tracker:
        for key in _free_keys():
            if _write(context.folder, rows_folder, draws, positions, key, tracker):
                break
    if key != DOMAIN_KEY:
        context.narrator.say(f'  some rows have a "{DOMAIN_KEY}" of their own; the domain is written as "{key}"')
    np.save(context.folder / ROWS, _origins(draws, positions))
    write_json(context.folder / "ratio.json", {f"{name}.jsonl": tokens / total for name, tokens in drawn.items()})
    write_json(
        context.folder / "allocation.json",
        {
            "weights": config.weights,
            **_describe(allocation, draws, weights, key, context.config.tokenize.max_example_tokens),
        },
    )
    place = context.run.stage_path("mixture") / "mixture.jsonl"
    return f"{len(positions):,} rows, {total:,} of {config.token_budget:,} tokens, in {place}"


def chosen_weights(context: StageContext, store: TokenStore) -> Mapping[str, float]:
    """Returns the weights that ``mixture.weights`` asks for, and says what the comparison found about them."""
    wanted = context.config.mixture.weights
    if wanted == "best":
        wanted = read_json(context.run.stage_path("compare") / "results.json")["best"]
        context.narrator.say(f"  the best mixture of the comparison: {wanted}")
    elif wanted != "learned":
        _say_losses(context, wanted)
    if wanted == "learned":
        learned = read_weights(context.run)
        _say_verdict(context, learned)
        return learned.domain_weights
    if wanted in MIXTURE_WORDS:
        return plain_weights(wanted, available_tokens(store), context.config.compare.temperature)
    entered = context.config.compare.also.get(wanted)
    return weights_from(Path(entered or wanted), store.domains.names, context.narrator.say, mean_tokens(store))


def _say_losses(context: StageContext, wanted: str) -> None:
    """Warns when the comparison found another mixture reliably better than the one that is asked for."""
    path = context.run.stage_path("compare") / "results.json"
    if not path.exists():
        return
    for pair in read_json(path)["pairs"]:
        average = pair["average"]
        if average["low"] is None:
            continue
        worse, other = (pair["mixture"], pair["baseline"])
        if average["high"] < 0:
            worse, other = other, worse
        if worse == wanted and average["low"] * average["high"] > 0:
            context.narrator.say(
                f"  WARNING: the comparison found {wanted} worse than {other} by {abs(average['estimate']):.4f} nats "
                "per token; draw a better one with: --set mixture.weights=best"
            )
            return


def _say_verdict(context: StageContext, learned: DomainWeights) -> None:
    """Shows the verdict of the comparison on the learned weights; a warning when they lost."""
    if not learned.verdict:
        context.narrator.say(
            "  these weights were not compared with plain mixtures yet; run: doremi-mix compare --run-dir "
            + shlex.quote(str(context.run.path))
        )
        return
    lost = learned.verdict["kind"] == "worse"
    context.narrator.say(f"  {'WARNING: ' if lost else 'verdict: '}{learned.verdict['sentence']}")
    if lost:
        context.narrator.say("  draw a better one with: --set mixture.weights=best")


def draw_domains(store: TokenStore, allocation: Allocation, seed: int) -> dict[str, tuple[NDArray[np.int64], int]]:
    """Draws each domain's share from its training examples.

    Returns:
        By domain, the rows drawn (indices into the loaded domain, in draw order) and their tokens.
    """
    draws = {}
    for domain_id, name in enumerate(store.domains):
        documents = store.document_ids(domain_id)
        tokens = store.example_tokens[documents.start : documents.stop]
        trainable = np.flatnonzero(~store.example_held_out[documents.start : documents.stop])
        drawn = trainable[draw_examples(tokens[trainable], allocation.tokens[name], seed, name)]
        draws[name] = (drawn, int(tokens[drawn].sum()))
    return draws


def _origins(draws: Mapping[str, tuple[NDArray[np.int64], int]], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the domain id and the row of every example of the mixture, in its order, shape [N, 2]."""
    origins_N2 = np.empty((len(positions), 2), dtype=np.int64)
    domain_ids = np.repeat(np.arange(len(draws)), [len(rows) for rows, _ in draws.values()])
    origins_N2[positions, 0] = domain_ids
    origins_N2[positions, 1] = np.concatenate([rows for rows, _ in draws.values()])
    return origins_N2


def read_mixture(
    run: RunDirectory, rows_folder: Path, names: Sequence[str], window: int = 100_000
) -> Iterator[tuple[list[Example], list[int]]]:
    """Reads the examples of the mixture in its order, with their domain ids, in lists of at most ``window``.

    The mixture is shuffled, so each window reads through the domains once; one window is held in memory.

    Args:
        run: whose mixture was drawn.
        rows_folder: of the stage that it was drawn from.
        names: the domains.
        window: examples at a time.
    """
    origins_N2 = np.load(run.stage_path("mixture") / ROWS)
    for start in range(0, len(origins_N2), window):
        part_W2 = origins_N2[start : start + window]
        examples: list[Example | None] = [None] * len(part_W2)
        for domain_id, name in enumerate(names):
            wanted = np.flatnonzero(part_W2[:, 0] == domain_id)
            rows, which = np.unique(part_W2[wanted, 1], return_inverse=True)
            read = [example for chunk in read_examples_at(rows_folder, name, rows) for example in chunk]
            for place, index in zip(wanted.tolist(), which.tolist(), strict=True):
                examples[place] = read[index]
        yield cast("list[Example]", examples), part_W2[:, 0].tolist()


def _free_keys() -> Iterator[str]:
    """Yields names for the domain's key, for rows that have the first ones already (a mixture fed back in, say)."""
    yield DOMAIN_KEY
    yield "doremi_mix_domain"
    yield from (f"doremi_mix_domain_{number}" for number in itertools.count(2))


def _mean_tokens(store: TokenStore) -> float:
    return float(np.mean(store.example_tokens))


def _write(
    folder: Path,
    rows_folder: Path,
    draws: dict[str, tuple[NDArray[np.int64], int]],
    positions: NDArray[np.int64],
    key: str,
    tracker: Tracker,
) -> bool:
    """Writes the rows in the order of their positions; False, with nothing written, when a row already has the key.

    Rows are read once, in file order, and dropped into buckets of consecutive positions, each of which fits in memory.
    """
    bucket_rows = max(BUCKET_ROWS, -(-len(positions) // MAX_BUCKETS))
    num_buckets = max(1, -(-len(positions) // bucket_rows))
    paths = [folder / f".bucket-{i}.tmp" for i in range(num_buckets)]
    buckets: list[IO[bytes]] = [path.open("wb") for path in paths]
    try:
        start = 0
        for name, (rows, _) in draws.items():
            targets = positions[start : start + len(rows)]
            start += len(rows)
            for position, text in _rows_at(rows_folder, name, rows, targets):
                line = _with_domain(text, key, name)
                if line is None:
                    return False
                buckets[position // bucket_rows].write(b"%d\t%s\n" % (position, line))
                tracker.advance(1)
        for file in buckets:
            file.close()
        temporary = folder / ".mixture.jsonl.tmp"
        with temporary.open("wb") as out:
            for path in paths:
                with path.open("rb") as file:
                    numbered = (line.split(b"\t", 1) for line in file)
                    out.writelines(text for _, text in sorted((int(number), text) for number, text in numbered))
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(folder / "mixture.jsonl")
        return True
    finally:
        for file, path in zip(buckets, paths, strict=True):
            file.close()
            path.unlink()


def _rows_at(
    rows_folder: Path, name: str, rows: NDArray[np.int64], targets: NDArray[np.int64]
) -> Iterator[tuple[int, str]]:
    """Yields (position in the mixture, row) for the drawn rows of a domain, in file order."""
    order = np.argsort(rows, kind="stable")
    sorted_rows, sorted_targets = rows[order], targets[order]
    first = 0
    for texts in read_rows(rows_folder, name):
        low, high = np.searchsorted(sorted_rows, [first, first + len(texts)])
        for row, target in zip(sorted_rows[low:high].tolist(), sorted_targets[low:high].tolist(), strict=True):
            yield target, texts[row - first]
        first += len(texts)


def _with_domain(text: str, key: str, name: str) -> bytes | None:
    """Adds the domain as the last key of a row, whose other bytes stay as they are; None if the row has the key."""
    quoted = json.dumps(key)
    # A cheap look first: most rows do not hold the word at all.
    if quoted in text and key in json.loads(text):
        return None
    body = text[:-1].rstrip()
    comma = "" if body == "{" else ","
    return f"{body}{comma}{quoted}:{json.dumps(name, ensure_ascii=False)}}}".encode()


def _describe(
    allocation: Allocation,
    draws: dict[str, tuple[NDArray[np.int64], int]],
    weights: Mapping[str, float],
    key: str,
    max_example_tokens: int | None,
) -> dict[str, Any]:
    total = sum(tokens for _, tokens in draws.values())
    return {
        "unit": "tokens, after the prompt template and with the end token"
        + (f", cut at {max_example_tokens}" if max_example_tokens else ", examples whole"),
        "token_budget": allocation.budget,
        "max_epochs": allocation.max_epochs,
        "drawn_tokens": total,
        "capped_domains": list(allocation.capped),
        "domain_key": key,
        "domains": {
            name: {
                "weight": weights[name],
                "available_tokens": allocation.available_tokens[name],
                "allocated_tokens": allocation.tokens[name],
                "drawn_tokens": tokens,
                "drawn_rows": len(rows),
                "epochs": tokens / allocation.available_tokens[name],
                "share": tokens / total,
            }
            for name, (rows, tokens) in draws.items()
        },
    }

"""What a finished run has to say: the rows of the closing table and the next commands to type."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doremi_mix.config import Config
from doremi_mix.mixture import natural_weights
from doremi_mix.replicas import rounds
from doremi_mix.report.table import make_rows
from doremi_mix.run import CONFIG_FILE, RunDirectory, read_json
from doremi_mix.stages import stage_states
from doremi_mix.stages.training import available_tokens, open_store, read_columns
from doremi_mix.stages.weights import WEIGHTS_FILE, read_weights


def summarize(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Collects the result of a run for ``--json`` and for the table.

    Returns:
        ``run_dir``, ``domain_weights`` (the file), ``pictures``, ``mixture`` (the file or None), ``tokens`` (budget and
        drawn, or None), ``held_out_loss`` (average of reference and proxy), ``largest_update`` (the largest weight that
        a single update of group DRO gave), ``num_seeds``, ``rank_stability``, ``rounds`` (change of the weights in
        each), ``diagnoses``, ``verdict`` (of compare; empty before) and ``domains`` (rows of the table).
    """
    store = open_store(run)
    names = store.domains.names
    available = available_tokens(store)
    weights = run.stage_path("weights")
    mixture = run.stage_path("mixture")
    # A mixture drawn with earlier weights is not part of this result.
    is_current = stage_states(config, run)["mixture"] == "finished"
    allocation = read_json(mixture / "allocation.json") if is_current else None
    columns = ["domain_weights", "excess_loss", "unclipped_excess_loss"]
    # The weights are the last round's; its first seed speaks for all.
    view = [replicas for replicas, result in rounds(config, run) if result is not None][-1][0].run
    path = read_columns(view.stage_path("proxy") / "trajectory.jsonl", names, columns)
    # What the weights come from: the mean over the updates, or the end of the training.
    by_headroom = config.proxy.method == "headroom"
    late = path["unclipped_excess_loss"][-max(1, len(path["excess_loss"]) // 10) :]
    excess_TK = late if by_headroom else path["excess_loss"]
    excess = dict(zip(names, excess_TK.mean(axis=0).tolist(), strict=True))
    product = read_weights(run)
    rows = make_rows(
        natural_weights(available),
        dict(product.domain_weights),
        excess,
        available,
        allocation,
        intervals=product.intervals or None,
        standard_deviation=product.uncertainty.get("standard_deviation") or None,
    )
    return {
        "run_dir": str(run.path),
        "domain_weights": str(weights / WEIGHTS_FILE),
        "pictures": [str(weights / "weights.png"), str(weights / "trajectory.png")],
        "mixture": str(mixture / "mixture.jsonl") if allocation else None,
        "tokens": {key: allocation[key] for key in ("token_budget", "drawn_tokens")} if allocation else None,
        "held_out_loss": {
            stage: read_json(view.stage_path(stage) / "metrics.json")["held_out_loss_average"]
            for stage in ("reference", "proxy")
        },
        "shares_reference": not config.weights.vary_reference,
        "num_seeds": product.uncertainty.get("num_seeds", 1),
        "rank_stability": product.uncertainty.get("rank_stability"),
        "rounds": product.uncertainty.get("rounds", []),
        "diagnoses": list(product.diagnoses),
        "verdict": dict(product.verdict),
        "largest_update": None if by_headroom else _largest_update(path["domain_weights"], names),
        "domains": rows,
    }


def _largest_update(weights_TK: NDArray[np.float64], names: Sequence[str]) -> dict[str, Any]:
    """Returns the largest weight on the path: far above the average, it says how much the average hides."""
    update, domain_id = np.unravel_index(int(weights_TK.argmax()), weights_TK.shape)
    weight = float(weights_TK[update, domain_id])
    return {"domain": names[int(domain_id)], "step": int(update) + 1, "domain_weight": weight}


def describe_certainty(summary: dict[str, Any]) -> list[str]:
    """Says how sure the weights are and whether they help, as far as that is known."""
    lines = []
    changes = summary["rounds"]
    if len(changes) > 1:
        shown = ", ".join(f"{change:.4f}" for change in changes)
        lines.append(f"rounds: the largest change of a weight against the round before was {shown}")
    if summary["num_seeds"] > 1:
        tau = summary["rank_stability"]
        ranks = "" if tau is None else f"; seeds rank the domains alike by Kendall tau {tau:.2f}"
        given = ", given their one reference" if summary["shares_reference"] else ""
        lines.append(
            f"{summary['num_seeds']} seeds: the weights are their mean, intervals are 95 % of that mean{given}{ranks}"
        )
    elif summary["largest_update"] is None:
        lines.append("one run is one draw: another seed gives other weights")
    else:
        largest = summary["largest_update"]
        lines.append(
            f"one run is one draw: on its way, a single update gave {largest['domain']} "
            f"{largest['domain_weight']:.2f} (update {largest['step']}); see trajectory.png"
        )
    lines += [f"diagnosis: {sentence}" for sentence in summary["diagnoses"]]
    verdict = summary["verdict"]
    lines.append(f"verdict: {verdict['sentence']}" if verdict else "verdict: not compared with plain mixtures yet")
    return lines


def next_commands(summary: dict[str, Any]) -> list[str]:
    """Returns what to type next, each with a word on why."""
    run_dir = summary["run_dir"]
    if summary["mixture"] is None:
        budget = min(1_000_000, sum(row["available_tokens"] for row in summary["domains"]))
        first = f"doremi-mix mixture --run-dir {shlex.quote(run_dir)} --set mixture.token_budget={budget}"
        commands = [f"{first}   # draw the training set"]
    else:
        commands = [f"head -n 3 {shlex.quote(summary['mixture'])}   # the training set"]
    run_file = shlex.quote(f"{run_dir}/{CONFIG_FILE}")
    place = shlex.quote(run_dir)
    if summary["num_seeds"] == 1:
        commands.append(f"doremi-mix run {run_file} --run-dir {place} --seeds 3   # how sure are the weights?")
    if not summary["verdict"]:
        commands.append(f"doremi-mix compare --run-dir {place}   # do they help?")
    return commands

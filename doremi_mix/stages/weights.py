"""Stage weights: the average of the trajectory, in every unit, with where it came from.

Writes ``domain_weights.json`` (the product: see ``types.DomainWeights``), ``weights.png`` and ``trajectory.png``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

import doremi_mix
from doremi_mix.mixture import natural_weights
from doremi_mix.report.plots import plot_trajectory, plot_weights
from doremi_mix.run import RunDirectory, read_json, write_json
from doremi_mix.stages import StageContext
from doremi_mix.stages.load import read_summary
from doremi_mix.stages.training import available_tokens, open_store, read_columns
from doremi_mix.store import TokenStore
from doremi_mix.types import DomainWeights

WEIGHTS_FILE = "domain_weights.json"


def run(context: StageContext) -> str:
    """Writes the weights and their pictures; returns one line about them."""
    store = open_store(context.run)
    names = store.domains.names
    learned = read_json(context.run.stage_path("proxy") / "average.json")
    weights = DomainWeights(
        domain_weights=learned,
        reference_weights=read_json(context.run.stage_path("reference") / "weights.json"),
        shares=_shares(learned, store),
        method=context.config.proxy.method,
        settings={
            section: getattr(context.config, section).result_settings()
            for section in ("tokenize", "reference", "proxy")
        },
        tokenizer={
            key: value
            for key, value in read_json(context.run.stage_path("tokenize") / "tokenizer.json").items()
            if key in ("name", "sha256")
        },
        provenance=_provenance(context.run),
    )
    write_json(context.folder / WEIGHTS_FILE, weights.to_dict())
    trajectory = context.run.stage_path("proxy") / "trajectory.jsonl"
    weights_TK = read_columns(trajectory, names, ["domain_weights"])["domain_weights"]
    average_K = np.array([learned[name] for name in names])
    natural = natural_weights(available_tokens(store))
    plot_weights(
        context.folder / "weights.png",
        names,
        natural=[natural[name] for name in names],
        learned=average_K.tolist(),
        uniform=1 / len(names),
    )
    plot_trajectory(context.folder / "trajectory.png", names, np.arange(1, len(weights_TK) + 1), weights_TK, average_K)
    return f"written to {context.run.stage_path('weights') / WEIGHTS_FILE}"


def read_weights(run: RunDirectory) -> DomainWeights:
    """Returns what the stage wrote."""
    return DomainWeights.from_dict(read_json(run.stage_path("weights") / WEIGHTS_FILE))


def _shares(learned: Mapping[str, float], store: TokenStore) -> dict[str, dict[str, float]]:
    """Returns the same mixture as shares of tokens, of packed sequences and of examples.

    A domain's share of examples is its share of tokens over its mean tokens per example, normalized; likewise for
    sequences.
    """

    def in_units_of(tokens_per_unit: Mapping[str, float]) -> dict[str, float]:
        raw = {name: weight / tokens_per_unit[name] for name, weight in learned.items()}
        total = sum(raw.values())
        return {name: value / total for name, value in raw.items()}

    return {
        "token": dict(learned),
        "sequence": in_units_of({s["name"]: s["train"]["tokens"] / s["train"]["sequences"] for s in store.summaries}),
        "example": in_units_of({s["name"]: s["available_tokens"] / s["train"]["documents"] for s in store.summaries}),
    }


def _provenance(run: RunDirectory) -> dict[str, object]:
    import torch
    import transformers

    return {
        "doremi_mix": doremi_mix.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "inputs": {
            domain["domain"]: {
                "sha256": domain["sha256"],
                "num_rows": domain["num_rows"],
                "num_kept": domain["num_kept"],
            }
            for domain in read_summary(run.stage_path("load"))
        },
    }

"""The dataset card of a mixture: what is in it, how it was made, and whether it is known to help."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.exporters.export import one_line, yaml_text

_LOADING = """from datasets import load_dataset

rows = load_dataset("FOLDER_OR_REPOSITORY", split="train")"""


def dataset_card(
    allocation: Mapping[str, Any],
    weights: DomainWeights | None,
    *,
    num_rows: int,
    sha256: str,
    json_columns: tuple[str, ...] = (),
    title: str = "",
    license_id: str | None = None,
) -> str:
    """Returns the README of a dataset folder: metadata for the hub, and what a reader must know.

    Args:
        allocation: what ``allocation.json`` of the mixture holds.
        weights: the weights of the run; None when the mixture was drawn without.
        num_rows: rows of the mixture.
        sha256: of ``mixture.jsonl``.
        json_columns: where values are JSON text.
        title: of the card.
        license_id: as the hub knows it; None leaves it out.
    """
    title = one_line(title) or "A training mixture"
    metadata = {
        "pretty_name": title,
        **({"license": license_id} if license_id else {}),
        "size_categories": [_size_category(num_rows)],
        "tags": ["doremi", "domain-weights", "data-mixture"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    }
    domains: Mapping[str, Mapping[str, Any]] = allocation["domains"]
    learned = weights is not None and all(weights.domain_weights.get(n) == d["weight"] for n, d in domains.items())
    key = allocation["domain_key"]
    parts = [
        f"---\n{yaml_text(metadata)}---",
        f"# {_escaped(title)}",
        f"{num_rows:,} rows, {allocation['drawn_tokens']:,} tokens of {len(domains)} domains, drawn and shuffled by "
        f"doremi-mix. The column `{key}` says which domain a row comes from.",
        _verdict(weights, learned),
        "## Domains",
        _domain_table(domains, weights.intervals if weights is not None and learned else {}),
        "Weights are shares of tokens. Epochs are tokens drawn over tokens available: above 1, rows are repeated.",
        "## How it was made",
        "\n".join(f"- {line}" for line in _making(allocation, weights, learned, sha256)),
    ]
    inputs = weights.provenance.get("inputs") if weights is not None else None
    if inputs:
        parts += ["## Inputs", _input_table(inputs)]
    parts += ["## Columns", "\n".join(f"- {line}" for line in _column_notes(json_columns))]
    parts += ["## Loading", f"```python\n{_LOADING}\n```"]
    if license_id is None:
        parts += [
            "## License",
            "None is stated: the rows keep the licenses of their sources. Look them up before you share this.",
        ]
    return "\n\n".join(parts) + "\n"


def _verdict(weights: DomainWeights | None, learned: bool) -> str:
    """Returns what the comparison found, and whether that is about this mixture."""
    found = str(weights.verdict.get("sentence", "")) if weights is not None else ""
    if learned:
        said = _escaped(found) if found else "these weights were not compared with plain mixtures."
        return f"**Verdict of the comparison:** {said}"
    said = f" What the comparison found of the learned ones: {_escaped(found)}" if found else ""
    return f"**These are not the learned weights.**{said}"


def _domain_table(domains: Mapping[str, Mapping[str, Any]], intervals: Mapping[str, tuple[float, float]]) -> str:
    interval = [["95 % interval"]] if intervals else []
    rows = [["domain", "weight", *(cell for cells in interval for cell in cells), "rows", "tokens", "share", "epochs"]]
    for name, domain in domains.items():
        low_high = [f"{intervals[name][0]:.4f} to {intervals[name][1]:.4f}"] if intervals else []
        rows.append(
            [
                _escaped(name),
                f"{domain['weight']:.6g}",
                *low_high,
                f"{domain['drawn_rows']:,}",
                f"{domain['drawn_tokens']:,}",
                f"{domain['share']:.4f}",
                f"{domain['epochs']:.2f}",
            ]
        )
    return _table(rows)


def _input_table(inputs: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [["domain", "rows", "kept", "sha256"]]
    for name, entry in inputs.items():
        rows.append([_escaped(name), f"{entry['num_rows']:,}", f"{entry['num_kept']:,}", f"`{entry['sha256']}`"])
    return _table(rows)


def _table(rows: list[list[str]]) -> str:
    """Returns a Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def _making(allocation: Mapping[str, Any], weights: DomainWeights | None, learned: bool, sha256: str) -> list[str]:
    """Returns the facts of how the mixture came about, without the paths of the machine it was made on."""
    lines = []
    if weights is not None and learned:
        seeds = weights.uncertainty.get("num_seeds", 1)
        lines.append(f"Weights: learned by {_escaped(weights.method or 'an unknown method')}, seeds: {seeds}.")
    else:
        word = Path(str(allocation["weights"])).name
        best = weights.verdict.get("best") if weights is not None and word == "best" else None
        which = f"the best mixture of the comparison, {best}" if best else word
        lines.append(f"Weights: {_escaped(which)}.")
    lines.append(
        f"Budget: {allocation['token_budget']:,} tokens ({_escaped(allocation['unit'])}), no domain more than "
        f"{allocation['max_epochs']:g} times."
    )
    if allocation["capped_domains"]:
        lines.append(f"Cut by that cap: {', '.join(map(_escaped, allocation['capped_domains']))}.")
    if weights is not None and weights.tokenizer:
        name = Path(str(weights.tokenizer.get("name", ""))).name or "unnamed"
        digest = f", sha256 `{weights.tokenizer['sha256']}`" if "sha256" in weights.tokenizer else ""
        lines.append(f"Tokenizer that counted: {_escaped(name)}{digest}.")
    if weights is not None:
        versions = [f"{name} {v}" for name, v in weights.provenance.items() if isinstance(v, str)]
        if versions:
            lines.append(f"Versions: {_escaped(', '.join(versions))}.")
    lines.append(f"Made from `mixture.jsonl`, sha256 `{sha256}`.")
    return lines


def _column_notes(json_columns: tuple[str, ...]) -> list[str]:
    notes = ["The columns are those of all sources; what a row does not have is null."]
    if json_columns:
        listed = ", ".join(map(_escaped, json_columns[:20])) + (
            f" and {len(json_columns) - 20} more" if len(json_columns) > 20 else ""
        )
        notes.append(f"JSON text, because the rows differ in its type (read it with `json.loads`): {listed}.")
    return notes


def _size_category(num_rows: int) -> str:
    """Returns the hub's word for a number of rows."""
    steps = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    place = next((i for i in range(len(steps)) if num_rows < 10 ** (i + 3)), len(steps))
    if place == 0:
        return "n<1K"
    return f"n>{steps[-1]}" if place == len(steps) else f"{steps[place - 1]}<n<{steps[place]}"


def _escaped(text: str) -> str:
    """Returns text that Markdown shows as it is, in one line and in one cell of a table."""
    return re.sub(r"([\\`*_\[\]<>|&~$#])", r"\\\1", one_line(text))

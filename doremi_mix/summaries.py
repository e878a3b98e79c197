"""ROUGE-L of a written summary, and SummScreenFD's rows: what ``benchmark_tasks/scrolls_summscreenfd.yaml`` calls.

lm-eval's own task of that name downloads its metric as code and runs it.  This is the same metric from the rouge_score
package, with one number per item.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any


@functools.cache
def _make_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(summary: str, references: Sequence[str]) -> float:
    """Returns the ROUGE-L F-measure against the reference that fits best, in percent.

    Args:
        summary: what the model wrote.
        references: the summaries that it may match.

    Reference:
        The SCROLLS benchmark, https://arxiv.org/abs/2201.03533.
    """
    scorer = _make_scorer()
    return 100.0 * max(float(scorer.score(reference, summary)["rougeL"].fmeasure) for reference in references)


def score_summary(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Scores one item for lm-eval (``process_results``)."""
    return {"rougeL": rouge_l(results[0], document["outputs"])}


def merge_references(dataset: Any) -> Any:
    """Makes one row of the rows with one id, which differ in their reference summary (``process_docs``)."""
    outputs: dict[str, list[str]] = {}
    rows = []
    for row, (name, output) in enumerate(zip(dataset["id"], dataset["output"], strict=True)):
        if name not in outputs:
            rows.append(row)
        outputs.setdefault(name, []).append(output)
    merged = dataset.select(rows).remove_columns("output")
    return merged.add_column("outputs", list(outputs.values()))

"""The table of scores: which columns there are, which pass over the rows computes them, and what of a row it reads.

A family is a set of columns that one pass computes.  Every family is a function of single rows, so that any number of
processes may share the rows and come to the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

    from doremi_mix.filters.exact_duplicates import Normalization

Scorer = Callable[["pa.RecordBatch"], Mapping[str, NDArray[Any]]]
"""Takes rows (columns as in load's files) and returns score columns, one value or one vector per row."""

TEXTS = ("instruction", "input", "output", "history")

WHOLE_TEXTS = (*TEXTS, "system")

TEXT_KEY = "text_key@"
"""Columns of the family ``text`` that hold a key of the whole text; what follows says how texts are normalized."""


@dataclass(frozen=True, slots=True)
class Family:
    """One pass over rows.

    Attributes:
        make: makes its scorer from settings (plain values) and the names of the columns that are wanted.
        reads: the columns of a row that it reads.
        version: raised when it comes to other values for the same settings.
        max_unit_rows: rows of one piece of work at most; small where a row takes long, so that a kill loses little.
        uses_gpu: whether it runs a model.
    """

    make: Callable[[Mapping[str, Any], Sequence[str]], Scorer]
    reads: tuple[str, ...] = TEXTS
    version: int = 1
    max_unit_rows: int = 65_536
    uses_gpu: bool = False


def _make_text_scorer(_settings: Mapping[str, Any], columns: Sequence[str]) -> Scorer:
    from doremi_mix.filters.exact_duplicates import text_keys
    from doremi_mix.filters.text_scores import score_texts

    keys = [column for column in columns if column.startswith(TEXT_KEY)]
    others = [column for column in columns if not column.startswith(TEXT_KEY)]

    def score(batch: pa.RecordBatch) -> dict[str, NDArray[Any]]:
        scores = score_texts(batch, others)
        for column in keys:
            scores[column] = text_keys(whole_texts(batch), cast("Normalization", column.removeprefix(TEXT_KEY)))
        return scores

    return score


def _make_word_list_scorer(settings: Mapping[str, Any], columns: Sequence[str]) -> Scorer:
    from doremi_mix.filters.text_scores import flagged_words_ratio
    from doremi_mix.filters.texts import example_texts

    words = frozenset(settings["words"])
    return lambda batch: {columns[0]: flagged_words_ratio(example_texts(batch), words)}


def _make_language_scorer(_settings: Mapping[str, Any], _columns: Sequence[str]) -> Scorer:
    from doremi_mix.filters.languages import score_languages
    from doremi_mix.filters.texts import example_texts

    return lambda batch: score_languages(example_texts(batch))


def _make_token_counter(settings: Mapping[str, Any], _columns: Sequence[str]) -> Scorer:
    from doremi_mix.filters.texts import example_texts
    from doremi_mix.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(settings["tokenizer"], trust_remote_code=settings["trust_remote_code"])

    def count(batch: pa.RecordBatch) -> dict[str, NDArray[Any]]:
        ids = tokenizer.encode_batch(example_texts(batch).to_pylist())
        return {"num_token": np.fromiter(map(len, ids), dtype=np.int32, count=len(ids))}

    return count


def _make_signature_scorer(settings: Mapping[str, Any], _columns: Sequence[str]) -> Scorer:
    from doremi_mix.filters.near_duplicates import signatures

    return lambda batch: {"signature": signatures(whole_texts(batch), **settings)}


def _make_ngram_embedder(settings: Mapping[str, Any], _columns: Sequence[str]) -> Scorer:
    from doremi_mix.filters.embeddings import ngram_embeddings
    from doremi_mix.filters.texts import example_texts

    return lambda batch: {"embedding": ngram_embeddings(example_texts(batch), seed=settings["seed"])}


def _make_model_embedder(settings: Mapping[str, Any], _columns: Sequence[str]) -> Scorer:
    from doremi_mix.filters.embeddings import ModelEmbedder
    from doremi_mix.filters.texts import example_texts

    embedder = ModelEmbedder(**_without_contents(settings))
    return lambda batch: {"embedding": embedder.embed(example_texts(batch))}


def _make_model_scorer(settings: Mapping[str, Any], columns: Sequence[str]) -> Scorer:
    from doremi_mix.filters.model_scores import ModelScorer
    from doremi_mix.tokens import Template

    given = _without_contents(settings)
    scorer = ModelScorer(**{**given, "template": Template(**given["template"])})
    return lambda batch: scorer.score(batch, columns)


def _without_contents(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings without the hashes that only tell one state of a model from another."""
    return {key: value for key, value in settings.items() if key != "contents"}


def _make_foreign_scorer(settings: Mapping[str, Any], _columns: Sequence[str]) -> Scorer:
    from doremi_mix.filters.data_juicer import ForeignScorer

    return ForeignScorer(settings["name"], settings["arguments"])


FAMILIES: Mapping[str, Family] = {
    "text": Family(_make_text_scorer, reads=WHOLE_TEXTS),
    "words": Family(_make_word_list_scorer),
    "language": Family(_make_language_scorer),
    "tokens": Family(_make_token_counter),
    "signature": Family(_make_signature_scorer, reads=WHOLE_TEXTS),
    "ngrams": Family(_make_ngram_embedder),
    "embedding": Family(_make_model_embedder, max_unit_rows=2_048, uses_gpu=True),
    "model": Family(_make_model_scorer, reads=WHOLE_TEXTS, max_unit_rows=512, uses_gpu=True),
    "foreign": Family(_make_foreign_scorer, reads=(*TEXTS, "system", "row"), max_unit_rows=4_096),
}


def whole_texts(batch: pa.RecordBatch) -> pa.Array:
    """Returns all of an example that is trained on: the system prompt, where there is one, above the text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from doremi_mix.filters.texts import example_texts

    texts, systems = example_texts(batch), pc.fill_null(batch.column("system"), "")
    if pc.max(pc.binary_length(systems)).as_py() in (0, None):
        return texts
    joined = pc.binary_join_element_wise(systems.cast(texts.type), texts, pa.scalar("\n", texts.type))
    return pc.if_else(pc.equal(systems, ""), texts, joined)


def read_words(path: Path) -> tuple[str, ...]:
    """Returns the words of a word list: one a line, in lower case, without blank lines."""
    lines = (line.strip().lower() for line in path.read_text(encoding="utf-8").splitlines())
    return tuple(sorted({line for line in lines if line}))

"""The data of a fine-tune: examples under a token budget, as files; sequences made of them; which step sees which.

Files of a folder::

    tokens.bin       ids of all examples in mixture order, uint16 where the vocabulary fits, else uint32
    loss_mask.bin    1 where the loss is taken, uint8
    offsets.npy      example e holds the tokens from [e] to [e + 1]; of blocks, what they hold of it
    domain_ids.npy   the domain of each example
    examples.json    counts; written last, so that it says that the others are complete

Axes: E examples, S sequences, B sequences in a batch, T tokens of the longest sequence of a batch.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from doremi_mix.atomic import write_json
from doremi_mix.errors import DataError
from doremi_mix.packing import pack
from doremi_mix.store import ArrayWriter
from doremi_mix.token_files import LOSS_MASK, TOKENS, TokenFiles, ranges, token_type_of
from doremi_mix.tokenizer import Tokenizer
from doremi_mix.tokens import EncodedExamples, Template, encode_examples, truncate
from doremi_mix.types import Example

Packing = Literal["none", "documents", "blocks"]

EXAMPLES = "examples.json"
OFFSETS = "offsets.npy"
DOMAIN_IDS = "domain_ids.npy"

EMPTY_QUERY = "empty query"
PLAIN_TEXT = "plain text"
EMPTY_OUTPUT = "empty output"
REMAINDER = "remainder of a group"
OVER_BUDGET = "over budget"
_REASONS = (EMPTY_QUERY, PLAIN_TEXT, EMPTY_OUTPUT, REMAINDER, OVER_BUDGET)

_GROUP_SIZE = 1_000
"""Rows that are tokenized at a time.  No block spans two groups, so this is part of what blocks are: the contest's
trainer cuts them inside ``datasets.Dataset.map``, which hands it 1,000 rows at a time."""
_WIDTH_MULTIPLE = 8
"""Batches have a multiple of so many tokens, which kernels like."""


@dataclass(frozen=True, slots=True)
class ExampleCounts:
    """What became of the rows of a mixture.

    Attributes:
        num_rows: rows that were read; each of them is kept or skipped.
        num_kept: examples to train on; of blocks, those with a token in one.
        skipped: rows that are not, by reason; a reason that never occurred is left out.
        num_tokens: of the kept examples, after template and truncation: what the budget counts; of blocks, all theirs.
        num_loss_tokens: of these, the ones whose loss is taken: those of responses and end tokens, but not the first of
            a plain text or of a block.
        num_truncated: kept examples that were cut; of blocks, those that go on after the last one.
        num_tokens_by_domain: ``num_tokens`` by domain id; a domain without any is left out.
    """

    num_rows: int
    num_kept: int
    skipped: Mapping[str, int]
    num_tokens: int
    num_loss_tokens: int
    num_truncated: int
    num_tokens_by_domain: Mapping[int, int]

    def __post_init__(self) -> None:
        if self.num_rows != self.num_kept + sum(self.skipped.values()):
            raise ValueError(f"{self.num_rows} rows are not {self.num_kept} kept and {dict(self.skipped)} skipped")


def write_examples(
    batches: Iterable[tuple[Sequence[Example], Sequence[int]]],
    folder: Path,
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_example_tokens: int,
    token_budget: int | None,
    skip_empty_query: bool,
    packing: Packing = "none",
    advance: Callable[[int], None] = lambda num_rows: None,  # noqa: ARG005 (the argument's name is documentation)
) -> ExampleCounts:
    """Tokenizes the first examples that fit a token budget.

    Examples are taken in order for as long as their tokens, prompt and end tokens included, sum to at most the budget.
    The first one that would exceed it ends the data: nothing after it is taken, shorter as it may be.  Rows without a
    query or an output are passed over, and cost nothing.

    Blocks are made as the contest's trainer makes them: the examples of a group of 1,000 rows, the ones passed over
    included, are laid end to end, whole, and cut into blocks; what is left at the end of a group is dropped.  Blocks
    are then taken as examples are above, and their tokens alone are written.

    One group of examples is held in memory at a time, and one of the batches.

    Args:
        batches: examples and the domain id of each, in the order of the mixture, in lists of any length.
        folder: an existing folder; what is left in it of an unfinished attempt is overwritten.
        tokenizer: of the model to train.
        template: how an example is written down.
        max_example_tokens: where an example is cut, prompt and response in proportion (see ``tokens.truncate``); of
            blocks, their length.
        token_budget: tokens at most; ``None`` takes all examples.
        skip_empty_query: pass over plain text, which has no query at all, as over an empty one.
        packing: the form of the sequences that will be made of the examples.
        advance: is told the number of rows after each group.

    Returns:
        The counts, as they are in ``examples.json``.

    Raises:
        DataError: no example is left to train on.
    """
    (folder / EXAMPLES).unlink(missing_ok=True)
    skipped: Counter[str] = Counter()
    num_rows = 0
    block_size = max_example_tokens if packing == "blocks" else None
    with _Writer(folder, tokenizer.vocab_size, token_budget, block_size) as writer:
        for group, domain_ids_G in _groups(batches):
            num_rows += len(group)
            end = 0  # of the rows that the budget reaches
            if not writer.is_full:
                reasons = [_reason_to_skip(example, skip_empty_query=skip_empty_query) for example in group]
                usable = [i for i, reason in enumerate(reasons) if reason is None]
                encoded = encode_examples([group[i] for i in usable], tokenizer, template)
                if block_size is None:
                    encoded = truncate(encoded, max_example_tokens)
                left = usable[writer.append(encoded, domain_ids_G[usable]) :]
                end = left[0] if writer.is_full and left else len(group)
                skipped.update(reason for reason in reasons[:end] if reason is not None)
                skipped[REMAINDER] += 0 if writer.is_full else len(left)
            skipped[OVER_BUDGET] += len(group) - end
            advance(len(group))
    counts = writer.counts(num_rows, {reason: skipped[reason] for reason in _REASONS if skipped[reason]})
    if not counts.num_kept:
        raise DataError(_nothing_kept(counts, max_example_tokens))
    settings = {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id}
    write_json(folder / EXAMPLES, {**asdict(counts), **settings})
    return counts


def _groups(
    batches: Iterable[tuple[Sequence[Example], Sequence[int]]],
) -> Iterator[tuple[list[Example], NDArray[np.int64]]]:
    """Yields the rows in groups of ``_GROUP_SIZE``, however long the batches are."""
    rows = ((example, domain_id) for batch in batches for example, domain_id in zip(*batch, strict=True))
    while group := list(itertools.islice(rows, _GROUP_SIZE)):
        yield [example for example, _ in group], np.array([domain_id for _, domain_id in group], dtype=np.int64)


def _nothing_kept(counts: ExampleCounts, block_size: int) -> str:
    found = ", ".join(f"{count:,} {reason}" for reason, count in counts.skipped.items()) or "there are none"
    remedy = "give rows with a question and an answer, or a larger token budget"
    if REMAINDER in counts.skipped and OVER_BUDGET not in counts.skipped:
        remedy = (
            f"a group of {_GROUP_SIZE:,} rows must fill a block of {block_size:,} tokens: give more or longer rows, or "
            f"choose another packing"
        )
    return f"no example to fine-tune on: expected at least 1 of {counts.num_rows:,} rows, got 0 ({found}); {remedy}"


def is_complete(folder: Path) -> bool:
    """Says whether ``write_examples`` came to its end in a folder."""
    return (folder / EXAMPLES).exists()


def remove_examples(folder: Path) -> None:
    """Deletes what ``write_examples`` wrote; stopped in between, what is left does not pass for complete."""
    (folder / EXAMPLES).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _reason_to_skip(example: Example, *, skip_empty_query: bool) -> str | None:
    if example.instruction is None:
        if skip_empty_query:
            return PLAIN_TEXT
    elif not example.instruction and not example.input:
        return EMPTY_QUERY
    return None if example.output else EMPTY_OUTPUT


class _Writer:
    """Writes examples, or blocks cut from them, until one does not fit the budget.

    Attributes:
        is_full: whether an example or a block was refused.
    """

    def __init__(self, folder: Path, vocab_size: int, token_budget: int | None, block_size: int | None) -> None:
        self.is_full = False
        self._token_budget = token_budget
        self._block_size = block_size
        self._token_type = token_type_of(vocab_size)
        self._num_kept = self._num_tokens = self._num_loss_tokens = self._num_truncated = 0
        self._num_tokens_by_domain: Counter[int] = Counter()
        self._tokens = (folder / TOKENS).open("wb")
        self._loss_mask = (folder / LOSS_MASK).open("wb")
        self._offsets = ArrayWriter(folder / OFFSETS, np.int64)
        self._offsets.append(np.zeros(1))  # where the first example starts
        self._domain_ids = ArrayWriter(folder / DOMAIN_IDS, np.int64)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with closing(self._tokens), closing(self._loss_mask), closing(self._offsets), closing(self._domain_ids):
            pass

    def append(self, encoded: EncodedExamples, domain_ids_E: NDArray[np.int64]) -> int:
        """Adds what comes before the first example or block that does not fit the budget.

        Returns:
            How many examples have a token in what was added.
        """
        span_offsets = encoded.offsets  # spans are what is taken or refused as a whole: examples or blocks
        if self._block_size is not None:
            span_offsets = np.arange(0, encoded.offsets[-1] + 1, self._block_size)
        num_spans = len(span_offsets) - 1
        if self._token_budget is not None:
            left = self._token_budget - self._num_tokens
            num_spans = int(np.searchsorted(span_offsets[1:], left, side="right"))
            self.is_full = num_spans < len(span_offsets) - 1
        num_tokens = int(span_offsets[num_spans])
        num_kept = int(np.searchsorted(encoded.offsets[:-1], num_tokens))
        if not num_kept:
            return 0
        offsets = np.minimum(encoded.offsets[: num_kept + 1], num_tokens)
        lengths_E = np.diff(offsets)
        loss_mask_N = np.ascontiguousarray(encoded.loss_mask[:num_tokens], dtype=np.uint8)
        self._tokens.write(encoded.token_ids[:num_tokens].astype(self._token_type).data)
        self._loss_mask.write(loss_mask_N.data)
        self._offsets.append(self._num_tokens + offsets[1:])
        self._domain_ids.append(domain_ids_E[:num_kept])
        self._num_kept += num_kept
        self._num_tokens += num_tokens
        # The first token of a span has no predecessor that could predict it.
        first_tokens_mask = loss_mask_N[span_offsets[:num_spans]]
        self._num_loss_tokens += int(loss_mask_N.sum(dtype=np.int64) - first_tokens_mask.sum(dtype=np.int64))
        self._num_truncated += int((lengths_E < encoded.num_tokens[:num_kept]).sum())
        domain_ids, which = np.unique(domain_ids_E[:num_kept], return_inverse=True)
        totals = np.bincount(which, weights=lengths_E).astype(np.int64)
        self._num_tokens_by_domain.update(dict(zip(domain_ids.tolist(), totals.tolist(), strict=True)))
        return num_kept

    def counts(self, num_rows: int, skipped: Mapping[str, int]) -> ExampleCounts:
        """Returns what was added, of so many rows."""
        return ExampleCounts(
            num_rows=num_rows,
            num_kept=self._num_kept,
            skipped=skipped,
            num_tokens=self._num_tokens,
            num_loss_tokens=self._num_loss_tokens,
            num_truncated=self._num_truncated,
            num_tokens_by_domain=dict(sorted(self._num_tokens_by_domain.items())),
        )


class ExampleStore:
    """Reads what ``write_examples`` wrote; opening one reads no tokens.

    Attributes:
        counts: what became of the rows.
        vocab_size: one more than the largest token id.
        pad_id: what fills the end of a sequence.
        offsets: example e holds the tokens from [e] to [e + 1], shape [E + 1].
        lengths_E: tokens of each example.
        domain_ids_E: the domain of each example.
        files: its tokens and their loss mask.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the files in a folder.

        Raises:
            DataError: they are not complete, or one is damaged.
        """
        path = folder / EXAMPLES
        if not path.is_file():
            raise DataError(f"{path}: the fine-tune's data are not complete: expected this file, got none; write again")
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.vocab_size: int = content.pop("vocab_size")
        self.pad_id: int = content.pop("pad_id")
        by_domain = {int(domain_id): count for domain_id, count in content.pop("num_tokens_by_domain").items()}
        self.counts = ExampleCounts(**content, num_tokens_by_domain=by_domain)
        self.offsets: NDArray[np.int64] = np.load(folder / OFFSETS, mmap_mode="r")
        self.lengths_E = np.diff(np.asarray(self.offsets))
        self.domain_ids_E: NDArray[np.int64] = np.load(folder / DOMAIN_IDS, mmap_mode="r")
        self.files = TokenFiles(folder, token_type_of(self.vocab_size), self.counts.num_tokens, "write it again")

    def __len__(self) -> int:
        return len(self.domain_ids_E)


class SequenceStore:
    """The sequences that a fine-tune sees, each made of examples.

    - ``none``: an example is a sequence.
    - ``documents``: whole examples, best-fit-decreasing; each attends to itself alone and has positions from 0.
    - ``blocks``: the tokens, which were written as whole blocks of ``max_tokens``, are cut at the blocks' borders,
      wherever examples end.  Within a block all tokens attend to all before them, across examples, and predict the
      next wherever its loss counts, be it the first of the next example (of a plain text, that is: the first of a
      prompt never counts).  The first token of a block is predicted by none.

    Attributes:
        num_sequences: S.
        lengths_S: tokens of each sequence, without padding.
    """

    def __init__(self, examples: ExampleStore, packing: Packing, max_tokens: int) -> None:
        """Makes sequences; reads no tokens.

        Args:
            examples: what they are made of.
            packing: how; ``blocks`` takes examples that were written for it.
            max_tokens: of a sequence.

        Raises:
            ValueError: an example is longer than ``max_tokens`` and would have to be cut, or the examples are not whole
                blocks of ``max_tokens``.
        """
        self._examples = examples
        self._packing = packing
        self._max_tokens = max_tokens
        lengths_E = examples.lengths_E
        if packing == "blocks":
            num_blocks, num_left = divmod(int(examples.offsets[-1]), max_tokens)
            if num_left:
                raise ValueError(f"{examples.offsets[-1]} tokens are no whole number of blocks of {max_tokens}")
            # Spans are what is read in one piece: an example, or here a block.
            self._span_offsets = np.arange(num_blocks + 1, dtype=np.int64) * max_tokens
        else:
            if lengths_E.max() > max_tokens:
                raise ValueError(f"an example has {lengths_E.max()} tokens, more than a sequence of {max_tokens}")
            self._span_offsets = examples.offsets
        if packing == "documents":
            self._sequence_offsets, self._sequence_spans = pack(lengths_E, max_tokens)
        else:
            self._sequence_offsets = np.arange(len(self._span_offsets), dtype=np.int64)
            self._sequence_spans = self._sequence_offsets[:-1]
        self.lengths_S = np.add.reduceat(np.diff(self._span_offsets)[self._sequence_spans], self._sequence_offsets[:-1])

    @property
    def num_sequences(self) -> int:
        """How many there are."""
        return len(self.lengths_S)

    def num_loss_tokens(self) -> NDArray[np.int64]:
        """Counts the labels of each sequence, shape [S]; reads the loss mask once."""
        loss_mask_N = self._examples.files.loss_mask_N
        starts, end = self._span_offsets[:-1], int(self._span_offsets[-1])
        labels = np.add.reduceat(loss_mask_N[:end], starts, dtype=np.int64) - loss_mask_N[starts]
        return np.add.reduceat(labels[self._sequence_spans], self._sequence_offsets[:-1])

    def batch(self, sequence_ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Reads sequences, padded to the longest of them, rounded up to a multiple of 8, or to ``max_tokens``.

        Args:
            sequence_ids: ids of sequences, in any order, shape [B].

        Returns:
            ``input_ids_BT``, ``labels_BT`` (the token that each position predicts, or -100), ``position_ids_BT`` and
            ``document_ids_BT``, as of ``store.Batch``, and ``domain_ids_BT``: the domain of what each position predicts
            (any domain where it predicts nothing).

        Raises:
            IndexError: there is no such sequence.
        """
        ids_B = np.asarray(sequence_ids, dtype=np.int64)
        if len(ids_B) and not 0 <= ids_B.min() <= ids_B.max() < self.num_sequences:
            raise IndexError(f"sequence ids must be from 0 to {self.num_sequences - 1}, got {ids_B}")
        longest = int(self.lengths_S[ids_B].max(initial=0))
        width = min(-(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE, self._max_tokens)
        first = self._sequence_offsets[ids_B]
        num_spans_B = self._sequence_offsets[ids_B + 1] - first
        spans = self._sequence_spans[ranges(first, num_spans_B)]
        starts = self._span_offsets[spans]
        lengths = self._span_offsets[spans + 1] - starts
        layout = self._examples.files.lay_out(starts, lengths, num_spans_B, width, self._examples.pad_id)
        return {**layout._asdict(), "domain_ids_BT": self._domain_ids(spans, num_spans_B, layout.document_ids_BT)}

    def _domain_ids(
        self, spans: NDArray[np.int64], num_spans_B: NDArray[np.int64], document_ids_BT: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        """Returns the domain of the token after each position."""
        if self._packing == "blocks":
            following = self._span_offsets[spans][:, None] + np.arange(1, document_ids_BT.shape[1] + 1)
            last = len(self._examples) - 1
            examples = np.searchsorted(self._examples.offsets[1:], following, side="right").clip(max=last)
        else:
            first_B = np.cumsum(num_spans_B) - num_spans_B
            examples = spans[first_B[:, None] + document_ids_BT.clip(min=0)]
        domain_ids_BT: NDArray[np.int64] = np.asarray(self._examples.domain_ids_E)[examples]
        return domain_ids_BT

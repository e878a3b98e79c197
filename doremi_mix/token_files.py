"""Token ids and their loss mask in mapped files, and how spans of them become the rows of a batch.

Axes: N tokens of the files, B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doremi_mix.errors import DataError
from doremi_mix.packing import to_offsets

IGNORE_INDEX = -100
TOKENS = "tokens.bin"
LOSS_MASK = "loss_mask.bin"


class Layout(NamedTuple):
    """Spans of tokens, laid out as rows of T tokens.

    Attributes:
        input_ids_BT: token ids.
        labels_BT: the token that each position predicts: the next of the same span where its loss counts, else -100.
        position_ids_BT: positions, from 0 in every span; 0 on padding.
        document_ids_BT: 0, 1, 2, ... by span of the row, -1 on padding.
    """

    input_ids_BT: NDArray[np.int64]
    labels_BT: NDArray[np.int64]
    position_ids_BT: NDArray[np.int64]
    document_ids_BT: NDArray[np.int32]


class TokenFiles:
    """The files ``tokens.bin`` and ``loss_mask.bin`` of a folder, mapped: all tokens, one after the other.

    Attributes:
        tokens_N: their ids.
        loss_mask_N: 1 where the loss is taken.
    """

    def __init__(self, folder: Path, token_type: np.dtype[np.unsignedinteger], num_tokens: int, remedy: str) -> None:
        """Maps the files.

        Args:
            folder: where they are.
            token_type: of the ids.
            num_tokens: how many there must be.
            remedy: what to do about damaged files, for the message.

        Raises:
            DataError: a file has another size.
        """
        self.tokens_N = _map_file(folder / TOKENS, token_type, num_tokens, remedy)
        self.loss_mask_N = _map_file(folder / LOSS_MASK, np.dtype(np.uint8), num_tokens, remedy)

    def lay_out(
        self,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        num_spans_B: NDArray[np.int64],
        width: int,
        pad_id: int,
    ) -> Layout:
        """Reads spans of the tokens into rows; to a row, each of its spans is a document of its own.

        Args:
            starts: where each span starts.
            lengths: its tokens, at least 1.
            num_spans_B: spans of each row, which take the spans in order.
            width: tokens of a row, T; what the spans do not fill is padding.
            pad_id: the token of the padding.
        """
        source = ranges(starts, lengths)
        ids = self.tokens_N[source].astype(np.int64)
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
        is_last = np.zeros(len(ids), dtype=bool)
        is_last[np.cumsum(lengths) - 1] = True
        # Position t predicts t + 1, if that is in the same span and its loss counts.
        predicts = np.flatnonzero((self.loss_mask_N[source[1:]] == 1) & ~is_last[:-1])
        labels[predicts] = ids[predicts + 1]

        shape = (len(num_spans_B), width)
        row = np.repeat(np.arange(len(num_spans_B)), num_spans_B)
        first_in_row = np.repeat(np.cumsum(num_spans_B) - num_spans_B, num_spans_B)
        before = np.cumsum(lengths) - lengths
        target = ranges(row * width + before - before[first_in_row], lengths)
        span_in_row = np.arange(len(starts)) - first_in_row
        return Layout(
            input_ids_BT=_scattered(shape, target, ids, pad_id),
            labels_BT=_scattered(shape, target, labels, IGNORE_INDEX),
            position_ids_BT=_scattered(shape, target, ranges(np.zeros_like(lengths), lengths), 0),
            document_ids_BT=_scattered(shape, target, np.repeat(span_in_row, lengths), -1).astype(np.int32),
        )


def token_type_of(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Returns the type that the ids of a vocabulary are written in."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _map_file(
    path: Path, token_type: np.dtype[np.unsignedinteger], num_tokens: int, remedy: str
) -> NDArray[np.unsignedinteger]:
    expected, got = num_tokens * token_type.itemsize, path.stat().st_size
    if got != expected:
        raise DataError(f"{path}: the token store is damaged: expected {expected:,} bytes, got {got:,}; {remedy}")
    mapped: NDArray[np.unsignedinteger] = np.memmap(path, dtype=token_type, mode="r")
    return mapped


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns start, start + 1, ... of each range, one range after the other."""
    before = to_offsets(lengths)
    return np.arange(before[-1]) + np.repeat(starts - before[:-1], lengths)


def _scattered(
    shape: tuple[int, int], target: NDArray[np.int64], values: NDArray[np.int64], fill: int
) -> NDArray[np.int64]:
    array = np.full(shape, fill, dtype=np.int64)
    array.ravel()[target] = values
    return array

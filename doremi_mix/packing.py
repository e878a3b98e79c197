"""Packing documents into sequences of fixed capacity, without cutting any."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_offsets(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Returns where each of several ranges starts when they lie one after the other, and at last where all end.

    Example:
        >>> to_offsets(np.array([2, 0, 3])).tolist()
        [0, 2, 2, 5]
    """
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def pack(lengths: NDArray[np.integer], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Packs documents by best-fit-decreasing: longest first, each into the fullest sequence that still has room.

    Documents of one length are interchangeable, and so are sequences with the same room, so both are moved in bulk: the
    loop below runs over lengths, not over documents.  Ties go to the sequences that reached their room last, and to the
    documents with the smaller ids; the result depends on nothing but the arguments.

    Args:
        lengths: tokens of each document, from 1 to ``capacity``, shape [D].
        capacity: tokens of a sequence.

    Returns:
        ``sequence_offsets``, shape [S + 1], and ``document_ids``, shape [D]: sequence s holds the documents
        ``document_ids[sequence_offsets[s]:sequence_offsets[s + 1]]``.

    Raises:
        ValueError: a document is empty or longer than the capacity.

    Example:
        >>> offsets, documents = pack(np.array([3, 5, 4, 2]), capacity=8)
        >>> [documents[start:end].tolist() for start, end in zip(offsets[:-1], offsets[1:])]
        [[0, 1], [2, 3]]
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        bad = int(np.flatnonzero((lengths < 1) | (lengths > capacity))[0])
        raise ValueError(f"document {bad} must have 1 to {capacity} tokens, got {lengths[bad]}")
    num_by_length = np.bincount(lengths, minlength=capacity + 1)
    ends = np.cumsum(num_by_length)
    by_length = np.argsort(lengths, kind="stable")
    # A domain may have a hundred million documents: a signed type that is just wide enough to count them.
    sequence_of_document = np.empty(len(lengths), dtype=np.min_scalar_type(-len(lengths)))
    rooms = _Rooms(capacity)
    for length in np.flatnonzero(num_by_length)[::-1].tolist():
        end = int(ends[length])
        placed = end - int(num_by_length[length])
        while placed < end:
            # A sequence that took a document is now the tightest fit for the next one of this length, so it takes as
            # many as it can hold before the next sequence is tried.
            room, sequences, per_sequence = rooms.take(length, end - placed)
            num_documents = min(per_sequence * len(sequences), end - placed)
            documents = by_length[placed : placed + num_documents]
            sequence_of_document[documents] = np.repeat(sequences, per_sequence)[:num_documents]
            num_in_last = num_documents - per_sequence * (len(sequences) - 1)
            rooms.put(room - per_sequence * length, sequences[:-1])
            rooms.put(room - num_in_last * length, sequences[-1:])
            placed += num_documents
    del by_length
    sequence_offsets = to_offsets(np.bincount(sequence_of_document, minlength=rooms.num_sequences))
    return sequence_offsets, np.argsort(sequence_of_document, kind="stable")


class _Rooms:
    """The open sequences, grouped by how many tokens still fit."""

    def __init__(self, capacity: int) -> None:
        self.num_sequences = 0
        self._capacity = capacity
        self._groups: list[list[NDArray[np.int64]]] = [[] for _ in range(capacity + 1)]
        self._nonempty = 0  # bit r is set when some sequence has room for exactly r tokens

    def take(self, length: int, num_documents: int) -> tuple[int, NDArray[np.int64], int]:
        """Takes the sequences with the least room of at least ``length``; opens new ones when there are none.

        Returns:
            Their room, at most as many of them as are needed, and how many documents each of them can hold.
        """
        fitting = self._nonempty >> length
        room = length + (fitting & -fitting).bit_length() - 1 if fitting else self._capacity
        per_sequence = room // length
        num_needed = -(-num_documents // per_sequence)
        if not fitting:
            first = self.num_sequences
            self.num_sequences += num_needed
            return room, np.arange(first, self.num_sequences, dtype=np.int64), per_sequence
        group = self._groups[room]
        sequences = group.pop()
        if len(sequences) > num_needed:
            group.append(sequences[num_needed:])
            sequences = sequences[:num_needed]
        if not group:
            self._nonempty &= ~(1 << room)
        return room, sequences, per_sequence

    def put(self, room: int, sequences: NDArray[np.int64]) -> None:
        """Puts sequences back under the room that they have left; full ones are done with."""
        if room and len(sequences):
            self._groups[room].append(sequences)
            self._nonempty |= 1 << room

"""The token store: packed sequences in memory-mapped files, addressed by sequence id.

Documents (one per example, in load order) lie one after the other; a sequence is a list of documents of one domain and
one split.  Files of a store::

    tokens.bin               ids of all documents, uint16 where the vocabulary fits, else uint32
    loss_mask.bin            1 where the loss is taken, uint8
    document_offsets.npy     document d holds the tokens from [d] to [d + 1]
    sequence_offsets.npy     sequence s holds the documents from [s] to [s + 1] of sequence_documents.npy
    sequence_documents.npy
    example_tokens.npy       what each example costs of a token budget
    example_held_out.npy     whether it is held out
    domains.json             the one order of the domains, and counts

Sequence ids: the training sequences of domain 0, 1, ..., then the held-out sequences of domain 0, 1, ...

Axes: B sequences in a batch, T tokens of context, K domains, D documents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from doremi_mix.errors import DataError
from doremi_mix.packing import pack, to_offsets
from doremi_mix.tokens import EncodedExamples
from doremi_mix.types import Domains

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, Split] = ("train", "held_out")
IGNORE_INDEX = -100


class Batch(NamedTuple):
    """Sequences, padded to the context length.

    Attributes:
        input_ids_BT: token ids, int64.
        labels_BT: the token that each position predicts: the next one of the same document where its loss counts, else
            -100, int64.
        position_ids_BT: positions, from 0 in every document; 0 on padding, int64.
        document_ids_BT: 0, 1, 2, ... by document of the sequence, -1 on padding, int32.
        domain_ids_B: the domain of each sequence, int64.
    """

    input_ids_BT: NDArray[np.int64]
    labels_BT: NDArray[np.int64]
    position_ids_BT: NDArray[np.int64]
    document_ids_BT: NDArray[np.int32]
    domain_ids_B: NDArray[np.int64]


class TokenStoreWriter:
    """Writes a token store, one batch of examples after the other; tokens are never held in memory.

    Use it as a context manager, append every domain in order, then call ``finish`` once.
    """

    def __init__(self, folder: Path, domains: Domains, *, context_length: int, vocab_size: int, pad_id: int) -> None:
        """Opens the files.

        Args:
            folder: an existing, empty folder.
            domains: the order of the domains.
            context_length: tokens of a sequence; no document may be longer.
            vocab_size: one more than the largest token id.
            pad_id: fills the end of a sequence.
        """
        self._folder = folder
        self._domains = domains
        self._token_type = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self._settings = {"context_length": context_length, "vocab_size": vocab_size, "pad_id": pad_id}
        self._context_length = context_length
        self._domain_id = 0
        # By domain, one array per append.
        self._lengths: list[list[NDArray[np.int64]]] = [[] for _ in domains]
        self._num_labels: list[list[NDArray[np.int64]]] = [[] for _ in domains]
        self._example_tokens: list[list[NDArray[np.int64]]] = [[] for _ in domains]
        self._num_truncated = [0] * len(domains)
        self._files: tuple[BinaryIO, BinaryIO] = (
            (folder / "tokens.bin").open("wb"),
            (folder / "loss_mask.bin").open("wb"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def append(self, domain_id: int, encoded: EncodedExamples, example_tokens: NDArray[np.int64]) -> None:
        """Adds the next examples of a domain.

        Args:
            domain_id: not below that of an earlier call.
            encoded: the examples, truncated to the context length.
            example_tokens: what each example costs of a token budget, shape [len(encoded)].

        Raises:
            DataError: an example has no token to learn.
            ValueError: the domains are out of order, an example is too long, or the lengths disagree.
        """
        if domain_id < self._domain_id:
            raise ValueError(f"domain {domain_id} must come before domain {self._domain_id}")
        if len(example_tokens) != len(encoded):
            raise ValueError(f"there are {len(encoded)} examples but {len(example_tokens)} token counts")
        self._domain_id = domain_id
        if not len(encoded):
            return
        lengths, starts = encoded.lengths, encoded.offsets[:-1]
        if lengths.max() > self._context_length:
            raise ValueError(f"an example has {lengths.max()} tokens, more than the context of {self._context_length}")
        # The first token of a document has no predecessor that could predict it.
        num_labels = np.add.reduceat(encoded.loss_mask.astype(np.int64), starts) - encoded.loss_mask[starts].astype(
            np.int64
        )
        if not num_labels.all():
            row = sum(map(len, self._lengths[domain_id])) + int(np.flatnonzero(num_labels == 0)[0]) + 1
            raise DataError(
                f"{self._domains.names[domain_id]}: example {row:,} has nothing to learn: expected a response token "
                f"after another token, got none; remove the example"
            )
        self._lengths[domain_id].append(lengths)
        self._num_labels[domain_id].append(num_labels)
        self._example_tokens[domain_id].append(np.asarray(example_tokens, dtype=np.int64))
        self._num_truncated[domain_id] += int((lengths < encoded.num_tokens).sum())
        tokens_file, mask_file = self._files
        tokens_file.write(encoded.token_ids.astype(self._token_type).data)
        mask_file.write(np.ascontiguousarray(encoded.loss_mask, dtype=np.uint8).data)

    def finish(self, held_out_by_domain: Sequence[NDArray[np.bool_]]) -> None:
        """Packs the documents of each domain and split, and writes all other files.

        Args:
            held_out_by_domain: for each domain, whether each of its examples is held out.

        Raises:
            DataError: a domain has no training example.
            ValueError: there are more or fewer flags than examples.
        """
        for file in self._files:
            file.close()
        lengths = [_joined(parts) for parts in self._lengths]
        num_labels = [_joined(parts) for parts in self._num_labels]
        example_tokens = [_joined(parts) for parts in self._example_tokens]
        for name, length, held_out in zip(self._domains, lengths, held_out_by_domain, strict=True):
            if len(length) != len(held_out):
                raise ValueError(f"{name} has {len(length)} examples but {len(held_out)} held-out flags")
            if held_out.all():
                got = f"{len(length):,}, all of them held out" if len(length) else "none"
                raise DataError(f"{name}: no example to train on: expected at least 1, got {got}; remove the domain")
        first_documents = to_offsets(np.array([len(part) for part in lengths]))
        sequence_lengths: list[NDArray[np.int64]] = []  # in documents
        sequence_documents: list[NDArray[np.int64]] = []
        summaries: list[dict[str, Any]] = [
            {
                "name": name,
                "available_tokens": int(example_tokens[i][~held_out_by_domain[i]].sum()),
                "truncated_examples": self._num_truncated[i],
            }
            for i, name in enumerate(self._domains)
        ]
        for split in SPLITS:
            for i, summary in enumerate(summaries):
                documents = np.flatnonzero(held_out_by_domain[i] == (split == "held_out"))
                offsets, order = pack(lengths[i][documents], self._context_length)
                sequence_lengths.append(np.diff(offsets))
                sequence_documents.append(first_documents[i] + documents[order])
                summary[split] = {
                    "documents": len(documents),
                    "sequences": len(offsets) - 1,
                    "tokens": int(lengths[i][documents].sum()),
                    "labels": int(num_labels[i][documents].sum()),
                }
        np.save(self._folder / "document_offsets.npy", to_offsets(np.concatenate(lengths)))
        np.save(self._folder / "sequence_offsets.npy", to_offsets(np.concatenate(sequence_lengths)))
        np.save(self._folder / "sequence_documents.npy", np.concatenate(sequence_documents))
        np.save(self._folder / "example_tokens.npy", np.concatenate(example_tokens))
        np.save(self._folder / "example_held_out.npy", np.concatenate(held_out_by_domain).astype(bool))
        content = {**self._settings, "token_type": self._token_type.name, "domains": summaries}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (self._folder / "domains.json").write_text(text, encoding="utf-8")


class TokenStore:
    """Reads a token store; opening one reads no tokens.

    Attributes:
        domains: the order of the domains.
        context_length: tokens of a sequence, T.
        vocab_size: one more than the largest token id.
        pad_id: fills the end of a sequence.
        summaries: the counts of each domain, as in ``domains.json``.
        document_offsets: document d holds the tokens from [d] to [d + 1], shape [D + 1].
        sequence_offsets: sequence s holds the documents from [s] to [s + 1] of ``sequence_documents``.
        sequence_documents: the documents in packed order, shape [D].
        example_tokens: what each example costs of a token budget, by document, shape [D].
        example_held_out: whether each example is held out, shape [D].
    """

    def __init__(self, folder: Path) -> None:
        """Opens the store in a folder.

        Raises:
            DataError: a file of the store is damaged.
        """
        content = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
        self.summaries: list[dict[str, Any]] = content["domains"]
        self.domains = Domains(tuple(summary["name"] for summary in content["domains"]))
        self.context_length: int = content["context_length"]
        self.vocab_size: int = content["vocab_size"]
        self.pad_id: int = content["pad_id"]
        self.document_offsets: NDArray[np.int64] = np.load(folder / "document_offsets.npy", mmap_mode="r")
        self.sequence_offsets: NDArray[np.int64] = np.load(folder / "sequence_offsets.npy", mmap_mode="r")
        self.sequence_documents: NDArray[np.int64] = np.load(folder / "sequence_documents.npy", mmap_mode="r")
        self.example_tokens: NDArray[np.int64] = np.load(folder / "example_tokens.npy", mmap_mode="r")
        self.example_held_out: NDArray[np.bool_] = np.load(folder / "example_held_out.npy", mmap_mode="r")
        num_tokens = int(self.document_offsets[-1])
        self._tokens = _map_file(folder / "tokens.bin", np.dtype(content["token_type"]), num_tokens)
        self._loss_mask = _map_file(folder / "loss_mask.bin", np.dtype(np.uint8), num_tokens)
        counts = [summary[split]["sequences"] for split in SPLITS for summary in content["domains"]]
        self._first_sequences = to_offsets(np.array(counts))
        documents = [summary["train"]["documents"] + summary["held_out"]["documents"] for summary in content["domains"]]
        self._first_documents = to_offsets(np.array(documents))

    @property
    def available_tokens(self) -> list[int]:
        """What one pass over each domain's training examples gives to a token budget, in domain order."""
        return [summary["available_tokens"] for summary in self.summaries]

    def num_sequences(self, domain_id: int | None = None, split: Split = "train") -> int:
        """Returns how many sequences a domain has in a split; without a domain, how many there are at all."""
        if domain_id is None:
            return int(self._first_sequences[-1])
        return len(self.sequence_ids(domain_id, split))

    def sequence_ids(self, domain_id: int, split: Split = "train") -> range:
        """Returns the ids of a domain's sequences in a split."""
        cell = SPLITS.index(split) * len(self.domains) + domain_id
        return range(int(self._first_sequences[cell]), int(self._first_sequences[cell + 1]))

    def document_ids(self, domain_id: int) -> range:
        """Returns the documents of a domain: its examples, in the order in which they were appended."""
        return range(int(self._first_documents[domain_id]), int(self._first_documents[domain_id + 1]))

    def domain_ids(self, sequence_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the domain of each sequence."""
        cells = np.searchsorted(self._first_sequences, sequence_ids, side="right") - 1
        return cells % len(self.domains)

    def sequence_lengths(self) -> NDArray[np.int64]:
        """Returns how many tokens of each sequence are not padding, for all sequences in order."""
        lengths = np.diff(self.document_offsets)[self.sequence_documents]
        return np.add.reduceat(lengths, self.sequence_offsets[:-1])

    def batch(self, sequence_ids: NDArray[np.int64]) -> Batch:
        """Reads sequences.

        Args:
            sequence_ids: ids of sequences, in any order, shape [B].

        Raises:
            IndexError: there is no such sequence.
        """
        sequence_ids = np.asarray(sequence_ids, dtype=np.int64)
        if len(sequence_ids) and not 0 <= sequence_ids.min() <= sequence_ids.max() < self.num_sequences():
            raise IndexError(f"sequence ids must be from 0 to {self.num_sequences() - 1}, got {sequence_ids}")
        first = self.sequence_offsets[sequence_ids]
        num_documents_B = self.sequence_offsets[sequence_ids + 1] - first
        documents = self.sequence_documents[_ranges(first, num_documents_B)]
        starts = self.document_offsets[documents]
        lengths = self.document_offsets[documents + 1] - starts
        source = _ranges(starts, lengths)
        ids = self._tokens[source].astype(np.int64)
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
        is_last = np.zeros(len(ids), dtype=bool)
        is_last[np.cumsum(lengths) - 1] = True
        # Position t predicts t + 1, if that is in the same document and its loss counts.
        predicts = np.flatnonzero((self._loss_mask[source[1:]] == 1) & ~is_last[:-1])
        labels[predicts] = ids[predicts + 1]

        shape = (len(sequence_ids), self.context_length)
        row = np.repeat(np.arange(len(sequence_ids)), num_documents_B)
        first_in_row = np.repeat(np.cumsum(num_documents_B) - num_documents_B, num_documents_B)
        before = np.cumsum(lengths) - lengths
        target = _ranges(row * self.context_length + before - before[first_in_row], lengths)
        document_in_row = np.arange(len(documents)) - first_in_row
        return Batch(
            input_ids_BT=_scattered(shape, target, ids, self.pad_id),
            labels_BT=_scattered(shape, target, labels, IGNORE_INDEX),
            position_ids_BT=_scattered(shape, target, _ranges(np.zeros_like(lengths), lengths), 0),
            document_ids_BT=_scattered(shape, target, np.repeat(document_in_row, lengths), -1).astype(np.int32),
            domain_ids_B=self.domain_ids(sequence_ids),
        )


def _map_file(path: Path, token_type: np.dtype[np.unsignedinteger], num_tokens: int) -> NDArray[np.unsignedinteger]:
    expected, got = num_tokens * token_type.itemsize, path.stat().st_size
    if got != expected:
        raise DataError(f"{path}: the token store is damaged: expected {expected:,} bytes, got {got:,}; tokenize again")
    mapped: NDArray[np.unsignedinteger] = np.memmap(path, dtype=token_type, mode="r")
    return mapped


def _joined(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns start, start + 1, ... of each range, one range after the other."""
    before = to_offsets(lengths)
    return np.arange(before[-1]) + np.repeat(starts - before[:-1], lengths)


def _scattered(
    shape: tuple[int, int], target: NDArray[np.int64], values: NDArray[np.int64], fill: int
) -> NDArray[np.int64]:
    array = np.full(shape, fill, dtype=np.int64)
    array.ravel()[target] = values
    return array

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
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from doremi_mix.errors import DataError
from doremi_mix.packing import pack, to_offsets
from doremi_mix.token_files import LOSS_MASK, TOKENS, TokenFiles, ranges, token_type_of
from doremi_mix.tokens import EncodedExamples
from doremi_mix.types import Domains

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, Split] = ("train", "held_out")


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


class ArrayWriter:
    """Writes an ``.npy`` file of one axis piece by piece: byte for byte what ``numpy.save`` writes of the whole.

    Attributes:
        length: how many values were added.
    """

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self.length = 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, values: NDArray[Any]) -> None:
        """Adds the next values."""
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self.length += len(values)

    def close(self) -> None:
        """Writes the number of values into the header; nothing can be added any more."""
        if not self._file.closed:
            self._file.seek(0)
            self._write_header()
            self._file.close()

    def read(self) -> NDArray[Any]:
        """Closes the file and maps what was written."""
        self.close()
        values: NDArray[Any] = np.load(self._path, mmap_mode="r")
        return values

    def remove(self) -> None:
        """Deletes the file of an array that served only on the way."""
        self.close()
        self._path.unlink()

    def _write_header(self) -> None:
        # numpy pads the header to one size for any length, so that it can be written over.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class TokenStoreWriter:
    """Writes a token store, one batch of examples after the other.

    Nothing that grows with the tokens or the examples is held in memory, except for the lengths of one domain's
    documents while these are packed.

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
        self._token_type = token_type_of(vocab_size)
        self._settings = {"context_length": context_length, "vocab_size": vocab_size, "pad_id": pad_id}
        self._context_length = context_length
        self._domain_id = 0
        self._num_tokens = 0
        self._num_documents = [0] * len(domains)
        self._num_truncated = [0] * len(domains)
        self._tokens: BinaryIO = (folder / TOKENS).open("wb")
        self._loss_mask: BinaryIO = (folder / LOSS_MASK).open("wb")
        self._document_offsets = ArrayWriter(folder / "document_offsets.npy", np.int64)
        self._document_offsets.append(np.zeros(1))  # where the first document starts
        self._example_tokens = ArrayWriter(folder / "example_tokens.npy", np.int64)
        self._num_labels = ArrayWriter(folder / ".num_labels.tmp", np.int32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

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
            row = self._num_documents[domain_id] + int(np.flatnonzero(num_labels == 0)[0]) + 1
            raise DataError(
                f"{self._domains.names[domain_id]}: example {row:,} has nothing to learn: expected a response token "
                f"after another token, got none; remove the example"
            )
        self._tokens.write(encoded.token_ids.astype(self._token_type).data)
        self._loss_mask.write(np.ascontiguousarray(encoded.loss_mask, dtype=np.uint8).data)
        self._document_offsets.append(self._num_tokens + encoded.offsets[1:])
        self._example_tokens.append(example_tokens)
        self._num_labels.append(num_labels)
        self._num_tokens += len(encoded.token_ids)
        self._num_documents[domain_id] += len(encoded)
        self._num_truncated[domain_id] += int((lengths < encoded.num_tokens).sum())

    def finish(self, held_out_by_domain: Sequence[NDArray[np.bool_]]) -> None:
        """Packs the documents of each domain and split, and writes all other files.

        Args:
            held_out_by_domain: for each domain, whether each of its examples is held out.

        Raises:
            DataError: a domain has no training example.
            ValueError: there are more or fewer flags than examples.
        """
        self._close()
        for name, num_documents, held_out in zip(self._domains, self._num_documents, held_out_by_domain, strict=True):
            if num_documents != len(held_out):
                raise ValueError(f"{name} has {num_documents} examples but {len(held_out)} held-out flags")
            if held_out.all():
                got = f"{num_documents:,}, all of them held out" if num_documents else "none"
                raise DataError(f"{name}: no example to train on: expected at least 1, got {got}; remove the domain")
        first_documents = to_offsets(np.array(self._num_documents))[:-1].tolist()
        example_tokens = self._example_tokens.read()
        summaries: list[dict[str, Any]] = [
            {
                "name": name,
                "available_tokens": int(example_tokens[first : first + len(flags)].sum(where=~flags)),
                "truncated_examples": num_truncated,
            }
            for name, first, flags, num_truncated in zip(
                self._domains, first_documents, held_out_by_domain, self._num_truncated, strict=True
            )
        ]
        with (
            closing(ArrayWriter(self._folder / "sequence_offsets.npy", np.int64)) as sequence_offsets,
            closing(ArrayWriter(self._folder / "sequence_documents.npy", np.int64)) as sequence_documents,
            closing(ArrayWriter(self._folder / "example_held_out.npy", np.bool_)) as example_held_out,
        ):
            sequence_offsets.append(np.zeros(1))
            for split in SPLITS:
                for summary, first, flags in zip(summaries, first_documents, held_out_by_domain, strict=True):
                    in_split = flags if split == "held_out" else ~flags
                    summary[split] = self._pack(first, in_split, sequence_offsets, sequence_documents)
            for flags in held_out_by_domain:
                example_held_out.append(flags)
        self._num_labels.remove()
        content = {**self._settings, "token_type": self._token_type.name, "domains": summaries}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (self._folder / "domains.json").write_text(text, encoding="utf-8")

    def _pack(
        self,
        first: int,
        in_split: NDArray[np.bool_],
        sequence_offsets: ArrayWriter,
        sequence_documents: ArrayWriter,
    ) -> dict[str, int]:
        """Packs the documents of one domain and split, which starts at document ``first``; returns their counts."""
        last = first + len(in_split)
        num_labels = self._num_labels.read()[first:last].sum(where=in_split, dtype=np.int64)
        # The context bounds a length, so half the bytes are enough.
        lengths = np.diff(self._document_offsets.read()[first : last + 1]).astype(np.int32)[in_split]
        num_tokens = lengths.sum(dtype=np.int64)
        offsets, order = pack(lengths, self._context_length)
        del lengths
        sequence_offsets.append(sequence_documents.length + offsets[1:])
        sequence_documents.append(first + np.flatnonzero(in_split)[order])
        return {
            "documents": len(order),
            "sequences": len(offsets) - 1,
            "tokens": int(num_tokens),
            "labels": int(num_labels),
        }

    def _close(self) -> None:
        for file in (self._tokens, self._loss_mask, self._document_offsets, self._example_tokens, self._num_labels):
            file.close()


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
        self._files = TokenFiles(folder, np.dtype(content["token_type"]), num_tokens, "tokenize again")
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
        documents = self.sequence_documents[ranges(first, num_documents_B)]
        starts = self.document_offsets[documents]
        lengths = self.document_offsets[documents + 1] - starts
        layout = self._files.lay_out(starts, lengths, num_documents_B, self.context_length, self.pad_id)
        return Batch(*layout, domain_ids_B=self.domain_ids(sequence_ids))

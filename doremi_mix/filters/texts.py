"""The text of an example, and all characters of a batch of texts as one array.

Axes: B texts of a batch, N characters of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

# 32-bit offsets end at 2 GiB of text; a batch that may come near it gets 64-bit ones.
_MAX_SMALL_BYTES = 2**31 - 2**20

_PIECE_BYTES = 2**17
"""UTF-8 that is decoded at a time."""


class CodePoints(NamedTuple):
    """All characters of a batch of texts, end to end.

    Attributes:
        points_N: the Unicode code points, uint32; read-only.
        offsets_B1: int64, B + 1 of them: text i is ``points_N[offsets_B1[i] : offsets_B1[i + 1]]``.
    """

    points_N: NDArray[np.uint32]
    offsets_B1: NDArray[np.int64]


def example_texts(batch: pa.RecordBatch) -> pa.Array:
    """Returns the text of each example, the one that all scores of texts are taken on.

    It is ``instruction + " " + input + " " + output``, with both spaces also where the input is empty; earlier turns
    come before, ``user + " " + assistant + " "`` each.  Plain text, whose instruction is null, is the output alone.

    Args:
        batch: examples with the columns instruction, input, output and, if any has earlier turns, history.

    Returns:
        One text per row and no nulls, as ``pa.string()``, or ``pa.large_string()`` where the batch is about 2 GiB.

    Example:
        >>> import pyarrow as pa
        >>> batch = pa.RecordBatch.from_pydict(
        ...     {"instruction": ["Add.", None], "input": ["", ""], "output": ["4", "A story."]}
        ... )
        >>> example_texts(batch).to_pylist()
        ['Add.  4', 'A story.']
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    # The text is hardly larger than its columns: two more bytes a row.
    kind = pa.large_string() if 2 * batch.nbytes > _MAX_SMALL_BYTES else pa.string()
    # A cast also serves a column without a single value, which may have been given the type null.
    instruction, given, output = (batch.column(name).cast(kind) for name in ("instruction", "input", "output"))
    space = pa.scalar(" ", kind)
    output = pc.fill_null(output, "")
    # A null instruction makes the joined text null; coalesce puts the output there.
    asked = pc.coalesce(pc.binary_join_element_wise(instruction, pc.fill_null(given, ""), output, space), output)
    earlier = _earlier_turns(batch, space)
    if earlier is None:
        return asked
    return pc.binary_join_element_wise(earlier, asked, space, null_handling="skip")


def code_points(texts: pa.Array) -> CodePoints:
    """Decodes all texts at once.

    Args:
        texts: B strings, as ``pa.string()`` or ``pa.large_string()``; may be a slice.  A null counts as "".

    Returns:
        The characters of all texts and where each text begins.

    Example:
        >>> import pyarrow as pa
        >>> points_N, offsets_B1 = code_points(pa.array(["né", None, "中"]))
        >>> [chr(point) for point in points_N], offsets_B1.tolist()
        (['n', 'é', '中'], [0, 2, 2, 3])
    """
    import pyarrow.compute as pc

    utf8, byte_offsets_B1 = utf8_bytes(texts)
    offsets_B1 = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(pc.fill_null(pc.utf8_length(texts), 0).to_numpy(), out=offsets_B1[1:])
    points_N = np.empty(int(offsets_B1[-1]), dtype=np.uint32)
    # Piece by piece, so that no second copy of all texts is made.
    for rows in row_pieces(byte_offsets_B1, _PIECE_BYTES):
        piece = utf8[byte_offsets_B1[rows.start] : byte_offsets_B1[rows.stop]]
        points = points_N[offsets_B1[rows.start] : offsets_B1[rows.stop]]
        if len(points) == len(piece):  # ASCII
            points[:] = piece
        else:
            points[:] = np.frombuffer(str(piece.data, "utf-8").encode("utf-32-le"), dtype="<u4")
    points_N.flags.writeable = False
    return CodePoints(points_N, offsets_B1)


def utf8_bytes(texts: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns the UTF-8 of all texts, end to end and without a copy, and where each text begins, shape [B + 1].

    Args:
        texts: B strings, as for ``code_points``.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if texts.null_count:  # what lies under a null is not part of any text
        texts = pc.fill_null(texts, "")
    _, offsets, data = texts.buffers()
    if len(texts) == 0 or data is None:
        return np.zeros(0, dtype=np.uint8), np.zeros(len(texts) + 1, dtype=np.int64)
    width = 8 if pa.types.is_large_string(texts.type) else 4
    offsets_B1 = np.frombuffer(offsets, dtype=f"<i{width}", count=len(texts) + 1, offset=texts.offset * width)
    first, last = int(offsets_B1[0]), int(offsets_B1[-1])
    return np.frombuffer(data, dtype=np.uint8)[first:last], offsets_B1.astype(np.int64) - first


def row_pieces(offsets_B1: NDArray[np.int64], size: int, max_rows: int = 2**62) -> Iterator[slice]:
    """Splits rows into consecutive slices of at most ``size`` items; a row with more is a slice by itself.

    Args:
        offsets_B1: where each row's items begin.
        size: items in a slice.
        max_rows: rows in a slice.

    Example:
        >>> list(row_pieces(np.array([0, 2, 4, 9, 9, 10]), 4))
        [slice(0, 2, None), slice(2, 3, None), slice(3, 5, None)]
    """
    num_rows = len(offsets_B1) - 1
    row = 0
    while row < num_rows:
        stop = int(np.searchsorted(offsets_B1, offsets_B1[row] + size, side="right")) - 1
        stop = min(max(stop, row + 1), row + max_rows, num_rows)
        yield slice(row, stop)
        row = stop


def _earlier_turns(batch: pa.RecordBatch, space: pa.Scalar) -> pa.Array | None:
    """Returns the earlier turns of each row as one text, null where there are none; None if no row has any."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if "history" not in batch.schema.names or pa.types.is_null(batch.schema.field("history").type):
        return None
    history = batch.column("history")
    turns = history.flatten()  # without what a slice or a null hides
    if len(turns) == 0:
        return None
    sides = (pc.fill_null(pc.struct_field(turns, name), "").cast(space.type) for name in ("user", "assistant"))
    joined = pc.binary_join_element_wise(*sides, space)
    num_turns = pc.fill_null(pc.list_value_length(history), 0)
    offsets = np.zeros(len(history) + 1, dtype=np.int32)
    np.cumsum(num_turns.to_numpy(zero_copy_only=False), out=offsets[1:])
    per_row = pa.ListArray.from_arrays(pa.array(offsets), joined)
    return pc.if_else(pc.equal(num_turns, 0), pa.scalar(None, space.type), pc.binary_join(per_row, space))

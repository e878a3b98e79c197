"""Sequences that begin alike, merged into trees, so that a model computes each common beginning once.

Axes: S sequences, B packs in a forward pass, T tokens of a pack, N tokens whose loss is wanted.

A pack is the tree of its sequences, each node once, in the order of a walk in depth.  A token attends to its ancestors
and itself, and its position is its depth, so the model gives each sequence what it would give it alone, but for
rounding (1e-5 in float32).  What a template says is computed once a pack, a sequence that occurs again costs nothing,
and there is next to no padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from doremi_mix.packing import to_offsets

if TYPE_CHECKING:
    from torch import Tensor


class ScoredSequence(NamedTuple):
    """Tokens to score.

    Attributes:
        row: what they belong to.
        ids: the tokens, uint32; two at least.
        first: the first one whose loss is wanted, from 1; all after it are wanted, too.
    """

    row: int
    ids: NDArray[np.uint32]
    first: int


class Pack(NamedTuple):
    """Sequences merged into a tree, as the model sees it.

    Attributes:
        input_ids_T: the nodes that something follows, each behind its parent and all that hangs on elder siblings.
        positions_T: their depths.
        ends_T: where the descendants of each end: those of t are t + 1 to ``ends_T[t] - 1``.
        from_N: which node predicts each wanted token.
        labels_N: the wanted tokens.
        scored: the sequences, each with where its wanted tokens are among the N.
    """

    input_ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    ends_T: NDArray[np.int64]
    from_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    scored: list[tuple[int, NDArray[np.int64]]]


class Inputs(NamedTuple):
    """Packs side by side, as one forward pass takes them.

    Attributes:
        input_ids_BT: tokens.
        positions_BT: of the tokens.
        ends_BT: for ``tree_mask``; None where no pack has a branch, so that causal attention says the same.
        from_N: which of the B x T tokens, laid end to end, predicts each wanted token.
        labels_N: the wanted tokens of all packs, one pack after the other.
    """

    input_ids_BT: NDArray[np.int64]
    positions_BT: NDArray[np.int64]
    ends_BT: NDArray[np.int64] | None
    from_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]


def plan_packs(sequences: Sequence[NDArray[np.uint32]], capacity: int) -> Iterator[list[tuple[int, int]]]:
    """Splits sequences into packs so that those with a common beginning come together.

    Sorted, each sequence shares the most with the one before it; a pack takes them until it is full.  One that shares
    at least half of itself would cost twice as much elsewhere, and may join a full pack, up to twice its own length.

    Args:
        sequences: S of them.
        capacity: tokens of a pack, each node of its tree counted once.

    Yields:
        For each pack, its sequences in order: which one, and how many tokens it shares with the one before.

    Example:
        >>> list(plan_packs([np.uint32([1, 2, 4]), np.uint32([5, 6]), np.uint32([1, 2])], capacity=3))
        [[(2, 0), (0, 2)], [(1, 0)]]
    """
    # In which order tokens are sorted does not matter, so any bytes of theirs will do.
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].tobytes())
    pack: list[tuple[int, int]] = []
    num_tokens = 0
    for i, sequence_id in enumerate(order):
        ids = sequences[sequence_id]
        shared = _num_shared(sequences[order[i - 1]], ids) if pack else 0
        room = max(capacity, 2 * len(ids)) if 2 * shared >= len(ids) else capacity
        if pack and num_tokens + len(ids) - shared > room:
            yield pack
            pack, num_tokens, shared = [], 0, 0
        pack.append((sequence_id, shared))
        num_tokens += len(ids) - shared
    if pack:
        yield pack


def lay_out(sequences: Sequence[ScoredSequence], plan: Sequence[tuple[int, int]]) -> Pack:
    """Merges the sequences of a pack into a tree.

    Args:
        sequences: all that were planned.
        plan: one pack of ``plan_packs``.
    """
    size = sum(len(sequences[sequence_id].ids) - shared for sequence_id, shared in plan)
    ids, depths, parents, ends = np.zeros((4, size), dtype=np.int64)
    wanted = np.zeros(size, dtype=bool)
    path = np.zeros(0, dtype=np.int64)  # the nodes of the sequence at hand, from the root
    wanted_paths = []
    num_nodes = 0
    for sequence_id, shared in plan:
        _, tokens, first = sequences[sequence_id]
        ends[path[shared:]] = num_nodes
        new = slice(num_nodes, num_nodes + len(tokens) - shared)
        path = np.concatenate([path[:shared], np.arange(new.start, new.stop)])
        ids[new] = tokens[shared:]
        depths[new] = np.arange(shared, len(tokens))
        parents[new] = np.concatenate([[-1], path])[shared:-1]
        wanted[path[first:]] = True
        wanted_paths.append((sequence_id, path[first:]))
        num_nodes = new.stop
    ends[path] = num_nodes
    # What nothing follows predicts nothing.
    is_input = ends > np.arange(1, size + 1)
    place = to_offsets(is_input.astype(np.int64))
    slot = np.cumsum(wanted) - 1
    return Pack(
        input_ids_T=ids[is_input],
        positions_T=depths[is_input],
        ends_T=place[ends[is_input]],
        from_N=place[parents[wanted]],
        labels_N=ids[wanted],
        scored=[(sequence_id, slot[nodes]) for sequence_id, nodes in wanted_paths],
    )


def group_packs(packs: Sequence[Pack], tokens_per_batch: int) -> Iterator[list[Pack]]:
    """Groups packs of about one size into forward passes, the largest first: if memory is too small, it shows early."""
    group: list[Pack] = []
    for pack in sorted(packs, key=lambda pack: -len(pack.input_ids_T)):
        if group and (len(group) + 1) * len(group[0].input_ids_T) > tokens_per_batch:
            yield group
            group = []
        group.append(pack)
    if group:
        yield group


def to_inputs(packs: Sequence[Pack]) -> Inputs:
    """Lays packs side by side, padded to the longest."""
    B, T = len(packs), max(len(pack.input_ids_T) for pack in packs)
    input_ids_BT = np.zeros((B, T), dtype=np.int64)
    # Padding goes on counting, as if it belonged to the last sequence, and sees at least itself: a softmax over nothing
    # is NaN.
    positions_BT, ends_BT = np.tile(np.arange(T), (B, 1)), np.tile(np.arange(1, T + 1), (B, 1))
    for b, pack in enumerate(packs):
        num_tokens = len(pack.input_ids_T)
        input_ids_BT[b, :num_tokens] = pack.input_ids_T
        positions_BT[b, :num_tokens] = pack.positions_T
        ends_BT[b, :num_tokens] = pack.ends_T
    has_branch = any((pack.ends_T != len(pack.ends_T)).any() for pack in packs)
    return Inputs(
        input_ids_BT=input_ids_BT,
        positions_BT=positions_BT,
        ends_BT=ends_BT if has_branch else None,
        from_N=np.concatenate([b * T + pack.from_N for b, pack in enumerate(packs)]),
        labels_N=np.concatenate([pack.labels_N for pack in packs]),
    )


def tree_mask(ends_BT: Tensor) -> Tensor:
    """Returns who may attend to whom, shape [B, 1, T, T]: a token to its ancestors in the tree, and to itself.

    Args:
        ends_BT: where the descendants of each token end.

    Example:
        >>> import torch
        >>> tree_mask(torch.tensor([[3, 2, 3]])).int().tolist()  # a root with two children
        [[[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]]
    """
    import torch

    place_T = torch.arange(ends_BT.shape[1], device=ends_BT.device)
    is_behind_TT = place_T[:, None] >= place_T
    return (is_behind_TT & (place_T[:, None] < ends_BT[:, None, :]))[:, None]


def _num_shared(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> int:
    """Returns how many tokens two sequences have in common before they part."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length

"""Few examples that stand for many: k-center-greedy by exact, pruned search, and facility location by a library.

Axes: N points, D dimensions, K selected points, M points of all shards that are selected in the first step.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from doremi_mix.errors import ConfigError
from doremi_mix.filters.k_center import LARGEST, KCenter, select

MAX_FACILITIES = 16_384
"""The most points for facility location."""


def k_center_greedy(
    points_ND: NDArray[np.float32],
    num: int,
    *,
    quality_N: ArrayLike | None = None,
    device: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> KCenter:
    """Selects points one by one, each the farthest from all selected before (Gonzalez' algorithm).

    The first is the point nearest the mean; of equally good points the one with the lowest row is taken.  The radius is
    at most twice that of the best possible selection of as many points.

    With ``quality_N``, each next point is the one with the largest product of distance and quality, where quality is
    the rank among all points, scaled into (0, 1).  It favors good examples over outliers; the radius is then no longer
    bounded by twice the best.

    Args:
        points_ND: any vectors, float32, finite and below 1e15.
        num: K, how many to select; if there are no more than this, all are, in the order of their rows.
        quality_N: one finite number per point, larger is better, for example the IFD.
        device: None for the NumPy code, or a GPU where there is one and the work is worth it; "cpu" for the NumPy code;
            "cuda" or the like for this device.
        progress: is told the number of points selected since it was last called.

    Returns:
        The selection; the same on every device but for distances whose float64 sums differ in the last digit.

    Raises:
        ValueError: a shape is wrong, a value is not finite or too large, or ``num`` is below 1.

    Example:
        >>> line_ND = np.array([[0.0], [4.0], [5.0], [10.0]], dtype=np.float32)
        >>> result = k_center_greedy(line_ND, 3)
        >>> result.selected_K.tolist(), result.radius, result.nearest_N.tolist()
        ([2, 0, 3], 1.0, [0, 2, 2, 3])

    Reference:
        T. Gonzalez, Clustering to minimize the maximum intercluster distance, 1985,
        https://doi.org/10.1016/0304-3975(85)90224-5.
    """
    points_ND = _checked_points(points_ND)
    _check_num(num)
    weights_N = None if quality_N is None else _quality_ranks(quality_N, len(points_ND))
    return select(points_ND, num, weights_N, device, progress)


def k_center_sharded(
    shards: Sequence[NDArray[np.float32]],
    num: int,
    *,
    quality: Sequence[ArrayLike] | None = None,
    device: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.int64]:
    """Selects points that lie in several shards: ``num`` of each shard, and of all these ``num`` again.

    The radius is at most 4 times that of the best possible selection, and hence at most 4 times that of
    ``k_center_greedy`` on all points at once: a point is within twice the best radius of a point that its shard
    selected, and this one is within twice the best radius of a point of the result.  With one shard, the result is that
    of ``k_center_greedy``.  Each shard's step needs that shard alone, so that several machines can take it.

    Args:
        shards: the points, [N_s, D] each; a shard may be empty.
        num: how many to select.
        quality: one array per shard, as in ``k_center_greedy``; the radius is then not bounded.
        device: as in ``k_center_greedy``.
        progress: is told the number of points selected in any step since it was last called.

    Returns:
        Rows of the shards laid end to end, in the order of selection, int64.

    Raises:
        ValueError: as in ``k_center_greedy``.

    Example:
        >>> line_ND = np.array([[0.0], [4.0], [5.0], [10.0]], dtype=np.float32)
        >>> k_center_sharded([line_ND[:2], line_ND[2:]], 2).tolist()
        [2, 0]

    Reference:
        G. Malkomes et al., Fast Distributed k-Center Clustering with Outliers on Massive Data, 2015,
        https://papers.nips.cc/paper/2015/hash/8fecb20817b3847419bb3de39a609afe-Abstract.html.
    """
    _check_num(num)
    if quality is not None and len(quality) != len(shards):
        raise ValueError(f"quality must have one array per shard, {len(shards)}, got {len(quality)}")
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    weights_N = None
    if quality is not None:
        weights_N = _quality_ranks(np.concatenate([np.zeros(0), *map(np.asarray, quality)]), int(starts[-1]))
    rows, kept = [], []
    for shard, start in zip(shards, starts.tolist(), strict=False):
        points_ND = _checked_points(shard, start)
        shard_weights = None if weights_N is None else weights_N[start : start + len(points_ND)]
        chosen_K = select(points_ND, num, shard_weights, device, progress).selected_K
        rows.append(chosen_K + start)
        kept.append(points_ND[chosen_K])
    if len(shards) <= 1:
        return np.concatenate([np.zeros(0, dtype=np.int64), *rows])
    rows_M = np.concatenate(rows)
    union_weights = None if weights_N is None else weights_N[rows_M]
    return rows_M[select(np.concatenate(kept), num, union_weights, device, progress).selected_K]


def facility_location(points_ND: NDArray[np.float32], num: int) -> NDArray[np.int64]:
    """Selects points so that the similarities of all points to their most similar selected one have the largest sum.

    Unlike k-center it follows the bulk of the points and not the outliers.  The similarity is the cosine, or 0 where
    the cosine is negative.  submodlib's lazy greedy search reaches at least 1 - 1/e of the best possible sum.  It holds
    the similarities of all pairs, twice: 2 GiB for the most points that are taken.

    Args:
        points_ND: any vectors, float32, finite and below 1e15; at most 16,384.
        num: how many to select; if there are no more than this, all are, in the order of their rows.

    Returns:
        Rows of the selected points in the order of selection, int64.

    Raises:
        ConfigError: submodlib is not installed, or there are too many points.
        ValueError: a shape is wrong, a value is not finite or too large, or ``num`` is below 1.

    Reference:
        https://submodlib.readthedocs.io/en/latest/functions/facilityLocation.html
    """
    points_ND = _checked_points(points_ND)
    _check_num(num)
    if num >= len(points_ND):
        return np.arange(len(points_ND))
    if len(points_ND) > MAX_FACILITIES:
        raise ConfigError(
            f"facility location compares all pairs of examples: takes at most {MAX_FACILITIES:,}, got "
            f"{len(points_ND):,}; select per domain, or use k-center"
        )
    try:
        function = importlib.import_module("submodlib").FacilityLocationFunction
    except ImportError:
        raise ConfigError(
            "facility location needs submodlib, which is not installed; run: pip install 'doremi-mix[submodular]'"
        ) from None
    unit_ND = points_ND / np.maximum(np.sqrt(np.square(points_ND, dtype=np.float64).sum(1)), 1e-30)[:, None]
    unit_ND = unit_ND.astype(np.float32)
    with np.errstate(invalid="ignore"):  # see k_center.select
        similarity_NN = np.maximum(unit_ND @ unit_ND.T, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for a class where SciPy no longer wants it to be
        model = function(n=len(points_ND), mode="dense", separate_rep=False, sijs=similarity_NN)
    pairs = model.maximize(
        budget=num, optimizer="LazyGreedy", stopIfZeroGain=False, stopIfNegativeGain=False, show_progress=False
    )
    return np.array([row for row, _ in pairs], dtype=np.int64)


def _checked_points(points_ND: NDArray[np.float32], first_row: int = 0) -> NDArray[np.float32]:
    points_ND = np.ascontiguousarray(points_ND, dtype=np.float32)
    if points_ND.ndim != 2:
        raise ValueError(f"points must have shape [N, D], got {list(points_ND.shape)}")
    for start in range(0, len(points_ND), 4096):
        is_good = (np.abs(points_ND[start : start + 4096]) < LARGEST).all(1)  # False for NaN
        if not is_good.all():
            row = first_row + start + int(is_good.argmin())
            raise ValueError(f"points must be finite and below {LARGEST:g}, got NaN or a larger value in row {row:,}")
    return points_ND


def _check_num(num: int) -> None:
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")


def _quality_ranks(quality_N: ArrayLike, num_points: int) -> NDArray[np.float64]:
    """Returns ranks in (0, 1), equal ones for equal values; none is 0, so that no distance is forgotten."""
    quality_N = np.asarray(quality_N, dtype=np.float64)
    if quality_N.shape != (num_points,):
        raise ValueError(f"quality must have one value per point, [{num_points}], got {list(quality_N.shape)}")
    if not np.isfinite(quality_N).all():
        row = int(np.isfinite(quality_N).argmin())
        raise ValueError(f"quality must be finite, got {quality_N[row]} in row {row:,}")
    _, group_N, size_G = np.unique(quality_N, return_inverse=True, return_counts=True)
    middle_G = np.cumsum(size_G) - size_G / 2
    return middle_G[group_N] / max(1, num_points)

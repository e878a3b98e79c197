"""The search of k-center-greedy: exact, with as few distances as it takes.

Axes: N points, D dimensions, K selected points (centers), B centers of one round, M points of a part, P pairs of a
point and a center.

A distance is the square root of a float64 sum of squared differences, added up in one order whatever is computed beside
it.  Matrix products in float32, whose last digits depend on the machine and on the shapes, only decide which pairs
cannot matter: they are compared under a bound of their rounding error, and what the bound leaves open is computed as
defined.  Hence the selection is that of the plain algorithm, bit by bit, on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

LARGEST = 1e15
"""Values must be smaller, so that no product overflows float32."""

# Centers that are chosen before all points hear of them; as many columns make a matrix product efficient.
_ROUND_CENTERS = 64
# Points among which the centers of a round are found.
_POOL_POINTS = 1024
# Values that stay in a core's cache while they are worked on.
_CACHE_VALUES = 1 << 18
# Products of numbers below its root may vanish; where all are, nothing is ruled out.
_TINY = 1e-30
# One pair computed as defined costs as much as this many in a matrix product.
_PRODUCT_GAIN = 32
# Values that a device works on at once.
_DEVICE_VALUES = 1 << 26
# Multiply-adds from which it pays to import torch and look for a GPU: a minute or so on one core.
_GPU_WORK = 1e12


@dataclass(frozen=True, eq=False)
class KCenter:
    """Points chosen so that every point is near one of them.

    Attributes:
        selected_K: rows of the selected points in the order of selection, int64.
        radius: the largest distance of any point to the nearest selected one.
        radii_K: the distance of each selected point to those before it, float64; infinite for the first.
        nearest_N: the row of the selected point that is nearest to each point, int64; of several the first selected.
        num_distances: pairs whose distance was computed; one that is computed again counts again.
    """

    selected_K: NDArray[np.int64]
    radius: float
    radii_K: NDArray[np.float64]
    nearest_N: NDArray[np.int64]
    num_distances: int


def select(
    points_ND: NDArray[np.float32],
    num: int,
    weights_N: NDArray[np.float64] | None,
    device: str | None,
    progress: Callable[[int], object] | None,
) -> KCenter:
    """Selects points as ``diversity.k_center_greedy`` says.

    Args:
        points_ND: float32, in C order, smaller than LARGEST.
        num: K, at least 1.
        weights_N: above 0, float64; None for 1.
        device: None to choose, "cpu" for NumPy, or a device of torch.
        progress: is told the number of points selected since it was last called.
    """
    num_points = len(points_ND)
    if num >= num_points:
        all_N = np.arange(num_points)
        if progress:
            progress(num_points)
        return KCenter(all_N, 0.0, np.full(num_points, math.nan), all_N, 0)
    if device is None and float(points_ND.size) * num >= _GPU_WORK:
        device = _fitting_gpu(points_ND)
    if device is None or device == "cpu":
        # A BLAS may look at lanes beside the numbers and raise flags for what is no part of the result.
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            return _select_pruned(points_ND, num, weights_N, progress)
    return _select_on_device(points_ND, num, weights_N, device, progress)


class _Cover:
    """What each point knows of the centers so far.

    Attributes:
        points_ND: the points.
        weights_N: what distances are multiplied with to choose the next center; None for 1.
        distance_N: to the nearest center.
        center_N: which one that is, as a position in the order of selection.
        key_N: the weighted distance, by which the next center is chosen; -1 for a center.
        norm_N: squared length, made smaller by as much as products can be wrong.
        bar_N: what the product with a center, less the center's own half, must exceed for it to be possibly nearer.
        num_distances: pairs computed, in either way.
    """

    def __init__(self, points_ND: NDArray[np.float32], weights_N: NDArray[np.float64] | None, first: int) -> None:
        num_points, num_dimensions = points_ND.shape
        self.points_ND, self.weights_N = points_ND, weights_N
        self.center_N = np.zeros(num_points, dtype=np.int32)
        self.norm_N = np.empty(num_points)
        self.distance_N = _distances_to(points_ND, points_ND[first])
        for rows in _slabs(num_points, num_dimensions):
            self.norm_N[rows] = np.square(points_ND[rows], dtype=np.float64).sum(1)
        self.norm_N *= 1 - _product_error(num_dimensions)
        self.key_N = self.distance_N.copy() if weights_N is None else self.distance_N * weights_N
        self.key_N[first] = -1.0
        self.bar_N = _bars(self.norm_N, self.distance_N)
        self.num_distances = num_points

    def part(self, rows_M: NDArray[np.int64]) -> _Cover:
        """Returns a copy of some rows, whose count starts at 0."""
        part = object.__new__(_Cover)
        part.points_ND = self.points_ND[rows_M]
        part.weights_N = None if self.weights_N is None else self.weights_N[rows_M]
        part.norm_N, part.bar_N = self.norm_N[rows_M], self.bar_N[rows_M]
        part.distance_N, part.center_N, part.key_N = self.distance_N[rows_M], self.center_N[rows_M], self.key_N[rows_M]
        part.num_distances = 0
        return part

    def absorb(self, part: _Cover, rows_M: NDArray[np.int64]) -> None:
        """Takes back what a part has learned."""
        self.bar_N[rows_M], self.key_N[rows_M] = part.bar_N, part.key_N
        self.distance_N[rows_M], self.center_N[rows_M] = part.distance_N, part.center_N
        self.num_distances += part.num_distances

    def offer_one(self, centers_KD: NDArray[np.float32], position: int, half: np.float32) -> None:
        """Compares all rows with one center."""
        products_N = self.points_ND @ centers_KD[position]
        products_N -= half
        rows_M = np.flatnonzero(products_N > self.bar_N)
        self.num_distances += len(self.points_ND)
        self._settle(rows_M, np.full(len(rows_M), position), centers_KD)

    def offer_by_product(
        self, rows_M: NDArray[np.int64], centers_KD: NDArray[np.float32], start: int, half_B: NDArray[np.float32]
    ) -> None:
        """Compares some rows with all centers from ``start`` on by a matrix product."""
        products_MB = self.points_ND[rows_M] @ centers_KD[start : start + len(half_B)].T
        products_MB -= half_B
        open_M = np.flatnonzero(products_MB.max(1) > self.bar_N[rows_M])
        self.num_distances += products_MB.size
        rows_M, products_MB = rows_M[open_M], products_MB[open_M]
        # The probable nearest first: against its distance, few others stay open.
        best_M = products_MB.argmax(1)
        self._settle(rows_M, start + best_M, centers_KD)
        open_MB = products_MB > self.bar_N[rows_M, None]
        open_MB[np.arange(len(rows_M)), best_M] = False
        self.offer_pairs(rows_M, open_MB, centers_KD, start)

    def offer_pairs(
        self, rows_M: NDArray[np.int64], wanted_MB: NDArray[np.bool_], centers_KD: NDArray[np.float32], start: int
    ) -> None:
        """Compares each row with the centers that are wanted for it."""
        row_P, column_P = np.nonzero(wanted_MB)
        self._settle(rows_M[row_P], start + column_P, centers_KD)

    def _settle(
        self, rows_P: NDArray[np.int64], positions_P: NDArray[np.int64], centers_KD: NDArray[np.float32]
    ) -> None:
        """Computes pairs as defined and gives each row its nearest center, of equally near ones the earliest."""
        distance_P = np.empty(len(rows_P))
        for pairs in _slabs(len(rows_P), centers_KD.shape[1]):
            distance_P[pairs] = _lengths(self.points_ND[rows_P[pairs]], centers_KD[positions_P[pairs]])
        self.num_distances += len(rows_P)
        nearer_P = distance_P < self.distance_N[rows_P]
        nearer_P |= (distance_P == self.distance_N[rows_P]) & (positions_P < self.center_N[rows_P])
        rows_P, positions_P, distance_P = rows_P[nearer_P], positions_P[nearer_P], distance_P[nearer_P]
        # The last of several assignments to a row is the one that stays.
        order_P = np.lexsort((-positions_P, -distance_P))
        rows_P, positions_P, distance_P = rows_P[order_P], positions_P[order_P], distance_P[order_P]
        self.distance_N[rows_P], self.center_N[rows_P] = distance_P, positions_P
        distance_P = self.distance_N[rows_P]
        self.key_N[rows_P] = distance_P if self.weights_N is None else distance_P * self.weights_N[rows_P]
        self.bar_N[rows_P] = _bars(self.norm_N[rows_P], distance_P)


def _select_pruned(
    points_ND: NDArray[np.float32],
    num: int,
    weights_N: NDArray[np.float64] | None,
    progress: Callable[[int], object] | None,
) -> KCenter:
    """Selects in rounds.

    Distances only fall.  So as long as the best of a pool of the farthest points is better than every point outside was
    at the start of the round, it is the best of all, and the points outside can wait for the end of the round.  Then
    all centers of the round are offered to them at once, but for those that the triangle inequality rules out.
    """
    num_points, num_dimensions = points_ND.shape
    selected_K, radii_K = np.empty(num, dtype=np.int64), np.full(num, math.inf)
    centers_KD = np.empty((num, num_dimensions), dtype=np.float32)
    half_K = np.empty(num, dtype=np.float32)
    selected_K[0] = first = _nearest_to_mean(points_ND)
    cover = _Cover(points_ND, weights_N, first)
    cover.num_distances += num_points
    centers_KD[0], half_K[0] = points_ND[first], _rounded_down(cover.norm_N[first] / 2)
    done = 1
    if progress:
        progress(1)
    while done < num:
        rows_M, floor, first_outside = _pool(cover.key_N, _POOL_POINTS)
        pool, start = cover.part(rows_M), done
        while done < min(num, start + _ROUND_CENTERS):
            best = int(pool.key_N.argmax())
            if not (pool.key_N[best] > floor or (pool.key_N[best] == floor and rows_M[best] < first_outside)):
                break
            selected_K[done], radii_K[done] = rows_M[best], pool.distance_N[best]
            centers_KD[done], half_K[done] = pool.points_ND[best], _rounded_down(pool.norm_N[best] / 2)
            pool.offer_one(centers_KD, done, half_K[done])
            pool.key_N[best] = -1.0
            done += 1
        cover.absorb(pool, rows_M)
        outside_N = np.ones(num_points, dtype=bool)
        outside_N[rows_M] = False
        _offer_round(cover, outside_N, centers_KD, half_K, start, done)
        if progress:
            progress(done - start)
    nearest_N = selected_K[cover.center_N]
    return KCenter(selected_K, float(cover.distance_N.max()), radii_K, nearest_N, cover.num_distances)


def _pool(key_N: NDArray[np.float64], size: int) -> tuple[NDArray[np.int64], float, int]:
    """Returns the points with the largest keys in the order of rows, of equal ones those with the lowest rows.

    Also the largest key outside and the first row that has it.
    """
    if size >= len(key_N):
        return np.arange(len(key_N)), -1.0, 0
    floor = float(np.partition(key_N, -size)[-size])
    inside_N = key_N > floor
    tied = np.flatnonzero(key_N == floor)
    num_tied_inside = size - int(inside_N.sum())
    inside_N[tied[:num_tied_inside]] = True
    first_outside = int(tied[num_tied_inside]) if num_tied_inside < len(tied) else len(key_N)
    return np.flatnonzero(inside_N), floor, first_outside


def _offer_round(
    cover: _Cover,
    outside_N: NDArray[np.bool_],
    centers_KD: NDArray[np.float32],
    half_K: NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    """Offers the centers from ``start`` to ``stop`` to the points outside the pool that they can be nearer to."""
    reach_KB = _reaches(centers_KD, half_K, start, stop)
    cover.num_distances += reach_KB.size
    # A point whose center is of this round was in the pool.
    nearest_reach_K = np.concatenate([reach_KB.min(1), np.zeros(stop - start, dtype=np.float32)])
    rows_M = np.flatnonzero((cover.distance_N > nearest_reach_K[cover.center_N]) & outside_N)
    for rows in _slabs(len(rows_M), max(stop - start, centers_KD.shape[1])):
        wanted_MB = reach_KB[cover.center_N[rows_M[rows]]] < cover.distance_N[rows_M[rows], None]
        if np.count_nonzero(wanted_MB) * _PRODUCT_GAIN > wanted_MB.size:
            cover.offer_by_product(rows_M[rows], centers_KD, start, half_K[start:stop])
        else:
            cover.offer_pairs(rows_M[rows], wanted_MB, centers_KD, start)


def _reaches(
    centers_KD: NDArray[np.float32], half_K: NDArray[np.float32], start: int, stop: int
) -> NDArray[np.float32]:
    """Returns half the distance from each center before ``start`` to each of the round, rounded down, [start, B].

    By the triangle inequality, a point whose distance to its own center is no more than that is no nearer to the other.
    """
    reach_KB = centers_KD[:start] @ centers_KD[start:stop].T
    reach_KB *= -1
    reach_KB += half_K[:start, None]
    reach_KB += half_K[start:stop]
    reach_KB -= _TINY
    # This is less than d^2 / 2, and (d / 2)^2 is wanted.
    reach_KB *= 0.5
    np.maximum(reach_KB, 0, out=reach_KB)
    np.sqrt(reach_KB, out=reach_KB)
    reach_KB *= np.float32(1 - 1e-6)
    return reach_KB


def _fitting_gpu(points_ND: NDArray[np.float32]) -> str | None:
    """Returns the device of a GPU that has room for the points; None if there is none."""
    import torch

    if not torch.cuda.is_available() or 1.5 * points_ND.nbytes + (1 << 30) > torch.cuda.mem_get_info()[0]:
        return None
    return "cuda"


def _select_on_device(
    points_ND: NDArray[np.float32],
    num: int,
    weights_N: NDArray[np.float64] | None,
    device: str,
    progress: Callable[[int], object] | None,
) -> KCenter:
    """Selects by the plain algorithm, one product with all points per center, and the same exact look at what is near.

    A GPU reads all points in less time than pruning them would take.
    """
    import torch

    first = _nearest_to_mean(points_ND)
    cover = _Cover(points_ND, weights_N, first)
    state = _DeviceCover(cover, device)
    num_distances = 2 * len(points_ND)
    selected_K = torch.full((num,), first, device=device)
    radii_K = torch.full((num,), math.inf, dtype=torch.float64, device=device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the bound of the error is that of float32
    try:
        for done in range(1, num):
            best = state.key_N.argmax()  # of equal ones the first
            selected_K[done], radii_K[done] = best, state.distance_N[best]
            num_distances += state.offer(best, done)
            if progress:
                progress(1 if done > 1 else 2)
    finally:
        torch.set_float32_matmul_precision(precision)
    rows_K = selected_K.cpu().numpy()
    radius = float(state.distance_N.max())
    return KCenter(rows_K, radius, radii_K.cpu().numpy(), rows_K[state.center_N.cpu().numpy()], num_distances)


class _DeviceCover:
    """A ``_Cover`` on a device."""

    def __init__(self, cover: _Cover, device: str) -> None:
        import torch

        arrays = (cover.points_ND, cover.norm_N, cover.bar_N, cover.distance_N, cover.key_N, cover.center_N)
        self.points_ND, self.norm_N, self.bar_N, self.distance_N, self.key_N, self.center_N = (
            torch.from_numpy(array).to(device) for array in arrays
        )
        self.weights_N = torch.ones_like(self.norm_N) if cover.weights_N is None else torch.from_numpy(cover.weights_N)
        self.weights_N = self.weights_N.to(device)
        self.step = max(1, _DEVICE_VALUES // max(1, cover.points_ND.shape[1]))

    def offer(self, best: torch.Tensor, position: int) -> int:
        """Makes a point a center, compares all points with it, and returns how many distances that took."""
        import torch

        down = self.bar_N.new_full((), -math.inf)
        center_D = self.points_ND[best]
        half = torch.nextafter((self.norm_N[best] / 2).float(), down)
        rows_M = (self.points_ND @ center_D - half > self.bar_N).nonzero().squeeze(1)
        for rows_P in torch.split(rows_M, self.step):
            distance_P = (self.points_ND[rows_P].double() - center_D).square().sum(1).sqrt()
            old_P = self.distance_N[rows_P]
            nearer_P = distance_P < old_P
            distance_P = torch.where(nearer_P, distance_P, old_P)
            self.distance_N[rows_P] = distance_P
            self.center_N[rows_P] = torch.where(nearer_P, position, self.center_N[rows_P])
            self.key_N[rows_P] = torch.where(nearer_P, distance_P * self.weights_N[rows_P], self.key_N[rows_P])
            bar_P = (self.norm_N[rows_P] - distance_P.square() * (1 + 1e-9)) / 2 - _TINY
            self.bar_N[rows_P] = torch.nextafter(bar_P.float(), down)
        self.key_N[best] = -1.0
        return len(self.points_ND) + len(rows_M)


def _nearest_to_mean(points_ND: NDArray[np.float32]) -> int:
    mean_D = points_ND.mean(0, dtype=np.float64)
    return int(_distances_to(points_ND, mean_D).argmin())


def _distances_to(points_ND: NDArray[np.float32], center_D: NDArray[Any]) -> NDArray[np.float64]:
    distance_N = np.empty(len(points_ND))
    for rows in _slabs(*points_ND.shape):
        distance_N[rows] = _lengths(points_ND[rows], center_D)
    return distance_N


def _lengths(from_PD: NDArray[Any], to_PD: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the distances that count: each adds up its own row, in an order that depends on D alone."""
    difference_PD = np.subtract(from_PD, to_PD, dtype=np.float64)
    np.square(difference_PD, out=difference_PD)
    squared_P: NDArray[np.float64] = difference_PD.sum(1)
    return np.sqrt(squared_P)


def _slabs(num_rows: int, num_columns: int) -> list[slice]:
    """Cuts rows into pieces that fit the cache."""
    step = max(1, _CACHE_VALUES // max(1, num_columns))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _product_error(num_dimensions: int) -> float:
    """Bounds the error of a float32 product x.y, whatever the order of its sum, as a share of (x^2 + y^2) / 2."""
    return min(1.0, 1.01 * (num_dimensions + 16) * 2.0**-24)


def _rounded_down(value: Any) -> Any:
    """Rounds to float32, never up."""
    return np.nextafter(np.float32(value), np.float32(-math.inf))


def _bars(norm_N: NDArray[np.float64], distance_N: NDArray[np.float64]) -> NDArray[np.float32]:
    """Returns what must be exceeded by x.y - y^2 / 2 for y to be nearer to x than x's distance, or within the error."""
    bar_N: NDArray[np.float32] = _rounded_down((norm_N - np.square(distance_N) * (1 + 1e-9)) / 2 - _TINY)
    return bar_N

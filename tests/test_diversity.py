"""k-center-greedy against the plain algorithm, its bounds against brute force, and facility location by a library."""

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

import doremi_mix
from doremi_mix.errors import ConfigError
from doremi_mix.filters import diversity, k_center
from doremi_mix.filters.diversity import facility_location, k_center_greedy, k_center_sharded


def distances(points, center):
    """The definition: a float64 sum of squared differences, row by row."""
    return np.sqrt(np.square(points.astype(np.float64) - center).sum(1))


def plain(points, num, quality=None):
    """Gonzalez' algorithm as it is written down: all distances to each new center."""
    weights = 1.0 if quality is None else (rankdata(quality) - 0.5) / len(points)
    selected = [int(distances(points, points.mean(0, dtype=np.float64)).argmin())]
    radii = [math.inf]
    distance = distances(points, points[selected[0]])
    nearest = np.full(len(points), selected[0])
    while len(selected) < num:
        key = distance * weights
        key[selected] = -1.0
        best = int(key.argmax())
        selected.append(best)
        radii.append(distance[best])
        new = distances(points, points[best])
        nearest[new < distance] = best
        distance = np.minimum(new, distance)
    return selected, radii, distance.max(), nearest.tolist()


def check(points, num, quality=None, devices=(None,)):
    selected, radii, radius, nearest = plain(points, num, quality)
    for device in devices:
        if device is None:
            result = k_center_greedy(points, num, quality_N=quality)
            assert (result.radii_K.tolist(), result.radius) == (radii, radius)
        else:
            weights = None if quality is None else (rankdata(quality) - 0.5) / len(points)
            result = k_center._select_on_device(points, num, weights, device, None)
            # It may add up in another order.
            assert [*result.radii_K, result.radius] == pytest.approx([*radii, radius], rel=1e-12)
        assert result.selected_K.tolist() == selected
        assert result.nearest_N.tolist() == nearest


BOTH = (None, "cpu")
"""The NumPy code, and that for GPUs on the CPU."""


def gaussian_clusters(num_points, num_dimensions, num_clusters, seed=0):
    rng = np.random.default_rng(seed)
    middle = 10 * rng.normal(size=(num_clusters, num_dimensions))
    noise = rng.normal(size=(num_points, num_dimensions))
    return (middle[rng.integers(0, num_clusters, num_points)] + noise).astype(np.float32)


# --- the selection is the plain one's -------------------------------------------------------------------------------


def test_on_random_points_it_selects_what_the_plain_algorithm_does():
    check(np.random.default_rng(0).normal(size=(5000, 64)).astype(np.float32), 300, devices=BOTH)


@pytest.mark.parametrize("quality", [None, np.arange(6000) % 7])
def test_on_clusters_it_selects_what_the_plain_algorithm_does(quality):
    check(gaussian_clusters(6000, 16, 40), 200, quality, devices=BOTH)


# The ways through the search: tiny pools and rounds, always a product or never, pieces of a few rows.
WAYS = [
    {"_POOL_POINTS": 1},
    {"_POOL_POINTS": 3, "_ROUND_CENTERS": 2, "_PRODUCT_GAIN": 0},
    {"_POOL_POINTS": 5, "_ROUND_CENTERS": 4, "_PRODUCT_GAIN": 10**9},
    {"_POOL_POINTS": 4, "_ROUND_CENTERS": 64, "_PRODUCT_GAIN": 3, "_CACHE_VALUES": 7},
    {},
]


@st.composite
def problems(draw):
    num_points, num_dimensions = draw(st.integers(2, 40)), draw(st.integers(1, 4))
    # Few values: many equal distances and equal points.
    values = draw(
        st.lists(st.integers(0, 3), min_size=num_points * num_dimensions, max_size=num_points * num_dimensions)
    )
    # Behind 4096, squares are rounded in float32, and what is equally far differs in a product.
    offset = draw(st.sampled_from([0, 4099, 100_003]))
    points = np.array(values, dtype=np.float32).reshape(num_points, num_dimensions) + np.float32(offset)
    quality = draw(st.none() | st.lists(st.integers(0, 2), min_size=num_points, max_size=num_points))
    return points, draw(st.integers(1, num_points - 1)), quality


@pytest.mark.parametrize("way", range(len(WAYS)))
@given(problem=problems())
@settings(deadline=None, max_examples=40)
def test_ties_are_broken_as_the_plain_algorithm_does(way, problem):
    with mock.patch.multiple(k_center, **WAYS[way]) if WAYS[way] else contextlib.nullcontext():
        check(*problem)


@given(problem=problems())
@settings(deadline=None, max_examples=30)
def test_ties_are_broken_on_a_device_as_the_plain_algorithm_does(problem):
    check(*problem, devices=["cpu"])


@pytest.mark.parametrize("way", range(len(WAYS)))
@pytest.mark.parametrize(
    ("scale", "offset"),
    [(1.0, 1e4), (1e-4, 1.0), (1e-25, 0.0), (1e-21, 0.0), (3e-20, 0.0), (1e13, 0.0), (1e-40, 0.0), (1.0, 1e8)],
)
def test_where_products_in_float32_are_worthless_the_selection_is_still_exact(way, scale, offset):
    """Far from the origin, squared lengths swamp the differences; tiny numbers vanish in products."""
    rng = np.random.default_rng(1)
    points = (offset + scale * rng.normal(size=(100, 5))).astype(np.float32)
    points[7] *= 1e-3
    with mock.patch.multiple(k_center, **WAYS[way]) if WAYS[way] else contextlib.nullcontext():
        check(points, 40, rng.random(100))
        check(points, 40)


def test_near_ties_below_the_precision_of_float32_products():
    """All points lie at about one distance of each other, up to parts in ten million."""
    rng = np.random.default_rng(2)
    points = np.eye(200, dtype=np.float32) + (1e-7 * rng.normal(size=(200, 200))).astype(np.float32)
    with mock.patch.multiple(k_center, _POOL_POINTS=20, _ROUND_CENTERS=8):
        check(points, 120, devices=BOTH)


@pytest.mark.parametrize("gain", [0, 10**9])
def test_ties_that_products_in_float32_see_otherwise(gain):
    """On a grid far from the origin, many centers are equally near, and products are rounded."""
    points = np.random.default_rng(4).integers(0, 9, (900, 3)).astype(np.float32) + np.float32(4099)
    with mock.patch.multiple(k_center, _POOL_POINTS=200, _ROUND_CENTERS=16, _PRODUCT_GAIN=gain):
        check(points, 120)


def test_a_distance_does_not_depend_on_what_is_computed_beside_it():
    rng = np.random.default_rng(3)
    for num_dimensions in (1, 2, 7, 64, 129, 300):
        points, center = rng.normal(size=(50, num_dimensions)).astype(np.float32), rng.normal(size=num_dimensions)
        together = k_center._lengths(points, center)
        alone = [float(k_center._lengths(points[i : i + 1], center)[0]) for i in range(50)]
        pairs = k_center._lengths(points[::-1][:7], np.tile(center, (7, 1)))
        assert together.tolist() == alone == distances(points, center).tolist()
        assert pairs.tolist() == together[::-1][:7].tolist()


# --- the promises ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_dimensions", "num"), [(32, 1000), (64, 2000)])
def test_clusters_take_less_than_a_fifth_of_the_distances(num_dimensions, num):
    points = gaussian_clusters(100_000, num_dimensions, 200)
    result = k_center_greedy(points, num)
    assert result.num_distances * 5 < len(points) * num
    # Every distance that was not computed was rightly left out.
    some = np.random.default_rng(0).choice(len(points), 50, replace=False)
    for row in some:
        own = distances(points[result.selected_K], points[row])
        assert result.selected_K[own.argmin()] == result.nearest_N[row]


def test_distances_are_counted():
    line = np.arange(10, dtype=np.float32)[:, None]
    # To the mean, to the first point, and to each of two more; all are in the pool.
    assert k_center_greedy(line, 3).num_distances >= 10 + 10 + 2 * 10
    with mock.patch.multiple(k_center, _POOL_POINTS=1, _PRODUCT_GAIN=0):
        assert k_center_greedy(line, 3).num_distances >= 10 + 10


def best_radius(points, num):
    """The smallest radius that any points as centers can have."""
    between = np.array([distances(points, point) for point in points])
    return min(between[list(centers)].min(0).max() for centers in itertools.combinations(range(len(points)), num))


def radius_of(points, selected):
    return np.min([distances(points, points[row]) for row in selected], axis=0).max()


@pytest.mark.parametrize("seed", range(8))
def test_the_radius_is_at_most_twice_the_best(seed):
    points = np.random.default_rng(seed).normal(size=(12, 2)).astype(np.float32)
    result = k_center_greedy(points, 4)
    best = best_radius(points, 4)
    assert best <= result.radius <= 2 * best
    assert result.radius == radius_of(points, result.selected_K)


def test_a_line_by_hand():
    """The mean of 0, 4, 5, 10 is 4.75, and 5 is nearest; then the ends are equally far."""
    result = k_center_greedy(np.array([[0.0], [4.0], [5.0], [10.0]], dtype=np.float32), 3)
    assert result.selected_K.tolist() == [2, 0, 3]
    assert result.radii_K.tolist() == [math.inf, 5.0, 5.0]
    assert (result.radius, result.nearest_N.tolist()) == (1.0, [0, 2, 2, 3])


def test_quality_moves_the_choice_from_the_farthest_to_the_good():
    """5 is the middle; 0 and 10 are equally far.  Ranks scale to 1/8, 3/8, 5/8, 7/8: 10 weighs least."""
    line = np.array([[0.0], [4.0], [5.0], [10.0]], dtype=np.float32)
    assert k_center_greedy(line, 2, quality_N=[0.2, 0.3, 0.4, 0.1]).selected_K.tolist() == [2, 0]
    assert k_center_greedy(line, 2, quality_N=[0.1, 0.9, 0.4, 0.3]).selected_K.tolist() == [2, 3]
    # 4 is selected; then 5 is taken for 1 * 5/8, though 5.5 is farther: 1.5 * 3/8.
    near = np.array([[3.5], [4.0], [5.0], [5.5]], dtype=np.float32)
    assert k_center_greedy(near, 2, quality_N=[1, 4, 3, 2]).selected_K.tolist() == [1, 2]


def test_equal_quality_changes_nothing():
    points = gaussian_clusters(500, 8, 10)
    plain_result, weighted = k_center_greedy(points, 50), k_center_greedy(points, 50, quality_N=np.full(500, -3.0))
    assert weighted.selected_K.tolist() == plain_result.selected_K.tolist()
    assert weighted.radii_K.tolist() == plain_result.radii_K.tolist()


def test_equal_points_are_taken_last_and_in_the_order_of_rows():
    points = np.array([[0.0], [1.0], [0.0], [1.0], [0.0]], dtype=np.float32)
    result = k_center_greedy(points, 4)
    assert result.selected_K.tolist() == [0, 1, 2, 3]
    assert result.radii_K.tolist() == [math.inf, 1.0, 0.0, 0.0]
    assert result.nearest_N.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("num", [3, 4, 100])
def test_no_more_points_than_wanted_are_all_taken(num):
    points = np.array([[5.0], [0.0], [1.0]], dtype=np.float32)
    result = k_center_greedy(points, num)
    assert result.selected_K.tolist() == result.nearest_N.tolist() == [0, 1, 2]
    assert (result.radius, result.num_distances) == (0.0, 0)
    assert k_center_greedy(points[:0], num).selected_K.tolist() == []


def test_the_input_is_left_as_it_was():
    points = gaussian_clusters(200, 4, 5)
    points.setflags(write=False)
    k_center_greedy(points, 20)
    # Any order of memory will do.
    assert k_center_greedy(np.asfortranarray(points), 20).selected_K.tolist() == plain(points, 20)[0]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_progress_adds_up(device):
    told = []
    points = gaussian_clusters(3000, 4, 5)
    if device is None:
        k_center_greedy(points, 200, progress=told.append)
    else:
        k_center._select_on_device(points, 200, None, device, told.append)
    assert sum(told) == 200
    assert len(told) > 2
    k_center_greedy(points[:5], 9, progress=told.append)
    assert sum(told) == 205


BAD = np.zeros((5000, 2), dtype=np.float32)


@pytest.mark.parametrize(("value", "row"), [(math.nan, 4999), (math.inf, 0), (-math.inf, 4100), (1e15, 3), (-3e38, 17)])
def test_a_point_that_is_no_point_is_named(value, row):
    points = BAD.copy()
    points[row, 1] = value
    message = f"points must be finite and below 1e+15, got NaN or a larger value in row {row:,}"
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the whole message is compared)
        k_center_greedy(points, 2)
    assert str(refusal.value) == message
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        k_center_sharded([BAD[:row], points[row:]], 2)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], 1, None), "points must have shape [N, D], got [2]"),
        (([[1.0], [2.0]], 0, None), "num must be at least 1, got 0"),
        (([[1.0], [2.0]], 1, [1.0]), "quality must have one value per point, [2], got [1]"),
        (([[1.0], [2.0]], 1, [1.0, math.nan]), "quality must be finite, got nan in row 1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    points, num, quality = arguments
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the whole message is compared)
        k_center_greedy(np.array(points, dtype=np.float32), num, quality_N=quality)
    assert str(refusal.value) == message


# --- devices --------------------------------------------------------------------------------------------------------


def test_small_work_does_not_import_torch():
    code = (
        "import sys, numpy as np\nfrom doremi_mix.filters.diversity import k_center_greedy\n"
        "k_center_greedy(np.random.default_rng(0).normal(size=(2000, 8)).astype('float32'), 100)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("available", "free", "device"), [(False, 0, None), (True, 1 << 20, None), (True, 1 << 40, "cuda")]
)
def test_a_gpu_is_used_where_there_is_one_with_room(monkeypatch, available, free, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 40))
    monkeypatch.setattr(k_center, "_GPU_WORK", 1.0)
    used = []
    on_device = k_center._select_on_device

    def spy(points, num, weights, name, progress):
        used.append(name)
        return on_device(points, num, weights, "cpu", progress)

    monkeypatch.setattr(k_center, "_select_on_device", spy)
    points = gaussian_clusters(300, 4, 5)
    assert k_center_greedy(points, 30).selected_K.tolist() == plain(points, 30)[0]
    assert used == [device] * (device is not None)
    k_center_greedy(points, 30, device="cpu")
    assert used == [device] * (device is not None)
    k_center_greedy(points, 30, device="cuda:1")
    assert used[-1] == "cuda:1"


def test_a_device_computes_products_in_full_float32_and_leaves_the_setting_as_it_was():
    seen = []
    offer = k_center._DeviceCover.offer

    def spy(self, best, position):
        seen.append(torch.get_float32_matmul_precision())
        return offer(self, best, position)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with mock.patch.object(k_center._DeviceCover, "offer", spy):
            k_center._select_on_device(gaussian_clusters(50, 4, 5), 3, None, "cpu", None)
        assert (seen, torch.get_float32_matmul_precision()) == (["highest"] * 2, "medium")
    finally:
        torch.set_float32_matmul_precision(before)


# --- shards ---------------------------------------------------------------------------------------------------------


def cut(points, num_shards):
    return np.array_split(points, num_shards)


@pytest.mark.parametrize("num_shards", range(1, 9))
def test_shards_keep_the_radius_within_four_times_the_best(num_shards):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        points = rng.normal(size=(14, 2)).astype(np.float32)
        selected = k_center_sharded(cut(points, num_shards), 3)
        assert len(set(selected.tolist())) == 3
        assert radius_of(points, selected) <= 4 * best_radius(points, 3)


@pytest.mark.parametrize("num_shards", range(1, 9))
def test_shards_of_clusters_come_near_the_radius_of_one_shard(num_shards):
    points = gaussian_clusters(4000, 8, 30)
    one = k_center_greedy(points, 60)
    selected = k_center_sharded(cut(points, num_shards), 60)
    assert radius_of(points, selected) <= 4 * one.radius
    assert selected.tolist() == k_center_sharded(cut(points, num_shards), 60).tolist()
    if num_shards == 1:
        assert selected.tolist() == one.selected_K.tolist()


def test_the_two_steps_by_hand():
    """Each shard keeps its point nearest its mean and its farthest; of these four, the same again."""
    shards = [np.array([[0.0], [1.0], [2.5]]), np.array([[9.0], [10.0], [11.5]])]
    shards = [shard.astype(np.float32) for shard in shards]
    # 1 and 2.5; 10 and 11.5: their mean is 6.25, 2.5 (row 2) and 10 (row 4) are equally near.
    assert k_center_sharded(shards, 2).tolist() == [2, 5]


def test_empty_shards_and_small_shards_lose_nothing():
    points = gaussian_clusters(30, 3, 5)
    empty = points[:0]
    assert sorted(k_center_sharded([empty, points[:4], empty, points[4:]], 30).tolist()) == list(range(30))
    assert len(k_center_sharded([points[:4], points[4:]], 10)) == 10
    assert k_center_sharded([], 3).tolist() == []
    assert k_center_sharded([empty], 3).tolist() == []


def test_quality_is_ranked_over_all_shards():
    """Each shard alone would rank its own points from worst to best."""
    points, quality = gaussian_clusters(400, 4, 10), np.random.default_rng(0).random(400)
    shards, by_shard = [points[:100], points[100:]], [quality[:100], quality[100:]]
    weights = (rankdata(quality) - 0.5) / 400
    kept = [k_center.select(shards[0], 20, weights[:100], None, None).selected_K]
    kept.append(k_center.select(shards[1], 20, weights[100:], None, None).selected_K + 100)
    rows = np.concatenate(kept)
    expected = rows[k_center.select(points[rows], 20, weights[rows], None, None).selected_K]
    assert k_center_sharded(shards, 20, quality=by_shard).tolist() == expected.tolist()
    one = k_center_greedy(points, 20, quality_N=quality).selected_K.tolist()
    assert k_center_sharded([points], 20, quality=[quality]).tolist() == one
    with pytest.raises(ValueError, match=r"^quality must have one array per shard, 2, got 1$"):
        k_center_sharded(shards, 20, quality=by_shard[:1])


# --- facility location ----------------------------------------------------------------------------------------------


def similarities(points):
    unit = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-30)
    with np.errstate(invalid="ignore"):  # float32 products of some BLAS raise flags for lanes beside the numbers
        return np.maximum(unit @ unit.T, 0)


def plain_facility_location(points, num):
    """Greedy as it is written down: each time the point that adds the most."""
    similarity = similarities(points.astype(np.float64))
    covered, selected = np.zeros(len(points)), []
    for _ in range(num):
        gain = np.maximum(similarity - covered[:, None], 0).sum(0)
        gain[selected] = -1
        selected.append(int(gain.argmax()))
        covered = np.maximum(covered, similarity[:, selected[-1]])
    return selected


class Standin:
    """What the wrapper uses of submodlib, by the plain algorithm."""

    def __init__(self, n, mode, separate_rep, sijs):
        assert (n, mode, separate_rep) == (len(sijs), "dense", False)
        assert (sijs.dtype, sijs.shape) == (np.float32, (n, n))
        assert sijs.min() >= 0
        self.similarity = sijs.astype(np.float64)

    def maximize(self, budget, optimizer, stopIfZeroGain, stopIfNegativeGain, show_progress):
        assert (optimizer, stopIfZeroGain, stopIfNegativeGain, show_progress) == ("LazyGreedy", False, False, False)
        covered, pairs = np.zeros(len(self.similarity)), []
        for _ in range(budget):
            gain = np.maximum(self.similarity - covered[:, None], 0).sum(0)
            gain[[row for row, _ in pairs]] = -1
            pairs.append((int(gain.argmax()), float(gain.max())))
            covered = np.maximum(covered, self.similarity[:, pairs[-1][0]])
        return pairs


def test_facility_location_asks_the_library_the_right_question(monkeypatch):
    monkeypatch.setitem(sys.modules, "submodlib", SimpleNamespace(FacilityLocationFunction=Standin))
    points = gaussian_clusters(80, 6, 5)
    points[3] = 0  # similar to nothing
    points[4] *= 100  # the cosine does not see lengths
    selected = facility_location(points, 12)
    assert selected.dtype == np.int64
    assert selected.tolist() == plain_facility_location(points, 12)
    # One of each cluster comes before a second one of any.
    centers = np.eye(4, dtype=np.float32)[np.arange(40) % 4] + np.float32(0.01)
    assert sorted(row % 4 for row in facility_location(centers, 4).tolist()) == [0, 1, 2, 3]


def test_facility_location_of_no_more_points_than_wanted_needs_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "submodlib", None)
    assert facility_location(np.ones((3, 2), dtype=np.float32), 3).tolist() == [0, 1, 2]


def test_facility_location_says_what_is_missing_and_what_is_too_much(monkeypatch):
    monkeypatch.setitem(sys.modules, "submodlib", None)
    points = np.ones((30, 2), dtype=np.float32)
    with pytest.raises(ConfigError) as refusal:
        facility_location(points, 3)
    assert str(refusal.value) == (
        "facility location needs submodlib, which is not installed; run: pip install 'doremi-mix[submodular]'"
    )
    monkeypatch.setattr(diversity, "MAX_FACILITIES", 20)
    with pytest.raises(ConfigError) as refusal:
        facility_location(points, 3)
    assert str(refusal.value) == (
        "facility location compares all pairs of examples: takes at most 20, got 30; select per domain, or use k-center"
    )
    with pytest.raises(ValueError, match=r"^num must be at least 1, got 0$"):
        facility_location(points, 0)


REAL = """
import json, sys
import numpy as np
from doremi_mix.filters.diversity import facility_location
points = np.array(json.load(sys.stdin), dtype=np.float32)
twice = np.concatenate([points, points])
print("RESULTS" + json.dumps([facility_location(points, 25).tolist(), facility_location(twice, 399).tolist()]))
"""


@pytest.mark.slow
def test_the_real_library_selects_what_plain_greedy_does(tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "submodlib-py"], check=True, stdout=sys.stderr)
    points = gaussian_clusters(200, 6, 12)
    environment = {**os.environ, "PYTHONPATH": str(Path(doremi_mix.__file__).parent.parent)}
    done = subprocess.run(
        [python, "-c", REAL],
        input=json.dumps(points.tolist()),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    few, nearly_all = json.loads(done.stdout.partition("RESULTS")[2])
    assert few == plain_facility_location(points, 25)
    assert len(set(nearly_all)) == 399

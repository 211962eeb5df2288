"""Convex-hull scores and the UMAP map they are taken on."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.spatial import ConvexHull

from steer_engine.evaluate.hulls import Hull, HullScores, hull_polygon, hull_scores, reduce


def is_convex_combination(point: np.ndarray, points: np.ndarray) -> bool:
    """The definition: some weights >= 0 with sum 1 make the point out of the points."""
    constraints = np.vstack([points.T, np.ones(len(points))])
    return linprog(np.zeros(len(points)), A_eq=constraints, b_eq=[*point, 1]).status == 0


@pytest.mark.parametrize("num_dims", [1, 2, 3, 5])
def test_membership_equals_a_linear_programme(num_dims):
    rng = np.random.default_rng(num_dims)
    # Far from the origin and of unlike scales, as maps are.
    scales = 10.0 ** np.arange(num_dims)
    points = rng.normal(size=(40, num_dims)) * scales + 50
    # Narrower in more dimensions, where hulls hold less of a normal distribution.
    others = rng.normal(size=(60, num_dims)) * (3 / num_dims) * scales + 50
    expected = [is_convex_combination(p, points) for p in others]
    assert 5 < sum(expected) < 55
    assert Hull(points).contains(others).tolist() == expected


def test_scores_are_the_shares_inside_the_other_hull():
    square = np.array([[0, 0], [2, 0], [2, 2], [0, 2.0]])
    synthetic = np.array([[1, 1], [1, 0], [3, 1], [1, 9], [0.5, 0.5]])
    # Inside the square: (1, 1), (0.5, 0.5), and (1, 0) on its edge. The other way round: (2, 2).
    f_score = pytest.approx(2 * (3 / 5) * (1 / 4) / (3 / 5 + 1 / 4))
    assert hull_scores(square, synthetic) == (3 / 5, 1 / 4, f_score)
    assert hull_scores(synthetic, square) == (1 / 4, 3 / 5, f_score)
    small = square / 2 + 0.5
    assert hull_scores(square, small) == HullScores(1.0, 0.0, 0.0)


@pytest.mark.parametrize("num_points", [1, 2, 5, 6, 7, 400])
def test_every_point_is_inside_its_own_hull(num_points):
    points = np.random.default_rng(0).normal(size=(num_points, 5)).astype(np.float32) + 8
    assert hull_scores(points, points) == HullScores(1.0, 1.0, 1.0)


@pytest.mark.parametrize("rank", [0, 1, 2, 4])
def test_a_flat_set_contains_what_lies_in_its_plane_and_hull(rank):
    rng = np.random.default_rng(rank)
    basis, origin = rng.normal(size=(rank, 5)), rng.normal(size=5)
    flat = rng.normal(size=(30, rank))
    points = flat @ basis + origin
    hull = Hull(points)
    assert hull.rank == rank
    assert hull.contains(points).all()
    assert hull.contains(points.mean(axis=0, keepdims=True)).all()
    assert not hull.contains(points + 1e-3 * np.linalg.svd(basis)[2][-1]).any()
    if rank:
        others = rng.normal(size=(40, rank)) * 3 / rank
        expected = [is_convex_combination(p, flat) for p in others]
        assert 0 < sum(expected) < 40
        assert hull.contains(others @ basis + origin).tolist() == expected


def test_blocks_of_points_give_what_all_at_once_give(monkeypatch):
    rng = np.random.default_rng(3)
    hull, others = Hull(rng.normal(size=(50, 3))), rng.normal(size=(101, 3))
    at_once = hull.contains(others)
    monkeypatch.setattr("steer_engine.evaluate.hulls.MAX_DISTANCES", 7 * len(hull.facets))
    assert hull.contains(others).tolist() == at_once.tolist()


def test_the_polygon_walks_round_the_corners():
    points = np.random.default_rng(4).normal(size=(100, 2)) * [1, 30] + 5
    polygon = np.array(hull_polygon(points))
    assert {tuple(p) for p in polygon} == {tuple(p) for p in points[ConvexHull(points).vertices]}
    edges = np.roll(polygon, -1, axis=0) - polygon
    following = np.roll(edges, -1, axis=0)
    turns = edges[:, 0] * following[:, 1] - edges[:, 1] * following[:, 0]
    assert (turns > 0).all() or (turns < 0).all()


def test_the_polygon_of_a_line_has_two_corners_and_of_a_point_one():
    assert sorted(hull_polygon(np.array([[1, 1], [3, 3], [2, 2.0]]))) == [(1, 1), (3, 3)]
    assert hull_polygon(np.array([[1, 2], [1, 2.0]])) == [(1, 2)]


def test_wrong_points_are_named():
    good = np.ones((3, 2))
    with pytest.raises(ValueError, match=r"real must be \[num_points, num_dims\], got \[0, 2\]"):
        hull_scores(np.empty((0, 2)), good)
    with pytest.raises(ValueError, match="same num_dims, got 2 and 3"):
        hull_scores(good, np.ones((3, 3)))
    with pytest.raises(ValueError, match="synthetic must be finite; row 1 is not"):
        hull_scores(good, np.array([[0, 0], [0, np.nan]]))
    with pytest.raises(ValueError, match=r"points must be \[num_points, 2\]"):
        hull_polygon(np.ones((3, 5)))
    with pytest.raises(ValueError, match="num_dims, got"):
        reduce([good, np.ones((9, 3))], num_components=2, seed=0)
    with pytest.raises(ValueError, match="5 components need at least 8 points, got 6"):
        reduce([good, good], num_components=5, seed=0)


def test_the_map_is_the_same_for_a_seed_and_keeps_groups_apart_without_a_warning():
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(2, 32))
    sets = [c + 0.1 * rng.normal(size=(n, 32)) for c, n in zip(centres, (40, 25), strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = reduce(sets, num_components=2, seed=7)
    assert [p.shape for p in first] == [(40, 2), (25, 2)]
    again = reduce(sets, num_components=2, seed=7)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    other = reduce(sets, num_components=2, seed=8)
    assert (first[0] != other[0]).any()
    # The map separates the groups, so neither hull holds a point of the other.
    assert hull_scores(*first) == HullScores(0.0, 0.0, 0.0)


@pytest.mark.parametrize("num_points", [8, 9, 20])
def test_small_and_repeated_sets_can_be_mapped(num_points):
    points = np.random.default_rng(6).normal(size=(num_points, 16))
    points[: num_points // 2] = points[0]
    (mapped,) = reduce([points], num_components=5, seed=0)
    assert mapped.shape == (num_points, 5)
    assert np.isfinite(mapped).all()

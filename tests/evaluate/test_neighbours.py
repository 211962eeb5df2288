"""Precision, recall, density and coverage against package prdc and by hand."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from prdc import compute_prdc

from steer_engine.evaluate.neighbours import ManifoldScores, manifold_scores


@pytest.mark.parametrize(("num_real", "num_synthetic"), [(7, 7), (60, 41), (30, 90), (1100, 40)])
@pytest.mark.parametrize("k", [1, 5])
def test_scores_equal_prdc(num_real, num_synthetic, k):
    rng = np.random.default_rng(k)
    real = rng.normal(size=(num_real, 12))
    synthetic = 0.3 + 0.8 * rng.normal(size=(num_synthetic, 12))
    with contextlib.redirect_stdout(io.StringIO()):
        expected = compute_prdc(real, synthetic, nearest_k=k)
    assert manifold_scores(real, synthetic, k)._asdict() == pytest.approx(expected, abs=1e-12)


def test_scores_by_hand():
    real = np.array([[0.0], [1.0], [3.0]])  # radii at k=1: 1, 1, 2
    synthetic = np.array([[0.5], [2.9], [10.0], [12.0]])  # radii: 2.4, 2.4, 2, 2
    # 0.5 is in the balls of 0 and 1; 2.9 in that of 3; 10 and 12 in none. Every real point is
    # within 2.4 of 0.5 or 2.9, and each has a synthetic point in its ball.
    assert manifold_scores(real, synthetic, k=1) == ManifoldScores(2 / 4, 3 / 3, 3 / 4, 3 / 3)


def test_sets_drawn_alike_score_high_and_far_sets_score_zero():
    rng = np.random.default_rng(0)
    real, alike = rng.normal(size=(2, 300, 5))
    scores = manifold_scores(real, alike)
    assert min(scores) > 0.85
    assert scores.density == pytest.approx(1, abs=0.1)
    assert manifold_scores(real, alike + 100) == ManifoldScores(0, 0, 0, 0)


def test_one_repeated_text_has_precision_without_recall():
    rng = np.random.default_rng(1)
    real = rng.normal(size=(50, 8))
    scores = manifold_scores(real, np.repeat(real[:1], 50, axis=0))
    assert scores.precision == 1.0
    assert scores.recall == 0.0
    assert scores.coverage < 0.3


def test_copies_of_repeated_real_texts_do_not_fall_into_empty_balls():
    rng = np.random.default_rng(2)
    # Rounding in a matrix product would leave about 1e-8 between equal rows of such length.
    real = np.repeat(rng.normal(size=(20, 64)) * 10, 6, axis=0)
    assert manifold_scores(real, real, k=5) == ManifoldScores(0, 0, 0, 0)


@pytest.mark.parametrize("k", [0, 5, 2.0])
def test_k_out_of_range_is_named(k):
    points = np.random.default_rng(3).normal(size=(5, 2))
    with pytest.raises(ValueError, match=r"k must be an int in \[1, 4\]"):
        manifold_scores(points, points, k)


def test_wrong_points_are_named():
    with pytest.raises(ValueError, match="at least 2 points each, got 1"):
        manifold_scores(np.ones((1, 2)), np.ones((4, 2)))
    with pytest.raises(ValueError, match="same num_dims"):
        manifold_scores(np.ones((9, 2)), np.ones((9, 3)))

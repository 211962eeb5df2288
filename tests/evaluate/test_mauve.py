"""MAUVE against its authors' package, mauve-text, which is used nowhere else."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.special import beta

from steer_engine.evaluate.mauve import (
    mauve,
    mauve_of_histograms,
    mauve_of_labels,
    reduce_dimensions,
)


@pytest.fixture(scope="module")
def oracle():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mauve import compute_mauve

    def compute(real, synthetic, seed):
        return compute_mauve(p_features=real, q_features=synthetic, seed=seed, num_buckets=15)

    return compute


def make_features(shift: float, seed: int) -> np.ndarray:
    """150 points in six clumps, the later ones rarer by shift."""
    rng = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(99).normal(size=(6, 20))
    weights = np.exp(-shift * np.arange(6))
    chosen = rng.choice(6, size=150, p=weights / weights.sum())
    return centres[chosen] + rng.normal(size=(150, 20))


REAL, ALIKE, DIFFERENT = make_features(0, 0), make_features(0.1, 1), make_features(1, 2)


@pytest.mark.parametrize("synthetic", [ALIKE, DIFFERENT], ids=["alike", "different"])
def test_the_same_histograms_give_the_same_value_as_mauve_text(oracle, synthetic):
    """Up to how the curve's ends, 1e-6 of the weights, are closed."""
    for seed in range(3):
        theirs = oracle(REAL, synthetic, seed)
        ours = mauve_of_histograms(theirs.p_hist, theirs.q_hist)
        assert ours == pytest.approx(theirs.mauve, abs=1e-6)


@pytest.mark.parametrize("synthetic", [ALIKE, DIFFERENT], ids=["alike", "different"])
def test_means_over_clusterings_agree_with_mauve_text(oracle, synthetic):
    """faiss and scikit-learn cluster differently; two such means differ by chance by 0.01."""
    theirs = np.mean([oracle(REAL, synthetic, seed).mauve for seed in range(8)])
    ours = mauve(REAL, synthetic, seed=0, num_clusters=15)
    assert ours.value == pytest.approx(theirs, abs=0.03)
    assert ours.low <= ours.value <= ours.high
    assert ours.interval == "8 clusterings, least and most"


def test_equal_distributions_have_one_and_disjoint_ones_nearly_nothing():
    real, synthetic = np.array([0.5, 0.3, 0.2, 0]), np.array([0, 0, 0, 1.0])
    assert mauve_of_histograms(real, real) == pytest.approx(1, abs=1e-6)
    # Disjoint: x = (1 - w)^5 and y = w^5, whose area is 5 B(6, 5).
    expected = 5 * beta(6, 5)
    assert mauve_of_histograms(real, synthetic) == pytest.approx(expected, rel=0.05)


def test_the_two_sets_may_change_places():
    rng = np.random.default_rng(0)
    real, synthetic = rng.dirichlet(np.ones(9), size=2)
    forth, back = mauve_of_histograms(real, synthetic), mauve_of_histograms(synthetic, real)
    assert forth == pytest.approx(back, abs=1e-12)


def test_labels_are_counted_per_set():
    real, synthetic = np.array([0, 0, 1, 1]), np.array([2, 1, 1])
    expected = mauve_of_histograms(np.array([0.5, 0.5, 0]), np.array([0, 2 / 3, 1 / 3]))
    assert mauve_of_labels(real, synthetic) == expected


def test_nine_tenths_of_the_variance_are_kept():
    rows = REAL / np.linalg.norm(REAL, axis=1, keepdims=True)
    total = np.var(rows, axis=0).sum()
    kept = np.var(reduce_dimensions(REAL), axis=0)
    assert kept.sum() >= 0.9 * total > kept[:-1].sum()


def test_the_same_seed_gives_the_same_value_and_each_seed_other_clusterings():
    values = [mauve(REAL, DIFFERENT, seed, num_clusterings=2).value for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_a_set_of_one_text_over_and_over_has_a_value():
    collapsed = np.repeat(REAL[:1], 30, axis=0)
    assert 0 < mauve(REAL[:30], collapsed, 0, num_clusterings=2).value < 0.3
    assert mauve(collapsed, collapsed, 0, num_clusterings=2).value == pytest.approx(1, abs=1e-6)

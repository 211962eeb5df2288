"""Cosines against scikit-learn, intervals against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics.pairwise import cosine_similarity

from steer_engine.evaluate.intervals import bootstrap_mean, group_jackknife, jackknife
from steer_engine.evaluate.similarity import (
    cosine_of_means,
    mean_cosine_within,
    mean_pairwise_cosine,
)


def make_embeddings(num_texts: int, seed: int) -> np.ndarray:
    """Rows of length one around a common direction."""
    points = np.random.default_rng(seed).normal(size=(num_texts, 8)) + 1
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


REAL, SYNTHETIC = make_embeddings(80, 0), make_embeddings(60, 1)


def test_the_two_cosines_are_what_their_names_say():
    of_means = cosine_of_means(REAL, SYNTHETIC, seed=0)
    means = [e.mean(axis=0, keepdims=True) for e in (REAL, SYNTHETIC)]
    assert of_means.value == pytest.approx(cosine_similarity(*means)[0, 0], abs=1e-6)
    pairwise = mean_pairwise_cosine(REAL, SYNTHETIC, seed=0)
    assert pairwise.value == pytest.approx(cosine_similarity(REAL, SYNTHETIC).mean(), abs=1e-6)
    assert of_means.value > 1.5 * pairwise.value > 0
    for estimate in (of_means, pairwise):
        assert estimate.low < estimate.value < estimate.high


def test_within_a_set_no_text_is_paired_with_itself():
    pairs = cosine_similarity(REAL)[~np.eye(len(REAL), dtype=bool)]
    estimate = mean_cosine_within(REAL, seed=0)
    assert estimate.value == pytest.approx(pairs.mean(), abs=1e-6)
    assert estimate.low < estimate.value < estimate.high
    assert estimate.high - estimate.low < 0.2


def test_cosines_repeat_with_their_seed():
    assert mean_pairwise_cosine(REAL, SYNTHETIC, 1) == mean_pairwise_cosine(REAL, SYNTHETIC, 1)
    assert mean_pairwise_cosine(REAL, SYNTHETIC, 1) != mean_pairwise_cosine(REAL, SYNTHETIC, 2)


def test_the_bootstrap_of_a_mean_is_scipys_up_to_its_randomness():
    values = np.random.default_rng(0).exponential(size=100)
    estimate = bootstrap_mean(values, seed=0)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert estimate.value == values.mean()
    # 1,000 resamples leave the ends a standard error of about 4 % of the width.
    assert abs(estimate.low - theirs.low) < 0.12 * width
    assert abs(estimate.high - theirs.high) < 0.12 * width


def test_the_jackknife_of_a_mean_is_the_t_interval():
    values = np.random.default_rng(0).normal(size=30)
    without = (values.sum() - values) / 29
    estimate = jackknife(values.mean(), without)
    low, high = stats.t.interval(0.95, 29, loc=values.mean(), scale=stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-12)


def test_the_group_jackknife_is_as_wide_as_the_t_interval_on_average():
    """Of a mean of 200 values; with 20 groups the ratio of one draw scatters by about 16 %."""
    ratios = []
    for seed in range(40):
        values = np.random.default_rng(seed).normal(size=200)
        (estimate,) = group_jackknife(lambda kept, v=values: [v[kept].mean()], 200, seed)
        low, high = stats.t.interval(0.95, 199, loc=values.mean(), scale=stats.sem(values))
        assert estimate.value == pytest.approx(values.mean())
        ratios.append((estimate.high - estimate.low) / (high - low))
    assert 0.95 < np.mean(ratios) < 1.17  # t with 19 degrees of freedom alone makes it 1.06


def test_one_text_has_no_interval():
    estimate = jackknife(0.5, np.array([0.5]))
    assert (estimate.value, estimate.low, estimate.interval) == (0.5, None, "")

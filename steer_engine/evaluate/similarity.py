"""Two plain comparisons of embeddings, which are easily taken for each other.

The paper's text describes one and its published numbers are of the other, so both are given.
"""

from __future__ import annotations

import numpy as np

from .intervals import percentile_estimate, resample_weights
from .result import Estimate


def cosine_of_means(real: np.ndarray, synthetic: np.ndarray, seed: int) -> Estimate:
    """Cosine of the two sets' mean embeddings.

        <mean(real), mean(synthetic)> / (|mean(real)| |mean(synthetic)|)      (higher is better)

    It is near 1 for any two sets about one subject: means hide spread, so a set of one text at the
    centre scores well.

    Args:
        real, synthetic: [num_texts, size], rows of length one.
    """
    rows, columns = _resampled_means(real, synthetic, seed)
    value = _cosines(real.mean(axis=0, dtype=float), synthetic.mean(axis=0, dtype=float))
    return percentile_estimate(value, _cosines(rows, columns))


def mean_pairwise_cosine(real: np.ndarray, synthetic: np.ndarray, seed: int) -> Estimate:
    """Mean cosine over all pairs of a real and a synthetic text.

        mean over i, j of <real_i, synthetic_j> = <mean(real), mean(synthetic)>

    Best where it is what real texts have among themselves (mean_cosine_within); above, the
    synthetic texts huddle at the centre. Arguments as in cosine_of_means.
    """
    rows, columns = _resampled_means(real, synthetic, seed)
    value = real.mean(axis=0, dtype=float) @ synthetic.mean(axis=0, dtype=float)
    return percentile_estimate(value, (rows * columns).sum(axis=1))


def mean_cosine_within(embeddings: np.ndarray, seed: int) -> Estimate:
    """Mean cosine over all pairs of two different texts of one set.

    In a resample, pairs of a text with itself are left out however often it was drawn.
    """
    num_texts = len(embeddings)
    weights = resample_weights(num_texts, np.random.default_rng(seed))
    everything = np.full((1, num_texts), 1 / num_texts)

    def mean_of_pairs(weights: np.ndarray) -> np.ndarray:
        sums = np.square(weights @ embeddings.astype(np.float64)).sum(axis=1)
        own = np.square(weights).sum(axis=1)  # rows have length one
        return (sums - own) / (1 - own)

    return percentile_estimate(mean_of_pairs(everything)[0], mean_of_pairs(weights))


def _resampled_means(
    real: np.ndarray, synthetic: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means of both sets' resamples, drawn one from the other independently."""
    rng = np.random.default_rng(seed)
    real_means = resample_weights(len(real), rng) @ real.astype(np.float64)
    return real_means, resample_weights(len(synthetic), rng) @ synthetic.astype(np.float64)


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    return (left * right).sum(axis=-1) / lengths

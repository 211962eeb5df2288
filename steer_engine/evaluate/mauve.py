"""MAUVE: how much of two distributions of texts overlaps, from clusters of their embeddings.

Pillutla et al. 2021 (arXiv:2102.01454) and 2023 (JMLR 24, arXiv:2212.14578). The papers embed with
GPT-2's last hidden state; here the embedding is the evaluation's own, so values of one embedder
compare with each other and not with published ones. They fall as sets grow smaller, too.
"""

from __future__ import annotations

import numpy as np

from .result import Estimate

SCALE = 5.0  # the papers' constant c
NUM_MIXTURES = 25  # so many points of the curve, as published values have
LEAST_MIXED = 1e-6  # the first and the last keep this share of the other distribution
EXPLAINED_VARIANCE = 0.9
TEXTS_PER_CLUSTER = 10
NUM_CLUSTERINGS = 8
STARTS_PER_CLUSTERING = 5


def mauve(
    real: np.ndarray,
    synthetic: np.ndarray,
    seed: int,
    *,
    num_clusterings: int = NUM_CLUSTERINGS,
    num_clusters: int | None = None,
) -> Estimate:
    """Mean MAUVE over several k-means clusterings, with the least and the most of them.

    k-means depends on where it starts, and one clustering moves MAUVE by a few hundredths. Both
    sets together are scaled to rows of length one, reduced by PCA to 90 % of their variance and
    clustered; the histograms of the sets over the clusters are compared by mauve_of_histograms.

    Args:
        real, synthetic: [num_texts, size].
        num_clusters: None: a tenth of the smaller set, at least 2.
    Returns: value in (0, 1], higher is better.
    """
    num_clusters = num_clusters or max(2, round(min(len(real), len(synthetic)) / TEXTS_PER_CLUSTER))
    points = reduce_dimensions(np.concatenate([real, synthetic]))
    values = []
    for clustering in range(num_clusterings):
        labels = cluster(points, num_clusters, (seed * NUM_CLUSTERINGS + clustering) % 2**32)
        values.append(mauve_of_labels(labels[: len(real)], labels[len(real) :]))
    interval = f"{num_clusterings} clusterings, least and most"
    return Estimate(float(np.mean(values)), min(values), max(values), interval)


def reduce_dimensions(embeddings: np.ndarray) -> np.ndarray:
    """Rows of length one, turned to their first principal components of 90 % of the variance."""
    from sklearn.decomposition import PCA

    rows = embeddings.astype(np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    if np.ptp(rows, axis=0).max() == 0:
        return rows[:, :1]  # all texts are one; PCA has no variance to share out
    return PCA(EXPLAINED_VARIANCE, svd_solver="full").fit_transform(rows)


def cluster(points: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """k-means, the best of five starts: a label below num_clusters for each row."""
    from sklearn.cluster import KMeans

    # k-means warns where there are fewer points than clusters.
    num_clusters = min(num_clusters, len(np.unique(points, axis=0)))
    means = KMeans(num_clusters, n_init=STARTS_PER_CLUSTERING, max_iter=500, random_state=seed)
    return means.fit_predict(points)


def mauve_of_labels(real_labels: np.ndarray, synthetic_labels: np.ndarray) -> float:
    """MAUVE of the two sets' shares of each cluster."""
    num_clusters = 1 + max(real_labels.max(), synthetic_labels.max())
    counts = (
        np.bincount(labels, minlength=num_clusters) for labels in (real_labels, synthetic_labels)
    )
    return mauve_of_histograms(*(own / own.sum() for own in counts))


def mauve_of_histograms(real: np.ndarray, synthetic: np.ndarray) -> float:
    """Area under the divergence curve of two distributions P and Q over clusters.

    R = w P + (1 - w) Q;  x(w) = exp(-c KL(Q | R)), y(w) = exp(-c KL(P | R)), 0 < w < 1
    MAUVE = integral of y dx over [0, 1]

    As w goes to 1, y reaches 1 and stays there for all smaller x; as w goes to 0, x reaches 1.

    real, synthetic: [num_clusters], each with sum 1.
    Returns: in (0, 1], 1 for equal distributions; symmetric.
    Source: Pillutla et al. 2021 (arXiv:2102.01454), equations 1 and 2; 2023 (JMLR 24).
    """
    from scipy.special import rel_entr

    weights = np.linspace(LEAST_MIXED, 1 - LEAST_MIXED, NUM_MIXTURES)[:, None]
    mixtures = weights * real + (1 - weights) * synthetic
    x = np.exp(-SCALE * rel_entr(synthetic, mixtures).sum(axis=1))  # falls as w grows
    y = np.exp(-SCALE * rel_entr(real, mixtures).sum(axis=1))
    return float(x[-1] + np.trapezoid(y[::-1], x[::-1]))

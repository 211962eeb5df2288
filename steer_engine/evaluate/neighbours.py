"""k-nearest-neighbour manifolds: precision, recall, density and coverage of a set of embeddings."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..errors import check_number
from .points import as_pair

# Rows of a distance matrix that are held at once.
BLOCK_SIZE = 1024


class ManifoldScores(NamedTuple):
    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(real: np.ndarray, synthetic: np.ndarray, k: int = 5) -> ManifoldScores:
    """Precision, recall, density and coverage of synthetic against real points.

    Around each point lies a ball that reaches to its k-th nearest neighbour in its own set.

        precision = share of the synthetic points in some real ball
        recall    = share of the real points in some synthetic ball
        density   = mean over synthetic points of (real balls around it) / k
        coverage  = share of the real balls with a synthetic point inside

    Higher is better. Precision, recall and coverage are in [0, 1]; density may pass 1, and is near
    1 where both sets are drawn alike. Balls are open, so a point with k equal ones covers nothing.

    Args:
        real, synthetic: [num_points, num_dims] embeddings; Euclidean distance.
        k: neighbours, under the number of points of both sets.
    Raises: ValueError if shapes do not fit, a number is not finite, or k is out of range.
    Source: precision and recall, Kynkäänniemi et al. 2019 (arXiv:1904.06991); density and coverage,
        Naeem et al. 2020 (arXiv:2002.09797).
    """
    real, synthetic = as_pair(real, synthetic)
    num_points = min(len(real), len(synthetic))
    if num_points < 2:
        raise ValueError(f"real and synthetic need at least 2 points each, got {num_points}")
    check_number("k", k, low=1, high=num_points - 1, is_int=True)
    real_radii, synthetic_radii = _radii(real, k), _radii(synthetic, k)
    num_balls = np.zeros(len(synthetic))  # real balls around each synthetic point
    num_recalled = num_covered = 0
    for rows in _blocks(len(real)):
        distances = _distances(real[rows], synthetic)
        num_balls += (distances < real_radii[rows, None]).sum(axis=0)
        num_recalled += (distances < synthetic_radii).any(axis=1).sum()
        num_covered += (distances.min(axis=1) < real_radii[rows]).sum()
    return ManifoldScores(
        precision=float((num_balls > 0).mean()),
        recall=float(num_recalled / len(real)),
        density=float(num_balls.mean() / k),
        coverage=float(num_covered / len(real)),
    )


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """[num_points] distance to the k-th nearest other point."""
    radii = np.empty(len(points))
    for rows in _blocks(len(points)):
        # The nearest of all is the point itself.
        radii[rows] = np.partition(_distances(points[rows], points), k, axis=1)[:, k]
    return radii


def _distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Euclidean, [num_points, num_others].

    Not by way of a matrix product: there, rounding makes equal points differ, and whether a copy of
    a repeated text lies in an empty ball would be chance.
    """
    from scipy.spatial.distance import cdist

    return cdist(points, others)


def _blocks(num_rows: int) -> list[slice]:
    return [slice(start, start + BLOCK_SIZE) for start in range(0, num_rows, BLOCK_SIZE)]

"""Convex hulls of UMAP points: how much of one set lies inside the outline of another.

Convex hulls are affine invariants, so a set is first centred, turned onto its own axes and scaled;
a flat set is then a full one of fewer dimensions, and needs no case of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .points import as_pair, as_points, as_unit

UMAP_NEIGHBOURS = 15
UMAP_MIN_DIST = 0.1
# Relative to the size of the coordinates; UMAP's own are float32, with steps of 1e-7.
TOLERANCE = 1e-9
# Distances of points to facets that are held at once: 2**24 of 8 bytes are 128 MiB.
MAX_DISTANCES = 2**24


class HullScores(NamedTuple):
    precision: float
    recall: float
    f_score: float


def reduce(
    embeddings_list: Sequence[np.ndarray], *, num_components: int, seed: int
) -> list[np.ndarray]:
    """Sets of embeddings on one UMAP map of num_components dimensions.

    The map is fitted on all sets together, so points of different sets can be compared, and points
    of different calls cannot. Embeddings are scaled to length 1 and compared by Euclidean distance,
    which orders neighbours as the cosine does; 15 neighbours, minimal distance 0.1. 2,000 points
    take a few seconds, after about ten that numba compiles for in each process.

    Args:
        embeddings_list: arrays [num_points, num_dims]; num_dims is common to all.
    Returns: for each set float32 [num_points, num_components]; the same for the same input, seed
        and machine.
    Raises: ValueError if shapes do not fit, a number is not finite, a row is zero, or there are
        fewer points in all than num_components + 3.
    Source: McInnes et al. 2018 (arXiv:1802.03426); package umap-learn.
    """
    sets = [as_unit(f"embeddings_list[{i}]", e) for i, e in enumerate(embeddings_list)]
    dims = {points.shape[1] for points in sets}
    if len(dims) > 1:
        raise ValueError(f"embeddings must have the same num_dims, got {sorted(dims)}")
    num_points = sum(map(len, sets))
    # UMAP starts from that many eigenvectors of the neighbour graph and needs more points.
    if num_points < num_components + 3:
        raise ValueError(
            f"{num_components} components need at least {num_components + 3} points, "
            f"got {num_points}"
        )
    with warnings.catch_warnings():
        # Threads given up for the seed, sets smaller than usual: nothing that a user can act on.
        warnings.simplefilter("ignore")
        from umap import UMAP

        mapper = UMAP(
            n_components=num_components,
            n_neighbors=min(UMAP_NEIGHBOURS, num_points - 1),
            min_dist=UMAP_MIN_DIST,
            # UMAP's own cosine goes through Python for each pair of points.
            metric="euclidean",
            random_state=seed % 2**32,  # numpy's RandomState takes no more bits
            n_jobs=1,
        )
        points = mapper.fit_transform(np.concatenate(sets).astype(np.float32))
    return np.split(points, np.cumsum([len(s) for s in sets])[:-1])


def hull_scores(real: np.ndarray, synthetic: np.ndarray) -> HullScores:
    """Precision and recall of synthetic points against the real ones' convex hull.

        precision = share of the synthetic points inside the hull of the real ones
        recall    = share of the real points inside the hull of the synthetic ones
        f_score   = 2 precision recall / (precision + recall); 0 if both are 0

    Each in [0, 1], higher is better. One outlier can widen a hull by much: read these beside
    manifold_scores, which follows the sets' own shape.

    Args:
        real, synthetic: [num_points, num_dims], from one call of reduce with num_components=5.
            A hull of any points is a hull: those of a flat set contain what lies in its plane.
    Raises: ValueError if shapes do not fit or a number is not finite.
    Source: O'Neill et al. 2023 (STEER), with facet inequalities in place of a triangulation.
    """
    real, synthetic = as_pair(real, synthetic)
    precision = float(Hull(real).contains(synthetic).mean())
    recall = float(Hull(synthetic).contains(real).mean())
    both = precision + recall
    return HullScores(precision, recall, 2 * precision * recall / both if both else 0.0)


def hull_polygon(points: np.ndarray) -> list[tuple[float, float]]:
    """Corners (x, y) of a 2-D set's convex hull in order; two if it is a line, one if a point.

    Raises: ValueError if points are not [num_points, 2] or not finite.
    """
    points = as_points("points", points)
    if points.shape[1] != 2:
        raise ValueError(f"points must be [num_points, 2], got {list(points.shape)}")
    return [(float(x), float(y)) for x, y in points[Hull(points).corners]]


class Hull:
    """The convex hull of a finite set of points.

    Attributes:
        rank: dimensions that the set spans.
        corners: rows of the points that are corners; in order along the outline if rank is 2.
        facets: [num_facets, rank + 1]; a point y in the set's own coordinates is inside if
            facets[:, :-1] @ y + facets[:, -1] <= 0 for all of them.
    """

    def __init__(self, points: np.ndarray):
        self._centre = points.mean(axis=0)
        self._tolerance = TOLERANCE * np.abs(points).max()
        _, extents, axes = np.linalg.svd(points - self._centre, full_matrices=False)
        self.rank = int((extents > self._tolerance * np.sqrt(len(points))).sum())
        self._axes = axes[: self.rank]
        # Not the standard deviation: it makes nothing unit-sized if most points coincide.
        self._scale = np.abs((points - self._centre) @ self._axes.T).max(axis=0)
        self.corners, self.facets = _facets((points - self._centre) @ self._axes.T / self._scale)

    def contains(self, points: np.ndarray) -> np.ndarray:
        """bool [num_points]: which points [num_points, num_dims] are inside or on the edge."""
        centred = points - self._centre
        own = centred @ self._axes.T
        off_plane = np.linalg.norm(centred - own @ self._axes, axis=1)
        is_inside = off_plane <= max(self._tolerance, TOLERANCE * np.abs(points).max())
        own = own / self._scale
        step = max(1, MAX_DISTANCES // max(1, len(self.facets)))
        for start in range(0, len(own), step):
            rows = slice(start, start + step)
            distances = own[rows] @ self.facets[:, :-1].T + self.facets[:, -1]
            is_inside[rows] &= (distances <= TOLERANCE).all(axis=1)
        return is_inside


def _facets(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners and facets, see Hull, of a set that spans its [num_points, rank] space."""
    rank = points.shape[1]
    if rank == 0:
        return np.array([0]), np.empty((0, 1))
    if rank == 1:
        low, high = points.argmin(), points.argmax()
        return np.array([low, high]), np.array([[-1, points[low, 0]], [1, -points[high, 0]]])
    from scipy.spatial import ConvexHull

    hull = ConvexHull(points)
    return hull.vertices, hull.equations

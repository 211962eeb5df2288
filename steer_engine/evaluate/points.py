"""What the geometric metrics take: sets of points in one space, checked before use."""

from __future__ import annotations

import numpy as np


def as_points(name: str, values: np.ndarray) -> np.ndarray:
    """values as float64 [num_points, num_dims].

    Raises: ValueError if there is no point, the shape is another, or a number is not finite.
    """
    points = np.asarray(values, dtype=np.float64)
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(f"{name} must be [num_points, num_dims], got {list(points.shape)}")
    is_bad = ~np.isfinite(points).all(axis=1)
    if is_bad.any():
        raise ValueError(f"{name} must be finite; row {int(is_bad.argmax())} is not")
    return points


def as_unit(name: str, values: np.ndarray) -> np.ndarray:
    """Rows of length 1, see as_points. Raises: ValueError also if a row is zero."""
    points = as_points(name, values)
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"{name} must not be zero; row {int(lengths.argmin())} is")
    return points / lengths


def as_pair(real: np.ndarray, synthetic: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of points, see as_points. Raises: ValueError also if their num_dims differ."""
    real, synthetic = as_points("real", real), as_points("synthetic", synthetic)
    if real.shape[1] != synthetic.shape[1]:
        raise ValueError(
            f"real and synthetic must have the same num_dims, got {real.shape[1]} and "
            f"{synthetic.shape[1]}; embed both with one model"
        )
    return real, synthetic

"""The Vendi score: how many different texts a set is worth."""

from __future__ import annotations

import numpy as np

from .points import as_unit


def vendi_score(embeddings: np.ndarray) -> float:
    """Effective number of different texts: exp of the entropy of the similarities' eigenvalues.

        K[i, j] = cosine of embeddings i and j
        score   = exp(-sum over eigenvalues p of K / num_texts of p ln p)

    From 1 (all equal) to the smaller of num_texts and num_dims (all orthogonal). Higher is more
    diverse, not better by itself: noise is diverse too, so compare with the real texts' score. It
    grows with num_texts, so compare sets of one size.

    Args:
        embeddings: [num_texts, num_dims]; lengths do not matter.
    Raises: ValueError if the shape is another, a number is not finite, or a row is zero.
    Source: Friedman & Dieng 2023 (arXiv:2210.02410); cosine kernel, order 1.
    """
    unit = as_unit("embeddings", embeddings)
    # X X^T and X^T X have the same eigenvalues but for zeros: take the smaller.
    gram = unit.T @ unit if len(unit) > unit.shape[1] else unit @ unit.T
    eigenvalues = np.linalg.eigvalsh(gram / len(unit))
    shares = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))

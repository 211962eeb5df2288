"""The Vendi score against package vendi-score and its limits."""

from __future__ import annotations

import numpy as np
import pytest
from vendi_score import vendi

from steer_engine.evaluate.vendi import vendi_score

# The oracle uses a namespace that scipy gives up.
pytestmark = pytest.mark.filterwarnings("ignore:Please import `csr_matrix`:DeprecationWarning")


@pytest.mark.parametrize(
    ("num_texts", "num_dims"), [(1, 4), (5, 40), (40, 40), (41, 40), (300, 20)]
)
def test_score_equals_vendi_score(num_texts, num_dims):
    embeddings = np.random.default_rng(num_texts).normal(size=(num_texts, num_dims)) + 0.3
    # score_dual sees the same eigenvalues from the other side.
    assert vendi_score(embeddings) == pytest.approx(vendi.score_X(embeddings), rel=1e-9)
    assert vendi_score(embeddings) == pytest.approx(vendi.score_dual(embeddings), rel=1e-9)


def test_equal_texts_count_as_one_and_orthogonal_ones_each():
    assert vendi_score(np.ones((50, 3))) == pytest.approx(1, abs=1e-12)
    assert vendi_score(np.diag([1.0, 20.0, 300.0, 4.0])) == pytest.approx(4, rel=1e-12)
    # Two texts, ten times each, as two.
    assert vendi_score(np.repeat(np.eye(2), 10, axis=0)) == pytest.approx(2, rel=1e-12)


def test_lengths_of_embeddings_do_not_matter():
    rng = np.random.default_rng(0)
    embeddings, lengths = rng.normal(size=(30, 8)), rng.uniform(0.1, 9, size=(30, 1))
    assert vendi_score(embeddings * lengths) == pytest.approx(vendi_score(embeddings), rel=1e-9)


def test_wrong_embeddings_are_named():
    with pytest.raises(ValueError, match="must not be zero; row 1 is"):
        vendi_score(np.array([[1.0, 0], [0, 0]]))
    with pytest.raises(ValueError, match=r"must be \[num_points, num_dims\], got \[3\]"):
        vendi_score(np.ones(3))

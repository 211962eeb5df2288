"""Can a classifier tell the synthetic texts from the real ones?

It learns on four fifths of both sets' embeddings and is asked about the last fifth, five times.
Copies of one text, in one set or in both, always go to the same fifth: split up, they would let
the classifier answer from memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum

import numpy as np

from .copying import normalize
from .intervals import percentile_estimate, resample_weights
from .result import Estimate

NUM_FOLDS = 5


class Adversary(StrEnum):
    """The classifiers: the paper's, with XGBoost's default settings, and a linear one."""

    XGBOOST = "xgboost"
    LOGISTIC = "logistic"


def adversarial_auroc(
    adversary: Adversary,
    embeddings: tuple[np.ndarray, np.ndarray],
    texts: tuple[Sequence[str], Sequence[str]],
    seed: int,
) -> Estimate | None:
    """Area under the ROC curve of a classifier of real against synthetic, mean over 5 folds.

        P(score of a real text > score of a synthetic one) + P(equal) / 2

    0.5: it can only guess, which is best; 1: it is always right. Below 0.5 is chance, or copies:
    a text that is in both sets cannot be told.

    Args:
        embeddings: of the real texts and of the synthetic ones, [num_texts, size] each.
        texts: the same texts, to find copies.
    Returns: the mean, with an interval from resampling the texts that were asked about (the
        classifiers stay as they are); None if some fold holds texts of one set alone, as happens
        with a set of one text over and over.
    Source: authenticity AUROC, O'Neill et al. 2023; folds that keep copies together are ours.
    """
    points = np.concatenate(embeddings).astype(np.float32)
    is_real = np.repeat([True, False], [len(e) for e in embeddings])
    folds = list(_folds(is_real, [*texts[0], *texts[1]], seed))
    if any(is_real[part].all() or not is_real[part].any() for fold in folds for part in fold):
        return None

    def judge(fold: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        train, test = fold
        classifier = CLASSIFIERS[adversary](seed)
        classifier.fit(points[train], is_real[train])
        scores = classifier.predict_proba(points[test])[:, 1]
        return _wins(scores[is_real[test]], scores[~is_real[test]])

    # A core for each fold; threads within one would wait for each other at every level of a tree.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        wins_of_folds = list(pool.map(judge, folds))
    rng = np.random.default_rng(seed)
    values, resampled = [], []
    for wins in wins_of_folds:
        values.append(wins.mean())
        rows, columns = (resample_weights(size, rng) for size in wins.shape)
        resampled.append(((rows @ wins) * columns).sum(axis=1))
    return percentile_estimate(
        np.mean(values), np.mean(resampled, axis=0), "95 % bootstrap over held-out texts"
    )


def _folds(is_real: np.ndarray, texts: Sequence[str], seed: int):
    """(train, test) indices of each fold: both sets in every fold alike, copies together."""
    from sklearn.model_selection import StratifiedGroupKFold

    copies = np.unique([normalize(text) for text in texts], return_inverse=True)[1]
    if len(np.unique(copies)) < NUM_FOLDS:
        return [(np.arange(0), np.arange(0))]
    folds = StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=seed % 2**32)
    return folds.split(copies, is_real, copies)


def _wins(real_scores: np.ndarray, synthetic_scores: np.ndarray) -> np.ndarray:
    """[num_real, num_synthetic]: 1 where the real text scores higher, 0.5 where both are equal."""
    difference = real_scores[:, None] - synthetic_scores[None, :]
    return np.where(difference == 0, 0.5, difference > 0)


def _xgboost(seed: int):
    from xgboost import XGBClassifier

    return XGBClassifier(random_state=seed % 2**32, n_jobs=1)


def _logistic(seed: int):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


CLASSIFIERS: dict[Adversary, Callable] = {
    Adversary.XGBOOST: _xgboost,
    Adversary.LOGISTIC: _logistic,
}

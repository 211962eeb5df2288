"""The adversaries: what they find, and what they must not find."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from steer_engine.evaluate.adversary import Adversary, _folds, _wins, adversarial_auroc

NAMES = tuple([f"{kind} {i}" for i in range(60)] for kind in ("real", "synthetic"))


def make_sets(shift: float, num_dims: int = 5) -> tuple[np.ndarray, np.ndarray]:
    points = np.random.default_rng(0).normal(size=(2, 60, num_dims))
    points[1, :, 0] += shift
    return points[0], points[1]


@pytest.mark.parametrize("adversary", Adversary)
def test_sets_far_apart_are_told_and_equal_ones_are_not(adversary):
    apart = adversarial_auroc(adversary, make_sets(20), NAMES, seed=0)
    assert apart.value > 0.95
    alike = adversarial_auroc(adversary, make_sets(0), NAMES, seed=0)
    assert 0.35 < alike.value < 0.65
    assert alike.low < alike.value < alike.high
    assert adversarial_auroc(adversary, make_sets(0), NAMES, seed=0) == alike


def test_only_trees_see_a_difference_in_spread():
    real, synthetic = make_sets(0)
    synthetic = synthetic * 0.2
    trees, linear = (
        adversarial_auroc(a, (real, synthetic), NAMES, seed=0)
        for a in (Adversary.XGBOOST, Adversary.LOGISTIC)
    )
    assert trees.value > 0.9 > 0.7 > linear.value


def test_the_mean_of_wins_is_the_area_under_the_roc_curve():
    rng = np.random.default_rng(0)
    real, synthetic = rng.integers(0, 6, size=40) / 5, rng.integers(0, 5, size=30) / 5
    labels = np.repeat([1, 0], [40, 30])
    expected = roc_auc_score(labels, np.concatenate([real, synthetic]))
    assert _wins(real, synthetic).mean() == pytest.approx(expected, abs=1e-12)


def test_copies_of_a_text_are_in_one_fold_in_both_sets():
    texts = [f"text {i % 17}" for i in range(50)] + [f"text  {i % 23}" for i in range(50)]
    is_real = np.repeat([True, False], 50)
    tested = []
    for train, test in _folds(is_real, texts, seed=0):
        known = {texts[i].split()[1] for i in train}
        assert not known & {texts[i].split()[1] for i in test}
        assert 5 <= is_real[test].sum() <= 15
        tested += test.tolist()
    assert sorted(tested) == list(range(100))


def test_repeated_texts_do_not_let_the_classifier_answer_from_memory():
    """Every text is in its set twice; sets are alike, and with 60 dimensions all can be learnt."""
    twice = tuple(np.repeat(e[:30], 2, axis=0) for e in make_sets(0, num_dims=60))
    known = tuple([text for text in names[:30] for _ in range(2)] for names in NAMES)
    honest = adversarial_auroc(Adversary.LOGISTIC, twice, known, seed=0)
    fooled = adversarial_auroc(Adversary.LOGISTIC, twice, NAMES, seed=0)
    assert fooled.value > 0.8 > 0.65 > honest.value


def test_a_set_of_one_text_cannot_be_judged():
    sets, texts = make_sets(0), (NAMES[0], ["always this"] * 60)
    assert adversarial_auroc(Adversary.LOGISTIC, sets, texts, seed=0) is None
    texts = (["always that"] * 60, ["always this"] * 60)
    assert adversarial_auroc(Adversary.LOGISTIC, sets, texts, seed=0) is None

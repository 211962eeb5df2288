"""Usefulness: a model trained on synthetic examples and tested on real ones.

The real examples are held-out ones, which the generator was not trained on. They are cut into
splits; each split is tested once, by a model trained on synthetic examples and, as the yardstick,
by one trained on as many real examples of the other splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import DataError, check_number
from .multiple_choice import LETTERS, Question
from .points import as_unit

# Inverse penalties of the logistic regressions, chosen on held-out parts of the real sets. Choices
# need a strong one, since hundreds of questions tell little about hundreds of weights: after 800 of
# CommonsenseQA, 0.39 of 1,221 others are right, with C = 1e-3 0.36, with 1 0.32 (MiniLM-L6).
TEXT_C, CHOICE_C = 10.0, 1e-4

Embed = Callable[[Sequence[str]], np.ndarray]


class Accuracy(NamedTuple):
    """Share of right answers.

    std: sample standard deviation over the splits. Their models share most of their training
        examples, so another synthetic set would differ by more than that.
    """

    mean: float
    std: float
    splits: tuple[float, ...]


class Downstream(NamedTuple):
    """What training on synthetic examples is worth.

    synthetic, real: accuracy on the same real tests after training on either. Higher is better;
        synthetic over real means that the synthetic examples teach more than as many real ones.
    chance: accuracy of a model that has learnt nothing.
    train_size: examples that each model was trained on.
    """

    synthetic: Accuracy
    real: Accuracy
    chance: float
    train_size: int


class _Examples(NamedTuple):
    inputs: np.ndarray
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> _Examples:
        return _Examples(self.inputs[rows], self.labels[rows])


# Learns from examples and labels new inputs.
_Learner = Callable[[_Examples, np.ndarray], np.ndarray]


def classification(
    synthetic_texts: Sequence[str],
    synthetic_labels: Sequence[str],
    real_texts: Sequence[str],
    real_labels: Sequence[str],
    *,
    num_splits: int = 5,
    seed: int = 0,
) -> Downstream:
    """Accuracy of a text classifier trained on synthetic, tested on real labelled texts.

    Logistic regression on TF-IDF of single words, counts as 1 + ln(count). Labels keep their shares
    in splits and subsets. chance is the share of the most frequent real label.

    Raises: DataError if texts and labels differ in number, either set has fewer than two labels, or
        a real label has fewer texts than there are splits. ValueError if num_splits is under 2.
    Source: the task, O'Neill et al. 2023 (STEER); the classifier is chosen here.
    """
    synthetic = _labelled("synthetic", synthetic_texts, synthetic_labels)
    real = _labelled("real", real_texts, real_labels)
    counts = Counter(real.labels.tolist())
    label, count = min(counts.items(), key=lambda item: item[1])
    if count < num_splits:
        raise DataError(
            f"real label {label!r} has {count} texts; {num_splits} splits need as many of each"
        )
    chance = max(counts.values()) / len(real.labels)
    return _compare(
        synthetic, real, synthetic.labels, real.labels, _learn_texts, chance, num_splits, seed
    )


def multiple_choice(
    synthetic: Sequence[Question],
    real: Sequence[Question],
    embed: Embed,
    *,
    num_splits: int = 5,
    seed: int = 0,
) -> Downstream:
    """Accuracy of choosing right, trained on synthetic and tested on real questions.

        score(choice) = w . (q * c),   q, c: unit embeddings of stem and choice, * by element

    w is learnt so that right choices score over the wrong ones of their question (logistic loss of
    the difference); the best score is the answer. Letters are not seen, so a set whose answers
    favour one letter gains nothing by it. chance is 1 / 5. Real CommonsenseQA teaches an accuracy
    of 0.4 with all-MiniLM-L6-v2: this shows whether the marked answers fit their questions, and
    not much beyond.

    Args:
        embed: texts to [num_texts, num_dims]; called once for all different stems and choices.
    Raises: DataError if there are no synthetic questions, or fewer real ones than splits.
        ValueError if num_splits is under 2.
    Source: the task, O'Neill et al. 2023 (STEER); the scorer is chosen here, to take seconds.
    """
    if not synthetic or len(real) < num_splits:
        raise DataError(
            f"{len(synthetic)} synthetic and {len(real)} real questions; at least 1 and "
            f"{num_splits} are needed"
        )
    texts = list(dict.fromkeys(t for q in [*synthetic, *real] for t in (q.stem, *q.choices)))
    unit = as_unit("embeddings", embed(texts))
    rows = {text: row for row, text in enumerate(texts)}
    sets = [_questions(questions, unit, rows) for questions in (synthetic, real)]
    strata = [np.zeros(len(s.labels), dtype=int) for s in sets]
    return _compare(*sets, *strata, _learn_choices, 1 / len(LETTERS), num_splits, seed)


def _compare(
    synthetic: _Examples,
    real: _Examples,
    synthetic_strata: np.ndarray,
    real_strata: np.ndarray,
    learn: _Learner,
    chance: float,
    num_splits: int,
    seed: int,
) -> Downstream:
    from sklearn.model_selection import StratifiedKFold

    check_number("num_splits", num_splits, low=2, is_int=True)
    rng = np.random.default_rng(seed)
    folds = StratifiedKFold(num_splits, shuffle=True, random_state=seed % 2**32)
    splits = list(folds.split(real_strata, real_strata))
    train_size = min(len(synthetic.labels), *(len(train) for train, _ in splits))
    scores = []
    for train_rows, test_rows in splits:
        train_rows = train_rows[_subset(real_strata[train_rows], train_size, rng)]
        test = real.take(test_rows)
        trains = synthetic.take(_subset(synthetic_strata, train_size, rng)), real.take(train_rows)
        scores.append([(learn(t, test.inputs) == test.labels).mean() for t in trains])
    accuracies = [
        Accuracy(float(np.mean(s)), float(np.std(s, ddof=1)), tuple(map(float, s)))
        for s in zip(*scores, strict=True)
    ]
    return Downstream(*accuracies, chance, train_size)


def _subset(strata: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of a random subset that keeps the strata's shares as nearly as whole rows can."""
    order = rng.permutation(len(strata))
    places = np.empty(len(strata))
    for stratum in np.unique(strata):
        members = order[strata[order] == stratum]
        places[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(places[order], kind="stable")[:size]]


def _labelled(name: str, texts: Sequence[str], labels: Sequence[str]) -> _Examples:
    if len(texts) != len(labels):
        raise DataError(f"{name} has {len(texts)} texts and {len(labels)} labels")
    if len(set(labels)) < 2:
        raise DataError(f"{name} has {len(set(labels))} labels; a classifier needs two or more")
    return _Examples(np.array(texts, dtype=object), np.array(labels, dtype=object))


def _learn_texts(train: _Examples, texts: np.ndarray) -> np.ndarray:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if len(set(train.labels)) == 1:  # a rare label can miss a small subset
        return np.full(len(texts), train.labels[0], dtype=object)
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True),
        LogisticRegression(C=TEXT_C, max_iter=1000),
    )
    return model.fit(train.inputs, train.labels).predict(texts)


def _questions(questions: Sequence[Question], unit: np.ndarray, rows: dict[str, int]) -> _Examples:
    """Inputs q * c, [num_questions, num_choices, num_dims]; labels: the right choices' places."""
    stems = unit[[rows[q.stem] for q in questions]]
    choices = unit[[[rows[c] for c in q.choices] for q in questions]]
    return _Examples(stems[:, None] * choices, np.array([q.answer for q in questions]))


def _learn_choices(train: _Examples, inputs: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    num_questions, num_choices, num_dims = train.inputs.shape
    is_right = np.arange(num_choices) == train.labels[:, None]
    right = train.inputs[is_right][:, None]
    wrong = train.inputs[~is_right].reshape(num_questions, num_choices - 1, num_dims)
    differences = (right - wrong).reshape(-1, num_dims) * num_dims
    # The loss is the same for a difference with label 1 and its negative with label 0; the solver
    # wants both labels.
    is_kept = np.arange(len(differences)) % 2 == 0
    differences[~is_kept] *= -1
    model = LogisticRegression(C=CHOICE_C, fit_intercept=False, max_iter=1000).fit(
        differences, is_kept
    )
    return (inputs @ model.coef_[0]).argmax(axis=1)

"""Models trained on synthetic examples and tested on real ones."""

from __future__ import annotations

import numpy as np
import pytest

from steer_engine import DataError
from steer_engine.evaluate import downstream
from steer_engine.evaluate.multiple_choice import Question

TOPICS = {"sky": "star moon comet", "sea": "wave tide coral"}
FILLER = ["the", "a", "of", "some", "near", "old", "large", "bright"]


def labelled_texts(count: int, seed: int, noise: float = 0.0) -> tuple[list[str], list[str]]:
    """Texts about sky or sea in equal numbers; a share of the labels is wrong."""
    rng = np.random.default_rng(seed)
    labels = [list(TOPICS)[i % 2] for i in range(count)]
    texts = [
        " ".join([*rng.choice(FILLER, 4), *rng.choice(TOPICS[label].split(), 2)])
        for label in labels
    ]
    is_wrong = rng.random(count) < noise
    flipped = {"sky": "sea", "sea": "sky"}
    return texts, [flipped[x] if w else x for x, w in zip(labels, is_wrong, strict=True)]


def test_a_classifier_learns_from_synthetic_texts_what_real_ones_teach():
    found = downstream.classification(*labelled_texts(100, 0), *labelled_texts(60, 1))
    assert found.synthetic.mean == found.real.mean == 1.0
    assert found.chance == 0.5
    assert found.train_size == 48  # four of five splits


def test_synthetic_texts_with_wrong_labels_teach_less():
    found = downstream.classification(*labelled_texts(100, 0, noise=0.5), *labelled_texts(100, 1))
    assert found.real.mean == 1.0
    assert found.synthetic.mean < 0.8


def test_mean_and_spread_are_those_of_the_splits():
    found = downstream.classification(*labelled_texts(60, 0, 0.4), *labelled_texts(60, 1, 0.2))
    for accuracy in found.synthetic, found.real:
        assert len(accuracy.splits) == 5
        assert len(set(accuracy.splits)) > 1
        assert accuracy.mean == pytest.approx(np.mean(accuracy.splits))
        assert accuracy.std == pytest.approx(np.std(accuracy.splits, ddof=1))


def test_the_same_seed_gives_the_same_scores_and_another_seed_other_splits():
    sets = *labelled_texts(60, 0, 0.3), *labelled_texts(60, 1, 0.3)
    first, again = (downstream.classification(*sets, seed=3) for _ in range(2))
    assert first == again
    assert downstream.classification(*sets, seed=4).real.splits != first.real.splits


def test_both_models_train_on_equal_numbers():
    found = downstream.classification(*labelled_texts(30, 0), *labelled_texts(100, 1))
    assert found.train_size == 30


def test_subsets_keep_the_shares_of_labels():
    labels = np.array(["a"] * 80 + ["b"] * 15 + ["c"] * 5)
    rows = downstream._subset(labels, 20, np.random.default_rng(0))
    assert len(set(rows)) == 20
    assert [(labels[rows] == x).sum() for x in "abc"] == [16, 3, 1]


def test_a_label_too_rare_for_a_subset_leaves_a_model_that_knows_one():
    texts, labels = ["comet"] * 99 + ["wave"], ["sky"] * 99 + ["sea"]
    found = downstream.classification(texts, labels, *labelled_texts(20, 1))
    assert found.synthetic.splits == (0.5,) * 5


@pytest.mark.parametrize(
    ("synthetic", "real", "expected"),
    [
        ((["x"], []), labelled_texts(20, 0), "synthetic has 1 texts and 0 labels"),
        ((["x", "y"], ["sky"] * 2), labelled_texts(20, 0), "synthetic has 1 labels"),
        (labelled_texts(20, 0), labelled_texts(8, 0), "real label 'sky' has 4 texts; 5 splits"),
    ],
)
def test_sets_that_teach_no_classifier_are_refused(synthetic, real, expected):
    with pytest.raises(DataError, match=expected):
        downstream.classification(*synthetic, *real)


NUM_DIMS = 12


def embed(texts) -> np.ndarray:
    """Vectors that are written in the texts."""
    return np.array([[float(x) for x in text.split()] for text in texts])


def written(vector: np.ndarray) -> str:
    return " ".join(f"{x:.6f}" for x in vector)


def questions(count: int, seed: int, sign: float = 1.0) -> list[Question]:
    """Right choices are like the stem in the first half of the dimensions, wrong ones in the rest:
    a plain cosine does not tell them apart. Nine in ten answers are the first choice.
    """
    rng = np.random.default_rng(seed)
    half = NUM_DIMS // 2
    found = []
    for _ in range(count):
        stem, *choices = rng.normal(size=(6, NUM_DIMS))
        answer = 0 if rng.random() < 0.9 else int(rng.integers(1, 5))
        for place, choice in enumerate(choices):
            is_like = (place == answer) == (sign > 0)
            shared = slice(0, half) if is_like else slice(half, None)
            choice[shared] += 2 * stem[shared]
        found.append(Question(written(stem), tuple(map(written, choices)), answer))
    return found


def test_choices_are_learnt_from_the_questions_not_from_the_letters():
    found = downstream.multiple_choice(questions(200, 0), questions(150, 1), embed)
    assert found.chance == 0.2
    assert found.train_size == 120
    assert found.synthetic.mean > 0.8
    assert found.real.mean > 0.8


def test_questions_that_teach_the_opposite_score_under_chance():
    found = downstream.multiple_choice(questions(200, 0, sign=-1), questions(150, 1), embed)
    assert found.synthetic.mean < 0.1
    assert found.real.mean > 0.8


def test_questions_without_a_rule_leave_chance_whatever_their_letters():
    rng = np.random.default_rng(2)
    noise = [
        Question(written(s), tuple(map(written, c)), 0)
        for s, *c in rng.normal(size=(200, 6, NUM_DIMS))
    ]
    real = [
        Question(written(s), tuple(map(written, c)), int(rng.integers(5)))
        for s, *c in rng.normal(size=(400, 6, NUM_DIMS))
    ]
    found = downstream.multiple_choice(noise, real, embed)
    assert 0.12 < found.synthetic.mean < 0.28
    assert 0.12 < found.real.mean < 0.28


def test_every_different_text_is_embedded_once():
    seen = []

    def counting(texts):
        seen.extend(texts)
        return embed(texts)

    same = questions(30, 0)
    downstream.multiple_choice(same, same, counting)
    assert len(seen) == len(set(seen)) == 30 * 6


def test_too_few_questions_are_refused():
    with pytest.raises(DataError, match="0 synthetic and 9 real questions"):
        downstream.multiple_choice([], questions(9, 0), embed)
    with pytest.raises(DataError, match="3 synthetic and 4 real questions; at least 1 and 5"):
        downstream.multiple_choice(questions(3, 0), questions(4, 0), embed)
    with pytest.raises(ValueError, match="num_splits must be"):
        downstream.multiple_choice(questions(3, 0), questions(4, 0), embed, num_splits=1)

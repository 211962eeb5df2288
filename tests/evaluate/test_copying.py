"""Copies are found exactly: whole texts, runs of tokens, and nearest neighbours."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors
from tokenizers import Tokenizer, models, pre_tokenizers

from steer_engine.evaluate.copying import (
    closest_similarities,
    copy_share,
    longest_copies,
    self_duplicate_share,
)

WORDS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, "?"])}
    word_level = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="?"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return word_level


def longest_by_sets(text: str, reference: list[str]) -> int:
    """The longest shared n-gram of words, by trying every one."""

    def grams(line: str, n: int) -> set[tuple]:
        words = line.split()
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    sizes = range(len(text.split()), 0, -1)
    return next((n for n in sizes if any(grams(text, n) & grams(r, n) for r in reference)), 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_copy_is_the_longest_shared_ngram_of_each_text(seed, tokenizer):
    chooser = random.Random(seed)

    def make(count: int) -> list[str]:
        letters = WORDS[: chooser.randint(1, 4)]
        return [" ".join(chooser.choices(letters, k=chooser.randint(1, 12))) for _ in range(count)]

    texts, reference = make(12), make(8)
    expected = [longest_by_sets(text, reference) for text in texts]
    assert longest_copies(texts, reference, tokenizer).tolist() == expected


def test_a_copy_does_not_reach_from_one_reference_text_into_the_next(tokenizer):
    assert longest_copies(["a b c d"], ["a b", "c d"], tokenizer).tolist() == [2]


def test_nothing_is_copied_from_nothing_and_a_whole_text_counts_all_its_tokens(tokenizer):
    assert longest_copies(["a b", "c"], [], tokenizer).tolist() == [0, 0]
    assert longest_copies(["a \n b", "c", "d"], ["b a  b c", "c c"], tokenizer).tolist() == [
        2,
        1,
        0,
    ]


def test_duplicates_are_texts_beyond_the_first_whatever_their_white_space():
    estimate = self_duplicate_share(["a b", "a  b", "c", "a\nb", "c d"])
    assert estimate.value == pytest.approx(2 / 5)
    assert estimate.low < estimate.value < estimate.high
    assert self_duplicate_share(["a", "b", "c"]).value == 0


def test_the_interval_of_duplicates_comes_from_leaving_out_each_text():
    texts = ["a", "a", "b", "c", "c", "c", "d", "e"]
    without = []
    for left_out in range(len(texts)):
        rest = texts[:left_out] + texts[left_out + 1 :]
        without.append(1 - len(set(rest)) / len(rest))
    variance = (len(texts) - 1) / len(texts) * np.square(without - np.mean(without)).sum()
    estimate = self_duplicate_share(texts)
    # 2.365: the 97.5 % quantile of Student's t with 7 degrees of freedom
    assert estimate.high - estimate.value == pytest.approx(2.3646 * np.sqrt(variance), rel=1e-4)


def test_copies_are_counted_word_for_word():
    reference = ["one two", "three"]
    estimate = copy_share(["one  two", "three", "One two", "four"], reference, seed=0)
    assert estimate.value == 0.5
    assert copy_share(["four"] * 3, reference, seed=0).high == 0


def test_the_nearest_text_is_the_one_with_the_highest_cosine():
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(count, 6)) for count in (15, 20)]
    own, reference = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in sets)
    finder = NearestNeighbors(n_neighbors=2, metric="cosine").fit(reference)
    distances, indices = finder.kneighbors(own)
    index, similarity = closest_similarities(own, reference)
    assert (index == indices[:, 0]).all()
    assert similarity == pytest.approx(1 - distances[:, 0], abs=1e-12)
    distances, indices = finder.kneighbors(reference)
    index, similarity = closest_similarities(reference, reference, is_same_set=True)
    assert (index == indices[:, 1]).all()
    assert similarity == pytest.approx(1 - distances[:, 1], abs=1e-12)

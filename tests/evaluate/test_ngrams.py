"""n-gram shares are exact, whatever the texts and the tokenizer's form."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from helpers import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer

from steer_engine.evaluate import ngram_metrics
from steer_engine.evaluate.ngrams import (
    TokenStream,
    count_ngrams,
    ngram_estimates,
    ngram_kinds,
    tokenize,
)
from steer_engine.tokenizer import Tokenizer

TEXTS = ["the hour on the ring", "the ring", "on", "the hour on the ring in the hour"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory) -> HfTokenizer:
    return HfTokenizer.from_file(str(directory / "tokenizer.json"))


def windows(ids, n) -> list[tuple]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def shares_of(ids) -> dict[int, float]:
    """distinct_n by sets of tuples."""
    return {n: len(set(windows(ids, n))) / len(windows(ids, n)) for n in (2, 3, 4)}


def test_shares_are_those_of_the_texts_joined_by_one_space(tokenizer):
    ids = tokenizer.encode(" ".join(TEXTS), add_special_tokens=False).ids
    expected = shares_of(ids)
    got = ngram_metrics(TEXTS, tokenizer)
    assert {n: got[f"distinct_{n}"] for n in expected} == expected
    assert got["duplicate_3"] == pytest.approx(1 - expected[3], abs=1e-15)
    assert got["diversity"] == pytest.approx(math.prod(expected.values()), rel=1e-15)
    assert (got["num_texts"], got["num_tokens"]) == (len(TEXTS), len(ids))
    assert 0 < got["duplicate_3"] < 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_two_places_have_one_kind_exactly_if_their_ngrams_are_equal(ids, n):
    kinds = ngram_kinds(np.array(ids, dtype=np.int64), n).tolist()
    grams = windows(ids, n)
    assert len(kinds) == len(grams)
    assert set(kinds) == set(range(len(set(grams))))
    assert len(set(zip(kinds, grams, strict=True))) == len(set(grams))


def test_the_highest_token_ids_do_not_overflow():
    ids = np.array([2**20 - 1, 2**20 - 2] * 3000, dtype=np.int64)
    assert ngram_kinds(ids, 4).max() == 1


def test_every_form_of_the_tokenizer_gives_the_same_numbers(directory, tokenizer):
    expected = ngram_metrics(TEXTS, tokenizer)
    assert ngram_metrics(TEXTS, directory) == expected
    assert ngram_metrics(TEXTS, str(directory)) == expected
    assert ngram_metrics(TEXTS, Tokenizer(directory)) == expected


def test_a_truncating_tokenizer_counts_everything_and_stays_as_it_is(directory, tokenizer):
    truncating = HfTokenizer.from_file(str(directory / "tokenizer.json"))
    truncating.enable_truncation(4)
    assert ngram_metrics(TEXTS, truncating) == ngram_metrics(TEXTS, tokenizer)
    assert truncating.truncation["max_length"] == 4


def test_line_breaks_inside_a_text_count_as_one_space(tokenizer):
    broken = ["the hour\r\non the ring\n\nthe ring\n", "on", "", "  ", TEXTS[3]]
    got = ngram_metrics(broken, tokenizer)
    assert got == ngram_metrics(TEXTS, tokenizer) | {"num_texts": len(broken)}


@pytest.mark.parametrize("texts", [[], [""], ["a"]])
def test_without_any_ngram_shares_are_zero(texts, tokenizer):
    got = ngram_metrics(texts, tokenizer)
    names = ("distinct_2", "distinct_3", "distinct_4", "duplicate_3", "diversity")
    assert all(got[name] == 0 for name in names)
    assert all(e.value == 0 for e in ngram_estimates(tokenize(texts, tokenizer)).values())


def test_a_sample_is_the_same_for_the_same_seed_and_of_the_given_size(tokenizer):
    texts = [f"the {number} on the ring" for number in range(100)]
    samples = [ngram_metrics(texts, tokenizer, seed=seed, sample_size=10) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    assert samples[0]["num_texts"] == 10
    everything = ngram_metrics(texts, tokenizer)
    assert ngram_metrics(texts, tokenizer, sample_size=100) == everything
    assert ngram_metrics(texts, tokenizer, sample_size=1000) == everything


def test_a_larger_sample_has_a_lower_share_of_distinct_ngrams(tokenizer):
    chooser = random.Random(0)
    texts = [" ".join(chooser.choices(["the", "ring", "on", "hour"], k=6)) for _ in range(300)]
    small, large = (ngram_metrics(texts, tokenizer, sample_size=size) for size in (30, 300))
    assert small["distinct_3"] > large["distinct_3"]


def test_counts_without_a_text_are_those_of_the_ngrams_that_start_elsewhere(tokenizer):
    stream = tokenize(TEXTS, tokenizer)
    for n in (2, 3, 4):
        counts = count_ngrams(stream, n)
        grams = windows(stream.ids.tolist(), n)
        for text in range(len(TEXTS)):
            left = [g for g, own in zip(grams, stream.text_index, strict=False) if own != text]
            assert counts.num_total - counts.num_per_text[text] == len(left)
            assert counts.num_kinds - counts.num_own[text] == len(set(left))


def test_tokens_belong_to_the_text_that_they_are_of(tokenizer):
    stream = tokenize(TEXTS, tokenizer)
    for index, text in enumerate(TEXTS):
        space = " " if index else ""
        own = stream.ids[stream.text_index == index].tolist()
        assert tokenizer.decode(own) == space + text


def draw_stream(rng: np.random.Generator, num_texts: int) -> TokenStream:
    """Texts of 12 tokens with Zipf's frequencies, some of them repeated ones."""
    frequencies = 1 / np.arange(1, 301)
    phrases = rng.choice(300, size=(num_texts, 12), p=frequencies / frequencies.sum())
    is_phrase = rng.random(num_texts) < 0.3
    phrases[is_phrase] = np.arange(12) + 12 * rng.integers(0, 9, size=(is_phrase.sum(), 1))
    return TokenStream(phrases.ravel(), np.repeat(np.arange(num_texts), 12), num_texts)


@pytest.mark.parametrize("name", ["distinct_3", "duplicate_3", "diversity"])
def test_intervals_are_as_wide_as_repeated_sets_scatter(name):
    """True spread from 300 sets of 100 texts; a jackknife may overstate it, by half at most."""
    rng = np.random.default_rng(0)
    estimates = [ngram_estimates(draw_stream(rng, 100))[name] for _ in range(300)]
    values = np.array([e.value for e in estimates])
    half_width = np.mean([(e.high - e.low) / 2 for e in estimates])
    assert 0.9 < half_width / (1.984 * values.std(ddof=1)) < 1.5
    covered = [e.low <= values.mean() <= e.high for e in estimates]
    assert 0.92 <= np.mean(covered) <= 1

"""How many of a set's n-grams are distinct: the same words over and over show here.

The texts are joined, by one space, to one stream of tokens of the model's own tokenizer, as in the
paper's released code; an n-gram may thus reach from one text into the next, and a text of fewer
than n tokens still counts. Shares fall as a set grows, so compare sets of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer as HfTokenizer

from ..tokenizer import Tokenizer
from .intervals import jackknife
from .result import Estimate
from .sets import sample_indices

SIZES = (2, 3, 4)
TokenizerSource = Tokenizer | HfTokenizer | str | Path


class TokenStream(NamedTuple):
    """The tokens of joined texts. ids, text_index: [num_tokens] int64, the text a token is of."""

    ids: np.ndarray
    text_index: np.ndarray
    num_texts: int


class NgramCounts(NamedTuple):
    """n-grams of one size: how many, how many kinds, and what each text has.

    num_per_text: [num_texts] n-grams that start in the text.
    num_own: [num_texts] kinds that start in this text and in no other.
    """

    num_total: int
    num_kinds: int
    num_per_text: np.ndarray
    num_own: np.ndarray


def ngram_metrics(
    texts: Sequence[str],
    tokenizer: TokenizerSource,
    seed: int = 0,
    sample_size: int | None = None,
) -> dict[str, float]:
    """Shares of distinct n-grams among the tokens of a set of texts.

        distinct_n  = distinct n-grams / all n-grams           (n = 2, 3, 4; higher is better)
        duplicate_3 = 1 - distinct_3                           (lower is better)
        diversity   = distinct_2 * distinct_3 * distinct_4     (higher is better)

    Lines, of all texts in their order, are joined by one space and tokenized as one text without
    special tokens; blank lines are left out.

    Args:
        tokenizer: the model's: ours, a tokenizers.Tokenizer, or a directory with tokenizer.json.
        sample_size: cut a larger set down to so many texts, drawn by seed; None: take all.
    Returns: these five, num_texts and num_tokens. Where there is no n-gram at all, its distinct_n
        and duplicate_n are 0.
    Raises: CheckpointError if a directory's tokenizer cannot be read.
    Source: normalised n-grams, O'Neill et al. 2023; diversity, Su et al. 2022 (arXiv:2202.06417).
    """
    texts = list(texts)
    if sample_size is not None:
        texts = [texts[i] for i in sample_indices(len(texts), sample_size, seed)]
    stream = tokenize(texts, tokenizer)
    counts = {n: count_ngrams(stream, n) for n in SIZES}
    metrics = {f"distinct_{n}": _share(c.num_kinds, c.num_total) for n, c in counts.items()}
    return metrics | {
        "duplicate_3": 1 - metrics["distinct_3"] if counts[3].num_total else 0.0,
        "diversity": float(np.prod([metrics[f"distinct_{n}"] for n in SIZES])),
        "num_texts": len(texts),
        "num_tokens": len(stream.ids),
    }


def ngram_estimates(stream: TokenStream) -> dict[str, Estimate]:
    """distinct_3, duplicate_3 and diversity as in ngram_metrics, with intervals.

    The intervals are delete-one-text jackknives: a bootstrap draws texts twice, and each would
    count as a repetition.
    """
    shares, without = {}, {}
    for n in SIZES:
        counts = count_ngrams(stream, n)
        shares[n] = _share(counts.num_kinds, counts.num_total)
        num_left = counts.num_total - counts.num_per_text
        without[n] = (counts.num_kinds - counts.num_own) / np.maximum(num_left, 1)
    diversity = float(np.prod([shares[n] for n in SIZES]))
    without_diversity = np.prod([without[n] for n in SIZES], axis=0)
    # With no 3-gram at all, none is distinct and none repeats another.
    duplicate = 1 - shares[3] if shares[3] else 0.0
    return {
        "distinct_3": jackknife(shares[3], without[3], low=0, high=1),
        "duplicate_3": jackknife(duplicate, 1 - without[3], low=0, high=1),
        "diversity": jackknife(diversity, without_diversity, low=0, high=1),
    }


def load_tokenizer(source: TokenizerSource) -> HfTokenizer:
    """A copy without truncation and padding. Raises CheckpointError for an unreadable directory."""
    if isinstance(source, HfTokenizer):
        tokenizer = HfTokenizer.from_str(source.to_str())
    else:
        ours = source if isinstance(source, Tokenizer) else Tokenizer(Path(source))
        tokenizer = HfTokenizer.from_file(str(ours.path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize(texts: Sequence[str], tokenizer: TokenizerSource) -> TokenStream:
    """The stream of tokens of all texts; see ngram_metrics."""
    lines, owners = [], []
    for index, text in enumerate(texts):
        own = [line for line in text.splitlines() if line.strip()]
        lines += own
        owners += [index] * len(own)
    encoding = load_tokenizer(tokenizer).encode(" ".join(lines), add_special_tokens=False)
    # The space in front of a line belongs to the line.
    line_starts = np.cumsum([0, *(len(line) + 1 for line in lines)])[:-1] - 1
    token_starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
    line_index = np.searchsorted(line_starts, token_starts, side="right") - 1
    text_index = np.array(owners, dtype=np.int64)[line_index] if lines else token_starts
    return TokenStream(np.array(encoding.ids, dtype=np.int64), text_index, len(texts))


def count_ngrams(stream: TokenStream, n: int) -> NgramCounts:
    """Count exactly: no hash stands for an n-gram."""
    kinds = ngram_kinds(stream.ids, n)
    owner = stream.text_index[: len(kinds)]
    num_kinds = int(kinds.max()) + 1 if len(kinds) else 0
    first, last = np.full(num_kinds, stream.num_texts), np.full(num_kinds, -1)
    np.minimum.at(first, kinds, owner)
    np.maximum.at(last, kinds, owner)
    num_own = np.bincount(first[first == last], minlength=stream.num_texts)
    num_per_text = np.bincount(owner, minlength=stream.num_texts)
    return NgramCounts(len(kinds), num_kinds, num_per_text, num_own)


def ngram_kinds(ids: np.ndarray, n: int) -> np.ndarray:
    """A number for the n-gram at each place, equal where the n-grams are: [max(len - n + 1, 0)].

    Numbers are 0, 1, ... without a gap. ids: [len] int64, not negative.
    """
    kinds = _number(ids)
    for size in range(2, n + 1):
        num_tokens = int(ids.max(initial=0)) + 1
        # A kind is below len(ids) and a token below 2**20, so the pair fits 63 bits.
        kinds = _number(kinds[:-1] * num_tokens + ids[size - 1 :])
    return kinds


def _number(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0

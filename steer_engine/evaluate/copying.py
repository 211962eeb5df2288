"""What a set repeats: itself, and texts that it should not hold.

Texts are compared with white space made equal: what differs in line breaks alone is a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .intervals import bootstrap_mean, jackknife
from .ngrams import TokenizerSource, load_tokenizer
from .result import Estimate


def normalize(text: str) -> str:
    """The text with every run of white space made one space."""
    return " ".join(text.split())


def self_duplicate_share(texts: Sequence[str]) -> Estimate:
    """Share of the texts that repeat another one of their set.

        1 - distinct texts / texts                                          (lower is better)

    The interval is a jackknife: a bootstrap would make duplicates of its own.
    """
    counts = Counter(map(normalize, texts))
    num_texts, num_kinds = len(texts), len(counts)
    is_only_one = np.array([counts[normalize(text)] == 1 for text in texts])
    without = 1 - (num_kinds - is_only_one) / max(num_texts - 1, 1)
    return jackknife(1 - num_kinds / num_texts, without, low=0, high=1)


def copy_share(texts: Sequence[str], reference: Sequence[str], seed: int) -> Estimate:
    """Share of the texts that stand word for word in the reference (lower is better)."""
    known = set(map(normalize, reference))
    return bootstrap_mean([normalize(text) in known for text in texts], seed)


def longest_copies(
    texts: Sequence[str], reference: Sequence[str], tokenizer: TokenizerSource
) -> np.ndarray:
    """The longest n-gram of tokens that each text shares with any reference text, exactly.

    Args:
        tokenizer: as in ngram_metrics. Each text is tokenized for itself, without special tokens,
            with white space made equal.
    Returns: n for each text, int64; 0 where not one token is shared.
    """
    hf_tokenizer = load_tokenizer(tokenizer)
    normalized = [normalize(text) for text in [*reference, *texts]]
    encodings = hf_tokenizer.encode_batch_fast(normalized, add_special_tokens=False)
    parts, num_tokens = [], hf_tokenizer.get_vocab_size(with_added_tokens=True)
    for number, encoding in enumerate(encodings):
        # A separator of its own closes each text, so that nothing is shared across an end.
        parts.append(np.array([*encoding.ids, num_tokens + number], dtype=np.int64))
    lengths = np.array([len(part) for part in parts])
    is_reference = np.repeat(np.arange(len(parts)) < len(reference), lengths)
    matches = _longest_matches(np.concatenate(parts), is_reference)
    starts = np.cumsum(lengths) - lengths
    return np.maximum.reduceat(matches, starts)[len(reference) :]


def _longest_matches(stream: np.ndarray, is_reference: np.ndarray) -> np.ndarray:
    """How many tokens from each place on also stand somewhere in the reference; 0 inside it.

    In a sorted list of all suffixes, the reference suffix that shares most with another suffix is
    the nearest one above or below it. Suffixes are sorted by prefix doubling (Manber and Myers
    1993): ranks[k] numbers the suffixes by their first 2^k tokens, and later also tells how long
    two of them agree.
    """
    ranks = _rank_suffixes(stream)
    order = np.argsort(ranks[-1][:-1])
    matches = np.zeros(len(stream), dtype=np.int64)
    for direction in (order, order[::-1]):
        place = np.where(is_reference[direction], np.arange(len(order)), -1)
        nearest = np.maximum.accumulate(place)
        asks = (nearest >= 0) & ~is_reference[direction]
        suffix, neighbour = direction[asks], direction[nearest[asks]]
        shared = _shared_length(ranks, suffix, neighbour)
        matches[suffix] = np.maximum(matches[suffix], shared)
    return matches


def _rank_suffixes(stream: np.ndarray) -> list[np.ndarray]:
    """[k][i]: rank of the 2^k tokens from i on, equal where the tokens are; the last one is unique.

    Ranks end with a 0 for the empty suffix behind the stream.
    """
    ranks = [np.append(np.unique(stream, return_inverse=True)[1] + 1, 0)]
    length, size = 1, len(stream)
    while ranks[-1].max() < size:
        behind = np.zeros_like(ranks[-1])
        behind[: max(size - length, 0)] = ranks[-1][length:size]
        pairs = ranks[-1][:size] * (size + 1) + behind[:size]
        ranks.append(np.append(np.unique(pairs, return_inverse=True)[1] + 1, 0))
        length *= 2
    return ranks


def _shared_length(ranks: list[np.ndarray], left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How many tokens the suffixes at these places share, place by place."""
    shared = np.zeros(len(left), dtype=np.int64)
    for power in reversed(range(len(ranks))):
        # Two ends of the stream have rank 0; separators differ, so no two suffixes get there.
        agrees = ranks[power][left + shared] == ranks[power][right + shared]
        shared[agrees] += 1 << power
    return shared


def closest_similarities(
    embeddings: np.ndarray, reference: np.ndarray, *, is_same_set: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest reference text of each text, by the cosine of their embeddings.

    Args:
        embeddings, reference: [num_texts, size], [num_reference, size], rows of length one.
        is_same_set: both are one set, and no text is its own neighbour.
    Returns: index [num_texts] int64, similarity [num_texts] float64.
    """
    similarities = embeddings.astype(np.float64) @ reference.astype(np.float64).T
    if is_same_set:
        np.fill_diagonal(similarities, -np.inf)
    index = similarities.argmax(axis=1)
    return index, similarities[np.arange(len(index)), index]

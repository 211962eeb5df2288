"""The parts of an evaluation: each computes some of a row's estimates.

Rows are sets of texts of one size, the held-out real texts first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .adversary import Adversary, adversarial_auroc
from .copying import closest_similarities, copy_share, longest_copies, self_duplicate_share
from .intervals import bootstrap_mean, group_jackknife
from .mauve import mauve
from .ngrams import ngram_estimates, tokenize
from .result import Estimate
from .similarity import cosine_of_means, mean_cosine_within, mean_pairwise_cosine

REAL = 0
Estimates = dict[str, Estimate]


@dataclass(frozen=True)
class Reference:
    """Texts that a set should not hold. all_texts: uncut; row: their number among the rows."""

    all_texts: Sequence[str]
    row: int


@dataclass(frozen=True)
class Rows:
    """What the parts work on.

    texts: of each row, [num_texts].
    embeddings: of each row, [num_texts, size] float32, rows of length one; [] if no part needs any.
    hull_points: of each row, [num_texts, 5], on one map; [] if no part needs any.
    references: {"real": ..., "training": ...}, the second where there are training texts.
    too_close: cosine above which a text is too near to another; None without embeddings.
    """

    texts: list[list[str]]
    embeddings: list[np.ndarray]
    hull_points: list[np.ndarray]
    references: dict[str, Reference]
    too_close: float | None
    tokenizer: Tokenizer
    seed: int


def repeats(rows: Rows, number: int) -> Estimates:
    texts = rows.texts[number]
    estimates = ngram_estimates(tokenize(texts, rows.tokenizer))
    return estimates | {"self_duplicates": self_duplicate_share(texts)}


def vendi(rows: Rows, number: int) -> Estimates:
    from .vendi import vendi_score

    own = rows.embeddings[number]
    # A bootstrap would not do: texts drawn twice make a set less diverse.
    (estimate,) = group_jackknife(lambda kept: [vendi_score(own[kept])], len(own), rows.seed)
    return {"vendi": replace(estimate, low=max(estimate.low, 1.0))}


def cosines(rows: Rows, number: int) -> Estimates:
    real, own = rows.embeddings[REAL], rows.embeddings[number]
    if number == REAL:
        return {"mean_pairwise_cosine": mean_cosine_within(own, rows.seed)}
    return {
        "cosine_of_means": cosine_of_means(real, own, rows.seed),
        "mean_pairwise_cosine": mean_pairwise_cosine(real, own, rows.seed),
    }


def mauves(rows: Rows, number: int) -> Estimates:
    if number == REAL:
        return {}
    return {"mauve": mauve(rows.embeddings[REAL], rows.embeddings[number], rows.seed)}


def adversaries(rows: Rows, number: int) -> Estimates:
    if number == REAL:
        return {}
    embeddings = rows.embeddings[REAL], rows.embeddings[number]
    texts = rows.texts[REAL], rows.texts[number]
    estimates = {
        f"auroc_{adversary}": adversarial_auroc(adversary, embeddings, texts, rows.seed)
        for adversary in Adversary
    }
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def hulls(rows: Rows, number: int) -> Estimates:
    from .hulls import hull_scores

    if number == REAL:
        return {}
    names = ("hull_precision", "hull_recall", "hull_f_score")
    return _pair_scores(hull_scores, rows.hull_points, number, rows.seed, names)


def neighbours(rows: Rows, number: int) -> Estimates:
    from .neighbours import manifold_scores

    if number == REAL:
        return {}
    names = ("knn_precision", "knn_recall", "density", "coverage")
    return _pair_scores(manifold_scores, rows.embeddings, number, rows.seed, names)


def nearness(rows: Rows, number: int) -> Estimates:
    """To held-out and to training texts, by embeddings; training texts not to themselves.

    But held-out ones to each other, which says what is usual.
    """
    own, seed = rows.embeddings[number], rows.seed
    estimates = {}
    for of, reference in rows.references.items():
        is_same = reference.row == number
        if is_same and number != REAL:
            continue
        against = rows.embeddings[reference.row]
        similarity = closest_similarities(own, against, is_same_set=is_same)[1]
        estimates[f"nearest_{of}"] = bootstrap_mean(similarity, seed)
        estimates[f"close_to_{of}"] = bootstrap_mean(similarity > rows.too_close, seed)
    return estimates


def copies(rows: Rows, number: int) -> Estimates:
    """Copying from held-out and from training texts; a set is not held against itself."""
    texts, seed = rows.texts[number], rows.seed
    estimates = {}
    for of, reference in rows.references.items():
        if reference.row == number:
            continue
        lengths = longest_copies(texts, reference.all_texts, rows.tokenizer)
        estimates[f"longest_copy_of_{of}"] = Estimate(float(lengths.max()))
        estimates[f"mean_copy_of_{of}"] = bootstrap_mean(lengths, seed)
        estimates[f"copies_of_{of}"] = copy_share(texts, reference.all_texts, seed)
    return estimates


class Part(NamedTuple):
    """compute: a row's estimates. metrics: their names."""

    compute: Callable[[Rows, int], Estimates]
    metrics: tuple[str, ...]
    needs_embeddings: bool = True
    needs_hull_points: bool = False


_BOTH = ("real", "training")
# {what progress shows: part}, the quick ones first.
PARTS = {
    "n-grams": Part(repeats, ("distinct_3", "duplicate_3", "diversity", "self_duplicates"), False),
    "copies": Part(
        copies,
        tuple(f"{n}_of_{of}" for n in ("copies", "longest_copy", "mean_copy") for of in _BOTH),
        False,
    ),
    "cosines": Part(cosines, ("cosine_of_means", "mean_pairwise_cosine")),
    "nearness": Part(
        nearness, tuple(f"{name}_{of}" for name in ("nearest", "close_to") for of in _BOTH)
    ),
    "Vendi score": Part(vendi, ("vendi",)),
    "neighbours": Part(neighbours, ("knn_precision", "knn_recall", "density", "coverage")),
    "hulls": Part(hulls, ("hull_precision", "hull_recall", "hull_f_score"), True, True),
    "MAUVE": Part(mauves, ("mauve",)),
    "adversaries": Part(adversaries, ("auroc_xgboost", "auroc_logistic")),
}


def _pair_scores(
    score: Callable, points: list[np.ndarray], number: int, seed: int, names: tuple[str, ...]
) -> Estimates:
    """Scores of a row against the real one, with jackknife intervals over both; none is below 0."""
    real, own = points[REAL], points[number]
    estimates = group_jackknife(lambda kept: score(real[kept], own[kept]), len(own), seed)
    return {
        name: replace(
            estimate,
            low=max(estimate.low, 0.0),
            # Density counts neighbourhoods and may pass 1; the others are shares.
            high=estimate.high if name == "density" else min(estimate.high, 1.0),
        )
        for name, estimate in zip(names, estimates, strict=True)
    }

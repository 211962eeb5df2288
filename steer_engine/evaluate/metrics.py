"""The metrics of an evaluation, in table order; formulas stand where they are computed."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import nearest_hint
from .result import Better, Group, Metric

DOWNSTREAM = "downstream"
_HIGHER, _LOWER, _AS_REAL = Better.HIGHER, Better.LOWER, Better.AS_REAL


def _copying(of: str, title: str) -> list[Metric]:
    """The same questions about the texts that a set is held against."""
    group = Group.COPYING
    return [
        Metric(
            f"copies_of_{of}",
            f"copies of {title}",
            group,
            _LOWER,
            f"Share of the texts that stand word for word among the {title}.",
        ),
        Metric(
            f"longest_copy_of_{of}",
            f"longest copy from {title}",
            group,
            _LOWER,
            f"Tokens of the longest n-gram that any text shares with the {title}.",
        ),
        Metric(
            f"mean_copy_of_{of}",
            f"mean longest copy from {title}",
            group,
            _LOWER,
            f"Tokens of the longest n-gram that a text shares with the {title}, mean over texts.",
        ),
        Metric(
            f"nearest_{of}",
            f"similarity to the nearest of {title}",
            group,
            _AS_REAL,
            f"Cosine of a text's embedding and the nearest one of the {title}, mean over texts.",
        ),
        Metric(
            f"close_to_{of}",
            f"too close to {title}",
            group,
            _LOWER,
            f"Share of the texts nearer to one of the {title} than 95 % of the held-out texts are "
            "to their own nearest neighbour; 0.05 is what real texts have.",
        ),
    ]


HELD_OUT, TRAINING = "held-out texts", "training texts"

METRICS = [
    Metric(
        "distinct_3",
        "distinct 3-grams",
        Group.DIVERSITY,
        _HIGHER,
        "Share of the 3-grams of tokens that are distinct; above the real texts' own value it may "
        "be noise.",
    ),
    Metric(
        "duplicate_3",
        "repeated 3-grams",
        Group.DIVERSITY,
        _LOWER,
        "Share of the 3-grams of tokens that repeat an earlier one: 1 - distinct 3-grams.",
    ),
    Metric(
        "diversity",
        "diversity",
        Group.DIVERSITY,
        _HIGHER,
        "Product of the shares of distinct 2-, 3- and 4-grams of tokens.",
    ),
    Metric(
        "vendi",
        "Vendi score",
        Group.DIVERSITY,
        _HIGHER,
        "How many different texts the set is worth, by the cosines of their embeddings.",
    ),
    Metric(
        "self_duplicates",
        "duplicates in the set",
        Group.DIVERSITY,
        _LOWER,
        "Share of the texts that repeat another one of the set word for word.",
    ),
    Metric(
        "mauve",
        "MAUVE",
        Group.LIKENESS,
        _HIGHER,
        "Overlap of the two distributions over clusters of embeddings, mean over clusterings; "
        "comparable for one embedder and one set size only.",
    ),
    Metric(
        "auroc_xgboost",
        "adversarial AUROC, XGBoost",
        Group.LIKENESS,
        _LOWER,
        "How well boosted trees on embeddings tell synthetic from real; 0.5, a guess, is best.",
        floor=0.5,
    ),
    Metric(
        "auroc_logistic",
        "adversarial AUROC, logistic regression",
        Group.LIKENESS,
        _LOWER,
        "How well a linear classifier on embeddings tells synthetic from real; 0.5, a guess, is "
        "best.",
        floor=0.5,
    ),
    Metric(
        "cosine_of_means",
        "cosine of mean embeddings",
        Group.LIKENESS,
        _HIGHER,
        "Cosine of the two sets' mean embeddings; it does not see spread.",
    ),
    Metric(
        "mean_pairwise_cosine",
        "mean pairwise cosine",
        Group.LIKENESS,
        _AS_REAL,
        "Mean cosine over all pairs of a real and a synthetic text.",
    ),
    Metric(
        "hull_precision",
        "hull precision",
        Group.LIKENESS,
        _HIGHER,
        "Share of the texts inside the real texts' convex hull on a 5-dimensional UMAP map; low "
        "even for other real texts while sets are small.",
    ),
    Metric(
        "hull_recall",
        "hull recall",
        Group.LIKENESS,
        _HIGHER,
        "Share of the real texts inside the set's convex hull on the same map; low in small sets.",
    ),
    Metric(
        "hull_f_score",
        "hull F score",
        Group.LIKENESS,
        _HIGHER,
        "Harmonic mean of hull precision and hull recall.",
    ),
    Metric(
        "knn_precision",
        "k-NN precision",
        Group.LIKENESS,
        _HIGHER,
        "Share of the texts as near to some real text as that one's 5th nearest real text.",
    ),
    Metric(
        "knn_recall",
        "k-NN recall",
        Group.LIKENESS,
        _HIGHER,
        "Share of the real texts as near to some text as that one's 5th nearest in its set.",
    ),
    Metric(
        "density",
        "k-NN density",
        Group.LIKENESS,
        _HIGHER,
        "Real neighbourhoods that a text lies in, over 5, mean over texts; about 1 for real ones.",
    ),
    Metric(
        "coverage",
        "k-NN coverage",
        Group.LIKENESS,
        _HIGHER,
        "Share of the real texts with some text among their 5 nearest neighbours.",
    ),
    *_copying("real", HELD_OUT),
    *_copying("training", TRAINING),
    Metric(
        DOWNSTREAM,
        "accuracy when trained on",
        Group.USEFULNESS,
        _HIGHER,
        "Accuracy on the real texts of a model trained on the set, mean over 5 splits.",
    ),
]


def choose_metrics(
    metrics: Sequence[str] | None, downstream: bool, *, has_training: bool
) -> set[str]:
    """Names of the metrics to compute; None: all but downstream, which has to be asked for.

    Raises: ValueError for a name that is not known, or one that needs training texts without any.
    """
    known = {metric.name: metric for metric in METRICS}
    wanted = set(known) - {DOWNSTREAM} if metrics is None else set(metrics)
    if isinstance(metrics, str) or not wanted:
        raise ValueError("metrics must be a list of names, not empty")
    for name in sorted(wanted):
        if name not in known:
            raise ValueError(
                f"metrics: there is no {name!r}{nearest_hint(name, known)}; "
                f"there are {', '.join(known)}"
            )
        if metrics is not None and name.endswith("_training") and not has_training:
            raise ValueError(f"metrics: {name} needs the training texts (train)")
    return wanted | ({DOWNSTREAM} if downstream else set())

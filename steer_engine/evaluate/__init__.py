"""How good a synthetic data set is, beside real texts and other sets (extra `eval`).

`evaluate` compares sets with real texts by everything in metrics.py; `ngram_metrics` needs no
extra. Importing this package is light: heavy packages are imported where they are used.
"""

from .embeddings import SentenceEmbedder, TextEmbedder
from .evaluation import evaluate
from .ngrams import ngram_metrics
from .result import (
    TRAINING_SET,
    Better,
    Estimate,
    Evaluation,
    Group,
    Metric,
    NearestReal,
    SetEvaluation,
)

__all__ = [
    "TRAINING_SET", "Better", "Estimate", "Evaluation", "Group", "Metric", "NearestReal",
    "SentenceEmbedder", "SetEvaluation", "TextEmbedder", "evaluate", "ngram_metrics",
]  # fmt: skip

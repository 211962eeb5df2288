"""How good a synthetic data set is, beside real texts and other sets (extra `eval`)."""

from .result import Better, Estimate, Evaluation, Group, Metric, NearestReal, SetEvaluation

__all__ = [
    "Better", "Estimate", "Evaluation", "Group", "Metric", "NearestReal", "SetEvaluation",
]  # fmt: skip

"""The table of metrics: numbers as people read them, and which set is best at what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

from ..evaluate import TRAINING_SET, Better, Estimate, Evaluation, Metric

DIRECTIONS = {
    Better.HIGHER: ("↑", "higher is better"),
    Better.LOWER: ("↓", "lower is better"),
    Better.AS_REAL: ("≈", "the nearer to the real texts the better"),
}


@dataclass(frozen=True)
class Value:
    """One cell. value: "" where the metric does not apply. interval: "low to high" or "".

    interval_kind: what the interval is. mark: "best", "level" (its interval reaches the best's) or
    "".
    """

    value: str = ""
    interval: str = ""
    interval_kind: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """A metric with the values of all sets and of the real texts."""

    metric: Metric
    arrow: str
    direction: str
    values: list[Value]
    real: Value


def format_number(value: float, like: float | None = None) -> str:
    """About three digits, never in scientific notation: 1,234  12.3  1.23  0.123  0.0012  9.

    like: the value whose decimals it takes, as the bounds of an interval do; None: its own.
    """
    if not math.isfinite(value):
        return "n/a"
    size = abs(value if like is None else like)
    if like is None and size >= 2 and value.is_integer():
        return f"{value:,.0f}"  # a count
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    digits = 4 if 0 < size < 0.01 else digits
    text = f"{value:,.{digits}f}"
    return "0" if not text.strip("-0.") else text


def metric_rows(evaluation: Evaluation) -> dict[str, list[Row]]:
    """{group's title: rows}, in the order of the metrics; without metrics that no set has."""
    metrics = [m for m in evaluation.metrics if any(m.name in s.estimates for s in evaluation.sets)]
    groups = groupby(metrics, key=lambda metric: metric.group)
    return {str(group): [_row(metric, evaluation) for metric in each] for group, each in groups}


def _row(metric: Metric, evaluation: Evaluation) -> Row:
    marks = rank(metric, evaluation)
    values = [
        as_value(one_set.estimates.get(metric.name), mark)
        for one_set, mark in zip(evaluation.sets, marks, strict=True)
    ]
    real = as_value(evaluation.real.estimates.get(metric.name))
    return Row(metric, *DIRECTIONS[metric.better], values, real)


def as_value(estimate: Estimate | None, mark: str = "") -> Value:
    """An estimate as it is shown; an empty one for None."""
    if estimate is None:
        return Value()
    interval = ""
    if estimate.low is not None and estimate.high is not None:
        low, high = (format_number(v, estimate.value) for v in (estimate.low, estimate.high))
        interval = f"{low} to {high}"
    return Value(format_number(estimate.value), interval, estimate.interval, mark)


def rank(metric: Metric, evaluation: Evaluation) -> list[str]:
    """For each set "best", "level" or "": level sets have an interval that meets the best's.

    The training texts take no part. Nothing is marked where fewer than two sets have the metric,
    all are the same, or the real texts' value is missing and would be needed.
    """
    competing = {
        one_set.name: one_set.estimates[metric.name]
        for one_set in evaluation.sets
        if one_set.name != TRAINING_SET and metric.name in one_set.estimates
    }
    best = evaluation.best(metric)
    if not best or len(best) == len(competing):
        return [""] * len(evaluation.sets)
    level = {
        name
        for name, estimate in competing.items()
        if any(intervals_meet(estimate, competing[b]) for b in best)
    }
    return [
        "best" if one_set.name in best else "level" if one_set.name in level else ""
        for one_set in evaluation.sets
    ]


def intervals_meet(one: Estimate, other: Estimate) -> bool:
    """False where one of them has no interval."""
    bounds = (one.low, one.high, other.low, other.high)
    if any(bound is None for bound in bounds):
        return False
    return one.low <= other.high and other.low <= one.high

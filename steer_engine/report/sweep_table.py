"""The best cell and the Pareto front of a sweep, in words and as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..sweep import AXES
from ..sweep_results import CellScore, Comparison
from .sweep_figures import AXIS_TITLES
from .table import Value, as_value, format_number, intervals_meet


@dataclass(frozen=True)
class SweepRow:
    """A cell. places: its parameters. values: of both measures. verdict: why it is listed."""

    places: list[str]
    values: list[Value]
    sum: str
    verdict: str


@dataclass(frozen=True)
class SweepTable:
    """What a page says about a sweep.

    words: sentences about the best cell and the front.
    axes, measures: heads of the table's columns.
    rows: the best cell, then the rest of the front, by their sums.
    """

    words: str
    axes: list[str]
    measures: list[str]
    rows: list[SweepRow]


def sweep_table(comparison: Comparison) -> SweepTable:
    """The best cell and the front, in words and in rows."""
    axes = swept_axes(comparison)
    return SweepTable(
        words=_words(comparison),
        axes=[AXIS_TITLES[axis] for axis in axes],
        measures=[f"{m.title} ↑" for m in (comparison.diversity, comparison.likeness)],
        rows=[_row(score, comparison, axes) for score in best_first(comparison)],
    )


def cell_label(score: CellScore, comparison: Comparison) -> str:
    """gamma 0.2 eta 0.1: what is swept alone, and without commas, since labels stand in lists."""
    axes = swept_axes(comparison)
    shown = [f"{AXIS_TITLES[axis]} {_shown(getattr(score.cell, axis))}" for axis in axes]
    return " ".join(shown) or score.cell.label


def _shown(value: float | int | str) -> str:
    """In full, so that no two cells look alike."""
    return value if isinstance(value, str) else repr(value).removesuffix(".0")


def best_first(comparison: Comparison) -> list[CellScore]:
    """The best cell, then the rest of the front, by their sums descending."""
    best = comparison.best
    rest = [score for score in comparison.front if score is not best]
    return [best, *sorted(rest, key=lambda score: -score.sum)]


def swept_axes(comparison: Comparison) -> list[str]:
    """The axes with several values."""
    return [a for a in AXES if len({getattr(s.cell, a) for s in comparison.scores}) > 1]


def _words(comparison: Comparison) -> str:
    best, front = comparison.best, comparison.front
    measures = f"{comparison.diversity.title} and {comparison.likeness.title}"
    if len(comparison.scores) == 1:
        return f"One cell, {best.cell.label}; its {measures} sum up to {format_number(best.sum)}."
    sentences = [
        f"Of {len(comparison.scores)} cells, {cell_label(best, comparison)} has the largest sum of "
        f"{measures}, {format_number(best.sum)}."
    ]
    if len(front) > 1:
        sentences.append(
            f"{len(front)} cells are on the Pareto front, where no other cell beats them in both: "
            f"from {cell_label(front[0], comparison)} with the most {comparison.likeness.title} to "
            f"{cell_label(front[-1], comparison)} with the most {comparison.diversity.title}."
        )
    num_level = sum(score is not best and _is_level(score, best) for score in comparison.scores)
    if num_level:
        cells, have = ("cell", "has") if num_level == 1 else ("cells", "have")
        sentences.append(
            f"{num_level} other {cells} {have} intervals that meet the best cell's in both "
            "measures; with another seed one of them might have come first."
        )
    return " ".join(sentences)


def _is_level(score: CellScore, best: CellScore) -> bool:
    pairs = ((score.diversity, best.diversity), (score.likeness, best.likeness))
    return all(intervals_meet(one, other) for one, other in pairs)


def _row(score: CellScore, comparison: Comparison, axes: Sequence[str]) -> SweepRow:
    verdicts = ["largest sum"] if score is comparison.best else []
    if any(score is other for other in comparison.front):
        verdicts.append("Pareto front")
    return SweepRow(
        [_shown(getattr(score.cell, axis)) for axis in axes],
        [as_value(estimate) for estimate in (score.diversity, score.likeness)],
        format_number(score.sum),
        ", ".join(verdicts),
    )

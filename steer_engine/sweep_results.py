"""What a sweep found: all cells evaluated alike, and compared by two of the metrics.

DIR/evaluation.json     the cells beside each other
DIR/comparison.json     the two metrics, and a digest of all that the evaluation depends on
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from .dataset import read_texts
from .errors import RunError, nearest_hint
from .evaluate import Better, Estimate, Evaluation, Metric, SetEvaluation
from .evaluate.metrics import METRICS
from .files import write_atomically
from .sweep import SweepCell, locked, read_cells
from .tokenizer import Tokenizer

# The paper's "normalised n-grams", and a likeness that is 1 for the real texts' own distribution.
DIVERSITY, LIKENESS = "distinct_3", "mauve"
EVALUATION, COMPARISON = "evaluation.json", "comparison.json"


def evaluate_sweep(
    output: str | Path,
    real: str | Path | Sequence[str],
    *,
    tokenizer: Tokenizer,
    train: str | Path | Sequence[str] | None = None,
    diversity: str = DIVERSITY,
    likeness: str = LIKENESS,
    seed: int = 0,
    sample_size: int | None = None,
    embedder: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Compare all cells with the real texts, at one size, and keep it as DIR/evaluation.json.

    Nothing but the two measures is computed. If nothing that they depend on has changed since, what
    is kept is returned.

    Args: as steer_engine.evaluate.evaluate.
        diversity, likeness: the metrics to compute, as check_measures takes them.
    Raises: ValueError as check_measures; RunError if there is no sweep, or it is in use; else as
        evaluate.
    """
    check_measures(diversity, likeness)
    output = Path(output)
    run_dirs = {cell.name: output / "cells" / cell.name for cell in read_cells(output)}
    real, train = read_texts(real), None if train is None else read_texts(train)
    settings = {"seed": seed, "sample_size": sample_size, "metrics": [diversity, likeness]}
    digest = _digest(run_dirs, [real, train, settings, str(embedder)])
    comparison = {"diversity": diversity, "likeness": likeness, "sha256": digest}
    path, comparison_path = output / EVALUATION, output / COMPARISON
    with locked(output):
        if comparison_path.exists() and _read_measures(output) == comparison:
            return Evaluation.read(path)
        from .evaluate import evaluate

        evaluation = evaluate(
            run_dirs,
            real,
            train=train,
            tokenizer=tokenizer,
            embedder=embedder,
            progress=progress,
            **settings,
        )
        comparison_path.unlink(missing_ok=True)
        evaluation.write(path)
        write_atomically(comparison_path, json.dumps(comparison, indent=2) + "\n")
    return evaluation


def check_measures(*names: str) -> None:
    """Raise ValueError for a name that is no metric of a set which is better when higher."""
    usable = [metric.name for metric in METRICS if metric.better is Better.HIGHER]
    for name in names:
        if name not in usable:
            raise ValueError(
                f"{name!r} is no metric that is better when higher{nearest_hint(name, usable)}; "
                f"there are {', '.join(usable)}"
            )


def read_comparison(output: str | Path) -> Comparison:
    """The cells of an evaluated sweep by its two measures.

    Raises: RunError if there is no sweep, or one that has not been evaluated; DataError if the
        evaluation is damaged; ValueError if it lacks cells that have come since.
    """
    output = Path(output)
    cells = read_cells(output)
    again = "run the same sweep again, without --no-evaluate"
    if not (output / COMPARISON).exists():
        raise RunError(f"{output}: its cells have not been compared; {again}")
    measures = _read_measures(output)
    try:
        return compare_cells(
            cells,
            Evaluation.read(output / EVALUATION),
            diversity=measures["diversity"],
            likeness=measures["likeness"],
        )
    except (KeyError, TypeError):
        raise RunError(f"{output / COMPARISON}: damaged; {again}") from None


def _read_measures(output: Path) -> dict[str, str]:
    """{} for a damaged file."""
    try:
        return json.loads((output / COMPARISON).read_text(encoding="utf-8"))
    except ValueError:
        return {}


def _digest(run_dirs: Mapping[str, Path], settings: list) -> str:
    """Of the cells' examples, the settings and the version."""
    digest = hashlib.sha256(json.dumps([version("steer-engine"), *settings]).encode())
    for name, run_dir in run_dirs.items():
        digest.update(json.dumps(name).encode())
        digest.update(hashlib.sha256((run_dir / "examples.jsonl").read_bytes()).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class CellScore:
    """A cell's two measures, and the texts that they are of."""

    cell: SweepCell
    diversity: Estimate
    likeness: Estimate
    texts: list[str]

    @property
    def sum(self) -> float:
        return self.diversity.value + self.likeness.value

    def dominates(self, other: CellScore) -> bool:
        """No worse in both measures and better in one."""
        ours = self.diversity.value, self.likeness.value
        theirs = other.diversity.value, other.likeness.value
        return ours != theirs and all(a >= b for a, b in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class Comparison:
    """A sweep's cells by two measures, both of them better when higher.

    diversity, likeness: what is measured.
    scores: in the order of the grid.
    """

    diversity: Metric
    likeness: Metric
    scores: list[CellScore]

    @property
    def best(self) -> CellScore:
        """The cell with the largest sum of both measures; the first of equals."""
        return max(self.scores, key=lambda score: score.sum)

    @property
    def front(self) -> list[CellScore]:
        """The Pareto front: cells that no other dominates, by diversity ascending."""
        front = [s for s in self.scores if not any(o.dominates(s) for o in self.scores)]
        return sorted(front, key=lambda s: (s.diversity.value, -s.likeness.value))


def compare_cells(
    cells: Sequence[SweepCell],
    evaluation: Evaluation,
    *,
    diversity: str = DIVERSITY,
    likeness: str = LIKENESS,
) -> Comparison:
    """The cells by two metrics of their evaluation, named by `diversity` and `likeness`.

    Raises: ValueError for a metric that the evaluation lacks or that is not better when higher.
    """
    by_name = {s.name: s for s in evaluation.sets}
    missing = [cell.name for cell in cells if cell.name not in by_name]
    if missing:
        raise ValueError(f"the evaluation lacks the cell {missing[0]}; evaluate the sweep again")
    evaluated = [by_name[cell.name] for cell in cells]
    metrics = [_metric(evaluation, evaluated, name) for name in (diversity, likeness)]
    scores = [
        CellScore(cell, *(own.estimates[metric.name] for metric in metrics), own.texts)
        for cell, own in zip(cells, evaluated, strict=True)
    ]
    return Comparison(*metrics, scores)


def _metric(evaluation: Evaluation, evaluated: Sequence[SetEvaluation], name: str) -> Metric:
    usable = {
        metric.name: metric
        for metric in evaluation.metrics
        if metric.better is Better.HIGHER and all(metric.name in e.estimates for e in evaluated)
    }
    if name not in usable:
        raise ValueError(
            f"{name!r} is no metric of all cells that is better when higher"
            f"{nearest_hint(name, usable)}; there are {', '.join(usable) or 'none'}"
        )
    return usable[name]

"""The page of a sweep: its best cell and Pareto front as runs, all cells in figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..evaluate import TRAINING_SET, Evaluation
from ..sweep_results import EVALUATION, read_comparison
from .figure import SERIES
from .page import write_report
from .sweep_figures import AXIS_TITLES, sweep_figures
from .sweep_table import best_first, cell_label, sweep_table, swept_axes

REPORT_NAME = "report.html"
MAX_RUNS = len(SERIES)  # each has a colour of its own
NOTE = (
    "The best cell is chosen by the same numbers that are shown for it, so some of its lead is "
    "luck: expect a little less from a run with another seed."
)


def write_sweep_report(
    directory: Path,
    path: Path | None = None,
    *,
    real: Sequence[Sequence[str]] = (),
    title: str | None = None,
    command: str = "",
) -> Path:
    """Write one page about a sweep that has been evaluated; returns its path.

    The best cell and the rest of the Pareto front stand in it as runs, with settings and examples;
    all cells stand in the figures.

    Args: as write_report. path: None: report.html in the sweep's directory.
    Raises: as read_comparison and write_report.
    """
    comparison = read_comparison(directory)
    listed, num_cells = best_first(comparison), len(comparison.scores)
    scores = listed[:MAX_RUNS]
    run_dirs = [directory / "cells" / score.cell.name for score in scores]
    notes = [NOTE] if num_cells > 1 else []
    if len(listed) > MAX_RUNS:
        notes.append(
            f"The page shows metrics and examples of the first {MAX_RUNS} cells of the Pareto "
            f"front's {len(listed)}; all of them stand in the sweep's table and figures."
        )
    path = path or directory / REPORT_NAME
    axes = " and ".join(AXIS_TITLES[axis] for axis in swept_axes(comparison))
    write_report(
        path,
        _evaluation_of(directory, {s.cell.name: cell_label(s, comparison) for s in scores}),
        runs=run_dirs,
        real=real,
        sweep=sweep_figures(comparison),
        sweep_table=sweep_table(comparison),
        title=title or (f"Sweep over {axes}" if axes else "Sweep of one cell"),
        lead="" if num_cells == 1 else f"Of {num_cells} cells the best comes first:",
        notes=notes,
        command=command,
    )
    return path


def _evaluation_of(directory: Path, labels: Mapping[str, str]) -> Evaluation:
    """The sweep's evaluation of these cells. labels: {a cell's name: how the page calls it}."""
    evaluation = Evaluation.read(directory / EVALUATION)
    by_name = {one_set.name: one_set for one_set in evaluation.sets}
    sets = [
        # Its source may have been given from another working directory.
        replace(by_name[name], name=label, source=str(directory / "cells" / name))
        for name, label in labels.items()
    ]
    sets += [one_set for one_set in evaluation.sets if one_set.name == TRAINING_SET]
    of_cells = tuple(f"{name}: " for name in by_name if name != TRAINING_SET)
    notes = [note for note in evaluation.notes if not note.startswith(of_cells)]
    return replace(evaluation, sets=sets, notes=notes)

"""`steer-engine sweep`: a data set for every cell of a grid, and the cells beside each other."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from ..dataset import read_texts
from ..engine import Engine
from ..evaluate import Estimate
from ..options import SWEEP_OPTIONS, UsageError, build_axes, required
from ..run_directory import check_writable
from ..sweep import AXES, SweepCell, check_grid, grid, run_sweep
from ..sweep_results import Comparison, evaluate_sweep, read_comparison
from .console import NUM_SHOWN, command_line, err, out, set_up_logging
from .generate import build_request, load_engine
from .interrupts import describe_examples, resumable
from .sweep_checks import check_evaluation
from .typer_options import Debug, RunFile, Verbose, complete_run, with_options


@with_options(SWEEP_OPTIONS)
def sweep(
    *,
    given: dict[str, Any],
    config: RunFile = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write data sets over a grid of strengths, and compare them."""
    set_up_logging(verbose)
    values = complete_run(given, config, SWEEP_OPTIONS)
    required(values, "base", "num_examples", "output")
    output = Path(values["output"])
    requests = _build_requests(values)
    if values["evaluate"]:
        check_evaluation(values)
    err.print(f"sweep: {len(requests)} cells of {values['num_examples']} examples")
    check_writable(output)
    check_grid(output, list(requests), values["resume"])
    engine = load_engine(values)
    with resumable(lambda: describe_examples(output, "cells/*/examples.jsonl")):
        settings = {name: values[name] for name in ("seed", "resume", "progress")}
        run_sweep(engine, requests, output, **settings)
        out.print(f"data sets: {output / 'cells'}", markup=False, soft_wrap=True)
        if values["evaluate"]:
            _compare(engine, output, values)


def _build_requests(values: dict[str, Any]) -> dict[SweepCell, dict[str, Any]]:
    """Each cell's request; an error names the cell."""
    if values["real"] is not None:
        values = values | {"real": read_texts(values["real"])}  # once, not for every cell
    requests = {}
    for cell in grid(**build_axes(values)):
        try:
            requests[cell] = build_request(values | asdict(cell))
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"{cell.name}: {error}") from None
    return requests


def _compare(engine: Engine, output: Path, values: dict[str, Any]) -> None:
    """Evaluate the cells, print the table, write the figures and the report."""
    from ..report.inputs import ReportInputs
    from ..report.sweep_figures import sweep_figures, write_figures

    evaluate_sweep(
        output,
        values["held_out"] or values["real"],
        train=values["real"] if values["held_out"] else None,
        tokenizer=engine.tokenizer,
        **{
            name: values[name]
            for name in ("diversity", "likeness", "seed", "sample_size", "embedder", "progress")
        },
    )
    comparison = read_comparison(output)
    write_figures(sweep_figures(comparison), output / "figures")
    _print_cells(comparison)
    out.print(f"figures: {output / 'figures'}", markup=False, soft_wrap=True)
    real, held_out = (values[n] and Path(values[n]) for n in ("real", "held_out"))
    path = ReportInputs([], held_out, real, sweep=output).write(command=command_line())
    out.print(f"report: {path}", markup=False, soft_wrap=True)


def _print_cells(comparison: Comparison) -> None:
    """The cells with the largest sums, and all of the Pareto front."""
    front = comparison.front
    axes = [a for a in AXES if any(getattr(s.cell, a) is not None for s in comparison.scores)]
    table = Table(title="best cells", caption="below a value its interval; * on the Pareto front")
    table.title_justify = table.caption_justify = "left"
    measures = (comparison.diversity.title, comparison.likeness.title)
    for title in (*(axis.removeprefix("num_") for axis in axes), *measures, "sum", ""):
        table.add_column(title, justify="right")
    ranked = sorted(comparison.scores, key=lambda score: -score.sum)
    for rank, score in enumerate(ranked):
        is_front = any(score is other for other in front)
        if rank < NUM_SHOWN or is_front:
            place = (f"{getattr(score.cell, axis)}" for axis in axes)
            values = (_shown(score.diversity), _shown(score.likeness), f"{score.sum:.3f}")
            table.add_row(*place, *values, "*" if is_front else "")
    out.print(table)


def _shown(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f}\n{estimate.low:.3f} to {estimate.high:.3f}"

"""`steer-engine report`: runs, or a sweep, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import command_line, out, set_up_logging
from .typer_options import Debug


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN...]",
            help="Run directories, the main one first; none for a report about a sweep.",
        ),
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="Real texts to compare with, held out from training.")
    ] = None,
    train: Annotated[Path | None, typer.Option(help="The texts that the model saw.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of the base checkpoint, to count n-grams with.")
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="[default: evaluation.json in the first run directory, if it fits]"),
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="A sweep's directory, for its best cells and figures.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="[default: the prompt]")] = None,
    output: Annotated[
        Path | None, typer.Option(help="[default: report.html in the first directory]")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page about runs: metrics, figures, examples."""
    from ..report.inputs import ReportInputs

    set_up_logging()
    inputs = ReportInputs(runs or [], real, train, tokenizer, evaluation, sweep)
    path = inputs.write(output, title=title, command=command_line())
    out.print(f"report: {path}", markup=False, soft_wrap=True)

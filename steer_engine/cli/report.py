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
            metavar="RUN",
            help="Run directories, the main one first; none for a report about a sweep.",
        ),
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="File of real texts to compare with, not used for training.")
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="File of the texts that the model was trained on.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of the base checkpoint, to count n-grams with.")
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="Result of `evaluate`. "
            "[default: evaluation.json in the first run directory, if it fits]"
        ),
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="A sweep's directory, for its best cells and figures.")
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Heading of the page. [default: the prompt]")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="HTML file to write. [default: report.html in the first directory]"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write an HTML page about runs or a sweep, with figures."""
    from ..report.inputs import ReportInputs

    set_up_logging()
    inputs = ReportInputs(runs or [], real, train, tokenizer, evaluation, sweep)
    path = inputs.write(output, title=title, command=command_line())
    out.print(f"report: {path}", markup=False, soft_wrap=True)

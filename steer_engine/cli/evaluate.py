"""`steer-engine evaluate`: data sets beside real texts and each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..files import check_output_file
from .console import out, set_up_logging
from .typer_options import Debug


def evaluate(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run directories, or files of texts.")
    ],
    real: Annotated[
        Path, typer.Option(help="File of real texts that the model was not trained on.")
    ],
    train: Annotated[
        Path | None, typer.Option(help="File of the texts that the model was trained on.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the base checkpoint, to count n-grams with. [default: the demo's]"
        ),
    ] = None,
    embedder: Annotated[
        Path | None,
        typer.Option(
            help="Directory of a sentence-transformers model. "
            "[default: the installed all-MiniLM-L6-v2]"
        ),
    ] = None,
    sample_size: Annotated[
        int | None,
        typer.Option(
            help="How many texts of each set are compared. [default: as many as the smallest has]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write. [default: evaluation.json in the first run directory]"
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Names of the metrics to compute, with commas. [default: all but downstream]"
        ),
    ] = None,
    downstream: Annotated[
        bool,
        typer.Option(
            "--downstream", help="Also train classifiers on the sets, and test them on real texts."
        ),
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show progress.")] = True,
    debug: Debug = False,
) -> None:
    """Compare synthetic data sets with real texts and with each other."""
    from .. import evaluate as evaluation
    from ..evaluate.command import choose_tokenizer, default_output, result_table

    set_up_logging()
    if output is not None:
        check_output_file(output)
    directory, notes = choose_tokenizer(tokenizer, runs)
    result = evaluation.evaluate(
        runs,
        real,
        train=train,
        tokenizer=directory,
        seed=seed,
        sample_size=sample_size,
        embedder=embedder,
        metrics=None if metrics is None else [n.strip() for n in metrics.split(",") if n.strip()],
        downstream=downstream,
        progress=progress,
    )
    result = replace(result, notes=[*notes, *result.notes])
    output = output or default_output(runs[0])
    result.write(output)
    out.print(result_table(result))
    for note in result.notes:
        out.print(f"- {note}", markup=False)
    out.print(f"evaluation: {output}", markup=False, soft_wrap=True)

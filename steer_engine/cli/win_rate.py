"""`steer-engine win-rate`: pairs for human judges, and what their votes say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import out
from .typer_options import Debug

app = typer.Typer(no_args_is_help=True, help="Ask human judges which of two data sets is better.")


@app.command("export")
def export(
    run_a: Annotated[
        Path, typer.Argument(metavar="RUN_A", help="Run directory, or a file of texts.")
    ],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="What it is compared with.")],
    output: Annotated[Path, typer.Option(help="Directory to write the pairs and their key to.")],
    num_pairs: Annotated[
        int | None,
        typer.Option(min=1, help="How many pairs to write. [default: as many as there are]"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of which texts meet, and on which side.")
    ] = 0,
    debug: Debug = False,
) -> None:
    """Write blinded pairs of texts for human judges."""
    from ..evaluate.win_rate import KEY_FILE, PAIRS_FILE, export_pairs

    count = export_pairs(run_a, run_b, output, num_pairs=num_pairs, seed=seed)
    out.print(
        f"{count} pairs in {output / PAIRS_FILE}: give each judge a copy, and keep {KEY_FILE} from "
        f"them; put the copies into {output} and run `steer-engine win-rate score {output}`",
        markup=False,
        soft_wrap=True,
    )


@app.command("score")
def score(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory of the pairs, their key and the votes.")
    ],
    debug: Debug = False,
) -> None:
    """Count the judges' votes, and test whether the first set is better."""
    from ..evaluate.win_rate import score_votes

    out.print(score_votes(directory).describe(), markup=False, soft_wrap=True)

"""`steer-engine prepare`: a data set's original release becomes examples for finetune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..files import write_output
from ..recipes import RECIPES, find_recipe
from ..recipes import prepare as prepare_examples
from .console import out
from .typer_options import Debug

HELP = "Turn a data set's original release into examples for finetune.\n\nRecipes: " + "; ".join(
    f"{recipe.name} ({recipe.about})" for recipe in RECIPES.values()
)


def prepare(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Name of a recipe.", show_default=False)
    ],
    raw: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="The release: .jsonl, .csv, .parquet or .txt, also .gz, .bz2, .xz.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="The .jsonl file to write.", show_default=False)],
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the draw that makes labels equally many.")
    ] = 0,
    debug: Debug = False,
) -> None:
    """Write what HELP says, since a docstring cannot list recipes."""
    prepared = prepare_examples(find_recipe(recipe), raw, seed)
    write_output(output, "".join(e.to_json() + "\n" for e in prepared.examples))
    labels = "".join(f", {count} {label}" for label, count in prepared.num_by_label.items())
    out.print(
        f"{output}: {len(prepared.examples)} examples{labels}; {prepared.num_left_out} records "
        f"left out, {prepared.num_repeated} repeated, {prepared.num_unbalanced} dropped to balance "
        "labels",
        markup=False,
        soft_wrap=True,
    )

"""What `steer-engine sweep` checks of an evaluation that will come hours later."""

from __future__ import annotations

from typing import Any

from ..dataset import read_texts
from ..errors import SteerError, check_number
from ..evaluate.embeddings import model_directory
from ..evaluate.evaluation import MIN_TEXTS, check_extra
from ..options import UsageError, flag
from ..sweep_results import check_measures

DRAWING_MODULES = ("matplotlib", "jinja2")
REMEDY = "or give --no-evaluate"


def check_evaluation(values: dict[str, Any]) -> None:
    """Find what would stop the comparison of the cells before a model is loaded.

    values: of the sweep's options.
    Raises: UsageError for an option that an evaluation cannot work with; SteerError if a package or
        a file is missing. Each says what to do.
    """
    if values["real"] is None and values["held_out"] is None:
        raise UsageError(f"give --real or --held-out to compare the cells with, {REMEDY}")
    try:
        check_measures(values["diversity"], values["likeness"])
        if values["sample_size"] is not None:
            check_number("sample_size", values["sample_size"], low=MIN_TEXTS, is_int=True)
        check_extra(*DRAWING_MODULES)
        model_directory(values["embedder"])
    except (SteerError, ValueError) as error:
        kind = SteerError if isinstance(error, SteerError) else UsageError
        raise kind(f"{error}, {REMEDY}") from None
    sizes = {"num_examples": values["num_examples"]} | {
        name: len(read_texts(values[name])) for name in ("real", "held_out") if values[name]
    }
    for name, size in sizes.items():
        if size < MIN_TEXTS:
            raise UsageError(
                f"{flag(name)} gives {size} texts and a comparison of the cells takes at least "
                f"{MIN_TEXTS}; give more, {REMEDY}"
            )

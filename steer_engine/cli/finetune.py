"""`steer-engine finetune`: the domain model, as an adapter of the base."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from ..finetune import FINETUNE_OPTIONS, FinetuneConfig, FinetuneRecord
from ..finetune import finetune as train_adapter
from ..options import complete, required
from .console import out, set_up_logging
from .interrupts import resumable
from .typer_options import Debug, Verbose, with_options


@with_options(FINETUNE_OPTIONS)
def finetune(
    *,
    given: dict[str, Any],
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Learn the domain model from real examples, as a LoRA adapter."""
    set_up_logging(verbose)
    values = complete(given, options=FINETUNE_OPTIONS)
    required(values, "base", "train", "output")
    config = FinetuneConfig(**{f.name: values[f.name] for f in fields(FinetuneConfig)})
    names = ("base", "train", "output", "prompt", "resume", "progress")
    with resumable(lambda: _describe_epochs(Path(values["output"]))):
        record = train_adapter(**{name: values[name] for name in names}, config=config)
    out.print(f"{record.describe()}: {values['output']}", markup=False, soft_wrap=True)


def _describe_epochs(output: Path) -> str:
    """What an unfinished fine-tune has kept."""
    record = FinetuneRecord.read(output)
    return "no epoch had ended" if record is None else record.describe()

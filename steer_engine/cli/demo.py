"""`steer-engine demo`: a data set and its report from the embedded pair, with nothing to give."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .. import embedded
from ..dataset import SyntheticDataset
from ..embedded.demo_report import write_demo_report
from ..engine import Engine
from ..run_directory import check_output
from .console import NUM_SHOWN, err, out, set_up_logging
from .generate import print_summary, write_dataset
from .typer_options import Debug


def demo(
    num_examples: Annotated[int, typer.Option(min=1, help="How many examples to write.")] = 100,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory to write the run to. [default: a new one below runs/]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0,
    debug: Debug = False,
) -> None:
    """Write a data set and its report with the built-in tiny models."""
    set_up_logging()
    output = output or new_directory(Path("runs"), "demo")
    started_at = time.monotonic()
    request = embedded.demo_request() | {
        "num_examples": num_examples,
        "output": str(output),
        "seed": seed,
        "progress": True,
    }
    err.print(f"guidance: {request['guidance'].describe()}", markup=False)
    check_output(output, resume=True)
    engine = embedded.load_pair()
    err.print(f"memory: {engine.memory_plan.describe()}", markup=False)
    dataset = write_dataset(engine, request)
    out.print()
    _print_comparison(engine, dataset, request)
    print_summary(dataset, output)
    err.print("report: two baselines of the same size, and metrics")
    report_path = write_demo_report(engine, request)
    out.print(f"demo: {time.monotonic() - started_at:.1f} s in all")
    out.print(f"report: {report_path}", markup=False, soft_wrap=True)


def new_directory(parent: Path, name: str) -> Path:
    """parent/name, or the first of parent/name-2, -3, ... that does not exist."""
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


def _print_comparison(engine: Engine, dataset: SyntheticDataset, request: dict[str, Any]) -> None:
    """The same prompt under the base model, the domain model and STEER, side by side."""
    sampling, prompt = request["sampling"], request["prompt"]
    count = min(NUM_SHOWN, len(dataset))
    columns = {}
    for name, guidance in embedded.COMPARED.items():
        completions = engine.generate([prompt] * count, guidance=guidance, sampling=sampling)
        columns[name] = [" ".join(c.text.split()) for c in completions]
    columns["STEER"] = dataset.texts[:count]
    table = Table(title=prompt, show_lines=True, title_justify="left")
    for name in columns:
        table.add_column(name, ratio=1)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, row))
    out.print(table)

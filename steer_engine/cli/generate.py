"""`steer-engine generate`, and what other commands that write data sets share with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from ..dataset import SyntheticDataset, read_texts
from ..engine import Engine
from ..options import (
    OPTIONS,
    build_method,
    build_negatives,
    build_prompts,
    build_sampling,
    build_until,
    required,
)
from ..recipes import find_recipe
from ..run_directory import check_output
from .console import err, out, set_up_logging
from .interrupts import describe_examples, resumable
from .typer_options import Debug, RunFile, Verbose, complete_run, with_options


@with_options(OPTIONS)
def generate(
    *,
    given: dict[str, Any],
    config: RunFile = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write a data set from a base, a domain model and real examples."""
    set_up_logging(verbose)
    values = complete_run(given, config, OPTIONS)
    required(values, "base", "num_examples", "output")
    # What can be wrong is found before a model is loaded, which may take minutes.
    if values["real"] is not None:
        values["real"] = read_texts(values["real"])
    request = build_request(values) | {
        "seed": values["seed"],
        "output": values["output"],
        "resume": values["resume"],
        "progress": values["progress"],
    }
    err.print(f"guidance: {request['method'].describe()}", markup=False)
    check_output(values["output"], values["resume"])
    dataset = write_dataset(load_engine(values), request)
    print_summary(dataset, Path(values["output"]))


def build_request(values: dict[str, Any]) -> dict[str, Any]:
    """What every data set needs of its own: arguments of generate_dataset."""
    recipe = None if values["recipe"] is None else find_recipe(values["recipe"])
    return {
        "prompt": build_prompts(values),
        "num_examples": values["num_examples"],
        "real": values["real"],
        "method": build_method(values),
        "negatives": build_negatives(values),
        "sampling": build_sampling(values),
        "accept": recipe and recipe.accept,
        "max_attempts": values["max_attempts"],
        "until": build_until(values),
    }


def load_engine(values: dict[str, Any]) -> Engine:
    """The models of a run's options, on its machine; says how memory is divided."""
    machine = ("device", "dtype", "weight_dtype", "backend")
    machine += ("max_num_seqs", "max_model_len", "kv_cache_gib")
    engine = Engine.from_pretrained(
        values["base"], values["domain"], **{name: values[name] for name in machine}
    )
    err.print(f"memory: {engine.memory_plan.describe()}", markup=False)
    return engine


def write_dataset(engine: Engine, request: dict[str, Any]) -> SyntheticDataset:
    """One run; an interrupt ends the process and says how to resume."""
    with resumable(lambda: describe_examples(Path(request["output"]))):
        return engine.generate_dataset(**request)


def print_summary(dataset: SyntheticDataset, output: Path) -> None:
    """A run's counts and speed, and where its examples are."""
    table = Table(show_header=False, title="summary", title_justify="left")
    for name, value in dataset.summary.items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        )
        table.add_row(name.replace("_", " "), str(shown))
    out.print(table)
    out.print(f"data set: {output / 'examples.jsonl'}", markup=False, soft_wrap=True)

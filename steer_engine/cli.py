"""The command line: `steer-engine generate | report | demo | info`, also `python -m steer_engine`.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Errors are one line.
"""

from __future__ import annotations

import inspect
import logging
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import embedded, ops
from .dataset import SyntheticDataset
from .embedded.demo_report import write_demo_report
from .engine import Engine
from .errors import SteerError
from .machine import available_bytes, has_fast_bf16, max_cache_bytes
from .options import (
    OPTIONS,
    build_guidance,
    build_negatives,
    build_prompts,
    build_sampling,
    build_until,
    complete,
    flag,
    read_run_file,
    required,
)
from .run_directory import check_output

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
NUM_SHOWN = 8
app = typer.Typer(
    name="steer-engine",
    help="Write synthetic text data sets with STEER guidance on Falcon models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line and exit."""
    is_debug = "--debug" in sys.argv
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except (SteerError, ValueError, OSError, MemoryError) as error:
        if is_debug:
            raise
        is_usage = isinstance(error, ValueError) and not isinstance(error, SteerError)
        message = " ".join(str(error).split()) or type(error).__name__
        err.print(f"error: {message}", markup=False)
        sys.exit(EXIT_USAGE if is_usage else EXIT_FAILED)


def _set_up_logging(is_verbose: bool) -> None:
    level = logging.INFO if is_verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


def _with_run_options(function: Callable) -> Callable:
    """Give a command one option for each entry of OPTIONS, passed on as a dict `given`."""
    kinds = {list: list[str]}
    parameters = []
    for option in OPTIONS:
        shown_default = option.shown_default or (
            None if option.default is None else repr(option.default)
        )
        shown = "" if shown_default is None else f" [default: {shown_default}]"
        if option.shown_default == "required":
            shown = " [required]"
        name = flag(option.name)
        spelling = f"{name}/--no-{name[2:]}" if option.kind is bool else name
        declared = typer.Option(spelling, help=option.help + shown, show_default=False)
        annotation = Annotated[kinds.get(option.kind, option.kind) | None, declared]
        parameters.append(
            inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
            )
        )
    names = {option.name for option in OPTIONS}

    def command(**arguments):
        given = {name: arguments.pop(name) for name in list(arguments) if name in names}
        return function(given=given, **arguments)

    own = [
        p
        for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.name != "given"
    ]
    command.__signature__ = inspect.Signature([*parameters, *own])
    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    return command


@app.command()
@_with_run_options
def generate(
    *,
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="YAML run file; the command line comes before it.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what happens.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write a synthetic data set from a base model, a domain model and real examples."""
    _set_up_logging(verbose)
    values = complete(given, {} if config is None else read_run_file(config))
    required(values, "base", "num_examples", "output")
    # Everything that can be wrong is found before a model is loaded.
    request = {
        "prompt": build_prompts(values),
        "num_examples": values["num_examples"],
        "real": values["real"],
        "guidance": build_guidance(values),
        "negatives": build_negatives(values),
        "sampling": build_sampling(values),
        "max_attempts": values["max_attempts"],
        "until": build_until(values),
        "seed": values["seed"],
        "output": values["output"],
        "resume": values["resume"],
        "progress": values["progress"],
    }
    err.print(f"guidance: {request['guidance'].describe()}", markup=False)
    check_output(values["output"], values["resume"])
    machine = ("device", "dtype", "backend", "max_num_seqs", "max_model_len", "kv_cache_gib")
    engine = Engine.from_pretrained(
        values["base"], values["domain"], **{name: values[name] for name in machine}
    )
    err.print(f"memory: {engine.memory_plan.describe()}", markup=False)
    dataset = _run(engine, request)
    _print_summary(dataset, Path(values["output"]))


def _run(engine: Engine, request: dict[str, Any]) -> SyntheticDataset:
    """generate_dataset, with an interrupt turned into a line that says how to go on."""
    try:
        return engine.generate_dataset(**request)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Nothing is there yet while checkpoints are hashed.
        has_examples = (Path(request["output"]) / "examples.jsonl").exists()
        num_safe = len(SyntheticDataset.load(request["output"])) if has_examples else 0
        err.print(
            f"interrupted: {num_safe} examples are safe in {request['output']}; "
            "run the same command to resume",
            markup=False,
        )
        sys.exit(EXIT_INTERRUPTED)


@app.command()
def demo(
    num_examples: Annotated[int, typer.Option(min=1, help="Size of the data set.")] = 100,
    output: Annotated[
        Path | None, typer.Option(help="Run directory. [default: a new one below runs/]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write a data set with the embedded tiny Falcon pair, and its report."""
    _set_up_logging(False)
    output = output or _new_directory(Path("runs"), "demo")
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
    dataset = _run(engine, request)
    out.print()
    _print_comparison(engine, dataset, request)
    _print_summary(dataset, output)
    err.print("report: two baselines of the same size, and metrics")
    report_path = write_demo_report(engine, request)
    out.print(f"demo: {time.monotonic() - started_at:.1f} s in all")
    out.print(f"report: {report_path}", markup=False, soft_wrap=True)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, the main one first.")
    ],
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
        Path | None, typer.Option(help="A sweep's directory, for its figures.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="[default: the prompt]")] = None,
    output: Annotated[
        Path | None, typer.Option(help="[default: report.html in the first run directory]")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write one self-contained HTML page about runs: metrics, figures, examples."""
    from .report.inputs import ReportInputs

    _set_up_logging(False)
    output = output or runs[0] / "report.html"
    inputs = ReportInputs(runs, real, train, tokenizer, evaluation, sweep)
    inputs.write(output, title=title, command=shlex.join(["steer-engine", *sys.argv[1:]]))
    out.print(f"report: {output}", markup=False, soft_wrap=True)


def _new_directory(parent: Path, name: str) -> Path:
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


def _print_summary(dataset: SyntheticDataset, output: Path) -> None:
    summary = dataset.summary
    table = Table(show_header=False, title="summary", title_justify="left")
    for name, value in summary.items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        )
        table.add_row(name.replace("_", " "), str(shown))
    out.print(table)
    out.print(f"data set: {output / 'examples.jsonl'}", markup=False, soft_wrap=True)


@app.command()
def info() -> None:
    """Show device, backends and versions."""
    table = Table(show_header=False)
    table.add_row("steer-engine", version("steer-engine"))
    table.add_row("python", platform.python_version())
    for package in ("torch", "triton", "safetensors", "tokenizers", "transformers", "peft"):
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    table.add_row("device", f"{device} {name}".strip())
    table.add_row("threads", str(torch.get_num_threads()))
    table.add_row("free memory", f"{available_bytes(device) / 2**30:.1f} GiB")
    table.add_row("KV cache at most", f"{max_cache_bytes(device) / 2**30:.1f} GiB of it")
    table.add_row("fast bf16", "yes" if has_fast_bf16(device) else "no")
    for backend in ops.BACKENDS:
        reason = ops.unavailable_reason(backend)
        table.add_row(f"backend {backend}", f"no: {reason}" if reason else _backend_detail(backend))
    out.print(table)


def _backend_detail(backend: str) -> str:
    return f"yes ({ops.cpu_isa()})" if backend == "cpu" else "yes"


if __name__ == "__main__":
    main()

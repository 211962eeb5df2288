"""The command line, `steer-engine COMMAND`.

Also `python -m steer_engine`.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import embedded, ops
from .dataset import SyntheticDataset, read_texts
from .embedded.demo_report import write_demo_report
from .engine import Engine
from .errors import SteerError
from .evaluate import Estimate
from .files import write_atomically
from .finetune import FINETUNE_OPTIONS, FinetuneConfig, FinetuneRecord
from .finetune import finetune as train_adapter
from .machine import available_bytes, has_fast_bf16, max_cache_bytes
from .options import (
    OPTIONS,
    SWEEP_OPTIONS,
    Option,
    UsageError,
    build_axes,
    build_method,
    build_negatives,
    build_prompts,
    build_sampling,
    build_until,
    complete,
    flag,
    read_run_file,
    required,
)
from .recipes import RECIPES, find_recipe
from .recipes import prepare as prepare_examples
from .run_directory import check_output
from .sweep import AXES, SweepCell, check_grid, grid, run_sweep
from .sweep_command import check_evaluation
from .sweep_results import Comparison, evaluate_sweep, read_comparison

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
win_rate = typer.Typer(no_args_is_help=True, help="Ask human judges which of two sets is better.")
app.add_typer(win_rate, name="win-rate")
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


def _with_options(options: Sequence[Option]) -> Callable:
    """Give a command one option for each of these, passed on as a dict `given`."""
    return lambda function: _add_options(function, options)


def _add_options(function: Callable, options: Sequence[Option]) -> Callable:
    kinds = {list: list[str]}
    parameters = []
    for option in options:
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
    names = {option.name for option in options}

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
@_with_options(OPTIONS)
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
    values = _complete(given, config, OPTIONS)
    required(values, "base", "num_examples", "output")
    # Everything that can be wrong is found before a model is loaded.
    request = _build_request(values) | {
        "seed": values["seed"],
        "output": values["output"],
        "resume": values["resume"],
        "progress": values["progress"],
    }
    err.print(f"guidance: {request['method'].describe()}", markup=False)
    check_output(values["output"], values["resume"])
    dataset = _run(_load(values), request)
    _print_summary(dataset, Path(values["output"]))


def _complete(
    given: dict[str, Any], config: Path | None, options: Sequence[Option]
) -> dict[str, Any]:
    """The values of a run's options: the command line's, the run file's, the recipe's, defaults."""
    from_file = {} if config is None else read_run_file(config, options)
    values = complete(given, from_file, options=options)
    if values["recipe"] is None:
        return values
    recipe = find_recipe(values["recipe"])
    return complete(given, from_file, recipe.options(values), options=options)


def _build_request(values: dict[str, Any]) -> dict[str, Any]:
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


def _load(values: dict[str, Any]) -> Engine:
    machine = ("device", "dtype", "weight_dtype", "backend")
    machine += ("max_num_seqs", "max_model_len", "kv_cache_gib")
    engine = Engine.from_pretrained(
        values["base"], values["domain"], **{name: values[name] for name in machine}
    )
    err.print(f"memory: {engine.memory_plan.describe()}", markup=False)
    return engine


def _run(engine: Engine, request: dict[str, Any]) -> SyntheticDataset:
    with _saying_how_to_resume(Path(request["output"]), "examples.jsonl"):
        return engine.generate_dataset(**request)


@contextmanager
def _saying_how_to_resume(output: Path, pattern: str) -> Iterator[None]:
    """Turn an interrupt into a line that says how to go on. pattern: of the files of examples."""
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Nothing is there yet while checkpoints are hashed.
        num_safe = sum(len(SyntheticDataset.load(path.parent)) for path in output.glob(pattern))
        err.print(
            f"interrupted: {num_safe} examples are safe in {output}; "
            "run the same command to resume",
            markup=False,
        )
        sys.exit(EXIT_INTERRUPTED)


@app.command()
@_with_options(SWEEP_OPTIONS)
def sweep(
    *,
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="YAML run file; the command line comes before it.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what happens.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write a data set for every cell of a grid, in one batched run, and compare them."""
    _set_up_logging(verbose)
    values = _complete(given, config, SWEEP_OPTIONS)
    required(values, "base", "num_examples", "output")
    output = Path(values["output"])
    requests = _build_requests(values)
    if values["evaluate"]:
        check_evaluation(values)
    err.print(f"sweep: {len(requests)} cells of {values['num_examples']} examples")
    check_output(output, values["resume"])
    check_grid(output, list(requests), values["resume"])
    engine = _load(values)
    with _saying_how_to_resume(output, "cells/*/examples.jsonl"):
        settings = {name: values[name] for name in ("seed", "resume", "progress")}
        run_sweep(engine, requests, output, **settings)
        out.print(f"data sets: {output / 'cells'}", markup=False, soft_wrap=True)
        if values["evaluate"]:
            _compare(engine, output, values)


def _build_requests(values: dict[str, Any]) -> dict[SweepCell, dict[str, Any]]:
    """Each cell's request; an error names the cell."""
    if values["real"] is not None:
        values = values | {"real": read_texts(values["real"])}  # once, not for every cell
    requests = {}
    for cell in grid(**build_axes(values)):
        try:
            requests[cell] = _build_request(values | asdict(cell))
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"{cell.name}: {error}") from None
    return requests


def _compare(engine: Engine, output: Path, values: dict[str, Any]) -> None:
    """Evaluate the cells, print the table, write the figures and the report."""
    from .report.inputs import ReportInputs
    from .report.sweep_figures import sweep_figures, write_figures

    evaluate_sweep(
        output,
        values["held_out"] or values["real"],
        train=values["real"] if values["held_out"] else None,
        tokenizer=engine.tokenizer,
        **{
            name: values[name]
            for name in ("diversity", "likeness", "seed", "sample_size", "embedder", "progress")
        },
    )
    comparison = read_comparison(output)
    write_figures(sweep_figures(comparison), output / "figures")
    _print_cells(comparison)
    out.print(f"figures: {output / 'figures'}", markup=False, soft_wrap=True)
    real, held_out = (values[n] and Path(values[n]) for n in ("real", "held_out"))
    path = ReportInputs([], held_out, real, sweep=output).write(command=_command_line())
    out.print(f"report: {path}", markup=False, soft_wrap=True)


def _print_cells(comparison: Comparison) -> None:
    """The cells with the largest sums, and all of the Pareto front."""
    front = comparison.front
    axes = [a for a in AXES if any(getattr(s.cell, a) is not None for s in comparison.scores)]
    table = Table(title="best cells", caption="below a value its interval; * on the Pareto front")
    table.title_justify = table.caption_justify = "left"
    measures = (comparison.diversity.title, comparison.likeness.title)
    for title in (*(axis.removeprefix("num_") for axis in axes), *measures, "sum", ""):
        table.add_column(title, justify="right")
    ranked = sorted(comparison.scores, key=lambda score: -score.sum)
    for rank, score in enumerate(ranked):
        is_front = any(score is other for other in front)
        if rank < NUM_SHOWN or is_front:
            place = (f"{getattr(score.cell, axis)}" for axis in axes)
            values = (_shown(score.diversity), _shown(score.likeness), f"{score.sum:.3f}")
            table.add_row(*place, *values, "*" if is_front else "")
    out.print(table)


def _shown(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f}\n{estimate.low:.3f} to {estimate.high:.3f}"


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
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write one self-contained HTML page about runs: metrics, figures, examples."""
    from .report.inputs import ReportInputs

    _set_up_logging(False)
    inputs = ReportInputs(runs or [], real, train, tokenizer, evaluation, sweep)
    path = inputs.write(output, title=title, command=_command_line())
    out.print(f"report: {path}", markup=False, soft_wrap=True)


def _command_line() -> str:
    """What was typed, for a report to repeat."""
    return shlex.join(["steer-engine", *sys.argv[1:]])


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


@win_rate.command("export")
def win_rate_export(
    run_a: Annotated[Path, typer.Argument(help="Run directory, or a file of texts.")],
    run_b: Annotated[Path, typer.Argument(help="What it is compared with.")],
    output: Annotated[Path, typer.Option(help="Directory of the pairs and their key.")],
    num_pairs: Annotated[
        int | None, typer.Option(min=1, help="Pairs. [default: as many as there are]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of pairs and sides.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write blinded pairs of texts for human judges."""
    from .evaluate.win_rate import KEY_FILE, PAIRS_FILE, export_pairs

    count = export_pairs(run_a, run_b, output, num_pairs=num_pairs, seed=seed)
    out.print(
        f"{count} pairs in {output / PAIRS_FILE}: give each judge a copy, and keep {KEY_FILE} from "
        f"them; put the copies into {output} and run `steer-engine win-rate score {output}`",
        markup=False,
        soft_wrap=True,
    )


@win_rate.command("score")
def win_rate_score(
    directory: Annotated[Path, typer.Argument(help="Directory of the pairs, their key and votes.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Count the judges' votes, and test whether the first set is the better one."""
    from .evaluate.win_rate import score_votes

    out.print(score_votes(directory).describe(), markup=False, soft_wrap=True)


@app.command(
    help="Turn a data set's original release into examples for finetune.\n\nRecipes: "
    + "; ".join(f"{recipe.name} ({recipe.about})" for recipe in RECIPES.values())
)
def prepare(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe.", show_default=False)],
    raw: Annotated[
        Path,
        typer.Argument(
            help=".jsonl, .csv, .parquet or .txt, also .gz, .bz2, .xz.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option(help="The .jsonl to write.", show_default=False)],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw that balances labels.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    prepared = prepare_examples(find_recipe(recipe), raw, seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, "".join(e.to_json() + "\n" for e in prepared.examples))
    labels = "".join(f", {count} {label}" for label, count in prepared.num_by_label.items())
    out.print(
        f"{output}: {len(prepared.examples)} examples{labels}; {prepared.num_left_out} records "
        f"left out, {prepared.num_repeated} repeated, {prepared.num_unbalanced} dropped to balance "
        "labels",
        markup=False,
        soft_wrap=True,
    )


@app.command()
@_with_options(FINETUNE_OPTIONS)
def finetune(
    *,
    given: dict[str, Any],
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what happens.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Learn the domain model from real examples, as a LoRA adapter of the base."""
    _set_up_logging(verbose)
    values = complete(given, options=FINETUNE_OPTIONS)
    required(values, "base", "train", "output")
    config = FinetuneConfig(**{f.name: values[f.name] for f in fields(FinetuneConfig)})
    names = ("base", "train", "output", "prompt", "resume", "progress")
    try:
        record = train_adapter(**{name: values[name] for name in names}, config=config)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        record = FinetuneRecord.read(Path(values["output"]))
        kept = "no epoch had ended" if record is None else record.describe()
        err.print(f"interrupted: {kept}; run the same command to resume", markup=False)
        sys.exit(EXIT_INTERRUPTED)
    out.print(f"{record.describe()}: {values['output']}", markup=False, soft_wrap=True)


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Run directories or files of texts.")],
    real: Annotated[Path, typer.Option(help="Real texts that the model was not trained on.")],
    train: Annotated[Path | None, typer.Option(help="The model's training texts.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Directory of the base checkpoint. [default: the embedded pair's]"),
    ] = None,
    embedder: Annotated[
        Path | None,
        typer.Option(help="sentence-transformers model. [default: all-MiniLM-L6-v2]"),
    ] = None,
    sample_size: Annotated[
        int | None, typer.Option(help="Texts of each set. [default: as many as the smallest has]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="Result as JSON. [default: evaluation.json in the first run directory]"),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Names of those to compute, with commas. [default: all but downstream]"),
    ] = None,
    downstream: Annotated[
        bool, typer.Option("--downstream", help="Train models on the sets, test on real texts.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show progress.")] = True,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Compare synthetic data sets with real texts and with each other."""
    from . import evaluate as evaluation
    from .evaluate.command import choose_tokenizer, default_output, result_table

    _set_up_logging(False)
    directory, notes = choose_tokenizer(tokenizer, runs)
    result = evaluation.evaluate(
        runs,
        real,
        train=train,
        tokenizer=directory,
        seed=seed,
        sample_size=sample_size,
        embedder=embedder,
        metrics=metrics and [name.strip() for name in metrics.split(",")],
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

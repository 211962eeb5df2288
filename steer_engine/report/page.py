"""Puts a report together: the HTML page, its style and its script in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import DataError
from ..evaluate import Evaluation
from ..files import write_output
from .examples import example_payload
from .figure import SERIES, Figure
from .figures import evaluation_figures, length_figure
from .runs import Run, Source, align, load_runs, misfit
from .settings import python_call, setting_rows
from .summary import summarize
from .sweep_table import SweepTable
from .table import metric_rows

HERE = Path(__file__).parent
PACKAGES = (
    "steer-engine", "torch", "numpy", "scikit-learn", "umap-learn", "xgboost-cpu", "xgboost",
    "sentence-transformers", "matplotlib",
)  # fmt: skip


def write_report(
    path: str | Path,
    evaluation: Evaluation | None = None,
    *,
    runs: Sequence[str | Path] = (),
    real: Sequence[Sequence[str]] = (),
    sweep: Sequence[Figure] = (),
    sweep_table: SweepTable | None = None,
    title: str | None = None,
    lead: str = "",
    notes: Sequence[str] = (),
    command: str = "",
) -> None:
    """Write one self-contained HTML page; the same arguments give the same bytes.

    Args:
        path: the file to write.
        evaluation: metrics of the runs, and of other sets beside them; None: a report without
            metrics.
        runs: run directories, the one that the report is about first.
        real: lists of real texts in which the runs' negatives are looked up; a list serves a run
            if it is exactly what the run was given.
        sweep: figures of a sweep. sweep_table: its best cells.
        title: None: made from the first run's prompt.
        lead: sentences before those of the summary.
        notes: sentences that a reader has to know, before those of the evaluation.
        command: what to type to make this report again.
    Raises:
        ValueError: there is neither a run nor an evaluation, or the evaluation is not of these
            runs as they are now.
        RunError: a run directory cannot be read, or the page cannot be written.
        DataError: matplotlib or Jinja2 is missing.
    """
    if not runs and evaluation is None:
        raise ValueError("a report needs a run directory or an evaluation")
    loaded = load_runs(runs)
    reason = evaluation and misfit(evaluation, loaded, [])
    if reason:
        raise ValueError(f"the evaluation does not fit: {reason}; evaluate again")
    sources = align(loaded, evaluation)
    if evaluation:
        evaluation = replace(evaluation, sets=[source.evaluated for source in sources])
        real = [*real, evaluation.real.texts]
    context = _context(sources, evaluation, real, title, lead, notes)
    context |= {"sweep": sweep, "sweep_table": sweep_table, "command": command}
    page = _template().render(**context | {"cells": _cells([*context["figures"], *sweep])})
    write_output(Path(path), page)


def _context(
    sources: Sequence[Source],
    evaluation: Evaluation | None,
    real: Sequence[Sequence[str]],
    title: str | None,
    lead: str,
    notes: Sequence[str],
) -> dict:
    """What the template shows, but for a sweep."""
    runs = [source.run for source in sources if source.run]
    rows = metric_rows(evaluation) if evaluation else {}
    figures = _figures(sources, evaluation, real)
    differing, shared = setting_rows(runs)
    return {
        "title": title or _title(sources),
        "summary": f"{lead} {summarize(runs, evaluation, rows)}".strip(),
        "sources": sources,
        "runs": runs,
        "colours": [
            f"var(--series-{n % len(SERIES) + 1})" if source.is_synthetic else "var(--muted)"
            for n, source in enumerate(sources)
        ],
        "evaluation": evaluation,
        "real_name": Path(evaluation.real.source).name if evaluation else "",
        "rows": rows,
        "figures": figures,
        "intervals": [f for f in figures if f.name.startswith("intervals-")],
        "shapes": [f for f in figures if not f.name.startswith("intervals-")],
        "differing": differing,
        "shared": shared,
        "payload": example_payload(sources, real),
        "notes": [*notes, *(evaluation.notes if evaluation else ())],
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "calls": {run.name: python_call(run) for run in runs},
        "checkpoints": _grouped(runs, "checkpoints"),
        "run_versions": _grouped(runs, "versions"),
    }


def _cells(figures: Sequence[Figure]) -> dict[str, list[dict]]:
    """{figure's name: what its cells open}."""
    return {
        figure.name: [{"label": c.label, "examples": c.examples} for c in figure.cells]
        for figure in figures
        if figure.cells
    }


def _grouped(runs: Sequence[Run], name: str) -> list[tuple[str, dict]]:
    """Each value that the setting has among the runs, after the names of the runs that have it."""
    groups: list[tuple[list[str], dict]] = []
    for run in runs:
        value = run.settings.get(name, {})
        names = next((names for names, other in groups if other == value), None)
        if names is None:
            groups.append(([run.name], value))
        else:
            names.append(run.name)
    return [(", ".join(names), value) for names, value in groups]


def _figures(
    sources: Sequence[Source], evaluation: Evaluation | None, real: Sequence[Sequence[str]]
) -> list[Figure]:
    if evaluation:
        return evaluation_figures(evaluation)
    texts = {source.name: [e.text for e in source.run.examples] for source in sources}
    texts = {name: each for name, each in texts.items() if each}
    return [length_figure(texts, sources[0].run.find_real(real) or [])] if texts else []


def _title(sources: Sequence[Source]) -> str:
    run = sources[0].run
    if run is None or len(run.prompts) != 1:
        return f"Synthetic texts: {sources[0].name}"
    prompt = next(iter(run.prompts.values())).strip().rstrip(":")
    return f"Synthetic texts for “{prompt}”"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _template():
    try:
        import jinja2
        import matplotlib  # noqa: F401  figures need it; better said before anything is drawn
    except ImportError as error:
        raise DataError(
            f"{error.name} is not installed; run `pip install 'steer-engine[eval]'`"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Text in scripts other than Latin would take twice the bytes as \uXXXX.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment.get_template("template.html.j2")

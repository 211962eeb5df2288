"""What `steer-engine evaluate` adds to evaluate(): which tokenizer, and the printed table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from .. import embedded
from ..errors import RunError
from .result import TRAINING_SET, Better, Estimate, Evaluation, Metric

TOKENIZER_FILE = "tokenizer.json"
ARROWS = {Better.HIGHER: "↑", Better.LOWER: "↓", Better.AS_REAL: "≈"}
LONGEST_WORD = 2 + len("adversarial")  # of a metric's title; a narrower column would cut it
LEGEND = (
    "↑ higher is better, ↓ lower is better, ≈ the nearer to the real texts the better; "
    "* best of the sets; "
    "below a value its interval"
)


def choose_tokenizer(given: Path | None, sources: Sequence[Path]) -> tuple[Path, list[str]]:
    """The tokenizer's directory, and notes where it may not be the one that a run used.

    A run records no paths, but the SHA-256 of its tokenizer: without --tokenizer the embedded
    pair's is taken, and the runs tell whether it is theirs.
    Raises: RunError if a run.json is damaged.
    """
    directory = given or embedded.BASE
    recorded = {source: _recorded_digest(source) for source in sources}
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        return directory, []  # loading it says what is wrong
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    others = [source.name for source, own in recorded.items() if own not in (None, digest)]
    if others:
        return directory, [
            f"n-grams are counted with the tokenizer of {directory}, but {', '.join(others)} was "
            "written with another one; give its base checkpoint as --tokenizer."
        ]
    if given is None and digest not in recorded.values():
        return directory, [
            "n-grams are counted with the embedded pair's tokenizer, since no run says which one "
            "it used; --tokenizer DIR names another."
        ]
    return directory, []


def _recorded_digest(source: Path) -> str | None:
    """SHA-256 of the tokenizer that a run used; None if the source is no run."""
    path = source / "run.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["checkpoints"]["base"][TOKENIZER_FILE]
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path}: damaged; restore it or evaluate examples.jsonl instead") from None


def default_output(source: Path) -> Path:
    """evaluation.json in a run directory, or beside a file."""
    return (source if source.is_dir() else source.parent) / "evaluation.json"


def result_table(evaluation: Evaluation) -> Table:
    """All metrics by group: a column for the real texts and one for each set."""
    table = Table(title=f"{evaluation.sample_size} texts of each set", caption=LEGEND)
    table.title_justify = table.caption_justify = "left"
    table.add_column("metric", min_width=LONGEST_WORD)
    for evaluated in (evaluation.real, *evaluation.sets):
        table.add_column(Text(evaluated.name), justify="right")
    group = None
    for metric in evaluation.metrics:
        if metric.group is not group:
            table.add_section()
            table.add_row(Text(metric.group.value, style="bold"))
            group = metric.group
        table.add_row(f"  {metric.title} {ARROWS[metric.better]}", *_cells(evaluation, metric))
    return table


def _cells(evaluation: Evaluation, metric: Metric) -> list[Text]:
    best = evaluation.best(metric)
    rivals = [s for s in evaluation.sets if s.name != TRAINING_SET and metric.name in s.estimates]
    if len(best) == len(rivals):
        best = []  # all are the same, or there is one
    cells = [_cell(evaluation.real.estimates.get(metric.name), is_best=False)]
    for evaluated in evaluation.sets:
        is_best = evaluated.name in best
        cells.append(_cell(evaluated.estimates.get(metric.name), is_best=is_best))
    return cells


def _cell(estimate: Estimate | None, *, is_best: bool) -> Text:
    if estimate is None:
        return Text("-", style="dim")
    text = Text(f"{_number(estimate.value)}{'*' if is_best else ' '}", style="bold" * is_best)
    if estimate.low is not None and estimate.high is not None:
        text.append(f"\n{_number(estimate.low)} to {_number(estimate.high)} ", style="not bold dim")
    return text


def _number(value: float) -> str:
    """Three decimals for shares, one for scores over ten, none for counts."""
    if abs(value) >= 2 and value.is_integer():
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"

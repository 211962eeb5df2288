"""What the report command gathers: the texts, and an evaluation that fits, found or made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..dataset import read_texts
from ..errors import DataError
from ..evaluate import TRAINING_SET, Evaluation
from ..sweep_results import read_comparison
from .page import write_report
from .runs import load_runs, misfit
from .sweep_figures import sweep_figures
from .sweep_page import REPORT_NAME, write_sweep_report
from .sweep_table import sweep_table

EVALUATION_NAME = "evaluation.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportInputs:
    """Paths that the command line was given; None where it was not.

    runs: run directories, the main one first; none for a report about the sweep.
    real, train: files as read_texts takes them.
    tokenizer: directory with tokenizer.json, for an evaluation that has to be made.
    evaluation: an evaluation that has to fit; None: the main run's evaluation.json is used if it
        fits.
    sweep: directory of a sweep.
    """

    runs: Sequence[Path]
    real: Path | None = None
    train: Path | None = None
    tokenizer: Path | None = None
    evaluation: Path | None = None
    sweep: Path | None = None

    def write(
        self, output: Path | None = None, *, title: str | None = None, command: str = ""
    ) -> Path:
        """Write the report, and evaluation.json in the main run if there was none that fits.

        output: None: report.html in the main run, or in the sweep.
        Returns: the report's path.
        Raises: as write_report, write_sweep_report and evaluate; DataError if the given evaluation
            does not fit; ValueError if there is neither a run nor a sweep.
        """
        reals = [read_texts(path) for path in (self.real, self.train) if path is not None]
        if not self.runs and (self.evaluation or self.tokenizer):
            raise ValueError("an evaluation and a tokenizer are of runs; name their directories")
        if not self.runs and self.sweep is not None:
            return write_sweep_report(self.sweep, output, real=reals, title=title, command=command)
        if not self.runs:
            raise ValueError("give run directories, or a sweep's directory with --sweep")
        output = output or self.runs[0] / REPORT_NAME
        evaluation = self._find_evaluation()
        if evaluation is None and self.real is not None:
            evaluation = self._evaluate()
            evaluation.write(self._default_path)
        comparison = None if self.sweep is None else read_comparison(self.sweep)
        write_report(
            output, evaluation, runs=self.runs, real=reals, title=title, command=command,
            sweep=[] if comparison is None else sweep_figures(comparison),
            sweep_table=None if comparison is None else sweep_table(comparison),
        )  # fmt: skip
        return output

    @property
    def _default_path(self) -> Path:
        return self.runs[0] / EVALUATION_NAME

    def _find_evaluation(self) -> Evaluation | None:
        path = self.evaluation or self._default_path
        if self.evaluation is None and not path.exists():
            return None
        evaluation = Evaluation.read(path)
        reason = misfit(evaluation, load_runs(self.runs), read_texts(self.real))
        if self.train is not None and all(s.name != TRAINING_SET for s in evaluation.sets):
            reason = reason or "it was made without training texts"
        if reason and self.evaluation is not None:
            raise DataError(f"{path}: {reason}; run `steer-engine evaluate` again")
        if reason:
            logger.warning("%s is not used: %s", path, reason)
        return None if reason else evaluation

    def _evaluate(self) -> Evaluation:
        from ..evaluate import evaluate
        from ..evaluate.command import choose_tokenizer

        directory, notes = choose_tokenizer(self.tokenizer, self.runs)
        sets = {run.name: str(run.path) for run in load_runs(self.runs)}
        made = evaluate(sets, self.real, train=self.train, tokenizer=directory, progress=True)
        return replace(made, notes=[*notes, *made.notes])

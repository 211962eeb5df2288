"""What a report reads: run directories, and an evaluation that fits them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ..dataset import Example, SyntheticDataset
from ..errors import RunError
from ..evaluate import TRAINING_SET, Evaluation, SetEvaluation
from ..run_record import describe_real


@dataclass(frozen=True)
class Run:
    """A run directory as it is now, finished or not.

    name: the directory's name, with its parent's where two runs share one.
    settings: run.json. summary: summary.json; {} where there is none yet.
    """

    name: str
    path: Path
    settings: dict
    examples: list[Example]
    summary: dict

    @property
    def prompts(self) -> dict[str, str]:
        return self.settings["prompts"]

    def find_real(self, candidates: Sequence[Sequence[str]]) -> Sequence[str] | None:
        """Those of the candidates that were the run's real examples; None if none of them were."""
        digest = self.settings.get("real", {}).get("sha256")
        return next(
            (texts for texts in candidates if describe_real(texts)["sha256"] == digest), None
        )


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Run directories in the order given.

    Raises: RunError if one is not a run directory or is damaged.
    """
    paths = [Path(path) for path in paths]
    names = [path.resolve().name for path in paths]
    return [
        _load_run(path, name if names.count(name) == 1 else f"{path.resolve().parent.name}/{name}")
        for path, name in zip(paths, names, strict=True)
    ]


def _load_run(path: Path, name: str) -> Run:
    dataset = SyntheticDataset.load(path)
    settings_path = path / "run.json"
    try:
        settings = json.loads(settings_path.read_text(encoding="utf-8"))
        if not isinstance(settings.get("prompts"), dict):
            raise ValueError
    except FileNotFoundError:
        raise RunError(f"{path}: no run.json; give a run directory") from None
    except (ValueError, AttributeError):
        raise RunError(f"{settings_path}: damaged; restore it") from None
    return Run(name, path, settings, list(dataset), dataset.summary)


class Source(NamedTuple):
    """One set of texts in a report: a run, an evaluated set, or both."""

    name: str
    run: Run | None
    evaluated: SetEvaluation | None

    @property
    def is_synthetic(self) -> bool:
        return self.name != TRAINING_SET


def align(runs: Sequence[Run], evaluation: Evaluation | None) -> list[Source]:
    """Runs in their order, under the names that the evaluation gives them, then what else it holds.

    A set's place in this list is its number, and so its colour, everywhere in the report.
    """
    rest = list(evaluation.sets) if evaluation else []
    sources = []
    for run in runs:
        evaluated = _set_of(run, rest)
        name = evaluated.name if evaluated else run.name
        sources.append(Source(name, replace(run, name=name), evaluated))
        rest = [one_set for one_set in rest if one_set is not evaluated]
    return sources + [Source(one_set.name, None, one_set) for one_set in rest]


def _set_of(run: Run, sets: Sequence[SetEvaluation]) -> SetEvaluation | None:
    path = run.path.resolve()
    # A set without a source came from a list of texts.
    return next((s for s in sets if s.source and Path(s.source).resolve() == path), None)


def misfit(evaluation: Evaluation, runs: Sequence[Run], real: Sequence[str]) -> str | None:
    """Why an evaluation does not describe these runs and real texts; None if it does.

    real: empty if any will do.
    """
    for run in runs:
        evaluated = _set_of(run, evaluation.sets)
        if evaluated is None:
            return f"it does not hold {run.path}"
        texts = {example.index: example.text for example in run.examples}
        if [texts.get(i) for i in evaluated.indices] != evaluated.texts:
            return f"{run.path} has changed since"
        if evaluated.num_texts != len(texts):
            return f"{run.path} had {evaluated.num_texts} examples then and has {len(texts)} now"
    if real and (evaluation.real.num_texts != len(real) or set(evaluation.real.texts) - set(real)):
        return "it compares with other real texts"
    return None

"""The demo's report: its data set beside plain sampling from the domain and from the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..dataset import read_texts
from ..engine import Engine
from ..errors import SteerError
from . import BASE, COMPARED, REAL

TITLE = "Research questions about astronomy from a 9 M parameter model"
# Same prompt, sampling and number of examples as the demo; only the guidance differs.
BASELINES = {
    "nucleus": COMPARED["domain model alone"],
    "base-model": COMPARED["base model alone"],
}
NOTES = (
    "nucleus is the domain model alone and base-model the base model alone, both with the demo's "
    "prompt, sampling and size.",
    "The domain model was fine-tuned on the real texts of this report, though metrics call them "
    "held-out: nearness to them is no proof of quality, and copying is what to look for. A study "
    "needs texts that the model has not seen.",
    "The model is tiny: the report shows the tool, not good science.",
)


def write_demo_report(engine: Engine, request: dict[str, Any]) -> Path:
    """Write the baselines' runs below the demo's run directory, evaluation.json and report.html.

    What the evaluation needs and does not find (a package, enough examples) is said in the report,
    which then has no metrics.

    request: the arguments of generate_dataset that wrote the demo's run; its baselines take the
        others from it.
    Returns: the path of the report. Raises: RunError if it cannot be written.
    """
    from ..report import write_report

    output = Path(request["output"])
    runs = [output]
    for name, guidance in BASELINES.items():
        runs.append(output / "baselines" / name)
        engine.generate_dataset(**request | {"guidance": guidance, "output": str(runs[-1])})
    evaluation, notes = None, list(NOTES)
    try:
        evaluation = _evaluate(runs)
        evaluation.write(output / "evaluation.json")
    except SteerError as error:
        notes.append(f"No metrics: {error}.")
    path = output / "report.html"
    write_report(
        path, evaluation, runs=runs, real=[read_texts(REAL)], title=TITLE, notes=notes,
        command=f"steer-engine demo --num-examples {request['num_examples']} "
        f"--seed {request['seed']}",
    )  # fmt: skip
    return path


def _evaluate(runs: list[Path]):
    """The demo's run first, under the name STEER."""
    from ..evaluate import evaluate

    sets = {"STEER": str(runs[0])} | {path.name: str(path) for path in runs[1:]}
    return evaluate(sets, str(REAL), tokenizer=BASE, progress=True)

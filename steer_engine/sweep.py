"""A sweep: one data set for each cell of a grid of settings, all through one batch.

    DIR/sweep.json      the cells and their parameters
    DIR/cells/NAME/     each cell's run directory, the same as from a run of its own

The same call goes on where an earlier one stopped, and a larger grid adds its cells to those that
are there. What comes out is compared in sweep_results.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from .dataset import SyntheticDataset
from .engine import Engine
from .errors import RunError
from .files import write_atomically
from .run_directory import check_kind, lock_directory

AXES = ("gamma", "eta", "num_negatives")


@dataclass(frozen=True)
class SweepCell:
    """The parameters of one cell; None where one is not swept."""

    gamma: float | None = None
    eta: float | None = None
    num_negatives: int | str | None = None

    @property
    def name(self) -> str:
        """Its directory: gamma-0.2_eta-0.1_negatives-5."""
        return "_".join(f"{key.removeprefix('num_')}-{v}" for key, v in self._shown()) or "all"

    @property
    def label(self) -> str:
        """For people: gamma 0.2, eta 0.1, negatives 5."""
        return ", ".join(f"{key.removeprefix('num_')} {v}" for key, v in self._shown()) or "all"

    def _shown(self) -> Iterator[tuple[str, str]]:
        for key in AXES:
            value = getattr(self, key)
            if isinstance(value, float):
                # The shortest text that reads back as the same number.
                value = repr(value).removesuffix(".0")
            if value is not None:
                yield key, str(value)


def grid(
    *,
    gamma: Sequence[float] = (),
    eta: Sequence[float] = (),
    num_negatives: Sequence[int | str] = (),
) -> list[SweepCell]:
    """Every combination of the given values, the last axis fastest. An empty axis is not swept."""
    # Plus zero, since minus zero would be another name for the same cell.
    axes = [[v + 0.0 for v in gamma], [v + 0.0 for v in eta], list(num_negatives)]
    for name, values in zip(AXES, axes, strict=True):
        repeated = [v for v in values if values.count(v) > 1]
        if repeated:
            raise ValueError(f"{name} holds {repeated[0]} twice")
    return [SweepCell(*values) for values in product(*(values or [None] for values in axes))]


def run_sweep(
    engine: Engine,
    requests: Mapping[SweepCell, Mapping[str, Any]],
    output: str | Path,
    *,
    seed: int = 0,
    resume: bool = True,
    progress: bool = False,
) -> dict[SweepCell, SyntheticDataset]:
    """Write the data set of every cell, through one batch.

        run_sweep(
            engine,
            {
                cell: {
                    "prompt": "Ask a question:",
                    "num_examples": 200,
                    "real": "real.jsonl",
                    "guidance": Guidance.steer(cell.gamma, cell.eta, form="released"),
                }
                for cell in grid(gamma=[0, 0.2, 0.4], eta=[0, 0.2])
            },
            "runs/sweep",
        )

    Args:
        requests: each cell's arguments of Engine.generate_dataset, from prompt to until.
        output: the sweep's directory.
        seed: of all cells.
        resume: go on with a sweep that the directory holds.
        progress: show a progress bar on standard error.
    Raises: RunError if the directory holds cells that the grid lacks, or a cell with other
        settings, or is in use; else as Engine.generate_datasets.
    """
    output = Path(output)
    cells = list(requests)
    with locked(output):
        check_grid(output, cells, resume)
        _write_cells(output, cells)
        datasets = engine.generate_datasets(
            {cell.name: request for cell, request in requests.items()},
            seed=seed,
            output=output / "cells",
            progress=progress,
        )
    return {cell: datasets[cell.name] for cell in cells}


def check_grid(output: str | Path, cells: Sequence[SweepCell], resume: bool) -> None:
    """Raise RunError if a directory holds something else, or a sweep that these cells may not go on
    with.

    Where a sweep may be resumed, it may also grow: all its cells must be among these.
    """
    output = Path(output)
    check_kind(output, "sweep.json")
    if (output / "examples.jsonl").exists():
        raise RunError(f"{output}: has examples.jsonl but no run.json; choose another output")
    names = {cell.name for cell in cells}
    for path in sorted(output.glob("cells/*/run.json")):
        if not resume:
            raise RunError(f"{output}: holds a sweep already; resume it or choose another output")
        if path.parent.name not in names:
            raise RunError(
                f"{output}: holds the cell {path.parent.name}, which is not in this grid; "
                "a grid may only grow: name all of its values, or choose another output"
            )


def read_cells(output: str | Path) -> list[SweepCell]:
    """The cells of a sweep, in the order of the grid. Raises RunError if there is no sweep."""
    path = Path(output) / "sweep.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return [SweepCell(**cell) for cell in stored["cells"].values()]
    except FileNotFoundError:
        raise RunError(f"{output}: no sweep.json; give a sweep's directory") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RunError(f"{path}: damaged; run the same sweep again") from None


def _write_cells(output: Path, cells: Sequence[SweepCell]) -> None:
    content = {"cells": {cell.name: asdict(cell) for cell in cells}}
    try:
        write_atomically(output / "sweep.json", json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"{output}: cannot be written ({error.strerror})") from None


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the sweep's directory for this process. Raises RunError if another has it."""
    lock = lock_directory(output)
    try:
        yield
    finally:
        os.close(lock)

"""Interrupts of long commands: what is written stays, and one line says how to go on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..dataset import SyntheticDataset
from .console import EXIT_INTERRUPTED, err


@contextmanager
def resumable(describe_kept: Callable[[], str]) -> Iterator[None]:
    """Turn an interrupt into a line that says what is kept and how to resume, and exit."""
    try:
        yield
    except KeyboardInterrupt:
        # A second Ctrl-C must not cut the line short.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        err.print(f"interrupted: {describe_kept()}; run the same command to resume", markup=False)
        sys.exit(EXIT_INTERRUPTED)


def describe_examples(output: Path, pattern: str = "examples.jsonl") -> str:
    """How many examples a directory holds. pattern: of their files below it."""
    # Nothing is there yet while checkpoints are hashed.
    num_safe = sum(len(SyntheticDataset.load(path.parent)) for path in output.glob(pattern))
    return f"{num_safe} examples are safe in {output}"

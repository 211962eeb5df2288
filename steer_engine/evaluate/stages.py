"""The progress of an evaluation, on standard error: one line for each stage."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Stages:
    """Named stages, one after the other; a context manager.

    A terminal shows a bar for each, a file or pipe a line as it ends, with its seconds.
    """

    def __init__(self, *, enabled: bool):
        console = Console(stderr=True, highlight=False)
        self._console = console if enabled and not console.is_terminal else None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not enabled or not console.is_terminal,
        )
        self._task = None

    def start(self, name: str, total: int) -> None:
        """End the stage before, if any, and begin one of so many steps."""
        self._end()
        self._name, self._total, self._done = name, total, 0
        self._started_at = time.monotonic()
        self._task = self._bar.add_task(name, total=total)

    def advance_to(self, num_done: int) -> None:
        self._done = num_done
        self._bar.update(self._task, completed=num_done)

    def advance(self) -> None:
        self.advance_to(self._done + 1)

    def _end(self) -> None:
        if self._task is None:
            return
        self.advance_to(self._total)
        self._bar.stop_task(self._task)
        seconds = time.monotonic() - self._started_at
        if self._console:
            self._console.print(f"{self._name}: {seconds:.1f} s")
        self._task = None

    def __enter__(self) -> Stages:
        self._bar.start()
        return self

    def __exit__(self, kind, *exception) -> None:
        if kind is None:
            self._end()
        self._bar.stop()

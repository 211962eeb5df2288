"""The progress bar of a run, on standard error."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Where standard error is a file or a pipe, a line now and then replaces the bar.
PLAIN_INTERVAL_S = 10.0


class ProgressBar:
    """Examples done, speed, share of attempts accepted, and time left; a context manager."""

    def __init__(self, num_examples: int, num_done: int, *, enabled: bool):
        self._total, self._first = num_examples, num_done
        self._console = Console(stderr=True)
        self._enabled = enabled
        self._is_plain = not self._console.is_terminal
        self._started_at = self._printed_at = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not enabled or self._is_plain,
        )
        self._task = self._bar.add_task(
            "examples", total=num_examples, completed=num_done, speed=""
        )

    def update(self, num_done: int, num_tokens: int, acceptance_rate: float) -> None:
        """Show where the run stands.

        num_done: examples in all, resumed ones included.
        num_tokens: tokens of the examples that this call wrote.
        acceptance_rate: share of this call's attempts that were kept, in [0, 1].
        """
        if not self._enabled:
            return
        now = time.monotonic()
        elapsed_s = max(now - self._started_at, 1e-9)
        examples_per_s = (num_done - self._first) / elapsed_s
        speed = (
            f"{examples_per_s:.1f} examples/s  {num_tokens / elapsed_s:.0f} tokens/s  "
            f"{acceptance_rate:.0%} accepted"
        )
        self._bar.update(self._task, completed=num_done, speed=speed)
        if self._is_plain and (
            now - self._printed_at >= PLAIN_INTERVAL_S or num_done == self._total
        ):
            self._printed_at = now
            self._console.print(f"examples {num_done}/{self._total}  {speed}", highlight=False)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

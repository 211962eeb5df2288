"""What a fine-tune shows on standard error: a bar of steps, and a line of losses per epoch."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .record import FinetuneRecord


class TrainingProgress:
    """A context manager; shows nothing unless enabled, and only the lines in a file or a pipe."""

    def __init__(self, *, enabled: bool):
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not enabled)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not enabled or not self._console.is_terminal,
        )
        self._num_before = 0

    def show_start(self, record: FinetuneRecord, steps_per_epoch: int, epochs: int) -> None:
        """The data, the loss before training, and the epochs that an earlier call did."""
        self._steps_per_epoch, self._epochs = steps_per_epoch, epochs
        cut = f", {record.num_cut} of them cut to fit the context" if record.num_cut else ""
        self._print(
            f"{record.num_train} examples to learn from, {record.num_held_out} held out{cut}; "
            f"{record.num_parameters / 1e6:.2f} M parameters"
        )
        self._print(f"before training: held-out loss {record.held_out_losses[0]:.4f}")
        num_done = len(record.train_losses)
        if num_done:
            self._print(
                f"resumed after epoch {num_done}; best: epoch {record.best_epoch}, held-out loss "
                f"{record.best_loss:.4f}"
            )
        self._num_before = num_done * steps_per_epoch
        self._task = self._bar.add_task(
            "training", total=epochs * steps_per_epoch, completed=self._num_before
        )

    def show_step(self, num_steps: int) -> None:
        """num_steps: done in this epoch."""
        self._bar.update(self._task, completed=self._num_before + num_steps)

    def show_epoch(self, record: FinetuneRecord) -> None:
        """The losses of the epoch that has just ended."""
        epoch = len(record.train_losses)
        self._num_before = epoch * self._steps_per_epoch
        best = "  best so far" if record.best_epoch == epoch else ""
        self._print(
            f"epoch {epoch}/{self._epochs}: training loss {record.train_losses[-1]:.4f}  "
            f"held-out loss {record.held_out_losses[-1]:.4f}{best}"
        )

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False)

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

"""finetune.json: what a fine-tune was asked for and how its losses went."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import RunError
from ..files import write_atomically

RECORD_NAME = "finetune.json"


@dataclass
class FinetuneRecord:
    """What finetune.json holds.

    settings: what the adapter depends on: config, digests of base and data, prompt, versions.
    base, train: where they lay.
    num_train, num_held_out: examples; num_cut: those of both that were longer than max_model_len.
    num_parameters: numbers in the adapter.
    held_out_losses: nats per token, before training and after each epoch.
    train_losses: mean of each epoch, with dropout.
    is_finished: False after a crash or an interrupt; the same call continues.
    """

    settings: dict
    base: str
    train: str
    num_train: int
    num_held_out: int
    num_cut: int
    num_parameters: int | None = None
    held_out_losses: list[float] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    is_finished: bool = False

    @property
    def best_loss(self) -> float | None:
        """The held-out loss of the adapter in the directory; None before the first epoch's end."""
        return None if self.best_epoch is None else self.held_out_losses[self.best_epoch]

    def describe(self) -> str:
        """One line for people: which epoch is kept, and what it learnt."""
        if self.best_epoch is None:
            return "no epoch had ended"
        before, after = self.held_out_losses[0], self.best_loss
        line = (
            f"the adapter of epoch {self.best_epoch} of {len(self.train_losses)} is kept, held-out "
            f"loss {after:.4f} (perplexity {math.exp(after):.1f}), {before:.4f} before training"
        )
        return line if after < before else f"{line}; nothing was learnt"

    def add_epoch(self, train_loss: float, held_out_loss: float) -> bool:
        """Take an epoch's losses; True if it is the best so far."""
        self.train_losses.append(train_loss)
        self.held_out_losses.append(held_out_loss)
        is_best = self.best_epoch is None or held_out_loss < self.best_loss
        if is_best:
            self.best_epoch = len(self.train_losses)
        return is_best

    def write(self, directory: Path) -> None:
        """As finetune.json, atomically."""
        write_atomically(
            directory / RECORD_NAME, json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n"
        )

    @classmethod
    def read(cls, directory: Path) -> FinetuneRecord | None:
        """The record of a directory, None if it has none. Raises RunError if it is damaged."""
        path = directory / RECORD_NAME
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise RunError(f"{path}: damaged; restore it or choose another output") from None

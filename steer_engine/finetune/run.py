"""The domain model as a PEFT LoRA adapter of a base, learnt from real examples (extra `train`).

A share of the texts is held out. Their loss is measured before training and after every epoch, and
the adapter of the best epoch is what stays in the output directory, beside the two halves of the
data (train.jsonl, held_out.jsonl) and finetune.json. Each epoch's state is kept until the end, so
that the same call continues after a crash or an interrupt.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..checkpoint import hash_files
from ..errors import CheckpointError, RunError, SteerError
from ..files import write_atomically
from ..pair import ModelPair
from ..run_directory import check_kind, check_same_settings, lock_directory
from .config import FinetuneConfig
from .data import TrainingExample, encode_example, read_examples, split_examples
from .progress import TrainingProgress
from .record import RECORD_NAME, FinetuneRecord
from .trainer import ADAPTER_FILES, LoraTrainer

STATE_NAME = "state.pt"


def finetune(
    base: str | Path,
    train: str | Path,
    output: str | Path,
    *,
    prompt: str | None = None,
    config: FinetuneConfig | None = None,
    resume: bool = True,
    progress: bool = False,
) -> FinetuneRecord:
    """Train a LoRA adapter of a base on real examples.

    The loss is the mean cross-entropy of text and end-of-text behind their prompt. The adapter
    loads in Engine.from_pretrained(base, output) and in PEFT; it holds no tokenizer, since the
    base's is the only one that fits. On one kind of CPU with one number of threads, equal arguments
    give equal bytes, interrupted or not.

    Args:
        base: checkpoint directory. train: see read_examples. output: a directory.
        prompt: the prompt of texts that name none.
        resume: whether a fine-tune that the directory holds may be continued; a finished one is
            returned as it is.
        progress: show a bar, and each epoch's losses, on standard error.
    Raises: CheckpointError, DataError, CapacityError; RunError if the output is in use, holds
        something else, or training diverges; SteerError if transformers or PEFT is missing;
        ValueError for a setting that does not fit the machine.
    """
    versions = _versions()
    pair = ModelPair.open(base, None)
    if not pair.eos_token_ids:
        raise CheckpointError(f"{base}: config.json names no eos_token_id, the end of a text")
    config = (config or FinetuneConfig()).resolve(pair.base.config)
    split = split_examples(read_examples(train, prompt), config.held_out_share, config.seed)
    rows = [
        [
            encode_example(e, pair.tokenizer, pair.eos_token_ids[0], config.max_model_len)
            for e in half
        ]
        for half in split
    ]
    settings = {
        **asdict(config),
        "prompt": prompt,
        "data_sha256": hash_files([Path(train)])[Path(train).name],
        "base_sha256": pair.base.sha256(),
        "versions": versions,
    }
    num_cut = sum(row.ids[-1] != pair.eos_token_ids[0] for half in rows for row in half)
    record = FinetuneRecord(
        settings, str(base), str(train), len(split.train), len(split.held_out), num_cut
    )
    directory = Path(output)
    with _locked(directory):
        stored = _check_output(directory, settings, resume)
        if stored is not None and stored.is_finished:
            return stored
        trainer = LoraTrainer(Path(base), pair.base.config, config, *rows)
        record.num_parameters = trainer.num_parameters
        _resume_or_start(directory, record, trainer, split)
        _train(directory, record, trainer, TrainingProgress(enabled=progress))
    return record


def _versions() -> dict[str, str]:
    """Versions that training depends on. Raises SteerError if a package is missing."""
    for package in ("transformers", "peft"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise SteerError(
                f"fine-tuning needs {package}; run `pip install transformers peft`"
            ) from None
    packages = ("steer-engine", "torch", "transformers", "peft")
    return {"python": platform.python_version()} | {p: version(p) for p in packages}


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = lock_directory(directory)
    try:
        yield
    finally:
        os.close(descriptor)


def _check_output(directory: Path, settings: dict, resume: bool) -> FinetuneRecord | None:
    """The record of an earlier call. Raises RunError if it may not be continued."""
    check_kind(directory, RECORD_NAME)
    stored = FinetuneRecord.read(directory)
    if stored is not None:
        if not resume:
            raise RunError(f"{directory}: holds a fine-tune already; resume it or choose another")
        check_same_settings(directory, stored.settings, settings)
    elif any((directory / name).exists() for name in ADAPTER_FILES):
        raise RunError(f"{directory}: has an adapter but no {RECORD_NAME}; choose another output")
    return stored


def _resume_or_start(
    directory: Path,
    record: FinetuneRecord,
    trainer: LoraTrainer,
    split: Sequence[Sequence[TrainingExample]],
) -> None:
    """Load the last epoch's state if there is one; else write the split and the record."""
    path = directory / STATE_NAME
    if not path.exists():
        for name, examples in zip(("train", "held_out"), split, strict=True):
            lines = "".join(example.to_json() + "\n" for example in examples)
            write_atomically(directory / f"{name}.jsonl", lines)
        record.held_out_losses = [trainer.held_out_loss()]
        record.write(directory)
        return
    try:
        # Tensors, numbers and lists only: no pickled object is run.
        state = torch.load(path, map_location=record.settings["device"], weights_only=True)
        trainer.load_state(state["trainer"])
        losses, train_losses = state["held_out_losses"], state["train_losses"]
    except Exception as error:  # whatever a damaged file makes the reader stumble on
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"{path}: damaged ({reason}); delete it to start again") from None
    record.held_out_losses = losses[:1]
    for epoch_losses in zip(train_losses, losses[1:], strict=True):
        record.add_epoch(*epoch_losses)


def _train(
    directory: Path, record: FinetuneRecord, trainer: LoraTrainer, progress: TrainingProgress
) -> None:
    """Train the epochs that are left, keeping the best adapter and the last state."""
    config = trainer.config
    with progress:
        progress.show_start(record, trainer.steps_per_epoch, config.epochs)
        while not _is_done(record, config):
            epoch = len(record.train_losses)
            train_loss = trainer.train_epoch(epoch, progress.show_step)
            is_best = record.add_epoch(train_loss, trainer.held_out_loss())
            progress.show_epoch(record)
            with _naming_directory(directory):
                if is_best:
                    trainer.save_adapter(directory)
                _save_state(directory / STATE_NAME, record, trainer)
                record.write(directory)
    record.is_finished = True
    with _naming_directory(directory):
        record.write(directory)
        (directory / STATE_NAME).unlink(missing_ok=True)


def _is_done(record: FinetuneRecord, config: FinetuneConfig) -> bool:
    num_done = len(record.train_losses)
    is_stuck = config.patience and num_done - (record.best_epoch or 0) >= config.patience
    return num_done >= config.epochs or bool(is_stuck)


def _save_state(path: Path, record: FinetuneRecord, trainer: LoraTrainer) -> None:
    state = {
        "trainer": trainer.state(),
        "held_out_losses": record.held_out_losses,
        "train_losses": record.train_losses,
    }
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.replace(path)


@contextlib.contextmanager
def _naming_directory(directory: Path) -> Iterator[None]:
    """Turn a refused write into a RunError that says how to go on."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(
            f"{directory}: cannot write ({reason}). Make room and run the same command to resume"
        ) from None

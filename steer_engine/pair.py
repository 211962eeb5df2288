"""Opens a base, its domain model and their tokenizer, and checks that they belong together."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from .checkpoint import Checkpoint
from .config import FalconConfig
from .errors import CheckpointError
from .lora import LoraAdapter, is_adapter
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelPair:
    """A base model and what was fine-tuned from it, checked from headers; no weight is read yet.

    domain: a full fine-tune, a LoRA adapter, or None for plain decoding of the base.
    """

    base: Checkpoint
    domain: Checkpoint | LoraAdapter | None
    tokenizer: Tokenizer

    @classmethod
    def open(cls, base: str | Path, domain: str | Path | None) -> ModelPair:
        """Open checkpoint directories. Raises CheckpointError for everything that does not fit."""
        base_checkpoint = Checkpoint(base)
        tokenizer = Tokenizer(Path(base))
        check_vocabulary(tokenizer, base_checkpoint.config, Path(base))
        if domain is None:
            return cls(base_checkpoint, None, tokenizer)
        directory = Path(domain)
        if not directory.is_dir():
            raise CheckpointError(
                f"{domain}: no such directory; give a checkpoint's or an adapter's"
            )
        domain_model: Checkpoint | LoraAdapter
        if is_adapter(directory):
            domain_model = LoraAdapter.open(directory, base_checkpoint.config)
        else:
            domain_model = Checkpoint(directory)
            check_same_architecture(base_checkpoint, domain_model)
        # TRL and PEFT save a tokenizer beside an adapter too.
        if (directory / "tokenizer.json").exists() or not is_adapter(directory):
            tokenizer.check_same(Tokenizer(directory))
        return cls(base_checkpoint, domain_model, tokenizer)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text; a full fine-tune's own count."""
        source = self.domain if isinstance(self.domain, Checkpoint) else self.base
        return source.config.eos_token_ids

    def sha256(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every checkpoint file: {"base": {file name: digest}, "domain": ...}."""
        models = {"base": self.base, "domain": self.domain}
        return {name: model.sha256() for name, model in models.items() if model is not None}


def check_vocabulary(tokenizer: Tokenizer, config: FalconConfig, directory: Path) -> None:
    """Raise CheckpointError if the tokenizer makes ids that the embedding does not have."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{directory}: tokenizer.json has {tokenizer.vocab_size} entries, the model "
            f"{config.vocab_size}; they do not belong together"
        )


def check_same_architecture(base: Checkpoint, domain: Checkpoint) -> None:
    """Raise CheckpointError for the first size in which a full fine-tune differs from its base."""
    may_differ = {
        "bos_token_id",
        "eos_token_ids",
        "max_position_embeddings",
        "ties_word_embeddings",
    }
    for field in fields(FalconConfig):
        ours, theirs = getattr(base.config, field.name), getattr(domain.config, field.name)
        if ours != theirs and field.name not in may_differ:
            raise CheckpointError(
                f"{domain.directory}: {field.name} is {theirs}, the base {base.directory} has "
                f"{ours}; a domain model must be a fine-tune of its base"
            )

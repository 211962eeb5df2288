"""Trains a PEFT LoRA adapter on a frozen Falcon (extra `train`); transformers and PEFT do the work.

What an epoch does depends on the seed, its number and the state it starts from, so a run that is
continued from an epoch's state ends with the adapter of an undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..config import FalconConfig
from ..errors import RunError
from ..machine import DTYPES, naming_settings
from .config import FinetuneConfig
from .data import IGNORED_LABEL, Tokens, collate, shuffled_batches

TARGET_MODULES = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
WARMUP_SHARE = 0.1
MAX_GRADIENT_NORM = 1.0
OUT_OF_MEMORY_REMEDY = "lower batch_size or max_model_len"


class LoraTrainer:
    """An adapter in training: the model, its optimizer, and the training and held-out rows."""

    def __init__(
        self,
        base: Path,
        model_config: FalconConfig,
        config: FinetuneConfig,
        train: Sequence[Tokens],
        held_out: Sequence[Tokens],
    ):
        """Load the base and put an untrained adapter on it. config: resolved, without "auto"."""
        import peft

        self.config, self.train, self.held_out = config, train, held_out
        self.pad_id = model_config.eos_token_ids[0]
        torch.manual_seed(config.seed)
        lora = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=TARGET_MODULES,
            task_type="CAUSAL_LM",
        )
        with naming_settings("loading the base model", "free memory, or use dtype bfloat16"):
            falcon = load_falcon(base, model_config, config.dtype).to(config.device)
            # PEFT keeps the adapter itself in fp32.
            self.model = peft.get_peft_model(falcon, lora)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.parameters)

    def train_epoch(self, epoch: int, on_step: Callable[[int], None]) -> float:
        """Go through the training rows once.

        epoch: from 0.
        on_step: called with the number of steps done in this epoch.
        Returns: mean loss over the labels.
        Raises: RunError if the loss or its gradient is not finite, CapacityError out of memory.
        """
        # Dropout draws from torch's generator, the order of the rows from numpy's.
        torch.manual_seed(self.config.seed * 1_000_003 + epoch)
        rng = np.random.default_rng((self.config.seed, epoch))
        batches = shuffled_batches([len(r.ids) for r in self.train], self.config.batch_size, rng)
        self.model.train()
        total, num_labels = 0.0, 0
        for step, batch in enumerate(batches):
            progress = (epoch + step / len(batches)) / self.config.epochs
            loss, count = self._take_step([self.train[i] for i in batch], progress)
            if not math.isfinite(loss):
                raise RunError(
                    f"training diverged: the loss is {loss} in epoch {epoch + 1}, step {step + 1}; "
                    "lower learning_rate"
                )
            total, num_labels = total + loss * count, num_labels + count
            on_step(step + 1)
        return total / num_labels

    def _take_step(self, rows: Sequence[Tokens], progress: float) -> tuple[float, int]:
        """One update. Returns the batch's mean loss and number of labels; NaN if none was made."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * learning_rate_factor(progress)
        with naming_settings("training", OUT_OF_MEMORY_REMEDY):
            loss, count = self._loss(rows)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
        if not math.isfinite(norm):
            return math.nan, count
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), count

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean cross-entropy (nats per token) over text and end-of-text of the held-out rows."""
        self.model.eval()
        rows = sorted(self.held_out, key=lambda row: len(row.ids))
        total, num_labels = 0.0, 0
        for first in range(0, len(rows), self.config.batch_size):
            with naming_settings("measuring the hold-out loss", OUT_OF_MEMORY_REMEDY):
                loss, count = self._loss(rows[first : first + self.config.batch_size])
            total, num_labels = total + loss.item() * count, num_labels + count
        return total / num_labels

    def _loss(self, rows: Sequence[Tokens]) -> tuple[torch.Tensor, int]:
        """Mean cross-entropy over the labels, fp32, and their number.

        No mask is needed: padding stands behind the text, where causal attention does not look.
        The LM head sees only the positions that predict a label.
        """
        input_ids, labels = (t.to(self.config.device) for t in collate(rows, self.pad_id))
        falcon = self.model.get_base_model()
        hidden = falcon.transformer(input_ids, use_cache=False).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        is_learnt = labels != IGNORED_LABEL
        logits = falcon.lm_head(hidden[is_learnt])  # [number of labels, vocab_size]
        return F.cross_entropy(logits.float(), labels[is_learnt]), int(is_learnt.sum())

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter as PEFT does; a crash leaves the old one or the new one."""
        partial = directory / "adapter.partial"
        self.model.save_pretrained(partial, save_embedding_layers=False)
        for name in ADAPTER_FILES:
            # safetensors lets nobody but the owner read what it writes.
            (partial / name).chmod(directory.stat().st_mode & 0o666)
            (partial / name).replace(directory / name)
        for left_over in partial.iterdir():  # PEFT's empty model card
            left_over.unlink()
        partial.rmdir()

    def state(self) -> dict:
        """What load_state needs, as tensors and plain numbers."""
        weights = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict) -> None:
        """Go on from a state of the same training."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])


def load_falcon(directory: Path, config: FalconConfig, dtype: str):
    """The base as a transformers model on the CPU, from config.json in any of its spellings."""
    import transformers

    hf_config = transformers.FalconConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        multi_query=config.num_kv_heads == 1,
        parallel_attn=config.is_parallel,
        new_decoder_architecture=config.uses_new_decoder,
        num_ln_in_parallel_attn=config.num_layer_norms if config.uses_new_decoder else None,
        alibi=config.uses_alibi,
        bias=config.has_bias,
        layer_norm_epsilon=config.layer_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.ties_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=list(config.eos_token_ids),
    )
    transformers.utils.logging.disable_progress_bar()
    return transformers.FalconForCausalLM.from_pretrained(
        directory, config=hf_config, dtype=DTYPES[dtype], use_safetensors=True
    )


def learning_rate_factor(progress: float) -> float:
    """Share of the highest learning rate at a point of training, 0 to 1.

    A linear rise over the first tenth, then half a cosine down to 0.
    """
    if progress < WARMUP_SHARE:
        # Never 0, or the first step would be lost.
        return 0.05 + 0.95 * progress / WARMUP_SHARE
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP_SHARE) / (1 - WARMUP_SHARE)))

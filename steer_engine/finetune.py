"""Fine-tune a domain model as a PEFT LoRA adapter (extra `train`).

    python -m steer_engine.finetune --base DIR --train real.jsonl --prompt "Generate a hypothesis:"
        --output adapters/astro

Each example is trained as prompt, space, text, end-of-text; only text and end-of-text count in the
loss. A record may name its own prompt in a field "prompt". One example in twenty is held out, and
their loss is logged after every epoch; the adapter of the best epoch is kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .dataset import read_texts

HELD_OUT_EVERY = 20
TARGET_MODULES = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
IGNORED_LABEL = -100
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneConfig:
    """LoRA and schedule. The paper used rank 64 and alpha 16 on Falcon-7B."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    learning_rate: float = 2e-3
    epochs: int = 8
    batch_size: int = 32
    seed: int = 0


def read_pairs(path: Path, prompt: str | None) -> list[tuple[str, str]]:
    """(prompt, text) of each example; a .jsonl record's own "prompt" comes before the argument."""
    if path.suffix != ".jsonl":
        records = [{"text": text} for text in read_texts(path)]
    else:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    pairs = [(record.get("prompt", prompt), record["text"].strip()) for record in records]
    if any(p is None for p, _ in pairs):
        raise SystemExit(f'{path}: has records without a "prompt"; give --prompt')
    return pairs


def encode_pair(tokenizer, pair: tuple[str, str], end_of_text_id: int) -> tuple[list, list]:
    """Token ids and labels of one example; the prompt's labels are ignored by the loss."""
    prompt_ids = tokenizer.encode(pair[0]).ids
    text_ids = [*tokenizer.encode(" " + pair[1]).ids, end_of_text_id]
    return prompt_ids + text_ids, [IGNORED_LABEL] * len(prompt_ids) + text_ids


def collate(examples: list[tuple[list, list]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad to the longest. Returns input_ids and labels, both [batch, longest] int64."""
    longest = max(len(ids) for ids, _ in examples)
    input_ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORED_LABEL)
    for row, (ids, own_labels) in enumerate(examples):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(own_labels)
    return input_ids, labels


def batch_loss(model, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy (nats) over the labels.

    No mask is needed: padding stands behind the text, where causal attention does not look.
    """
    device = next(model.parameters()).device
    input_ids, labels = (t.to(device) for t in batch)
    logits = model(input_ids, use_cache=False).logits.float()
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
    )


@torch.no_grad()
def mean_loss(model, examples: list, config: FinetuneConfig, pad_id: int) -> float:
    """Loss over a set of examples, weighted by their number of labels."""
    model.eval()
    total = num_labels = 0.0
    for first in range(0, len(examples), config.batch_size):
        batch = collate(examples[first : first + config.batch_size], pad_id)
        count = int((batch[1] != IGNORED_LABEL).sum())
        total += batch_loss(model, batch).item() * count
        num_labels += count
    model.train()
    return total / num_labels


def finetune(base: Path, train: Path, prompt: str | None, output: Path, config: FinetuneConfig):
    """Train an adapter and write it as PEFT does, without a tokenizer.

    Returns: held-out losses, one before training and one per epoch.
    """
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer
    from transformers import FalconForCausalLM

    torch.manual_seed(config.seed)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = FalconForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    end_of_text_id = model.config.eos_token_id
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=TARGET_MODULES,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    examples = [encode_pair(tokenizer, p, end_of_text_id) for p in read_pairs(train, prompt)]
    rng = np.random.default_rng(config.seed)
    rng.shuffle(examples)
    held_out = examples[::HELD_OUT_EVERY]
    examples = [e for i, e in enumerate(examples) if i % HELD_OUT_EVERY]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.01)
    num_steps = config.epochs * math.ceil(len(examples) / config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=num_steps, pct_start=0.1
    )
    losses = [mean_loss(model, held_out, config, end_of_text_id)]
    logger.info("held-out loss before training %.4f", losses[0])
    for epoch in range(config.epochs):
        order = rng.permutation(len(examples))
        for first in range(0, len(order), config.batch_size):
            chosen = [examples[i] for i in order[first : first + config.batch_size]]
            batch_loss(model, collate(chosen, end_of_text_id)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(mean_loss(model, held_out, config, end_of_text_id))
        logger.info("epoch %d: held-out loss %.4f", epoch + 1, losses[-1])
        if losses[-1] == min(losses):
            model.save_pretrained(output)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m steer_engine.finetune", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--prompt")
    parser.add_argument("--output", type=Path, required=True)
    for name, value in vars(FinetuneConfig()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    base, train, prompt, output = (arguments.pop(k) for k in ("base", "train", "prompt", "output"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    finetune(base, train, prompt, output, FinetuneConfig(**arguments))


if __name__ == "__main__":
    main()

"""Pretrain a small Falcon base model from scratch on any text (extra `train`).

    python -m steer_engine.pretrain --text books.txt.bz2 --text abstracts.jsonl.bz2
        --fields title,abstract --output runs/tiny-base --hours 2

The architecture is Falcon-7B's (multi-query attention, parallel block, rotary, tied embeddings, no
biases) at a small size. The learning rate follows the share of the time budget that is used, so it
reaches zero on a slow machine too. State is saved every few minutes; the same command
resumes it. The output is a Hugging Face checkpoint.
"""

from __future__ import annotations

import argparse
import bz2
import json
import logging
import lzma
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_EVERY = 100  # one document in so many is kept for the held-out perplexity
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainConfig:
    """Sizes and schedule. Defaults give 9.0 M parameters."""

    vocab_size: int = 8192
    hidden_size: int = 320
    num_layers: int = 6
    head_dim: int = 64
    seq_len: int = 256
    batch_size: int = 32
    hours: float = 2.0
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.1
    warmup_share: float = 0.02
    max_megabytes_per_file: int = 64
    save_every_s: float = 240.0
    compile: int = 1  # 0: eager, for runs too short to pay for compiling
    seed: int = 0


def open_text(path: Path):
    """Open .txt or .jsonl, plain or compressed with bz2 or xz, for reading text."""
    openers = {".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)(path, "rt", encoding="utf-8")


def read_documents(path: Path, fields: list[str], max_bytes: int) -> Iterator[str]:
    """Yield documents: a .jsonl line's fields, or plain text up to an end-of-text line.

    Fields are joined by newlines. Plain text is also cut at a line end once a document passes
    100,000 characters.
    """
    is_jsonl = ".jsonl" in path.suffixes
    total, lines, num_chars = 0, [], 0
    with open_text(path) as file:
        for line in file:
            total += len(line)
            if is_jsonl:
                record = json.loads(line)
                yield "\n".join(str(record[f]).strip() for f in fields if record.get(f))
            elif line.strip() == END_OF_TEXT or num_chars > 100_000:
                yield "".join(lines).strip()
                lines, num_chars = [], 0
            else:
                lines.append(line)
                num_chars += len(line)
            if total >= max_bytes:
                break
    if lines:
        yield "".join(lines).strip()


def train_tokenizer(documents: list[str], vocab_size: int):
    """Train a byte-level BPE with single digits, Falcon's kind of tokenizer at a small size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def prepare_tokens(texts: list[Path], fields: list[str], output: Path, config: PretrainConfig):
    """Write tokenizer.json, tokens.bin and held_out.bin (uint16), unless they exist.

    Returns: the tokenizer, the training tokens and the held-out tokens (memory-mapped).
    """
    from tokenizers import Tokenizer

    tokenizer_path = output / "tokenizer.json"
    if not (output / "held_out.bin").exists():
        documents = []
        for path in texts:
            found = list(read_documents(path, fields, config.max_megabytes_per_file * 1_000_000))
            logger.info(
                "%s: %d documents, %.1f MB", path.name, len(found), sum(map(len, found)) / 1e6
            )
            documents += found
        np.random.default_rng(config.seed).shuffle(documents)
        # The merges settle long before 20 MB; more text only costs time.
        sample, size = [], 0
        for document in documents:
            sample.append(document[:200_000])
            size += len(sample[-1])
            if size > 20_000_000:
                break
        tokenizer = train_tokenizer(sample, config.vocab_size)
        tokenizer.save(str(tokenizer_path))
        end = tokenizer.token_to_id(END_OF_TEXT)
        held_out = documents[::HELD_OUT_EVERY]
        training = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY]
        for name, part in (("tokens.bin", training), ("held_out.bin", held_out)):
            with open(output / name, "wb") as file:
                for first in range(0, len(part), 256):
                    for encoding in tokenizer.encode_batch(part[first : first + 256]):
                        file.write(np.array([*encoding.ids, end], dtype=np.uint16).tobytes())
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    tokens = np.memmap(output / "tokens.bin", dtype=np.uint16, mode="r")
    held_out = np.memmap(output / "held_out.bin", dtype=np.uint16, mode="r")
    return tokenizer, tokens, held_out


def build_model(config: PretrainConfig, end_of_text_id: int):
    """A random FalconForCausalLM of Falcon-7B's architecture at the configured size."""
    from transformers import FalconConfig, FalconForCausalLM

    return FalconForCausalLM(
        FalconConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.hidden_size // config.head_dim,
            max_position_embeddings=4 * config.seq_len,
            multi_query=True,
            parallel_attn=True,
            new_decoder_architecture=False,
            alibi=False,
            bias=False,
            bos_token_id=end_of_text_id,
            eos_token_id=end_of_text_id,
            tie_word_embeddings=True,
        )
    )


def build_optimizers(model, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embeddings" in n]
    return [
        torch.optim.Muon(
            matrices,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(progress: float, warmup_share: float) -> float:
    """Linear warm-up, then constant, then linear to zero over the last 60 % of the budget."""
    if progress < warmup_share:
        return max(progress / warmup_share, 0.01)
    return max(min(1.0, (1.0 - progress) / 0.6), 0.0)


@contextmanager
def flash_attention():
    """Let Falcon's attention take PyTorch's flash kernel, twice as fast on a CPU.

    transformers 5.17 hands it a mask and fp32 tensors, for which PyTorch takes the slow path. Here
    every window is full and causal, so neither is needed.
    """
    original = F.scaled_dot_product_attention

    def causal(query, key, value, **_):
        query, key, value = (t.bfloat16() for t in (query, key, value))
        return original(query, key.expand_as(query), value.expand_as(query), is_causal=True)

    F.scaled_dot_product_attention = causal
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def loss_on(model, input_ids: torch.Tensor, autocast_dtype: torch.dtype) -> torch.Tensor:
    """Mean next-token cross-entropy in nats. input_ids: [batch, seq_len + 1] int64."""
    with flash_attention(), torch.autocast(input_ids.device.type, dtype=autocast_dtype):
        logits = model(input_ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model, held_out: np.ndarray, config: PretrainConfig, max_batches: int) -> float:
    """Mean loss (nats per token) over the first windows of the held-out tokens."""
    model.eval()
    device = next(model.parameters()).device
    window, losses = config.seq_len + 1, []
    num_windows = min(len(held_out) // window, max_batches * config.batch_size)
    for first in range(0, num_windows, config.batch_size):
        rows = range(first, min(first + config.batch_size, num_windows))
        batch = np.stack([held_out[r * window : (r + 1) * window] for r in rows]).astype(np.int64)
        losses.append(loss_on(model, torch.from_numpy(batch).to(device), torch.bfloat16).item())
    model.train()
    return float(np.mean(losses))


def save_state(path: Path, state: dict) -> None:
    """Write the training state atomically (tensors and plain numbers only)."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def pretrain(texts: list[Path], fields: list[str], output: Path, config: PretrainConfig) -> float:
    """Train until the time budget is used; write the checkpoint.

    Returns: the held-out perplexity per token.
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, tokens, held_out = prepare_tokens(texts, fields, output, config)
    end_of_text_id = tokenizer.token_to_id(END_OF_TEXT)
    model = build_model(config, end_of_text_id).to(device)
    optimizers = build_optimizers(model, config)
    num_parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        "%.2f M parameters, %.1f M training tokens", num_parameters / 1e6, len(tokens) / 1e6
    )

    state_path, step, trained_s = output / "state.pt", 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, trained_s = state["step"], state["trained_s"]
        logger.info("resumed at step %d after %.0f s of training", step, trained_s)

    def snapshot() -> dict:
        return {
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "step": step,
            "trained_s": trained_s,
        }

    # Fusing the element-wise chains doubles the speed on a CPU; held-out batches stay eager.
    training_loss = torch.compile(loss_on) if config.compile else loss_on
    budget_s, last_save_s = config.hours * 3600, trained_s
    window = config.seq_len + 1
    while trained_s < budget_s:
        started = time.monotonic()
        # Keyed by step, so a resumed run sees the batches that an undisturbed one would.
        rng = np.random.default_rng((config.seed, step))
        starts = rng.integers(0, len(tokens) - window, config.batch_size)
        batch = np.stack([tokens[s : s + window] for s in starts]).astype(np.int64)
        loss = training_loss(model, torch.from_numpy(batch).to(device), torch.bfloat16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = learning_rate_factor(trained_s / budget_s, config.warmup_share)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        trained_s += time.monotonic() - started
        if step % 20 == 0:
            rate = step * config.batch_size * config.seq_len / trained_s
            logger.info(
                "step %d  %.0f s  loss %.3f  %.0f tok/s", step, trained_s, loss.item(), rate
            )
        if trained_s - last_save_s > config.save_every_s:
            save_state(state_path, snapshot())
            last_save_s = trained_s
            logger.info("held-out loss %.4f", held_out_loss(model, held_out, config, 4))
    save_state(state_path, snapshot())

    perplexity = math.exp(held_out_loss(model, held_out, config, 64))
    model.to(torch.bfloat16).save_pretrained(output / "checkpoint")
    tokenizer.save(str(output / "checkpoint" / "tokenizer.json"))
    record = {
        "held_out_perplexity_per_token": perplexity,
        "training_s": trained_s,
        "steps": step,
        "tokens_seen": step * config.batch_size * config.seq_len,
        "parameters": num_parameters,
        "texts": [p.name for p in texts],
        "config": vars(config),
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    logger.info("held-out perplexity %.2f after %d steps", perplexity, step)
    return perplexity


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m steer_engine.pretrain", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument(
        "--fields", default="text", help="fields of .jsonl records, comma-separated"
    )
    parser.add_argument("--output", type=Path, required=True)
    defaults = PretrainConfig()
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    texts, fields, output = (arguments.pop(k) for k in ("text", "fields", "output"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    pretrain(texts, fields.split(","), output, PretrainConfig(**arguments))


if __name__ == "__main__":
    main()

"""What do weights in int8 cost in quality: perplexity on a text, and the error of STEER's logits?

    python bench/bench_int8_quality.py TEXT [--base DIR --domain DIR] [--merge] [--windows 200]

TEXT: a text or, with --fields, .jsonl; .xz and .bz2 are unpacked. Windows of --window-tokens tokens
stand at equal distances over it (or its last --tail-bytes); marks <unk> of WikiText are left out
first. The same windows for every variant, so that differences are paired: their interval is over
windows. Perplexity is the base's alone, of all tokens of a window but its first.

STEER's combined logits, recommended weights: a prompt is the first 32 tokens of a window, its
negative 168 of the next window before it. Errors are against fp32 weights and inputs. The default
domain model is an adapter, which shares the base's int8 weights; --merge folds it into a full
fine-tune, whose own int8 weights are as wrong as the base's, but not alike (needs PEFT).
"""

from __future__ import annotations

import argparse
import bz2
import json
import lzma
import math
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from conditions import describe_machine

from steer_engine import Engine, Guidance, SamplingParams, embedded
from steer_engine.guidance import PassKind
from steer_engine.head import HeadRows

PROMPT_TOKENS, NEGATIVE_TOKENS = 32, 168
OPENERS = {".xz": lzma.open, ".bz2": bz2.open}
VARIANTS = {  # name: dtype, weight_dtype; the first is what the others are compared with
    "fp32": ("float32", "auto"),
    "bf16": ("bfloat16", "auto"),
    "fp32, int8 weights": ("float32", "int8"),
    "bf16, int8 weights": ("bfloat16", "int8"),
}
NO_GUIDANCE, ONE_TOKEN = Guidance.none(), SamplingParams(max_tokens=1)


def read_text(path: Path, fields: Sequence[str], tail_bytes: int | None) -> str:
    """The text of a file, or of some fields of its lines."""
    with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
        text = file.read()
    if tail_bytes is not None:
        text = text[-tail_bytes:]
        text = text[text.index("\n") + 1 :]
    if fields:
        records = map(json.loads, text.splitlines())
        text = "\n".join(record[name] for record in records for name in fields)
    return text.replace("<unk>", "")


def cut_windows(token_ids: list[int], num_windows: int, num_tokens: int) -> list[list[int]]:
    """Windows at equal distances, which do not overlap."""
    num_windows = min(num_windows, len(token_ids) // num_tokens)
    distance = len(token_ids) / num_windows
    starts = [int(i * distance) for i in range(num_windows)]
    return [token_ids[start : start + num_tokens] for start in starts]


def window_losses(engine: Engine, windows: list[list[int]]) -> list[float]:
    """The mean of -log p over each window's tokens but the first, in nats."""
    losses = []
    for window in windows:
        prompts = {PassKind.DOMAIN: window}
        sequence = engine.make_sequence(0, 0, prompts, NO_GUIDANCE, ONE_TOKEN)
        engine.scheduler.waiting.append(sequence)
        admitted = engine.scheduler.admit()
        (batch,) = engine.scheduler.prefill_batches(admitted, max_tokens=len(window))
        residual = engine.model.forward(batch, engine.kv_cache)
        logits = engine.model.compute_logits(
            residual, torch.arange(len(window) - 1)[None], every_row(len(window) - 1)
        )
        loss = torch.nn.functional.cross_entropy(logits[0], torch.tensor(window[1:]))
        losses.append(float(loss))
        engine.scheduler.reset()
    return losses


def every_row(num_rows: int) -> HeadRows:
    """The head of one pass of num_rows sequences."""
    ones = torch.ones(1, num_rows)
    return HeadRows((PassKind.DOMAIN,), ones[None], ones < 0, ones)


def combined_logits(engine: Engine, windows: list[list[int]]) -> Iterator[torch.Tensor]:
    """STEER's logits behind each window's prompt: [num_seqs, vocab_size] at a time."""
    prompts = [window[:PROMPT_TOKENS] for window in windows]
    shifted = windows[1:] + windows[:1]
    negatives = [
        other[-NEGATIVE_TOKENS:] + prompt for other, prompt in zip(shifted, prompts, strict=True)
    ]
    guidance = Guidance.recommended()
    sequences = engine._sequences(prompts, negatives, guidance, ONE_TOKEN, seed=0)
    for logits, rows in engine._first_logits(sequences):
        weights = torch.tensor([guidance.weights[kind] for kind in rows.passes])
        yield torch.einsum("p,psv->sv", weights, logits)


def compare(got: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Errors of logits, and the divergence of the distributions in nats."""
    error = got - exact
    error = (error - error.mean(dim=1, keepdim=True)).abs()  # a shift of a row changes nothing
    log_p, log_q = exact.log_softmax(dim=1), got.log_softmax(dim=1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    return {
        "largest_error": error.max().item(),
        "mean_error": error.mean().item(),
        "mean_kl": divergence.mean().item(),
        "largest_kl": divergence.max().item(),
        "same_top": (got.argmax(dim=1) == exact.argmax(dim=1)).float().mean().item(),
    }


def merge(base: Path, adapter: Path, directory: Path) -> Path:
    """Write the full fine-tune that an adapter stands for, in fp32."""
    from peft import PeftModel
    from transformers import FalconForCausalLM

    model = FalconForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(directory)
    shutil.copy(base / "tokenizer.json", directory / "tokenizer.json")
    return directory


def measure(base: Path, domain: Path, windows: list[list[int]]) -> Iterator[dict]:
    """One record per variant."""
    exact_losses, exact_logits = None, None
    for name, (dtype, weight_dtype) in VARIANTS.items():
        settings = {"device": "cpu", "dtype": dtype, "weight_dtype": weight_dtype}
        settings |= {"max_num_seqs": 16}
        losses = window_losses(Engine.from_pretrained(base, **settings), windows)
        engine = Engine.from_pretrained(base, domain, **settings)
        logits = torch.cat(list(combined_logits(engine, windows)))
        record = {
            "variant": name,
            "weights_mib": engine.memory_plan.weight_bytes / 2**20,
            "perplexity": math.exp(statistics.mean(losses)),
        }
        if exact_losses is None:
            exact_losses, exact_logits = losses, logits
            record["logits_std"] = logits.std(dim=1).mean().item()
        else:
            differences = [a - b for a, b in zip(losses, exact_losses, strict=True)]
            half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
            mean = statistics.mean(differences)
            record["perplexity_change_percent"] = [
                100 * math.expm1(x) for x in (mean - half, mean, mean + half)
            ]
            record |= compare(logits, exact_logits)
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--fields", nargs="+", default=[], help="of a .jsonl")
    parser.add_argument("--tail-bytes", type=int, help="use the end of the file only")
    parser.add_argument("--base", type=Path, default=embedded.BASE)
    parser.add_argument("--domain", type=Path, default=embedded.DOMAIN)
    parser.add_argument("--merge", action="store_true", help="the adapter as a full fine-tune")
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--window-tokens", type=int, default=256)
    arguments = parser.parse_args()
    text = read_text(arguments.text, arguments.fields, arguments.tail_bytes)
    # The tokenizer alone would do, but loading takes less than a second.
    tokenizer = Engine.from_pretrained(arguments.base).tokenizer
    windows = cut_windows(tokenizer.encode(text), arguments.windows, arguments.window_tokens)
    header = {"bench": "int8_quality", "text": arguments.text.name, "windows": len(windows)}
    print(json.dumps(header | {"merged": arguments.merge, "machine": describe_machine()}))
    with tempfile.TemporaryDirectory() as directory:
        domain = arguments.domain
        if arguments.merge:
            domain = merge(arguments.base, domain, Path(directory))
        for record in measure(arguments.base, domain, windows):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

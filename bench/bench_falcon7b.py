"""Does Falcon-7B's shape with a LoRA domain model load and generate within a memory limit?

    python bench/bench_falcon7b.py --work DIR [--config FILE] [--tokenizer FILE] [--prompts 2]
        [--weight-dtype int8]

Writes random bf16 weights of Falcon-7B's shape (14.4 GB in shards, lm_head stored beside the equal
embedding as older checkpoints do) and a rank-16 adapter below --work, unless they are there. A
fresh process then loads them and generates with all three passes. Prints one JSON line with load
time, time per step, and the process's peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from checkpoints import FALCON_7B, ensure_checkpoints

MAX_TOKENS = 4


def peak_memory_gib() -> float:
    """VmHWM of this process: peak resident memory, mapped files included."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(base: Path, adapter: Path, num_prompts: int, weight_dtype: str) -> None:
    """Load and generate in this process; prints one JSON line."""
    from steer_engine import Engine, Guidance, SamplingParams

    started_at = time.monotonic()
    engine = Engine.from_pretrained(
        base, adapter, weight_dtype=weight_dtype, max_num_seqs=num_prompts, max_model_len=512
    )
    load_s = time.monotonic() - started_at
    load_gib = peak_memory_gib()
    guidance, negative = (
        Guidance.recommended(),
        "One question? Another question?\nWrite a question:",
    )
    steps_at: list[float] = []
    forward = engine.model.forward

    def timed_forward(*arguments):
        result = forward(*arguments)
        steps_at.append(time.monotonic())
        return result

    engine.model.forward = timed_forward
    started_at = time.monotonic()
    completions = engine.generate(
        ["Write a question:"] * num_prompts,
        negative_prompts=[negative] * num_prompts,
        guidance=guidance,
        sampling=SamplingParams(top_p=0.9, max_tokens=MAX_TOKENS, ignore_eos=True),
    )
    generate_s = time.monotonic() - started_at
    assert [len(c.token_ids) for c in completions] == [MAX_TOKENS] * num_prompts
    steps_s = sorted(
        b - a for a, b in zip(steps_at[-MAX_TOKENS:], steps_at[1 - MAX_TOKENS :], strict=False)
    )
    result = {
        "bench": "falcon7b_lora_three_passes",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backend": engine.config.backend,
        "dtype": engine.config.dtype,
        "weight_dtype": engine.config.weight_dtype,
        "num_prompts": num_prompts,
        "max_tokens": MAX_TOKENS,
        "load_s": round(load_s, 1),
        "generate_s": round(generate_s, 2),
        "median_step_s": round(steps_s[len(steps_s) // 2], 3),
        "peak_after_load_gib": round(load_gib, 2),
        "peak_gib": round(peak_memory_gib(), 2),
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="needs 15 GB of disk")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--weight-dtype", default="auto")
    parser.add_argument("--measure-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_only:
        paths = arguments.work / "base", arguments.work / "adapter"
        measure(*paths, arguments.prompts, arguments.weight_dtype)
        return
    values = json.loads(arguments.config.read_text()) if arguments.config else FALCON_7B
    ensure_checkpoints(arguments.work, values, tokenizer=arguments.tokenizer, with_finetune=False)
    # A fresh process, so that its peak memory is the engine's alone.
    command = [sys.executable, __file__, "--work", str(arguments.work), "--measure-only"]
    command += ["--prompts", str(arguments.prompts), "--weight-dtype", arguments.weight_dtype]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()

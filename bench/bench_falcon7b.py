"""Does Falcon-7B's shape with a LoRA domain model load and generate within a memory limit?

    python bench/bench_falcon7b.py --work DIR [--config FILE] [--tokenizer FILE] [--prompts 2]
        [--weight-dtype int8]

Writes random bf16 weights of Falcon-7B's shape (14.4 GB in shards, lm_head stored beside the equal
embedding as older checkpoints do) and a rank-16 adapter below --work, unless they are there. A
fresh process then loads them and generates with the base alone and with all three passes. Prints
one JSON line with load time, time per step and its share of the floor (the weights' bytes in dtype
over the measured read rate; csrc stores bf16 in three quarters of them, so a share can pass 1), and
the process's peak resident memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ceilings import Work, measure_ceilings
from checkpoints import FALCON_7B, ensure_checkpoints
from conditions import describe_machine

MAX_TOKENS = 16
CEILING_BYTES = 1 << 30


def peak_memory_gib() -> float:
    """VmHWM of this process: peak resident memory, mapped files included."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(work: Path, num_prompts: int, weight_dtype: str) -> None:
    """Load and generate in this process; prints one JSON line."""
    from steer_engine import Engine, Guidance

    ceilings = measure_ceilings(CEILING_BYTES, time.perf_counter)
    started_at = time.monotonic()
    engine = Engine.from_pretrained(
        work / "base",
        work / "adapter",
        weight_dtype=weight_dtype,
        max_num_seqs=num_prompts,
        max_model_len=512,
    )
    load_s = time.monotonic() - started_at
    load_gib = peak_memory_gib()
    values = json.loads((work / "base" / "config.json").read_text())
    read_bytes = Work.of(values, 1 if weight_dtype == "int8" else 2).weight_bytes
    floor_s = read_bytes / ceilings.read_gb_s / 1e9
    result = {
        "bench": "falcon7b",
        "machine": describe_machine(),
        "backend": engine.config.backend,
        "dtype": engine.config.dtype,
        "weight_dtype": engine.config.weight_dtype,
        "num_prompts": num_prompts,
        "max_tokens": MAX_TOKENS,
        "read_gb_s": round(ceilings.read_gb_s, 1),
        "floor_s": round(floor_s, 4),
        "stored_gb": round(engine.memory_plan.weight_bytes / 1e9, 2),
        "load_s": round(load_s, 1),
        "peak_after_load_gib": round(load_gib, 2),
    }
    base_alone = Guidance(domain=0.0, base=1.0)
    for name, guidance in {"one_pass": base_alone, "lora_three": Guidance.recommended()}.items():
        step_s = median_step_s(engine, guidance, num_prompts)
        result[f"{name}_step_s"] = round(step_s, 4)
        result[f"{name}_share_of_floor"] = round(floor_s / step_s, 3)
        result[f"{name}_tokens_s"] = round(num_prompts / step_s, 2)
    print(json.dumps(result | {"peak_gib": round(peak_memory_gib(), 2)}))


def median_step_s(engine, guidance, num_prompts: int) -> float:
    """Median seconds of the decode steps of one generate."""
    from steer_engine import SamplingParams

    steps_at: list[float] = []
    step = engine.step

    def timed_step(seed: int):
        finished = step(seed)
        steps_at.append(time.monotonic())
        return finished

    engine.step = timed_step
    completions = engine.generate(
        ["Write a question:"] * num_prompts,
        negative_prompts=["One question? Another question?\nWrite a question:"] * num_prompts,
        guidance=guidance,
        sampling=SamplingParams(top_p=0.9, max_tokens=MAX_TOKENS, ignore_eos=True),
    )
    engine.step = step
    assert [len(c.token_ids) for c in completions] == [MAX_TOKENS] * num_prompts
    return statistics.median(b - a for a, b in itertools.pairwise(steps_at))


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
        measure(arguments.work, arguments.prompts, arguments.weight_dtype)
        return
    values = json.loads(arguments.config.read_text()) if arguments.config else FALCON_7B
    ensure_checkpoints(arguments.work, values, tokenizer=arguments.tokenizer, with_finetune=False)
    # A fresh process, so that its peak memory is the engine's alone.
    command = [sys.executable, __file__, "--work", str(arguments.work), "--measure-only"]
    command += ["--prompts", str(arguments.prompts), "--weight-dtype", arguments.weight_dtype]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()

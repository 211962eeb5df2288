"""What bench_generate and bench_step share: texts, settings, and the machine's description."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch
from checkpoints import Checkpoints

from steer_engine import SamplingParams, ops

TOP_P = 0.9


def make_texts(
    vocab_size: int,
    num_seqs: int,
    prompt_tokens: int,
    negative_tokens: int,
    seed: int = 0,
    *,
    share: bool = False,
) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts, and negatives of negative_tokens in all that end with their prompt.

    No two share a prefix, so neither side can skip prefill; with share, all negatives begin alike.
    """
    generator = torch.Generator().manual_seed(seed)

    def text(num_tokens: int) -> list[int]:
        return torch.randint(1, vocab_size, (num_tokens,), generator=generator).tolist()

    prompts = [text(prompt_tokens) for _ in range(num_seqs)]
    fronts = [text(negative_tokens - prompt_tokens) for _ in range(1 if share else num_seqs)]
    negatives = [fronts[0 if share else i] + prompt for i, prompt in enumerate(prompts)]
    return prompts, negatives


def sampling_of(num_new: int) -> SamplingParams:
    return SamplingParams(top_p=TOP_P, max_tokens=num_new, ignore_eos=True)


def domain_of(paths: Checkpoints, mode: str) -> Path | None:
    return {"plain": None, "steer_full": paths.finetune, "steer_lora": paths.adapter}[mode]


def describe_machine() -> dict:
    """Device, versions, commit, and how busy the machine is."""
    repository = Path(__file__).parent.parent
    arguments = ["git", "-C", str(repository), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(arguments, capture_output=True, text=True, check=False).stdout.strip()
    reason = ops.unavailable_reason("cpu")
    return {
        "device": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa": ops.cpu_isa() if reason is None else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "load_average": round(os.getloadavg()[0], 1),
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()

"""Does Falcon-7B's shape with a LoRA domain model load and generate within a memory limit?

    python bench/bench_falcon7b.py --work DIR [--config FILE] [--tokenizer FILE] [--prompts 2]

Writes random bf16 weights of Falcon-7B's shape (14.4 GB in shards, lm_head stored beside the equal
embedding as older checkpoints do) and a rank-16 adapter below --work, unless they are there. A
fresh process then loads them and generates with all three passes. Prints one JSON line with load
time, time per step, and the process's peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from steer_engine.checkpoint import (
    EMBEDDING,
    LM_HEAD,
    expected_shapes,
    iterate_linears,
    linear_shape,
)
from steer_engine.config import FalconConfig

FALCON_7B = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "vocab_size": 65024,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
    "alibi": False,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "layer_norm_epsilon": 1e-5,
    "torch_dtype": "bfloat16",
}
MAX_SHARD_BYTES = 2_000_000_000
LORA_RANK = 16
MAX_TOKENS = 4


class RandomWeights:
    """Slices of one random block: real generators are too slow for seven billion numbers."""

    def __init__(self, num_values: int = 1 << 24):
        torch.manual_seed(0)
        self._block = (0.02 * torch.randn(num_values)).bfloat16()

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        size = torch.Size(shape).numel()
        start = int(torch.randint(len(self._block), ()))
        repeats = -(-(start + size) // len(self._block))
        return self._block.repeat(repeats)[start : start + size].view(shape).clone()


def write_base(directory: Path, values: dict) -> None:
    """Shards of at most 2 GB and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    shapes = expected_shapes(FalconConfig.from_dict(values))
    random = RandomWeights()
    embedding = random.tensor(shapes[EMBEDDING])
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = 2 * torch.Size(shape).numel()
        if size and size + num_bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            if name in (EMBEDDING, LM_HEAD):
                tensors[name] = embedding.clone()
            elif len(shapes[name]) == 1:
                fill = 1.0 if name.endswith("weight") else 0.0
                tensors[name] = torch.full(shapes[name], fill, dtype=torch.bfloat16)
            else:
                tensors[name] = random.tensor(shapes[name])
            weight_map[name] = file_name
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(values))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_adapter(directory: Path, values: dict) -> None:
    """A PEFT adapter on all four linear modules of every block."""
    directory.mkdir(parents=True, exist_ok=True)
    config = FalconConfig.from_dict(values)
    tensors = {}
    for layer, kind in iterate_linears(config):
        out_features, in_features = linear_shape(kind, config)
        prefix = f"base_model.model.transformer.h.{layer}.{kind.value}"
        tensors[f"{prefix}.lora_A.weight"] = 0.02 * torch.randn(LORA_RANK, in_features)
        tensors[f"{prefix}.lora_B.weight"] = 0.02 * torch.randn(out_features, LORA_RANK)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": 2 * LORA_RANK}
    (directory / "adapter_config.json").write_text(json.dumps(settings))


def write_tokenizer(source: Path | None, target: Path) -> None:
    """Falcon's tokenizer where one is given (.json or .json.xz), else the embedded pair's."""
    if source is None:
        source = Path(__file__).parent.parent / "steer_engine/embedded/base/tokenizer.json"
    if source.suffix == ".xz":
        target.write_bytes(lzma.decompress(source.read_bytes()))
    else:
        shutil.copy(source, target)


def peak_memory_gib() -> float:
    """VmHWM of this process: peak resident memory, mapped files included."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(base: Path, adapter: Path, num_prompts: int) -> None:
    """Load and generate in this process; prints one JSON line."""
    from steer_engine import Engine, Guidance, SamplingParams

    started_at = time.monotonic()
    engine = Engine.from_pretrained(base, adapter, max_num_seqs=num_prompts, max_model_len=512)
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
    parser.add_argument("--measure-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    base, adapter = arguments.work / "base", arguments.work / "adapter"
    if arguments.measure_only:
        measure(base, adapter, arguments.prompts)
        return
    values = json.loads(arguments.config.read_text()) if arguments.config else FALCON_7B
    if not (base / "model.safetensors.index.json").exists():
        write_base(base, values)
        write_adapter(adapter, values)
        write_tokenizer(arguments.tokenizer, base / "tokenizer.json")
    # A fresh process, so that its peak memory is the engine's alone.
    command = [sys.executable, __file__, "--work", str(arguments.work), "--measure-only"]
    subprocess.run([*command, "--prompts", str(arguments.prompts)], check=True)


if __name__ == "__main__":
    main()

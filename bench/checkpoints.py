"""Random-weight checkpoints of named shapes for the benches: base, full fine-tune, LoRA adapter.

Weights are bf16 and scaled so that the model behaves like a trained one where that changes the
cost: activations stay of order one, and logits spread by LOGIT_SPREAD, so that the next token has a
perplexity of some ten and a top-p nucleus holds a few to some hundred tokens. With the usual 0.02
the distribution would be almost flat and every nucleus most of the vocabulary.
"""

from __future__ import annotations

import json
import lzma
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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
    "architectures": ["FalconForCausalLM"],
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
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
# 122 M parameters.
SMALL = FALCON_7B | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
# 4.9 M parameters; the embedded pair's vocabulary, since Falcon's would be six times the body.
TINY = FALCON_7B | {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 8192,
}
SHAPES = {"tiny": TINY, "small": SMALL, "falcon_7b": FALCON_7B}

INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 2_000_000_000
LOGIT_SPREAD = 4.0
FINETUNE_NOISE = 0.1  # relative to a weight's own standard deviation
LORA_RANK = 16
LORA_ALPHA = 32
LORA_SPREAD = 0.02


@dataclass(frozen=True)
class Checkpoints:
    """Directories of one shape's models."""

    base: Path
    finetune: Path
    adapter: Path


class RandomWeights:
    """Slices of one random block: real generators are too slow for seven billion numbers."""

    def __init__(self, seed: int, num_values: int = 1 << 24):
        torch.manual_seed(seed)
        self._block = torch.randn(num_values)

    def tensor(self, shape: tuple[int, ...], spread: float) -> torch.Tensor:
        """Normal numbers with standard deviation `spread`, in bf16."""
        size = torch.Size(shape).numel()
        start = int(torch.randint(len(self._block), ()))
        repeats = -(-(start + size) // len(self._block))
        values = self._block.repeat(repeats)[start : start + size]
        return (spread * values).bfloat16().view(shape)


def ensure_checkpoints(
    work: Path, values: dict, *, tokenizer: Path | None = None, with_finetune: bool = True
) -> Checkpoints:
    """Write what is missing below `work`; a second call finds it there.

    values: the config.json.
    tokenizer: a tokenizer.json or .json.xz; None: the embedded pair's.
    """
    paths = Checkpoints(work / "base", work / "finetune", work / "adapter")
    if not (paths.base / INDEX_NAME).exists():
        write_base(paths.base, values)
    if not (paths.base / "tokenizer.json").exists():
        write_tokenizer(tokenizer, paths.base / "tokenizer.json")
    if not (paths.adapter / "adapter_config.json").exists():
        write_adapter(paths.adapter, values)
    if with_finetune and not (paths.finetune / INDEX_NAME).exists():
        write_finetune(paths.base, paths.finetune)
    return paths


def write_base(directory: Path, values: dict) -> None:
    """Shards of at most 2 GB and their index; lm_head stands beside the equal embedding."""
    directory.mkdir(parents=True, exist_ok=True)
    config = FalconConfig.from_dict(values)
    shapes = expected_shapes(config)
    random = RandomWeights(seed=0)
    embedding = random.tensor(shapes[EMBEDDING], LOGIT_SPREAD / math.sqrt(config.hidden_size))
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
                tensors[name] = random.tensor(shapes[name], 1 / math.sqrt(shapes[name][1]))
            weight_map[name] = file_name
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(values))
    index = {"metadata": {}, "weight_map": weight_map}
    # Last: its presence says that the shards are complete.
    (directory / INDEX_NAME).write_text(json.dumps(index))


def write_finetune(base: Path, directory: Path) -> None:
    """A full fine-tune: every weight of base plus noise; embedding and head stay tied."""
    directory.mkdir(parents=True, exist_ok=True)
    random = RandomWeights(seed=2)
    embedding = None
    for shard in sorted(base.glob("*.safetensors")):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if tensor.ndim == 1:
                continue
            if name in (EMBEDDING, LM_HEAD) and embedding is not None:
                tensors[name] = embedding.clone()
                continue
            noise = random.tensor(tuple(tensor.shape), FINETUNE_NOISE * float(tensor.float().std()))
            tensors[name] = tensor + noise
            if name in (EMBEDDING, LM_HEAD):
                embedding = tensors[name]
        save_file(tensors, directory / shard.name, metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", INDEX_NAME):
        shutil.copy(base / name, directory / name)


def write_adapter(directory: Path, values: dict) -> None:
    """A PEFT adapter on all four linear modules of every block, A and B both non-zero."""
    directory.mkdir(parents=True, exist_ok=True)
    config = FalconConfig.from_dict(values)
    torch.manual_seed(1)
    tensors = {}
    for layer, kind in iterate_linears(config):
        out_features, in_features = linear_shape(kind, config)
        prefix = f"base_model.model.transformer.h.{layer}.{kind.value}"
        tensors[f"{prefix}.lora_A.weight"] = LORA_SPREAD * torch.randn(LORA_RANK, in_features)
        tensors[f"{prefix}.lora_B.weight"] = LORA_SPREAD * torch.randn(out_features, LORA_RANK)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))


def write_tokenizer(source: Path | None, target: Path) -> None:
    """Falcon's tokenizer where one is given (.json or .json.xz), else the embedded pair's."""
    if source is None:
        source = Path(__file__).parent.parent / "steer_engine/embedded/base/tokenizer.json"
    if source.suffix == ".xz":
        target.write_bytes(lzma.decompress(source.read_bytes()))
    else:
        shutil.copy(source, target)

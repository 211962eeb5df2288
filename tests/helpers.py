"""Tiny Falcon checkpoints, written by transformers and PEFT; what tests compare; the command line
in this process.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from steer_engine import cli

VOCAB_SIZE = 320
END_OF_TEXT = "<|endoftext|>"

# Every architecture of the family, at sizes with odd head counts where the variant allows them.
VARIANTS = {
    "multi_query_7b": {"num_attention_heads": 3, "multi_query": True, "parallel_attn": True},
    "grouped_40b": {
        "num_attention_heads": 6,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "grouped_11b_one_norm": {
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
    },
    "rw_alibi_bias_sequential": {
        "num_attention_heads": 4,
        "multi_query": False,
        "alibi": True,
        "bias": True,
        "parallel_attn": False,
    },
    # Twelve is no power of two, so the slopes are none either and their rounding to bf16 shows.
    "rw_alibi_twelve_heads": {
        "num_attention_heads": 12,
        "multi_query": True,
        "alibi": True,
        "bias": True,
        "parallel_attn": False,
    },
    "sequential_rotary": {
        "num_attention_heads": 2,
        "multi_query": True,
        "parallel_attn": False,
    },
}


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE with 256 bytes, some merges and an end-of-text token (id 0)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġt", "Ġa", "he", "in", "re", "on", "er", "Ġthe", "ing", '?"', "Ġq", "ou"]
    merges = [("Ġ", "t"), ("Ġ", "a"), ("h", "e"), ("i", "n"), ("r", "e"), ("o", "n"), ("e", "r")]
    merges += [("Ġt", "he"), ("in", "g"), ("?", '"'), ("Ġ", "q"), ("o", "u")]
    vocabulary = {token: i for i, token in enumerate([END_OF_TEXT, *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))


def hf_model(seed: int = 0, *, spread: float = 0.08, **overrides):
    """A random transformers Falcon, norms and biases included.

    spread: standard deviation of the weights, large enough for peaked distributions.
    """
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 24 * overrides.get("num_attention_heads", 3),
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 256,
            "initializer_range": spread,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        | overrides
    )
    torch.manual_seed(seed)
    model = FalconForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "word_embeddings" in name:
                parameter.mul_(4)
    return model


def save(model, directory: Path, dtype: torch.dtype = torch.float32, **arguments) -> Path:
    """Write a checkpoint with its tokenizer."""
    model.to(dtype).save_pretrained(directory, **arguments)
    model.float()
    write_tokenizer(directory)
    return directory


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON object file; a value of None removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def lora_model(base_dir: Path, seed: int = 1, **arguments):
    """A PEFT model on a saved base, with random A and B: a fresh B is 0 and would hide errors."""
    from peft import LoraConfig, get_peft_model
    from transformers import FalconForCausalLM

    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    } | arguments
    model = FalconForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def copy_checkpoint(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


@torch.no_grad()
def hf_logits(model, token_ids: list[int]) -> torch.Tensor:
    """Last-position logits [vocab_size] of a whole-sequence forward without a cache."""
    return model(torch.tensor([token_ids]), use_cache=False).logits[0, -1].float()


def random_prompts(num_prompts: int, *, seed: int = 0, longest: int = 90) -> list[list[int]]:
    """Token id lists of lengths from 1 to longest, end-of-text excluded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(1, longest, num_prompts).int().tolist()
    return [torch.randint(1, VOCAB_SIZE - 60, (n,), generator=generator).tolist() for n in lengths]


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Run the command line in this process; exit status, standard output, standard error."""
    previous = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["steer-engine", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        sys.argv = previous[0]
        signal.signal(signal.SIGTERM, previous[1])
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def one_line(stderr: str) -> str:
    """The error line; fails if there is a traceback."""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    return lines[0]

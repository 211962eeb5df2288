"""Sizes of a Falcon model, read from a checkpoint's config.json in any of its spellings."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError

MAX_CONFIG_BYTES = 10_000_000
# Falcon-180B has 80; bounds what is built from a config before files are read.
MAX_NUM_LAYERS = 1000
MODEL_TYPES = ("falcon", "RefinedWebModel", "RefinedWeb")


@dataclass(frozen=True)
class FalconConfig:
    """Sizes and variant of one Falcon model.

    num_kv_heads: what the attention has: 1 for multi-query (7B), the number of groups for the new
        decoder architecture (40B, 180B, 11B), num_heads for RW-1B.
    num_layer_norms: per block: 1 where attention and MLP of a parallel block share a norm (7B), 2
        where they have one each (40B) and for the sequential block (RW).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    is_parallel: bool
    num_layer_norms: int
    uses_new_decoder: bool
    uses_alibi: bool
    has_bias: bool
    layer_norm_epsilon: float
    rope_theta: float
    max_position_embeddings: int
    ties_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def qkv_size(self) -> int:
        """Rows of the query_key_value matrix."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @classmethod
    def from_directory(cls, directory: Path) -> FalconConfig:
        """Read config.json and, for the end-of-text ids, generation_config.json."""
        path = directory / "config.json"
        values = read_json_object(path)
        generation_path = directory / "generation_config.json"
        if generation_path.exists():
            generation = read_json_object(generation_path)
            if generation.get("eos_token_id") is not None:
                values = values | {"eos_token_id": generation["eos_token_id"]}
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: dict, where: str = "config.json") -> FalconConfig:
        """Build from a parsed config.json; CheckpointError for what this engine does not run."""
        model_type = values.get("model_type")
        if model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"{where}: model_type must be one of {', '.join(MODEL_TYPES)} (the Falcon family), "
                f"got {model_type!r}"
            )
        _refuse_unsupported(values, where)

        def size(*names: str, default: int | None = None) -> int:
            found = next((values[n] for n in names if values.get(n) is not None), default)
            if not isinstance(found, int) or isinstance(found, bool) or found < 1:
                raise CheckpointError(f"{where}: {names[0]} must be a positive int, got {found!r}")
            return found

        hidden_size = size("hidden_size", "n_embed")
        num_heads = size("num_attention_heads", "n_head")
        if hidden_size % num_heads:
            raise CheckpointError(
                f"{where}: hidden_size {hidden_size} is not a multiple of the {num_heads} heads"
            )
        # The old remote code had no flag: RefinedWeb is Falcon-40B, with grouped heads, or RW-1B.
        is_old_40b = model_type == "RefinedWeb" and "n_head_kv" in values
        uses_new_decoder = bool(values.get("new_decoder_architecture", is_old_40b))
        is_parallel = uses_new_decoder or bool(values.get("parallel_attn", True))
        # transformers writes num_kv_heads = number of heads for multi-query models too, so the
        # flag decides.
        if uses_new_decoder:
            num_kv_heads = size("num_kv_heads", "n_head_kv", default=num_heads)
        else:
            num_kv_heads = 1 if values.get("multi_query", True) else num_heads
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"{where}: {num_heads} heads are not a multiple of {num_kv_heads} key-value heads"
            )
        if uses_new_decoder:
            num_layer_norms = values.get("num_ln_in_parallel_attn") or 2
        else:
            num_layer_norms = 1 if is_parallel else 2
        if num_layer_norms not in (1, 2):
            raise CheckpointError(
                f"{where}: num_ln_in_parallel_attn must be 1 or 2, got {num_layer_norms!r}"
            )
        uses_alibi = bool(values.get("alibi", False))
        head_dim = hidden_size // num_heads
        if head_dim % 2 and not uses_alibi:
            raise CheckpointError(f"{where}: head_dim {head_dim} is odd; rotary needs pairs")
        num_layers = size("num_hidden_layers", "n_layer")
        if num_layers > MAX_NUM_LAYERS:
            raise CheckpointError(
                f"{where}: num_hidden_layers must be at most {MAX_NUM_LAYERS}, got {num_layers}"
            )
        vocab_size = size("vocab_size")
        bos_token_ids = _token_ids(values, "bos_token_id", vocab_size, where)
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            ffn_hidden_size=size("ffn_hidden_size", default=4 * hidden_size),
            is_parallel=is_parallel,
            num_layer_norms=num_layer_norms,
            uses_new_decoder=uses_new_decoder,
            uses_alibi=uses_alibi,
            has_bias=bool(values.get("bias", False)),
            layer_norm_epsilon=_positive_number(values, "layer_norm_epsilon", 1e-5, where),
            rope_theta=_positive_number(
                values | (values.get("rope_parameters") or {}), "rope_theta", 10000.0, where
            ),
            max_position_embeddings=size("max_position_embeddings", default=2048),
            ties_word_embeddings=bool(values.get("tie_word_embeddings", True)),
            bos_token_id=bos_token_ids[0] if bos_token_ids else None,
            eos_token_ids=_token_ids(values, "eos_token_id", vocab_size, where),
        )


def read_json_object(path: Path) -> dict:
    """Read a JSON object of at most 10 MB; CheckpointError if the file holds anything else."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"{path}: larger than {MAX_CONFIG_BYTES} bytes, not a config file"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; give the directory of a Hugging Face checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got a {type(value).__name__}")
    return value


def _positive_number(values: dict, name: str, default: float, where: str) -> float:
    value = default if values.get(name) is None else values[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: {name} must be a positive number, got {value!r}")
    return float(value)


def _token_ids(values: dict, name: str, vocab_size: int, where: str) -> tuple[int, ...]:
    """One id, a list of ids, or none."""
    value = values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise CheckpointError(
            f"{where}: {name} must be token ids in [0, {vocab_size}), got {value!r}"
        )
    return tuple(ids)


def _refuse_unsupported(values: dict, where: str) -> None:
    """Refuse, by name, settings under which the forward pass is not what this engine computes."""
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(values.get(name) or {}, dict):
            raise CheckpointError(f"{where}: {name} must be an object, got {values[name]!r}")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    problems = {
        "activation": values.get("activation", "gelu") != "gelu" and values.get("activation"),
        "rope_type": rope_type != "default" and rope_type,
        "apply_residual_connection_post_layernorm": values.get(
            "apply_residual_connection_post_layernorm"
        ),
        "quantization_config": bool(values.get("quantization_config")),
        "new_decoder_architecture with parallel_attn=false": values.get("new_decoder_architecture")
        and values.get("parallel_attn") is False,
    }
    for name, value in problems.items():
        if value:
            raise CheckpointError(f"{where}: {name} ({value}) is not supported by this engine")

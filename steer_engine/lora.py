"""Read PEFT LoRA adapters for Falcon, and refuse by name what cannot be applied exactly.

    y = W x + scale * B (A x)

scale is lora_alpha / r, or lora_alpha / sqrt(r) with rank-stabilised LoRA.
Source: LoRA, Hu et al. 2021 (arXiv:2106.09685); rsLoRA, Kalajdzievski 2023 (arXiv:2312.03732); the
    file format is PEFT's.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoint import (
    LM_HEAD,
    ModuleKind,
    TensorInfo,
    checked_shard,
    hash_files,
    iterate_linears,
    linear_shape,
    order_qkv_rows,
    read_header,
    read_tensor,
)
from .config import FalconConfig, read_json_object
from .errors import CheckpointError, nearest_hint

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
LORA_KEY = re.compile(r"transformer\.h\.(\d+)\.(.+)\.lora_(A|B)\.weight")
# Initialisations that move part of the base's weights into the adapter.
CHANGED_BASE_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraWeights(NamedTuple):
    """One module's update, in fp32.

    a: [r, in_features].
    b: [out_features, r], already multiplied by the scale.
    """

    a: torch.Tensor
    b: torch.Tensor


class _Pair(NamedTuple):
    a: TensorInfo
    b: TensorInfo
    scale: float


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a PEFT adapter rather than a whole model."""
    return (directory / CONFIG_NAME).exists()


@dataclass(frozen=True)
class LoraAdapter:
    """A checked adapter; weights are read on demand.

    pairs: (layer, module) -> where A and B lie.
    head: a replaced lm_head (modules_to_save), or None.
    """

    directory: Path
    config: FalconConfig
    pairs: dict[tuple[int, ModuleKind], _Pair]
    head: TensorInfo | None

    @classmethod
    def open(cls, directory: str | Path, config: FalconConfig) -> LoraAdapter:
        """Check an adapter against the base's config from its headers alone.

        Raises: CheckpointError for adapter kinds that this engine does not apply, for tensors that
            do not fit the base, and for an adapter with neither a LoRA tensor nor an lm_head.
        """
        directory = Path(directory)
        settings = read_json_object(directory / CONFIG_NAME)
        _refuse_unsupported(settings, directory)
        weights_path = directory / WEIGHTS_NAME
        if not weights_path.is_file():
            has_pickle = (directory / "adapter_model.bin").exists()
            remedy = (
                "adapter_model.bin is a pickle, which is never opened; load it with PEFT and call "
                "save_pretrained(dir, safe_serialization=True)"
                if has_pickle
                else "save the adapter with PEFT's save_pretrained"
            )
            raise CheckpointError(f"{weights_path}: no such file; {remedy}")
        checked_shard(directory, WEIGHTS_NAME)
        tensors = _normalised_names(read_header(weights_path), weights_path)
        head = tensors.pop(LM_HEAD, None)
        if head is not None and head.shape != (config.vocab_size, config.hidden_size):
            raise CheckpointError(
                f"{weights_path}: lm_head has shape {list(head.shape)}, the base has "
                f"{[config.vocab_size, config.hidden_size]}; adapters with a resized vocabulary "
                "are not read"
            )
        pairs = _pair_up(tensors, settings, config, weights_path)
        if not pairs and head is None:
            raise CheckpointError(f"{weights_path}: holds no LoRA tensor for a Falcon module")
        return cls(directory, config, pairs, head)

    def read(self, layer: int, kind: ModuleKind) -> LoraWeights | None:
        """A and scaled B of one module, or None if it is not adapted.

        B's rows are ordered as those of Checkpoint.read_linear.
        """
        pair = self.pairs.get((layer, kind))
        if pair is None:
            return None
        name = f"layer {layer} {kind.value}"
        a = read_tensor(f"{name}.lora_A", pair.a).float()
        b = read_tensor(f"{name}.lora_B", pair.b).float() * pair.scale
        if kind is ModuleKind.QKV:
            b = order_qkv_rows(b, self.config)
        return LoraWeights(a, b.contiguous())

    def read_head(self) -> torch.Tensor | None:
        """The replaced lm_head [vocab_size, hidden_size], or None."""
        return None if self.head is None else read_tensor(LM_HEAD, self.head)

    def sha256(self) -> dict[str, str]:
        """SHA-256 of the adapter's files by name."""
        return hash_files([self.directory / CONFIG_NAME, self.directory / WEIGHTS_NAME])


def _refuse_unsupported(settings: dict, directory: Path) -> None:
    where = directory / CONFIG_NAME
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type must be LORA, got {settings.get('peft_type')!r}")
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGED_BASE_INITS):
        raise CheckpointError(
            f"{where}: init_lora_weights={init} changes the base weights; merge the adapter into "
            "its base first (PEFT's merge_and_unload) and pass the merged model as domain"
        )
    refused = {
        "use_dora": "DoRA is not applied; merge it first (merge_and_unload)",
        "lora_bias": "a bias beside B does not fit a layer without bias; merge it first",
        "fan_in_fan_out": "Falcon's linear layers are not transposed",
        "trainable_token_indices": "trained token embeddings are not applied; merge them first",
        "layer_replication": "replicated layers are not supported",
        "use_qalora": "QALoRA is not applied",
        "alora_invocation_tokens": "activated LoRA is not applied",
        "target_parameters": "LoRA on bare parameters is not applied",
        "use_bdlora": "block-diagonal LoRA is not applied",
        "arrow_config": "arrow routing is not applied",
        "kasa_config": "KaSA is not applied; merge it first (merge_and_unload)",
        "monteclora_config": "Monteclora is not applied",
    }
    for name, reason in refused.items():
        if settings.get(name):
            raise CheckpointError(f"{where}: {name} is set: {reason}")
    saved = settings.get("modules_to_save") or []
    if not isinstance(saved, list) or any(m != "lm_head" for m in saved):
        raise CheckpointError(
            f"{where}: modules_to_save holds {saved!r}; only lm_head can be replaced by an adapter"
        )


def _normalised_names(tensors: dict[str, TensorInfo], path: Path) -> dict[str, TensorInfo]:
    """Strip PEFT's and torch.compile's wrappers from the names; two may not become one."""
    normalised: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        short = name.replace("_orig_mod.", "").replace(".default.", ".")
        while short.startswith(PEFT_PREFIX):
            short = short.removeprefix(PEFT_PREFIX)
        short = short.replace(".modules_to_save.", ".")
        if short in normalised:
            raise CheckpointError(
                f"{path}: two tensors are named {short}; save the adapter anew with PEFT"
            )
        normalised[short] = info
    return normalised


def _pair_up(
    tensors: dict[str, TensorInfo], settings: dict, config: FalconConfig, path: Path
) -> dict[tuple[int, ModuleKind], _Pair]:
    modules = {
        f"transformer.h.{layer}.{kind.value}": (layer, kind)
        for layer, kind in iterate_linears(config)
    }
    found: dict[str, dict[str, TensorInfo]] = {}
    unknown = []
    for name, info in tensors.items():
        match = LORA_KEY.fullmatch(name)
        module = match and f"transformer.h.{match[1]}.{match[2]}"
        if module in modules:
            found.setdefault(module, {})[match[3]] = info
        else:
            unknown.append(name)
    if unknown:
        shown = f"{', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}"
        raise CheckpointError(
            f"{path}: {_reason_unknown(unknown[0])}: {shown}{nearest_hint(unknown[0], modules)}"
        )
    pairs = {}
    for module, parts in found.items():
        if set(parts) != {"A", "B"}:
            raise CheckpointError(f"{path}: {module} has lora_{min(parts)} without its partner")
        out_features, in_features = linear_shape(modules[module][1], config)
        rank = _setting_for(module, settings, "r", "rank_pattern", path)
        expected = {"A": (rank, in_features), "B": (out_features, rank)}
        for part, shape in expected.items():
            if parts[part].shape != shape:
                raise CheckpointError(
                    f"{path}: {module}.lora_{part} has shape {list(parts[part].shape)}, "
                    f"base and r imply {list(shape)}; is this adapter of another base model?"
                )
        alpha = _setting_for(module, settings, "lora_alpha", "alpha_pattern", path)
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        pairs[modules[module]] = _Pair(parts["A"], parts["B"], scale)
    return pairs


def _reason_unknown(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "a DoRA magnitude, which is not applied; merge the adapter first"
    if "embedding" in name or "token_adapter" in name:
        return "an adapted or replaced embedding, which is not applied; merge the adapter first"
    if name.endswith("lora_B.bias"):
        return "a LoRA bias, which is not applied; merge the adapter first"
    if name.endswith(".bias"):  # bias="all" trains the norms' biases
        return "a trained bias, which is not applied; merge the adapter first"
    return "a tensor that is not LoRA's A or B of a module of the base"


def _setting_for(module: str, settings: dict, name: str, pattern_name: str, path: Path) -> float:
    """A module's r or lora_alpha.

    As PEFT reads it: that of the first pattern which matches the end of the module's name, else the
    adapter's own.
    """
    where = path.with_name(CONFIG_NAME)
    patterns = settings.get(pattern_name) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{where}: {pattern_name} must be an object, got {patterns!r}")
    value = settings.get(name)
    for pattern, override in patterns.items():
        try:
            is_match = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error as error:
            raise CheckpointError(
                f"{where}: {pattern_name} holds {pattern!r}, no regular expression ({error})"
            ) from None
        if is_match:
            name, value = pattern_name, override
            break
    kinds = int if name in ("r", "rank_pattern") else int | float
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: {name} must hold a positive number, got {value!r}")
    return value

"""Read Falcon checkpoints: check them from the headers, then stream the weights.

Every mismatch is found before a weight is read. Only safetensors is read, never pickle. In the
engine the tensor names of Hugging Face appear here and in lora.py alone; the model sees a layer's
index and a `ModuleKind`.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
import struct
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch

from .config import FalconConfig, read_json_object
from .errors import CheckpointError

# Falcon-180B's header is below 200 kB; the format's own limit of 100 MB would let a crafted file
# take a gigabyte to parse.
MAX_HEADER_BYTES = 4_000_000
MAX_NUM_TENSORS = 20_000
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
# Buffers that old remote-code checkpoints saved beside the weights; they are recomputed, not read.
IGNORED_TENSOR = re.compile(r".*\.(inv_freq|rotary_emb\..*|maybe_rotary\..*)")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

EMBEDDING = "transformer.word_embeddings.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "transformer.ln_f"


class ModuleKind(Enum):
    """The four linear modules of a block; the value is the name below `transformer.h.{i}.`."""

    QKV = "self_attention.query_key_value"
    DENSE = "self_attention.dense"
    UP = "mlp.dense_h_to_4h"
    DOWN = "mlp.dense_4h_to_h"


class TensorInfo(NamedTuple):
    """Where a tensor lies: file, torch dtype, shape, and its byte range in the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def linear_shape(kind: ModuleKind, config: FalconConfig) -> tuple[int, int]:
    """[out_features, in_features] of one linear module."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    return {
        ModuleKind.QKV: (config.qkv_size, hidden),
        ModuleKind.DENSE: (hidden, hidden),
        ModuleKind.UP: (ffn, hidden),
        ModuleKind.DOWN: (hidden, ffn),
    }[kind]


def block_norm_names(config: FalconConfig) -> tuple[str, ...]:
    """A block's LayerNorms in the order attention, MLP (one name: both read the same norm)."""
    if not config.is_parallel:
        return ("input_layernorm", "post_attention_layernorm")
    return ("ln_attn", "ln_mlp") if config.num_layer_norms == 2 else ("input_layernorm",)


def expected_shapes(config: FalconConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds (lm_head included)."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"transformer.h.{layer}"
        for norm in block_norm_names(config):
            shapes[f"{prefix}.{norm}.weight"] = shapes[f"{prefix}.{norm}.bias"] = (hidden,)
        for kind in ModuleKind:
            shape = linear_shape(kind, config)
            shapes[f"{prefix}.{kind.value}.weight"] = shape
            if config.has_bias:
                shapes[f"{prefix}.{kind.value}.bias"] = shape[:1]
    shapes[f"{FINAL_NORM}.weight"] = shapes[f"{FINAL_NORM}.bias"] = (hidden,)
    shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


class Checkpoint:
    """A base or fully fine-tuned checkpoint, checked from its headers; weights come on demand.

    Attributes:
        directory: where the checkpoint lies.
        weight_files: its safetensors files, in name order.
        config: the sizes, from config.json.
        tensors: name -> TensorInfo.
        has_stored_head: whether lm_head is in the files (it may still equal the embedding).
    Raises: CheckpointError, naming file and tensor, for every mismatch between config and files.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{directory}: no such directory; give a Hugging Face checkpoint's"
            )
        # First, because a folder of another format often lacks config.json too.
        self.weight_files = find_weight_files(self.directory)
        self.config = FalconConfig.from_directory(self.directory)
        self.tensors = {
            name: info
            for name, info in read_headers(self.directory, self.weight_files).items()
            if not IGNORED_TENSOR.fullmatch(name)
        }
        self.has_stored_head = LM_HEAD in self.tensors
        self._check_tensors()

    def _check_tensors(self) -> None:
        expected = expected_shapes(self.config)
        required = set(expected)
        if self.config.ties_word_embeddings:
            required.discard(LM_HEAD)
        missing = sorted(required - set(self.tensors))
        unexpected = sorted(set(self.tensors) - set(expected))
        for problem, names in (("missing", missing), ("unexpected", unexpected)):
            if names:
                raise CheckpointError(
                    f"{self.directory}: {len(names)} {problem} tensors ({', '.join(names[:3])}"
                    f"{', ...' if len(names) > 3 else ''}); config.json and the files do not fit"
                )
        for name, info in self.tensors.items():
            if info.shape != expected[name]:
                raise CheckpointError(
                    f"{info.path}: {name} has shape {list(info.shape)}, config.json implies "
                    f"{list(expected[name])}"
                )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, which stands for the checkpoint's."""
        return self.tensors[EMBEDDING].dtype

    def read(self, name: str) -> torch.Tensor:
        """Copy one tensor into memory; CheckpointError if it holds NaN or infinity."""
        return read_tensor(name, self.tensors[name])

    def read_linear(self, layer: int, kind: ModuleKind) -> torch.Tensor:
        """Weight [out_features, in_features]; query_key_value has all q rows, then k, then v."""
        weight = self.read(f"transformer.h.{layer}.{kind.value}.weight")
        return order_qkv_rows(weight, self.config) if kind is ModuleKind.QKV else weight

    def read_linear_bias(self, layer: int, kind: ModuleKind) -> torch.Tensor | None:
        """Bias [out_features] in the order of read_linear's rows; None if the model has none."""
        if not self.config.has_bias:
            return None
        bias = self.read(f"transformer.h.{layer}.{kind.value}.bias")
        return order_qkv_rows(bias, self.config) if kind is ModuleKind.QKV else bias

    def read_norms(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(weight, bias) of the block's norms in the order of block_norm_names."""
        return [
            (self.read(f"{prefix}.weight"), self.read(f"{prefix}.bias"))
            for norm in block_norm_names(self.config)
            for prefix in [f"transformer.h.{layer}.{norm}"]
        ]

    def read_final_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.read(f"{FINAL_NORM}.weight"), self.read(f"{FINAL_NORM}.bias")

    def read_embedding(self) -> torch.Tensor:
        """[vocab_size, hidden_size]"""
        return self.read(EMBEDDING)

    def read_untied_head(self) -> torch.Tensor | None:
        """lm_head [vocab_size, hidden_size]; None where it is tied to or equals the embedding.

        Raises: CheckpointError if config.json ties them and the files hold a different head.
        """
        if not self.has_stored_head:
            return None
        if _same_bytes(self.tensors[LM_HEAD], self.tensors[EMBEDDING]):
            return None
        if self.config.ties_word_embeddings:
            raise CheckpointError(
                f"{self.tensors[LM_HEAD].path}: lm_head.weight differs from the embedding although "
                'config.json ties them; set "tie_word_embeddings": false there to use both'
            )
        return self.read(LM_HEAD)

    def sha256(self) -> dict[str, str]:
        """SHA-256 of the configs, tokenizer.json and every weight file, by file name."""
        return hash_files(
            [
                self.directory / n
                for n in ("config.json", "generation_config.json", "tokenizer.json")
            ]
            + self.weight_files
        )


def order_qkv_rows(rows: torch.Tensor, config: FalconConfig) -> torch.Tensor:
    """Reorder query_key_value rows [qkv_size, ...] to all q, then all k, then all v.

    Every Falcon variant stores one group (its q heads, k, v) per KV head: multi-query is one group,
    RW-1B is num_heads groups of one q head each.
    """
    num_queries = config.num_heads // config.num_kv_heads
    groups = rows.view(config.num_kv_heads, num_queries + 2, config.head_dim, *rows.shape[1:])
    parts = (groups[:, :num_queries], groups[:, -2], groups[:, -1])
    return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in parts])


def find_weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order.

    Raises: CheckpointError if there are none; for other formats it names the way out.
    """
    # Before the index, as transformers does: a fine-tune may be saved over a sharded base.
    if (directory / SINGLE_NAME).exists():
        return [checked_shard(directory, SINGLE_NAME)]
    if (directory / INDEX_NAME).exists():
        weight_map = read_weight_map(directory / INDEX_NAME)
        return [checked_shard(directory, name) for name in sorted(set(weight_map.values()))]
    names = {p.name for p in directory.iterdir()}
    adapters = sorted(p.parent.name for p in directory.glob("*/adapter_config.json"))
    if any(n.endswith(".distcp") or n.startswith("pytorch_model_fsdp") for n in names):
        remedy = "an unmerged FSDP checkpoint; merge it with `accelerate merge-weights`"
    elif "zero_to_fp32.py" in names or any(n.startswith("global_step") for n in names):
        remedy = "an unmerged DeepSpeed checkpoint; merge it with its zero_to_fp32.py"
    elif any(n.endswith((".bin", ".pt", ".pth")) for n in names):
        remedy = (
            "only pickle files, which are never opened; convert with "
            '`python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('DIR').save_pretrained('NEW_DIR')\"`"
        )
    elif "adapter_config.json" in names:
        remedy = "a LoRA adapter; pass it as domain, together with its base"
    elif adapters:
        remedy = f"adapters in subfolders ({', '.join(adapters)}); pass one of them as domain"
    else:
        remedy = f"neither {SINGLE_NAME} nor {INDEX_NAME}"
    raise CheckpointError(f"{directory}: holds {remedy}")


def read_weight_map(path: Path) -> dict[str, str]:
    """The index's map from tensor name to shard name, with every shard name checked."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must be a non-empty object")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise CheckpointError(
                f"{path}: shard of {tensor} must be a bare *.safetensors file name, got {name!r}"
            )
    return weight_map


def checked_shard(directory: Path, name: str) -> Path:
    """The shard's path.

    Raises: CheckpointError if it is missing, or a link out of the directory and its hub cache.
    """
    path = directory / name
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file, though the checkpoint names it; download it again"
        )
    root = directory.resolve()
    # The hub cache keeps snapshots/REVISION/** as links to REPOSITORY/blobs/*.
    hub_blobs = next((p.parent / "blobs" for p in root.parents if p.name == "snapshots"), root)
    target = path.resolve()
    if not (target.is_relative_to(root) or target.is_relative_to(hub_blobs)):
        raise CheckpointError(
            f"{path}: links to {target}, outside the checkpoint; copy the file in"
        )
    return path


def read_headers(directory: Path, files: list[Path]) -> dict[str, TensorInfo]:
    """All tensors of the files.

    Raises: CheckpointError if a name occurs twice, or not where the index says.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for name, info in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: {name} is also in {tensors[name].path.name}")
            tensors[name] = info
    index = directory / INDEX_NAME
    if index.exists() and index.is_file() and (not files or files[0].name != SINGLE_NAME):
        for name, shard in read_weight_map(index).items():
            if name not in tensors or tensors[name].path.name != shard:
                raise CheckpointError(f"{index}: puts {name} in {shard}, which does not hold it")
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Parse and check one safetensors header without reading weights.

    The safetensors library checks lengths, offsets, holes and overlaps; what it accepts and this
    engine does not (long headers, repeated names, absurd counts, other dtypes) is checked here.
    """
    try:
        with open(path, "rb") as file:
            (header_len,) = struct.unpack("<Q", file.read(8))
            if header_len > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: damaged or not safetensors (header of {header_len} bytes, "
                    f"{MAX_HEADER_BYTES} are read)"
                )
            header = json.loads(file.read(header_len), object_pairs_hook=_unique_names)
        if isinstance(header, dict) and len(header) > MAX_NUM_TENSORS + ("__metadata__" in header):
            raise CheckpointError(f"{path}: {len(header)} tensors, more than any Falcon has")
        with safetensors.safe_open(path, framework="pt"):
            pass
    except CheckpointError:
        raise
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        RecursionError,
        struct.error,
    ) as error:
        # The library quotes what it could not parse, however long.
        reason = str(error) if len(str(error)) < 300 else f"{str(error)[:300]}..."
        raise CheckpointError(
            f"{path}: damaged or not safetensors ({reason}); download it again"
        ) from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} has dtype {entry['dtype']}; F32, F16 and BF16 are read"
            )
        begin, end = (8 + header_len + offset for offset in entry["data_offsets"])
        tensors[name] = TensorInfo(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin, end)
    return tensors


def _unique_names(pairs: list[tuple[str, object]]) -> dict:
    names = dict(pairs)
    if len(names) != len(pairs):
        seen: set[str] = set()
        repeated = next(n for n, _ in pairs if n in seen or seen.add(n))
        raise ValueError(f"the name {repeated!r} occurs twice")
    return names


def read_tensor(name: str, info: TensorInfo) -> torch.Tensor:
    """Copy one tensor out of its memory-mapped file, and refuse NaN and infinity.

    The mapping covers this tensor alone and is dropped at once, so the resident pages of a large
    file never add up.
    """
    if math.prod(info.shape) == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    start = info.begin - info.begin % mmap.ALLOCATIONGRANULARITY
    try:
        with open(info.path, "rb") as file:
            mapped = mmap.mmap(
                file.fileno(), info.end - start, offset=start, access=mmap.ACCESS_READ
            )
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{info.path}: {name} cannot be mapped ({error})") from None
    with mapped, memoryview(mapped) as view, view[info.begin - start :] as part:
        # Copied as bytes: a tensor may start at any address, and clone() owns aligned memory.
        owned = torch.empty(info.end - info.begin, dtype=torch.uint8)
        memoryview(owned.numpy())[:] = part
    tensor = owned.view(info.dtype).view(info.shape)
    low, high = torch.aminmax(tensor)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise CheckpointError(
            f"{info.path}: {name} holds NaN or infinity; the checkpoint is damaged"
        )
    return tensor


def _same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    """Compare two tensors in pieces, without holding either in memory."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with open(a.path, "rb") as file_a, open(b.path, "rb") as file_b:
        file_a.seek(a.begin)
        file_b.seek(b.begin)
        remaining = a.end - a.begin
        while remaining:
            piece = min(remaining, 1 << 24)
            if file_a.read(piece) != file_b.read(piece):
                return False
            remaining -= piece
    return True


def hash_files(paths: list[Path]) -> dict[str, str]:
    """SHA-256 of the files that exist, by file name."""
    digests = {}
    for path in paths:
        if path.exists():
            with open(path, "rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def iterate_linears(config: FalconConfig) -> Iterator[tuple[int, ModuleKind]]:
    """Every (layer, module) in the order of the forward pass."""
    for layer in range(config.num_layers):
        for kind in ModuleKind:
            yield layer, kind

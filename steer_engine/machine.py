"""The machine's side of a run: device, dtype, backend, and memory for the KV cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from . import ops
from .config import FalconConfig
from .errors import CapacityError, check_number
from .guidance import PassKind

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INT8 = "int8"
BLOCK_SIZE = 64  # tokens per block of the KV cache
CPU_CACHE_SHARE = 0.4  # of the memory that is available once the weights are loaded
CUDA_CACHE_SHARE = 0.9
CAPTURABLE_BACKENDS = ("triton", "cuda")  # the reference's attention asks the device for sizes
STEPS_PER_POLL = {"cpu": 1, "cuda": 8}
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class EngineConfig:
    """The machine's side of a run. "auto" and None are resolved once, by `resolve`.

    Attributes:
        device: "cpu", "cuda", "cuda:1" or "auto".
        dtype: "float32", "bfloat16" or "auto" (bf16 where it is fast).
        weight_dtype: "int8" (quantised per output channel, see kernels/reference/linear.py; half
            the bytes of bf16, so up to twice the speed where few sequences run, and a small loss
            of quality) or "auto" (as dtype; backend cpu compresses bf16 without loss, see
            csrc/cpu/compressed_weight.h). Inputs, cache and an adapter stay in dtype.
        backend: "reference", "cpu", "triton", "cuda" or "auto"; int8 needs one of the first two.
        max_num_seqs: sequences that run side by side.
        max_model_len: longest prompt plus completion, in tokens; None: the model's
            max_position_embeddings.
        kv_cache_gib: size of the KV cache; None: enough for max_num_seqs sequences of max_model_len
            with three passes, within 40 % of the free memory (90 % on a GPU).
        max_prefill_tokens: prompt tokens per forward; decoding waits for one such forward at most.
        fold_head: combine the passes in front of the LM head instead of behind it where that saves
            rows (head.py).
        steps_per_poll: decode steps between two looks of the host at the tokens; None: 8 on a GPU,
            which runs on in the meantime, 1 on a CPU. Texts do not depend on it.
        cuda_graphs: replay decode steps as CUDA graphs (decode_graphs.py); None: on a GPU with the
            triton and cuda backends. Texts do not depend on it.
    """

    device: str = "auto"
    dtype: str = "auto"
    weight_dtype: str = "auto"
    backend: str = "auto"
    max_num_seqs: int = 64
    max_model_len: int | None = None
    kv_cache_gib: float | None = None
    max_prefill_tokens: int = 512
    fold_head: bool = True
    steps_per_poll: int | None = None
    cuda_graphs: bool | None = None

    def __post_init__(self):
        check_number("max_num_seqs", self.max_num_seqs, low=1, is_int=True)
        check_number("max_prefill_tokens", self.max_prefill_tokens, low=1, is_int=True)
        if self.max_model_len is not None:
            check_number("max_model_len", self.max_model_len, low=2, is_int=True)
        if self.steps_per_poll is not None:
            check_number("steps_per_poll", self.steps_per_poll, low=1, is_int=True)
        if self.kv_cache_gib is not None:
            check_number("kv_cache_gib", self.kv_cache_gib, low=0.0, low_is_open=True)
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype must be auto, {' or '.join(DTYPES)}, got {self.dtype!r}")
        if self.weight_dtype not in ("auto", INT8, *DTYPES):
            raise ValueError(f"weight_dtype must be auto or int8, got {self.weight_dtype!r}")

    def resolve(self, model: FalconConfig) -> EngineConfig:
        """The same configuration without "auto" and None.

        kv_cache_gib may stay None: num_cache_blocks decides it once the weights are loaded.
        Raises: ValueError if a setting does not fit the machine or the model.
        """
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"device {name} is not available: this torch sees no CUDA GPU; use cpu"
            )
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
        dtype = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if has_fast_bf16(device) else "float32"
        backend = ops.resolve_backend(self.backend, device)
        weight_dtype = dtype if self.weight_dtype == "auto" else self.weight_dtype
        if weight_dtype not in (INT8, dtype):
            raise ValueError(
                f"weight_dtype must be int8 or the dtype, {dtype}, got {weight_dtype!r}; use auto"
            )
        if weight_dtype == INT8 and not ops.has_int8(backend):
            raise ValueError(f"weight_dtype int8 needs backend cpu or reference, got {backend}")
        max_model_len = self.max_model_len or model.max_position_embeddings
        # Alibi extrapolates. Rotary positions beyond the trained context raise no error and give
        # bad text.
        if max_model_len > model.max_position_embeddings and not model.uses_alibi:
            raise ValueError(
                f"max_model_len {max_model_len} is over the model's context of "
                f"{model.max_position_embeddings} tokens"
            )
        backend = ops.resolve_backend(self.backend, device)
        can_capture = device.type == "cuda" and backend in CAPTURABLE_BACKENDS
        if self.cuda_graphs and not can_capture:
            raise ValueError(
                f"cuda_graphs needs a GPU and backend {' or '.join(CAPTURABLE_BACKENDS)}, got "
                f"device {device} and backend {backend}; leave it unset"
            )
        return replace(
            self,
            device=str(device),
            dtype=dtype,
            weight_dtype=weight_dtype,
            backend=backend,
            max_model_len=max_model_len,
            cuda_graphs=can_capture if self.cuda_graphs is None else self.cuda_graphs,
            steps_per_poll=self.steps_per_poll or STEPS_PER_POLL[device.type],
        )


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 have hardware support."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class MemoryPlan(NamedTuple):
    """What an engine holds, in bytes, and what its KV cache is good for.

    weight_bytes: all weights, packed.
    cache_bytes: of num_blocks blocks of BLOCK_SIZE tokens.
    num_wanted: blocks with which max_num_seqs sequences of max_model_len run with three passes;
        with fewer, sequences wait for each other.
    """

    weight_bytes: int
    cache_bytes: int
    num_blocks: int
    num_wanted: int

    def describe(self) -> str:
        """One line for people."""
        blocks = f"{self.num_blocks} blocks of {BLOCK_SIZE} tokens"
        if self.num_blocks < self.num_wanted:
            blocks += f" of {self.num_wanted} that full batches of the longest sequences need"
        return (
            f"weights {self.weight_bytes / 2**30:.2f} GiB, "
            f"KV cache {self.cache_bytes / 2**30:.2f} GiB ({blocks})"
        )


def blocks_wanted(config: EngineConfig) -> int:
    """See MemoryPlan.num_wanted. config: resolved."""
    blocks_per_pass = -(-config.max_model_len // BLOCK_SIZE)
    return config.max_num_seqs * len(PassKind) * blocks_per_pass


def max_cache_bytes(device: torch.device) -> int:
    """The KV cache's share of the memory that is free now."""
    share = CUDA_CACHE_SHARE if device.type == "cuda" else CPU_CACHE_SHARE
    return int(available_bytes(device) * share)


@contextlib.contextmanager
def naming_settings(doing: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory into a CapacityError.

    doing: what was being done.
    remedy: the settings to change.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The CPU allocator raises a plain RuntimeError; the GPU's has a class of its own.
        is_out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_out_of_memory and "can't allocate memory" not in str(error):
            raise
        raise CapacityError(f"out of memory while {doing}: {remedy}") from None


def num_cache_blocks(config: EngineConfig, model: FalconConfig) -> int:
    """Blocks of the KV cache: kv_cache_gib, else as many as can be used within free memory.

    config: resolved.
    Raises: CapacityError if not one block fits.
    """
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    block_bytes = 2 * model.num_layers * BLOCK_SIZE * model.num_kv_heads * model.head_dim
    block_bytes *= dtype.itemsize
    if config.kv_cache_gib is not None:
        num_blocks = int(config.kv_cache_gib * 2**30) // block_bytes
    else:
        num_blocks = min(blocks_wanted(config), max_cache_bytes(device) // block_bytes)
    if num_blocks < 1:
        raise CapacityError(
            f"the KV cache holds no block of {BLOCK_SIZE} tokens ({block_bytes / 2**20:.1f} MiB): "
            "raise kv_cache_gib or free memory"
        )
    return num_blocks


def available_bytes(device: torch.device) -> int:
    """Bytes that can be allocated now, on a CPU within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {name: int(rest.split()[0]) * 1024 for name, rest in (li.split(":") for li in lines)}
    available = values["MemAvailable"]
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((CGROUP / "memory.current").read_text())
            available = min(available, max(int(limit) - used, 0))
    except (OSError, ValueError):
        pass  # no container limit to read
    return available

"""The one place that picks an implementation of an op: by backend name, or by device with "auto".

`reference` is plain PyTorch and defines every op; `cpu` is the compiled library (csrc); `triton`
has GPU kernels; `cuda` has the sampler in CUDA C++ and Triton's ops, or the reference's, for the
rest. All offer the same functions with the same signatures (but for pack_int8_weight, which
`reference` and `cpu` have), so the model holds one module of them and calls it:

    ops.implementation(ops.resolve_backend("auto", device)).layer_norm(...)

The functions at the end of this file do that for one call: ops.layer_norm(..., backend="auto").
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from .kernels import reference

BACKENDS = {
    "reference": "reference",
    "cpu": "cpu",
    "triton": "triton_ops",
    "cuda": "cuda",
}  # name: its module in kernels/
LIBRARY_PATH = Path(__file__).parent / "_csrc.so"
logger = logging.getLogger(__name__)


@functools.cache
def _load_library() -> str | None:
    """Load csrc once; the reason it is unavailable, or None."""
    if not LIBRARY_PATH.exists():
        return "not compiled; install again where a C++ compiler and CMake are found"
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        return f"{LIBRARY_PATH.name} does not load ({str(error).splitlines()[0]}); install again"
    return None


def is_triton_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors (slow; for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable_reason(backend: str) -> str | None:
    """Why a backend cannot be used here, or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return _load_library()
    if backend == "cuda":
        reason = _load_library()
        if reason is None and not torch.ops.steer_engine.cuda_archs():
            reason = "compiled without CUDA; install again where nvcc is found"
        return reason or (None if torch.cuda.is_available() else "needs a CUDA GPU")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run `pip install triton`"
    if torch.cuda.is_available() or is_triton_interpreted():
        return None
    return "needs a CUDA GPU"


def resolve_backend(backend: str, device: torch.device) -> str:
    """Turn "auto" into a backend's name, and check that a named one exists and fits the device.

    Raises: ValueError naming the choices, or why the backend is not available.
    """
    if backend == "auto":
        # The GPU's kernels have not run on a GPU yet: they are there to be asked for by name.
        if device.type != "cpu":
            return "reference"
        reason = unavailable_reason("cpu")
        if reason is not None:
            logger.warning(
                "the compiled CPU kernels are missing (%s); the slow reference serves", reason
            )
        return "reference" if reason else "cpu"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = unavailable_reason(backend)
    if reason is not None:
        raise ValueError(f"backend {backend} is not available: {reason}")
    if backend != "reference" and device.type not in _devices(backend):
        raise ValueError(
            f"backend {backend} does not run on device {device}; use auto or reference"
        )
    return backend


def _devices(backend: str) -> tuple[str, ...]:
    """The device types on which a backend other than the reference runs here."""
    if backend == "cpu":
        return ("cpu",)
    return ("cuda", "cpu") if backend == "triton" and is_triton_interpreted() else ("cuda",)


def cpu_isa() -> str:
    """The instruction set that the C++ kernels use on this machine."""
    return torch.ops.steer_engine.cpu_isa()


def implementation(backend: str) -> ModuleType:
    """The module of functions of a resolved backend."""
    return importlib.import_module(f".kernels.{BACKENDS[backend]}", __package__)


def has_int8(backend: str) -> bool:
    """Whether a resolved backend multiplies with weights in int8."""
    return hasattr(implementation(backend), "pack_int8_weight")


def guided_probs(logits, weights, **arguments) -> torch.Tensor:
    """The distribution that guided_sample draws from, by the reference on every backend."""
    return reference.guided_probs(logits, weights, **arguments)


def _op(name: str) -> Callable:
    """The op of this name, with `backend` as one more argument."""
    definition = getattr(reference, name)

    @functools.wraps(definition)
    def call(tensor, *arguments, backend: str = "auto", **named):
        module = implementation(resolve_backend(backend, tensor.device))
        return getattr(module, name)(tensor, *arguments, **named)

    return call


grouped_linear = _op("grouped_linear")  # its weights: of the same backend's pack_weight
guided_sample = _op("guided_sample")
layer_norm = _op("layer_norm")
linear = _op("linear")  # its weight: of the same backend's pack_weight
mqa_decode = _op("mqa_decode")
pack_weight = _op("pack_weight")
paged_attention = _op("paged_attention")
rotary_and_store = _op("rotary_and_store")

"""What the benches share: which implementations run here, and how fast this machine's memory is."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from steer_engine import ops

# device:implementation; `torch` is the fastest plain PyTorch expression, written in each bench.
IMPLEMENTATIONS = [
    "cpu:torch", "cpu:reference", "cpu:cpu",
    "cuda:torch", "cuda:reference", "cuda:triton", "cuda:cuda",
]  # fmt: skip
SECONDS_PER_BENCH = 2.0
MAX_RELATIVE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # Frobenius, against fp64


def parse(implementation: str, op: str) -> tuple[torch.device, ModuleType | None]:
    """The device, and the backend's module (None: plain torch); skips what does not run here."""
    device, name = implementation.split(":")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if name == "torch":
        return torch.device(device), None
    reason = ops.unavailable_reason(name)
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    module = ops.implementation(name)
    home = getattr(module, op).__module__.removeprefix("steer_engine.kernels.").split(".")[0]
    # A backend without a kernel of its own runs the reference's, or Triton's in place of CUDA's.
    if (home == "reference") != (name == "reference") or (name == "cuda" and home != "cuda"):
        pytest.skip(f"backend {name} has no {op} of its own, it runs that of {home}")
    return torch.device(device), module


@functools.cache
def bytes_per_second(device: torch.device) -> float:
    """Memory bandwidth, measured: the best of a few sums over 256 MB (CPU) or copies (GPU)."""
    if device.type == "cuda":
        source = torch.randn(1 << 28, device=device)
        target = torch.empty_like(source)
        best_s = float("inf")
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            best_s = min(best_s, start.elapsed_time(end) / 1e3)
        return 2 * source.nbytes / best_s
    source = torch.ones(1 << 26)
    best_s = float("inf")
    for _ in range(7):
        started_at = time.perf_counter()
        source.sum()
        best_s = min(best_s, time.perf_counter() - started_at)
    return source.nbytes / best_s


def run(benchmark, call: Callable, num_bytes: int, device: torch.device, **info) -> None:
    """Time call and note its floor, num_bytes at the measured bandwidth, and the share reached.

    On a GPU a call is timed to its end, launch included; gpu_check.py times graph replays.
    """

    def call_and_wait():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    bandwidth = bytes_per_second(device)
    call_and_wait()
    started_at = time.perf_counter()
    call_and_wait()
    rounds = int(SECONDS_PER_BENCH / (time.perf_counter() - started_at))
    benchmark.pedantic(call_and_wait, rounds=min(100, max(5, rounds)))
    floor_us = num_bytes / bandwidth * 1e6
    benchmark.extra_info |= info | {
        "threads": torch.get_num_threads(),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "floor_us": round(floor_us, 2),
    }
    if benchmark.stats is not None:  # None with --benchmark-disable
        share = floor_us / (benchmark.stats.stats.median * 1e6)
        benchmark.extra_info["share_of_floor"] = round(share, 3)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm()).item()


def check(got: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    error = relative_error(got, expected)
    assert error < MAX_RELATIVE_ERROR[got.dtype], f"{name}: relative error {error:.2e}"

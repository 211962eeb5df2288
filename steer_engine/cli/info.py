"""`steer-engine info`: what this machine offers."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.table import Table

from .. import ops
from ..machine import available_bytes, has_fast_bf16, max_cache_bytes
from .console import out
from .typer_options import Debug


def info(debug: Debug = False) -> None:
    """Show device, memory, backends and versions."""
    table = Table(show_header=False)
    table.add_row("steer-engine", version("steer-engine"))
    table.add_row("python", platform.python_version())
    for package in ("torch", "triton", "safetensors", "tokenizers", "transformers", "peft"):
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    table.add_row("device", f"{device} {name}".strip())
    table.add_row("threads", str(torch.get_num_threads()))
    table.add_row("free memory", f"{available_bytes(device) / 2**30:.1f} GiB")
    table.add_row("KV cache at most", f"{max_cache_bytes(device) / 2**30:.1f} GiB of it")
    table.add_row("fast bf16", "yes" if has_fast_bf16(device) else "no")
    for backend in ops.BACKENDS:
        reason = ops.unavailable_reason(backend)
        table.add_row(f"backend {backend}", f"no: {reason}" if reason else _backend_detail(backend))
    out.print(table)


def _backend_detail(backend: str) -> str:
    return f"yes ({ops.cpu_isa()})" if backend == "cpu" else "yes"

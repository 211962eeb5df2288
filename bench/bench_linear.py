"""What does Falcon-7B's widest product cost by rows, against F.linear and its epilogue?

    python -m pytest bench/bench_linear.py --benchmark-only

bf16, 4544 -> 22848 (up and qkv in one), GELU on the first 18176 outputs. `torch` is F.linear
(cuBLAS on a GPU), whose result for a row may depend on the number of rows; ours may not. Checked
against fp64 before it is timed. Floor: every byte of the weight, x and out once.
"""

from __future__ import annotations

import functools

import measure
import pytest
import torch
import torch.nn.functional as F

IN_FEATURES, OUT_FEATURES, GELU_COLUMNS = 4544, 22848, 18176
BF16 = torch.bfloat16


@functools.cache
def make_weight(device: torch.device) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT_FEATURES, IN_FEATURES, generator=g) * IN_FEATURES**-0.5
    return weight.to(device, BF16)


@functools.lru_cache(maxsize=1)
def pack(implementation: str, device: torch.device, module):
    return module.pack_weight(make_weight(device))


def in_fp64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of the first row, a tenth of the columns on either side of GELU's end: fp64 is slow."""
    columns = torch.arange(0, OUT_FEATURES, 10, device=x.device)
    y = x[:1].double() @ weight[columns].double().T
    return torch.where(columns < GELU_COLUMNS, F.gelu(y), y)


@pytest.mark.parametrize("num_rows", [1, 3, 12, 48])
@pytest.mark.parametrize("implementation", measure.IMPLEMENTATIONS)
def test_linear(benchmark, implementation, num_rows):
    device, module = measure.parse(implementation, "linear")
    x = torch.randn(num_rows, IN_FEATURES, generator=torch.Generator().manual_seed(1))
    x = x.to(device, BF16)
    out = torch.empty(num_rows, OUT_FEATURES, dtype=BF16, device=device)
    weight = make_weight(device)
    packed = None if module is None else pack(implementation, device, module)

    def call() -> None:
        if module is None:
            y = F.linear(x, weight)
            out[:, :GELU_COLUMNS] = F.gelu(y[:, :GELU_COLUMNS])
            out[:, GELU_COLUMNS:] = y[:, GELU_COLUMNS:]
        else:
            module.linear(x, packed, out, gelu_columns=GELU_COLUMNS)

    call()
    measure.check(out[:1, ::10], in_fp64(x, weight), implementation)
    num_bytes = weight.nbytes + x.nbytes + out.nbytes
    measure.run(benchmark, call, num_bytes, device, num_rows=num_rows)

"""What does a LayerNorm over Falcon-7B's hidden size cost, against F.layer_norm and a cast?

    python -m pytest bench/bench_layer_norm.py --benchmark-only

fp32 in, bf16 out, as in the model. Checked against fp64 before it is timed. Floor: every byte of x,
out, weight and bias once.
"""

from __future__ import annotations

import measure
import pytest
import torch
import torch.nn.functional as F

HIDDEN_SIZE = 4544
EPS = 1e-5


@pytest.mark.parametrize("num_rows", [3, 48, 768])
@pytest.mark.parametrize("implementation", measure.IMPLEMENTATIONS)
def test_layer_norm(benchmark, implementation, num_rows):
    device, module = measure.parse(implementation, "layer_norm")
    g = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(num_rows, HIDDEN_SIZE, generator=g) + 2).to(device)
    weight, bias = torch.randn(2, HIDDEN_SIZE, generator=g).to(device)
    out = torch.empty(num_rows, HIDDEN_SIZE, dtype=torch.bfloat16, device=device)

    def call() -> None:
        if module is None:
            out.copy_(F.layer_norm(x, (HIDDEN_SIZE,), weight, bias, EPS))
        else:
            module.layer_norm(x, weight, bias, EPS, out)

    call()
    expected = F.layer_norm(x.double(), (HIDDEN_SIZE,), weight.double(), bias.double(), EPS)
    measure.check(out, expected, implementation)
    num_bytes = x.nbytes + out.nbytes + weight.nbytes + bias.nbytes
    measure.run(benchmark, call, num_bytes, device, num_rows=num_rows)

"""What does rotating 71 query heads and a key, and writing K and V, cost for a prefill's rows?

    python -m pytest bench/bench_rotary_and_store.py --benchmark-only

bf16, Falcon-7B's heads. `torch` is the usual x * cos + rotate_half(x) * sin in bf16 and two index
copies. Checked against fp64 before it is timed. Floor: qkv read and its rotated part written, K and
V written.
"""

from __future__ import annotations

import measure
import pytest
import torch

NUM_HEADS, HEAD_DIM, BLOCK_SIZE, MAX_MODEL_LEN = 71, 64, 64, 2048
BF16 = torch.bfloat16


def rotary_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.outer(torch.arange(MAX_MODEL_LEN), frequencies)
    return angles.cos().to(device), angles.sin().to(device)


def rotate_with_torch(qkv, cos, sin, positions, slots, k_cache, v_cache) -> None:
    heads = qkv.view(len(qkv), -1, HEAD_DIM)
    x = heads[:, : NUM_HEADS + 1]
    c, s = (t[positions].to(BF16).repeat(1, 2)[:, None] for t in (cos, sin))
    x1, x2 = x.chunk(2, dim=-1)
    x.copy_(x * c + torch.cat((-x2, x1), dim=-1) * s)
    k_cache.view(-1, HEAD_DIM).index_copy_(0, slots, heads[:, NUM_HEADS])
    v_cache.view(-1, HEAD_DIM).index_copy_(0, slots, heads[:, NUM_HEADS + 1])


@pytest.mark.parametrize("num_rows", [3, 48, 768])
@pytest.mark.parametrize("implementation", measure.IMPLEMENTATIONS)
def test_rotary_and_store(benchmark, implementation, num_rows):
    device, module = measure.parse(implementation, "rotary_and_store")
    cos, sin = rotary_tables(device)
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(num_rows, (NUM_HEADS + 2) * HEAD_DIM, generator=g).to(device, BF16)
    caches = [
        torch.zeros(num_rows // BLOCK_SIZE + 1, BLOCK_SIZE, 1, HEAD_DIM, dtype=BF16, device=device)
        for _ in range(2)
    ]
    positions = torch.randint(MAX_MODEL_LEN, (num_rows,), generator=g).int().to(device)
    slots = torch.randperm(num_rows, generator=g).to(device)
    before = qkv.double().view(num_rows, -1, HEAD_DIM)

    def call() -> None:
        if module is None:
            rotate_with_torch(qkv, cos, sin, positions, slots, *caches)
        else:
            module.rotary_and_store(qkv, cos, sin, positions, slots, NUM_HEADS, *caches)

    call()
    x1, x2 = before[:, : NUM_HEADS + 1].chunk(2, dim=-1)
    c, s = (t[positions.long()].double()[:, None] for t in (cos, sin))
    expected = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)
    rotated = qkv.view(num_rows, -1, HEAD_DIM)[:, : NUM_HEADS + 1]
    measure.check(rotated, expected, implementation)
    measure.check(caches[0].view(-1, HEAD_DIM)[slots], expected[:, NUM_HEADS], "k_cache")
    # Calls rotate what the last one rotated: other values, the same work.
    num_bytes = 2 * qkv.nbytes + 2 * num_rows * HEAD_DIM * 2
    measure.run(benchmark, call, num_bytes, device, num_rows=num_rows)

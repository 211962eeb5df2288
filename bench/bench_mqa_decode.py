"""What does attention over a paged cache cost: one token for each of many sequences (decode), and
all tokens of one prompt (prefill)?

    python -m pytest bench/bench_mqa_decode.py --benchmark-only

bf16, 71 query heads on one K and V head. `torch` is F.scaled_dot_product_attention on K and V that
lie contiguous already, without rotary, cache writes or page look-up: a favour to it. Checked
against fp64 before it is timed. Floor: K and V of every sequence once, qkv and out.
"""

from __future__ import annotations

from typing import NamedTuple

import measure
import pytest
import torch
import torch.nn.functional as F
from bench_rotary_and_store import BLOCK_SIZE, HEAD_DIM, NUM_HEADS, rotary_tables

BF16 = torch.bfloat16
SCALE = HEAD_DIM**-0.5


class Pages(NamedTuple):
    """Sequences of equal length in shuffled pages, keys [num_seqs, seq_len, head_dim] beside."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def random(cls, num_seqs: int, seq_len: int, device: torch.device) -> Pages:
        g = torch.Generator().manual_seed(0)
        blocks_per_seq = -(-seq_len // BLOCK_SIZE)
        num_blocks = num_seqs * blocks_per_seq
        block_tables = torch.randperm(num_blocks, generator=g).int().view(num_seqs, -1).to(device)
        caches = torch.randn(2, num_blocks, BLOCK_SIZE, 1, HEAD_DIM, generator=g).to(device, BF16)
        keys, values = (c[block_tables.long()].flatten(1, 3)[:, :seq_len] for c in caches)
        return cls(*caches, block_tables, keys, values)


def in_fp64(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """q: [num_heads, head_dim], keys and values [num_keys, head_dim]."""
    scores = q.double() @ keys.double().T * SCALE
    return scores.softmax(dim=-1) @ values.double()


@pytest.mark.parametrize("num_seqs, seq_len", [(3, 200), (3, 1000), (48, 200), (192, 1000)])
@pytest.mark.parametrize("implementation", measure.IMPLEMENTATIONS)
def test_decode(benchmark, implementation, num_seqs, seq_len):
    device, module = measure.parse(implementation, "mqa_decode")
    if device.type == "cpu" and num_seqs * seq_len > 10_000:
        pytest.skip("this size is for GPUs")
    pages = Pages.random(num_seqs, seq_len, device)
    cos, sin = rotary_tables(device)
    qkv = torch.randn(num_seqs, (NUM_HEADS + 2) * HEAD_DIM, device=device).to(BF16)
    table_ids = torch.arange(num_seqs, dtype=torch.int32, device=device)
    seq_lens = torch.full_like(table_ids, seq_len)
    out = torch.empty(num_seqs, NUM_HEADS * HEAD_DIM, dtype=BF16, device=device)
    # With one K and V head the query heads can stand as queries: PyTorch's fastest way by far.
    q = qkv[:, : NUM_HEADS * HEAD_DIM].view(num_seqs, 1, NUM_HEADS, HEAD_DIM)
    where = (pages.k_cache, pages.v_cache, pages.block_tables, table_ids, seq_lens)

    def call() -> None:
        if module is None:
            keys, values = (t[:, None] for t in (pages.keys, pages.values))
            attended = F.scaled_dot_product_attention(q, keys, values)
            out.copy_(attended.flatten(1))
        else:
            module.mqa_decode(qkv, cos, sin, *where, None, NUM_HEADS, SCALE, out)

    given = qkv[0].double().view(-1, HEAD_DIM)
    expected_q, keys, values = given[:NUM_HEADS], pages.keys[0].double(), pages.values[0].double()
    if module is not None:  # rotary and the new token's K and V are its work, too
        x1, x2 = given[: NUM_HEADS + 1].chunk(2, dim=-1)
        c, s = cos[seq_len - 1].double(), sin[seq_len - 1].double()
        rotated = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)
        expected_q = rotated[:NUM_HEADS]
        keys = torch.cat((keys[:-1], rotated[NUM_HEADS:]))
        values = torch.cat((values[:-1], given[NUM_HEADS + 1 :]))
    call()
    expected = in_fp64(expected_q, keys, values)
    measure.check(out[0].view(NUM_HEADS, HEAD_DIM), expected, implementation)
    num_bytes = pages.keys.nbytes + pages.values.nbytes + qkv.nbytes + out.nbytes
    measure.run(benchmark, call, num_bytes, device, num_seqs=num_seqs, seq_len=seq_len)


@pytest.mark.parametrize("seq_len", [64, 256, 1000])
@pytest.mark.parametrize("implementation", measure.IMPLEMENTATIONS)
def test_prefill(benchmark, implementation, seq_len):
    device, module = measure.parse(implementation, "paged_attention")
    pages = Pages.random(1, seq_len, device)
    qkv = torch.randn(seq_len, (NUM_HEADS + 2) * HEAD_DIM, device=device).to(BF16)
    table_ids = torch.zeros(seq_len, dtype=torch.int32, device=device)
    seq_lens = torch.arange(1, seq_len + 1, dtype=torch.int32, device=device)
    out = torch.empty(seq_len, NUM_HEADS * HEAD_DIM, dtype=BF16, device=device)
    q = qkv[:, : NUM_HEADS * HEAD_DIM].view(1, seq_len, NUM_HEADS, HEAD_DIM).transpose(1, 2)
    where = (pages.k_cache, pages.v_cache, pages.block_tables, table_ids, seq_lens)

    def call() -> None:
        if module is None:
            attended = F.scaled_dot_product_attention(
                q, pages.keys[:, None], pages.values[:, None], is_causal=True, enable_gqa=True
            )
            out.copy_(attended[0].transpose(0, 1).flatten(1))
        else:
            module.paged_attention(qkv, *where, None, NUM_HEADS, SCALE, out)

    call()
    for row in (0, seq_len // 2, seq_len - 1):
        expected = in_fp64(q[0, :, row], pages.keys[0, : row + 1], pages.values[0, : row + 1])
        measure.check(out[row].view(NUM_HEADS, HEAD_DIM), expected, f"{implementation} row {row}")
    num_bytes = pages.keys.nbytes + pages.values.nbytes + qkv.nbytes + out.nbytes
    measure.run(benchmark, call, num_bytes, device, seq_len=seq_len)

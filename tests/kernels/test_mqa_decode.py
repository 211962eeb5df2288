"""mqa_decode of the backends that run anywhere, against fp64; the interpreter runs Triton's in
test_mqa_decode_triton.py with the same cases.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, SIZES_AND_BIASES, check_decode, decode_case

from steer_engine import ops


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size, bias", SIZES_AND_BIASES)
def test_decode_equals_fp64_and_stores_the_new_token(backend, size, bias, dtype):
    reason = ops.unavailable_reason(backend)
    if reason:
        pytest.skip(f"backend {backend}: {reason}")
    case = decode_case(size, dtype, [0, 1, 15, 16, 17, 63, 0, 64, 65, 200], bias)

    def run(c):
        keys = (c.pages.k_cache, c.pages.v_cache, c.pages.block_tables, c.table_ids, c.seq_lens)
        out = torch.full((len(c.qkv), c.pages.num_heads * c.pages.head_dim), torch.nan, dtype=dtype)
        tables = (c.cos, c.sin)
        arguments = (*tables, *keys, c.alibi, c.pages.num_heads, c.scale, out)
        assert ops.mqa_decode(c.qkv, *arguments, backend=backend) is out
        return out

    check_decode(case, run, f"{backend} mqa_decode {size} {bias}")

"""Paged attention in Triton: reference.mqa_decode (rotary and KV write fused) for decode steps, and
reference.paged_attention for prefills.

    out = softmax(scale * q K^T + alibi) V

One program per (row, chunk of keys, KV head). The query heads that share a KV head are the rows of
its matrix products (71 of 128 for Falcon-7B). A row's own key, at position seq_len - 1, starts the
online softmax of the last chunk: a decode step takes it from registers, where it has just been
rotated and rounded, and stores it; a prefill reads what rotary_and_store wrote. The keys before it
come from the pages, BLOCK_KEYS at a time. So a prefilled token and a decoded one go through the
same operations in the same order.

A row's result depends on no other row. The keys are cut into chunks of a fixed length, whatever
the batch: one chunk goes straight to out; of several, each leaves its maximum, sum and weighted
values in scratch memory, and a second kernel adds them up in their order. Slots at or beyond
seq_len are not read.

Traffic per row of L keys and KV head: 2 * L * head_dim * bytes of K and V, and beyond chunk_len
keys 2 * 4 * num_queries * head_dim bytes for each chunk. What a prefill costs against a
flash-style kernel: K and V are read by every token, from the L2 cache, instead of by every 128
tokens (0.5 GB a layer for one prompt of 2,048), and a matrix product is filled by the heads of one
token (71 of 128), not by heads of several. Not timed yet.

Source: online softmax, Milakov and Gimelshein 2018 (arXiv:1805.02867); chunks merged by
log-sum-exp, Flash-Decoding, Dao et al. 2023.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .checks import check_tensors
from .rotary_and_store import check_cache, check_heads, rotated

LOG2_E = tl.constexpr(1.4426950408889634)
MIN_DOT_SIZE = 16  # of each side of a tensor-core product
MERGE_BLOCK_HEADS = 16

# A chunk's partial result is written and read once, 37 KB for Falcon-7B's heads: beside 128 KB of K
# and V for 512 keys. Half the length would spread a single long row over more processors, but
# double that share, and rows of up to 512 tokens, which are most, would no longer be one launch.
CHUNK_LEN = 512
# Bounds the scratch memory to 38 MB at 2,048 keys, which still lies in an H100's L2 cache; 512 rows
# fill its 132 processors, so larger batches lose little by going in several launches.
MAX_ROWS_AT_ONCE = 512


# table_stride is the longest table's number of blocks: it grows during a run, and must not compile
# the kernel anew.
@triton.jit(do_not_specialize=["table_stride"])
def attention_kernel(
    qkv_ptr,
    qkv_row_stride,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    table_stride,
    table_ids_ptr,
    seq_lens_ptr,
    alibi_ptr,
    alibi_head_stride,
    scale,
    out_ptr,
    out_row_stride,
    maxima_ptr,
    sums_ptr,
    values_ptr,
    num_kv_heads,
    NUM_QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CHUNK_LEN: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    IS_DECODE: tl.constexpr,
):
    """See the head of this file.

    IS_DECODE: rotate q and the own key (cos_ptr None: no rotation) and store the own K and V.
    maxima_ptr, sums_ptr, values_ptr: None where no table holds more than one chunk.
    DOT_DTYPE: what the matrix products take: the cache's dtype, or fp32 in the interpreter.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    kv_head = tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + row)
    num_chunks = tl.cdiv(seq_len, CHUNK_LEN)
    if chunk >= tl.maximum(num_chunks, 1):  # a row without keys has one program: it writes zeros
        return
    own = seq_len - 1
    has_own = (chunk == num_chunks - 1) & (seq_len > 0)
    table_ptr = block_tables_ptr + tl.load(table_ids_ptr + row).to(tl.int64) * table_stride
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    in_head = dim < HEAD_DIM

    # 1. q, [BLOCK_QUERIES, BLOCK_DIM], rounded as the reference rounds it in qkv.
    query = tl.arange(0, BLOCK_QUERIES)
    head = kv_head * NUM_QUERIES + query
    in_heads = query < NUM_QUERIES
    in_q = in_heads[:, None] & in_head
    qkv_ptr += row * qkv_row_stride
    q_ptr = qkv_ptr + head[:, None] * HEAD_DIM + dim
    if IS_DECODE and cos_ptr is not None:
        position = tl.maximum(own, 0)
        q = rotated(q_ptr, in_q, position, cos_ptr, sin_ptr, HEAD_DIM, BLOCK_DIM)
        q = q.to(qkv_ptr.dtype.element_ty).to(tl.float32)
    else:
        q = tl.load(q_ptr, mask=in_q, other=0.0).to(tl.float32)

    # 2. The own K and V, [1, BLOCK_DIM], as they lie in the cache.
    own_page = tl.load(table_ptr + own // PAGE_SIZE, mask=has_own, other=0).to(tl.int64)
    own_slot = own_page * PAGE_SIZE + own % PAGE_SIZE
    own_offsets = (own_slot * num_kv_heads + kv_head) * HEAD_DIM + dim
    in_own = in_head & has_own
    if IS_DECODE:
        k_ptr = qkv_ptr + (num_kv_heads * NUM_QUERIES + kv_head) * HEAD_DIM + dim
        if cos_ptr is not None:
            k_own = rotated(k_ptr, in_own, position, cos_ptr, sin_ptr, HEAD_DIM, BLOCK_DIM)
            k_own = k_own.to(qkv_ptr.dtype.element_ty)
        else:
            k_own = tl.load(k_ptr, mask=in_own, other=0.0)
        v_own = tl.load(k_ptr + num_kv_heads * HEAD_DIM, mask=in_own, other=0.0)
        tl.store(k_cache_ptr + own_offsets, k_own, mask=in_own)
        tl.store(v_cache_ptr + own_offsets, v_own, mask=in_own)
    else:
        k_own = tl.load(k_cache_ptr + own_offsets, mask=in_own, other=0.0)
        v_own = tl.load(v_cache_ptr + own_offsets, mask=in_own, other=0.0)

    # 3. It starts the softmax, if it belongs to this chunk. Scores are in units of log 2.
    scale_log2 = scale * LOG2_E
    score = tl.sum(q * k_own.to(tl.float32), 1) * scale_log2
    if alibi_ptr is not None:
        alibi_ptr += head * alibi_head_stride
        score += tl.load(alibi_ptr + own, mask=in_heads & has_own, other=0.0) * LOG2_E
    maximum = tl.where(has_own, score, -float("inf"))
    total = tl.where(has_own & in_heads, 1.0, 0.0)
    values = tl.broadcast_to(v_own.to(tl.float32), (BLOCK_QUERIES, BLOCK_DIM))

    # 4. The keys before it. Every tile has a key, so the maximum is finite after the first.
    first = chunk * CHUNK_LEN
    end = tl.minimum(first + CHUNK_LEN, own)
    q = q.to(DOT_DTYPE)
    for start in range(first, end, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        is_key = key < end
        page = tl.load(table_ptr + key // PAGE_SIZE, mask=is_key, other=0).to(tl.int64)
        slot = page * PAGE_SIZE + key % PAGE_SIZE
        offsets = ((slot * num_kv_heads + kv_head) * HEAD_DIM)[:, None] + dim
        in_cache = is_key[:, None] & in_head
        k = tl.load(k_cache_ptr + offsets, mask=in_cache, other=0.0).to(DOT_DTYPE)
        v = tl.load(v_cache_ptr + offsets, mask=in_cache, other=0.0).to(DOT_DTYPE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if alibi_ptr is not None:
            in_bias = in_heads[:, None] & is_key[None, :]
            scores += tl.load(alibi_ptr[:, None] + key[None, :], mask=in_bias, other=0.0) * LOG2_E
        scores = tl.where(is_key[None, :], scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        decay = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum[:, None])
        total = total * decay + tl.sum(weights, 1)
        values = values * decay[:, None]
        values = tl.dot(weights.to(DOT_DTYPE), v, values, input_precision="ieee")
        maximum = new_maximum

    # 5. Out, or scratch memory where the row has more chunks.
    if num_chunks <= 1:
        # out may lie where q does: no thread may write before all have read.
        tl.debug_barrier()
        values = values / tl.where(total == 0, 1.0, total)[:, None]
        out_offsets = row * out_row_stride + head[:, None] * HEAD_DIM + dim
        tl.store(out_ptr + out_offsets, values.to(out_ptr.dtype.element_ty), mask=in_q)
    elif maxima_ptr is not None:
        num_heads = num_kv_heads * NUM_QUERIES
        partial = (row * tl.num_programs(1) + chunk) * num_heads + head
        tl.store(maxima_ptr + partial, maximum, mask=in_heads)
        tl.store(sums_ptr + partial, total, mask=in_heads)
        tl.store(values_ptr + partial[:, None] * HEAD_DIM + dim, values, mask=in_q)


@triton.jit
def merge_kernel(
    seq_lens_ptr,
    out_ptr,
    out_row_stride,
    maxima_ptr,
    sums_ptr,
    values_ptr,
    num_heads,
    max_chunks,
    HEAD_DIM: tl.constexpr,
    CHUNK_LEN: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Add up the chunks of a row in their order. One program per BLOCK_HEADS heads of a row;
    programs of rows with at most one chunk leave at once.
    """
    row = tl.program_id(0).to(tl.int64)
    num_chunks = tl.cdiv(tl.load(seq_lens_ptr + row), CHUNK_LEN)
    if num_chunks <= 1:
        return
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    in_heads = head < num_heads
    in_values = in_heads[:, None] & (dim < HEAD_DIM)
    maximum = tl.full([BLOCK_HEADS], -float("inf"), tl.float32)
    total = tl.full([BLOCK_HEADS], 0.0, tl.float32)
    values = tl.full([BLOCK_HEADS, BLOCK_DIM], 0.0, tl.float32)
    for chunk in range(0, num_chunks):
        partial = (row * max_chunks + chunk) * num_heads + head
        chunk_maximum = tl.load(maxima_ptr + partial, mask=in_heads, other=0.0)
        chunk_total = tl.load(sums_ptr + partial, mask=in_heads, other=0.0)
        chunk_values_ptr = values_ptr + partial[:, None] * HEAD_DIM + dim
        chunk_values = tl.load(chunk_values_ptr, mask=in_values, other=0.0)
        new_maximum = tl.maximum(maximum, chunk_maximum)
        decay = tl.exp2(maximum - new_maximum)
        chunk_decay = tl.exp2(chunk_maximum - new_maximum)
        total = total * decay + chunk_total * chunk_decay
        values = values * decay[:, None] + chunk_values * chunk_decay[:, None]
        maximum = new_maximum
    out_ptr += row * out_row_stride + head[:, None] * HEAD_DIM + dim
    values = values / tl.where(in_heads, total, 1.0)[:, None]
    tl.store(out_ptr, values.to(out_ptr.dtype.element_ty), mask=in_values)


class LaunchConfig(NamedTuple):
    """chunk_len and block_keys decide the order of sums, and with it the last bits; num_warps and
    num_stages only the speed.

    chunk_len: keys per program, see CHUNK_LEN.    block_keys: keys per matrix product.
    """

    chunk_len: int = CHUNK_LEN
    block_keys: int = 32
    num_warps: int = 8
    num_stages: int = 5

    @classmethod
    def choose(cls, dtype: torch.dtype, num_queries: int) -> LaunchConfig:
        """For Falcon-7B's 71 heads in bf16: 32 keys need at most 128 registers, which leaves room
        for two programs on a processor, so that one loads while the other computes; 64 need 138 on
        sm_90, 149 on sm_80. Five stages keep two tiles of K and V on their way, behind their page
        numbers. fp32 products go through registers: more than 16 keys spill.
        """
        num_warps = 8 if num_queries > MIN_DOT_SIZE else 4
        return cls(block_keys=32 if dtype == torch.bfloat16 else 16, num_warps=num_warps)

    def num_chunks(self, block_tables: torch.Tensor, k_cache: torch.Tensor) -> int:
        """How many chunks the longest sequence may have."""
        return max(1, triton.cdiv(block_tables.shape[1] * k_cache.shape[1], self.chunk_len))


class Scratch(NamedTuple):
    """What the chunks of a row hand to the merge; contents may be anything when a call starts.

    maxima, sums: [rows at once, max_chunks, num_heads] fp32, of the scores and of the weights.
    values: [rows at once, max_chunks, num_heads, head_dim] fp32, not divided by the sums.
    """

    maxima: torch.Tensor
    sums: torch.Tensor
    values: torch.Tensor

    @classmethod
    def allocate(cls, num_rows, max_chunks, num_heads, head_dim, device) -> Scratch | None:
        """None where no row has more than one chunk. Serves fewer chunks, and more rows, too."""
        if max_chunks == 1:
            return None
        shape = (min(num_rows, MAX_ROWS_AT_ONCE), max_chunks, num_heads)
        return cls(
            maxima=torch.empty(shape, dtype=torch.float32, device=device),
            sums=torch.empty(shape, dtype=torch.float32, device=device),
            values=torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        )


def launch_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    table_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    alibi: torch.Tensor | None,
    num_heads: int,
    scale: float,
    out: torch.Tensor,
    scratch: Scratch | None,
    config: LaunchConfig,
    *,
    is_decode: bool,
) -> None:
    """The launches alone, for CUDA graphs: nothing is allocated, checked or read by the host.

    is_decode: as mqa_decode; else as paged_attention, and cos and sin are not used.
    scratch: of Scratch.allocate for config.num_chunks(block_tables, k_cache) chunks or more.
    """
    page_size, num_kv_heads, head_dim = k_cache.shape[1:]
    num_queries = num_heads // num_kv_heads
    block_dim = max(MIN_DOT_SIZE, triton.next_power_of_2(head_dim))
    block_queries = max(MIN_DOT_SIZE, triton.next_power_of_2(num_queries))
    # CPU tensors mean the interpreter, whose products of bf16 are wrong.
    is_bf16 = qkv.dtype == torch.bfloat16 and qkv.device.type != "cpu"
    num_chunks = config.num_chunks(block_tables, k_cache)
    maxima, sums, values = scratch if num_chunks > 1 else (None, None, None)
    rows_at_once = len(qkv) if maxima is None else len(maxima)
    for first in range(0, len(qkv), max(1, rows_at_once)):
        rows = slice(first, first + rows_at_once)
        num_rows = len(qkv[rows])
        attention_kernel[(num_rows, num_chunks, num_kv_heads)](
            qkv[rows], qkv.stride(0), cos, sin, k_cache, v_cache,
            block_tables, block_tables.stride(0), table_ids[rows], seq_lens[rows],
            alibi, 0 if alibi is None else alibi.stride(0), scale,
            out[rows], out.stride(0), maxima, sums, values, num_kv_heads,
            num_queries, head_dim, page_size, config.chunk_len, block_queries, block_dim,
            config.block_keys, tl.bfloat16 if is_bf16 else tl.float32, is_decode,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if maxima is not None:
            merge_kernel[(num_rows, triton.cdiv(num_heads, MERGE_BLOCK_HEADS))](
                seq_lens[rows], out[rows], out.stride(0), maxima, sums, values,
                num_heads, num_chunks, head_dim, config.chunk_len, MERGE_BLOCK_HEADS, block_dim,
                num_warps=4,
            )  # fmt: skip


def mqa_decode(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    table_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    alibi: torch.Tensor | None,
    num_heads: int,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """See reference.mqa_decode; qkv stays as it is. qkv and out may have any row stride, and out
    may be the q columns of qkv.

    Raises: ValueError if a shape or dtype does not match. Tables and lengths are not checked: that
        would wait for the device.
    """
    keys = (k_cache, v_cache, block_tables, table_ids, seq_lens)
    return _attention(qkv, cos, sin, *keys, alibi, num_heads, scale, out, is_decode=True)


def paged_attention(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    table_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    alibi: torch.Tensor | None,
    num_heads: int,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """See reference.paged_attention; strides, aliasing and errors as in mqa_decode."""
    keys = (k_cache, v_cache, block_tables, table_ids, seq_lens)
    return _attention(qkv, None, None, *keys, alibi, num_heads, scale, out, is_decode=False)


def _attention(
    qkv,
    cos,
    sin,
    k_cache,
    v_cache,
    block_tables,
    table_ids,
    seq_lens,
    alibi,
    num_heads,
    scale,
    out,
    *,
    is_decode: bool,
) -> torch.Tensor:
    """Check the arguments, allocate the scratch memory, launch."""
    check_cache(k_cache, v_cache, qkv.dtype)
    num_kv_heads, head_dim = k_cache.shape[2:]
    check_heads(qkv, cos, sin, num_heads, num_kv_heads, head_dim)
    num_rows, int32 = len(qkv), (torch.int32,)
    check_tensors(
        {
            "block_tables": (block_tables, [None, None], int32),
            "table_ids": (table_ids, [num_rows], int32),
            "seq_lens": (seq_lens, [num_rows], int32),
            "alibi": (alibi, [num_heads, None], (torch.float32,)),
            "out": (out, [num_rows, num_heads * head_dim], (qkv.dtype,)),
        }
    )
    if num_rows == 0:
        return out
    config = LaunchConfig.choose(qkv.dtype, num_heads // num_kv_heads)
    max_chunks = config.num_chunks(block_tables, k_cache)
    scratch = Scratch.allocate(num_rows, max_chunks, num_heads, head_dim, qkv.device)
    launch_attention(
        qkv, cos, sin, k_cache, v_cache, block_tables, table_ids, seq_lens, alibi, num_heads,
        scale, out, scratch, config, is_decode=is_decode,
    )  # fmt: skip
    return out

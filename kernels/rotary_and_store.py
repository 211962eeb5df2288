"""Rotary embedding and KV write of a prefill in Triton; see reference.rotary_and_store.

One program per token: it rotates the token's q and k in place and copies k and v to their slot.
A decode step does the same inside mqa_decode, with the same `rotated`, so the bits are the same.

Traffic per token: q, k and v once, twice what is written (q and k back, k and v to the cache).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_tensors

FLOAT_DTYPES = (torch.bfloat16, torch.float32)


@triton.jit
def rotated(
    x_ptr, in_tensor, position, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) in fp32, x1 and x2 the halves of head_dim.

    x_ptr: [heads, BLOCK_DIM] pointers to whole heads, of which `in_tensor` exist. The fma is
    explicit so that every kernel that rotates rounds alike.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    dim = tl.arange(0, BLOCK_DIM)
    is_first = dim < HALF
    angle = position * HALF + tl.where(is_first, dim, dim - HALF)
    cos = tl.load(cos_ptr + angle, mask=dim < HEAD_DIM, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=dim < HEAD_DIM, other=0.0)
    sin = tl.where(is_first, -sin, sin)
    to_partner = tl.where(is_first, HALF, -HALF)
    x = tl.load(x_ptr, mask=in_tensor, other=0.0).to(tl.float32)
    partner = tl.load(x_ptr + to_partner[None, :], mask=in_tensor, other=0.0).to(tl.float32)
    return tl.fma(x, tl.broadcast_to(cos[None, :], x.shape), partner * sin[None, :])


@triton.jit
def rotary_and_store_kernel(
    qkv_ptr,
    qkv_row_stride,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slot_mapping_ptr,
    k_cache_ptr,
    v_cache_ptr,
    num_heads,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
):
    """See the head of this file. cos_ptr None: nothing is rotated."""
    token = tl.program_id(0).to(tl.int64)
    qkv_ptr += token * qkv_row_stride
    position = tl.load(positions_ptr + token)
    slot = tl.load(slot_mapping_ptr + token)
    dim = tl.arange(0, BLOCK_DIM)

    kv_head = tl.arange(0, BLOCK_KV_HEADS)
    in_kv = (kv_head < num_kv_heads)[:, None] & (dim < HEAD_DIM)[None, :]
    offsets = kv_head[:, None] * HEAD_DIM + dim[None, :]
    k_ptr = qkv_ptr + num_heads * HEAD_DIM + offsets
    v = tl.load(k_ptr + num_kv_heads * HEAD_DIM, mask=in_kv, other=0.0)
    if cos_ptr is not None:
        head = tl.arange(0, BLOCK_HEADS)
        in_q = (head < num_heads)[:, None] & (dim < HEAD_DIM)[None, :]
        q_ptr = qkv_ptr + head[:, None] * HEAD_DIM + dim[None, :]
        q = rotated(q_ptr, in_q, position, cos_ptr, sin_ptr, HEAD_DIM, BLOCK_DIM)
        k = rotated(k_ptr, in_kv, position, cos_ptr, sin_ptr, HEAD_DIM, BLOCK_DIM)
        # A thread's store must not overtake another's load of the same element.
        tl.debug_barrier()
        k = k.to(qkv_ptr.dtype.element_ty)
        tl.store(q_ptr, q.to(qkv_ptr.dtype.element_ty), mask=in_q)
        tl.store(k_ptr, k, mask=in_kv)
    else:
        k = tl.load(k_ptr, mask=in_kv, other=0.0)

    is_stored = in_kv & (slot >= 0)
    offsets += slot * num_kv_heads * HEAD_DIM  # int64, as slot is
    tl.store(k_cache_ptr + offsets, k, mask=is_stored)
    tl.store(v_cache_ptr + offsets, v, mask=is_stored)


def check_cache(k_cache: torch.Tensor, v_cache: torch.Tensor, dtype: torch.dtype) -> None:
    """Both caches must be contiguous, of one shape, and of qkv's dtype."""
    check_tensors(
        {
            "k_cache": (k_cache, [None] * 4, (dtype,)),
            "v_cache": (v_cache, list(k_cache.shape), (dtype,)),
        }
    )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not cache.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {cache.stride()}")


def check_heads(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    """qkv must hold the heads that num_heads and the cache say; cos and sin go together."""
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of the cache's num_kv_heads={num_kv_heads}, "
            f"got {num_heads}"
        )
    if (cos is None) != (sin is None) or (cos is not None and head_dim % 2):
        raise ValueError(
            "cos and sin must both be None, or both tables for an even head_dim, got "
            f"head_dim={head_dim}, cos {type(cos).__name__}, sin {type(sin).__name__}"
        )
    fp32 = (torch.float32,)
    check_tensors(
        {
            "qkv": (qkv, [None, (num_heads + 2 * num_kv_heads) * head_dim], FLOAT_DTYPES),
            "cos": (cos, [None, head_dim // 2], fp32),
            "sin": (sin, [None, head_dim // 2], fp32),
        }
    )
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {table.stride()}")


def rotary_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    """See reference.rotary_and_store. qkv may have any row stride.

    Raises: ValueError if a shape or dtype does not match. Positions and slots are not checked:
        that would wait for the device.
    """
    check_cache(k_cache, v_cache, qkv.dtype)
    num_kv_heads, head_dim = k_cache.shape[2:]
    check_heads(qkv, cos, sin, num_heads, num_kv_heads, head_dim)
    num_tokens = qkv.shape[0]
    check_tensors(
        {
            "positions": (positions, [num_tokens], (torch.int32,)),
            "slot_mapping": (slot_mapping, [num_tokens], (torch.int64,)),
        }
    )
    if num_tokens == 0:
        return
    # 4 warps: 71 heads x 64 numbers, padded to 128 x 64, are 64 to a thread.
    rotary_and_store_kernel[(num_tokens,)](
        qkv, qkv.stride(0), cos, sin, positions, slot_mapping, k_cache, v_cache,
        num_heads, num_kv_heads, head_dim, triton.next_power_of_2(head_dim),
        triton.next_power_of_2(num_heads), triton.next_power_of_2(num_kv_heads),
        num_warps=4,
    )  # fmt: skip

"""LayerNorm over the hidden dimension in Triton.

    out = (x - mean) / sqrt(var + eps) * weight + bias

One program per row: it holds the row in registers, so x is read once and the variance is taken from
the differences to the mean, which loses nothing when the mean is large.

Traffic per row: hidden_size * (4 + bytes of out); weight and bias stay in the cache.
Source: Ba et al. 2016 (arXiv:1607.06450).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_tensors


@triton.jit
def layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    x_row_stride,
    out_row_stride,
    eps,
    hidden_size,
    BLOCK_SIZE: tl.constexpr,
):
    """See the head of this file. BLOCK_SIZE: a power of 2, at least hidden_size."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_SIZE)
    in_row = column < hidden_size

    # 1. Statistics in fp32. Lanes beyond the row must not count as differences of -mean.
    x = tl.load(x_ptr + row * x_row_stride + column, mask=in_row, other=0.0)
    mean = tl.sum(x, 0) / hidden_size
    difference = tl.where(in_row, x - mean, 0.0)
    variance = tl.sum(difference * difference, 0) / hidden_size
    scale = tl.rsqrt(variance + eps)

    # 2. Scale and shift; the store rounds to out's dtype.
    weight = tl.load(weight_ptr + column, mask=in_row, other=0.0)
    bias = tl.load(bias_ptr + column, mask=in_row, other=0.0)
    out = difference * scale * weight + bias
    tl.store(out_ptr + row * out_row_stride + column, out, mask=in_row)


def num_warps_for(block_size: int) -> int:
    """16 elements per thread. Above a hidden size of 16,384 it spills: slower, still right."""
    return min(32, max(1, block_size // 512))


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """See reference.layer_norm. x and out may have any row stride.

    Raises: ValueError if a shape or dtype does not match.
    """
    num_rows, hidden_size = x.shape
    fp32 = (torch.float32,)
    check_tensors(
        {
            "x": (x, [num_rows, hidden_size], fp32),
            "weight": (weight, [hidden_size], fp32),
            "bias": (bias, [hidden_size], fp32),
            "out": (out, [num_rows, hidden_size], (torch.float32, torch.bfloat16)),
        }
    )
    if num_rows == 0:
        return out
    block_size = triton.next_power_of_2(hidden_size)
    layer_norm_kernel[(num_rows,)](
        x, weight, bias, out, x.stride(0), out.stride(0), eps, hidden_size, block_size,
        num_warps=num_warps_for(block_size),
    )  # fmt: skip
    return out

"""Linear layers in Triton: a matrix product whose epilogue adds bias, GELU and the residual.

    y = x W^T + bias;  GELU on y's first gelu_columns;  out = y, or out += y

Batch invariance. A row's bits must not depend on the rows beside it, so the arithmetic is the same
for every number of rows: one tile shape, and one order of sums. The inputs of a row are cut into
segments, by (in_features, out_features) alone; a segment is summed step by step of BLOCK_K, and the
segments' sums are added in their order. What may depend on the number of rows is who does it:

    few rows    a program has one segment of a tile, or some, and writes each one's sum;
                epilogue_kernel adds them. Falcon-7B's down_dense has 36 tiles of columns for 132
                processors: 4 segments use them all.
    many rows   one program per tile sums all segments; the tiles alone fill the processors.

Multiply and add round separately (enable_fp_fusion=False), or the two forms could fuse differently.

Traffic with up to 64 rows: each weight is read once, at 2 bytes for 2 * 64 FLOPs of its row tile.
At 3.0 TB/s that is 192 TFLOP/s of 798: the weights' bytes bound the product, so a row tile below 64
would gain nothing, and 64 is what one warpgroup's MMA takes. A step loads 16 KB of weights from
memory and 8 KB of x from L2; the partial sums of 4 segments are 4.7 MB for 64 rows of down_dense
and stay in L2, against 206 MB of weights. 4 stages are 96 KB of shared memory: two programs fit on
a processor, and each has 2 to 3 steps in flight, together 64 KB or more of weights, where 32 KB
cover the latency.

Rejected: float atomics (the order varies), a last-arriver epilogue (counters to reset, for one
launch less), more rows per tile for prefill (another tile shape; it may give the same bits on
today's MMA, but nothing promises it). Not timed yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .checks import check_tensors
from .reference.linear import LinearWeight

SQRT_HALF = tl.constexpr(0.5**0.5)
# Row tiles whose programs run side by side: 1,024 rows by 2,048 columns on 132 processors of two
# programs each. Their x and weights, 28 MB for 4,544 inputs, are read from memory once and then L2.
ROW_TILES_PER_GROUP = tl.constexpr(16)
NUM_PROCESSORS = 132
MAX_PROGRAMS_AT_ONCE = 2 * NUM_PROCESSORS  # by their shared memory, see above
# None decides anything in a kernel; without this, one row would run another binary.
COUNTS = ("num_rows", "boundary", "gelu_columns")


@triton.jit
def _bias_and_gelu(y, column, bias_ptr, out_features, gelu_columns, HAS_GELU: tl.constexpr):
    """column: of y's last dimension. bias_ptr may be None."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < out_features, other=0.0)
    if HAS_GELU:
        y = tl.where(column < gelu_columns, 0.5 * y * (1.0 + tl.erf(y * SQRT_HALF)), y)
    return y


@triton.jit
def _tile(num_row_tiles, out_features, BLOCK_N: tl.constexpr):
    """Row tile and column tile of this program: down the rows of a group, then the next columns."""
    num_column_tiles = tl.cdiv(out_features, BLOCK_N)
    group_len = ROW_TILES_PER_GROUP * num_column_tiles
    group = tl.program_id(0) // group_len
    first_row_tile = group * ROW_TILES_PER_GROUP
    num_row_tiles = tl.minimum(num_row_tiles - first_row_tile, ROW_TILES_PER_GROUP)
    place = tl.program_id(0) % group_len
    return first_row_tile + place % num_row_tiles, place // num_row_tiles


@triton.jit(do_not_specialize=COUNTS)
def linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    rest_weight_ptr,
    rest_bias_ptr,
    out_ptr,
    x_row_stride,
    out_row_stride,
    num_rows,
    boundary,
    in_features,
    out_features,
    gelu_columns,
    segment_len,
    SEGMENTS_PER_PROGRAM: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    HAS_GELU: tl.constexpr,
    WEIGHT_EVICTION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per tile of out, or several of SEGMENTS_PER_PROGRAM each where IS_PARTIAL: then
    out is the partial sums, [num_segments, num_rows, out_features], and the epilogue is left to
    epilogue_kernel.

    rest_weight_ptr, rest_bias_ptr: of the rows from boundary on, or None: then boundary is not
    read. The rows on either side have tiles of their own, so that a tile reads one weight.
    WEIGHT_EVICTION: "evict_first" where each weight is read once, or "". Triton 3.6 drops it on the
    way from TTGIR to PTX for loads that it pipelines, so today it does nothing.
    """
    first_row, end_row = 0, num_rows
    if rest_weight_ptr is None:
        row_tile, column_tile = _tile(tl.cdiv(num_rows, BLOCK_M), out_features, BLOCK_N)
    else:
        num_tiles_below = tl.cdiv(boundary, BLOCK_M)
        num_row_tiles = num_tiles_below + tl.cdiv(num_rows - boundary, BLOCK_M)
        row_tile, column_tile = _tile(num_row_tiles, out_features, BLOCK_N)
        is_below = row_tile < num_tiles_below
        row_tile -= tl.where(is_below, 0, num_tiles_below)
        first_row = tl.where(is_below, 0, boundary)
        end_row = tl.where(is_below, boundary, num_rows)
        weight_ptr = tl.where(is_below, weight_ptr, rest_weight_ptr)
        if bias_ptr is not None:
            bias_ptr = tl.where(is_below, bias_ptr, rest_bias_ptr)
    first_row += row_tile * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = row[:, None] < end_row
    in_columns = column[:, None] < out_features  # of the weight tile, [BLOCK_N, BLOCK_K]
    # int64 where a tile starts: row * stride passes 2**31 from 94,000 rows of 22,848 on. Within a
    # tile int32 is enough: int64 offsets spill on sm_80, pointers carried over the loops on both.
    k = tl.arange(0, BLOCK_K)[None, :]
    x_ptr += first_row.to(tl.int64) * x_row_stride
    weight_ptr += (column_tile * BLOCK_N).to(tl.int64) * in_features
    x_offset = tl.arange(0, BLOCK_M)[:, None] * x_row_stride + k
    weight_offset = tl.arange(0, BLOCK_N)[:, None] * in_features + k

    column = column[None, :]
    mask = in_rows & (column < out_features)
    row = row[:, None].to(tl.int64)

    # 1. Sum each segment from zero, then the segments.
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for s in range(SEGMENTS_PER_PROGRAM):
        segment = tl.program_id(1) * SEGMENTS_PER_PROGRAM + s
        start = segment * segment_len
        end = tl.minimum(start + segment_len, in_features)
        segment_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for offset in range(start, end, BLOCK_K):
            in_segment = k < end - offset
            x = tl.load(x_ptr + (offset + x_offset), mask=in_rows & in_segment, other=0.0)
            weight = tl.load(
                weight_ptr + (offset + weight_offset),
                mask=in_columns & in_segment,
                other=0.0,
                eviction_policy=WEIGHT_EVICTION,
            )
            if UPCAST:
                x = x.to(tl.float32)
                weight = weight.to(tl.float32)
            segment_sum = tl.dot(x, weight.T, segment_sum, input_precision="ieee")
        if IS_PARTIAL:
            partial_ptr = out_ptr + (segment * num_rows + row) * out_row_stride + column
            tl.store(partial_ptr, segment_sum, mask=mask)
        else:
            y += segment_sum

    # 2. Epilogue; a store rounds to out's dtype.
    if not IS_PARTIAL:
        y = _bias_and_gelu(y, column, bias_ptr, out_features, gelu_columns, HAS_GELU)
        out_tile_ptr = out_ptr + row * out_row_stride + column
        if ACCUMULATE:
            y += tl.load(out_tile_ptr, mask=mask, other=0.0)
        tl.store(out_tile_ptr, y, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def epilogue_kernel(
    partials_ptr,
    bias_ptr,
    rest_bias_ptr,
    out_ptr,
    out_row_stride,
    num_rows,
    boundary,
    out_features,
    gelu_columns,
    NUM_SEGMENTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    HAS_GELU: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Add partial sums in their order, then as linear_kernel. One program per slice of a row.

    partials: [num_segments, num_rows, out_features], fp32 or bf16.
    rest_bias_ptr: of the rows from boundary on, or None: then boundary is not read.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = column < out_features
    y = tl.zeros([BLOCK_SIZE], tl.float32)
    for segment in tl.static_range(NUM_SEGMENTS):
        partial_ptr = partials_ptr + (segment * num_rows + row) * out_features + column
        y += tl.load(partial_ptr, mask=mask, other=0.0).to(tl.float32)
    if rest_bias_ptr is not None:
        bias_ptr = tl.where(row < boundary, bias_ptr, rest_bias_ptr)
    y = _bias_and_gelu(y, column, bias_ptr, out_features, gelu_columns, HAS_GELU)
    out_row_ptr = out_ptr + row * out_row_stride + column
    if ACCUMULATE:
        y += tl.load(out_row_ptr, mask=mask, other=0.0)
    tl.store(out_row_ptr, y, mask=mask)


class LaunchConfig(NamedTuple):
    """Sizes of one weight's products. num_segments and block_k decide the order of sums, and so the
    bits; they follow from the weight's shape and dtype alone, see config_for.

    num_segments: of the inputs.    block_m, block_n, block_k: of a step's tile, powers of 2.
    epilogue_block_size: columns that a program of epilogue_kernel holds, a power of 2.
    """

    num_segments: int
    block_m: int = 64
    block_n: int = 128
    block_k: int = 64
    num_warps: int = 4  # one warpgroup
    num_stages: int = 4
    epilogue_block_size: int = 1024

    def segment_len(self, in_features: int) -> int:
        """Whole steps; the last segment may be shorter."""
        num_steps = triton.cdiv(in_features, self.block_k)
        return triton.cdiv(num_steps, self.num_segments) * self.block_k

    def num_tiles(self, num_rows: int, out_features: int, boundary: int = 0) -> int:
        """The rows below boundary and the rest have tiles of their own."""
        below, rest = (triton.cdiv(n, self.block_m) for n in (boundary, num_rows - boundary))
        return (below + rest) * triton.cdiv(out_features, self.block_n)

    def segments_per_program(self, num_tiles: int) -> int:
        """All where tiles alone fill the processors. Else the fewest with which all programs run
        at once and on every processor, or 1 where no number does.
        """
        if num_tiles >= NUM_PROCESSORS:
            return self.num_segments
        for count in range(1, self.num_segments + 1):
            num_programs = num_tiles * self.num_segments // count
            runs_at_once = NUM_PROCESSORS <= num_programs <= MAX_PROGRAMS_AT_ONCE
            if self.num_segments % count == 0 and runs_at_once:
                return count
        return 1

    def is_partial(self, num_rows: int, out_features: int, boundary: int = 0) -> bool:
        """Whether programs write partial sums: only where tiles leave processors idle."""
        num_tiles = self.num_tiles(num_rows, out_features, boundary)
        return self.segments_per_program(num_tiles) < self.num_segments


# By the weight's column tiles; the products of tiles and segments are near 132, and below the 264
# programs that run at once, so that none starts when the others end.
CONFIGS = {
    "wide": LaunchConfig(1),  # from 99 tiles: up 142, up and qkv 179, head 508
    "medium": LaunchConfig(2),  # from 50 tiles: qkv of Falcon-40B 72
    "narrow": LaunchConfig(4),  # from 25 tiles: dense and down 36, qkv 37
    "slim": LaunchConfig(8),  # from 9 tiles: the linears of Falcon-RW-1B 16
    "adapter": LaunchConfig(16),  # fewer: A of LoRA, often one tile
    # Without tensor cores, and for tests rather than speed: a tile that does not spill.
    "fp32": LaunchConfig(1, block_n=64, block_k=16, num_stages=3),
}
MIN_COLUMN_TILES = {"wide": 99, "medium": 50, "narrow": 25, "slim": 9, "adapter": 0}
MIN_STEPS = 4  # of a segment, or filling its pipeline takes longer than its sums


def config_for(in_features: int, out_features: int, dtype: torch.dtype) -> LaunchConfig:
    """The config of a weight. The number of rows has no say, see the head of this file."""
    if dtype == torch.float32:
        return CONFIGS["fp32"]
    num_tiles = CONFIGS["wide"].num_tiles(1, out_features)
    config = CONFIGS[next(name for name, least in MIN_COLUMN_TILES.items() if num_tiles >= least)]
    num_steps = triton.cdiv(in_features, config.block_k)
    num_segments = max(1, min(config.num_segments, num_steps // MIN_STEPS))
    # Rounding a segment up to whole steps may leave the last ones empty.
    num_segments = triton.cdiv(num_steps, triton.cdiv(num_steps, num_segments))
    return config._replace(num_segments=num_segments)


class Rest(NamedTuple):
    """The rows from boundary on, which have a weight of their own, of the same shape.

    bias: None where the bias of the rows below is.
    """

    boundary: int
    weight: LinearWeight
    bias: torch.Tensor | None


def allocate_partials(
    num_rows: int,
    out_features: int,
    device: torch.device,
    config: LaunchConfig,
    boundary: int = 0,
) -> torch.Tensor | None:
    """Scratch of one launch or None: partial sums [num_segments, num_rows, out_features] fp32."""
    if not config.is_partial(num_rows, out_features, boundary):
        return None
    shape = (config.num_segments, num_rows, out_features)
    return torch.empty(shape, dtype=torch.float32, device=device)


def launch_linear(
    x: torch.Tensor,
    weight: LinearWeight,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    gelu_columns: int,
    accumulate: bool,
    partials: torch.Tensor | None,
    config: LaunchConfig,
    rest: Rest | None = None,
) -> None:
    """The launches alone, for CUDA graphs: nothing is allocated, checked or read by the host.

    x has rows. partials: as from allocate_partials, contents may be anything. rest: None where all
    rows have one weight.
    """
    num_rows, in_features = x.shape
    out_features = weight.out_features
    is_partial = partials is not None
    boundary, rest_weight, rest_bias = (0, None, None) if rest is None else rest
    longest = max(boundary, num_rows - boundary)  # rows of one weight
    num_tiles = config.num_tiles(num_rows, out_features, boundary)
    per_program = config.segments_per_program(num_tiles) if is_partial else config.num_segments
    target = partials if is_partial else out
    linear_kernel[(num_tiles, config.num_segments // per_program)](
        x, weight.data, None if is_partial else bias,
        None if rest is None else rest_weight.data, None if is_partial else rest_bias, target,
        x.stride(0), target.stride(-2), num_rows, boundary, in_features, out_features, gelu_columns,
        config.segment_len(in_features),
        SEGMENTS_PER_PROGRAM=per_program,
        IS_PARTIAL=is_partial,
        ACCUMULATE=accumulate and not is_partial,
        HAS_GELU=gelu_columns > 0 and not is_partial,
        WEIGHT_EVICTION="evict_first" if longest <= config.block_m else "",
        UPCAST=not x.is_cuda,  # the interpreter cannot multiply bf16
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    if is_partial:
        launch_epilogue(partials, out, bias, gelu_columns, accumulate, config, rest)


def launch_epilogue(
    partials: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    gelu_columns: int,
    accumulate: bool,
    config: LaunchConfig,
    rest: Rest | None = None,
) -> None:
    """out = gelu(sum of partials + bias), or out += ... with accumulate; as launch_linear."""
    num_segments, num_rows, out_features = partials.shape
    boundary, _, rest_bias = (0, None, None) if rest is None else rest
    grid = (num_rows, triton.cdiv(out_features, config.epilogue_block_size))
    epilogue_kernel[grid](
        partials, bias, rest_bias, out, out.stride(0), num_rows, boundary, out_features,
        gelu_columns,
        NUM_SEGMENTS=num_segments, ACCUMULATE=accumulate, HAS_GELU=gelu_columns > 0,
        BLOCK_SIZE=config.epilogue_block_size, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def pack_weight(weight: torch.Tensor) -> LinearWeight:
    """Wrap a weight [out_features, in_features], fp32 or bf16; rows must lie side by side."""
    return LinearWeight(weight.contiguous(), *weight.shape)


def check_arguments(
    x: torch.Tensor,
    weight: LinearWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    gelu_columns: int,
    accumulate: bool,
    names: tuple[str, str] = ("weight", "bias"),
) -> None:
    """names: of weight and bias in messages.

    Raises: ValueError if a shape or dtype does not match.
    """
    num_rows, out_features, in_features = x.shape[0], weight.out_features, weight.in_features
    out_dtypes = (torch.float32,) if accumulate else (torch.float32, torch.bfloat16)
    check_tensors(
        {
            names[0]: (weight.data, weight[1:], (torch.float32, torch.bfloat16)),
            "x": (x, [None, in_features], (weight.data.dtype,)),
            names[1]: (bias, [out_features], (torch.float32,)),
            "out": (out, [num_rows, out_features], out_dtypes),
        }
    )
    if not weight.data.is_contiguous():
        raise ValueError(f"{names[0]} must be contiguous, got strides {weight.data.stride()}")
    if not 0 <= gelu_columns <= out_features:
        raise ValueError(f"gelu_columns must lie in [0, {out_features=}], got {gelu_columns}")


def linear(
    x: torch.Tensor,
    weight: LinearWeight,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    gelu_columns: int = 0,
    accumulate: bool = False,
    batch_invariant: bool = True,
) -> torch.Tensor:
    """See reference.linear. x and out may have any row stride.

    Args:
        batch_invariant: False runs cuBLAS and then epilogue_kernel, to compare with. cuBLAS may
            choose another kernel for another number of rows, so a row's bits then depend on the
            rows beside it; and its product comes back in x's dtype, one rounding more for bf16.
    Raises: ValueError if a shape or dtype does not match.
    """
    check_arguments(x, weight, bias, out, gelu_columns, accumulate)
    num_rows, out_features, in_features = x.shape[0], weight.out_features, weight.in_features
    if num_rows == 0:
        return out
    config = config_for(in_features, out_features, x.dtype)
    if not batch_invariant:
        product = F.linear(x, weight.data)[None]
        launch_epilogue(product, out, bias, gelu_columns, accumulate, config)
        return out
    partials = allocate_partials(num_rows, out_features, x.device, config)
    launch_linear(x, weight, out, bias, gelu_columns, accumulate, partials, config)
    return out

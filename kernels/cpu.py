"""Launchers of the C++ kernels for the CPU (csrc/cpu); same signatures as `reference`.

The functions need the compiled library to be loaded (see steer_engine.ops).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .reference import guided_probs, last_slots
from .reference.guided_sample import (
    Sampled,
    checked_parameters,
    signed_seed,
)
from .reference.linear import Int8Weight, LinearWeight, linear_by_group

__all__ = [
    "CompressedWeight",
    "compress_weight",
    "draw",
    "embedding",
    "grouped_linear",
    "guided_probs",
    "guided_sample",
    "layer_norm",
    "linear",
    "mqa_decode",
    "pack_int8_weight",
    "pack_weight",
    "paged_attention",
    "rotary_and_store",
]

PANEL_SIZE = 16  # output features that lie together in a packed weight
COMPRESSED_INPUTS = 8  # in_features of a compressed weight are a multiple of it
WORTHWHILE = 0.9  # of the bytes that a weight has uncompressed
# Elsewhere products of 7 to 29 rows would be slower with it (bench/NOTES.md).
COMPRESSING_ISAS = {"avx2", "avx512_bf16"}


class CompressedWeight(NamedTuple):
    """A bf16 weight in 12 bits per value, without loss (csrc/cpu/compressed_weight.h).

    data, raw: the layout there; uint8 and bf16.
    in_features: columns of the compressed weight and of tail together.
    tail: the last columns, packed as they are (an adapter's B), or None.
    """

    data: torch.Tensor
    out_features: int
    in_features: int
    raw: torch.Tensor
    tail: LinearWeight | None = None

    @property
    def tail_features(self) -> int:
        """Columns of tail."""
        return 0 if self.tail is None else self.tail.in_features


def pack_weight(weight: torch.Tensor) -> LinearWeight:
    """Copy a weight [out_features, in_features] into the kernel's layout, flat and zero-padded.

    bf16: [out_features / 16, in_features / 2, 16, 2].
    fp32: [out_features / 16, in_features, 16].
    """
    return LinearWeight(torch.ops.steer_engine.pack_weight(weight.contiguous()), *weight.shape)


def pack_int8_weight(weight: torch.Tensor, tail: torch.Tensor | None = None) -> Int8Weight:
    """See reference.pack_int8_weight; the same numbers as [out_features / 16, in_features, 16],
    flat and zero-padded, in_features to an even number.
    """
    data, scales = torch.ops.steer_engine.pack_int8_weight(weight.contiguous())
    packed_tail = None if tail is None else pack_weight(tail)
    in_features = weight.shape[1] + (0 if tail is None else tail.shape[1])
    return Int8Weight(data, len(weight), in_features, scales, packed_tail)


def compress_weight(
    weight: torch.Tensor, tail: torch.Tensor | None = None
) -> CompressedWeight | None:
    """Compress a weight [out_features, in_features], or None where that saves less than a tenth, or
    not at the machine's instruction set.

    Products with it have the bits of products with [weight | tail] as pack_weight packs it.

    tail: see CompressedWeight; [out_features, tail_features] bf16, or None.
    """
    out_features, in_features = weight.shape
    is_possible = weight.dtype == torch.bfloat16 and in_features % COMPRESSED_INPUTS == 0
    if not is_possible or torch.ops.steer_engine.cpu_isa() not in COMPRESSING_ISAS:
        return None
    data, raw = torch.ops.steer_engine.compress_weight(weight.contiguous())
    if data.nbytes + raw.nbytes > WORTHWHILE * weight.nbytes:
        return None
    packed_tail = None if tail is None else pack_weight(tail)
    in_features += 0 if tail is None else tail.shape[1]
    return CompressedWeight(data, out_features, in_features, raw, packed_tail)


def embedding(weight: LinearWeight | CompressedWeight, input_ids: torch.Tensor) -> torch.Tensor:
    """See reference.embedding.

    Rows are gathered out of the packed layout, so that a tied head is stored once.
    """
    if isinstance(weight, CompressedWeight):
        return torch.ops.steer_engine.embedding_compressed(
            weight.data, weight.raw, weight.out_features, weight.in_features, input_ids
        )
    num_panels = -(-weight.out_features // PANEL_SIZE)
    panel, column = input_ids // PANEL_SIZE, input_ids % PANEL_SIZE
    if weight.data.dtype == torch.bfloat16:
        rows = weight.data.view(num_panels, -1, PANEL_SIZE, 2)[panel, :, column].flatten(1)
    else:
        rows = weight.data.view(num_panels, -1, PANEL_SIZE)[panel, :, column]
    return rows[:, : weight.in_features].float()


def linear(
    x,
    weight: LinearWeight | Int8Weight | CompressedWeight,
    out,
    *,
    bias=None,
    gelu_columns=0,
    accumulate=False,
):
    """See reference.linear.

    The arithmetic is the same for every number of rows; x and out may have any row stride.
    """
    rest = (bias, weight.out_features, gelu_columns, accumulate, out)
    if isinstance(weight, LinearWeight):
        torch.ops.steer_engine.linear(x, weight.data, *rest)
        return out
    tail = (None if weight.tail is None else weight.tail.data, weight.tail_features)
    if isinstance(weight, Int8Weight):
        torch.ops.steer_engine.linear_int8(x, weight.data, weight.scales, *tail, *rest)
    else:
        torch.ops.steer_engine.linear_compressed(x, weight.data, weight.raw, *tail, *rest)
    return out


def grouped_linear(x, weights, boundary, out, *, biases=None, gelu_columns=0, accumulate=False):
    """See reference.grouped_linear; weights of any kind that linear takes."""
    epilogue = {"biases": biases, "gelu_columns": gelu_columns, "accumulate": accumulate}
    return linear_by_group(linear, x, weights, boundary, out, **epilogue)


def layer_norm(x, weight, bias, eps: float, out):
    """See reference.layer_norm."""
    torch.ops.steer_engine.layer_norm(x, weight, bias, eps, out)
    return out


def rotary_and_store(qkv, cos, sin, positions, slot_mapping, num_heads, k_cache, v_cache) -> None:
    """See reference.rotary_and_store."""
    torch.ops.steer_engine.rotary_and_store(
        qkv, cos, sin, positions, slot_mapping, num_heads, k_cache, v_cache
    )


def paged_attention(
    qkv, k_cache, v_cache, block_tables, table_ids, seq_lens, alibi, num_heads, scale, out
):
    """See reference.paged_attention."""
    torch.ops.steer_engine.paged_attention(
        qkv, k_cache, v_cache, block_tables, table_ids, seq_lens, alibi, num_heads, scale, out
    )
    return out


def mqa_decode(
    qkv, cos, sin, k_cache, v_cache, block_tables, table_ids, seq_lens, alibi, num_heads, scale, out
):
    """See reference.mqa_decode."""
    positions, slot_mapping = last_slots(block_tables, table_ids, seq_lens, k_cache.shape[1])
    rotary_and_store(qkv, cos, sin, positions, slot_mapping, num_heads, k_cache, v_cache)
    return paged_attention(
        qkv, k_cache, v_cache, block_tables, table_ids, seq_lens, alibi, num_heads, scale, out
    )


def guided_sample(
    logits, weights, *, temperature, top_p, top_k, alpha, seed, stream_ids, steps
) -> Sampled:
    """See reference.guided_sample; the same token, bit for bit."""
    parameters = checked_parameters(
        logits, weights, temperature, top_p, top_k, alpha, stream_ids, steps
    )
    return draw(logits, weights, parameters, seed=seed, stream_ids=stream_ids, steps=steps)


def draw(logits, weights, parameters, *, seed, stream_ids, steps) -> Sampled:
    """See reference.draw."""
    num_seqs = logits.shape[1]
    sampled = Sampled.empty(num_seqs, logits.device)
    num_kept = torch.empty(num_seqs, dtype=torch.int32)
    total_mass = torch.empty(num_seqs, dtype=torch.int64)
    torch.ops.steer_engine.guided_sample(
        logits,
        weights,
        *parameters,
        signed_seed(seed),
        stream_ids,
        steps,
        *sampled,
        num_kept,
        total_mass,
    )
    return sampled

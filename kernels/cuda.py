"""The CUDA C++ backend (csrc/cuda): the sampler in one launch, Triton's kernels or the reference's
ops for the rest.

The sampler needs the compiled library to be loaded (see steer_engine.ops). The kernel is proven
against the reference in an emulator and compiled for sm_80 and sm_90; it has not run on a GPU yet.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch

from .reference.guided_sample import (
    Sampled,
    SamplingTensors,
    checked_parameters,
    signed_seed,
)

if importlib.util.find_spec("triton") is not None:
    from . import triton_ops as others
else:
    from . import reference as others

embedding = others.embedding
grouped_linear = others.grouped_linear
guided_probs = others.guided_probs
layer_norm = others.layer_norm
linear = others.linear
mqa_decode = others.mqa_decode
pack_weight = others.pack_weight
paged_attention = others.paged_attention
rotary_and_store = others.rotary_and_store

__all__ = [
    "draw",
    "embedding",
    "grouped_linear",
    "guided_probs",
    "guided_sample",
    "layer_norm",
    "linear",
    "mqa_decode",
    "pack_weight",
    "paged_attention",
    "rotary_and_store",
]

MAX_VOCAB_SIZE = 1 << 20


class Launch(NamedTuple):
    """How a row is split and what one call needs beside its arguments; contents may be anything.

    cluster_size: thread blocks per row, 4, 8 or 16, or 0: one block, and x in scratch. It
        changes the speed and never the result.
    scratch: [num_seqs, vocab_size] fp32 where cluster_size is 0, else None.
    num_kept: [num_seqs] int32 and total_mass: [num_seqs] int64, of the nucleus, for tests.
    """

    cluster_size: int
    scratch: torch.Tensor | None
    num_kept: torch.Tensor
    total_mass: torch.Tensor

    @classmethod
    def allocate(cls, num_seqs: int, vocab_size: int, device) -> Launch:
        with torch.cuda.device(device):
            size = torch.ops.steer_engine.guided_sample_cluster_size(num_seqs, vocab_size)
        scratch = None
        if size == 0:
            scratch = torch.empty(num_seqs, vocab_size, dtype=torch.float32, device=device)
        return cls(
            size,
            scratch,
            torch.empty(num_seqs, dtype=torch.int32, device=device),
            torch.empty(num_seqs, dtype=torch.int64, device=device),
        )


def launch_guided_sample(
    logits: torch.Tensor,
    weights: torch.Tensor,
    parameters: SamplingTensors,
    seed: torch.Tensor,
    stream_ids: torch.Tensor,
    steps: torch.Tensor,
    sampled: Sampled,
    launch: Launch,
) -> None:
    """The launch alone, for CUDA graphs: nothing is allocated or read by the host.

    seed: [1] int64 on the device, so that a captured graph can serve another seed; the other
    arguments as in guided_sample, contiguous. Writes sampled.
    """
    torch.ops.steer_engine.guided_sample_cuda(
        logits, weights, *parameters, seed, stream_ids, steps, *sampled,
        launch.num_kept, launch.total_mass, launch.scratch, launch.cluster_size,
        torch._C._cuda_getCurrentRawStream(logits.device.index),
    )  # fmt: skip


def guided_sample(
    logits, weights, *, temperature, top_p, top_k, alpha, seed, stream_ids, steps
) -> Sampled:
    """See reference.guided_sample; the same token, bit for bit.

    Raises: ValueError if an argument does not match, or vocab_size is above 2**20.
    """
    parameters = checked_parameters(
        logits,
        weights,
        temperature,
        top_p,
        top_k,
        alpha,
        stream_ids,
        steps,
        max_vocab_size=MAX_VOCAB_SIZE,
    )
    return draw(logits, weights, parameters, seed=seed, stream_ids=stream_ids, steps=steps)


def draw(logits, weights, parameters: SamplingTensors, *, seed, stream_ids, steps) -> Sampled:
    """See reference.draw."""
    _, num_seqs, vocab_size = logits.shape
    device = logits.device
    sampled = Sampled.empty(num_seqs, device)
    if num_seqs == 0:
        return sampled
    launch_guided_sample(
        logits,
        weights.contiguous(),
        SamplingTensors(*(p.contiguous() for p in parameters)),
        torch.full((1,), signed_seed(seed), dtype=torch.int64, device=device),
        stream_ids.contiguous(),
        steps.contiguous(),
        sampled,
        Launch.allocate(num_seqs, vocab_size, device),
    )
    return sampled

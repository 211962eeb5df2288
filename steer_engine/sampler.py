"""One draw for all running sequences: their parameters as tensors, and the fused op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from . import ops
from .guidance import PassKind
from .kernels.reference import Sampled
from .sequence import DecodingSequence


class SamplerTensors(NamedTuple):
    """Per-sequence arguments of ops.guided_sample for one step.

    weights: [num_passes, num_seqs] fp32.
    temperature, top_p, alpha: [num_seqs] fp32.
    top_k: [num_seqs] int32.
    """

    weights: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    alpha: torch.Tensor

    @classmethod
    def of(
        cls, running: Sequence[DecodingSequence], passes: Sequence[PassKind], device: torch.device
    ) -> SamplerTensors:
        """The parameters of running sequences; passes: the kinds in the order of the logits."""
        weights = [[s.guidance.weights[kind] for s in running] for kind in passes]
        return cls(
            weights=_tensor(weights, np.float32, device),
            temperature=_tensor([s.sampling.temperature for s in running], np.float32, device),
            top_p=_tensor([s.sampling.top_p for s in running], np.float32, device),
            top_k=_tensor([s.sampling.top_k for s in running], np.int32, device),
            alpha=_tensor([s.guidance.alpha for s in running], np.float32, device),
        )

    @property
    def shaping(self) -> dict[str, torch.Tensor]:
        """The keyword arguments that shape the distribution."""
        names = ("temperature", "top_p", "top_k", "alpha")
        return {name: getattr(self, name) for name in names}


def draw_tokens(
    logits: torch.Tensor,
    running: Sequence[DecodingSequence],
    passes: Sequence[PassKind],
    *,
    seed: int,
    backend: str,
) -> Sampled:
    """Draw one token per sequence.

    logits: [num_passes, num_seqs, vocab_size] fp32, changed in place.
    backend: resolved, so that no step asks again what is available.
    """
    device = logits.device
    tensors = SamplerTensors.of(running, passes, device)
    ban_endings(logits, tensors.weights, running)
    return ops.implementation(backend).guided_sample(
        logits,
        tensors.weights,
        **tensors.shaping,
        seed=seed,
        stream_ids=_tensor([s.stream_id for s in running], np.int64, device),
        steps=_tensor([s.step for s in running], np.int32, device),
    )


def next_token_probs(
    logits: torch.Tensor, running: Sequence[DecodingSequence], passes: Sequence[PassKind]
) -> torch.Tensor:
    """The distributions that draw_tokens draws from: [num_seqs, vocab_size] fp32."""
    tensors = SamplerTensors.of(running, passes, logits.device)
    ban_endings(logits, tensors.weights, running)
    return ops.guided_probs(logits, tensors.weights, **tensors.shaping)


@torch.inference_mode()
def ban_endings(
    logits: torch.Tensor, weights: torch.Tensor, running: Sequence[DecodingSequence]
) -> None:
    """Make the tokens that would end a sequence before min_tokens impossible, in place.

    Each pass gets the infinity that its weight turns into -inf, so that no sum of opposite
    infinities arises.

    logits: [num_passes, num_seqs, vocab_size].
    weights: [num_passes, num_seqs].
    """
    for index, sequence in enumerate(running):
        banned = list(sequence.banned_token_ids)
        if banned:
            sign = torch.where(weights[:, index] < 0, torch.inf, -torch.inf)
            logits[:, index, banned] = sign[:, None]


def _tensor(values, dtype, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=dtype)).to(device)

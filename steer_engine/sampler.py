"""One draw for all running sequences: their parameters as tensors, and the fused op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from . import ops
from .batch import DecodeRows, to_tensor
from .guidance import PassKind
from .head import HeadRows
from .kernels.reference import Sampled, SamplingTensors, prepare_parameters
from .model import FalconModel
from .sequence import DecodingSequence


class Shaping(NamedTuple):
    """What shapes the distributions of a set of sequences, as ops.guided_probs takes it.

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
    ) -> Shaping:
        """The parameters of running sequences; passes: the kinds in the order of the logits."""
        weights = [[s.guidance.weights[kind] for s in running] for kind in passes]
        return cls(
            weights=to_tensor(weights, np.float32, device),
            temperature=to_tensor([s.sampling.temperature for s in running], np.float32, device),
            top_p=to_tensor([s.sampling.top_p for s in running], np.float32, device),
            top_k=to_tensor([s.sampling.top_k for s in running], np.int32, device),
            alpha=to_tensor([s.guidance.alpha for s in running], np.float32, device),
        )


@dataclass
class Draw:
    """What stays as it is, or counts up, while the same sequences run.

    rows: the decode rows that it belongs to.
    head: the rows of the LM head, and their weights.
    parameters: of the sequences, as kernels read them.
    stream_ids: [num_seqs] int64.
    steps: [num_seqs] int32, counted up with each draw.
    num_ahead: draws that the host has not read yet.
    """

    rows: DecodeRows
    head: HeadRows
    parameters: SamplingTensors
    stream_ids: torch.Tensor
    steps: torch.Tensor
    num_ahead: int = 0


class Sampler:
    """Draws the next tokens of running sequences; keeps their parameters between steps."""

    def __init__(self, backend: str, *, folds_head: bool, model: FalconModel):
        """backend: resolved, so that no step asks again what is available."""
        self._draw = ops.implementation(backend).draw
        self._folds_head, self._model = folds_head, model
        self._prepared: Draw | None = None

    def prepare(self, rows: DecodeRows, running: Sequence[DecodingSequence]) -> Draw:
        """rows: of the running sequences; while it is the same object, so are they."""
        if self._prepared is None or self._prepared.rows is not rows:
            model, device = self._model, self._model.device
            shaping = Shaping.of(running, rows.passes, device)
            self._prepared = Draw(
                rows,
                model.head_rows([s.guidance for s in running], rows.passes, folds=self._folds_head),
                prepare_parameters(*shaping[1:], model.config.vocab_size),
                to_tensor([s.stream_id for s in running], np.int64, device),
                to_tensor([s.step for s in running], np.int32, device),
            )
        return self._prepared

    def draw(
        self, logits: torch.Tensor, draw: Draw, running: Sequence[DecodingSequence], *, seed: int
    ) -> Sampled:
        """Draw one token per sequence.

        logits: [num_rows, num_seqs, vocab_size] fp32 of draw.head's rows, changed in place.
        """
        ban_endings(logits, draw.head.weights, running, draw.num_ahead)
        sampled = self._draw(
            logits,
            draw.head.weights,
            draw.parameters,
            seed=seed,
            stream_ids=draw.stream_ids,
            steps=draw.steps,
        )
        draw.steps.add_(1)
        draw.num_ahead += 1
        return sampled


def next_token_probs(
    logits: torch.Tensor, running: Sequence[DecodingSequence], passes: Sequence[PassKind]
) -> torch.Tensor:
    """The distributions that Sampler.draw draws from: [num_seqs, vocab_size] fp32.

    logits: [num_passes, num_seqs, vocab_size] fp32, changed in place.
    passes: the kinds in the order of the logits.
    """
    shaping = Shaping.of(running, passes, logits.device)._asdict()
    ban_endings(logits, shaping["weights"], running, num_ahead=0)
    return ops.guided_probs(logits, **shaping)


def ban_endings(
    logits: torch.Tensor,
    weights: torch.Tensor,
    running: Sequence[DecodingSequence],
    num_ahead: int,
) -> None:
    """Make the tokens that would end a sequence before min_tokens impossible, in place.

    Each row gets the infinity that its weight turns into -inf, so that no sum of opposite
    infinities arises.

    logits: [num_rows, num_seqs, vocab_size], of passes or of the head's rows.
    weights: [num_rows, num_seqs].
    num_ahead: tokens that were drawn and not yet appended.
    """
    for index, sequence in enumerate(running):
        banned = list(sequence.banned_at(sequence.step + num_ahead))
        if banned:
            sign = torch.where(weights[:, index] < 0, torch.inf, -torch.inf)
            with torch.inference_mode():  # the logits may come from there
                logits[:, index, banned] = sign[:, None]

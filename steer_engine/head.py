"""Which rows go through the LM head: one for each pass, or the passes combined.

The head is linear, so hidden states may be combined in front of it instead of logits behind it:

    sum over passes of w * (W h) = W (sum over passes of w * h)

That is one row of the model's largest product per sequence in place of three. In bf16 the combined
state h is split into two rows, hi = bf16(h) and lo = bf16(h - hi): rounding once costs 0.02 nats,
hi and lo cost 4e-5 (largest error of the combined logits; bench/NOTES.md).

Whether a sequence's passes are combined depends on its own settings alone, so that its bits do not
depend on its neighbours. The plausibility cut needs the domain's own logits: with alpha > 0 every
pass keeps its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .guidance import Guidance, PassKind


class HeadRows(NamedTuple):
    """The rows of one step's head: row (i, s) is the head of sum over passes of coefficient * h.

    passes: the kinds of logit_rows; row i uses the head of passes[i].
    coefficients: [num_rows, num_passes, num_seqs] fp32.
    is_low: [num_rows, num_seqs] bool, the row is what bf16 loses of that sum.
    weights: [num_rows, num_seqs] fp32, with which the sampler adds the rows' logits up.
    """

    passes: tuple[PassKind, ...]
    coefficients: torch.Tensor
    is_low: torch.Tensor
    weights: torch.Tensor


def head_rows(
    guidances: Sequence[Guidance],
    passes: Sequence[PassKind],
    *,
    folds: bool,
    shares_head: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> HeadRows:
    """The rows for a set of running sequences.

    passes: the kinds in the order of logit_rows, the domain's first.
    folds: combine where it saves rows.
    shares_head: base and domain have one head.
    dtype: of the head's input.
    """
    num_passes, num_seqs = len(passes), len(guidances)
    coefficients = np.zeros((num_passes, num_passes, num_seqs), np.float32)
    is_low = np.zeros((num_passes, num_seqs), np.bool_)
    weights = np.zeros((num_passes, num_seqs), np.float32)
    for s, guidance in enumerate(guidances):
        own = np.array([guidance.weights[kind] for kind in passes], np.float32)
        used = [i for i in range(num_passes) if own[i] != 0]
        combined = [i for i in used if shares_head or passes[i] is not PassKind.BASE]
        num_needed = 1 if dtype == torch.float32 else 2
        pays = len(combined) > num_needed and (num_needed == 1 or shares_head)
        if not (folds and pays and guidance.alpha == 0):
            combined = []
            coefficients[0, 0, s] = 1  # the sampler reads the domain's logits for the cut
        for i in set(used) - set(combined):
            coefficients[i, i, s], weights[i, s] = 1, own[i]
        for i in range(num_needed if combined else 0):
            coefficients[i, combined, s], weights[i, s] = own[combined], 1
            is_low[i, s] = i == 1
    num_rows = max((i + 1 for i in range(num_passes) if weights[i].any()), default=1)

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values[:num_rows])).to(device)

    return HeadRows(tuple(passes), tensor(coefficients), tensor(is_low), tensor(weights))

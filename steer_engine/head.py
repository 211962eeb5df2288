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

    Uncombined rows stand in the order of the passes.

    passes: the kinds of logit_rows, the base's last.
    num_domain_rows: rows in front that use the domain's head; those behind use the base's.
    coefficients: [num_rows, num_passes, num_seqs] fp32.
    is_low: [num_rows, num_seqs] bool, the row is what bf16 loses of that sum.
    weights: [num_rows, num_seqs] fp32, with which the sampler adds the rows' logits up.
    """

    passes: tuple[PassKind, ...]
    num_domain_rows: int
    coefficients: torch.Tensor
    is_low: torch.Tensor
    weights: torch.Tensor


class Row(NamedTuple):
    """One sequence's part of a row of HeadRows."""

    coefficients: dict[PassKind, float]
    weight: float
    is_low: bool = False


def _own_rows(kinds: Sequence[PassKind], guidance: Guidance) -> list[Row]:
    """Each pass alone, as far as one has a weight.

    The domain's also where its weight is 0: the sampler reads it for the cut.
    """
    weights = [guidance.weights[kind] for kind in kinds]
    is_read = [w != 0 or kind is PassKind.DOMAIN for kind, w in zip(kinds, weights, strict=True)]
    num_rows = max((i + 1 for i, is_one in enumerate(is_read) if is_one), default=0)
    return [
        Row({kind: 1.0} if is_one else {}, weight)
        for kind, is_one, weight in zip(kinds, is_read, weights, strict=True)
    ][:num_rows]


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

    passes: the kinds in the order of logit_rows, the domain's first, the base's last.
    folds: combine where it saves rows.
    shares_head: base and domain have one head.
    dtype: of the head's input.
    """
    with_base_head = [] if shares_head else [k for k in passes if k is PassKind.BASE]
    with_domain_head = [kind for kind in passes if kind not in with_base_head]
    # In bf16 hi and lo.
    num_combined = 1 if dtype == torch.float32 else 2
    domain_rows, base_rows = [], []
    for guidance in guidances:
        used = {k: guidance.weights[k] for k in with_domain_head if guidance.weights[k] != 0}
        if folds and guidance.alpha == 0 and len(used) > num_combined:
            domain_rows.append([Row(used, 1.0, is_low=i == 1) for i in range(num_combined)])
        else:
            domain_rows.append(_own_rows(with_domain_head, guidance))
        base_rows.append(_own_rows(with_base_head, guidance))
    num_domain_rows, num_base_rows = (max(map(len, rows)) for rows in (domain_rows, base_rows))
    shape = (num_domain_rows + num_base_rows, len(guidances))
    coefficients = np.zeros((shape[0], len(passes), shape[1]), np.float32)
    is_low, weights = np.zeros(shape, np.bool_), np.zeros(shape, np.float32)
    for first, rows in ((0, domain_rows), (num_domain_rows, base_rows)):
        for s, own in enumerate(rows):
            for i, row in enumerate(own, start=first):
                for kind, coefficient in row.coefficients.items():
                    coefficients[i, passes.index(kind), s] = coefficient
                is_low[i, s], weights[i, s] = row.is_low, row.weight
    tensors = (torch.from_numpy(a).to(device) for a in (coefficients, is_low, weights))
    return HeadRows(tuple(passes), num_domain_rows, *tensors)

"""LayerNorm over the hidden dimension, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """out = (x - mean) / sqrt(var + eps) * weight + bias per row, statistics in fp32.

    x: [num_rows, hidden_size] fp32.
    weight, bias: [hidden_size] fp32.
    out: [num_rows, hidden_size] fp32 or bf16.
    Source: Ba et al. 2016 (arXiv:1607.06450).
    """
    return out.copy_(F.layer_norm(x, x.shape[-1:], weight, bias, eps))

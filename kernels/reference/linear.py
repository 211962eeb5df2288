"""Linear layers and the embedding lookup, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

# A library's matrix product may sum in another order for another number of rows. Running fixed
# tiles of rows, the last one padded, makes a row's result independent of how many stand beside it.
ROW_TILE = 16


class LinearWeight(NamedTuple):
    """A weight in the form that one backend reads.

    data: the backend's own layout; here [out_features, in_features].
    """

    data: torch.Tensor
    out_features: int
    in_features: int


def pack_weight(weight: torch.Tensor) -> LinearWeight:
    """Wrap a weight [out_features, in_features], fp32 or bf16; the reference keeps its layout."""
    return LinearWeight(weight, *weight.shape)


def embedding(weight: LinearWeight, input_ids: torch.Tensor) -> torch.Tensor:
    """Rows of the embedding matrix: [num_tokens, hidden_size] fp32.

    input_ids: [num_tokens] int64.
    """
    return weight.data[input_ids].float()


def linear(
    x: torch.Tensor,
    weight: LinearWeight,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    gelu_columns: int = 0,
    accumulate: bool = False,
) -> torch.Tensor:
    """out = gelu(x W^T + bias), or out += ... with accumulate.

    GELU applies to the first gelu_columns outputs only, so that a product whose outputs are
    [up | q | k | v] is one call. Bias and GELU (erf form) are computed in fp32.

    Args:
        x: [num_rows, in_features], dtype of the weight.
        bias: [out_features] fp32, or None.
        gelu_columns: 0 to out_features.
        out: [num_rows, out_features], fp32 or bf16, written in place.
    Returns: out. A row's result does not depend on the other rows.
    """
    num_rows = x.shape[0]
    for first in range(0, num_rows, ROW_TILE):
        tile = x[first : first + ROW_TILE]
        tile = F.pad(tile, (0, 0, 0, ROW_TILE - tile.shape[0]))
        y = F.linear(tile, weight.data).float()[: num_rows - first]
        if bias is not None:
            y = y + bias
        if gelu_columns:
            y[:, :gelu_columns] = F.gelu(y[:, :gelu_columns])
        rows = out[first : first + ROW_TILE]
        if accumulate:
            rows += y
        else:
            rows.copy_(y)
    return out

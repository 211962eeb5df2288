"""Linear layers and the embedding lookup, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

# A library's matrix product may sum in another order for another number of rows. Running fixed
# tiles of rows, the last one padded, makes a row's result independent of how many stand beside it.
ROW_TILE = 16
MAX_INT8 = 127  # -128 is left out, so that a weight's sign costs nothing


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


class Int8Weight(NamedTuple):
    """A weight quantised per output channel, symmetric: W[n, k] = scales[n] * q[n, k].

    data: q in the backend's own layout; here [out_features, columns of q] int8, all in [-127, 127].
    in_features: columns of q and tail together.
    scales: [out_features] fp32.
    tail: the last columns of W in the inputs' dtype, not quantised (an adapter's B), or None.
    """

    data: torch.Tensor
    out_features: int
    in_features: int
    scales: torch.Tensor
    tail: LinearWeight | None = None

    @property
    def tail_features(self) -> int:
        """Columns of tail."""
        return 0 if self.tail is None else self.tail.in_features


def pack_int8_weight(weight: torch.Tensor, tail: torch.Tensor | None = None) -> Int8Weight:
    """Quantise a weight [out_features, in_features], fp32 or bf16.

        scales[n] = max over k of |W[n, k]| / 127,  q[n, k] = W[n, k] / scales[n]

    rounded to nearest even. A scale is at least the smallest normal fp32, for rows of zeros.

    tail: see Int8Weight; [out_features, tail_features] in the dtype of the inputs, or None.
    """
    scales = weight.abs().amax(dim=1).float() / MAX_INT8
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    data = (weight.float() / scales[:, None]).round_().to(torch.int8)
    packed_tail = None if tail is None else pack_weight(tail)
    in_features = weight.shape[1] + (0 if tail is None else tail.shape[1])
    return Int8Weight(data, len(weight), in_features, scales, packed_tail)


def embedding(weight: LinearWeight, input_ids: torch.Tensor) -> torch.Tensor:
    """Rows of the embedding matrix: [num_tokens, hidden_size] fp32.

    input_ids: [num_tokens] int64.
    """
    return weight.data[input_ids].float()


def linear(
    x: torch.Tensor,
    weight: LinearWeight | Int8Weight,
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
        x: [num_rows, in_features], dtype of the weight; of an Int8Weight, of its tail.
        bias: [out_features] fp32, or None.
        gelu_columns: 0 to out_features.
        out: [num_rows, out_features], fp32 or bf16, written in place.
    Returns: out. A row's result does not depend on the other rows.
    """
    num_rows = x.shape[0]
    for first in range(0, num_rows, ROW_TILE):
        tile = x[first : first + ROW_TILE]
        tile = F.pad(tile, (0, 0, 0, ROW_TILE - tile.shape[0]))
        y = _product(tile, weight)
        if bias is not None:
            y = y + bias
        if gelu_columns:
            # Of whole tiles: PyTorch's GELU of a slice differs in the last bit with its strides.
            y = torch.where(torch.arange(y.shape[1], device=y.device) < gelu_columns, F.gelu(y), y)
        y = y[: num_rows - first]
        rows = out[first : first + ROW_TILE]
        if accumulate:
            rows += y
        else:
            rows.copy_(y)
    return out


def grouped_linear(
    x: torch.Tensor,
    weights: tuple[LinearWeight | Int8Weight, LinearWeight | Int8Weight],
    boundary: int,
    out: torch.Tensor,
    *,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    gelu_columns: int = 0,
    accumulate: bool = False,
) -> torch.Tensor:
    """linear with one weight for the rows below boundary and another for the rest.

        out[:boundary] = gelu(x[:boundary] W_0^T + b_0)
        out[boundary:] = gelu(x[boundary:] W_1^T + b_1)        or out += ... with accumulate

    Args:
        weights: W_0 and W_1, of one shape and dtype.
        boundary: 0 to num_rows.
        biases: b_0 and b_1, or None for neither.
        x, out, gelu_columns, accumulate: see linear.
    Returns: out. A row's bits are those that linear gives it with its weight.
    Raises: ValueError if boundary lies outside the rows.
    """
    epilogue = {"biases": biases, "gelu_columns": gelu_columns, "accumulate": accumulate}
    return linear_by_group(linear, x, weights, boundary, out, **epilogue)


def linear_by_group(
    linear: Callable,
    x: torch.Tensor,
    weights: tuple,
    boundary: int,
    out: torch.Tensor,
    *,
    biases: tuple[torch.Tensor, torch.Tensor] | None,
    **epilogue,
) -> torch.Tensor:
    """grouped_linear as two calls of a backend's linear."""
    check_boundary(boundary, len(x))
    groups = (slice(0, boundary), slice(boundary, None))
    for rows, weight, bias in zip(groups, weights, biases or (None, None), strict=True):
        linear(x[rows], weight, out[rows], bias=bias, **epilogue)
    return out


def check_boundary(boundary: int, num_rows: int) -> None:
    """Raises: ValueError if boundary lies outside the rows."""
    if not 0 <= boundary <= num_rows:
        raise ValueError(f"boundary must lie in [0, {num_rows=}], got {boundary}")


def _product(x: torch.Tensor, weight: LinearWeight | Int8Weight) -> torch.Tensor:
    """x W^T in fp32."""
    if isinstance(weight, LinearWeight):
        return F.linear(x, weight.data).float()
    # Whole numbers times x, summed in fp32; a sum is scaled once.
    x, x_tail = x.float().tensor_split([weight.data.shape[1]], dim=1)
    y = F.linear(x, weight.data.float()) * weight.scales
    return y if weight.tail is None else y + F.linear(x_tail, weight.tail.data.float())

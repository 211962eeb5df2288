"""Linear layers of two weight sets in Triton: the grouped GEMM of a full fine-tune.

One launch of linear_kernel covers both sets. The rows below the boundary and the rest have row
tiles of their own, and a tile takes its weight by the side on which it lies; everything else is
linear's, so that a row has the bits of linear, wherever the boundary is. The boundary is a number
of the launch and compiles nothing anew. Without rows on one side linear itself runs.

Falcon-7B on 132 processors of two programs each, weights at 3.0 TB/s; one launch against two:

    rows per side   product      bytes of both  floor    programs
    up to 64        up, qkv      415 MB         138 us   358 in 1.4 rounds of 264; twice 179
                    down, dense  413 MB         138 us   144 of two segments; twice 144 of one
                    head         1,182 MB       394 us   1,016 in 3.8 rounds; twice 508 in 1.9
    256             up, qkv                     266 us   1,432 in 5.4 rounds; twice 716 in 2.7
                    down, dense                 265 us   288 in 1.1 rounds; twice 144 in 0.5

With few rows both forms read every weight once, and what one launch saves is filling the pipelines
and waiting for the last program once instead of twice, and one of two epilogues: 97 launches of
some microseconds in a step of 9.2 ms. With 256 rows it is the rounds: none for up and qkv (6 and
twice 3), while down and dense alone leave most processors with one program of the two they can
hold. Not timed yet; bench/gpu_check.py times both forms.
"""

from __future__ import annotations

import torch

from .linear import Rest, allocate_partials, check_arguments, config_for, launch_linear, linear
from .reference.linear import LinearWeight, check_boundary


def grouped_linear(
    x: torch.Tensor,
    weights: tuple[LinearWeight, LinearWeight],
    boundary: int,
    out: torch.Tensor,
    *,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    gelu_columns: int = 0,
    accumulate: bool = False,
) -> torch.Tensor:
    """See reference.grouped_linear. x and out may have any row stride.

    Raises: ValueError if a shape or dtype does not match, or boundary lies outside the rows.
    """
    num_rows, (_, out_features, in_features) = len(x), weights[0]
    if weights[1][1:] != weights[0][1:]:
        shapes = " and ".join(str(list(weight[1:])) for weight in weights)
        raise ValueError(f"both weights must have one shape, got {shapes}")
    check_boundary(boundary, num_rows)
    bias_pair = biases or (None, None)
    for i, (weight, bias) in enumerate(zip(weights, bias_pair, strict=True)):
        names = (f"weights[{i}]", f"biases[{i}]")
        check_arguments(x, weight, bias, out, gelu_columns, accumulate, names)
    epilogue = {"gelu_columns": gelu_columns, "accumulate": accumulate}
    if boundary in (0, num_rows):
        own = int(boundary == 0)
        return linear(x, weights[own], out, bias=bias_pair[own], **epilogue)
    rest = Rest(boundary, weights[1], bias_pair[1])
    config = config_for(in_features, out_features, x.dtype)
    partials = allocate_partials(num_rows, out_features, x.device, config, boundary)
    launch_linear(
        x, weights[0], out, bias_pair[0], gelu_columns, accumulate, partials, config, rest
    )
    return out

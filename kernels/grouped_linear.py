"""Linear layers of two weight sets in Triton: the grouped GEMM of a full fine-tune.

One launch of linear_kernel covers both sets. The rows below the boundary and the rest have row
tiles of their own, and a tile takes its weight by the side on which it lies; everything else is
linear's, so that a row has the bits of linear, wherever the boundary is. The boundary is a number
of the launch and compiles nothing anew. Without rows on one side linear itself runs.

Falcon-7B on 132 processors of two programs each: the bytes of both sets at 3.0 TB/s, which take
longer than the products up to 256 rows a side, and the programs of one launch against two.

                   bytes      floor    up to 64 rows a side         256 rows a side
    up and qkv      415 MB    138 us     358 against twice 179      1,432 against twice 716
    down and dense  413 MB    138 us     144 against twice 144        288 against twice 144
    head          1,182 MB    394 us   1,016 against twice 508      4,064 against twice 2,032

Up to 64 rows both forms read every weight once. One launch fills the pipelines and waits for its
last program once instead of twice, and has one epilogue instead of two (down and dense): 97
launches less, of some microseconds each, in a step of 9.2 ms. At 256 rows what counts is rounds of
264 programs: 6 against twice 3 for up and qkv and 16 against twice 8 for the head, no gain; down
and dense alone leave most processors with one program of the two they can hold, together they fill
them. Not timed yet; bench/gpu_check.py times both forms.
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

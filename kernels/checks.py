"""What the Triton launchers ask of their arguments before they launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_tensors(
    expected: dict[str, tuple[torch.Tensor | None, Sequence[int | None], tuple[torch.dtype, ...]]],
) -> None:
    """Check {argument: (tensor, shape, dtypes)}. None in a shape allows any size; None for a tensor
    means that the argument was left out. The last dimension must have unit stride; others may have
    any.

    Raises: ValueError naming the argument, what was expected and what came.
    """
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor is None:
            continue
        fits = len(tensor.shape) == len(shape) and all(
            size in (None, got) for size, got in zip(shape, tensor.shape, strict=True)
        )
        has_unit_stride = tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
        if not fits or tensor.dtype not in dtypes or not has_unit_stride:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"{name} must be [{sizes}] {' or '.join(map(str, dtypes))} with unit stride, "
                f"got {list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
            )

"""grouped_linear of the backends that run on a CPU: the bits of linear on either side."""

from __future__ import annotations

import pytest
import torch
from op_cases import BF16, FP32, normal
from steer_engine.kernels import cpu, reference

from steer_engine import ops

NUM_ROWS, IN_FEATURES, OUT_FEATURES, TAIL_FEATURES = 40, 50, 37, 4


@pytest.fixture(params=[cpu, reference], ids=["cpu", "reference"])
def module(request):
    reason = ops.unavailable_reason("cpu")
    if request.param is cpu and reason:
        pytest.skip(f"backend cpu: {reason}")
    return request.param


def packed_pair(module, kind: str) -> tuple:
    """Two weights, fp32, bf16 or int8 with a tail."""
    dtype = FP32 if kind == "fp32" else BF16
    weights = [normal(OUT_FEATURES, IN_FEATURES, dtype=dtype, seed=seed) for seed in (1, 2)]
    if kind != "int8":
        return tuple(module.pack_weight(weight) for weight in weights)
    split = (IN_FEATURES - TAIL_FEATURES, TAIL_FEATURES)
    return tuple(module.pack_int8_weight(*weight.split(split, dim=1)) for weight in weights)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("epilogue", [{"gelu_columns": 20}, {"accumulate": True}], ids=str)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_a_row_has_the_bits_of_linear_wherever_the_boundary_is(module, kind, epilogue, has_bias):
    weights = packed_pair(module, kind)
    biases = tuple(normal(OUT_FEATURES, seed=seed) for seed in (3, 4)) if has_bias else None
    # Rows of a wider buffer, as in the model.
    x = normal(NUM_ROWS, IN_FEATURES + 6, dtype=FP32 if kind == "fp32" else BF16)[:, :IN_FEATURES]
    before = normal(NUM_ROWS, OUT_FEATURES + 3, seed=5)[:, :OUT_FEATURES]
    expected = [
        module.linear(x, weight, before.clone(), bias=bias, **epilogue)
        for weight, bias in zip(weights, biases or (None, None), strict=True)
    ]
    for boundary in (0, 1, 15, 16, 17, 39, 40):
        out = before.clone()
        got = module.grouped_linear(x, weights, boundary, out, biases=biases, **epilogue)
        assert got is out
        assert torch.equal(out[:boundary], expected[0][:boundary]), boundary
        assert torch.equal(out[boundary:], expected[1][boundary:]), boundary


def test_a_boundary_outside_the_rows_is_refused(module):
    x, out = torch.ones(2, IN_FEATURES), torch.ones(2, OUT_FEATURES)
    weights = packed_pair(module, "fp32")
    for boundary in (-1, 3):
        with pytest.raises(ValueError, match=rf"lie in \[0, num_rows=2\], got {boundary}"):
            module.grouped_linear(x, weights, boundary, out)
    assert (out == 1).all()


def test_a_named_backend_serves_the_op():
    weights = packed_pair(reference, "fp32")
    x, out = normal(3, IN_FEATURES), torch.empty(3, OUT_FEATURES)
    got = ops.grouped_linear(x, weights, 2, out, backend="reference")
    assert torch.equal(got[2:], reference.linear(x[2:], weights[1], torch.empty(1, OUT_FEATURES)))

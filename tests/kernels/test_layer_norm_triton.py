"""The Triton LayerNorm in the interpreter, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_interpreter import interpreted

layer_norm = pytest.importorskip("steer_engine.kernels.layer_norm", exc_type=ImportError).layer_norm

UNIT = 2.0**-24  # the relative error of one rounding in fp32
TOLERANCE = {
    torch.float32: 8 * UNIT,  # of the result: scaling, bias, the last rounding
    # The interpreter cuts off where a GPU rounds to nearest: one unit in the last of 8 bits.
    torch.bfloat16: 2.0**-7,
    "sum": 8 * UNIT,  # of the magnitudes that the mean and the variance add up
}


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size", [1, 15, 16, 17, 100, 4544, 8192])
@interpreted
def test_layer_norm_equals_fp64(hidden_size, out_dtype):
    g = torch.Generator().manual_seed(hidden_size)
    x = torch.randn(5, hidden_size, generator=g) * 3 + 2
    x[0] += 1000  # the variance must be of the differences
    weight, bias = torch.randn(2, hidden_size, generator=g)
    # Rows of x and out lie apart; what lies between must not be read or written.
    stored_x = torch.full((5, hidden_size + 3), torch.nan)
    stored_x[:, :hidden_size] = x
    stored_out = torch.full((5, hidden_size + 5), -7, dtype=out_dtype)
    out = layer_norm(stored_x[:, :hidden_size], weight, bias, 1e-5, stored_out[:, :hidden_size])
    assert out.data_ptr() == stored_out.data_ptr()
    assert (stored_out[:, hidden_size:] == -7).all()

    expected = F.layer_norm(x.double(), [hidden_size], weight.double(), bias.double(), 1e-5)
    scale = (x.double().var(dim=1, correction=0, keepdim=True) + 1e-5).rsqrt()
    magnitude = x.double().abs().mean(dim=1, keepdim=True) + x.double().abs()
    tolerance = TOLERANCE["sum"] * magnitude * scale * weight.abs()
    tolerance += TOLERANCE[out_dtype] * (expected.abs() + bias.abs())
    error = (out.double() - expected).abs()
    is_wrong = ~(error <= tolerance)
    if is_wrong.any():
        row, column = is_wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"layer_norm {list(x.shape)} {out_dtype}: {int(is_wrong.sum())} wrong, first at "
            f"{row}, {column}: got {out[row, column]}, expected {expected[row, column]}, "
            f"tolerance {tolerance[row, column]:.3g}"
        )


@interpreted
def test_a_row_of_layer_norm_does_not_depend_on_its_neighbours():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 300, generator=g)
    weight, bias = torch.randn(2, 300, generator=g)
    together = layer_norm(x, weight, bias, 1e-5, torch.empty(4, 300))
    x[1:] = torch.nan
    assert torch.equal(layer_norm(x, weight, bias, 1e-5, torch.empty(4, 300))[0], together[0])


@interpreted
def test_no_rows_and_wrong_arguments():
    weight = bias = torch.ones(5)
    assert layer_norm(torch.empty(0, 5), weight, bias, 1e-5, torch.empty(0, 5)).shape == (0, 5)
    with pytest.raises(ValueError, match=r"out must be \[2, 5\].*got \[2, 4\]"):
        layer_norm(torch.ones(2, 5), weight, bias, 1e-5, torch.empty(2, 4))

"""Two weight sets in one launch, in Triton's interpreter: the bits of linear on either side of the
boundary, wherever it lies and whoever sums the segments.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from op_cases import BF16, DTYPES, FP32, TOLERANCE, assert_close, normal
from steer_engine.kernels import reference
from triton_interpreter import interpreted

op = pytest.importorskip("steer_engine.kernels.linear", exc_type=ImportError)
from steer_engine.kernels.grouped_linear import grouped_linear  # noqa: E402

# Small tiles as in test_linear_triton.py, whose fp64 checks hold for linear.
CONFIG = op.LaunchConfig(3, block_m=64, block_n=64, block_k=32, epilogue_block_size=128)
IN_FEATURES, OUT_FEATURES, GELU_COLUMNS = 90, 70, 40
MOST_ROWS = 130
# num_rows and boundary: inside and on the edges of tiles, of one set, both, and in several tiles.
SPLITS = [(2, 1), (64, 63), (65, 1), (65, 64), (128, 64), (129, 65), (130, 66), (130, 2)]


class Sets:
    """Rows and two weights with biases, and what linear makes of all rows with each of them."""

    def __init__(self, dtype: torch.dtype, has_bias: bool = True):
        self.x = normal(MOST_ROWS, IN_FEATURES, dtype=dtype)
        self.weights = tuple(
            op.pack_weight(normal(OUT_FEATURES, IN_FEATURES, dtype=dtype, seed=seed, scale=0.1))
            for seed in (1, 2)
        )
        self.biases = tuple(normal(OUT_FEATURES, seed=s) if has_bias else None for s in (3, 4))
        self.residual = normal(MOST_ROWS, OUT_FEATURES, seed=5)

    def out(self, num_rows: int, accumulate: bool) -> torch.Tensor:
        """Rows side by side in a wider buffer that holds -7 beside them."""
        whole = torch.full((num_rows, OUT_FEATURES + 5), -7.0)
        out = whole[:, 2:-3]
        out.copy_(self.residual[:num_rows]) if accumulate else out.fill_(torch.nan)
        return out

    def launch(self, x, out, accumulate, *, is_partial, group=0, rest=None) -> torch.Tensor:
        partials = None
        if is_partial:
            partials = torch.full((CONFIG.num_segments, *out.shape), torch.nan)
        op.launch_linear(
            x, self.weights[group], out, self.biases[group], GELU_COLUMNS, accumulate, partials,
            CONFIG, rest,
        )  # fmt: skip
        return out

    def grouped(self, num_rows: int, boundary: int, accumulate=False, **how) -> torch.Tensor:
        rest = op.Rest(boundary, self.weights[1], self.biases[1])
        out = self.out(num_rows, accumulate)
        self.launch(self.x[:num_rows], out, accumulate, rest=rest, **how)
        beside = out.as_strided((num_rows, OUT_FEATURES + 5), out.stride(), 0)
        assert (beside[:, :2] == -7).all() and (beside[:, -3:] == -7).all()
        return out

    def apart(self, num_rows: int, boundary: int, accumulate=False, **how) -> torch.Tensor:
        out = self.out(num_rows, accumulate)
        for group, rows in enumerate((slice(0, boundary), slice(boundary, num_rows))):
            self.launch(self.x[rows], out[rows], accumulate, group=group, **how)
        return out


@pytest.mark.parametrize("is_partial", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@interpreted
def test_one_launch_gives_the_bits_of_two(dtype, is_partial):
    for has_bias in (True, False):
        sets = Sets(dtype, has_bias)
        for num_rows, boundary in SPLITS if has_bias else SPLITS[:3]:
            for accumulate in (False, True):
                case = (num_rows, boundary, accumulate)
                got = sets.grouped(*case, is_partial=is_partial)
                assert torch.equal(got, sets.apart(*case, is_partial=False)), case


@interpreted
def test_every_number_of_rows_gives_the_bits_of_linear():
    sets = Sets(BF16)
    expected = [sets.apart(MOST_ROWS, b, is_partial=False) for b in (MOST_ROWS - 1, 1)]
    for num_rows in range(2, MOST_ROWS + 1):
        boundary = 1 + 37 * num_rows % (num_rows - 1)
        got = sets.grouped(num_rows, boundary, is_partial=num_rows % 2 == 0)
        assert torch.equal(got[:boundary], expected[0][:boundary]), (num_rows, boundary)
        assert torch.equal(got[boundary:], expected[1][boundary:num_rows]), (num_rows, boundary)


@pytest.mark.parametrize("boundary", [2, 33, 68])
@interpreted
def test_groups_of_row_tiles_cover_every_tile_of_both_sets(boundary):
    """Tiles of 2 rows: 70 rows are 35 or 36 row tiles, in groups of 16 that hold both sets."""
    x, residual = normal(70, 16), normal(70, 40, seed=3)
    weights = [op.pack_weight(normal(40, 16, seed=seed)) for seed in (1, 2)]
    config = op.LaunchConfig(1, block_m=2, block_n=32, block_k=16)
    got, rest = residual.clone(), op.Rest(boundary, weights[1], None)
    op.launch_linear(x, weights[0], got, None, 0, True, None, config, rest)
    expected = residual.clone()
    for weight, rows in zip(weights, (slice(0, boundary), slice(boundary, None)), strict=True):
        op.launch_linear(x[rows], weight, expected[rows], None, 0, True, None, config)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("is_partial", [False, True], ids=["together", "apart"])
@interpreted
def test_a_row_depends_on_no_row_on_either_side(is_partial):
    sets = Sets(BF16)
    expected = sets.grouped(70, 33, is_partial=is_partial)
    given = sets.x.clone()
    for row in (0, 32, 33, 69):
        sets.x = torch.full_like(given, torch.nan)
        sets.x[row] = given[row]
        got = sets.grouped(70, 33, is_partial=is_partial)
        assert torch.equal(got[row], expected[row]), row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@interpreted
def test_the_op_equals_fp64_and_linear_at_every_boundary(dtype):
    in_features = 600 if dtype == BF16 else 60  # 2 segments in bf16
    x = normal(5, in_features, dtype=dtype)
    weights = [normal(150, in_features, dtype=dtype, seed=s, scale=0.05) for s in (1, 2)]
    biases = tuple(normal(150, seed=seed) for seed in (3, 4))
    packed = tuple(op.pack_weight(weight) for weight in weights)
    for boundary in range(6):
        epilogue = {"gelu_columns": 130}
        got = grouped_linear(x, packed, boundary, torch.empty(5, 150), biases=biases, **epilogue)
        for group, rows in enumerate((slice(0, boundary), slice(boundary, None))):
            x_group, weight = x[rows].double(), weights[group].double()
            y = x_group @ weight.T + biases[group]
            y[:, :130] = F.gelu(y[:, :130])
            # |GELU'| is at most 1.13; bias, GELU and the last rounding.
            tolerance = 1.13 * TOLERANCE["sum"] * (x_group.abs() @ weight.abs().T)
            tolerance += (TOLERANCE[FP32] + TOLERANCE["gelu"]) * y.abs().clamp(min=1)
            assert_close(got[rows], y, tolerance, f"boundary {boundary}")
            alone = torch.empty_like(got[rows])
            op.linear(x[rows], packed[group], alone, bias=biases[group], **epilogue)
            assert torch.equal(got[rows], alone), f"boundary {boundary}"


@interpreted
def test_two_sets_are_one_launch_and_one_epilogue():
    class Recorder:
        def __init__(self, kernel):
            self.kernel, self.grids = kernel, []

        def __getitem__(self, grid):
            self.grids.append(grid)
            return self.kernel[grid]

    x, out = normal(70, 600, dtype=BF16), torch.empty(70, 200)
    weights = [op.pack_weight(normal(200, 600, dtype=BF16, seed=seed)) for seed in (1, 2)]
    kernels = {name: Recorder(getattr(op, name)) for name in ("linear_kernel", "epilogue_kernel")}
    with mock.patch.multiple(op, **kernels):
        grouped_linear(x, weights, 67, out)
    # Rows 0 to 63, 64 to 66, 67 to 69; columns in two tiles; inputs in two segments.
    assert kernels["linear_kernel"].grids == [(6, 2)]
    assert kernels["epilogue_kernel"].grids == [(70, 1)]


def test_tiles_of_both_sets_decide_who_sums_the_segments():
    config = op.config_for(4544, 4544, BF16)  # 36 tiles of columns
    for num_rows, boundary, is_partial in ((192, 64, True), (192, 65, False), (4, 2, True)):
        partials = op.allocate_partials(num_rows, 4544, "cpu", config, boundary)
        assert (partials is not None) == is_partial, (num_rows, boundary)


@interpreted
def test_no_rows_and_wrong_arguments():
    x, out = torch.ones(2, 3), torch.empty(2, 5)
    weights = (op.pack_weight(torch.ones(5, 3)),) * 2
    assert grouped_linear(x[:0], weights, 0, out[:0]).shape == (0, 5)
    for function in (grouped_linear, reference.grouped_linear):
        for boundary in (-1, 3):
            with pytest.raises(ValueError, match=r"boundary must lie in \[0, num_rows=2\], got"):
                function(x, weights, boundary, out)
    other = op.pack_weight(torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"one shape, got \[5, 3\] and \[5, 4\]"):
        grouped_linear(x, (weights[0], other), 1, out)
    double = op.pack_weight(torch.ones(5, 3).double())
    with pytest.raises(ValueError, match=r"weights\[1\] must be \[5, 3\].*got .*float64"):
        grouped_linear(x, (weights[0], double), 1, out)
    with pytest.raises(ValueError, match=r"biases\[1\] must be \[5\].*got \[4\]"):
        grouped_linear(x, weights, 1, out, biases=(torch.ones(5), torch.ones(4)))
    with pytest.raises(ValueError, match=r"gelu_columns must lie in \[0, out_features=5\]"):
        grouped_linear(x, weights, 1, out, gelu_columns=6)

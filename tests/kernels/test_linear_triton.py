"""The Triton linear layers in the interpreter: against fp64, and the rule that a row's bits depend
neither on the rows beside it nor on whether its segments have programs of their own.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from op_cases import assert_close
from triton_interpreter import interpreted

op = pytest.importorskip("steer_engine.kernels.linear", exc_type=ImportError)
linear, pack_weight = op.linear, op.pack_weight

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [BF16, FP32]
UNIT = 2.0**-24  # the relative error of one rounding in fp32
TOLERANCE = {
    FP32: 4 * UNIT,  # of the result: bias, residual and the last rounding
    # The interpreter cuts off where a GPU rounds to nearest: one unit in the last of 8 bits.
    BF16: 2.0**-7,
    "sum": 8 * UNIT,  # of the magnitudes that a product adds up
    "gelu": 4 * UNIT,  # of max(1, |x|): erf, 1 + erf, and two products
    "cublas": 2.0**-8,  # of the product, which comes back in bf16
}
# Small tiles, for the interpreter's time goes with their number; 64 rows, as on a GPU.
ONE, THREE = (
    op.LaunchConfig(n, block_m=64, block_n=64, block_k=32, epilogue_block_size=128) for n in (1, 3)
)
SIZES = [(1, 1), (15, 17), (17, 15), (64, 64), (65, 63), (130, 65), (63, 130)]  # inputs, outputs


def normal(*shape, dtype=FP32, seed=0, scale=1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * scale).to(dtype)


def inside(values: torch.Tensor, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of values with `fill` on all sides, and the whole."""
    num_rows, num_columns = values.shape
    whole = torch.full((num_rows + 2, num_columns + 7), fill, dtype=values.dtype)
    part = whole[1:-1, 3:-4]
    part.copy_(values)
    return part, whole


class Case:
    """A product with every part of the epilogue, and its result in fp64."""

    def __init__(self, num_rows, in_features, out_features, dtype, gelu_columns=0, has_bias=True):
        self.name = f"{num_rows}x{in_features}x{out_features} {dtype} gelu_columns={gelu_columns}"
        self.x = normal(num_rows, in_features, dtype=dtype)
        self.weight = normal(
            out_features, in_features, dtype=dtype, seed=1, scale=in_features**-0.5
        )
        self.bias = normal(out_features, seed=2) if has_bias else None
        self.residual = normal(num_rows, out_features, seed=3)
        self.gelu_columns = gelu_columns

    def empty(self, dtype) -> torch.Tensor:
        return torch.full(self.residual.shape, torch.nan, dtype=dtype)

    def run(self, config, *, is_partial, out=None, rows=slice(None)) -> torch.Tensor:
        """out: the residual to add to, or a dtype."""
        x, weight = self.x[rows], pack_weight(self.weight)
        accumulate = isinstance(out, torch.Tensor)
        out = out if accumulate else self.empty(out)[rows]
        partials = None
        if is_partial:
            partials = torch.full((config.num_segments, *out.shape), torch.nan)
        op.launch_linear(x, weight, out, self.bias, self.gelu_columns, accumulate, partials, config)
        return out

    def check(self, got: torch.Tensor, *, accumulate=False, product_error=TOLERANCE["sum"]):
        x, weight = self.x.double(), self.weight.double()
        expected = x @ weight.T
        tolerance = x.abs() @ weight.abs().T * product_error
        if self.bias is not None:
            expected += self.bias
            tolerance += TOLERANCE[FP32] * self.bias.abs()
        has_gelu = torch.arange(len(weight)) < self.gelu_columns
        after = 1.13 * tolerance + TOLERANCE["gelu"] * expected.abs().clamp(min=1)  # |GELU'|
        tolerance = torch.where(has_gelu, after, tolerance)
        expected = torch.where(has_gelu, F.gelu(expected), expected)
        if accumulate:
            tolerance += TOLERANCE[FP32] * expected.abs()
            expected += self.residual
        tolerance += (TOLERANCE[FP32] + (got.dtype == BF16) * TOLERANCE[BF16]) * expected.abs()
        assert_close(got, expected, tolerance, f"linear {self.name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 63, 64, 65, 130])
@interpreted
def test_linear_equals_fp64_whoever_sums_the_segments(num_rows, dtype):
    for in_features, out_features in SIZES:
        case = Case(num_rows, in_features, out_features, dtype, gelu_columns=out_features // 2)
        if in_features <= ONE.block_k:
            case.check(case.run(ONE, is_partial=False, out=FP32))
            continue
        together = case.run(THREE, is_partial=False, out=FP32)
        case.check(together)
        apart = case.run(THREE, is_partial=True, out=FP32)
        assert torch.equal(together, apart), f"{case.name}: segments apart give other bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@interpreted
def test_programs_of_several_segments_give_the_same_bits(dtype):
    four = ONE._replace(num_segments=4)
    case = Case(130, 125, 40, dtype, gelu_columns=20)  # 3 tiles
    expected = case.run(four, is_partial=False, out=FP32)
    # 12 programs of one segment, 6 of two, 3 of four.
    for num_processors, per_program in ((6, 1), (4, 2), (3, 4)):
        with mock.patch.multiple(
            op, NUM_PROCESSORS=num_processors, MAX_PROGRAMS_AT_ONCE=2 * num_processors
        ):
            assert four.segments_per_program(3) == per_program
            got = case.run(four, is_partial=True, out=FP32)
        assert torch.equal(got, expected), f"{per_program} segments of a program"


@pytest.mark.parametrize("is_partial", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("gelu_columns", [0, 5, 63, 64, 65, 70])
@interpreted
def test_every_epilogue_equals_fp64(gelu_columns, is_partial):
    config = THREE._replace(epilogue_block_size=64)
    for has_bias in (False, True):
        case = Case(2, 40, 70, BF16, gelu_columns, has_bias)
        for dtype in DTYPES:
            case.check(case.run(config, is_partial=is_partial, out=dtype))
        got = case.run(config, is_partial=is_partial, out=case.residual.clone())
        case.check(got, accumulate=True)


@pytest.mark.parametrize("is_partial", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@interpreted
def test_what_lies_between_rows_is_neither_read_nor_written(dtype, is_partial):
    case = Case(66, 37, 41, dtype, gelu_columns=20)
    case.x, _ = inside(case.x, torch.nan)
    out, whole = inside(case.residual, -7)
    case.check(case.run(THREE, is_partial=is_partial, out=out), accumulate=True)
    out.fill_(-7)
    assert (whole == -7).all()


@interpreted
def test_gelu_equals_fp64_on_both_tails():
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 500.0])])
    out = linear(x[:, None], pack_weight(torch.ones(1, 1)), torch.empty(2006, 1), gelu_columns=1)
    expected = F.gelu(x.double())[:, None]
    tolerance = TOLERANCE["gelu"] * x.double().abs().clamp(min=1)[:, None]
    assert_close(out, expected, tolerance, "gelu")


@pytest.mark.parametrize("is_partial", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@interpreted
def test_a_row_depends_on_no_other_row(dtype, is_partial):
    case = Case(67, 100, 70, dtype, gelu_columns=40)

    def run(rows):
        return case.run(THREE, is_partial=is_partial, out=FP32, rows=rows)

    together = run(slice(None))
    for row in (0, 63, 64, 66):
        assert torch.equal(run([row])[0], together[row]), f"row {row} differs alone"
    permutation = torch.randperm(67, generator=torch.Generator().manual_seed(5))
    assert torch.equal(run(permutation), together[permutation])
    assert torch.equal(run(slice(0, 33)), together[:33])
    case.x[1:] = torch.nan
    assert torch.equal(run(slice(None))[0], together[0])


@pytest.mark.parametrize("num_rows", [3, 70])
@interpreted
def test_groups_of_row_tiles_cover_every_tile(num_rows):
    """Tiles of 2 rows: 70 rows are two full groups of 16 row tiles and one of 3."""
    case = Case(num_rows, 16, 40, FP32)
    config = op.LaunchConfig(1, block_m=2, block_n=32, block_k=16)
    case.check(case.run(config, is_partial=False, out=FP32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@interpreted
def test_the_launcher_equals_fp64_with_its_own_configs(dtype):
    config = op.config_for(1000, 150, dtype)
    assert config.num_segments == (1 if dtype == FP32 else 4)
    case = Case(5, 1000 if dtype == BF16 else 100, 150, dtype, gelu_columns=130)
    epilogue = {"bias": case.bias, "gelu_columns": 130}
    weight = pack_weight(case.weight)
    case.check(linear(case.x, weight, case.empty(BF16), **epilogue))
    case.check(
        linear(case.x, weight, case.residual.clone(), accumulate=True, **epilogue), accumulate=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@interpreted
def test_a_library_product_with_the_epilogue_kernel_equals_fp64(dtype):
    error = TOLERANCE["cublas"] if dtype == BF16 else TOLERANCE["sum"]
    for gelu_columns in (0, 33, 150):
        case = Case(5, 70, 150, dtype, gelu_columns)
        epilogue = {"bias": case.bias, "gelu_columns": gelu_columns, "batch_invariant": False}
        weight = pack_weight(case.weight)
        out, whole = inside(case.empty(dtype), -7)
        case.check(linear(case.x, weight, out, **epilogue), product_error=error)
        out.fill_(-7)
        assert (whole == -7).all()
        out = linear(case.x, weight, case.residual.clone(), accumulate=True, **epilogue)
        case.check(out, accumulate=True, product_error=error)


@pytest.mark.parametrize(
    ("in_features", "out_features", "num_segments"),
    [
        (4544, 4672, 4),  # qkv
        (4544, 4544, 4),  # dense
        (4544, 18176, 1),  # up
        (18176, 4544, 4),  # down
        (4544, 22848, 1),  # up and qkv
        (22720, 4544, 4),  # down and dense
        (4544, 65024, 1),  # head
        (4544, 64, 15),  # A of LoRA: 71 steps are 15 segments of 5, none empty
        (64, 4544, 1),
        (1, 1, 1),
    ],
)
def test_segments_follow_from_the_weights_shape_and_cover_its_inputs(
    in_features, out_features, num_segments
):
    config = op.config_for(in_features, out_features, BF16)
    assert config.num_segments == num_segments
    segment_len = config.segment_len(in_features)
    assert segment_len % config.block_k == 0
    assert (num_segments - 1) * segment_len < in_features <= num_segments * segment_len


@pytest.mark.parametrize(
    ("num_segments", "num_tiles", "per_program"),
    [
        (4, 36, 1),  # down and dense, 144 programs
        (4, 72, 2),  # of two row tiles or two sets: 144 again, not 288 of which 24 start late
        (4, 108, 2),
        (4, 132, 4),
        (8, 16, 1),
        (8, 64, 2),
        (15, 8, 1),
        (15, 50, 3),
        (15, 20, 1),  # 300 programs or 100: no number fits
        (1, 36, 1),
    ],
)
def test_programs_run_at_once_where_a_number_of_segments_allows(
    num_segments, num_tiles, per_program
):
    config = op.LaunchConfig(num_segments)
    assert config.segments_per_program(num_tiles) == per_program


def test_segments_have_programs_of_their_own_only_where_tiles_are_few():
    config = op.config_for(4544, 4544, BF16)
    assert op.allocate_partials(192, 4544, "cpu", config).shape == (4, 192, 4544)
    assert op.allocate_partials(193, 4544, "cpu", config) is None
    assert op.allocate_partials(1, 18176, "cpu", op.config_for(4544, 18176, BF16)) is None


def test_the_reference_stops_gelu_at_any_column():
    from steer_engine.kernels import reference

    for gelu_columns in (0, 5, 16, 17, 70):
        case = Case(19, 40, 70, FP32, gelu_columns)
        arguments = {"bias": case.bias, "gelu_columns": gelu_columns}
        weight = reference.pack_weight(case.weight)
        case.check(reference.linear(case.x, weight, case.empty(FP32), **arguments))


@pytest.mark.parametrize("batch_invariant", [True, False])
@interpreted
def test_no_rows_and_wrong_arguments(batch_invariant):
    def run(x, weight, out, **arguments):
        return linear(x, weight, out, batch_invariant=batch_invariant, **arguments)

    x, weight, out = torch.ones(2, 3), pack_weight(torch.ones(5, 3)), torch.empty(2, 5)
    assert run(x[:0], weight, out[:0]).shape == (0, 5)
    with pytest.raises(ValueError, match=r"x must be \[any, 3\].*float32.*got \[2, 2\]"):
        run(x[:, :2], weight, out)
    with pytest.raises(ValueError, match=r"x must be .*float32.*bfloat16"):
        run(x.to(BF16), weight, out)
    with pytest.raises(ValueError, match=r"x must be .*unit stride.*strides \(1, 2\)"):
        run(torch.ones(3, 2).T, weight, out)
    with pytest.raises(ValueError, match=r"out must be \[2, 5\].*got \[2, 4\]"):
        run(x, weight, out[:, :4])
    with pytest.raises(ValueError, match=r"out must be .*float32 with.*got .*bfloat16"):
        run(x, weight, out.to(BF16), accumulate=True)
    with pytest.raises(ValueError, match=r"bias must be \[5\].*got \[4\]"):
        run(x, weight, out, bias=torch.ones(4))
    with pytest.raises(ValueError, match=r"weight must be .*got .*float64"):
        run(x.double(), pack_weight(torch.ones(5, 3).double()), out)
    with pytest.raises(ValueError, match=r"weight must be contiguous, got strides \(4, 1\)"):
        run(x, weight._replace(data=torch.ones(5, 4)[:, :3]), out)
    for gelu_columns in (-1, 6):
        with pytest.raises(ValueError, match=r"gelu_columns must lie in \[0, out_features=5\]"):
            run(x, weight, out, gelu_columns=gelu_columns)

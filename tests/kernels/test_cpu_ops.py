"""The CPU library (csrc): every op against fp64 at every instruction set, the sampler bit for bit,
and the rule that a row's result depends on no other row, no position and no number of threads.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cpu_library import BEST_ISA, ops
from op_cases import (
    ATTENTION_SIZES,
    BF16,
    DTYPES,
    FP32,
    TOLERANCE,
    UNIT,
    Pages,
    assert_close,
    attention_tolerance,
    generator,
    normal,
    random_qkv,
    rotary_tables,
    rotate_fp64,
)
from sampler_cases import KINDS, random_logits, random_settings
from steer_engine.kernels import cpu, reference
from steer_engine.kernels.reference.guided_sample import (
    guided_sample,
    nucleus,
    prepare_parameters,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Small operations on a busy machine wait longer for a second thread than they run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_linear(x, weight, bias=None, *, gelu_columns=0, out_dtype=FP32):
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=out_dtype)
    ops.linear(x, ops.pack_weight(weight), bias, weight.shape[0], gelu_columns, False, out)
    return out


def pack_int8(weight, tail_features, module=cpu):
    """In int8, but for the last columns."""
    split = weight.shape[1] - tail_features
    tail = weight[:, split:].contiguous() if tail_features else None
    return module.pack_int8_weight(weight[:, :split], tail)


def run_int8_linear(
    x, weight, tail_features, bias=None, *, gelu_columns=0, out_dtype=FP32, module=cpu
):
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=out_dtype)
    packed = pack_int8(weight, tail_features, module)
    return module.linear(x, packed, out, bias=bias, gelu_columns=gelu_columns)


def quantized_fp64(weight, tail_features):
    """What a weight is in int8."""
    packed = pack_int8(weight, tail_features, reference)
    columns = packed.data.double() * packed.scales.double()[:, None]
    return torch.cat((columns, weight[:, columns.shape[1] :].double()), dim=1)


def check_linear(
    num_rows,
    in_features,
    out_features,
    dtype,
    out_dtype,
    gelu_columns,
    has_bias,
    tail_features=None,
    module=cpu,
):
    """tail_features: None: weights in x's dtype; else in int8, but for so many more columns."""
    in_features += tail_features or 0
    x = normal(num_rows, in_features, dtype=dtype)
    weight = normal(out_features, in_features, dtype=dtype, seed=1, scale=in_features**-0.5)
    bias = normal(out_features, seed=2) if has_bias else None
    epilogue = {"gelu_columns": gelu_columns, "out_dtype": out_dtype}
    if tail_features is None:
        got = run_linear(x, weight, bias, **epilogue)
    else:
        got = run_int8_linear(x, weight, tail_features, bias, **epilogue, module=module)
        weight = quantized_fp64(weight, tail_features)
    expected = x.double() @ weight.double().T + (bias if has_bias else 0)
    tolerance = x.double().abs() @ weight.double().abs().T * TOLERANCE["sum"]
    if gelu_columns:
        has_gelu = torch.arange(out_features) < gelu_columns
        after = 1.13 * tolerance + TOLERANCE["gelu"] * expected.abs().clamp(min=1)  # |GELU'|
        tolerance = torch.where(has_gelu, after, tolerance)
        expected = torch.where(has_gelu, F.gelu(expected), expected)
    tolerance = tolerance + TOLERANCE[FP32] * expected.abs()
    if out_dtype == BF16:
        tolerance = tolerance + TOLERANCE[BF16] * expected.abs()
    name = f"linear {num_rows}x{in_features}x{out_features} {dtype} gelu_columns={gelu_columns}"
    if tail_features is not None:
        name += f" int8 but for {tail_features}"
    assert_close(got, expected, tolerance, name)


LINEAR_SHAPES = [(1, 1), (3, 15), (64, 16), (65, 17), (130, 63), (96, 81)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 13])
def test_linear_equals_fp64_at_every_tile_remainder(isa, dtype, num_rows):
    for in_features, out_features in LINEAR_SHAPES:
        for gelu_columns, has_bias, out_dtype in [(0, True, FP32), (out_features, False, BF16)]:
            check_linear(
                num_rows, in_features, out_features, dtype, out_dtype, gelu_columns, has_bias
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 13])
def test_int8_linear_equals_fp64_on_the_same_whole_numbers(isa, dtype, num_rows):
    for in_features, out_features in LINEAR_SHAPES:
        for tail_features, gelu_columns, has_bias, out_dtype in [
            (0, 0, True, FP32),
            (1, out_features, False, BF16),
            (6, 0, False, FP32),
        ]:
            check_linear(
                num_rows,
                in_features,
                out_features,
                dtype,
                out_dtype,
                gelu_columns,
                has_bias,
                tail_features,
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_references_int8_linear_equals_fp64_on_the_same_whole_numbers(dtype):
    for tail_features in (0, 5):
        check_linear(19, 65, 17, dtype, FP32, 4, True, tail_features, reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_linear_equals_fp64_with_more_rows_than_a_chunk(isa, dtype):
    check_linear(243, 1031, 70, dtype, FP32, gelu_columns=70, has_bias=True, tail_features=3)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu_columns", [1, 5, 15, 16, 17, 63, 64, 65, 80, 81])
def test_gelu_ends_at_any_column(isa, gelu_columns, out_dtype):
    """Also inside a vector of 16 columns and at the edges of a panel of 64."""
    check_linear(3, 33, 81, FP32, out_dtype, gelu_columns, has_bias=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_equals_fp64_at_the_models_own_size(isa, dtype):
    check_linear(3, 4544, 4672, dtype, FP32, gelu_columns=0, has_bias=False)


def test_linear_equals_fp64_with_more_rows_than_a_chunk(isa):
    check_linear(243, 1030, 70, BF16, FP32, gelu_columns=70, has_bias=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_takes_any_row_stride_and_adds_to_its_output(isa, dtype):
    wide_x = torch.full((5, 100), torch.nan, dtype=dtype)
    wide_out = torch.full((5, 60), 7.0)
    x, out = wide_x[:, 3:40], wide_out[:, 9:30]
    x.copy_(normal(5, 37))
    out.copy_(normal(5, 21, seed=1))
    weight = normal(21, 37, dtype=dtype, seed=2)
    expected = out + run_linear(x.contiguous(), weight)
    ops.linear(x, ops.pack_weight(weight), None, 21, 0, True, out)
    assert torch.equal(out, expected)
    assert (wide_out[:, :9] == 7).all() and (wide_out[:, 30:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights_are_tiles_of_16_columns_padded_with_zeros(dtype):
    weight = normal(33, 7, dtype=dtype)
    step = 2 if dtype == BF16 else 1
    padded = F.pad(weight, (0, -7 % step, 0, -33 % 16))
    expected = padded.view(3, 16, -1, step).transpose(1, 2).flatten()
    assert torch.equal(ops.pack_weight(weight), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_weights_are_those_of_the_reference_in_tiles_of_16_columns(dtype):
    weight = normal(33, 7, dtype=dtype)
    weight[3], weight[4] = 0, weight[4] * 2.0**-125  # below the smallest scale
    weight[5] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -126.5, 3.4])  # ties go to even
    got, expected = cpu.pack_int8_weight(weight), reference.pack_int8_weight(weight)
    padded = F.pad(expected.data, (0, 1, 0, -33 % 16))
    assert torch.equal(got.data, padded.view(3, 16, 8).transpose(1, 2).flatten())
    assert torch.equal(got.scales, expected.scales)
    assert expected.data[5].tolist() == [127, 0, 2, 2, 0, -126, 3]
    exact = weight.double()
    error = (expected.data.double() * expected.scales.double()[:, None] - exact).abs()
    assert (error <= expected.scales.double()[:, None] * (0.5 + 127 * UNIT)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_linear_takes_any_row_stride_and_adds_to_its_output(isa, dtype):
    wide_x = torch.full((9, 100), torch.nan, dtype=dtype)
    wide_out = torch.full((9, 60), 7.0)
    x, out = wide_x[:, 3:40], wide_out[:, 9:30]
    x.copy_(normal(9, 37))
    out.copy_(normal(9, 21, seed=1))
    weight = normal(21, 37, dtype=dtype, seed=2)
    expected = out + run_int8_linear(x.contiguous(), weight, 4)
    cpu.linear(x, pack_int8(weight, 4), out, accumulate=True)
    assert torch.equal(out, expected)
    assert (wide_out[:, :9] == 7).all() and (wide_out[:, 30:] == 7).all()


def test_gelu_equals_fp64_on_both_tails(isa):
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 500.0])])
    got = run_linear(x[:, None], torch.ones(1, 1), gelu_columns=1)[:, 0]
    expected = F.gelu(x.double())
    assert_close(got, expected, TOLERANCE["gelu"] * x.double().abs().clamp(min=1), "gelu")


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [1, 15, 16, 100, 4544])
def test_layer_norm_equals_fp64(isa, hidden_size, out_dtype):
    x = normal(5, hidden_size, scale=3) + 2
    weight, bias = normal(hidden_size, seed=1), normal(hidden_size, seed=2)
    out = torch.empty(5, hidden_size, dtype=out_dtype)
    ops.layer_norm(x, weight, bias, 1e-5, out)
    expected = F.layer_norm(x.double(), [hidden_size], weight.double(), bias.double(), 1e-5)
    # The mean is off by "sum" of |x|, and is subtracted from values that may be as large.
    scale = (x.double().var(dim=1, correction=0, keepdim=True) + 1e-5).rsqrt()
    magnitude = x.double().abs().mean(dim=1, keepdim=True) + x.double().abs()
    tolerance = TOLERANCE["sum"] * (magnitude * scale * weight.abs() + expected.abs() + bias.abs())
    if out_dtype == BF16:
        tolerance = tolerance + TOLERANCE[BF16] * expected.abs()
    assert_close(out, expected, tolerance, f"layer_norm {hidden_size} {out_dtype}")


@pytest.mark.parametrize("has_alibi", [False, True], ids=["rotary", "alibi"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ATTENTION_SIZES)
def test_attention_equals_fp64_and_never_reads_unused_slots(isa, size, dtype, has_alibi):
    num_heads = ATTENTION_SIZES[size][0]
    pages = Pages([200, 63], dtype, *ATTENTION_SIZES[size])
    seq_lens = torch.tensor([0, 1, 15, 16, 17, 63, 64, 65, 200, 63, 1], dtype=torch.int32)
    table_ids = torch.tensor([0] * 9 + [1] * 2, dtype=torch.int32)
    alibi = torch.linspace(-1, 0, num_heads)[:, None] * torch.arange(220) if has_alibi else None
    qkv, scale = random_qkv(pages, len(seq_lens)), pages.head_dim**-0.5
    got = pages.attention(ops.paged_attention, qkv, table_ids, seq_lens, alibi, scale)
    expected, magnitude = pages.attention_fp64(qkv, table_ids, seq_lens, alibi, scale)
    tolerance = attention_tolerance(expected, magnitude, pages.head_dim, TOLERANCE[dtype])
    assert_close(got, expected, tolerance, f"attention {size} {dtype}")
    assert (got[0] == 0).all(), "a row without keys must give zeros"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["falcon_7b", "grouped", "every_head_its_own"])
def test_rotary_rotates_queries_and_keys_and_stores_them(isa, size, dtype):
    pages = Pages([40], dtype, *ATTENTION_SIZES[size])
    num_heads, num_kv_heads, head_dim, _ = ATTENTION_SIZES[size]
    qkv = random_qkv(pages, 5)
    positions = torch.tensor([0, 1, 17, 99, 3], dtype=torch.int32)
    slots = torch.tensor([3, -1, 0, 17, 39])
    cos, sin = rotary_tables(100, head_dim)
    expected, magnitude = rotate_fp64(qkv, cos, sin, positions, num_heads, num_kv_heads)
    v = qkv.view(5, -1, head_dim)[:, num_heads + num_kv_heads :].clone()
    k_before, v_before = pages.k_cache.flatten(0, 1).clone(), pages.v_cache.flatten(0, 1).clone()

    ops.rotary_and_store(qkv, cos, sin, positions, slots, num_heads, pages.k_cache, pages.v_cache)

    got = qkv.view(5, -1, head_dim)
    tolerance = TOLERANCE[FP32] * magnitude + TOLERANCE[dtype] * expected.abs()
    assert_close(got[:, : num_heads + num_kv_heads], expected, tolerance, f"rotary {size} {dtype}")
    assert torch.equal(got[:, num_heads + num_kv_heads :], v), "values must stay as they are"
    stored = slots >= 0
    k_before[slots[stored]] = got[stored, num_heads : num_heads + num_kv_heads]
    v_before[slots[stored]] = v[stored]
    for cache, after in ((pages.k_cache, k_before), (pages.v_cache, v_before)):
        torch.testing.assert_close(cache.flatten(0, 1), after, rtol=0, atol=0, equal_nan=True)


def test_without_cos_nothing_is_rotated():
    pages = Pages([40], FP32, *ATTENTION_SIZES["grouped"])
    qkv = random_qkv(pages, 2)
    before = qkv.clone()
    positions, slots = torch.tensor([500, 1], dtype=torch.int32), torch.tensor([4, 5])
    ops.rotary_and_store(qkv, None, None, positions, slots, 6, pages.k_cache, pages.v_cache)
    assert torch.equal(qkv, before)
    assert torch.equal(pages.k_cache.flatten(0, 1)[4:6].flatten(1), qkv[:, 6 * 24 : 8 * 24])


def assert_rows_are_independent(run, num_rows):
    """run(rows) -> one result per row. Alone, together, permuted, with one and two threads: equal
    bits.
    """
    rows = torch.arange(num_rows)
    together = run(rows)
    alone = torch.cat([run(rows[i : i + 1]) for i in range(num_rows)])
    permutation = torch.randperm(num_rows, generator=generator(5))
    permuted = torch.empty_like(together)
    permuted[permutation] = run(permutation)
    torch.set_num_threads(2)
    results = {"alone": alone, "permuted": permuted, "with two threads": run(rows)}
    results["alone with two threads"] = torch.cat([run(rows[i : i + 1]) for i in range(num_rows)])
    for how, result in results.items():
        is_same = (together == result).flatten(1).all(dim=1)
        assert is_same.all(), f"rows {(~is_same).nonzero()[:, 0].tolist()} differ {how}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu_columns", [0, 70, 150])
def test_a_row_of_linear_does_not_depend_on_its_neighbours(isa, dtype, gelu_columns):
    x, weight = normal(33, 1029, dtype=dtype), normal(150, 1029, dtype=dtype, seed=1, scale=0.03)
    packed = ops.pack_weight(weight)

    def run(rows):
        out = torch.empty(len(rows), 150)
        ops.linear(x[rows], packed, None, 150, gelu_columns, False, out)
        return out

    assert_rows_are_independent(run, 33)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", [cpu, reference], ids=["cpu", "reference"])
def test_a_row_of_int8_linear_does_not_depend_on_its_neighbours(isa, module, dtype):
    if module is reference and isa != BEST_ISA:
        pytest.skip("the reference has one instruction set")
    x, weight = normal(33, 1029, dtype=dtype), normal(150, 1029, dtype=dtype, seed=1, scale=0.03)
    packed = pack_int8(weight, 6, module)

    def run(rows):
        return module.linear(x[rows], packed, torch.empty(len(rows), 150), gelu_columns=70)

    assert_rows_are_independent(run, 33)


def test_a_row_of_layer_norm_does_not_depend_on_its_neighbours(isa):
    x, weight, bias = normal(33, 4544), normal(4544, seed=1), normal(4544, seed=2)

    def run(rows):
        out = torch.empty(len(rows), 4544)
        ops.layer_norm(x[rows], weight, bias, 1e-5, out)
        return out

    assert_rows_are_independent(run, 33)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_attention_does_not_depend_on_its_neighbours(isa, dtype):
    """Alone, a row's 71 heads are split over the threads; together they are not."""
    pages = Pages([90], dtype, *ATTENTION_SIZES["falcon_7b"])
    qkv = random_qkv(pages, 33)
    seq_lens = torch.arange(33, dtype=torch.int32) * 2 + 20
    table_ids = torch.zeros(33, dtype=torch.int32)

    def run(rows):
        keys = (table_ids[rows], seq_lens[rows])
        return pages.attention(ops.paged_attention, qkv[rows], *keys, None, 0.125)

    assert_rows_are_independent(run, 33)


def prefill_rows(size: str, dtype):
    """Rows as in a prefill: runs of two tables, cut at odd places, decode rows and rows without
    keys between them. Table 0 holds 120 keys, table 1 holds 63.
    """
    runs = [  # table, first seq_len, rows
        (0, 1, 20),
        (1, 0, 30),
        (0, 21, 9),
        (0, 120, 1),
        (1, 63, 1),
        (1, 0, 1),
        (0, 60, 18),
        (0, 78, 1),
        (1, 17, 3),
        (0, 100, 21),
    ]
    pages = Pages([120, 63], dtype, *ATTENTION_SIZES[size])
    table_ids = torch.cat([torch.full((n,), table) for table, _, n in runs]).int()
    seq_lens = torch.cat([torch.arange(first, first + n) for _, first, n in runs]).int()
    return pages, table_ids, seq_lens


@pytest.mark.parametrize("has_alibi", [False, True], ids=["rotary", "alibi"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ATTENTION_SIZES)
def test_rows_of_one_prefill_share_their_keys_and_keep_their_bits(isa, size, dtype, has_alibi):
    """Every way of grouping rows against each row alone, and the whole against fp64."""
    pages, table_ids, seq_lens = prefill_rows(size, dtype)
    num_heads = ATTENTION_SIZES[size][0]
    alibi = torch.linspace(-1, 0, num_heads)[:, None] * torch.arange(130) if has_alibi else None
    qkv, scale = random_qkv(pages, len(seq_lens)), pages.head_dim**-0.5

    def run(rows):
        keys = (table_ids[rows], seq_lens[rows])
        return pages.attention(ops.paged_attention, qkv[rows], *keys, alibi, scale)

    together = run(torch.arange(len(seq_lens)))
    expected, magnitude = pages.attention_fp64(qkv, table_ids, seq_lens, alibi, scale)
    tolerance = attention_tolerance(expected, magnitude, pages.head_dim, TOLERANCE[dtype])
    assert_close(together, expected, tolerance, f"prefill {size} {dtype}")
    assert_rows_are_independent(run, len(seq_lens))
    for first in (1, 2, 7, 15, 16, 17, 25):  # other places where groups begin
        assert torch.equal(run(torch.arange(first, len(seq_lens))), together[first:]), first


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["falcon_7b", "every_head_its_own"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_row_does_not_see_the_keys_behind_it(isa, size, dtype, poison):
    """Not even as 0 * v: the keys from position 25 on are NaN or infinite, as after an overflow."""
    pages, table_ids, seq_lens = prefill_rows(size, dtype)
    qkv = random_qkv(pages, len(seq_lens))

    def run():
        return pages.attention(ops.paged_attention, qkv, table_ids, seq_lens, None, 0.125)

    clean = run()
    slots = pages.slots(0, 120)[25:]
    for cache in (pages.k_cache, pages.v_cache):
        cache.flatten(0, 1)[slots] = poison
    poisoned = run()
    is_behind = (table_ids == 0) & (seq_lens > 25)
    assert torch.equal(poisoned[~is_behind], clean[~is_behind])
    assert not poisoned[is_behind].isfinite().any(), "these rows do see them"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_of_minus_zero_stays_so_in_any_group(isa, dtype):
    """Weights and values so small that their product rounds to a zero of the value's sign, which is
    the sum's: adding 0 * v of a later key, of the other sign, would change it.
    """
    pages, table_ids, seq_lens = prefill_rows("falcon_7b", dtype)
    qkv = torch.full((len(seq_lens), 73 * 64), 1.75, dtype=dtype)
    k, v = (cache.flatten(0, 1) for cache in (pages.k_cache, pages.v_cache))
    for table, length in enumerate((120, 63)):
        slots = pages.slots(table, length)
        k[slots], v[slots] = 0, 2.0**-133
        v[slots[::2]] = -(2.0**-133)
        k[slots[0]], v[slots[0]] = 1, 0  # takes all the weight but e**-14 per key

    def run(rows):
        keys = (table_ids[rows], seq_lens[rows])
        return pages.attention(ops.paged_attention, qkv[rows], *keys, None, 0.125)

    rows = torch.arange(len(seq_lens))
    is_negative = run(rows).signbit()
    alone = torch.cat([run(rows[i : i + 1]) for i in rows]).signbit()
    assert torch.equal(is_negative, alone)
    if isa != "portable":  # which rounds the product before it adds: +0 + -0 = +0
        ends_negative = (seq_lens % 2 == 1) & (seq_lens > 1)
        assert torch.equal(is_negative.all(dim=1), ends_negative)


def test_a_row_of_rotary_does_not_depend_on_its_neighbours(isa):
    angle = torch.arange(100)[:, None] * 10000.0 ** -torch.linspace(0, 1, 32)
    cos, sin = angle.cos(), angle.sin()
    pages = Pages([40], BF16, *ATTENTION_SIZES["falcon_7b"])
    qkv = random_qkv(pages, 33)
    positions = torch.arange(33, dtype=torch.int32)

    def run(rows):
        out, slots = qkv[rows], rows
        ops.rotary_and_store(
            out, cos, sin, positions[rows], slots, 71, pages.k_cache, pages.v_cache
        )
        return torch.cat([out, pages.k_cache.flatten(0, 1)[slots].flatten(1)], dim=1)

    assert_rows_are_independent(run, 33)


def sample(logits, weights, settings, seed, stream_ids, steps) -> list[torch.Tensor]:
    """All five outputs of the op, from buffers full of what no row may return."""
    num_seqs = logits.shape[1]
    outputs = [torch.full((num_seqs,), -7, dtype=d) for d in (torch.int64, FP32, torch.int32)]
    outputs += [torch.full((num_seqs,), -7, dtype=d) for d in (torch.int32, torch.int64)]
    parameters = prepare_parameters(**settings, vocab_size=logits.shape[2])
    ops.guided_sample(logits, weights, *parameters, seed, stream_ids, steps, *outputs)
    return outputs


def reference_sample(logits, weights, settings, seed, stream_ids, steps) -> list[torch.Tensor]:
    draw = {"seed": seed % 2**64, "stream_ids": stream_ids, "steps": steps}
    sampled = guided_sample(logits, weights, **settings, **draw)
    kept = nucleus(logits, weights, prepare_parameters(**settings, vocab_size=logits.shape[2]))
    return [*sampled, kept.num_kept, kept.total_mass]


def check_rows(kind, logits, weights, settings, *draw):
    arguments = (logits, weights, settings, *draw)
    names = ("token_ids", "logprobs", "status", "num_kept", "total_mass")
    for name, got, expected in zip(
        names, sample(*arguments), reference_sample(*arguments), strict=True
    ):
        tolerance = 1e-6 if name == "logprobs" else 0
        is_wrong = ~((got - expected).abs() <= tolerance)
        if is_wrong.any():
            row = int(is_wrong.nonzero()[0])
            setting = {key: value[row].item() for key, value in settings.items()}
            raise AssertionError(
                f"{name} of {int(is_wrong.sum())} of {len(got)} rows, {kind}, vocab_size "
                f"{logits.shape[2]}, row {row}: got {got[row]}, expected {expected[row]}, "
                f"weights {weights[:, row].tolist()}, {setting}"
            )


def check_sampler(kinds, num_seqs, vocab_size, num_passes, g):
    for kind in kinds:
        logits = random_logits(kind, num_passes, num_seqs, vocab_size, g)
        weights, settings = random_settings(num_seqs, g)
        weights = weights[:num_passes]
        # A pass of weight 0 was not run; its buffer may hold anything. (The domain pass is read
        # all the same: alpha and the fallback need it.)
        if kind == "plain":
            logits[1:] = torch.where(weights[1:, :, None] == 0, torch.nan, logits[1:])
        stream_ids = torch.randint(-(2**62), 2**62, (num_seqs,), generator=g)
        steps = torch.randint(2**31 - 1, (num_seqs,), generator=g).int()
        check_rows(kind, logits, weights, settings, -(2**62) - 5, stream_ids, steps)


@pytest.mark.parametrize("vocab_size", [1, 2, 17, 50, 1000, 1024, 1025])
def test_sampler_equals_the_reference_bit_for_bit(isa, vocab_size):
    g = generator(vocab_size)
    for num_passes in (1, 2, 3):
        check_sampler(KINDS, 7, vocab_size, num_passes, g)


@pytest.mark.parametrize("kind", KINDS)
def test_sampler_equals_the_reference_on_many_rows(kind):
    g = generator(1)
    check_sampler([kind], 500, 1000, 3, g)  # these three: 8,576 rows over all kinds
    check_sampler([kind], 30, 8192, 3, g)
    check_sampler([kind], 6, 65024, 3, g)


def test_sampler_equals_the_reference_at_the_models_own_vocabulary(isa):
    check_sampler(["peaked", "flat", "all_equal"], 4, 65024, 3, generator(2))


def at_the_edge(shape: str) -> torch.Tensor:
    """A row whose nucleus or top-k ends where the C++ search changes its path: [vocab_size]."""
    match shape:
        case "one_token":
            return torch.zeros(1)
        case "one_value_per_bin":  # steps of 1/64 in the exponent, so some edges are hit exactly
            return torch.arange(2048)[torch.randperm(2048, generator=generator(1))] / -92.332483
        case "one_bin":  # neighbouring fp32 numbers
            return 100 + torch.randint(4, (3000,), generator=generator(2)) * 2.0**-17
        case "last_bin":  # most of the mass in tokens far below the top one
            return torch.full((5000,), -8.0).index_fill(0, torch.tensor(77), 0.0)
        case "ties_over_blocks":  # of 512 tokens
            return torch.arange(4000).remainder(3).float()
        case "ties_at_the_end":
            return torch.zeros(1030).index_fill(0, torch.arange(1000, 1030), 3.0)
        case "top_at_the_last_index":
            return torch.linspace(-20, 0, 1537)
        case "two_values_over_masked":
            row = torch.full((2000,), -torch.inf)
            return row.index_fill(0, torch.tensor([5, 1999]), 1.0)
    raise AssertionError(shape)


# fmt: off
EDGE_SHAPES = [
    "one_token", "one_value_per_bin", "one_bin", "last_bin", "ties_over_blocks", "ties_at_the_end",
    "top_at_the_last_index", "two_values_over_masked",
]
# fmt: on


@pytest.mark.parametrize("shape", EDGE_SHAPES)
def test_sampler_equals_the_reference_where_the_cut_falls_on_an_edge(isa, shape):
    top_p = torch.cat([torch.linspace(1e-3, 1, 60), torch.tensor([1e-10, 0.5, 0.25, 1 - 2**-24])])
    row = at_the_edge(shape)
    for top_k in [0, 1, 2, 700, 1030, 1999]:
        n = len(top_p)
        settings = {
            "temperature": torch.ones(n),
            "top_p": top_p,
            "top_k": torch.full((n,), top_k, dtype=torch.int32),
            "alpha": torch.zeros(n),
        }
        logits = row.repeat(1, n, 1)
        draw = (3, torch.arange(n), torch.arange(n).int())
        check_rows(shape, logits, torch.ones(1, n), settings, *draw)


def test_sampler_equals_the_reference_at_200000_tokens(isa):
    check_sampler(["peaked", "plain", "flat", "all_equal", "tied"], 4, 200_000, 2, generator(6))


def test_sampler_takes_any_stride_of_passes_and_sequences():
    g = generator(3)
    stored = torch.randn(4, 3, 200, generator=g) * 3  # [num_seqs, num_passes, ...]
    logits = stored[:, :, 50:].transpose(0, 1)
    arguments = (*random_settings(4, g), 1, torch.arange(4), torch.arange(4).int())
    got, expected = sample(logits, *arguments), sample(logits.contiguous(), *arguments)
    assert all(map(torch.equal, got, expected))


def test_a_row_of_the_sampler_does_not_depend_on_its_neighbours(isa):
    g = generator(4)
    logits = torch.cat([random_logits(kind, 3, 3, 3000, g).float() for kind in KINDS[:11]], dim=1)
    weights, settings = random_settings(33, g)
    stream_ids, steps = torch.arange(33) * 1000, torch.arange(33).int()

    def run(rows):
        chosen = {key: value[rows] for key, value in settings.items()}
        outputs = sample(
            logits[:, rows], weights[:, rows], chosen, 9, stream_ids[rows], steps[rows]
        )
        return torch.stack([o.double() for o in outputs], dim=1)

    assert_rows_are_independent(run, 33)


def test_every_op_accepts_no_rows():
    empty_ids = torch.empty(0, dtype=torch.int32)
    out = torch.empty(0, 5)
    ops.linear(torch.empty(0, 3), ops.pack_weight(torch.ones(5, 3)), None, 5, 0, False, out)
    cpu.linear(torch.empty(0, 3), cpu.pack_int8_weight(torch.ones(5, 3)), out)
    ops.layer_norm(torch.empty(0, 5), torch.ones(5), torch.ones(5), 1e-5, out)
    pages = Pages([3], FP32, *ATTENTION_SIZES["grouped"])
    qkv, slots = random_qkv(pages, 0), torch.empty(0, dtype=torch.int64)
    ops.rotary_and_store(qkv, None, None, empty_ids, slots, 6, pages.k_cache, pages.v_cache)
    attended = pages.attention(ops.paged_attention, qkv, empty_ids, empty_ids, None, 1.0)
    assert attended.shape == (0, 144)
    outputs = sample(torch.empty(3, 0, 9), *random_settings(0, generator()), 1, slots, empty_ids)
    assert all(o.numel() == 0 for o in outputs)


def test_errors_name_the_argument_what_is_expected_and_what_came():
    x, packed, out = torch.ones(2, 3), ops.pack_weight(torch.ones(5, 3)), torch.empty(2, 5)
    with pytest.raises(
        ValueError, match=r"out must be \[num_rows=2, out_features=5\].*got \[2, 4\]"
    ):
        ops.linear(x, packed, None, 5, 0, False, out[:, :4])
    with pytest.raises(ValueError, match=r"packed must be \[packed_size=48\] fp32.*got \[96\]"):
        ops.linear(x, torch.ones(96), None, 5, 0, False, out)
    with pytest.raises(ValueError, match=r"x must be .*unit stride.*strides \(1, 2\)"):
        ops.linear(torch.ones(3, 2).T, packed, None, 5, 0, False, out)
    with pytest.raises(ValueError, match="out must be fp32 where accumulate is set"):
        ops.linear(x, packed, None, 5, 0, True, out.to(BF16))
    for gelu_columns in (-1, 6):
        with pytest.raises(ValueError, match=r"gelu_columns must lie in \[0, out_features=5\]"):
            ops.linear(x, packed, None, 5, gelu_columns, False, out)
    with pytest.raises(ValueError, match=r"weight must be .*bf16 or fp32.*got \[2, 3\] fp64"):
        ops.pack_weight(x.double())
    scales = torch.ones(5)
    for packed, match in [
        (torch.zeros(48, dtype=torch.int8), r"packed must be \[packed_size=64\] int8.*got \[48\]"),
        (torch.zeros(64), r"packed must be \[packed_size=64\] int8.*got \[64\] fp32"),
    ]:
        with pytest.raises(ValueError, match=match):
            ops.linear_int8(x, packed, scales, None, 0, None, 5, 0, False, out)
    packed = torch.zeros(32, dtype=torch.int8)
    for tail, tail_features, match in [
        (None, 1, "tail must be given where tail_features is not 0"),
        (torch.zeros(16), 4, r"tail_features must lie in \[0, in_features=3\], got 4"),
        (torch.zeros(16, dtype=BF16), 1, r"tail must be \[packed_size=16\] fp32.*got .* bf16"),
    ]:
        with pytest.raises(ValueError, match=match):
            ops.linear_int8(x, packed, scales, tail, tail_features, None, 5, 0, False, out)
    with pytest.raises(ValueError, match=r"STEER_CPU_ISA must be one of portable, .*got 'sse9'"):
        ops.set_cpu_isa("sse9")


def test_indices_that_leave_the_cache_are_refused():
    pages = Pages([3], FP32, *ATTENTION_SIZES["grouped"])
    qkv, zero = random_qkv(pages, 1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"slot_mapping must lie in \[-1, 14\), got 14 at"):
        ops.rotary_and_store(
            qkv, None, None, zero, torch.tensor([14]), 6, pages.k_cache, pages.v_cache
        )
    with pytest.raises(ValueError, match=r"seq_lens must lie in \[0, 8\), got 8"):
        pages.attention(ops.paged_attention, qkv, zero, zero + 8, None, 1.0)
    pages.block_tables[0, 0] = 2
    with pytest.raises(ValueError, match=r"block_tables must lie in \[0, 2\), got 2"):
        pages.attention(ops.paged_attention, qkv, zero, zero + 1, None, 1.0)

"""Triton's attention in the interpreter, against fp64; every chunk length, any neighbours.

The interpreter multiplies bf16 as fp32 here (DOT_DTYPE), so the weights of bf16 rows are not
rounded as on a GPU, and it rounds fp32 to bf16 by cutting off.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_cases import (
    ATTENTION_SIZES,
    BF16,
    DTYPES,
    FP32,
    SIZES_AND_BIASES,
    TOLERANCE,
    DecodeCase,
    Pages,
    assert_close,
    attention_tolerance,
    check_decode,
    decode_case,
    normal,
    random_qkv,
    rotary_tables,
    rotate_fp64,
)
from triton_interpreter import interpreted

attention = pytest.importorskip("steer_engine.kernels.mqa_decode", exc_type=ImportError)
rotary = pytest.importorskip("steer_engine.kernels.rotary_and_store", exc_type=ImportError)
LaunchConfig, Scratch = attention.LaunchConfig, attention.Scratch

LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 200]
FEW_LENGTHS = [0, 1, 33, 64, 65, 130]  # no chunk, one, one, one, two, three
SMALL = LaunchConfig(chunk_len=64, block_keys=32)  # four chunks for 200 keys
# Cutting off is wrong by up to a whole unit of the last place, twice what rounding is.
INTERPRETED = {FP32: TOLERANCE[FP32], BF16: 2 * TOLERANCE[BF16]}


def cut_off(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 to dtype as the interpreter does it."""
    if dtype == FP32:
        return tensor
    return (tensor.view(torch.int32) & -65536).view(FP32).to(dtype)


def launch(case, config=SMALL, *, out=None, is_decode=True, rows_at_once=None) -> torch.Tensor:
    """Run the case's rows as a decode step, or as prefilled tokens; scratch memory holds NaN."""
    pages = case.pages
    num_rows, num_heads, head_dim = len(case.qkv), pages.num_heads, pages.head_dim
    if out is None:
        out = torch.full((num_rows, num_heads * head_dim), torch.nan, dtype=case.qkv.dtype)
    num_chunks = config.num_chunks(pages.block_tables, pages.k_cache)
    scratch_rows = rows_at_once or num_rows
    scratch = Scratch.allocate(scratch_rows, num_chunks, num_heads, head_dim, "cpu")
    for tensor in scratch or ():
        tensor.fill_(torch.nan)
    keys = (pages.k_cache, pages.v_cache, pages.block_tables, case.table_ids, case.seq_lens)
    attention.launch_attention(
        case.qkv, case.cos, case.sin, *keys, case.alibi, num_heads, case.scale, out,
        scratch, config, is_decode=is_decode,
    )  # fmt: skip
    return out


def rows_of(case: DecodeCase, rows) -> DecodeCase:
    """Some rows of a case, on a copy of its cache."""
    chosen = {name: getattr(case, name)[rows].clone() for name in ("qkv", "table_ids", "seq_lens")}
    return case._replace(pages=case.pages.copy(), **chosen)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    is_same = (got == expected).flatten(1).all(dim=1)
    assert is_same.all(), f"rows {(~is_same).nonzero()[:, 0].tolist()} differ {name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size, bias", [s for s in SIZES_AND_BIASES if s[1] != "none"])
@interpreted
def test_decode_equals_fp64_and_stores_the_new_token(size, bias, dtype):
    case = decode_case(size, dtype, LENGTHS, bias)
    check_decode(case, launch, f"triton mqa_decode {size} {bias}", cut_off, INTERPRETED[dtype])


@interpreted
def test_decode_equals_fp64_around_the_shipped_chunk_length():
    config = LaunchConfig(block_keys=128)
    n = config.chunk_len
    case = decode_case("every_head_its_own", FP32, [n - 1, n, n + 1, 2047], "rotary")
    check_decode(case, lambda c: launch(c, config), "triton mqa_decode", cut_off)


@interpreted
def test_one_chunk_for_the_longest_table_needs_no_scratch_memory():
    case = decode_case("grouped", FP32, LENGTHS, "rotary")
    config = LaunchConfig(chunk_len=256)
    assert config.num_chunks(case.pages.block_tables, case.pages.k_cache) == 1
    assert Scratch.allocate(9, 1, 6, 24, "cpu") is None
    check_decode(case, lambda c: launch(c, config), "triton mqa_decode in one chunk", cut_off)


@pytest.mark.parametrize("has_alibi", [False, True], ids=["rotary", "alibi"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ATTENTION_SIZES)
@interpreted
def test_prefilled_tokens_equal_fp64_and_never_read_unused_slots(size, dtype, has_alibi):
    num_heads, _, head_dim, _ = ATTENTION_SIZES[size]
    pages = Pages([200, 63], dtype, *ATTENTION_SIZES[size])
    seq_lens = torch.tensor([0, 1, 16, 17, 64, 65, 200, 63, 1], dtype=torch.int32)
    table_ids = torch.tensor([0] * 7 + [1] * 2, dtype=torch.int32)
    alibi = torch.linspace(-1, 0, num_heads)[:, None] * torch.arange(220) if has_alibi else None
    qkv = random_qkv(pages, len(seq_lens))
    case = DecodeCase(pages, qkv, None, None, table_ids, seq_lens, alibi, head_dim**-0.5)
    before = pages.k_cache.clone(), pages.v_cache.clone()
    got = launch(case, is_decode=False)
    expected, magnitude = pages.attention_fp64(qkv, table_ids, seq_lens, alibi, case.scale)
    tolerance = attention_tolerance(expected, magnitude, head_dim, INTERPRETED[dtype])
    assert_close(got, expected, tolerance, f"paged_attention {size} {dtype}")
    assert (got[0] == 0).all(), "a row without keys must give zeros"
    for cache, kept in zip((pages.k_cache, pages.v_cache), before, strict=True):
        torch.testing.assert_close(cache, kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", ["rotary", "alibi"])
@interpreted
def test_a_decoded_token_has_the_bits_of_a_prefilled_one(dtype, bias):
    decoded = decode_case("grouped", dtype, FEW_LENGTHS[1:], bias)
    prefilled = decoded._replace(pages=decoded.pages.copy(), qkv=decoded.qkv.clone())
    pages, (_, slots) = prefilled.pages, prefilled.own_slots()
    rotary.rotary_and_store(
        prefilled.qkv, prefilled.cos, prefilled.sin, prefilled.seq_lens - 1, slots,
        pages.num_heads, pages.k_cache, pages.v_cache,
    )  # fmt: skip
    assert_same_bits(launch(decoded), launch(prefilled, is_decode=False), "when prefilled")
    for name in ("k_cache", "v_cache"):
        got, expected = getattr(decoded.pages, name), getattr(pages, name)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@interpreted
def test_a_row_does_not_depend_on_its_neighbours_or_on_the_tables_width():
    case = decode_case("grouped", BF16, FEW_LENGTHS, "rotary")
    num_rows = len(FEW_LENGTHS)
    together = launch(rows_of(case, slice(None)))
    alone = torch.cat([launch(rows_of(case, slice(i, i + 1))) for i in range(num_rows)])
    assert_same_bits(alone, together, "alone")
    permutation = torch.tensor([3, 5, 0, 4, 1, 2])
    permuted = launch(rows_of(case, permutation))
    assert_same_bits(permuted, together[permutation], "permuted")
    others = rows_of(case, slice(None))
    others.qkv[:-1] = torch.nan
    assert_same_bits(launch(others)[-1:], together[-1:], "beside rows of NaN")

    # A table with room for more chunks than any row has, and one with room for short rows only.
    wide = rows_of(case, slice(None))
    tables = wide.pages.block_tables
    wide.pages.block_tables = torch.nn.functional.pad(tables, (0, 70), value=2**30)
    assert_same_bits(launch(wide), together, "in a wider table")
    short = rows_of(case, slice(0, 4))  # up to 64 keys: one chunk, no scratch memory
    short.pages.block_tables = tables[:, :10].contiguous()
    assert_same_bits(launch(short), together[:4], "in a narrower table")
    few = launch(rows_of(case, slice(None)), rows_at_once=2)
    assert_same_bits(few, together, "two rows at a launch")


@interpreted
def test_rows_may_share_pages_that_none_of_them_writes():
    case = decode_case("falcon_7b", FP32, [65, 66, 130], "rotary")
    tables = case.pages.block_tables
    tables[1:, :4] = tables[0, :4]  # 64 keys of the row of 130, in 16-key pages
    check_decode(case, launch, "triton mqa_decode on shared pages", cut_off)


@interpreted
def test_qkv_and_out_may_be_strided_and_out_may_be_the_q_columns():
    case = decode_case("grouped", BF16, FEW_LENGTHS, "rotary")
    expected = launch(rows_of(case, slice(None)))
    width, out_width = case.qkv.shape[1], expected.shape[1]

    wide_qkv = torch.full((len(FEW_LENGTHS), width + 11), 7, dtype=BF16)
    wide_out = torch.full((len(FEW_LENGTHS), out_width + 5), 7, dtype=BF16)
    wide_qkv[:, 3:-8] = case.qkv
    strided = rows_of(case, slice(None))._replace(qkv=wide_qkv[:, 3:-8])
    assert_same_bits(launch(strided, out=wide_out[:, 2:-3]), expected, "in wide buffers")
    assert (wide_out[:, :2] == 7).all() and (wide_out[:, -3:] == 7).all()
    torch.testing.assert_close(wide_qkv[:, 3:-8], case.qkv, rtol=0, atol=0, equal_nan=True)

    aliased = rows_of(case, slice(None))._replace(qkv=wide_qkv[:, 3:-8])
    out = wide_qkv[:, 3 : 3 + out_width]
    assert_same_bits(launch(aliased, out=out), expected, "over the q columns")
    rest = case.qkv[:, out_width:]
    torch.testing.assert_close(aliased.qkv[:, out_width:], rest, rtol=0, atol=0, equal_nan=True)
    assert (wide_qkv[:, :3] == 7).all() and (wide_qkv[:, -8:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["falcon_7b", "grouped", "every_head_its_own"])
@interpreted
def test_rotary_rotates_queries_and_keys_and_stores_them(size, dtype):
    pages = Pages([40], dtype, *ATTENTION_SIZES[size])
    num_heads, num_kv_heads, head_dim, _ = ATTENTION_SIZES[size]
    wide = normal(5, (num_heads + 2 * num_kv_heads) * head_dim + 3, dtype=dtype)
    qkv, edge = wide[:, :-3], wide[:, -3:].clone()
    positions = torch.tensor([0, 1, 17, 99, 3], dtype=torch.int32)
    slots = torch.tensor([3, -1, 0, 17, 39])
    cos, sin = rotary_tables(100, head_dim)
    before = qkv.contiguous()
    expected, magnitude = rotate_fp64(before, cos, sin, positions, num_heads, num_kv_heads)
    caches = (pages.k_cache, pages.v_cache)
    kept = [cache.flatten(0, 1).clone() for cache in caches]

    rotary.rotary_and_store(qkv, cos, sin, positions, slots, num_heads, *caches)

    num_rotated = num_heads + num_kv_heads
    got = qkv.reshape(5, -1, head_dim)
    v = before.view(5, -1, head_dim)[:, num_rotated:]
    tolerance = TOLERANCE[FP32] * magnitude + INTERPRETED[dtype] * expected.abs()
    assert_close(got[:, :num_rotated], expected, tolerance, f"rotary {size} {dtype}")
    assert torch.equal(got[:, num_rotated:], v), "values must stay as they are"
    assert torch.equal(wide[:, -3:], edge), "what lies between rows must stay as it is"
    stored = slots >= 0
    kept[0][slots[stored]] = got[stored, num_heads:num_rotated]
    kept[1][slots[stored]] = v[stored]
    for cache, after in zip(caches, kept, strict=True):
        torch.testing.assert_close(cache.flatten(0, 1), after, rtol=0, atol=0, equal_nan=True)


@interpreted
def test_without_cos_nothing_is_rotated():
    pages = Pages([40], FP32, *ATTENTION_SIZES["odd_head_dim"])
    qkv = random_qkv(pages, 2)
    before = qkv.clone()
    positions, slots = torch.tensor([500, 1], dtype=torch.int32), torch.tensor([4, -1])
    rotary.rotary_and_store(qkv, None, None, positions, slots, 3, pages.k_cache, pages.v_cache)
    assert torch.equal(qkv, before)
    assert torch.equal(pages.k_cache.flatten(0, 1)[4, 0], qkv[0, 15:20])
    assert torch.equal(pages.v_cache.flatten(0, 1)[4, 0], qkv[0, 20:25])


def arguments(**changes) -> dict:
    """Those of mqa_decode for three rows of 3 heads of 8 in float32, with one or more replaced."""
    case = decode_case("every_head_its_own", FP32, [5, 0, 70], "rotary")
    pages = case.pages
    return {
        "qkv": case.qkv,
        "cos": case.cos,
        "sin": case.sin,
        "k_cache": pages.k_cache,
        "v_cache": pages.v_cache,
        "block_tables": pages.block_tables,
        "table_ids": case.table_ids,
        "seq_lens": case.seq_lens,
        "alibi": None,
        "num_heads": pages.num_heads,
        "scale": case.scale,
        "out": torch.empty(3, 32),
    } | changes


@interpreted
def test_the_plain_ops_launch_and_take_no_rows():
    given = arguments()
    assert attention.mqa_decode(**given) is given["out"]
    del given["cos"], given["sin"]
    decoded = given["out"].clone()
    qkv = given["qkv"]  # not rotated: mqa_decode leaves it alone
    assert attention.paged_attention(**given) is given["out"]
    assert not torch.equal(given["out"][2], decoded[2]) and (given["out"][1] == 0).all()
    empty = {name: given[name][:0] for name in ("qkv", "table_ids", "seq_lens", "out")}
    assert attention.paged_attention(**given | empty).shape == (0, 32)
    assert attention.mqa_decode(**arguments(**empty)).shape == (0, 32)
    slots = torch.empty(0, dtype=torch.int64)
    caches = (given["k_cache"], given["v_cache"])
    rotary.rotary_and_store(qkv[:0], None, None, empty["seq_lens"], slots, 4, *caches)


@interpreted
def test_wrong_arguments_name_themselves():
    def refused(message: str, op: Callable = attention.mqa_decode, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            op(**arguments(**changes))

    ok = arguments()
    refused(r"qkv must be \[any, 96\].*got \[3, 95\]", qkv=ok["qkv"][:, :-1])
    refused(r"qkv must be .*unit stride.*strides \(1, 3\)", qkv=ok["qkv"].T.contiguous().T)
    refused(r"k_cache must be .*bfloat16.*got .*float32", qkv=ok["qkv"].to(BF16))
    refused(r"v_cache must be \[7, 64, 4, 8\].*got \[5,", v_cache=ok["v_cache"][:5])
    refused("k_cache must be contiguous", k_cache=torch.empty(7, 65, 4, 8)[:, :64])
    refused(r"cos must be \[any, 4\] .*got \[70, 3\]", cos=ok["cos"][:, :3])
    refused("cos and sin must both be None, or both", sin=None)
    refused("sin must be contiguous", sin=torch.empty(70, 8)[:, :4])
    refused("block_tables must be .*int32", block_tables=ok["block_tables"].long())
    refused(r"table_ids must be \[3\].*got \[2\]", table_ids=ok["table_ids"][:2])
    refused(r"seq_lens must be \[3\] torch.int32.*got .*int64", seq_lens=ok["seq_lens"].long())
    refused(r"alibi must be \[4, any\].*got \[3, 70\]", alibi=torch.zeros(3, 70))
    refused("num_heads must be a multiple of .*=4, got 3", num_heads=3)
    refused(r"out must be \[3, 32\] torch.float32.*got \[3, 31\]", out=torch.empty(3, 31))
    refused("out must be .*float32.*got .*bfloat16", out=torch.empty(3, 32, dtype=BF16))

    positions, slots = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    given = {name: ok[name] for name in ("qkv", "cos", "sin", "num_heads", "k_cache", "v_cache")}
    with pytest.raises(ValueError, match=r"positions must be \[3\] torch.int32.*got \[2\]"):
        rotary.rotary_and_store(**given, positions=positions[:2], slot_mapping=slots)
    with pytest.raises(ValueError, match=r"slot_mapping must be .*int64.*got .*int32"):
        rotary.rotary_and_store(**given, positions=positions, slot_mapping=slots.int())


@interpreted
def draw_with_both_backends(base: str, lora: str) -> None:
    from steer_engine import Engine, Guidance, SamplingParams
    from steer_engine.guidance import PassKind

    settings = {"device": "cpu", "dtype": "float32", "max_num_seqs": 3}
    sampling = SamplingParams(top_p=0.9, max_tokens=4, ignore_eos=True)
    drawn = {}
    for backend in ("reference", "triton"):
        engine = Engine.from_pretrained(base, lora, backend=backend, **settings)
        for key, prompt in enumerate([[5, 6, 7], [9, 8, 7, 6, 5]]):
            prompts = {PassKind.DOMAIN: prompt, PassKind.BASE: prompt, PassKind.NEGATIVE: [1]}
            engine.scheduler.waiting.append(
                engine.make_sequence(key, key, prompts, Guidance.recommended(), sampling)
            )
        drawn[backend] = {}
        while engine.scheduler.num_queued:
            for sequence in engine.step(0):
                drawn[backend][sequence.key] = sequence.token_ids
    assert [len(tokens) for tokens in drawn["triton"].values()] == [4, 4]
    assert drawn["triton"] == drawn["reference"]


def test_an_engine_draws_the_references_tokens(tiny_models):
    draw_with_both_backends(str(tiny_models.base), str(tiny_models.lora))

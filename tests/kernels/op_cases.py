"""What the tests of ops share: tolerances, how results are compared, and paged caches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [BF16, FP32]
UNIT = 2.0**-24  # half an ulp of 1 in fp32: the relative error of one rounding

# What an error may be made of; a check adds up those that apply, each relative to what it names.
TOLERANCE = {
    BF16: 2.0**-8,  # of the result: the last rounding, to 8 bits
    FP32: 4 * UNIT,  # of the result: bias, scaling and the last rounding
    # of the sum of the products' magnitudes: n roundings in a row add up like a random walk, to
    # sqrt(n) units of the running sum, 67 for the longest here; the running sum itself is about
    # sqrt(n) smaller than the sum of magnitudes. 8 measured nowhere.
    "sum": 8 * UNIT,
    "gelu": 2 * UNIT,  # of max(1, |x|): the polynomial for the normal distribution function
    # of the largest value: exponents below -8 are rounded to 2**-21, e**-8 weighs
    "exp": 16 * UNIT,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape, dtype=FP32, seed=0, scale=1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=generator(seed)) * scale).to(dtype)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: torch.Tensor, name: str):
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    if got.numel() == 0:
        return
    error = (got.double() - expected).abs()
    is_wrong = ~(error <= tolerance)  # True for NaN
    if is_wrong.any():
        excess = torch.where(error.isnan(), torch.inf, error - tolerance)
        worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), got.shape))
        raise AssertionError(
            f"{name}: {int(is_wrong.sum())} of {got.numel()} wrong in {list(got.shape)}, worst at "
            f"{worst}: got {got[worst]:.9g}, expected {expected[worst]:.9g}, "
            f"tolerance {tolerance.expand_as(error)[worst]:.3g}"
        )


class Pages:
    """A paged cache with two shuffled block tables; slots that no sequence has written hold NaN."""

    def __init__(self, lengths, dtype, num_heads, num_kv_heads, head_dim, block_size, seed=0):
        self.num_heads, self.block_size, self.head_dim = num_heads, block_size, head_dim
        self.max_blocks = max(1, *(-(-n // block_size) for n in lengths))
        num_tables = len(lengths)
        num_blocks = num_tables * self.max_blocks + 1
        order = torch.randperm(num_blocks, generator=generator(seed))[:-1].int()
        self.block_tables = order.view(num_tables, self.max_blocks)
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.k_cache = torch.full(shape, torch.nan, dtype=dtype)
        self.v_cache = torch.full(shape, torch.nan, dtype=dtype)
        for table, length in enumerate(lengths):
            slots = self.slots(table, length)
            for cache, kind in ((self.k_cache, 1), (self.v_cache, 2)):
                values = normal(length, *shape[2:], dtype=dtype, seed=100 * table + kind)
                cache.view(-1, *shape[2:])[slots] = values

    def copy(self) -> Pages:
        pages = copy.copy(self)
        pages.k_cache, pages.v_cache = self.k_cache.clone(), self.v_cache.clone()
        return pages

    def slots(self, table, length):
        position = torch.arange(length)
        blocks = self.block_tables[table].long()[position // self.block_size]
        return blocks * self.block_size + position % self.block_size

    def attention(self, paged_attention, qkv, table_ids, seq_lens, alibi, scale):
        out = torch.full((len(qkv), self.num_heads * self.head_dim), torch.nan, dtype=qkv.dtype)
        keys = (self.k_cache, self.v_cache, self.block_tables, table_ids, seq_lens)
        paged_attention(qkv, *keys, alibi, self.num_heads, scale, out)
        return out

    def attention_fp64(self, qkv, table_ids, seq_lens, alibi, scale):
        """The result and, for tolerances, the weights' mean of |v|."""
        num_kv_heads = self.k_cache.shape[2]
        q = qkv[:, : self.num_heads * self.head_dim].double()
        q = q.view(len(qkv), self.num_heads, self.head_dim)
        out, magnitude = torch.zeros_like(q), torch.zeros_like(q)
        for row, (table, length) in enumerate(zip(table_ids.long(), seq_lens, strict=True)):
            slots = self.slots(table, int(length))
            k, v = (
                cache.view(-1, num_kv_heads, self.head_dim)[slots]
                .double()
                .repeat_interleave(self.num_heads // num_kv_heads, dim=1)
                for cache in (self.k_cache, self.v_cache)
            )
            scores = torch.einsum("hd,khd->hk", q[row], k) * scale
            if alibi is not None:
                scores = scores + alibi[:, : int(length)]
            probs = scores.softmax(dim=1)
            out[row] = torch.einsum("hk,khd->hd", probs, v)
            magnitude[row] = torch.einsum("hk,khd->hd", probs, v.abs())
        return out.flatten(1), magnitude.flatten(1)


def random_qkv(pages: Pages, num_rows: int) -> torch.Tensor:
    num_kv_heads = pages.k_cache.shape[2]
    width = (pages.num_heads + 2 * num_kv_heads) * pages.head_dim
    return normal(num_rows, width, dtype=pages.k_cache.dtype, seed=7)


ATTENTION_SIZES = {  # num_heads, num_kv_heads, head_dim, block_size
    "falcon_7b": (71, 1, 64, 16),
    "grouped": (6, 2, 24, 7),
    "every_head_its_own": (4, 4, 8, 64),
    "odd_head_dim": (3, 1, 5, 1),
}
SIZES_AND_BIASES = [  # rotary embedding needs an even head_dim
    (size, bias)
    for size, (_, _, head_dim, _) in ATTENTION_SIZES.items()
    for bias in ("rotary", "alibi", "none")
    if bias != "rotary" or head_dim % 2 == 0
]


def attention_tolerance(expected, magnitude, head_dim: int, rounding: float) -> torch.Tensor:
    """Scores carry the error of their own sum, at most |q| |k| * "sum", into the exponent.

    rounding: of the result, TOLERANCE[dtype].
    """
    tolerance = (TOLERANCE["exp"] + head_dim**0.5 * 4 * TOLERANCE["sum"]) * magnitude
    return tolerance + rounding * expected.abs()


def rotary_tables(num_positions: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(num_positions)[:, None] * 10000.0 ** -torch.linspace(0, 1, head_dim // 2)
    return angle.cos(), angle.sin()


def rotate_fp64(qkv, cos, sin, positions, num_heads: int, num_kv_heads: int):
    """q and k rotated, [num_tokens, num_heads + num_kv_heads, head_dim], and for tolerances the
    sums of the magnitudes that each adds up.
    """
    num_rotated = num_heads + num_kv_heads
    heads = qkv.double().view(len(qkv), num_rotated + num_kv_heads, -1)
    x1, x2 = heads[:, :num_rotated].chunk(2, dim=-1)
    c, s = cos[positions.long()].double()[:, None], sin[positions.long()].double()[:, None]
    rotated = torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], dim=-1)
    return rotated, torch.cat([x1.abs() + x2.abs()] * 2, dim=-1)


class DecodeCase(NamedTuple):
    """One decode step: the arguments of mqa_decode but for the cache, which is of `pages`.

    pages: row r's table holds seq_lens[r] - 1 keys; its next slot holds NaN.
    """

    pages: Pages
    qkv: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    table_ids: torch.Tensor
    seq_lens: torch.Tensor
    alibi: torch.Tensor | None
    scale: float

    def own_slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that have a sequence, and the slots where their K and V go."""
        rows = self.seq_lens.nonzero()[:, 0]
        lengths = self.seq_lens[rows].tolist()
        tables = self.table_ids[rows].tolist()
        slots = [self.pages.slots(t, n)[-1] for t, n in zip(tables, lengths, strict=True)]
        return rows, torch.stack(slots)


def decode_case(size: str, dtype, lengths: list[int], bias: str, seed: int = 0) -> DecodeCase:
    """Rows of the given seq_lens; the last row has the first table.

    bias: "rotary", "alibi" or "none".
    """
    num_heads, num_kv_heads, head_dim, _ = ATTENTION_SIZES[size]
    pages = Pages(lengths[::-1], dtype, *ATTENTION_SIZES[size], seed=seed)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    table_ids = torch.arange(len(lengths), dtype=torch.int32).flip(0)
    qkv = normal(len(lengths), (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, seed=seed)
    qkv[seq_lens == 0] = torch.nan
    longest = max(lengths)
    cos, sin = rotary_tables(longest, head_dim) if bias == "rotary" else (None, None)
    alibi = None
    if bias == "alibi":
        alibi = torch.linspace(-1, 0, num_heads)[:, None] * torch.arange(longest)
    case = DecodeCase(pages, qkv, cos, sin, table_ids, seq_lens, alibi, head_dim**-0.5)
    for cache in (pages.k_cache, pages.v_cache):
        cache.flatten(0, 1)[case.own_slots()[1]] = torch.nan
    return case


def check_decode(
    case: DecodeCase,
    run: Callable[[DecodeCase], torch.Tensor],
    name: str,
    round_to: Callable = torch.Tensor.to,
    rounding: float | None = None,
) -> None:
    """Run a decode step on a copy of the case; K, V and out against fp64.

    round_to: (fp32 tensor, dtype) -> tensor, how the op rounds.    rounding: its relative error.
    """
    rounding = rounding or TOLERANCE[case.qkv.dtype]
    pages, dtype = case.pages, case.qkv.dtype
    rows, slots = case.own_slots()
    num_heads, head_dim = pages.num_heads, pages.head_dim
    num_kv_heads = pages.k_cache.shape[2]
    heads = case.qkv.view(len(case.qkv), -1, head_dim)
    rotated = heads[:, : num_heads + num_kv_heads].double()
    if case.cos is not None:
        positions = (case.seq_lens - 1).clamp(min=0)
        tables = (case.cos, case.sin, positions)
        exact, magnitude = rotate_fp64(case.qkv, *tables, num_heads, num_kv_heads)
        rotated = round_to(exact.float(), dtype).double()

    # 1. K and V lie in their slots, and nothing else has changed. Where rounding fp32 and rounding
    # fp64 part, K may be one unit of its last place off.
    work = case._replace(pages=pages.copy(), qkv=case.qkv.clone())
    out = run(work)
    k_expected, v_expected = (
        pages.k_cache.flatten(0, 1).clone(),
        pages.v_cache.flatten(0, 1).clone(),
    )
    k_expected[slots] = rotated[rows, num_heads:].to(dtype)
    v_expected[slots] = heads[rows, num_heads + num_kv_heads :]
    k, v = work.pages.k_cache.flatten(0, 1), work.pages.v_cache.flatten(0, 1)
    if case.cos is not None:
        tolerance = TOLERANCE[FP32] * magnitude + 2 * TOLERANCE[dtype] * rotated.abs()
        expected = k_expected[slots].double()
        assert_close(k[slots], expected, tolerance[rows, num_heads:], f"k of {name}")
        k_expected[slots] = k[slots]
    for got, wanted in ((k, k_expected), (v, v_expected)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)

    # 2. out, from the K and V that the op has stored.
    q = rotated[:, :num_heads].flatten(1)
    step = (case.table_ids, case.seq_lens, case.alibi, case.scale)
    expected, magnitude = work.pages.attention_fp64(q, *step)
    has_keys = case.seq_lens > 0
    tolerance = attention_tolerance(expected, magnitude, head_dim, rounding)
    if case.cos is not None and dtype == BF16:
        # One number of q a unit of its last place off, by the same parting.
        tolerance = tolerance + 2 * TOLERANCE[BF16] * 3 * 3 * case.scale * magnitude
    assert_close(out[has_keys], expected[has_keys], tolerance[has_keys], name)
    assert (out[~has_keys] == 0).all(), f"{name}: a row without keys must give zeros"

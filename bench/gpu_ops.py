"""Checks of the model's ops on any device: against fp64, and a row's bits in batches of any size.

Every function takes a backend and a device and raises AssertionError; what it returns says what was
covered. Errors are relative Frobenius norms, of the whole result and of its worst row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from gpu_sampler import require
from op_cases import BF16, FP32, Pages, decode_case, normal, random_qkv, rotate_fp64

from steer_engine import ops

# fp32: sums of up to 22,720 products in another order; tensor cores cut off where an FMA rounds.
# bf16: KERNELS' bound, for results that are rounded to 8 bits and weights of the softmax that are.
MAX_RELATIVE_ERROR = {FP32: 3e-5, BF16: 1e-2}
SEQ_LENS = (1, 63, 64, 65, 2047)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The larger of the whole result's and of the worst row's."""
    difference = (got.double() - expected).flatten(1).norm(dim=1)
    norms = expected.flatten(1).norm(dim=1)
    whole = difference.norm() / norms.norm()
    worst = (difference / norms.clamp(min=1e-30))[norms > 0].max()
    return max(whole.item(), worst.item())


def check_error(got, expected, dtype: torch.dtype, name: str) -> float:
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} not finite"
    error = relative_error(got, expected)
    assert error < MAX_RELATIVE_ERROR[dtype], f"{name}: relative error {error:.2e}"
    return error


def check_rows(run: Callable, batch_sizes: Sequence[int], device: torch.device, name: str) -> None:
    """run(rows) -> one result per row; the same bits first of a batch, last of it, and permuted."""
    num_rows = max(batch_sizes)
    everything = torch.arange(num_rows, device=device)
    together = run(everything)
    for batch_size in batch_sizes:
        for rows in (everything[:batch_size], everything[-batch_size:]):
            is_same = (run(rows) == together[rows]).flatten(1).all(dim=1)
            wrong = rows[~is_same].tolist()
            assert not wrong, f"{name}: rows {wrong[:8]} differ in a batch of {batch_size}"
    permutation = torch.randperm(num_rows, generator=torch.Generator().manual_seed(5)).to(device)
    assert torch.equal(run(permutation), together[permutation]), f"{name}: permuted rows differ"


def check_layer_norm(
    backend: str, device: torch.device, hidden_size: int, batch_sizes: Sequence[int]
) -> str:
    require(backend)
    layer_norm = ops.implementation(backend).layer_norm
    x = normal(max(batch_sizes), hidden_size, scale=3).to(device) + 2
    weight, bias = (normal(hidden_size, seed=seed).to(device) for seed in (1, 2))
    expected = F.layer_norm(x.double(), (hidden_size,), weight.double(), bias.double(), 1e-5)
    errors = {}
    for dtype in (FP32, BF16):

        def run(rows: torch.Tensor, dtype: torch.dtype = dtype) -> torch.Tensor:
            out = torch.full((len(rows), hidden_size), torch.nan, dtype=dtype, device=device)
            return layer_norm(x[rows], weight, bias, 1e-5, out)

        name = f"layer_norm {hidden_size} {dtype}"
        rows = torch.arange(len(x), device=device)
        errors[str(dtype)] = f"{check_error(run(rows), expected, dtype, name):.1e}"
        check_rows(run, batch_sizes, device, name)
    return f"{hidden_size} wide, batches {list(batch_sizes)}, errors {errors}"


def check_linear(
    backend: str,
    device: torch.device,
    in_features: int,
    out_features: int,
    batch_sizes: Sequence[int],
    *,
    gelu_columns: int = 0,
    accumulate: bool = False,
    dtype: torch.dtype = BF16,
    out_dtype: torch.dtype = BF16,
) -> str:
    require(backend)
    module = ops.implementation(backend)
    num_rows = max(batch_sizes)
    x = normal(num_rows, in_features, dtype=dtype).to(device)
    weight = normal(out_features, in_features, seed=1, scale=in_features**-0.5)
    weight = weight.to(device, dtype)
    packed = module.pack_weight(weight)
    before = normal(num_rows, out_features, seed=2).to(device, out_dtype)
    expected = x.double() @ weight.double().T
    expected[:, :gelu_columns] = F.gelu(expected[:, :gelu_columns])
    if accumulate:
        expected += before.double()

    def run(rows: torch.Tensor) -> torch.Tensor:
        out = before[rows]
        epilogue = {"gelu_columns": gelu_columns, "accumulate": accumulate}
        return module.linear(x[rows], packed, out, **epilogue)

    name = f"linear {in_features} to {out_features} {dtype}"
    got = run(torch.arange(num_rows, device=device))
    # The reference's product has rounded to x's dtype before out's.
    rounding = dtype if backend == "reference" else out_dtype
    error = check_error(got, expected, rounding, name)
    check_rows(run, batch_sizes, device, name)
    return f"{in_features} to {out_features}, batches {list(batch_sizes)}, error {error:.1e}"


def check_grouped_linear(
    backend: str,
    device: torch.device,
    in_features: int,
    out_features: int,
    splits: Sequence[tuple[int, int]],
    *,
    gelu_columns: int = 0,
    accumulate: bool = False,
    dtype: torch.dtype = BF16,
    out_dtype: torch.dtype = BF16,
) -> str:
    """Against fp64 as check_linear; and bit for bit what linear gives either side.

    splits: (rows below the boundary, rows of the rest).
    """
    require(backend)
    module = ops.implementation(backend)
    most = max(sum(split) for split in splits)
    x = normal(most, in_features, dtype=dtype).to(device)
    scale = in_features**-0.5
    weights = [normal(out_features, in_features, seed=s, scale=scale) for s in (1, 2)]
    weights = [weight.to(device, dtype) for weight in weights]
    biases = tuple(normal(out_features, seed=seed).to(device) for seed in (3, 4))
    packed = tuple(module.pack_weight(weight) for weight in weights)
    before = normal(most, out_features, seed=5).to(device, out_dtype)
    epilogue = {"gelu_columns": gelu_columns, "accumulate": accumulate}
    expected = [x.double() @ w.double().T + b for w, b in zip(weights, biases, strict=True)]
    for y in expected:
        y[:, :gelu_columns] = F.gelu(y[:, :gelu_columns])
        y += before.double() if accumulate else 0
    # The reference's product has rounded to x's dtype before out's.
    rounding = dtype if backend == "reference" else out_dtype
    errors = []
    for below, rest in splits:
        num_rows = below + rest
        out = before[:num_rows].clone()
        module.grouped_linear(x[:num_rows], packed, below, out, biases=biases, **epilogue)
        for group, rows in enumerate((slice(0, below), slice(below, num_rows))):
            name = f"grouped_linear {in_features} to {out_features} {dtype}, {below} and {rest}"
            alone = before[rows].clone()
            module.linear(x[rows], packed[group], alone, bias=biases[group], **epilogue)
            is_same = (out[rows] == alone).all(dim=1)
            assert is_same.all(), f"{name}: {int((~is_same).sum())} rows have not linear's bits"
            errors.append(check_error(out[rows], expected[group][rows], rounding, name))
    return f"{in_features} to {out_features}, rows {list(splits)}, error {max(errors):.1e}"


def pages_to(pages: Pages, device: torch.device) -> Pages:
    moved = pages.copy()
    for name in ("k_cache", "v_cache", "block_tables"):
        setattr(moved, name, getattr(moved, name).to(device))
    return moved


def check_mqa_decode(
    backend: str,
    device: torch.device,
    size: str = "falcon_7b",
    dtype: torch.dtype = BF16,
    seq_lens: Sequence[int] = SEQ_LENS,
    batch_sizes: Sequence[int] = (),
) -> str:
    """Rotary, K and V in their slots, attention; slots that no sequence has written hold NaN."""
    require(backend)
    mqa_decode = ops.implementation(backend).mqa_decode
    lengths = list(seq_lens)
    lengths += [1 + 7 * row % max(lengths) for row in range(max(batch_sizes, default=0))]
    case = decode_case(size, dtype, lengths, "rotary")
    num_heads, num_kv_heads = case.pages.num_heads, case.pages.k_cache.shape[2]
    given = (case.qkv, case.table_ids, case.seq_lens, case.cos, case.sin)
    qkv, table_ids, lens, cos, sin = (t.to(device) for t in given)

    def run(rows: torch.Tensor, pages: Pages | None = None) -> torch.Tensor:
        pages = pages or pages_to(case.pages, device)
        shape = (len(rows), num_heads * pages.head_dim)
        out = torch.full(shape, torch.nan, dtype=dtype, device=device)
        keys = (pages.k_cache, pages.v_cache, pages.block_tables, table_ids[rows], lens[rows])
        mqa_decode(qkv[rows], cos, sin, *keys, None, num_heads, case.scale, out)
        return out

    pages = pages_to(case.pages, device)
    out = run(torch.arange(len(lengths), device=device), pages).cpu()
    after = pages_to(pages, torch.device("cpu"))
    positions = case.seq_lens - 1
    rotated, _ = rotate_fp64(case.qkv, case.cos, case.sin, positions, num_heads, num_kv_heads)
    rows, slots = case.own_slots()
    name = f"mqa_decode {size} {dtype}"
    stored = after.k_cache.flatten(0, 1)[slots]
    check_error(stored, rotated[rows, num_heads:], dtype, f"{name}, k")
    values = case.qkv.view(len(lengths), -1, after.head_dim)[rows, num_heads + num_kv_heads :]
    assert torch.equal(after.v_cache.flatten(0, 1)[slots], values), f"{name}: v is not in its slot"
    is_other = torch.ones(len(after.k_cache.flatten(0, 1)), dtype=torch.bool)
    is_other[slots] = False
    for was, now in ((case.pages.k_cache, after.k_cache), (case.pages.v_cache, after.v_cache)):
        was, now = was.flatten(0, 1)[is_other], now.flatten(0, 1)[is_other]
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)
    queries = rotated[:, :num_heads].flatten(1)
    expected, _ = after.attention_fp64(queries, case.table_ids, case.seq_lens, None, case.scale)
    error = check_error(out, expected, dtype, name)
    if batch_sizes:
        check_rows(run, batch_sizes, device, name)
    return f"{size} {dtype}, lengths {list(seq_lens)}, batches {list(batch_sizes)}, {error:.1e}"


def check_paged_attention(
    backend: str,
    device: torch.device,
    size: str = "falcon_7b",
    dtype: torch.dtype = BF16,
    seq_lens: Sequence[int] = SEQ_LENS,
    batch_sizes: Sequence[int] = (),
) -> str:
    """Prefill rows: several of one table, so that they share its pages."""
    require(backend)
    from op_cases import ATTENTION_SIZES

    paged_attention = ops.implementation(backend).paged_attention
    longest = max(seq_lens)
    pages = Pages([longest, 1 + longest // 2], dtype, *ATTENTION_SIZES[size])
    lengths = [0, *seq_lens, *range(1, 1 + max(batch_sizes, default=0))]
    lens = torch.tensor([min(n, longest) for n in lengths], dtype=torch.int32)
    table_ids = torch.where(lens > 1 + longest // 2, 0, torch.arange(len(lens)) % 2).int()
    qkv, scale = random_qkv(pages, len(lens)), pages.head_dim**-0.5
    expected, _ = pages.attention_fp64(qkv, table_ids, lens, None, scale)
    here = pages_to(pages, device)
    qkv, table_ids, lens = (t.to(device) for t in (qkv, table_ids, lens))

    def run(rows: torch.Tensor) -> torch.Tensor:
        shape = (len(rows), pages.num_heads * pages.head_dim)
        out = torch.full(shape, torch.nan, dtype=dtype, device=device)
        keys = (here.k_cache, here.v_cache, here.block_tables, table_ids[rows], lens[rows])
        paged_attention(qkv[rows], *keys, None, pages.num_heads, scale, out)
        return out

    name = f"paged_attention {size} {dtype}"
    out = run(torch.arange(len(lens), device=device)).cpu()
    assert (out[0] == 0).all(), f"{name}: a row without keys must give zeros"
    error = check_error(out, expected, dtype, name)
    if batch_sizes:
        check_rows(run, batch_sizes, device, name)
    return f"{size} {dtype}, lengths {list(seq_lens)}, batches {list(batch_sizes)}, {error:.1e}"

"""Times of the GPU kernels: CUDA graph replays over rotating inputs, against floors and peers.

A floor is the bytes that must move, at the bandwidth measured here, or the products, at the rate
measured here, whichever is more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu_report import NotThereError, Report
from gpu_sampler import Case, plain_case, prepare, require
from op_cases import BF16
from steer_engine.kernels.reference.linear import linear_by_group

from steer_engine import ops

ROTATED_BYTES = 100_000_000  # over twice 50 MB of L2: no input is still there when it is used again
MAX_COPIES = 64
NUM_REPLAYS = 30
VOCAB_SIZE, NUM_PASSES = 65024, 3
SAMPLER_BATCHES = (1, 8, 64, 256, 1000)
GOALS_US = {  # KERNELS.md 4.5
    "cuda": {1: 12, 8: 14, 64: 30, 256: 100, 1000: 350},
    "triton": {1: 18, 8: 22, 64: 60, 256: 220, 1000: 800},
}
HIDDEN, QKV, FFN = 4544, 4672, 18176
LINEARS = {  # name: (in_features, out_features, gelu_columns, accumulate, out_dtype)
    "up_qkv": (HIDDEN, FFN + QKV, FFN, False, BF16),
    "down_dense": (FFN + HIDDEN, HIDDEN, 0, True, torch.float32),
    "head": (HIDDEN, VOCAB_SIZE, 0, False, torch.float32),
}
LINEAR_ROWS = (1, 3, 12, 48, 192, 768)
GROUPED_ROWS = (1, 8, 64, 256)  # on either side
TWO_LAUNCHES = "triton, two launches"
ATTENTION_SIZES = ((3, 200), (24, 200), (192, 200), (768, 200), (24, 2000))  # rows, seq_len


class Ceilings(NamedTuple):
    bytes_per_s: float
    flops_per_s: float  # of bf16 products


class Times(NamedTuple):
    """Of one call, us."""

    median: float
    p20: float
    p80: float


def quantiles(times_us: list[float]) -> Times:
    ordered = torch.tensor(times_us, dtype=torch.float64)
    return Times(*(ordered.quantile(q).item() for q in (0.5, 0.2, 0.8)))


def time_replays(calls: list[Callable[[], object]], use_graph: bool = True) -> Times:
    """Run all calls, each on inputs of its own, one behind the other; the time of one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)

    def run_all() -> None:
        for call in calls:
            call()

    replay = run_all
    if use_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_all()
        replay = graph.replay
    for _ in range(3):
        replay()
    times_us = []
    for _ in range(NUM_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times_us.append(start.elapsed_time(end) * 1e3 / len(calls))
    return quantiles(times_us)


def num_copies(num_bytes: int) -> int:
    return max(1, min(MAX_COPIES, -(-ROTATED_BYTES // max(1, num_bytes))))


def measure_ceilings(device: torch.device) -> Ceilings:
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    copy = time_replays([lambda: target.copy_(source)])
    bytes_per_s = 2 * source.nbytes / (copy.p20 * 1e-6)
    a, b = torch.randn(2, 8192, 8192, device=device).to(BF16)
    product = time_replays([lambda: a @ b])
    return Ceilings(bytes_per_s, 2 * 8192**3 / (product.p20 * 1e-6))


def record(
    report: Report,
    op: str,
    implementation: str,
    size: str,
    make_calls: Callable[[], list[Callable]],
    floor_us: float,
    *,
    use_graph: bool = True,
    against: tuple[str, Times | None] = ("", None),
    goal_share: float | None = None,
    **more,
) -> Times | None:
    """Time an implementation twice, the second time for the noise, and note it.

    against: the name and times of another implementation, whose share this one takes.
    goal_share: of the floor, if there is one to meet.
    Returns: the first times, or None if the backend is not there or fails.
    """
    try:
        calls = make_calls()
        first = time_replays(calls, use_graph)
        second = time_replays(calls, use_graph)
    except NotThereError:
        return None
    except Exception as error:  # the others' times must not be lost
        report.check(f"time of {op} {implementation} {size}", raise_again, error)
        return None
    rival, rival_times = against
    if rival_times is not None:
        more |= {"against": rival, "share_of_it": round(first.median / rival_times.median, 3)}
    if goal_share is not None:
        is_met = floor_us >= goal_share * first.median
        more |= {"goal_share": goal_share, "meets_goal": is_met}
    report.time(
        {
            "op": op,
            "implementation": implementation,
            "size": size,
            "median_us": round(first.median, 2),
            "p20_us": round(first.p20, 2),
            "p80_us": round(first.p80, 2),
            "noise": round(abs(second.median - first.median) / first.median, 3),
            "floor_us": round(floor_us, 2),
            "share_of_floor": round(floor_us / first.median, 3),
            "is_graph": use_graph,
        }
        | more
    )
    return first


def raise_again(error: Exception) -> None:
    raise error


def sort_chain(logits, weights, top_p: float) -> torch.Tensor:
    """The same draw as most implementations write it."""
    combined = (logits.log_softmax(dim=-1) * weights[:, :, None]).sum(dim=0)
    probs, order = combined.softmax(dim=-1).sort(dim=-1, descending=True)
    probs = torch.where(probs.cumsum(dim=-1) - probs > top_p, 0.0, probs)
    return order.gather(1, torch.multinomial(probs, 1))


def flashinfer_chain(logits, weights, top_p: float) -> torch.Tensor:
    from flashinfer.sampling import top_p_sampling_from_probs

    combined = (logits * weights[:, :, None]).sum(dim=0)
    return top_p_sampling_from_probs(combined.softmax(dim=-1), top_p)


def random_draws(num_seqs: int, device: torch.device, num: int) -> list[Case]:
    """Correlated passes of spread 2.5, top-p 0.9."""
    cases = []
    for seed in range(num):
        g = torch.Generator(device).manual_seed(seed)
        shape = (num_seqs, VOCAB_SIZE)
        shared = 2.5 * torch.randn(shape, generator=g, device=device)
        noise = 0.3 * torch.randn(NUM_PASSES, *shape, generator=g, device=device)
        case = plain_case(torch.zeros(NUM_PASSES, VOCAB_SIZE), num_seqs, top_p=0.9).to(device)
        weights = torch.tensor([1.2, -0.2, -0.2], device=device)[:, None].repeat(1, num_seqs)
        cases.append(case._replace(logits=shared + noise, weights=weights))
    return cases


def time_sampler(report: Report, device: torch.device, ceilings: Ceilings) -> None:
    for num_seqs in SAMPLER_BATCHES:
        row_bytes = NUM_PASSES * VOCAB_SIZE * 4
        cases = random_draws(num_seqs, device, num_copies(num_seqs * row_bytes))
        size = f"B={num_seqs}, 3 x {VOCAB_SIZE} fp32"
        floors = {"cuda": row_bytes, "triton": row_bytes + 16 * VOCAB_SIZE}
        for backend, num_bytes in floors.items():

            def make(backend: str = backend, cases: list = cases) -> list[Callable]:
                require(backend)
                return [prepare(backend, case).launch for case in cases]

            floor_us = num_seqs * num_bytes / ceilings.bytes_per_s * 1e6
            goal = GOALS_US[backend][num_seqs]
            record(report, "guided_sample", backend, size, make, floor_us, goal_us=goal)
        least = num_seqs * row_bytes / ceilings.bytes_per_s * 1e6
        chains = {"torch sort chain": sort_chain}
        if report.content["machine"]["flashinfer"]:
            chains["flashinfer top-p"] = flashinfer_chain
        for name, chain in chains.items():

            def make(chain: Callable = chain, cases: list = cases) -> list[Callable]:
                return [lambda c=c: chain(c.logits, c.weights, 0.9) for c in cases[:4]]

            record(report, "guided_sample", name, size, make, least, use_graph=False)


def time_layer_norm(report: Report, device: torch.device, ceilings: Ceilings) -> None:
    weight, bias = torch.randn(2, HIDDEN, device=device)
    for num_rows in (3, 192, 768):
        num_bytes = num_rows * HIDDEN * 6 + 2 * weight.nbytes
        floor_us = num_bytes / ceilings.bytes_per_s * 1e6
        copies = num_copies(num_bytes)
        xs = torch.randn(copies, num_rows, HIDDEN, device=device)
        out = torch.empty(copies, num_rows, HIDDEN, device=device, dtype=BF16)

        def with_backend(backend: str, xs=xs, out=out) -> list[Callable]:
            require(backend)
            norm = ops.implementation(backend).layer_norm
            return [
                lambda x=x, o=o: norm(x, weight, bias, 1e-5, o)
                for x, o in zip(xs, out, strict=True)
            ]

        def with_torch(xs=xs, out=out) -> list[Callable]:
            return [
                lambda x=x, o=o: o.copy_(F.layer_norm(x, (HIDDEN,), weight, bias, 1e-5))
                for x, o in zip(xs, out, strict=True)
            ]

        size = f"{num_rows} rows of {HIDDEN}"
        record(report, "layer_norm", "triton", size, lambda: with_backend("triton"), floor_us)
        record(report, "layer_norm", "torch", size, with_torch, floor_us)


def cublas_linear(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, gelu_columns: int, accumulate: bool
) -> None:
    y = F.linear(x, weight)
    if accumulate:
        out.add_(y)
    elif gelu_columns:
        out[:, gelu_columns:] = y[:, gelu_columns:]
        out[:, :gelu_columns] = F.gelu(y[:, :gelu_columns])
    else:
        out.copy_(y)


def time_linear(report: Report, device: torch.device, ceilings: Ceilings) -> None:
    """The batch-invariant kernel against cuBLAS and its epilogue."""
    for name, (in_features, out_features, gelu_columns, accumulate, out_dtype) in LINEARS.items():
        num_bytes = 2 * in_features * out_features
        weights = [
            (torch.randn(out_features, in_features, device=device) * 0.02).to(BF16)
            for _ in range(min(4, num_copies(num_bytes)))
        ]
        for num_rows in LINEAR_ROWS:
            x = torch.randn(num_rows, in_features, device=device).to(BF16)
            out = torch.zeros(num_rows, out_features, device=device, dtype=out_dtype)
            read_s = (num_bytes + x.nbytes + out.nbytes) / ceilings.bytes_per_s
            floor_us = 1e6 * max(read_s, num_rows * num_bytes / ceilings.flops_per_s)

            def with_triton(
                x=x, out=out, weights=weights, gelu_columns=gelu_columns, accumulate=accumulate
            ) -> list[Callable]:
                require("triton")
                module = ops.implementation("triton")
                epilogue = {"gelu_columns": gelu_columns, "accumulate": accumulate}
                packed = [module.pack_weight(weight) for weight in weights]
                return [lambda w=w: module.linear(x, w, out, **epilogue) for w in packed]

            def with_cublas(
                x=x, out=out, weights=weights, gelu_columns=gelu_columns, accumulate=accumulate
            ) -> list[Callable]:
                epilogue = {"gelu_columns": gelu_columns, "accumulate": accumulate}
                return [lambda w=w: cublas_linear(x, w, out, **epilogue) for w in weights]

            size = f"{name}, {num_rows} rows"
            record(report, "linear", "triton", size, with_triton, floor_us)
            record(report, "linear", "cuBLAS + epilogue", size, with_cublas, floor_us)


def grouped_makers(
    x: torch.Tensor,
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    out: torch.Tensor,
    epilogue: dict,
) -> dict[str, Callable[[], list[Callable]]]:
    """{implementation: makes one call for each pair of weights}; the boundary is in the middle."""

    def with_triton(is_one: bool) -> list[Callable]:
        require("triton")
        module = ops.implementation("triton")
        two_launches = functools.partial(linear_by_group, module.linear, biases=None)
        grouped = module.grouped_linear if is_one else two_launches
        packed = [tuple(module.pack_weight(weight) for weight in pair) for pair in pairs]
        return [lambda p=p: grouped(x, p, len(x) // 2, out, **epilogue) for p in packed]

    def with_cublas() -> list[Callable]:
        def call(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
            for rows, weight, part in zip(x.chunk(2), pair, out.chunk(2), strict=True):
                cublas_linear(rows, weight, part, **epilogue)

        return [lambda p=p: call(p) for p in pairs]

    return {
        TWO_LAUNCHES: lambda: with_triton(is_one=False),
        "triton, one launch": lambda: with_triton(is_one=True),
        "cuBLAS + epilogue, twice": with_cublas,
    }


def time_grouped_linear(report: Report, device: torch.device, ceilings: Ceilings) -> None:
    """Two weight sets with as many rows each: one launch against two, and cuBLAS twice.

    Expected, not timed yet (kernels/grouped_linear.py says why): one launch is ahead by some us up
    to 64 rows a side, and in down_dense at 256; level in up_qkv and the head at 256.
    """
    for name, (in_features, out_features, gelu_columns, accumulate, out_dtype) in LINEARS.items():
        epilogue = {"gelu_columns": gelu_columns, "accumulate": accumulate}
        num_bytes = 2 * 2 * in_features * out_features
        pairs = [
            (torch.randn(2, out_features, in_features, device=device) * 0.02).to(BF16).unbind()
            for _ in range(min(4, num_copies(num_bytes)))
        ]
        for num_rows in GROUPED_ROWS:
            x = torch.randn(2 * num_rows, in_features, device=device).to(BF16)
            out = torch.zeros(2 * num_rows, out_features, device=device, dtype=out_dtype)
            read_s = (num_bytes + x.nbytes + out.nbytes) / ceilings.bytes_per_s
            floor_us = 1e6 * max(read_s, num_rows * num_bytes / ceilings.flops_per_s)
            size, times = f"{name}, {num_rows} rows a side", {}
            for kind, make in grouped_makers(x, pairs, out, epilogue).items():
                against = (TWO_LAUNCHES, times.get(TWO_LAUNCHES))
                times[kind] = record(
                    report, "grouped_linear", kind, size, make, floor_us, against=against
                )


def time_attention(report: Report, device: torch.device, ceilings: Ceilings) -> None:
    num_heads, head_dim, block_size = 71, 64, 64
    scale = head_dim**-0.5
    tables = (torch.randn(2, 4096, head_dim // 2, device=device)).unbind()
    for num_rows, seq_len in ATTENTION_SIZES:
        per_row = -(-seq_len // block_size)
        kv_bytes = num_rows * seq_len * 2 * head_dim * 2
        qkv_bytes = num_rows * (2 * num_heads + 2) * head_dim * 2
        floor_us = (kv_bytes + qkv_bytes) / ceilings.bytes_per_s * 1e6
        copies = num_copies(kv_bytes)
        shape = (copies, 2, num_rows * per_row, block_size, 1, head_dim)
        caches = torch.randn(shape, device=device, dtype=BF16)
        block_tables = torch.randperm(num_rows * per_row, device=device).int().view(num_rows, -1)
        table_ids = torch.arange(num_rows, device=device, dtype=torch.int32)
        seq_lens = torch.full_like(table_ids, seq_len)
        qkv = torch.randn(num_rows, (num_heads + 2) * head_dim, device=device).to(BF16)
        out = torch.empty(num_rows, num_heads * head_dim, device=device, dtype=BF16)

        def with_triton(caches=caches, qkv=qkv, out=out, where=(block_tables, table_ids, seq_lens)):
            require("triton")
            decode = ops.implementation("triton").mqa_decode
            rest = (None, num_heads, scale, out)
            return [lambda c=c: decode(qkv, *tables, c[0], c[1], *where, *rest) for c in caches]

        def with_sdpa(caches=caches, qkv=qkv, num_rows=num_rows, seq_len=seq_len):
            # Keys lie contiguous and 71 heads stand as queries of one: a favour to it.
            q = qkv[:, : num_heads * head_dim].view(num_rows, 1, num_heads, head_dim)
            keys = [c.view(2, num_rows, 1, -1, head_dim)[..., :seq_len, :] for c in caches]
            return [lambda k=k: F.scaled_dot_product_attention(q, k[0], k[1]) for k in keys]

        size = f"{num_rows} rows, {seq_len} keys, 71 heads"
        record(report, "mqa_decode", "triton", size, with_triton, floor_us)
        record(report, "mqa_decode", "torch SDPA, no pages", size, with_sdpa, floor_us)

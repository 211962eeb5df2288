"""What does drawing one token cost, against the usual chain of PyTorch operations?

    python -m pytest bench/bench_guided_sample.py --benchmark-only

One thread, the thread's CPU clock, three passes of 65,024 logits per sequence. The chain is
log_softmax of each pass, combine, softmax, sort, cumulative sum, mask, multinomial; it serves all
kinds with the same work, so each row's ratio is to the chain on that row, timed in turns with the
kernel. The tokens that the C++ kernel drew are compared with the reference's. The last test prints
the table.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import pytest
import torch

from steer_engine import ops

VOCAB_SIZE = 65024
NUM_SEQS = 16  # enough for what a call costs beside its rows (200 us) to weigh little
WEIGHTS = (1.2, -0.2, -0.2)
NUM_ROUNDS = 9


class Kind(NamedTuple):
    spread: float  # the logits' standard deviation; 0: all are equal
    top_p: float = 0.9
    top_k: int = 0
    alpha: float = 0.0
    dtype: torch.dtype = torch.float32


KINDS = {
    "peaked": Kind(6.0),
    "std 2.5": Kind(2.5),
    "std 2.5, top_p 0.95": Kind(2.5, top_p=0.95),
    "flat": Kind(0.5),
    "all equal": Kind(0.0),
    "std 2.5, top_k 50": Kind(2.5, top_k=50),
    "std 2.5, top_p 1": Kind(2.5, top_p=1.0),
    "std 2.5, alpha 0.1": Kind(2.5, alpha=0.1),
    "std 2.5, bf16": Kind(2.5, dtype=torch.bfloat16),
    "peaked, bf16": Kind(6.0, dtype=torch.bfloat16),
}


def make_arguments(kind: Kind) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Correlated passes, as those of one model are."""
    torch.manual_seed(0)
    shared = kind.spread * torch.randn(1, NUM_SEQS, VOCAB_SIZE)
    noise = 0.3 if kind.spread > 0 else 0.0
    logits = shared + noise * torch.randn(3, NUM_SEQS, VOCAB_SIZE)
    weights = torch.tensor(WEIGHTS)[:, None].repeat(1, NUM_SEQS)
    per_seq = {
        "temperature": torch.ones(NUM_SEQS),
        "top_p": torch.full((NUM_SEQS,), kind.top_p),
        "top_k": torch.full((NUM_SEQS,), kind.top_k, dtype=torch.int32),
        "alpha": torch.full((NUM_SEQS,), kind.alpha),
        "seed": 1,
        "stream_ids": torch.arange(NUM_SEQS),
        "steps": torch.zeros(NUM_SEQS, dtype=torch.int32),
    }
    return logits.to(kind.dtype), weights, per_seq


def sort_chain(logits: torch.Tensor, weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """The same draw as most implementations write it (without top-k, alpha and seeds)."""
    combined = (logits.float().log_softmax(dim=-1) * weights[:, :, None]).sum(dim=0)
    probs, order = combined.softmax(dim=-1).sort(dim=-1, descending=True)
    probs[probs.cumsum(dim=-1) - probs > top_p] = 0
    return order.gather(1, torch.multinomial(probs, 1))


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("implementation", ["cpu", "sort_chain"])
def test_draw_one_token_per_sequence(benchmark, implementation, kind):
    logits, weights, per_seq = make_arguments(kind)
    benchmark.extra_info["num_seqs"] = NUM_SEQS
    if implementation == "sort_chain":
        benchmark.pedantic(sort_chain, (logits, weights, kind.top_p), rounds=NUM_ROUNDS)
        return
    reason = ops.unavailable_reason(implementation)
    if reason is not None:
        pytest.skip(reason)
    expected = ops.guided_sample(logits, weights, backend="reference", **per_seq)
    drawn = benchmark(ops.guided_sample, logits, weights, backend=implementation, **per_seq)
    assert torch.equal(drawn.token_ids, expected.token_ids)


def time_us(function) -> float:
    """Per sequence."""
    start = time.thread_time_ns()
    function()
    return (time.thread_time_ns() - start) / 1e3 / NUM_SEQS


@pytest.mark.benchmark(timer=time.thread_time)
def test_ratio_to_the_chain(benchmark, capsys):
    reason = ops.unavailable_reason("cpu")
    if reason is not None:
        pytest.skip(reason)
    table = []
    for name, kind in KINDS.items():
        logits, weights, per_seq = make_arguments(kind)

        def kernel(logits=logits, weights=weights, per_seq=per_seq):
            return ops.guided_sample(logits, weights, backend="cpu", **per_seq)

        def chain(logits=logits, weights=weights, top_p=kind.top_p):
            return sort_chain(logits, weights, top_p)

        kernel()
        chain()
        rounds = [[time_us(kernel), time_us(kernel), time_us(chain)] for _ in range(NUM_ROUNDS)]
        kernel_us = statistics.median(t for first, second, _ in rounds for t in (first, second))
        chain_us = statistics.median(chain for *_, chain in rounds)
        table.append((name, kernel_us, chain_us, chain_us / kernel_us))
    benchmark.pedantic(kernel, rounds=NUM_ROUNDS)
    with capsys.disabled():
        print("\nus per row, medians of the thread's CPU time, one thread, 3 x 65,024 logits")
        for name, kernel_us, chain_us, ratio in table:
            print(f"{name:<22}{kernel_us:8.0f}{chain_us:10.0f}{ratio:8.1f} x")

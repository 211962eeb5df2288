"""What does drawing one token cost, against the usual chain of PyTorch operations?

    python -m pytest bench/bench_guided_sample.py --benchmark-only

One thread, three passes of 65,024 fp32 logits per sequence, top-p 0.9. The chain is log_softmax of
each pass, combine, softmax, sort, cumulative sum, mask, multinomial. The tokens that the C++ kernel
drew are compared with the reference's.
"""

from __future__ import annotations

import pytest
import torch

from steer_engine import ops

VOCAB_SIZE = 65024
NUM_SEQS = 4
WEIGHTS = (1.2, -0.2, -0.2)
TOP_P = 0.9
SPREADS = {"peaked": 6.0, "flat": 0.5}


def make_arguments(spread: float) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Correlated passes, as those of one model are; spread is the logits' standard deviation."""
    torch.manual_seed(0)
    shared = spread * torch.randn(1, NUM_SEQS, VOCAB_SIZE)
    logits = shared + 0.3 * torch.randn(3, NUM_SEQS, VOCAB_SIZE)
    weights = torch.tensor(WEIGHTS)[:, None].repeat(1, NUM_SEQS)
    per_seq = {
        "temperature": torch.ones(NUM_SEQS),
        "top_p": torch.full((NUM_SEQS,), TOP_P),
        "top_k": torch.zeros(NUM_SEQS, dtype=torch.int32),
        "alpha": torch.zeros(NUM_SEQS),
        "seed": 1,
        "stream_ids": torch.arange(NUM_SEQS),
        "steps": torch.zeros(NUM_SEQS, dtype=torch.int32),
    }
    return logits, weights, per_seq


def sort_chain(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same draw as most implementations write it (without a per-sequence seed)."""
    combined = (logits.log_softmax(dim=-1) * weights[:, :, None]).sum(dim=0)
    probs, order = combined.softmax(dim=-1).sort(dim=-1, descending=True)
    probs[probs.cumsum(dim=-1) - probs > TOP_P] = 0
    return order.gather(1, torch.multinomial(probs, 1))


@pytest.fixture(autouse=True)
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
@pytest.mark.parametrize("implementation", ["cpu", "reference", "sort_chain"])
def test_draw_one_token_per_sequence(benchmark, implementation, spread):
    logits, weights, per_seq = make_arguments(spread)
    benchmark.extra_info["num_seqs"] = NUM_SEQS
    if implementation == "sort_chain":
        benchmark(sort_chain, logits, weights)
        return
    reason = ops.unavailable_reason(implementation)
    if reason is not None:
        pytest.skip(reason)
    expected = ops.guided_sample(logits, weights, backend="reference", **per_seq)
    drawn = benchmark(ops.guided_sample, logits, weights, backend=implementation, **per_seq)
    assert torch.equal(drawn.token_ids, expected.token_ids)

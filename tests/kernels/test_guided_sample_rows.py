"""Ten thousand rows, 625 of every kind: the same token, status, kept count and mass from the
reference, the C++ kernel and the Triton kernels in the interpreter.

The interpreter's time goes by operation, not by element, so the vocabularies are small (larger ones
stand in test_guided_sample_triton.py and test_cpu_ops.py): 20 to 27 rows per second and core.
STEER_SAMPLER_ROWS sets another number of rows.
"""

from __future__ import annotations

import itertools
import os
import sys
import time

import pytest
import torch
from sampler_cases import KINDS, Case, random_case, reference_sample
from steer_engine.kernels.reference import prepare_parameters
from test_guided_sample_triton import check, whole_rows
from triton_interpreter import start_children

from steer_engine import ops

# One below, at and above the sizes of blocks and of vectors; odd ones between.
# fmt: off
VOCAB_SIZES = [
    1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 50, 63, 64, 65, 77, 100, 127, 128, 129, 200, 255, 256,
    257, 300,
]
# fmt: on
NUM_ROWS = int(os.environ.get("STEER_SAMPLER_ROWS", "10000"))
ROWS_AT_ONCE = 25


def cpu_sample(case: Case) -> list[torch.Tensor]:
    """All five outputs of the C++ kernel."""
    _, num_seqs, vocab_size = case.logits.shape
    dtypes = (torch.int64, torch.float32, torch.int32, torch.int32, torch.int64)
    outputs = [torch.full((num_seqs,), -7, dtype=dtype) for dtype in dtypes]
    parameters = prepare_parameters(**case.settings, vocab_size=vocab_size)
    signed_seed = case.seed - (1 << 64 if case.seed >> 63 else 0)
    torch.ops.steer_engine.guided_sample(
        case.logits, case.weights.contiguous(), *parameters, signed_seed, case.stream_ids,
        case.steps, *outputs,
    )  # fmt: skip
    return outputs


def check_rows(path: list[str], number: int, kind: str, vocab_size: int) -> tuple[int, float]:
    """Compare ROWS_AT_ONCE rows; in a child. Returns their number and the CPU time they took."""
    sys.path[:] = path
    from triton.runtime.interpreter import interpreter_builder

    # Checking every integer sum for overflow takes a quarter of the time; other tests do it.
    object.__setattr__(interpreter_builder.options, "sanitize_overflow", False)
    started_at = time.process_time()
    g = torch.Generator().manual_seed(10_000 + number)
    case = random_case(kind, ROWS_AT_ONCE, vocab_size, g, num_passes=1 + number % 3)
    expected = reference_sample(case)
    name = f"{kind}, vocab_size {vocab_size}"
    if ops.unavailable_reason("cpu") is None:
        check(case, None, f"cpu, {name}", expected, cpu_sample(case))
    # One ladder round: a shorter program; other tests take two.
    check(case, whole_rows(vocab_size, num_rounds=1), f"triton, {name}", expected)
    return ROWS_AT_ONCE, time.process_time() - started_at


@pytest.mark.timeout(3000)  # minutes on two idle cores
def test_ten_thousand_rows_are_the_same_in_reference_cpu_and_triton():
    pool = start_children(min(8, os.cpu_count() or 1))
    sizes = itertools.cycle(itertools.product(VOCAB_SIZES, KINDS))
    chunks = itertools.islice(sizes, -(-NUM_ROWS // ROWS_AT_ONCE))
    started_at = time.monotonic()
    running = [
        pool.submit(check_rows, sys.path, number, kind, vocab_size)
        for number, (vocab_size, kind) in enumerate(chunks)
    ]
    try:
        done = [chunk.result() for chunk in running]
    finally:
        pool.shutdown(cancel_futures=True)
    num_rows, cpu_s = (sum(column) for column in zip(*done, strict=True))
    wall_s = time.monotonic() - started_at
    print(f"{num_rows} rows in {wall_s:.0f} s, {num_rows / cpu_s:.1f} rows per second and core")
    assert num_rows >= NUM_ROWS

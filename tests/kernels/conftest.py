"""Fixtures that the tests of csrc share."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
def isa(request):
    """Every instruction set of this machine."""
    from cpu_library import BEST_ISA, ops

    ops.set_cpu_isa(request.param)
    if ops.cpu_isa() != request.param:
        ops.set_cpu_isa(BEST_ISA)
        pytest.skip(f"this machine has {BEST_ISA}, not {request.param}")
    yield request.param
    ops.set_cpu_isa(BEST_ISA)

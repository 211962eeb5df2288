"""Compile csrc/cuda for every target, without a GPU: no kernel may spill, or use more shared memory
than a block has without asking, and registers are what they were.

A change of registers is no error by itself: look at it, then record it in REGISTERS.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc")
MAX_SHARED_BYTES = 48 * 1024

# kernel: (registers per thread on sm_80, on sm_90); nvcc 13.0. The cluster kernels, by tokens per
# thread, are empty on sm_80, which has no clusters. 512 threads may use 128 registers.
REGISTERS = {
    "sample_in_cluster<32>": (4, 110),
    "sample_in_cluster<16>": (4, 80),
    "sample_in_cluster<8>": (4, 72),
    "sample_in_block": (53, 53),
}


def readable(symbol: str) -> str:
    name, items = re.match(r"_ZN5steer\d+(sample_in_[a-z]+?)(?:ILi(\d+)E)?E", symbol).groups()
    return f"{name}<{items}>" if items else name


@pytest.mark.parametrize("target", [80, 90])
def test_kernels_compile_without_spills_and_within_shared_memory(target, tmp_path):
    if NVCC is None:
        pytest.skip("nvcc is not on PATH")
    flags = ["-std=c++17", "-O3", "--fmad=false", "--expt-relaxed-constexpr", f"-I{CSRC}"]
    flags += [f"-gencode=arch=compute_{target},code=sm_{target}", "-Xptxas=-v", "-cubin"]
    source = CSRC / "cuda" / "guided_sample.cu"
    done = subprocess.run(
        [NVCC, *flags, source, "-o", tmp_path / "kernels.cubin"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for report in done.stderr.split("Compiling entry function '")[1:]:
        name = readable(report)
        stack, spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill", report).groups()
        shared = re.search(r"(\d+) bytes smem", report)
        found[name] = int(re.search(r"Used (\d+) registers", report)[1])
        assert (stack, spilled) == ("0", "0"), f"{name} on sm_{target} spills"
        assert shared is None or int(shared[1]) <= MAX_SHARED_BYTES, f"{name}: {shared[0]}"
    assert found == {name: pair[target == 90] for name, pair in REGISTERS.items()}, (
        f"sm_{target}: registers changed"
    )

"""The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer: csrc is built anew with
them, and the ops' tests run on that library, every op at every instruction set of this machine.

Unoptimised, because the optimiser needs a minute more to compile checks than it saves running
them; the model's own sizes and rows beside other rows are left to the plain library. 17 s to
build and 65 s to run, of one core. With `out[size] = out[0]` planted behind the loop of layer_norm,
or an int that overflows in pack_weight, this test fails and prints the report.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cmake_build import configure_command, find_tool, run

SANITIZERS = "address,undefined"
SELECTION = (
    "not models_own and not many_rows and not more_rows and not neighbours"
    " and not (portable and falcon_7b)"
)
TESTS = ("test_cpu_ops.py", "test_compressed_weight.py")
REPORTS = ("runtime error:", "ERROR: AddressSanitizer")


def find_runtime(compiler: str, name: str) -> str:
    """The compiler's own shared sanitizer library; or skip."""
    command = [compiler, f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_file():
        pytest.skip(f"{compiler} has no {name}")
    return found


def build_library(compiler: str, folder: Path) -> Path:
    include = Path(importlib.util.find_spec("torch").origin).parent / "include"
    options = [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_BUILD_TYPE=Debug", "-DSTEER_CUDA=OFF"]
    options += [f"-DTORCH_INCLUDE_DIR={include}", f"-DSTEER_SANITIZE={SANITIZERS}"]
    run(configure_command(folder, *options))
    run([find_tool("cmake"), "--build", folder, "--parallel", str(os.cpu_count() or 1)])
    return folder / "_csrc.so"


@pytest.mark.timeout(900)  # a busy machine; see the figures above
def test_no_op_reads_or_writes_out_of_bounds_or_has_undefined_behaviour(tmp_path):
    compiler = find_tool("g++")
    runtimes = [find_runtime(compiler, name) for name in ("libasan.so", "libubsan.so")]
    library = build_library(compiler, tmp_path / "build")
    environment = os.environ | {
        "STEER_TEST_LIBRARY": str(library),
        # Python itself is not instrumented: its runtime has to be there before anything else, and
        # what it never frees is not ours.
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    # -s: a report that pytest has captured is lost when the process stops.
    pytest_command = [sys.executable, "-m", "pytest", "-s", "-q", "-x", "-p", "no:cacheprovider"]
    output = run(
        [*pytest_command, "-o", "timeout=600", "-k", SELECTION, *TESTS],
        cwd=Path(__file__).parent,
        env=environment,
    )
    assert " passed" in output, output[-12000:]
    assert not any(report in output for report in REPORTS), output[-12000:]

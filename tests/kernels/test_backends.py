"""The backends from the outside: all offer the same functions, and what `cuda` needs is asked for
in one line, by Python and by CMake. Nothing here needs a GPU or nvcc.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import shutil
from pathlib import Path

import pytest
import torch
from cmake_build import configure_command, run
from steer_engine.kernels import cuda, reference

from steer_engine import ops

# What the reference shares with the others beside its ops.
SHARED = {
    "Int8Weight",
    "LinearWeight",
    "Sampled",
    "SamplingTensors",
    "last_slots",
    "prepare_parameters",
}
OPTIONAL = {"pack_int8_weight"}  # ops.has_int8
STORAGE = {"CompressedWeight", "compress_weight"}  # a form of weight that one backend has
OPS = sorted(set(reference.__all__) - SHARED - OPTIONAL)


def parameters(function) -> dict[str, tuple]:
    """{name: (kind, default)}; annotations may be left out where a docstring names the twin."""
    found = inspect.signature(function).parameters.values()
    return {p.name: (p.kind, p.default) for p in found}


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_every_backend_offers_the_references_ops_with_their_signatures(backend):
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    module = importlib.import_module(f"steer_engine.kernels.{ops.BACKENDS[backend]}")
    assert sorted(set(module.__all__) - SHARED - OPTIONAL - STORAGE) == OPS
    for name in [*OPS, *(OPTIONAL & set(module.__all__))]:
        got, expected = parameters(getattr(module, name)), parameters(getattr(reference, name))
        common = {key: value for key, value in got.items() if key in expected}
        # In this order, too: most are passed by position.
        assert list(common.items()) == list(expected.items()), f"{backend}.{name}"
        # A backend may have options of its own, if callers need not know of them.
        for extra in got.keys() - expected.keys():
            kind, default = got[extra]
            is_option = kind is inspect.Parameter.KEYWORD_ONLY and default is not inspect._empty
            assert is_option, f"{backend}.{name}: {extra} must be keyword-only, with a default"


NOT_COMPILED = "not compiled; install again where a C++ compiler and CMake are found"
UNAVAILABLE = {
    "no library": (NOT_COMPILED, "80-real 90", True, NOT_COMPILED),
    "no CUDA in it": (None, "", True, "compiled without CUDA; install again where nvcc is found"),
    "no GPU": (None, "80-real 90", False, "needs a CUDA GPU"),
    "all there": (None, "80-real 90", True, None),
}


@pytest.mark.parametrize("case", UNAVAILABLE)
def test_the_cuda_backend_says_what_it_lacks(case, monkeypatch):
    library, archs, has_gpu, expected = UNAVAILABLE[case]
    monkeypatch.setattr(ops, "_load_library", lambda: library)
    monkeypatch.setattr(torch.ops.steer_engine, "cuda_archs", lambda: archs, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert ops.unavailable_reason("cuda") == expected
    if expected is None:
        assert ops.resolve_backend("cuda", torch.device("cuda")) == "cuda"
    else:
        with pytest.raises(ValueError) as raised:
            ops.resolve_backend("cuda", torch.device("cuda"))
        assert str(raised.value) == f"backend cuda is not available: {expected}"


def sampling_arguments(num_seqs: int, vocab_size: int) -> tuple[list, dict]:
    """On the CPU: enough for what comes before a launch."""
    ones = torch.ones(num_seqs)
    settings = {"temperature": ones, "top_p": ones, "alpha": ones, "top_k": ones.int()}
    draw = {"seed": 0, "stream_ids": ones.long(), "steps": ones.int()}
    # Expanded, so that no number of a large vocabulary is stored; the last dimension has to be.
    logits = torch.zeros(1, 1, vocab_size).expand(3, num_seqs, vocab_size)
    return [logits, torch.ones(3, num_seqs)], settings | draw


def test_the_cuda_sampler_refuses_a_vocabulary_that_a_rank_cannot_hold():
    positional, named = sampling_arguments(1, cuda.MAX_VOCAB_SIZE + 1)
    with pytest.raises(ValueError, match=r"vocab_size must be at most 1048576, got 1048577"):
        cuda.guided_sample(*positional, **named)


def test_the_cuda_sampler_launches_nothing_for_no_sequences():
    positional, named = sampling_arguments(0, 100)
    sampled = cuda.guided_sample(*positional, **named)
    assert [(len(t), t.dtype) for t in sampled] == [
        (0, torch.int64),
        (0, torch.float32),
        (0, torch.int32),
    ]


def without_nvcc() -> dict[str, str]:
    """This environment, but for what leads CMake to a CUDA compiler."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    path = os.pathsep.join(f for f in folders if not (Path(f) / "nvcc").exists())
    if shutil.which("c++", path=path) is None:
        pytest.skip("no C++ compiler lies elsewhere than nvcc")
    return {k: v for k, v in os.environ.items() if k != "CUDACXX"} | {"PATH": path}


def test_cmake_leaves_the_cuda_kernels_out_when_told_to(tmp_path):
    output = run(configure_command(tmp_path, "-DSTEER_CUDA=OFF"))  # test_sanitizers.py builds it
    assert "CUDA" not in output
    assert "CMAKE_CUDA_COMPILER" not in (tmp_path / "CMakeCache.txt").read_text()


def test_cmake_leaves_the_cuda_kernels_out_where_there_is_no_nvcc_and_says_so(tmp_path):
    output = run(configure_command(tmp_path), env=without_nvcc())
    ours = [line for line in output.splitlines() if "steer_engine" in line]
    expected = "-- steer_engine: no CUDA compiler is found, the CUDA kernels are left out"
    assert ours == [expected]
    assert "steer_cuda" not in (tmp_path / "build.ninja").read_text()


def test_cmake_stops_where_cuda_is_demanded_and_there_is_no_nvcc(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="STEER_CUDA=ON, but no CUDA compiler is found"):
        run(configure_command(tmp_path, "-DSTEER_CUDA=ON"), env=without_nvcc())

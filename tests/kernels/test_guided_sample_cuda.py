"""The CUDA sampler without a GPU: its files, unchanged, run in an emulator (cuda_emulator/)
and must give the reference's token, status, kept count and mass, bit for bit, for every kind of
row, every way of splitting it and every order of its threads.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sampler_cases import KINDS, Case, assert_same, random_case, reference_sample
from steer_engine.kernels.reference.guided_sample import (
    prepare_parameters,
)

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
if COMPILER is None or platform.machine() != "x86_64":
    pytest.skip("the emulator needs g++ and x86-64", allow_module_level=True)

FULL = 65024  # Falcon's vocabulary


class Shape(NamedTuple):
    """num_items: of a thread, in registers; 0: in scratch. num_blocks: of a cluster; 0: a block
    without one. order: 0, or the seed of a random order of threads.
    """

    num_items: int
    num_blocks: int
    num_threads: int
    order: int = 0

    def holds(self, vocab_size: int) -> bool:
        held = self.num_items * max(1, self.num_blocks) * self.num_threads
        return self.num_items == 0 or vocab_size <= held


# The wide ones take 20 to 40 ms a row, so they get few rows.
NARROW = [Shape(32, 2, 32), Shape(32, 0, 64, 1), Shape(0, 0, 128), Shape(0, 4, 32, 2)]
WIDE = [Shape(8, 4, 64, 3), Shape(1, 8, 160, 4), Shape(1, 16, 96, 5)]


@pytest.fixture(scope="session")
def emulate(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulator") / "guided_sample.so"
    includes = [f"-I{HERE / 'cuda_emulator'}", f"-I{HERE.parents[1] / 'csrc'}"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off"]
    flags += ["-fsanitize=undefined", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    source = HERE / "cuda_emulator" / "guided_sample.cpp"
    subprocess.run([COMPILER, *flags, *includes, source, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).emulate_guided_sample
    function.restype = ctypes.c_char_p
    return function


@pytest.fixture(autouse=True)
def no_undefined_behaviour(capfd):
    """The sanitizer writes what it finds to stderr and goes on."""
    yield
    assert "runtime error" not in capfd.readouterr().err


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def sample(emulate, case: Case, shape: Shape) -> list[torch.Tensor]:
    """All five outputs, from buffers full of what no row may return."""
    _, num_seqs, vocab_size = case.logits.shape
    assert shape.holds(vocab_size)
    dtypes = (torch.int64, torch.float32, torch.int32, torch.int32, torch.int64)
    outputs = [torch.full((num_seqs,), -7, dtype=dtype) for dtype in dtypes]
    parameters = prepare_parameters(**case.settings, vocab_size=vocab_size)
    seed = torch.tensor([case.seed - (1 << 64 if case.seed >> 63 else 0)])
    scratch = torch.full((num_seqs, vocab_size), torch.nan)
    weights = case.weights.contiguous()
    strides = [ctypes.c_int64(case.logits.stride(d)) for d in (0, 1)]
    tensors = [weights, *parameters, seed, case.stream_ids, case.steps, *outputs, scratch]
    sizes = [ctypes.c_int64(size) for size in case.logits.shape]
    error = emulate(
        pointer(case.logits), *strides, *map(pointer, tensors), *sizes,
        ctypes.c_bool(case.logits.dtype == torch.bfloat16),
        *shape[:3], ctypes.c_uint64(shape.order),
    ).decode()  # fmt: skip
    assert not error, f"{shape}: {error}"
    return outputs


def check(emulate, case: Case, shape: Shape, name: str, expected=None) -> None:
    expected = expected or reference_sample(case)
    results = sample(emulate, case, shape)
    assert_same(case, results, expected, f"{name}, {shape}", logprob_tolerance=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row_equals_the_reference_bit_for_bit(emulate, kind):
    g = torch.Generator().manual_seed(KINDS.index(kind))
    for vocab_size, num_seqs in ((1, 4), (2, 8), (17, 16), (50, 24), (1000, 24), (1024, 12)):
        case = random_case(kind, num_seqs, vocab_size, g)
        expected = reference_sample(case)
        for shape in NARROW:
            check(emulate, case, shape, f"{kind}, vocab_size {vocab_size}", expected)
    for shape in WIDE:
        check(emulate, random_case(kind, 5, 1025, g), shape, kind)


@pytest.mark.parametrize("kind", ["plain", "flat", "peaked", "bf16", "all_equal", "wide", "nan"])
def test_rows_of_the_models_vocabulary_equal_the_reference(emulate, kind):
    g = torch.Generator().manual_seed(100 + KINDS.index(kind))
    case = random_case(kind, 2, FULL, g)
    expected = reference_sample(case)
    check(emulate, case, Shape(0, 0, 256, 2), kind, expected)
    check(emulate, case, Shape(32, 8, 256, 3), kind, expected)


def test_the_shape_of_many_rows_on_a_gpu_equals_the_reference(emulate):
    case = random_case("plain", 2, FULL, torch.Generator().manual_seed(3))
    case.settings["temperature"][:] = 1.0
    case.settings["top_p"][:] = 0.9
    check(emulate, case, Shape(32, 4, 512), "4 blocks")
    check(emulate, case.rows([0]), Shape(8, 16, 512), "16 blocks")


@pytest.mark.parametrize("num_passes", [1, 2])
def test_one_and_two_passes_equal_the_reference(emulate, num_passes):
    g = torch.Generator().manual_seed(num_passes)
    for kind in ("plain", "nan", "bf16", "tied"):
        for shape in NARROW:
            check(emulate, random_case(kind, 20, 300, g, num_passes), shape, kind)


def test_every_split_and_order_gives_the_same_bits(emulate):
    case = random_case("tied", 6, 1000, torch.Generator().manual_seed(5))
    case.settings["temperature"][:] = torch.tensor([0.7, 1.0, 1.7, 0.0, 1.0, 50.0])
    case.settings["top_k"][:2] = torch.tensor([40, 300])
    expected = reference_sample(case)
    for num_blocks in (0, 1, 2, 4, 8, 16):
        for num_items, num_threads in ((0, 32), (32, 64), (8, 32), (8, 256), (1, 64)):
            shape = Shape(num_items, num_blocks, num_threads, num_blocks)
            if shape.holds(1000) and num_blocks * num_threads <= 1024:
                check(emulate, case, shape, "split", expected)
    for order in range(1, 20):
        check(emulate, case, Shape(8, 4, 64, order), "order", expected)


def test_a_sequence_does_not_depend_on_its_slot_or_its_neighbours(emulate):
    g = torch.Generator().manual_seed(7)
    cases = [
        random_case(kind, 2, 500, g)
        for kind in ("plain", "nan", "all_nan", "plus_inf", "tied", "all_equal")
    ]
    case = Case(
        torch.cat([c.logits.float() for c in cases], dim=1),
        torch.cat([c.weights for c in cases], dim=1),
        {name: torch.cat([c.settings[name] for c in cases]) for name in cases[0].settings},
        cases[0].seed,
        torch.cat([c.stream_ids for c in cases]),
        torch.cat([c.steps for c in cases]),
    )
    permutation = torch.randperm(12, generator=g)
    for shape in (Shape(8, 2, 64), Shape(0, 0, 64)):
        together = sample(emulate, case, shape)
        permuted = sample(emulate, case.rows(permutation), shape)
        alone = [sample(emulate, case.rows([row]), shape) for row in range(12)]
        for i, output in enumerate(together):
            assert torch.equal(output[permutation], permuted[i])
            assert torch.equal(output, torch.cat([outputs[i] for outputs in alone]))


def test_logits_may_have_any_stride_of_passes_and_sequences(emulate):
    case = random_case("plain", 8, 200, torch.Generator().manual_seed(8))
    stored = torch.full((8, 3, 251), torch.nan)  # [num_seqs, num_passes, ...]
    stored[:, :, 51:] = case.logits.transpose(0, 1)
    strided = case._replace(logits=stored[:, :, 51:].transpose(0, 1))
    assert not strided.logits.is_contiguous()
    for shape in NARROW:
        check(emulate, strided, shape, "strided")


def test_ten_thousand_random_rows_equal_the_reference(emulate):
    g = torch.Generator().manual_seed(9)
    for i in range(48):
        kind = KINDS[i % len(KINDS)]
        vocab_size = (40, 97, 160)[i % 3]
        shape = (Shape(8, 2, 32), Shape(1, 2, 96, i), Shape(0, 0, 32, i))[i // 3 % 3]
        check(emulate, random_case(kind, 128, vocab_size, g), shape, kind)

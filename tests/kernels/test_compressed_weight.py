"""Compressed weights (csrc/cpu/compressed_weight.h): no bit is lost, whatever the numbers, and
products have the bits of products with the plain weight.
"""

from __future__ import annotations

import pytest
import torch
from cpu_library import ops
from op_cases import BF16, FP32, normal
from steer_engine.kernels import cpu

UNIT = (16, 8)  # columns and inputs
NUM_EXPONENTS = 16


def compress(weight: torch.Tensor, tail_features: int = 0) -> cpu.CompressedWeight:
    """Also where it saves nothing."""
    split = weight.shape[1] - tail_features
    tail = cpu.pack_weight(weight[:, split:]) if tail_features else None
    data, raw = ops.compress_weight(weight[:, :split].contiguous())
    return cpu.CompressedWeight(data, *weight.shape, raw, tail)


def decompress(weight: cpu.CompressedWeight) -> torch.Tensor:
    return cpu.embedding(weight, torch.arange(weight.out_features))


def outlying(weight: torch.Tensor, share: float) -> torch.Tensor:
    """With so many values that are far smaller than the rest, and zeros."""
    g = torch.Generator().manual_seed(7)
    is_one = torch.rand(weight.shape, generator=g) < share
    small = weight * torch.tensor([0.0, 1e-30])[torch.randint(2, weight.shape, generator=g)]
    return torch.where(is_one, small, weight).to(weight.dtype)


def run(x, weight, *, out_dtype=FP32, **epilogue) -> torch.Tensor:
    out = torch.full((x.shape[0], weight.out_features), torch.nan, dtype=out_dtype)
    return cpu.linear(x, weight, out, **epilogue)


def check_products(in_features: int, out_features: int, rows: tuple[int, ...]) -> None:
    weight = outlying(normal(out_features, in_features, dtype=BF16, scale=0.02), 0.005)
    compressed, plain = compress(weight), cpu.pack_weight(weight)
    epilogue = {"bias": normal(out_features, seed=2), "gelu_columns": out_features // 2}
    for num_rows in rows:
        x = normal(num_rows, in_features, dtype=BF16, seed=num_rows)
        assert torch.equal(run(x, compressed), run(x, plain)), f"{num_rows} rows"
        got = run(x, compressed, out_dtype=BF16, **epilogue)
        assert torch.equal(got, run(x, plain, out_dtype=BF16, **epilogue)), f"{num_rows} rows"


@pytest.mark.parametrize("out_features", [1, 40, 200])
@pytest.mark.parametrize("in_features", [8, 136])
def test_products_have_the_bits_of_products_with_the_plain_weight(isa, in_features, out_features):
    check_products(in_features, out_features, (1, 2, 3, 6, 7, 13))


@pytest.mark.parametrize("out_features", [64, 200])
def test_products_have_those_bits_with_many_rows_and_inputs(isa, out_features):
    check_products(1048, out_features, (4, 5, 40, 250))


@pytest.mark.parametrize("tail_features", [1, 3, 16])
def test_a_tail_is_added_as_if_it_stood_in_the_plain_weight(isa, tail_features):
    weight = normal(70, 72 + tail_features, dtype=BF16)
    for num_rows in (1, 4, 9, 33):
        x = normal(num_rows, 72 + tail_features, dtype=BF16, seed=1)
        got = run(x, compress(weight, tail_features))
        assert torch.equal(got, run(x, cpu.pack_weight(weight)))


def test_units_that_do_not_fit_are_used_as_they_are(isa):
    """From none to all of them, at every place of a word of marks."""
    for share in (0.0, 0.001, 0.05, 1.0):
        weight = outlying(normal(80, 400, dtype=BF16), share)
        weight[:, :8] = torch.tensor([1.0, 2.0**-40]).repeat(4)
        x = normal(3, 400, dtype=BF16, seed=1)
        assert torch.equal(run(x, compress(weight)), run(x, cpu.pack_weight(weight)))


def test_every_bf16_comes_back():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)
    for weight in (every.reshape(256, 256), every.reshape(256, 256).T.contiguous()):
        back = decompress(compress(weight))
        assert torch.equal(back.view(torch.int32) >> 16, weight.view(torch.int16).int())


def test_16_exponents_fit_and_17_do_not():
    for lowest in (0, 1, 100, 256 - NUM_EXPONENTS):
        exponents = torch.arange(lowest, lowest + NUM_EXPONENTS) % 256
        values = (exponents.to(torch.int16) << 7).view(BF16)
        weight = values.repeat(16, 8)
        compressed = compress(weight)
        assert (compressed.raw.shape[0], decompress(compressed).equal(weight.float())) == (1, True)
        assert not any_marked(compressed)
    weight[3, 5] = 0.0
    compressed = compress(weight)
    assert any_marked(compressed)
    assert torch.equal(decompress(compressed), weight.float())


def any_marked(weight: cpu.CompressedWeight) -> bool:
    """Whether a panel's first word of marks has a bit; it stands behind 64 x 2 exponents."""
    return bool(weight.data[256:264].any())


def test_a_weight_as_networks_have_takes_12_bits_a_value():
    weight = normal(256, 1024, dtype=BF16, scale=0.02)
    compressed = compress(weight)
    bits = 8 * (compressed.data.nbytes + compressed.raw.nbytes) / weight.numel()
    assert 12.0 < bits < 12.5


def test_what_compression_would_not_make_smaller_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu, "COMPRESSING_ISAS", {ops.cpu_isa()})
    noise = torch.randint(-(2**15), 2**15, (64, 64), dtype=torch.int16).view(BF16)
    assert cpu.compress_weight(noise) is None
    assert cpu.compress_weight(normal(64, 64)) is None, "fp32"
    assert cpu.compress_weight(normal(64, 68, dtype=BF16)) is None, "no whole units"
    assert cpu.compress_weight(normal(72, 64, dtype=BF16)) is None, "padding to 128 columns"
    assert cpu.compress_weight(normal(64, 64, dtype=BF16)) is not None


def test_levels_where_it_would_be_slower_keep_the_plain_weight(isa):
    compressed = cpu.compress_weight(normal(64, 64, dtype=BF16))
    assert (compressed is not None) == (isa in ("avx2", "avx512_bf16"))


def test_any_row_stride_and_adding_to_the_output(isa):
    weight = normal(80, 64, dtype=BF16)
    x = normal(5, 70, dtype=BF16)[:, 3:67]
    out = normal(5, 90)[:, 5:85]
    expected = cpu.linear(x, cpu.pack_weight(weight), out.clone(), accumulate=True)
    cpu.linear(x, compress(weight), out, accumulate=True)
    assert torch.equal(out, expected)


def test_the_number_of_threads_changes_no_bit():
    weight, x = normal(500, 64, dtype=BF16), normal(9, 64, dtype=BF16)
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        compressed = compress(weight)
        results.append((compressed.data, decompress(compressed), run(x, compressed)))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_wrong_arguments_are_named():
    weight = compress(normal(64, 64, dtype=BF16))
    x, out = normal(2, 64, dtype=BF16), torch.empty(2, 64)
    with pytest.raises(ValueError, match=r"weight must be .*bf16"):
        ops.compress_weight(normal(64, 64))
    with pytest.raises(ValueError, match="in_features must be a multiple of 8, got 12"):
        ops.compress_weight(normal(64, 12, dtype=BF16))
    with pytest.raises(ValueError, match=r"x must be .*bf16"):
        cpu.linear(x.float(), weight, out)
    with pytest.raises(ValueError, match="packed must be"):
        cpu.linear(x, weight._replace(data=weight.data[:-1]), out)
    with pytest.raises(ValueError, match=r"raw must be .*unit_values"):
        cpu.linear(x, weight._replace(raw=weight.raw[:, :-1].contiguous()), out)
    with pytest.raises(ValueError, match=r"input_ids must lie in \["):
        cpu.embedding(weight, torch.tensor([64]))

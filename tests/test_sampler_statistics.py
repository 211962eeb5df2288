"""What is drawn, against what should be: frequencies, nucleus, random numbers, independence."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steer_engine.kernels.reference.philox import MASK_32, Words, philox4x32, random_bits

from steer_engine import ops

# The package's attribute of that name is the function.
sampler = importlib.import_module("steer_engine.kernels.reference.guided_sample")

NUM_DRAWS = 120_000
VOCAB_SIZE = 50
# A right sampler fails a test of this size once in 10**6 seeds; the seeds are fixed.
QUANTILE = 4.75


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> None:
    """Assert that counts [num_cells] are a plausible draw from probs [num_cells].

    Cells expected fewer than 5 times are pooled. The statistic is turned into a standard normal
    (Wilson and Hilferty 1931).
    """
    total = counts.sum().item()
    expected = probs.double() / probs.double().sum() * total
    assert counts[probs == 0].sum() == 0, "a cell of probability 0 was drawn"
    is_rare = expected < 5
    observed = torch.cat((counts[~is_rare], counts[is_rare].sum()[None])).double()
    expected = torch.cat((expected[~is_rare], expected[is_rare].sum()[None]))
    if expected[-1] < 5:
        # Too little even together: judged by its own size, then left out.
        assert observed[-1] <= 5 + 10 * math.sqrt(5)
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert freedom > 0, "one cell is no test"
    scale = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - 1 + scale) / math.sqrt(scale)
    worst = ((observed - expected) / expected.sqrt()).abs().argmax().item()
    assert z < QUANTILE, (
        f"chi-square {statistic:.1f} with {freedom} degrees (z = {z:.1f}); worst cell {worst}: "
        f"expected {expected[worst]:.1f}, drawn {observed[worst]:.0f}"
    )


def rows(num_rows: int, **values) -> dict[str, torch.Tensor]:
    """Per-row arguments of guided_sample, the same for all rows."""
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "alpha": 0.0} | values
    dtypes = {"top_k": torch.int32}
    return {
        name: torch.full((num_rows,), value, dtype=dtypes.get(name, torch.float32))
        for name, value in defaults.items()
    }


def draw(
    backend: str,
    logits: torch.Tensor,
    num_draws: int = NUM_DRAWS,
    *,
    seed: int = 0,
    weights: tuple = (1.0,),
    stream_ids: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
    **values,
) -> torch.Tensor:
    """num_draws tokens from logits [num_passes, vocab_size], one stream each."""
    num_passes = logits.shape[0]
    token_ids = []
    for first in range(0, num_draws, 20_000):
        count = min(20_000, num_draws - first)
        ids = torch.arange(first, first + count) if stream_ids is None else stream_ids
        sampled = ops.guided_sample(
            logits[:, None].expand(-1, count, -1).contiguous(),
            torch.tensor(weights)[:, None].expand(num_passes, count).contiguous(),
            backend=backend,
            seed=seed,
            stream_ids=ids,
            steps=torch.zeros(count, dtype=torch.int32) if steps is None else steps,
            **rows(count, **values),
        )
        assert not sampled.status.any()
        token_ids.append(sampled.token_ids)
    return torch.cat(token_ids)


def exact_probs(
    x: torch.Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> torch.Tensor:
    """The distribution in fp64, by a plain sort: x [vocab_size] combined logits."""
    probs = torch.softmax(x.double() / temperature, dim=0)
    order = torch.sort(x, descending=True, stable=True).indices
    ranked = probs[order]
    if top_k:
        ranked[top_k:] = 0
        ranked /= ranked.sum()
    before = ranked.cumsum(0) - ranked
    # top_p as the sampler gets it, in fp32; 1e-12 for the rounding of the sum.
    ranked[before >= torch.tensor(top_p).item() - 1e-12] = 0
    return torch.zeros_like(probs).scatter_(0, order, ranked / ranked.sum())


def gaussian(sigma: float, size: int = VOCAB_SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * sigma


def tied(size: int = VOCAB_SIZE) -> torch.Tensor:
    """A fifth of the values, each five times, in mixed order."""
    return (gaussian(1.0, size) * 1.5).round() / 1.5


ROWS = {
    "gaussian": gaussian(1.5),
    "flat": torch.zeros(VOCAB_SIZE),
    "peaked": torch.cat((torch.tensor([4.0]), gaussian(1.0, VOCAB_SIZE - 1))),
    "zipf": -torch.log(torch.arange(1.0, VOCAB_SIZE + 1))[
        torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    ],
    "tied": tied(),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_draws_have_the_frequencies_of_the_distribution(backend, name, top_p):
    expected = exact_probs(ROWS[name], top_p=top_p)
    counts = draw(backend, ROWS[name][None], top_p=top_p).bincount(minlength=VOCAB_SIZE)
    chi_square(counts, expected)


def test_three_passes_temperature_top_k_and_top_p_together(backend):
    logits = torch.stack([gaussian(1.0, seed=s) for s in range(3)])
    weights, settings = (1.2, -0.3, 0.4), {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    combined = sum(w * row.double() for w, row in zip(weights, logits, strict=True))
    expected = exact_probs(combined, **settings)
    token_ids = draw(backend, logits, weights=weights, **settings)
    chi_square(token_ids.bincount(minlength=VOCAB_SIZE), expected)
    assert (expected > 0).sum() < 20  # top_p cut something that top_k had left


def test_the_plausibility_cut_reads_the_domain_logits(backend):
    logits = torch.stack([gaussian(1.0, seed=s) for s in range(2)])
    is_kept = logits[0] >= logits[0].max() + math.log(0.1)
    combined = (1.0 * logits[0] - 0.5 * logits[1]).masked_fill(~is_kept, -torch.inf)
    counts = draw(backend, logits, weights=(1.0, -0.5), alpha=0.1).bincount(minlength=VOCAB_SIZE)
    chi_square(counts, torch.softmax(combined.double(), dim=0))
    assert 1 < is_kept.sum() < VOCAB_SIZE


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.9, 0.99])
def test_tokens_outside_the_nucleus_are_never_drawn(backend, top_p):
    for name, row in ROWS.items():
        kept = exact_probs(row, top_p=top_p) > 0
        token_ids = draw(backend, row[None], 20_000, top_p=top_p)
        assert kept[token_ids].all(), name
        if top_p == 1e-6:
            assert token_ids.unique().tolist() == [row.argmax().item()]


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("size", [1, 63, 1000, 65_024])
def test_the_nucleus_is_that_of_an_fp64_sort(top_p, size):
    """A token may differ only where the fp64 mass up to it is within 1e-5 of top_p."""
    generator = torch.Generator().manual_seed(size)
    normal = torch.randn(size, generator=generator)
    permutation = torch.randperm(size, generator=generator)
    logits = {
        "gaussian 0.05": normal * 0.05,
        "gaussian 1": normal,
        "gaussian 2.5": normal * 2.5,
        "zipf": -torch.log(1.0 + permutation),
        "steep zipf": -1.5 * torch.log(1.0 + permutation),
        "peaked": torch.where(permutation == 0, 20.0, normal),
        "tied": (normal * 4).round() / 4,
        "bf16-rounded": (normal * 2.5).bfloat16().float(),
        "constant": torch.full((size,), 3.25),
        "with -inf": torch.where(permutation % 3 == 1, -torch.inf, normal),
    }
    stacked = torch.stack(list(logits.values()))[None]
    parameters = sampler.prepare_parameters(**rows(len(logits), top_p=top_p), vocab_size=size)
    kept = sampler.nucleus(stacked, torch.ones(1, len(logits)), parameters)
    for index, (name, row) in enumerate(logits.items()):
        is_kept = kept.masses[index] > 0
        order = torch.sort(row, descending=True, stable=True).indices
        probs = torch.softmax(row.double(), dim=0)[order]
        before = probs.cumsum(0) - probs
        expected = before < top_p
        differs = (is_kept[order] != expected).nonzero()[:, 0]
        # Below 2**-41 of the top token a mass rounds to 0: such tokens are out, at any top_p.
        differs = differs[probs[differs] > 2.0**-40 * probs[0]]
        distance = (before[differs] - top_p).abs()
        assert (distance < 1e-5).all(), (
            f"{name}: {len(differs)} tokens differ, the worst {distance.max():.1e} from top_p"
        )
        assert (kept.masses[index] > 0).sum() == kept.num_kept[index]
        # The kept ones are a prefix of the order, ties cut by index.
        ranked = is_kept[order]
        assert ranked[: kept.num_kept[index]].all() and not ranked[kept.num_kept[index] :].any()
        total = kept.masses[index].sum()
        assert total == kept.total_mass[index] and 0 < total < 2**56


# counter, key and answer; kat_vectors of Random123 1.14, "philox4x32 10"
KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_philox_gives_the_known_answers(line):
    words = [int(word, 16) for word in line.split()]
    counter, key, expected = words[:4], words[4:6], words[6:]
    assert list(philox4x32(Words(*counter), tuple(key))) == expected
    tensors = Words(*(torch.tensor([w, 0]) for w in counter))
    assert [w[0].item() for w in philox4x32(tensors, tuple(key))] == expected


def test_random_bits_take_every_bit_of_seed_stream_and_step():
    base = (0x0123456789ABCDEF, 0x0FEDCBA987654321, 0x7654321)
    seen = {random_bits(*base, stream=0), random_bits(*base, stream=1)}
    for field, num_bits in ((0, 64), (1, 63), (2, 31)):
        for bit in range(num_bits):
            changed = list(base)
            changed[field] ^= 1 << bit
            seen.add(random_bits(*changed, stream=0))
    assert len(seen) == 2 + 64 + 63 + 31
    on_tensors = random_bits(base[0], torch.tensor([base[1]]), torch.tensor([base[2]]), 0)
    assert tuple(w.item() for w in on_tensors) == random_bits(*base, stream=0)


@given(
    bits=st.integers(0, 2**64 - 1),
    mass=st.integers(0, 2**56 - 1) | st.integers(2**32 - 2, 2**32 + 2),
)
def test_multiply_high_is_the_upper_half_of_the_product(bits, mass):
    high, low = torch.tensor([bits >> 32]), torch.tensor([bits & MASK_32])
    result = sampler.multiply_high(high, low, torch.tensor([mass])).item()
    assert result == bits * mass >> 64


@given(total=st.integers(0, 2**56 - 1), top_p_fixed=st.integers(1, 2**32))
def test_the_mass_target_is_rounded_up(total, top_p_fixed):
    target = sampler.mass_target(torch.tensor([total]), torch.tensor([top_p_fixed])).item()
    assert target == max(1, -(-total * top_p_fixed // 2**32))


@pytest.mark.parametrize("masses", [[3, 0, 5, 2], [1], [0, 0, 7], [1, 1, 1, 1, 1], [40, 1, 0, 59]])
def test_over_all_thresholds_every_token_is_drawn_as_often_as_its_mass(monkeypatch, masses):
    """r = 0 .. M-1 in turn, each from the least and from the greatest random number that give it:
    mulhi loses no value at either end.
    """
    total = sum(masses)
    least = [-(-(r << 64) // total) for r in range(total)]
    greatest = [-(-((r + 1) << 64) // total) - 1 for r in range(total)]
    for numbers in (least, greatest):
        kept = sampler.Nucleus(
            masses=torch.tensor(masses).expand(total, -1).contiguous(),
            total_mass=torch.full((total,), total),
            num_kept=torch.full((total,), sum(m > 0 for m in masses)),
            greedy_ids=torch.zeros(total, dtype=torch.int64),
            status=torch.zeros(total, dtype=torch.int32),
            fallback_ids=torch.zeros(total, dtype=torch.int64),
        )
        bits = (
            torch.tensor([n >> 32 for n in numbers]),
            torch.tensor([n & MASK_32 for n in numbers]),
        )
        monkeypatch.setattr(sampler, "nucleus", lambda *_, kept=kept: kept)
        monkeypatch.setattr(sampler, "random_bits", lambda *_, bits=bits: bits)
        sampled = sampler.guided_sample(
            torch.zeros(1, total, len(masses)),
            torch.ones(1, total),
            seed=0,
            stream_ids=torch.arange(total),
            steps=torch.zeros(total, dtype=torch.int32),
            **rows(total),
        )
        assert sampled.token_ids.bincount(minlength=len(masses)).tolist() == masses
        assert sampled.logprobs[0].item() == pytest.approx(
            math.log(masses[sampled.token_ids[0]] / total), abs=1e-6
        )


def test_the_probability_of_a_token_is_its_mass(backend):
    """exp2_mass against fp64: what is drawn, and what next_token_probs says, is softmax itself."""
    x = gaussian(3.0, 5000)
    masses = sampler.exp2_mass((x - x.max()) * sampler.LOG2_E).double()
    exact = torch.exp2(((x - x.max()) * sampler.LOG2_E).double()) * 2**40
    # The polynomial's 2e-9, its roundings to fp32 (7 steps of 2**-24), and one half of a unit.
    assert ((masses - exact).abs() <= exact * 7 * 2.0**-24 + 0.5).all()


def independent(first: torch.Tensor, second: torch.Tensor, probs: torch.Tensor) -> None:
    """Pairs of draws have the product of their probabilities."""
    size = len(probs)
    pairs = (first * size + second).bincount(minlength=size * size)
    chi_square(pairs, (probs[:, None] * probs).flatten())


@pytest.mark.parametrize("what", ["steps", "streams", "seeds", "attempts"])
def test_draws_next_to_each_other_are_independent(backend, what):
    row = gaussian(1.0, 12)
    probs = torch.softmax(row.double(), dim=0)
    count = 20_000
    streams, steps = torch.arange(count), torch.zeros(count, dtype=torch.int32)
    first = {"stream_ids": streams, "steps": steps, "seed": 5}
    second = {
        "steps": first | {"steps": steps + 1},
        "streams": first | {"stream_ids": streams + 1},
        "seeds": first | {"seed": 6},
        # The next attempt at an example has its number above bit 40 of the stream.
        "attempts": first | {"stream_ids": streams + (1 << 40)},
    }[what]
    draws = [draw(backend, row[None], count, **arguments) for arguments in (first, second)]
    independent(*draws, probs)
    assert (draws[0] != draws[1]).any()


def test_the_steps_of_one_stream_have_the_right_frequencies(backend):
    row = gaussian(1.5)
    token_ids = draw(
        backend,
        row[None],
        20_000,
        stream_ids=torch.full((20_000,), 7),
        steps=torch.arange(20_000, dtype=torch.int32),
    )
    counts = token_ids.bincount(minlength=VOCAB_SIZE)
    chi_square(counts, torch.softmax(row.double(), dim=0))


def test_a_rows_place_and_neighbours_do_not_matter(backend):
    num_rows = 257
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, num_rows, VOCAB_SIZE, generator=generator) * 2
    weights = torch.randn(3, num_rows, generator=generator)
    arguments = {
        "temperature": torch.rand(num_rows, generator=generator) + 0.3,
        "top_p": torch.rand(num_rows, generator=generator) * 0.9 + 0.1,
        "top_k": torch.randint(0, 30, (num_rows,), generator=generator, dtype=torch.int32),
        "alpha": torch.rand(num_rows, generator=generator) * 0.1,
        "stream_ids": torch.randint(0, 2**62, (num_rows,), generator=generator),
        "steps": torch.randint(0, 2000, (num_rows,), generator=generator, dtype=torch.int32),
    }

    def sample(chosen: torch.Tensor):
        return ops.guided_sample(
            logits[:, chosen],
            weights[:, chosen],
            backend=backend,
            seed=2**63 + 12345,
            **{name: tensor[chosen] for name, tensor in arguments.items()},
        )

    everything = sample(torch.arange(num_rows))
    shuffled = torch.randperm(num_rows, generator=generator)
    for chosen in (shuffled, shuffled[:100], shuffled[100:101], shuffled[::7]):
        part = sample(chosen)
        assert torch.equal(part.token_ids, everything.token_ids[chosen])
        assert torch.equal(part.logprobs, everything.logprobs[chosen])
        assert torch.equal(part.status, everything.status[chosen])
    # The same row in two places, under two stream numbers, is two draws.
    twice = torch.tensor([4, 4])
    assert sample(twice).token_ids.unique().numel() == 1


def test_tied_logits_share_their_mass(backend):
    """Equal logits must not put their whole mass on the lowest index."""
    row = torch.full((8,), 2.0)
    counts = draw(backend, row[None]).bincount(minlength=8)
    chi_square(counts, torch.ones(8))
    # top_p 0.5 keeps the first four of eight equals.
    counts = draw(backend, row[None], top_p=0.5).bincount(minlength=8)
    assert counts[4:].sum() == 0
    chi_square(counts[:4], torch.ones(4))

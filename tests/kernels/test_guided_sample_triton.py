"""The Triton sampler in the interpreter: token, status, kept count and mass of the reference, bit
for bit, for every kind of row and every way of splitting it.
"""

from __future__ import annotations

import pytest
import torch
from sampler_cases import KINDS, Case, assert_same, random_case, reference_sample
from steer_engine.kernels.reference.guided_sample import (
    LOG2_E,
    STATUS_EMPTY,
    Sampled,
    exp2_mass,
    guided_sample,
    multiply_high,
    prepare_parameters,
)
from steer_engine.kernels.reference.philox import random_bits
from triton_interpreter import interpreted

triton_sampler = pytest.importorskip("steer_engine.kernels.guided_sample", exc_type=ImportError)
LaunchConfig, Scratch = triton_sampler.LaunchConfig, triton_sampler.Scratch

FULL = 65024  # Falcon's vocabulary


def whole_rows(vocab_size: int, num_rounds: int = 2) -> LaunchConfig:
    """One program and one block per row: the interpreter takes its time per operation."""
    block_size = max(16, 1 << (vocab_size - 1).bit_length())
    return LaunchConfig(1, num_rounds, block_size, block_size, block_size, block_size)


def sample(case: Case, config: LaunchConfig) -> list[torch.Tensor]:
    """Token, logprob, status, kept count and mass, from buffers full of what no row may return."""
    _, num_seqs, vocab_size = case.logits.shape
    sampled = Sampled(
        torch.full((num_seqs,), -7),
        torch.full((num_seqs,), -7.0),
        torch.full((num_seqs,), -7, dtype=torch.int32),
    )
    scratch = Scratch.allocate(num_seqs, vocab_size, "cpu", config)
    for tensor in scratch:
        tensor.fill_(-7)
    triton_sampler.launch_guided_sample(
        case.logits,
        case.weights.contiguous(),
        prepare_parameters(**case.settings, vocab_size=vocab_size),
        torch.tensor([case.seed - (1 << 64 if case.seed >> 63 else 0)]),
        case.stream_ids,
        case.steps,
        sampled,
        scratch,
        config,
    )
    return [*sampled, scratch.num_kept, scratch.total_mass]


def check(case: Case, config: LaunchConfig | None, name: str, expected=None, got=None) -> None:
    """Compare the kernels at this config, or what another backend got, with the reference."""
    expected = expected or reference_sample(case)
    results = got or sample(case, config)
    one_ulp = expected[1].abs() * 2.0**-23
    assert_same(case, results, expected, f"{name}, {config}", one_ulp)


@pytest.mark.parametrize("kind", KINDS)
@interpreted
def test_every_kind_of_row_equals_the_reference_bit_for_bit(kind):
    g = torch.Generator().manual_seed(KINDS.index(kind))
    for vocab_size, num_seqs in ((1, 4), (2, 8), (50, 20), (1000, 24), (1024, 8)):
        case = random_case(kind, num_seqs, vocab_size, g)
        check(case, whole_rows(vocab_size), f"{kind}, vocab_size {vocab_size}")


@pytest.mark.parametrize("kind", ["plain", "flat", "peaked", "bf16", "all_equal", "wide"])
@interpreted
def test_rows_of_the_models_vocabulary_equal_the_reference(kind):
    g = torch.Generator().manual_seed(100 + KINDS.index(kind))
    check(random_case(kind, 3, FULL, g), whole_rows(FULL), kind)


@pytest.mark.parametrize("num_passes", [1, 2])
@interpreted
def test_one_and_two_passes_equal_the_reference(num_passes):
    g = torch.Generator().manual_seed(num_passes)
    for kind in ("plain", "nan", "bf16"):
        check(random_case(kind, 6, 300, g, num_passes), whole_rows(300), f"{kind} {num_passes}")


@interpreted
def test_every_split_block_size_and_number_of_rounds_gives_the_same_bits():
    g = torch.Generator().manual_seed(5)
    case = random_case("tied", 4, 1000, g)
    case.settings["temperature"][:] = torch.tensor([0.7, 1.0, 1.7, 0.0])
    case.settings["top_k"][:2] = torch.tensor([40, 300])
    expected = reference_sample(case)
    for num_splits in (1, 2, 3, 7, 8):
        check(case, LaunchConfig(num_splits, 2, 256, 128, 256, 128), "split", expected)
    few = case.rows(slice(0, 2))
    check(few, LaunchConfig(40, 2, 128, 256, 256, 128), "more splits than blocks")
    check(case, LaunchConfig(1, 1, 1024, 1024, 64, 512), "one round", expected)
    check(case, LaunchConfig(2, 3, 512, 256, 1024, 64), "three rounds", expected)


@interpreted
def test_the_launchers_own_sizes_give_the_same_bits_for_a_row_of_the_models_vocabulary():
    """33 sequences take 8 splits on a GPU; one of them stands for all here."""
    g = torch.Generator().manual_seed(6)
    case = random_case("plain", 1, FULL, g)
    case.settings["temperature"][:] = 1.0
    case.settings["top_p"][:] = 0.9
    case.settings["top_k"][:] = 0
    config = LaunchConfig.for_batch(33, FULL)
    assert config.num_splits == 8
    check(case, config._replace(block_size=8192, ladder_block_size=8192), "for_batch")


@interpreted
def test_a_sequence_does_not_depend_on_its_slot_or_its_neighbours():
    g = torch.Generator().manual_seed(7)
    kinds = ["plain", "nan", "all_nan", "plus_inf", "tied", "all_equal"]
    cases = [random_case(kind, 2, 500, g) for kind in kinds]
    case = Case(
        torch.cat([c.logits.float() for c in cases], dim=1),
        torch.cat([c.weights for c in cases], dim=1),
        {name: torch.cat([c.settings[name] for c in cases]) for name in cases[0].settings},
        cases[0].seed,
        torch.cat([c.stream_ids for c in cases]),
        torch.cat([c.steps for c in cases]),
    )
    together = sample(case, whole_rows(500))
    permutation = torch.randperm(12, generator=g)
    permuted = sample(case.rows(permutation), whole_rows(500))
    alone = [sample(case.rows([row]), whole_rows(500)) for row in range(12)]
    for i, output in enumerate(together):
        assert torch.equal(output[permutation], permuted[i])
        assert torch.equal(output, torch.cat([outputs[i] for outputs in alone]))


@interpreted
def test_logits_may_have_any_stride_of_passes_and_sequences():
    g = torch.Generator().manual_seed(8)
    case = random_case("plain", 4, 200, g)
    stored = torch.full((4, 3, 250), torch.nan)  # [num_seqs, num_passes, ...]
    stored[:, :, 50:] = case.logits.transpose(0, 1)
    strided = case._replace(logits=stored[:, :, 50:].transpose(0, 1))
    assert not strided.logits.is_contiguous()
    check(strided, whole_rows(200), "strided")


@interpreted
def test_the_op_itself_checks_allocates_and_returns_what_the_reference_returns():
    g = torch.Generator().manual_seed(9)
    case = random_case("peaked", 4, 50, g)
    draw = {"seed": case.seed, "stream_ids": case.stream_ids, "steps": case.steps}
    got = triton_sampler.guided_sample(case.logits, case.weights, **case.settings, **draw)
    expected = guided_sample(case.logits, case.weights, **case.settings, **draw)
    assert torch.equal(got.token_ids, expected.token_ids), (got, expected)
    assert torch.equal(got.status, expected.status), (got, expected)

    empty = case.rows(slice(0, 0))
    draw = {"seed": 0, "stream_ids": empty.stream_ids, "steps": empty.steps}
    sampled = triton_sampler.guided_sample(empty.logits, empty.weights, **empty.settings, **draw)
    assert all(output.shape == (0,) for output in sampled)
    with pytest.raises(ValueError, match="weights must be"):
        triton_sampler.guided_sample(case.logits, empty.weights, **case.settings, **draw)


@interpreted
def test_a_row_with_nothing_left_falls_back_to_the_first_highest_finite_domain_logit():
    case = random_case("plain", 1, 600, torch.Generator().manual_seed(10), num_passes=2)
    case.weights[:] = torch.tensor([[1.0], [1.0]])
    case.logits[1] = torch.nan
    case.logits[0, 0, [3, 100, 590]] = torch.tensor([torch.inf, 50.0, 50.0])
    token_ids, _, status, num_kept, _ = sample(case, LaunchConfig(2, 2, 64, 64, 64, 64))
    assert token_ids.tolist() == [100] and num_kept.tolist() == [0]
    assert status.item() & STATUS_EMPTY


def logits_of_mass(mass: int) -> torch.Tensor:
    """A logit whose token has exactly this mass beside one of logit 0 and mass 2**40; or none."""
    logit = torch.tensor(mass / 2**40, dtype=torch.float64).log().float()
    near = (logit.view(torch.int32) + torch.arange(-500, 500, dtype=torch.int32)).view(
        torch.float32
    )
    return near[exp2_mass(near * LOG2_E) == mass]


def plain_case(logits: torch.Tensor, *, top_p=1.0, seed=11, step=0) -> Case:
    """One pass, one row."""
    settings = {"temperature": 1.0, "top_p": top_p, "alpha": 0.0}
    settings = {name: torch.tensor([value]) for name, value in settings.items()}
    settings["top_k"] = torch.tensor([0], dtype=torch.int32)
    stream_ids, steps = torch.tensor([0]), torch.tensor([step], dtype=torch.int32)
    return Case(logits[None, None], torch.ones(1, 1), settings, seed, stream_ids, steps)


@interpreted
def test_the_mass_target_is_rounded_up_to_the_last_unit():
    """Z * P / 2**32 is 2**40 + 0.996 here: the first token alone falls short by that fraction."""
    logits = torch.stack([torch.tensor(0.0), logits_of_mass(2**16 + 1)[0]])
    case = plain_case(logits, top_p=1 - 2.0**-24)
    assert reference_sample(case)[3].item() == 2
    check(case, whole_rows(2), "target")


@interpreted
def test_a_draw_equal_to_a_running_mass_takes_the_next_token():
    steps = torch.arange(2**19)
    high, low = random_bits(11, steps * 0, steps, 0)
    draws = multiply_high(high, low, torch.full_like(steps, 2**40))
    for step in (draws < 2**19).nonzero()[:, 0].tolist():
        logits = logits_of_mass(int(draws[step]))
        if len(logits):
            break
    case = plain_case(torch.stack([logits[0], torch.tensor(0.0)]), step=step)
    total_mass = torch.tensor(2**40 + int(draws[step]))
    assert multiply_high(high[step], low[step], total_mass) == draws[step]
    assert reference_sample(case)[0].item() == 1
    check(case, whole_rows(2), "draw")


@interpreted
def test_draws_follow_the_masses():
    """Chi-square over 160 draws of a row with five tokens (4 degrees of freedom, p = 1e-4)."""
    probs = torch.tensor([0.4, 0.05, 0.3, 0.05, 0.2])
    num_draws = 160
    case = Case(
        probs.log().expand(1, num_draws, 5),
        torch.ones(1, num_draws),
        {
            "temperature": torch.ones(num_draws),
            "top_p": torch.ones(num_draws),
            "top_k": torch.zeros(num_draws, dtype=torch.int32),
            "alpha": torch.zeros(num_draws),
        },
        11,
        torch.zeros(num_draws, dtype=torch.int64),
        torch.arange(num_draws, dtype=torch.int32),
    )
    counts = torch.bincount(sample(case, whole_rows(5, num_rounds=1))[0], minlength=5)
    statistic = ((counts - num_draws * probs) ** 2 / (num_draws * probs)).sum().item()
    assert statistic < 23.5, f"counts {counts.tolist()}, statistic {statistic:.1f}"

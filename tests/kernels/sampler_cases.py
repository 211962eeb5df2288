"""Rows of logits and settings for tests of the sampler: the named kinds, and every special case."""

from __future__ import annotations

from typing import NamedTuple

import torch
from steer_engine.kernels.reference.guided_sample import (
    guided_sample,
    nucleus,
    prepare_parameters,
)

OUTPUTS = ("token_ids", "logprobs", "status", "num_kept", "total_mass")


def random_logits(kind: str, num_passes: int, num_seqs: int, vocab_size: int, g) -> torch.Tensor:
    """The named generators of logits: [num_passes, num_seqs, vocab_size]."""
    shape = (num_passes, num_seqs, vocab_size)
    logits = torch.randn(shape, generator=g)
    first = torch.randint(vocab_size, (num_passes, num_seqs, 1), generator=g)
    everywhere = torch.rand(shape, generator=g)
    match kind:
        case "flat":
            return logits * 0.01
        case "plain":
            return logits * 2.5
        case "peaked":
            return logits * 2.5 + 12 * torch.rand(shape, generator=g) ** 40
        case "tied":
            return torch.round(logits * 2)
        case "bf16_rounded":
            return (logits * 4).to(torch.bfloat16).float()
        case "bf16":
            return (logits * 4).to(torch.bfloat16)
        case "one_hot":
            return torch.full(shape, -20.0).scatter(2, first, 30.0)
        case "all_equal":
            return torch.full(shape, 1.5)
        case "tiny":
            return logits * 1e-44  # denormal; products underflow to zeros of either sign
        case "huge":
            return logits * 1e38
        case "minus_inf":
            return torch.where(everywhere < 0.3, -torch.inf, logits)
        case "all_minus_inf":
            return torch.full(shape, -torch.inf)
        case "plus_inf":
            return torch.where(everywhere < 2 / vocab_size, torch.inf, logits)
        case "nan":
            return torch.where(everywhere < 0.1, torch.nan, logits)
        case "all_nan":
            return torch.full(shape, torch.nan)
        case "wide":  # as many tokens of mass 0 or 1 as of any other
            return -50 * everywhere
    raise AssertionError(kind)


# fmt: off
KINDS = [
    "flat", "plain", "peaked", "tied", "bf16_rounded", "bf16", "one_hot", "all_equal", "tiny",
    "huge", "minus_inf", "all_minus_inf", "plus_inf", "nan", "all_nan", "wide",
]
# fmt: on
WEIGHTS = torch.tensor(
    [[1, 0, 0], [1.2, -0.2, 0.8], [1.2, -0.2, -0.2], [1.5, -0.5, 0], [0, 0, 1], [0, 0, 0]]
)


def random_settings(num_seqs: int, g) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weights [3, num_seqs] and settings, each drawn from a list that holds the special cases."""

    def choose(values) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (num_seqs,), generator=g)]

    weights = WEIGHTS[torch.randint(len(WEIGHTS), (num_seqs,), generator=g)].T.contiguous()
    return weights, {
        "temperature": choose([0.0, 0.3, 0.7, 1.0, 1.0, 1.7, 50.0]),
        "top_p": choose([1e-10, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0, 1.0]),
        "top_k": choose([0, 0, 0, 0, 1, 2, 40, 1000, 70000]).int(),
        "alpha": choose([0.0, 0.0, 0.0, 1e-3, 0.1, 1.0]),
    }


class Case(NamedTuple):
    """Arguments of one call of the sampler."""

    logits: torch.Tensor
    weights: torch.Tensor
    settings: dict[str, torch.Tensor]
    seed: int
    stream_ids: torch.Tensor
    steps: torch.Tensor

    def rows(self, rows) -> Case:
        settings = {name: value[rows] for name, value in self.settings.items()}
        weights, logits = self.weights[:, rows], self.logits[:, rows]
        return Case(logits, weights, settings, self.seed, self.stream_ids[rows], self.steps[rows])


def random_case(kind: str, num_seqs: int, vocab_size: int, g, num_passes: int = 3) -> Case:
    logits = random_logits(kind, num_passes, num_seqs, vocab_size, g)
    weights, settings = random_settings(num_seqs, g)
    weights = weights[:num_passes]
    if kind in ("plain", "bf16"):
        # A pass of weight 0 was not run; its buffer may hold anything. (The domain pass is read
        # all the same: alpha and the fallback need it.)
        logits[1:] = torch.where(weights[1:, :, None] == 0, torch.nan, logits[1:])
    stream_ids = torch.randint(-(2**62), 2**62, (num_seqs,), generator=g)
    steps = torch.randint(2**31 - 1, (num_seqs,), generator=g).int()
    return Case(logits, weights, settings, 2**64 - 2**40 - 5, stream_ids, steps)


def reference_sample(case: Case) -> list[torch.Tensor]:
    """What OUTPUTS names, by the definition."""
    draw = {"seed": case.seed, "stream_ids": case.stream_ids, "steps": case.steps}
    sampled = guided_sample(case.logits, case.weights, **case.settings, **draw)
    parameters = prepare_parameters(**case.settings, vocab_size=case.logits.shape[2])
    kept = nucleus(case.logits, case.weights, parameters)
    return [*sampled, kept.num_kept, kept.total_mass]


def assert_same(case: Case, results, expected, how: str, logprob_tolerance) -> None:
    """All OUTPUTS bit for bit, but for logprobs: the logarithm of a quotient in fp64, rounded to
    fp32, where libraries differ in the last bit of either.

    logprob_tolerance: absolute, a number or one per row.
    """
    for output, got, wanted in zip(OUTPUTS, results, expected, strict=True):
        tolerance = logprob_tolerance if output == "logprobs" else 0
        is_wrong = ~((got - wanted).abs() <= tolerance)
        if is_wrong.any():
            row = int(is_wrong.nonzero()[0])
            setting = {key: value[row].item() for key, value in case.settings.items()}
            raise AssertionError(
                f"{output} of {int(is_wrong.sum())} of {len(got)} rows, {how}, row {row}: "
                f"got {got[row]}, expected {wanted[row]}, logits {list(case.logits.shape)}, "
                f"weights {case.weights[:, row].tolist()}, {setting}"
            )

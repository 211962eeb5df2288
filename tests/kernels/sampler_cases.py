"""Rows of logits and settings for tests of the sampler: the named kinds, and every special case."""

from __future__ import annotations

import torch


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

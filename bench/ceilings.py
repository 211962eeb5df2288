"""The machine's ceilings, measured where the bench runs, and the floor they set for generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steer_engine.checkpoint import expected_shapes, iterate_linears, linear_shape
from steer_engine.config import FalconConfig
from steer_engine.guidance import PassKind

NUM_RUNS = 5
MATRIX_SIZE = 1536


@dataclass(frozen=True)
class Ceilings:
    """What this process can reach now; on a busy machine, what is left of it.

    read_gb_s: reading the weights' bytes again and again, so out of a cache they fit in.
    matrix_gflop_s: the best dtype's matrix product.
    """

    read_gb_s: float
    matrix_gflop_s: float


def measure_ceilings(num_bytes: int, clock) -> Ceilings:
    """clock: the bench's own, so that floor and times compare.

    num_bytes: size of the weights that a step reads.
    """
    block = torch.ones(max(num_bytes // 4, 1 << 16), dtype=torch.float32)
    # No single reduction of PyTorch reads as fast as memory allows on every machine.
    reductions = (block.sum, block.amax, lambda: block.dot(block))
    read_s = min(_fastest(one, clock, num_bytes=block.nbytes) for one in reductions)
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(dtype)
        # A dtype without instructions would take seconds per product: a small one tells.
        small = a[:256, :256].contiguous()
        small_s = _fastest(lambda m=small: m @ m, clock, num_bytes=1 << 30)
        if 2 * 256**3 / small_s > 0.5 * max(rates, default=0.0):
            rates.append(2 * MATRIX_SIZE**3 / _fastest(lambda m=a: m @ m, clock, 1 << 30))
    return Ceilings(block.nbytes / read_s / 1e9, max(rates) / 1e9)


def _fastest(function, clock, num_bytes: int) -> float:
    """Best of some runs; short ones are repeated so that the clock's ticks do not count."""
    repeats = max(1, (1 << 28) // num_bytes)
    function()
    best = float("inf")
    for _ in range(NUM_RUNS):
        started_at = clock()
        for _ in range(repeats):
            function()
        best = min(best, (clock() - started_at) / repeats)
    return best


@dataclass(frozen=True)
class Work:
    """Sizes that decide a floor. weights count parameters, the tied head among them."""

    body_weights: int
    head_weights: int
    kv_values_per_token: int
    bytes_per_weight: int

    @classmethod
    def of(cls, values: dict, bytes_per_weight: int) -> Work:
        config = FalconConfig.from_dict(values)
        body = sum(
            linear_shape(kind, config)[0] * linear_shape(kind, config)[1]
            for _, kind in iterate_linears(config)
        )
        head = expected_shapes(config)["lm_head.weight"]
        kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return cls(body, head[0] * head[1], kv, bytes_per_weight)

    @property
    def weight_bytes(self) -> int:
        return self.bytes_per_weight * (self.body_weights + self.head_weights)


def floor_s(
    work: Work,
    ceilings: Ceilings,
    mode: str,
    batch: int,
    lengths: tuple[int, int],
    num_new: int,
    share: bool = False,
) -> tuple[float, float]:
    """Seconds that (prefill, all decode steps) take at least.

    A weight set costs its bytes or its products, whichever is more; every pass reads its K and V.
    Bytes are the checkpoint's, in the dtype: an engine that stores weights in less can be faster.
    lengths: tokens of a prompt, and of a negative prompt.
    share: all negative prompts begin with one text, which is prefilled once.
    """
    prompt_len, negative_len = lengths
    pass_lens = {PassKind.DOMAIN: prompt_len}
    if mode != "plain":
        pass_lens |= {PassKind.BASE: prompt_len, PassKind.NEGATIVE: negative_len}
    # A LoRA domain model shares the base's weights: one set for all passes.
    if mode == "steer_full":
        sets = [(PassKind.DOMAIN, PassKind.NEGATIVE), (PassKind.BASE,)]
    else:
        sets = [tuple(pass_lens)]
    flops, read = 1e9 * ceilings.matrix_gflop_s, 1e9 * ceilings.read_gb_s
    num_prefilled = {kind: batch * (length - 1) for kind, length in pass_lens.items()}
    if share and PassKind.NEGATIVE in num_prefilled:
        num_prefilled[PassKind.NEGATIVE] -= (batch - 1) * (negative_len - prompt_len)
    prefill = sum(
        2 * work.body_weights * sum(num_prefilled[k] for k in kinds) / flops for kinds in sets
    )
    weights = work.body_weights + work.head_weights
    step = sum(
        max(work.weight_bytes / read, 2 * weights * batch * len(kinds) / flops) for kinds in sets
    )
    kv_tokens = sum(length + num_new / 2 for length in pass_lens.values())
    step += work.bytes_per_weight * work.kv_values_per_token * batch * kv_tokens / read
    return prefill, num_new * step

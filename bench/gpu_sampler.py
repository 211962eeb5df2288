"""Checks of guided_sample on any device: bits, splits, slots, CUDA graphs, frequencies.

Every function takes a backend and a device and raises AssertionError; what it returns says what was
covered. The truth is the reference on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from gpu_report import NotThereError
from sampler_cases import KINDS, random_logits, random_settings
from steer_engine.kernels.reference.guided_sample import (
    Sampled,
    SamplingTensors,
    combine,
    draw,
    nucleus,
    prepare_parameters,
    signed_seed,
)

from steer_engine import ops

OUTPUTS = ("token_ids", "logprobs", "status", "num_kept", "total_mass")
CLUSTER_SIZES = (0, 4, 8, 16)  # 0: one block per row
SPLITS = (1, 2, 3, 7, 32)
SEED = 2**64 - 2**40 - 5


class Case(NamedTuple):
    """Rows and their settings, and the random numbers' keys."""

    logits: torch.Tensor
    weights: torch.Tensor
    parameters: SamplingTensors
    stream_ids: torch.Tensor
    steps: torch.Tensor
    seed: int = SEED

    def rows(self, rows) -> Case:
        parameters = SamplingTensors(*(p[rows] for p in self.parameters))
        weights, logits = self.weights[:, rows], self.logits[:, rows]
        return Case(logits, weights, parameters, self.stream_ids[rows], self.steps[rows], self.seed)

    def to(self, device: torch.device) -> Case:
        parameters = SamplingTensors(*(p.to(device) for p in self.parameters))
        rest = (t.to(device) for t in (self.stream_ids, self.steps))
        return Case(self.logits.to(device), self.weights.to(device), parameters, *rest, self.seed)


def mixed_case(num_seqs: int, vocab_size: int, dtype=torch.float32, num_passes: int = 3) -> Case:
    """Rows of every kind of sampler_cases.py, shuffled, with every special setting."""
    g = torch.Generator().manual_seed(vocab_size + num_passes)
    per_kind = -(-num_seqs // len(KINDS))
    parts = [random_logits(kind, num_passes, per_kind, vocab_size, g) for kind in KINDS]
    logits = torch.cat([part.to(dtype) for part in parts], dim=1)
    logits = logits[:, torch.randperm(logits.shape[1], generator=g)[:num_seqs]].contiguous()
    weights, settings = random_settings(num_seqs, g)
    return Case(
        logits,
        weights[:num_passes].contiguous(),
        prepare_parameters(**settings, vocab_size=vocab_size),
        torch.randint(-(2**62), 2**62, (num_seqs,), generator=g),
        torch.randint(2**30, (num_seqs,), generator=g).int(),
    )


def plain_case(logits: torch.Tensor, num_seqs: int, top_p: float = 1.0) -> Case:
    """One row of logits [num_passes, vocab_size] for all sequences, not copied."""
    num_passes, vocab_size = logits.shape
    off = torch.zeros(num_seqs)
    settings = prepare_parameters(off + 1, off + top_p, off.int(), off, vocab_size)
    weights = torch.ones(num_passes, num_seqs)
    streams = torch.arange(num_seqs)
    return Case(
        logits[:, None].expand(-1, num_seqs, -1), weights, settings, streams, streams.int() * 0
    )


def expect(case: Case) -> list[torch.Tensor]:
    """All five outputs by the reference, where the case lies."""
    keys = {"seed": case.seed, "stream_ids": case.stream_ids, "steps": case.steps}
    sampled = draw(case.logits, case.weights, case.parameters, **keys)
    kept = nucleus(case.logits, case.weights, case.parameters)
    return [*sampled, kept.num_kept, kept.total_mass]


class Prepared(NamedTuple):
    """One call, ready to be launched or captured; seed and steps may be changed in place."""

    launch: Callable[[], None]
    outputs: list[torch.Tensor]
    seed: torch.Tensor
    steps: torch.Tensor

    def poison(self) -> None:
        for output in self.outputs:
            output.fill_(-7)


def variants(backend: str, num_seqs: int, vocab_size: int) -> list[int | None]:
    """The ways in which a backend can split a row: splits, cluster sizes, or the one way."""
    if backend == "triton":
        from steer_engine.kernels.guided_sample import LaunchConfig

        return sorted({*SPLITS, LaunchConfig.for_batch(num_seqs, vocab_size).num_splits})
    if backend == "cuda":
        chosen = torch.ops.steer_engine.guided_sample_cluster_size(num_seqs, vocab_size)
        return list(CLUSTER_SIZES) if chosen else [0]
    return [None]


def prepare(backend: str, case: Case, variant: int | None = None) -> Prepared:
    """variant: of variants(); None: the backend's own choice."""
    _, num_seqs, vocab_size = case.logits.shape
    device = case.logits.device
    weights, stream_ids = case.weights.contiguous(), case.stream_ids.contiguous()
    parameters = SamplingTensors(*(p.contiguous() for p in case.parameters))
    steps = case.steps.clone()
    seed = torch.tensor([signed_seed(case.seed)], device=device)
    sampled = Sampled.empty(num_seqs, device)
    given = (case.logits, weights, parameters, seed, stream_ids, steps, sampled)
    if backend == "triton":
        from steer_engine.kernels import guided_sample as triton_sampler

        config = triton_sampler.LaunchConfig.for_batch(num_seqs, vocab_size)
        config = config._replace(num_splits=variant or config.num_splits)
        scratch = triton_sampler.Scratch.allocate(num_seqs, vocab_size, device, config)
        return Prepared(
            lambda: triton_sampler.launch_guided_sample(*given, scratch, config),
            [*sampled, scratch.num_kept, scratch.total_mass],
            seed,
            steps,
        )
    if backend == "cuda":
        module = ops.implementation("cuda")
        launch = module.Launch.allocate(num_seqs, vocab_size, device)
        if variant is not None:
            scratch = None if variant else torch.empty(num_seqs, vocab_size, device=device)
            launch = launch._replace(cluster_size=variant, scratch=scratch)
        return Prepared(
            lambda: module.launch_guided_sample(*given, launch),
            [*sampled, launch.num_kept, launch.total_mass],
            seed,
            steps,
        )
    outputs = [*sampled, torch.empty_like(sampled.status), torch.empty_like(sampled.token_ids)]

    def run_reference() -> None:
        keys = {"stream_ids": stream_ids, "steps": steps, "seed": int(seed) % 2**64}
        found = expect(Case(case.logits, weights, parameters, **keys))
        for output, value in zip(outputs, found, strict=True):
            output.copy_(value)

    return Prepared(run_reference, outputs, seed, steps)


def require(backend: str) -> None:
    reason = ops.unavailable_reason(backend)
    if reason is not None:
        raise NotThereError(reason)


def compare(got: list[torch.Tensor], expected: list[torch.Tensor], vocab_size: int, name: str):
    """Everything but the logprobs bit for bit; tokens in range."""
    for output, value, wanted in zip(OUTPUTS, got, expected, strict=True):
        # The logarithm of a quotient in fp64, rounded to fp32: the last bit of either may differ.
        tolerance = wanted.abs() * 2.0**-23 if output == "logprobs" else 0
        is_wrong = ~((value - wanted).abs() <= tolerance)
        if is_wrong.any():
            row = int(is_wrong.nonzero()[0])
            raise AssertionError(
                f"{output} of {int(is_wrong.sum())} of {len(value)} rows, {name}, first row {row}: "
                f"got {value[row].item()}, expected {wanted[row].item()}"
            )
    assert ((got[0] >= 0) & (got[0] < vocab_size)).all(), f"token out of range, {name}"


def check_bitwise(
    backend: str, device: torch.device, case: Case, expected: list, batch_sizes: list[int]
) -> str:
    """Token, status, kept count and mass for every batch size and every way to split a row.

    case, expected: on the CPU, at least as many rows as the largest batch.
    """
    require(backend)
    vocab_size = case.logits.shape[2]
    here, expected = case.to(device), [e.to(device) for e in expected]
    num_rows, refused, tried = 0, {}, set()
    for number, batch_size in enumerate(batch_sizes):
        first = 37 * number % (len(here.steps) - batch_size + 1)
        rows = slice(first, first + batch_size)
        for variant in variants(backend, batch_size, vocab_size):
            prepared = prepare(backend, here.rows(rows), variant)
            prepared.poison()
            try:
                prepared.launch()
            except RuntimeError as error:
                if backend != "cuda" or variant != 16:  # the one size a GPU may refuse
                    raise
                refused[variant] = str(error).splitlines()[0]
                continue
            name = f"{backend}, split {variant}, rows {first} to {first + batch_size - 1}"
            compare(prepared.outputs, [e[rows] for e in expected], vocab_size, name)
            num_rows += batch_size
            tried.add(variant)
    detail = (
        f"{num_rows} rows of {vocab_size}, batches {batch_sizes}, splits {sorted(map(str, tried))}"
    )
    return detail + (f", refused {refused}" if refused else "")


def check_slots(backend: str, device: torch.device, case: Case, expected: list) -> str:
    """Permuted rows and rows alone give the same."""
    require(backend)
    num_seqs, vocab_size = case.logits.shape[1:]
    here = case.to(device)
    permutation = torch.randperm(num_seqs, generator=torch.Generator().manual_seed(1))
    prepared = prepare(backend, here.rows(permutation.to(device)))
    prepared.poison()
    prepared.launch()
    wanted = [e[permutation].to(device) for e in expected]
    compare(prepared.outputs, wanted, vocab_size, f"{backend} permuted")
    for row in range(0, num_seqs, max(1, num_seqs // 8)):
        alone = prepare(backend, here.rows(slice(row, row + 1)))
        alone.launch()
        wanted = [e[row : row + 1].to(device) for e in expected]
        compare(alone.outputs, wanted, vocab_size, f"{backend} row {row} alone")
    return f"{num_seqs} rows permuted, {len(range(0, num_seqs, max(1, num_seqs // 8)))} alone"


def capture(launch: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The launch as a CUDA graph's replay; on the CPU the launch itself."""
    if device.type != "cuda":
        return launch
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()  # compiles, and loads the module
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


def check_graph(backend: str, device: torch.device, vocab_size: int, num_replays: int = 20) -> str:
    """Replays draw other tokens as the steps advance on the device, the same as single calls; a
    second run repeats them; another seed in the same graph gives that seed's tokens.
    """
    require(backend)
    if backend == "reference" and device.type == "cuda":
        raise NotThereError("the reference reads its seed on the host")
    num_seqs = 4
    logits = 0.01 * torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(2))
    case = plain_case(logits, num_seqs).to(device)
    prepared = prepare(backend, case)

    def step() -> None:
        prepared.launch()
        prepared.steps.add_(1)

    replay = capture(step, device)

    def run(seed: int) -> torch.Tensor:
        prepared.steps.zero_()
        prepared.seed.fill_(signed_seed(seed))
        tokens = []
        for _ in range(num_replays):
            replay()
            tokens.append(prepared.outputs[0].clone())
        return torch.stack(tokens)

    def run_singly(seed: int) -> torch.Tensor:
        tokens = []
        for number in range(num_replays):
            single = prepare(backend, case._replace(seed=seed, steps=case.steps + number))
            single.launch()
            tokens.append(single.outputs[0].clone())
        return torch.stack(tokens)

    first = run(SEED)
    least = min(num_replays, vocab_size) // 2
    for row in range(num_seqs):
        num_different = len(first[:, row].unique())
        assert num_different > least, f"{num_replays} replays drew {num_different} tokens"
    assert torch.equal(first, run_singly(SEED)), "replays and single calls draw different tokens"
    assert torch.equal(first, run(SEED)), "two runs draw different tokens"
    other = run(7)
    assert torch.equal(other, run_singly(7)), "a captured graph ignores a new seed"
    assert not torch.equal(first, other), "two seeds draw the same tokens"
    return f"{num_replays} replays of {num_seqs} rows of {vocab_size}"


def check_frequencies(
    backend: str, device: torch.device, logits: torch.Tensor, num_seqs: int, num_steps: int
) -> str:
    """num_seqs * num_steps draws of one row, the counter advancing: chi-square (p > 1e-4, tokens
    expected fewer than 5 times pooled), total variation, and the rarest token's count.
    """
    require(backend)
    case = plain_case(logits[None], num_seqs)
    masses = nucleus(logits[None, None], torch.ones(1, 1), case.rows(slice(0, 1)).parameters).masses
    probs = (masses[0].double() / masses.sum()).to(device)
    prepared = prepare(backend, case.to(device))

    def step() -> None:
        prepared.launch()
        prepared.steps.add_(1)

    replay = capture(step, device) if backend != "reference" else step
    prepared.steps.zero_()
    counts = torch.zeros(len(logits), dtype=torch.int64, device=device)
    for _ in range(num_steps):
        replay()
        counts += torch.bincount(prepared.outputs[0], minlength=len(logits))
    num_draws = num_seqs * num_steps
    assert int(counts.sum()) == num_draws
    expected = probs * num_draws
    is_rare = expected < 5
    groups = torch.where(is_rare, -1, torch.arange(len(logits), device=device))
    got = torch.cat((counts[groups >= 0], counts[is_rare].sum()[None])).double()
    wanted = torch.cat((expected[groups >= 0], expected[is_rare].sum()[None]))
    is_used = wanted > 0
    statistic = ((got - wanted)[is_used] ** 2 / wanted[is_used]).sum().cpu()
    freedom = int(is_used.sum()) - 1
    p = torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), statistic / 2).item()
    variation = (counts / num_draws - probs).abs().sum().item() / 2
    # The mean of |error| is sqrt(2 / pi) of its standard deviation.
    noise = (probs * (1 - probs) * 2 / torch.pi / num_draws).sqrt().sum().item() / 2
    rarest = int(probs.argmin())
    mean = expected[rarest].item()
    detail = (
        f"{num_draws} draws of {len(logits)}: chi-square {statistic:.1f} of {freedom}, p {p:.3g}, "
        f"total variation {variation:.2e} ({noise:.2e} expected), rarest token "
        f"{int(counts[rarest])} times ({mean:.1f} expected)"
    )
    assert p > 1e-4, detail
    assert variation < 1.5 * noise, detail
    assert abs(int(counts[rarest]) - mean) <= 5 * mean**0.5 + 3, detail
    return detail


def small_row() -> torch.Tensor:
    """50 tokens, one of probability 1e-5."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3))
    probs = logits.softmax(dim=0).double()
    probs[17] = 0
    probs = probs / probs.sum() * (1 - 1e-5)
    probs[17] = 1e-5
    return probs.log().float()


def check_equations(backend: str, device: torch.device, vocab_size: int) -> str:
    """Weights (1, 0, 0) are plain sampling; with l_b = l_d and gamma = 1, x is eta*l_d + w_n*l_n;
    alpha = 1 leaves only the ties of the highest domain logit.
    """
    require(backend)
    g = torch.Generator().manual_seed(4)
    logits = torch.round(2 * torch.randn(3, 64, vocab_size, generator=g)) / 2
    logits[1] = logits[0]
    alone = plain_case(logits[:1, 0], 64)._replace(logits=logits[:1])

    def with_weights(*weights: float, **changes) -> Case:
        column = torch.tensor(weights)[:, None].expand(-1, 64).contiguous()
        return alone._replace(logits=logits, weights=column, **changes)

    def tokens(case: Case) -> torch.Tensor:
        prepared = prepare(backend, case.to(device))
        prepared.launch()
        return prepared.outputs[0].cpu()

    assert torch.equal(tokens(with_weights(1, 0, 0)), tokens(alone)), "weights (1, 0, 0)"
    eta = 0.5  # exact in fp32, as are halves of logits: both sides round nowhere
    steered = with_weights(1 + eta, -1, 1 - eta)
    combined = combine(
        logits, torch.tensor([[eta], [0.0], [1 - eta]]).expand(-1, 64), torch.ones(64)
    )
    assert torch.equal(tokens(steered), tokens(alone._replace(logits=combined[None]))), "gamma = 1"
    off = torch.zeros(64)
    only_ties = prepare_parameters(off + 1, off + 1, off.int(), off + 1, vocab_size)
    drawn = tokens(with_weights(1, 0, 0, parameters=only_ties))
    highest = logits[0].max(dim=1).values
    assert (logits[0].gather(1, drawn[:, None])[:, 0] == highest).all(), "alpha = 1"
    return "weights (1, 0, 0), gamma = 1, alpha = 1"

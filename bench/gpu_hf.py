"""A decode step by Hugging Face's transformers on the GPU, and how much faster the engine's is.

    HF generate                     one pass per sequence: `model.generate`, plain sampling
    HF three passes, launches       the loop of hf_baseline.py, domain and negative in one batch
    HF three passes, CUDA graph     the same with a static cache, each forward a replay

A merged adapter is a second model as a full fine-tune is, so one time of three passes stands for
both. Weights and keys are random, prompts of one length, which spares the loop its padding.
torch.compile is not timed: it would compile all layers anew for every model and batch size.

Largest memory, at 256 sequences of 200 tokens in bf16: two models 27.7 GB, and some 10 GB that
`generate` needs to compute its keys, where the loop's are given.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from gpu_report import NotThereError, Report
from gpu_sampler import capture
from gpu_step import BATCH_SIZES, DECODE_STEP, PLAIN, SEQ_LEN, TWO_SETS, floor_us
from gpu_times import Ceilings, quantiles
from hf_baseline import Group, HfBaseline, Variant, two_model_groups

from steer_engine import Guidance
from steer_engine.config import FalconConfig
from steer_engine.guidance import PassKind

TOP_P = 0.9
NUM_WARM_UPS, NUM_STEPS = 3, 16


class Models(NamedTuple):
    """Two models of one shape with random weights, as transformers builds them."""

    config: FalconConfig
    domain: torch.nn.Module
    base: torch.nn.Module

    @classmethod
    def build(cls, values: dict, device: torch.device, dtype: torch.dtype) -> Models:
        """values: a config.json. Raises: NotThereError without transformers."""
        try:
            from transformers import AutoModelForCausalLM
            from transformers import FalconConfig as HfConfig
        except ImportError as error:
            raise NotThereError(f"transformers cannot be imported: {error}") from error
        torch.manual_seed(0)
        settings = {"dtype": dtype, "attn_implementation": "sdpa"}
        with device:
            domain, base = (
                AutoModelForCausalLM.from_config(HfConfig(**values), **settings).eval()
                for _ in range(2)
            )
        return cls(FalconConfig.from_dict(values), domain, base)


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_generate(models: Models, num_seqs: int, seq_len: int) -> list[float]:
    """When each decode step of `generate` begins."""
    model, begun_at = models.base, []
    hook = model.register_forward_pre_hook(lambda *_: begun_at.append(now(model.device)))
    group = Group(model, (PassKind.DOMAIN,))
    baseline = HfBaseline([group], Variant(layout="generate"), Guidance.none())
    prompts = torch.randint(1, models.config.vocab_size, (num_seqs, seq_len)).tolist()
    try:
        # The first forward is the prompts'.
        num_new = NUM_WARM_UPS + NUM_STEPS + 2
        baseline.generate(prompts, None, num_new=num_new, top_p=TOP_P)
    finally:
        hook.remove()
    return begun_at[1:]


def time_loop(models: Models, num_seqs: int, seq_len: int, *, captures: bool) -> list[float]:
    """When each decode step of the three passes begins, and when the last one ends."""
    device = models.base.device
    baseline = HfBaseline(
        two_model_groups(models.domain, models.base, is_stacked=True),
        Variant(layout="stacked"),
        Guidance.recommended(),
        functools.partial(capture, device=device) if captures else None,
    )
    num_steps = NUM_WARM_UPS + NUM_STEPS
    baseline.begin(num_seqs, seq_len, num_steps)
    token_ids = torch.arange(num_seqs, device=device) % models.config.vocab_size
    begun_at = [now(device)]
    for _ in range(num_steps):
        token_ids = baseline.draw(baseline.decode(token_ids), TOP_P, greedy=False)
        begun_at.append(now(device))
    return begun_at


class Version(NamedTuple):
    """One way to write it. sets: of PASSES_OF_SETS, for its floor."""

    sets: str
    is_graph: bool
    time: Callable[[Models, int, int], list[float]]


VERSIONS = {
    "HF generate": Version(PLAIN, False, time_generate),
    "HF three passes, launches": Version(
        TWO_SETS, False, functools.partial(time_loop, captures=False)
    ),
    "HF three passes, CUDA graph": Version(
        TWO_SETS, True, functools.partial(time_loop, captures=True)
    ),
}


def time_version(
    report: Report, models: Models, name: str, num_seqs: int, seq_len: int, ceilings: Ceilings
) -> None:
    version = VERSIONS[name]
    begun_at = version.time(models, num_seqs, seq_len)
    steps_us = [1e6 * (end - begin) for begin, end in itertools.pairwise(begun_at)]
    times = quantiles(steps_us[NUM_WARM_UPS:])
    least = floor_us(models.config, version.sets, num_seqs, seq_len, ceilings)
    report.time(
        {
            "op": DECODE_STEP,
            "implementation": name,
            "size": f"B={num_seqs}, L={seq_len}",
            "median_us": round(times.median, 2),
            "p20_us": round(times.p20, 2),
            "p80_us": round(times.p80, 2),
            "floor_us": round(least, 2),
            "share_of_floor": round(least / times.median, 3),
            "is_graph": version.is_graph,
            "num_seqs": num_seqs,
            "tokens_per_s": round(1e6 * num_seqs / times.median, 1),
            "engine_is_faster": engine_speedups(report, num_seqs, seq_len, times.median),
        }
    )


def engine_speedups(
    report: Report, num_seqs: int, seq_len: int, median_us: float
) -> dict[str, float]:
    """{domain: how many times faster the engine's replayed step of three passes is}, of those that
    this run has timed.
    """
    speedups: dict[str, float] = {}
    for entry in report.content["times"]:
        is_ours = entry["op"] == DECODE_STEP and "domain" in entry and entry["is_graph"]
        if is_ours and (entry["num_seqs"], entry["seq_len"]) == (num_seqs, seq_len):
            # The first of a domain is the step as the engine runs it by default.
            speedups.setdefault(entry["domain"], round(median_us / entry["median_us"], 2))
    return speedups


def time_hf(
    report: Report,
    device: torch.device,
    ceilings: Ceilings,
    values: dict,
    *,
    dtype: torch.dtype = torch.bfloat16,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    seq_len: int = SEQ_LEN,
) -> None:
    """Every version and batch size. values: a config.json."""
    models = Models.build(values, device, dtype)
    for num_seqs in batch_sizes:
        for name in VERSIONS:
            report.check(
                f"{name}, B={num_seqs}",
                time_version, report, models, name, num_seqs, seq_len, ceilings,
            )  # fmt: skip

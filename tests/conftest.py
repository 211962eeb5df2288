"""Fixtures that several files share: tiny checkpoints, engines on them, a decoding loop with every
knob open, and a second process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import helpers
import pytest
import torch

from steer_engine import Engine, Guidance, SamplingParams, ops
from steer_engine.guidance import PassKind

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warning after a fork
# Tiny operations wait longer for a second thread than they run: on two busy cores test_engine.py
# takes four times as long. What must hold for any number of threads sets its own.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
# A shell starts background jobs with SIGINT ignored, and processes pass that on: tests that
# interrupt one would wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class TinyModels(NamedTuple):
    """Directories of two-layer Falcons with 320 tokens and a context of 256."""

    base: Path
    lora: Path
    finetune: Path


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> TinyModels:
    directory = tmp_path_factory.mktemp("tiny_models")
    base = helpers.save(helpers.hf_model(seed=0), directory / "base")
    helpers.lora_model(base).save_pretrained(directory / "lora")
    finetune = helpers.save(helpers.hf_model(seed=1), directory / "finetune")
    return TinyModels(base, directory / "lora", finetune)


@pytest.fixture(params=["cpu", "reference"])
def backend(request) -> str:
    reason = ops.unavailable_reason(request.param)
    if reason:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(scope="session")
def make_engine(tiny_models) -> Callable[..., Engine]:
    """A new engine on the tiny models; loading takes milliseconds."""

    def make(
        *,
        domain: str | None = "lora",
        max_prefill_tokens: int | None = None,
        num_blocks: int | None = None,
        **settings,
    ) -> Engine:
        settings = {"device": "cpu", "dtype": "float32", "max_num_seqs": 8} | settings
        if num_blocks is not None:
            # 2 layers, K and V, 64 tokens of one head of 24 numbers; half a block of slack keeps
            # the rounding out of it.
            itemsize = 4 if settings["dtype"] == "float32" else 2
            settings["kv_cache_gib"] = (num_blocks + 0.5) * 2 * 2 * 64 * 24 * itemsize / 2**30
        directory = None if domain is None else getattr(tiny_models, domain)
        engine = Engine.from_pretrained(tiny_models.base, directory, **settings)
        if max_prefill_tokens is not None:
            engine.config = replace(engine.config, max_prefill_tokens=max_prefill_tokens)
        return engine

    return make


STEERED = Guidance.recommended()
TWELVE_TOKENS = SamplingParams(top_p=0.9, max_tokens=12, ignore_eos=True)


@dataclass(frozen=True)
class Item:
    """One sequence of a decoding loop; what it draws may depend on nothing but these fields."""

    stream_id: int
    prompt: Sequence[int]
    negative: Sequence[int] = (1,)
    guidance: Guidance = STEERED
    sampling: SamplingParams = TWELVE_TOKENS


class Drawn(NamedTuple):
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@pytest.fixture(scope="session")
def make_item() -> type[Item]:
    return Item


@pytest.fixture(scope="session")
def decode() -> Callable[..., dict[int, Drawn]]:
    """Run items through an engine's steps: {stream_id: Drawn}."""

    def run(engine: Engine, items: Sequence[Item], seed: int = 0) -> dict[int, Drawn]:
        for item in items:
            prompts = {
                PassKind.DOMAIN: list(item.prompt),
                PassKind.BASE: list(item.prompt),
                PassKind.NEGATIVE: list(item.negative),
            }
            engine.scheduler.waiting.append(
                engine.make_sequence(
                    item.stream_id, item.stream_id, prompts, item.guidance, item.sampling
                )
            )
        drawn = {}
        try:
            while engine.scheduler.num_queued:
                for s in engine.step(seed):
                    drawn[s.key] = Drawn(s.token_ids, s.logprobs, s.finish_reason)
        finally:
            engine.scheduler.reset()
        return drawn

    return run


@pytest.fixture(scope="session")
def process_context():
    """Start processes that have imported steer_engine already: a real second process in
    milliseconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["steer_engine"])
    return context

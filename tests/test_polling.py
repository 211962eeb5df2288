"""The host looks at the tokens every few steps only: the same texts, and no read in between."""

from __future__ import annotations

import helpers
import pytest
import torch

from steer_engine import Guidance, SamplingParams

PROMPTS = helpers.random_prompts(7, longest=100)
NEGATIVES = helpers.random_prompts(7, seed=1, longest=80)
# One sequence ends by its length in the middle of a window, others by a stop string or a token.
SETTINGS = [
    SamplingParams(top_p=0.9, max_tokens=19, ignore_eos=True),
    SamplingParams(top_p=0.9, max_tokens=40, stop=("e", "in")),
    SamplingParams(top_p=0.9, max_tokens=23, min_tokens=11, stop_token_ids=tuple(range(100, 200))),
    SamplingParams(temperature=0.0, max_tokens=70),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["length", "stop", "min_tokens", "greedy"])
@pytest.mark.parametrize("steps_per_poll", [2, 3, 8, 1000])
def test_texts_do_not_depend_on_when_the_host_looks(make_engine, settings, steps_per_poll):
    arguments = {
        "negative_prompts": NEGATIVES,
        "guidance": Guidance.recommended(),
        "sampling": settings,
        "seed": 5,
    }
    expected = make_engine(max_num_seqs=3).generate(PROMPTS, **arguments)
    engine = make_engine(max_num_seqs=3, steps_per_poll=steps_per_poll)
    assert engine.generate(PROMPTS, **arguments) == expected


def test_sequences_of_different_length_end_where_they_should(make_engine, make_item, decode):
    items = [
        make_item(i, prompt, negative, Guidance.recommended(), SamplingParams(max_tokens=5 + 7 * i))
        for i, (prompt, negative) in enumerate(zip(PROMPTS, NEGATIVES, strict=True))
    ]
    expected = decode(make_engine(), items)
    engine = make_engine(steps_per_poll=16)
    engine.kv_cache.k.fill_(torch.nan)  # a row that runs on behind its slots must not write or read
    assert decode(engine, items) == expected


def test_nothing_is_read_between_two_looks(make_engine, monkeypatch):
    """Reads of device tensors by the host: tolist, item, bool and the like. (On a GPU each is a
    synchronisation; bench/gpu_check.py asks CUDA itself.)
    """
    reads = []

    def count(name):
        original = getattr(torch.Tensor, name)

        def counting(self, *arguments, **named):
            reads.append(name)
            return original(self, *arguments, **named)

        monkeypatch.setattr(torch.Tensor, name, counting)

    engine = make_engine(backend="cpu", steps_per_poll=8, max_num_seqs=4)
    for sequence in engine._sequences(
        PROMPTS[:4],
        NEGATIVES[:4],
        Guidance.recommended(),
        SamplingParams(max_tokens=200, ignore_eos=True),
        seed=0,
    ):
        engine.scheduler.waiting.append(sequence)
    engine.step(seed=0)
    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "nonzero"):
        count(name)
    for _ in range(3):
        engine.step(seed=0)
    engine.scheduler.reset()
    # Three windows of eight steps for four sequences; token, logprob and status are read once each.
    assert reads == ["tolist"] * 9

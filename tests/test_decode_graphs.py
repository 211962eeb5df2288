"""Decode steps on static buffers: the same draws, few captures, and nothing but those buffers.

The capture itself needs a GPU (bench/gpu_check.py). Here a stand-in runs the captured function
again at every replay, on the buffers that a graph would read.
"""

from __future__ import annotations

import helpers
import pytest
import torch

from steer_engine import Guidance, SamplingParams
from steer_engine.decode_graphs import MAX_GRAPHS, DecodeGraphs, padded
from steer_engine.machine import EngineConfig

PROMPTS = helpers.random_prompts(9, longest=90)
NEGATIVES = helpers.random_prompts(9, seed=1, longest=70)
GUIDANCES = [
    Guidance.recommended(),
    Guidance.none(),
    Guidance.contrastive(0.3),
    Guidance.cfg(1.5),
    Guidance(1.2, -0.2, -0.2, alpha=0.1),
    Guidance(0.0, 1.0, 0.0),
]


class Recorder:
    """Stands in for a graph: warms up as the real capture does, then runs the step again."""

    def __init__(self):
        self.num_captures = self.num_replays = 0

    def __call__(self, step):
        self.num_captures += 1
        step()
        step()

        def replay():
            self.num_replays += 1
            return step()

        return replay


def with_graphs(engine) -> tuple[object, Recorder]:
    recorder = Recorder()
    draw_op = engine._sampler._draw
    engine._graphs = DecodeGraphs(
        engine.model, engine.kv_cache, draw_op, engine.config.max_model_len, recorder
    )
    return engine, recorder


@pytest.fixture
def items(make_item):
    """Sequences of every kind of guidance and of many lengths."""
    return [
        make_item(
            i,
            prompt,
            negative,
            GUIDANCES[i % len(GUIDANCES)],
            SamplingParams(top_p=0.9, max_tokens=3 + 5 * i, temperature=0.7 + 0.1 * (i % 3)),
        )
        for i, (prompt, negative) in enumerate(zip(PROMPTS, NEGATIVES, strict=True))
    ]


@pytest.mark.parametrize("domain", ["lora", "finetune"])
@pytest.mark.parametrize("steps_per_poll", [1, 8])
def test_static_buffers_give_the_same_draws(make_engine, decode, items, domain, steps_per_poll):
    settings = {"domain": domain, "max_num_seqs": 5, "steps_per_poll": steps_per_poll}
    expected = decode(make_engine(**settings), items)
    engine, recorder = with_graphs(make_engine(**settings))
    engine.kv_cache.k.fill_(torch.nan)  # padded rows must neither read nor write
    assert decode(engine, items) == expected
    assert recorder.num_replays > 0


def test_running_sets_of_one_shape_share_a_capture(make_engine):
    engine, recorder = with_graphs(make_engine(max_num_seqs=3))
    arguments = {
        "negative_prompts": NEGATIVES,
        "guidance": Guidance.recommended(),
        "sampling": SamplingParams(max_tokens=6, ignore_eos=True),
    }
    engine.generate(PROMPTS, **arguments)
    # Nine sequences of equal length in three places.
    assert (recorder.num_captures, recorder.num_replays) == (1, 18)
    engine.generate(PROMPTS, **arguments)
    assert (recorder.num_captures, recorder.num_replays) == (1, 36)
    engine.generate(PROMPTS, **arguments, seed=1)  # a number in the launch
    assert (recorder.num_captures, recorder.num_replays) == (2, 54)


def test_a_replay_reads_the_buffers_of_its_capture(make_engine, items, decode):
    engine, _ = with_graphs(make_engine(max_num_seqs=4))
    forward, seen = engine.model.forward, {}

    def recording(batch, kv_cache):
        if not batch.is_prefill:
            addresses = tuple(t.data_ptr() for t in batch[:4])
            seen.setdefault(batch.input_ids.shape[0], set()).add(addresses)
        return forward(batch, kv_cache)

    engine.model.forward = recording
    decode(engine, items)
    assert len(seen) > 1
    steps = engine._graphs._steps
    assert sum(map(len, seen.values())) == len(steps)


def test_sequences_that_need_the_host_between_tokens_are_not_replayed(make_engine):
    arguments = {
        "negative_prompts": NEGATIVES,
        "guidance": Guidance.recommended(),
        "sampling": SamplingParams(max_tokens=12, min_tokens=6),
    }
    expected = make_engine().generate(PROMPTS, **arguments)
    engine, recorder = with_graphs(make_engine())
    assert engine.generate(PROMPTS, **arguments) == expected
    assert recorder.num_captures == 0


def test_no_more_than_so_many_graphs_are_kept(make_engine):
    engine, recorder = with_graphs(make_engine())
    sampling = SamplingParams(max_tokens=1)
    for seed in range(MAX_GRAPHS + 3):
        engine.generate([[5]], sampling=sampling, seed=seed)
    assert recorder.num_captures == MAX_GRAPHS + 3
    assert len(engine._graphs._steps) == MAX_GRAPHS


def test_padding_adds_an_eighth_at_most():
    sizes = {padded(count) for count in range(1, 1001)}
    assert padded(0) == 0
    assert all(count <= padded(count) <= count * 9 / 8 for count in range(1, 1001))
    assert len(sizes) == 64


def test_graphs_without_a_gpu_are_refused(make_engine):
    with pytest.raises(ValueError, match="cuda_graphs needs a GPU and backend triton or cuda"):
        make_engine(backend="cpu", cuda_graphs=True)
    assert EngineConfig().cuda_graphs is None

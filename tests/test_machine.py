"""Memory: what is planned, and what is said when it runs out."""

from __future__ import annotations

import pytest
import torch

from steer_engine import Guidance, SamplingParams
from steer_engine.errors import CapacityError

SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


def test_the_memory_plan_counts_weights_and_cache_once(make_engine):
    engine = make_engine(
        backend="reference", domain=None, max_num_seqs=2, max_model_len=128, num_blocks=5
    )
    plan = engine.memory_plan
    config = engine.model_config
    num_weights = config.vocab_size * config.hidden_size  # tied: the head is the embedding
    per_layer = (
        config.qkv_size + config.hidden_size + 2 * config.ffn_hidden_size
    ) * config.hidden_size
    assert plan.weight_bytes == 4 * (num_weights + config.num_layers * per_layer)
    assert plan.cache_bytes == 2 * 4 * config.num_layers * 5 * 64 * config.head_dim
    assert (plan.num_blocks, plan.num_wanted) == (5, 2 * 3 * 2)
    assert plan.describe().endswith(
        "(5 blocks of 64 tokens of 12 that full batches of the longest sequences need)"
    )
    assert make_engine(num_blocks=200).memory_plan.describe().endswith("(200 blocks of 64 tokens)")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_running_out_of_memory_names_the_settings_and_leaves_a_working_engine(make_engine, error):
    engine = make_engine()
    expected = engine.generate(["one", "two"], guidance=Guidance.none(), sampling=SHORT)
    forward = engine.model.forward

    def failing(*arguments):
        raise error

    engine.model.forward = failing
    with pytest.raises(
        CapacityError, match=r"out of memory while running a prompt: .*kv_cache_gib"
    ):
        engine.generate(["one", "two"], guidance=Guidance.none(), sampling=SHORT)
    engine.model.forward = forward
    assert engine.generate(["one", "two"], guidance=Guidance.none(), sampling=SHORT) == expected


def test_other_errors_stay_what_they_are(make_engine):
    engine = make_engine()

    def failing(*arguments):
        raise RuntimeError("something else")

    engine.model.forward = failing
    with pytest.raises(RuntimeError, match="something else"):
        engine.generate(["one"], guidance=Guidance.none(), sampling=SHORT)

"""Weights in int8 from the outside: what the engine computes with them, and what they take."""

from __future__ import annotations

import helpers
import pytest
import torch

from steer_engine import Guidance, SamplingParams, ops
from steer_engine.machine import EngineConfig

PROMPTS = helpers.random_prompts(3, longest=40)


def all_logits(engine) -> torch.Tensor:
    """[2, num_prompts, vocab_size]: the domain's and the base's."""
    return torch.stack([engine.logits(PROMPTS, which) for which in ("domain", "base")])


def pack_dequantized(module):
    """A pack_int8_weight that gives the same weight in the inputs' dtype, fp32 here."""

    def pack(weight, b=None):
        scales = weight.float().abs().amax(dim=1, keepdim=True) / 127
        weight = (weight.float() / scales).round() * scales
        return module.pack_weight(weight if b is None else torch.cat((weight, b), dim=1))

    return pack


@pytest.mark.parametrize("domain", ["lora", "finetune"])
def test_int8_gives_the_logits_of_the_same_weights_in_fp32(
    make_engine, monkeypatch, backend, domain
):
    int8 = all_logits(make_engine(domain=domain, backend=backend, weight_dtype="int8"))
    module = ops.implementation(backend)
    monkeypatch.setattr(module, "pack_int8_weight", pack_dequantized(module))
    expected = all_logits(make_engine(domain=domain, backend=backend, weight_dtype="int8"))
    exact = all_logits(make_engine(domain=domain, backend=backend))
    assert (int8 - expected).abs().max() < 1e-4
    quantization_error = (expected - exact).square().mean().sqrt() / exact.std()
    assert 1e-3 < quantization_error < 0.05


def test_both_backends_draw_the_same_tokens_with_int8_weights(make_engine):
    if reason := ops.unavailable_reason("cpu"):
        pytest.skip(reason)
    drawn = [
        make_engine(backend=backend, weight_dtype="int8").generate(
            PROMPTS,
            negative_prompts=PROMPTS[::-1],
            guidance=Guidance.recommended(),
            sampling=SamplingParams(max_tokens=6, ignore_eos=True),
        )
        for backend in ("cpu", "reference")
    ]
    assert [c.token_ids for c in drawn[0]] == [c.token_ids for c in drawn[1]]


def test_a_tied_head_is_in_int8_and_the_embedding_is_not(make_engine):
    engine = make_engine(domain=None, backend="reference", weight_dtype="int8")
    config, model = engine.model_config, engine.model
    assert model.embedding.data.dtype == torch.float32
    assert model.head.data.dtype == torch.int8
    per_layer = (
        config.qkv_size + config.hidden_size + 2 * config.ffn_hidden_size
    ) * config.hidden_size
    num_outputs = config.qkv_size + config.ffn_hidden_size + config.hidden_size  # two products
    head = config.vocab_size * (config.hidden_size + 4)
    embedding = 4 * config.vocab_size * config.hidden_size
    layers = config.num_layers * (per_layer + 4 * num_outputs)
    assert engine.memory_plan.weight_bytes == embedding + head + layers
    assert engine.describe()["weight_dtype"] == "int8"


def test_weight_dtype_is_checked(make_engine, monkeypatch):
    with pytest.raises(ValueError, match="weight_dtype must be auto or int8, got 'int4'"):
        EngineConfig(weight_dtype="int4")
    with pytest.raises(
        ValueError,
        match="weight_dtype must be int8 or the dtype, float32, got 'bfloat16'; use auto",
    ):
        make_engine(weight_dtype="bfloat16")
    monkeypatch.delattr(ops.implementation("reference"), "pack_int8_weight")
    with pytest.raises(ValueError, match="int8 needs backend cpu or reference, got reference"):
        make_engine(weight_dtype="int8", backend="reference")


def test_auto_is_resolved_to_the_dtype(make_engine):
    config = make_engine().config
    assert config.weight_dtype == config.dtype == "float32"

"""The forward pass in csrc against FalconModel's own: the same ops on the same numbers, so equal
bits, for every architecture and kind of domain model, with one thread and with two.
"""

from __future__ import annotations

import functools

import helpers
import pytest
import torch
from steer_engine.kernels import cpu
from steer_engine.kernels.reference import LinearWeight

from steer_engine import Engine, Guidance, SamplingParams, ops
from steer_engine.cpu_model import CpuFalconModel
from steer_engine.model import FalconModel

if ops.unavailable_reason("cpu"):
    pytest.skip(f"backend cpu: {ops.unavailable_reason('cpu')}", allow_module_level=True)

# More rows than a panel's chunk has lanes, shared prefixes, and all passes.
PROMPTS = helpers.random_prompts(5, longest=80)
NEGATIVES = helpers.random_prompts(5, seed=1, longest=70)
SAMPLING = SamplingParams(top_p=0.9, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module", params=helpers.VARIANTS)
def base(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return helpers.save(helpers.hf_model(**helpers.VARIANTS[request.param]), directory / "base")


def domain_of(base, kind: str):
    if kind == "none":
        return None
    directory = base.parent / kind
    if kind == "finetune" and not directory.exists():
        model = helpers.lora_model(base, modules_to_save=["lm_head"]).merge_and_unload()
        model.save_pretrained(directory)
        helpers.write_tokenizer(directory)
    elif not directory.exists():
        helpers.lora_model(base).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8")],
    ids=["fp32", "bf16", "int8"],
)
@pytest.mark.parametrize("domain", ["none", "lora", "finetune"])
def test_the_compiled_forward_gives_the_bits_of_the_plain_one(base, domain, dtype, weight_dtype):
    engine = Engine.from_pretrained(
        base,
        domain_of(base, domain),
        device="cpu",
        dtype=dtype,
        weight_dtype=weight_dtype,
        max_num_seqs=4,
    )
    guidance = Guidance.cfg(1.5) if domain == "none" else Guidance.recommended()
    assert isinstance(engine.model, CpuFalconModel)

    def run():
        return engine.generate(
            PROMPTS, negative_prompts=NEGATIVES, guidance=guidance, sampling=SAMPLING
        )

    compiled = run()
    torch.set_num_threads(2)
    try:
        with_two_threads = run()
    finally:
        torch.set_num_threads(1)
    for name in ("forward", "compute_logits"):
        method = getattr(FalconModel, name)
        setattr(engine.model, name, functools.partial(method, engine.model))
    assert compiled == with_two_threads
    assert compiled == run()


@pytest.mark.parametrize("domain", ["none", "lora", "finetune"])
def test_compressed_weights_change_no_bit(base, domain, monkeypatch):
    def completions_and_logits():
        engine = Engine.from_pretrained(
            base, domain_of(base, domain), device="cpu", dtype="bfloat16", max_num_seqs=4
        )
        guidance = Guidance.cfg(1.5) if domain == "none" else Guidance.recommended()
        completions = engine.generate(
            PROMPTS, negative_prompts=NEGATIVES, guidance=guidance, sampling=SAMPLING
        )
        return completions, engine.logits(PROMPTS), engine.model

    monkeypatch.setattr(cpu, "COMPRESSING_ISAS", {ops.cpu_isa()})
    monkeypatch.setattr(cpu, "WORTHWHILE", 10.0)  # these models' panels are half padding
    *compressed, model = completions_and_logits()
    weights = [p.weight for p in model._all_products()]
    assert all(isinstance(w, cpu.CompressedWeight) for w in (model.head, model.embedding, *weights))
    monkeypatch.setattr(cpu, "compress_weight", lambda weight, tail: None)
    *plain, model = completions_and_logits()
    assert isinstance(model.head, LinearWeight)
    assert compressed[0] == plain[0]
    assert torch.equal(compressed[1], plain[1])


@pytest.mark.parametrize(
    ("name", "offset"), [("input_ids", 320), ("block_tables", 10_000), ("table_ids", 9)]
)
def test_indices_outside_their_tables_are_refused(make_engine, monkeypatch, name, offset):
    engine = make_engine(backend="cpu")
    forward = engine.model.forward

    def wrong(batch, kv_cache):
        return forward(batch._replace(**{name: getattr(batch, name) + offset}), kv_cache)

    monkeypatch.setattr(engine.model, "forward", wrong)
    with pytest.raises(ValueError, match=rf"{name} must lie in \["):
        engine.generate(["a"])

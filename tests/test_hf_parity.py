"""The engine against transformers and PEFT on tiny random models of every Falcon architecture:
logits, greedy tokens, adapters, fine-tunes, and the combined distribution of every guidance.
"""

from __future__ import annotations

import copy
import math

import helpers
import pytest
import torch

from steer_engine import Engine, Guidance, SamplingParams, ops

# Against fp32 logits of magnitude up to about 10. Both sides sum in fp32 in another order: about
# sqrt(terms) = 10 roundings of 2**-24 relative, through a dozen matrix products, stays below 1e-5;
# the rest is room for peaked attention.
LOGITS_TOLERANCE = 1e-4
# In bf16, in units of the root mean square error that transformers' own bf16 forward makes: the
# weights' rounding is most of it, and the engine's fp32 residual stream must not add more than
# transformers' bf16 one. The largest of 1,280 errors is within six such units.
BF16_RMS_FACTOR, BF16_MAX_FACTOR = 1.0, 6.0
# Probabilities: a logit error of LOGITS_TOLERANCE times the weights' sum of magnitudes (below 3).
PROBS_TOLERANCE = 3 * LOGITS_TOLERANCE

# Around the 64-token page and its double, odd lengths, and 1.
PROMPT_LENGTHS = (1, 2, 7, 16, 31, 63, 64, 65, 66, 90, 127, 128, 129)
NUM_GREEDY_STEPS = 64

BACKENDS = ("reference", "cpu")


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    reason = ops.unavailable_reason(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(scope="module", params=helpers.VARIANTS)
def variant(request, tmp_path_factory):
    """(transformers model, its checkpoint directory) of one architecture."""
    model = helpers.hf_model(**helpers.VARIANTS[request.param])
    return model, helpers.save(model, tmp_path_factory.mktemp(request.param) / "base")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    model = helpers.hf_model(**helpers.VARIANTS["multi_query_7b"])
    return helpers.save(model, tmp_path_factory.mktemp("adapted") / "base")


@pytest.fixture(scope="module")
def base_model(base_dir):
    return load_hf(base_dir)


def load_hf(directory):
    from transformers import FalconForCausalLM

    return FalconForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def load(base, domain=None, **arguments) -> Engine:
    settings = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4} | arguments
    return Engine.from_pretrained(base, domain, **settings)


def prompts_of(lengths, seed=0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 260, (n,), generator=generator).tolist() for n in lengths]


def stacked_hf_logits(model, prompts) -> torch.Tensor:
    return torch.stack([helpers.hf_logits(model, p) for p in prompts])


def assert_logits_equal(got, expected, lengths, tolerance=LOGITS_TOLERANCE) -> None:
    error = (got - expected).abs().amax(dim=1)
    worst = int(error.argmax())
    assert bool((error <= tolerance).all()), (
        f"logits [{len(lengths)}, {got.shape[1]}]: worst prompt has {lengths[worst]} tokens, "
        f"max abs error {error[worst]:.2e}, tolerance {tolerance:.0e}"
    )


@torch.no_grad()
def assert_greedy(model, prompt, token_ids) -> None:
    """token_ids are what greedy decoding of `model` yields: by induction over the steps, each is
    the argmax behind prompt and the tokens before it, which one forward shows for all.
    """
    logits = model(torch.tensor([prompt + token_ids]), use_cache=False).logits[0]
    expected = logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
    assert token_ids == expected, f"prompt of {len(prompt)} tokens"


class TestEveryArchitecture:
    def test_logits_equal_transformers_at_lengths_around_the_page(self, variant, backend):
        model, directory = variant
        prompts = prompts_of(PROMPT_LENGTHS)
        got = load(directory, backend=backend).logits(prompts)
        assert_logits_equal(got, stacked_hf_logits(model, prompts), PROMPT_LENGTHS)

    def test_greedy_tokens_equal_transformers_for_64_steps(self, variant, backend):
        model, directory = variant
        prompts = prompts_of((1, 7, 33, 64, 90), seed=1)
        completions = load(directory, backend=backend).generate(
            prompts,
            guidance=Guidance.none(),
            sampling=SamplingParams(temperature=0, ignore_eos=True, max_tokens=NUM_GREEDY_STEPS),
        )
        for prompt, completion in zip(prompts, completions, strict=True):
            assert len(completion.token_ids) == NUM_GREEDY_STEPS
            assert completion.finish_reason == "length"
            assert_greedy(model, prompt, completion.token_ids)

    def test_every_architecture_takes_an_adapter_on_all_four_modules(
        self, variant, backend, tmp_path
    ):
        _, directory = variant
        adapted = helpers.lora_model(directory)
        adapted.save_pretrained(tmp_path)
        engine = load(directory, tmp_path, backend=backend)
        prompts = prompts_of((1, 30, 65), seed=2)
        assert_logits_equal(
            engine.logits(prompts, "domain"), stacked_hf_logits(adapted, prompts), (1, 30, 65)
        )


def test_prompts_that_share_pages_have_the_logits_of_prompts_alone(base_dir, base_model, backend):
    text = prompts_of([129], seed=3)[0]
    prompts = [text[:n] for n in (129, 128, 65, 64, 100, 129, 70)]
    prompts.append([*text[:64], 7, *text[65:100]])
    got = load(base_dir, backend=backend).logits(prompts)
    assert_logits_equal(got, stacked_hf_logits(base_model, prompts), [len(p) for p in prompts])


def test_a_prompt_almost_as_long_as_the_context_has_logits(base_dir, base_model):
    engine = load(base_dir)
    prompts = prompts_of([engine.config.max_model_len - 1])
    assert_logits_equal(engine.logits(prompts), stacked_hf_logits(base_model, prompts), [255])
    probs = engine.next_token_probs(prompts)
    torch.testing.assert_close(
        probs, stacked_hf_logits(base_model, prompts).softmax(-1), atol=1e-4, rtol=0
    )


def test_bf16_logits_are_no_further_from_fp32_than_those_of_transformers(variant, backend):
    model, directory = variant
    prompts = prompts_of((1, 33, 65, 90), seed=4)
    expected = stacked_hf_logits(model, prompts)
    theirs = stacked_hf_logits(copy.deepcopy(model).bfloat16(), prompts) - expected
    ours = load(directory, backend=backend, dtype="bfloat16").logits(prompts) - expected
    unit = float(theirs.square().mean().sqrt())
    rms, largest = float(ours.square().mean().sqrt()), float(ours.abs().max())
    assert rms <= BF16_RMS_FACTOR * unit, f"rms error {rms:.4f}, transformers' {unit:.4f}"
    assert largest <= BF16_MAX_FACTOR * unit, f"max abs error {largest:.3f}, unit {unit:.4f}"
    assert rms > unit / 10, "a bf16 run that equals fp32 did not run in bf16"


# Adapters -----------------------------------------------------------------------------------------

ADAPTERS = {
    "all_four_modules": {},
    "query_key_value_alone": {"target_modules": ["query_key_value"]},
    "rank_stabilised": {"use_rslora": True, "r": 9, "lora_alpha": 5},
    "rank_and_alpha_patterns": {
        "rank_pattern": {"query_key_value": 2, r"h\.1\.mlp\.dense_h_to_4h": 7},
        "alpha_pattern": {"dense_4h_to_h": 3, r"h\.0\.self_attention\.dense": 20},
    },
    "anchored_pattern": {"alpha_pattern": {"^transformer.h.1.mlp.dense_4h_to_h": 40}},
    "regex_target": {"target_modules": r".*h\.1\..*(query_key_value|dense_4h_to_h)"},
    "all_linear": {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    "rank_one": {"r": 1, "lora_alpha": 1},
}


@pytest.fixture(scope="module", params=ADAPTERS)
def adapter(request, base_dir, tmp_path_factory):
    """(PEFT model, adapter directory)."""
    model = helpers.lora_model(base_dir, **ADAPTERS[request.param])
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


def test_an_adapter_gives_the_logits_that_peft_gives(adapter, base_dir, base_model, backend):
    model, directory = adapter
    engine = load(base_dir, directory, backend=backend)
    lengths = (1, 20, 64, 90)
    prompts = prompts_of(lengths, seed=5)
    expected = stacked_hf_logits(model, prompts)
    base = stacked_hf_logits(base_model, prompts)
    assert float((expected - base).abs().max()) > 100 * LOGITS_TOLERANCE, "the adapter acts"
    assert_logits_equal(engine.logits(prompts, "domain"), expected, lengths)
    assert_logits_equal(engine.logits(prompts, "base"), base, lengths)


def test_greedy_tokens_of_an_adapted_model_equal_peft(base_dir, backend, tmp_path):
    model = helpers.lora_model(base_dir)
    model.save_pretrained(tmp_path)
    prompts = prompts_of((3, 64), seed=6)
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NUM_GREEDY_STEPS)
    completions = load(base_dir, tmp_path, backend=backend).generate(
        prompts, guidance=Guidance.none(), sampling=sampling
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        assert len(completion.token_ids) == NUM_GREEDY_STEPS
        assert_greedy(model, prompt, completion.token_ids)


def test_a_saved_lm_head_replaces_the_domains_head_alone(base_dir, base_model, backend, tmp_path):
    model = helpers.lora_model(
        base_dir, target_modules=["query_key_value"], modules_to_save=["lm_head"]
    )
    with torch.no_grad():
        head = model.base_model.model.lm_head.modules_to_save["default"].weight
        head.add_(0.05 * torch.randn(head.shape, generator=torch.Generator().manual_seed(7)))
    model.save_pretrained(tmp_path)
    engine = load(base_dir, tmp_path, backend=backend)
    lengths = (1, 40, 65)
    prompts = prompts_of(lengths, seed=8)
    expected = stacked_hf_logits(model, prompts)
    assert_logits_equal(engine.logits(prompts, "domain"), expected, lengths)
    assert_logits_equal(
        engine.logits(prompts, "base"), stacked_hf_logits(base_model, prompts), lengths
    )


# A full fine-tune ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tied", "untied_domain_head"])
def finetune(request, tmp_path_factory):
    """(base model, fine-tuned model, base directory, fine-tune directory)."""
    directory = tmp_path_factory.mktemp(request.param)
    base = helpers.hf_model(**helpers.VARIANTS["grouped_40b"])
    domain = helpers.hf_model(
        seed=9,
        **helpers.VARIANTS["grouped_40b"],
        tie_word_embeddings=request.param == "tied",
    )
    helpers.save(base, directory / "base")
    helpers.save(domain, directory / "domain")
    return base, domain, directory / "base", directory / "domain"


def test_a_full_finetune_is_the_domain_and_leaves_the_base_alone(finetune, backend):
    base, domain, base_dir, domain_dir = finetune
    engine = load(base_dir, domain_dir, backend=backend)
    lengths = (1, 33, 65, 90)
    prompts = prompts_of(lengths, seed=10)
    expected_base = stacked_hf_logits(base, prompts)
    assert_logits_equal(
        engine.logits(prompts, "domain"), stacked_hf_logits(domain, prompts), lengths
    )
    assert_logits_equal(engine.logits(prompts, "base"), expected_base, lengths)
    alone = load(base_dir, backend=backend).logits(prompts)
    assert torch.equal(engine.logits(prompts, "base"), alone), "bit for bit"


# Guidance: next_token_probs against separate forwards ---------------------------------------------


def oracle_probs(logits, guidance, sampling) -> torch.Tensor:
    """The final distribution [vocab_size] in fp64 from one prompt's logits of each pass.

    logits: domain, base, negative, each [vocab_size].
    """
    passes = [row.double() for row in logits]
    weights = (guidance.domain, guidance.base, guidance.negative)
    combined = sum(w * row for w, row in zip(weights, passes, strict=True))
    if guidance.alpha > 0:
        cut = passes[0] < passes[0].max() + math.log(guidance.alpha)
        combined = combined.masked_fill(cut, -math.inf)
    combined = combined / sampling.temperature
    order = combined.sort(descending=True, stable=True).indices
    ordered = combined[order]
    if sampling.top_k:
        ordered[sampling.top_k :] = -math.inf
    probs = ordered.softmax(dim=0)
    mass_before = probs.cumsum(dim=0) - probs
    kept = torch.where(mass_before < sampling.top_p, probs, 0.0)
    return torch.zeros_like(kept).scatter_(0, order, kept / kept.sum())


GUIDANCES = {
    "none": Guidance.none(),
    "steer_paper": Guidance.steer(0.3, 0.4),
    "steer_released": Guidance.steer(0.2, 0.2, form="released"),
    "steer_with_alpha": Guidance.steer(0.3, 0.2, form="released", alpha=0.05),
    "contrastive": Guidance.contrastive(0.5),
    "contrastive_with_alpha": Guidance.contrastive(0.5, alpha=0.1),
    "cfg": Guidance.cfg(1.5),
    "cfg_of_the_negative_alone": Guidance.cfg(0.0),
    "base_alone": Guidance(0.0, 1.0, 0.0),
    "normalized": Guidance.steer(0.2, 0.2, form="released").normalized(),
}
SAMPLINGS = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.7),
    "top_k": SamplingParams(top_k=12),
    "top_p": SamplingParams(top_p=0.8),
    "all": SamplingParams(temperature=1.6, top_k=40, top_p=0.85),
}
GUIDED_LENGTHS = ((5, 70), (64, 3), (65, 130), (1, 1), (30, 30))  # (prompt, negative prompt)


@pytest.fixture(scope="module")
def guided(base_dir, base_model, backend, tmp_path_factory):
    """(engine, prompts, negative prompts, separate logits of each pass per prompt)."""
    domain = helpers.lora_model(base_dir)
    directory = tmp_path_factory.mktemp("domain")
    domain.save_pretrained(directory)
    prompts = prompts_of([p for p, _ in GUIDED_LENGTHS], seed=11)
    negatives = prompts_of([n for _, n in GUIDED_LENGTHS], seed=12)
    logits = [
        (
            helpers.hf_logits(domain, prompt),
            helpers.hf_logits(base_model, prompt),
            helpers.hf_logits(domain, negative),
        )
        for prompt, negative in zip(prompts, negatives, strict=True)
    ]
    return load(base_dir, directory, backend=backend), prompts, negatives, logits


def assert_probs_equal(got, expected) -> None:
    """Close everywhere, and zero at the same tokens, except that the engine's integer masses round
    what is below 2**-41 of the largest to zero.
    """
    torch.testing.assert_close(got.double(), expected, atol=PROBS_TOLERANCE, rtol=0)
    largest = expected.amax(dim=1, keepdim=True)
    assert not bool(((got > 0) & (expected == 0)).any()), "a token outside the nucleus has mass"
    assert not bool(((got == 0) & (expected > largest * 2.0**-39)).any()), "a kept token is lost"
    torch.testing.assert_close(got.sum(dim=1), torch.ones(len(got)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_next_token_probs_equal_separate_forwards(guided, guidance, sampling):
    engine, prompts, negatives, logits = guided
    rule, params = GUIDANCES[guidance], SAMPLINGS[sampling]
    got = engine.next_token_probs(
        prompts, negative_prompts=negatives, guidance=rule, sampling=params
    )
    expected = torch.stack([oracle_probs(rows, rule, params) for rows in logits])
    assert_probs_equal(got, expected)


def test_temperature_zero_is_one_hot_at_the_combined_argmax(guided):
    engine, prompts, negatives, logits = guided
    rule = Guidance.steer(0.3, 0.4)
    got = engine.next_token_probs(
        prompts,
        negative_prompts=negatives,
        guidance=rule,
        sampling=SamplingParams(temperature=0, top_p=0.3),
    )
    for row, (domain, base, negative) in zip(got, logits, strict=True):
        combined = rule.domain * domain + rule.base * base + rule.negative * negative
        assert row.nonzero().flatten().tolist() == [int(combined.argmax())]
        assert float(row.max()) == 1.0


def test_greedy_steered_decoding_equals_three_separate_models(guided, base_model, base_dir):
    """32 steps: the drawn token continues the prompt and the negative prompt alike."""
    engine, prompts, negatives, _ = guided
    domain = helpers.lora_model(base_dir)  # the fixture's model: same seed
    rule = Guidance.steer(0.3, 0.4)
    completions = engine.generate(
        prompts,
        negative_prompts=negatives,
        guidance=rule,
        sampling=SamplingParams(temperature=0, max_tokens=32, ignore_eos=True),
    )
    for prompt, negative, completion in zip(prompts, negatives, completions, strict=True):
        drawn = completion.token_ids
        assert len(drawn) == 32
        with torch.no_grad():
            rows = [
                model(torch.tensor([start + drawn]), use_cache=False).logits[0, len(start) - 1 : -1]
                for model, start in (
                    (domain, prompt),
                    (base_model, prompt),
                    (domain, negative),
                )
            ]
        combined = sum(w * row.double() for w, row in zip(rule.weights, rows, strict=True))
        assert drawn == combined.argmax(dim=-1).tolist()


def test_logprobs_are_those_of_the_final_distribution(guided):
    engine, prompts, negatives, _ = guided
    rule, params = Guidance.steer(0.2, 0.2, form="released"), SamplingParams(top_p=0.8)
    [completion] = engine.generate(
        prompts[:1],
        negative_prompts=negatives[:1],
        guidance=rule,
        sampling=SamplingParams(top_p=0.8, max_tokens=6, ignore_eos=True),
    )
    for step, (token_id, logprob) in enumerate(
        zip(completion.token_ids, completion.logprobs, strict=True)
    ):
        before = completion.token_ids[:step]
        [row] = engine.next_token_probs(
            [prompts[0] + before],
            negative_prompts=[negatives[0] + before],
            guidance=rule,
            sampling=params,
        )
        assert logprob == pytest.approx(math.log(row[token_id]), abs=1e-4)

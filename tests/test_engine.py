"""The engine: what a sequence draws depends on its own prompt, settings, seed and stream alone, and
every bad argument has a named error.
"""

from __future__ import annotations

import math
import random

import helpers
import pytest
import torch

from steer_engine import CapacityError, CheckpointError, Engine, EngineConfig, Guidance, ops
from steer_engine import SamplingParams as Sampling
from steer_engine.guidance import PassKind

LENGTH = Sampling(top_p=0.9, max_tokens=12, ignore_eos=True)
STEER = Guidance.steer(0.2, 0.2, form="released")


def items_of(make_item, num_items: int, longest: int = 150, **settings):
    """Prompts from one token to beyond two cache blocks, and negatives of other lengths."""
    prompts = helpers.random_prompts(num_items, seed=1, longest=longest)
    negatives = helpers.random_prompts(num_items, seed=2, longest=longest)[::-1]
    settings = {"sampling": LENGTH} | settings
    return [
        make_item(100 + i, p, n, **settings)
        for i, (p, n) in enumerate(zip(prompts, negatives, strict=True))
    ]


def one_by_one(engine, items, decode, seed: int = 0):
    """Each item alone in an empty engine: the truth for every batch."""
    drawn = {}
    for item in items:
        drawn |= decode(engine, [item], seed)
    return drawn


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("domain", ["lora", "finetune"])
def test_same_seed_gives_same_tokens_in_any_batch(
    make_engine, make_item, decode, backend, domain, dtype
):
    """Tokens and log-probabilities, bit for bit: 1, 2, 7 and 32 side by side, in any order, with
    little and much cache, prefilled in small and large pieces.
    """
    is_small = backend == "reference"
    items = items_of(make_item, 4 if is_small else 14, longest=70 if is_small else 150)
    settings = {"backend": backend, "domain": domain, "dtype": dtype}
    expected = one_by_one(make_engine(max_num_seqs=1, **settings), items, decode)
    assert len({tuple(d.token_ids) for d in expected.values()}) == len(items)
    assert all(len(d.token_ids) == 12 for d in expected.values())

    shuffled = list(items)
    random.Random(0).shuffle(shuffled)
    for max_num_seqs, order, others in [
        (1, items, {}),
        (2, items[::-1], {}),
        (7, shuffled, {}),
        (32, items, {}),
        (32, shuffled, {"max_prefill_tokens": 3}),
        (32, items, {"max_prefill_tokens": 50}),
        (32, shuffled, {"num_blocks": 9}),  # one sequence of the longest needs all 9
        (7, items, {"num_blocks": 14, "max_prefill_tokens": 64}),
    ]:
        engine = make_engine(max_num_seqs=max_num_seqs, **settings, **others)
        assert decode(engine, order) == expected, f"max_num_seqs {max_num_seqs}, {others}"


def test_tokens_do_not_depend_on_the_number_of_threads(make_engine, make_item, decode, backend):
    items = items_of(make_item, 3, longest=70)
    engine = make_engine(backend=backend)
    before = torch.get_num_threads()
    drawn = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            drawn.append(decode(engine, items))
    finally:
        torch.set_num_threads(before)
    assert drawn[0] == drawn[1] == drawn[2]


def test_generate_draws_from_the_stream_of_the_prompts_index(
    make_engine, make_item, decode, backend
):
    engine = make_engine(backend=backend)
    items = [
        make_item(i, item.prompt, item.negative, STEER, LENGTH)
        for i, item in enumerate(items_of(make_item, 4, longest=70))
    ]
    completions = engine.generate(
        [i.prompt for i in items],
        negative_prompts=[i.negative for i in items],
        guidance=STEER,
        sampling=LENGTH,
        seed=3,
    )
    drawn = decode(engine, items[::-1], seed=3)
    for i, completion in enumerate(completions):
        assert completion.token_ids == drawn[i].token_ids
        assert completion.logprobs == drawn[i].logprobs


def test_the_seed_and_the_stream_decide_the_draw(make_engine, make_item, decode):
    engine = make_engine()
    items = [make_item(i, [5, 6, 7], [8]) for i in range(20)]
    first, other = decode(engine, items, seed=0), decode(engine, items, seed=1)
    assert len({tuple(d.token_ids) for d in first.values()}) == 20
    assert all(first[i].token_ids != other[i].token_ids for i in range(20))
    top = decode(engine, items, seed=2**64 - 1)
    assert top == decode(engine, items, seed=2**64 - 1)
    large = make_item(2**62 + 5, [5, 6, 7], [8])
    assert decode(engine, [large])[2**62 + 5].token_ids != first[5].token_ids


def test_sharing_a_prefix_changes_nothing(make_engine, make_item, decode, backend):
    """One negative prompt for all, in one engine and in a fresh engine for each sequence."""
    negative = helpers.random_prompts(2, longest=100)[1]
    items = [make_item(i, [20 + i, 30], negative) for i in range(5)]
    items += [make_item(5 + i, [50] * 66 + [i], [*negative, i + 1]) for i in range(3)]
    if backend == "reference":
        items = items[::2]
    expected = {}
    for item in items:
        expected |= decode(make_engine(backend=backend), [item])
    engine = make_engine(backend=backend, max_num_seqs=3)
    assert decode(engine, items) == expected


def test_a_grid_of_guidances_in_one_batch_equals_separate_runs(
    make_engine, make_item, decode, backend
):
    grid = [
        Guidance.steer(gamma, eta, form=form, alpha=alpha)
        for gamma in (0.0, 0.2)
        for eta in (0.0, 0.4)
        for form, alpha in (("paper", 0.0), ("released", 0.1))
    ] + [Guidance.none(), Guidance.contrastive(0.3), Guidance.cfg(1.5), Guidance(0.0, 1.0, 0.0)]
    samplings = [
        Sampling(temperature=t, top_p=p, top_k=k, max_tokens=6, ignore_eos=True)
        for t, p, k in [(1.0, 0.9, 0), (0.0, 1.0, 0), (0.7, 1.0, 5), (1.5, 0.5, 40)]
    ]
    items = [
        make_item(i, [5, 6, 7], [9, 10, 11, 12], guidance, samplings[i % 4])
        for i, guidance in enumerate(grid)
    ]
    engine = make_engine(backend=backend, max_num_seqs=32)
    together = decode(engine, items)
    assert together == one_by_one(engine, items, decode)
    assert len({tuple(d.token_ids) for d in together.values()}) > len(grid) // 2


def test_backends_draw_the_same_tokens(make_engine, make_item, decode):
    """guided_sample is bitwise the same, so only the logits' rounding can tell backends apart."""
    reason = ops.unavailable_reason("cpu")
    if reason:
        pytest.skip(f"backend cpu: {reason}")
    drawn = [
        decode(make_engine(backend=name), items_of(make_item, 4, longest=70))
        for name in ("cpu", "reference")
    ]
    for key in drawn[0]:
        assert drawn[0][key].token_ids == drawn[1][key].token_ids
        assert drawn[0][key].logprobs == pytest.approx(drawn[1][key].logprobs, abs=1e-3)


def test_logprobs_are_the_log_of_next_token_probs(make_engine, backend):
    engine = make_engine(backend=backend)
    prompts = helpers.random_prompts(3, longest=60)
    negatives = helpers.random_prompts(3, seed=5, longest=60)
    sampling = Sampling(temperature=0.8, top_p=0.8, top_k=50, max_tokens=4, ignore_eos=True)
    guidance = Guidance.steer(0.3, 0.2, alpha=0.01)
    completions = engine.generate(
        prompts, negative_prompts=negatives, guidance=guidance, sampling=sampling
    )
    for step in range(4):
        drawn = [c.token_ids[:step] for c in completions]
        probs = engine.next_token_probs(
            [p + d for p, d in zip(prompts, drawn, strict=True)],
            negative_prompts=[n + d for n, d in zip(negatives, drawn, strict=True)],
            guidance=guidance,
            sampling=sampling,
        )
        assert probs.sum(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
        for row, completion in zip(probs, completions, strict=True):
            # The cache holds K and V of other rows' shapes here, but the logits are bitwise equal.
            prob = row[completion.token_ids[step]].item()
            assert completion.logprobs[step] == pytest.approx(math.log(prob), abs=1e-6)


def test_greedy_takes_the_largest_combined_logit(make_engine, backend):
    engine = make_engine(backend=backend)
    prompts, negatives = helpers.random_prompts(3, longest=60), [[5], [6], [7]]
    domain, base = engine.logits(prompts), engine.logits(prompts, which="base")
    behind = engine.logits(negatives)
    expected = (1.2 * domain - 0.2 * base - 0.2 * behind).argmax(dim=1).tolist()
    completions = engine.generate(
        prompts,
        negative_prompts=negatives,
        guidance=STEER,
        sampling=Sampling(temperature=0.0, max_tokens=1, ignore_eos=True),
    )
    assert [c.token_ids for c in completions] == [[t] for t in expected]
    assert [c.logprobs for c in completions] == [[0.0]] * 3


def test_logits_of_domain_and_base_are_those_of_the_models(make_engine, tiny_models):
    from peft import PeftModel
    from transformers import FalconForCausalLM

    prompts = helpers.random_prompts(4, longest=100)
    base = FalconForCausalLM.from_pretrained(tiny_models.base, dtype=torch.float32).eval()
    expected_base = torch.stack([helpers.hf_logits(base, p) for p in prompts])
    lora = PeftModel.from_pretrained(base, tiny_models.lora).eval()
    expected_domain = torch.stack([helpers.hf_logits(lora, p) for p in prompts])
    engine = make_engine()
    # fp32 sums in another order: a few units in the last of 24 bits of logits of size 10.
    assert torch.allclose(engine.logits(prompts), expected_domain, atol=5e-5, rtol=0)
    assert torch.allclose(engine.logits(prompts, which="base"), expected_base, atol=5e-5, rtol=0)
    assert (expected_base - expected_domain).abs().max() > 0.1


def test_the_number_of_forwarded_tokens_per_example_does_not_grow(make_engine):
    """Counted, not timed: 20 and 200 examples cost the same each, instruction aside."""

    def count(num_examples: int, negatives) -> int:
        engine = make_engine(max_num_seqs=8)
        num_tokens = 0
        forward = engine.model.forward

        def counting(batch, kv_cache):
            nonlocal num_tokens
            num_tokens += batch.input_ids.shape[0]
            return forward(batch, kv_cache)

        engine.model.forward = counting
        real = ["What is the answer here?"] * 10  # of one length, whichever are drawn
        engine.generate_dataset(
            "Ask me a question:", num_examples, real, negatives=negatives, sampling=LENGTH
        )
        return num_tokens

    from steer_engine import NegativePrompts

    instruction = 2 * (len(make_engine().tokenizer.encode("Ask me a question:")) - 1)
    for negatives in (
        NegativePrompts(num_examples=0),
        # Nothing synthetic gets into the pool, so that every negative prompt is equally long.
        NegativePrompts(num_examples=3, lag=1000),
    ):
        few, many = count(20, negatives), count(200, negatives)
        # 12 steps of three passes; equal negative prompts are found in the cache.
        prefilled = few - 20 * 12 * 3
        assert prefilled >= instruction
        assert many == few + 180 * 12 * 3


# --- a sequence that goes wrong


class Poison:
    """Overwrites one sequence's logits at one of its steps."""

    def __init__(self, engine, key: int, step: int, value: float, tokens=slice(None), passes=(0,)):
        compute_logits = engine.model.compute_logits

        @torch.inference_mode()
        def poisoned(*arguments):
            logits = compute_logits(*arguments)
            for index, sequence in enumerate(engine.scheduler.running):
                if sequence.key == key and sequence.step == step:
                    for pass_index in passes:
                        logits[pass_index, index, tokens] = value
            return logits

        engine.model.compute_logits = poisoned


@pytest.mark.parametrize(
    ("value", "tokens", "passes"),
    [
        (math.nan, slice(None), (0,)),
        (math.nan, slice(7, 8), (0,)),
        (math.nan, slice(319, 320), (2,)),
        (math.inf, slice(7, 8), (0,)),
        (-math.inf, slice(None), (0,)),
        (math.inf, slice(None), (0, 1, 2)),  # inf - inf
    ],
)
def test_bad_logits_end_their_sequence_and_no_other(
    make_engine, make_item, decode, backend, value, tokens, passes
):
    items = items_of(make_item, 4, longest=70)
    expected = decode(make_engine(backend=backend, fold_head=False), items)
    engine = make_engine(backend=backend, fold_head=False)
    Poison(engine, key=items[1].stream_id, step=5, value=value, tokens=tokens, passes=passes)
    drawn = decode(engine, items)
    wrong = drawn.pop(items[1].stream_id)
    clean = expected.pop(items[1].stream_id)
    assert drawn == expected
    assert wrong.finish_reason == "error"
    assert wrong.token_ids == clean.token_ids[:5]
    assert wrong.logprobs == clean.logprobs[:5]


def test_generate_reports_the_error_and_keeps_the_text_before_it(make_engine):
    prompts = [[40], [41], [42]]
    expected = make_engine().generate(prompts, sampling=LENGTH)
    engine = make_engine()
    Poison(engine, key=0, step=3, value=math.nan)
    completions = engine.generate(prompts, sampling=LENGTH)
    assert [c.finish_reason for c in completions] == ["error", "length", "length"]
    assert completions[1:] == expected[1:]
    assert expected[0].text.startswith(completions[0].text)
    assert len(completions[0].token_ids) == 3


@pytest.mark.parametrize("where", ["forward", "compute_logits"])
def test_an_interrupted_engine_works_on(make_engine, where):
    """Blocks whose writer never ran must not be found by the next call."""
    engine = make_engine(max_num_seqs=2)
    prompts = helpers.random_prompts(4, longest=140)[2:]
    expected = engine.generate(prompts, guidance=Guidance.contrastive(0.2), sampling=LENGTH)
    original = getattr(engine.model, where)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    setattr(engine.model, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, guidance=Guidance.contrastive(0.2), sampling=LENGTH)
    setattr(engine.model, where, original)
    engine.kv_cache.k.fill_(math.nan)
    again = engine.generate(prompts, guidance=Guidance.contrastive(0.2), sampling=LENGTH)
    assert again == expected


# --- how sequences end


def forced(engine, text: str) -> None:
    """Make the model write one text: its tokens one after the other, then token 5 for ever."""
    token_ids = engine.tokenizer.encode(text)
    compute_logits = engine.model.compute_logits

    @torch.inference_mode()
    def writing(*arguments):
        logits = compute_logits(*arguments)
        for index, sequence in enumerate(engine.scheduler.running):
            step = sequence.step
            logits[:, index] = -100.0
            logits[:, index, token_ids[step] if step < len(token_ids) else 5] = 100.0
        return logits

    engine.model.compute_logits = writing


@pytest.mark.parametrize(
    ("settings", "text", "reason"),
    [
        ({"max_tokens": 3}, "Is the", "length"),
        ({"stop": "?"}, "Is the ring on?", "stop"),
        ({"stop": "?", "include_stop": False}, "Is the ring on", "stop"),
        ({"stop": ("nothing", "g on")}, "Is the ring on", "stop"),
        # Both appear with the token "on"; the one that ends first counts.
        ({"stop": (" on", "ring o")}, "Is the ring o", "stop"),
        ({"stop_token_ids": None}, "Is the", "stop"),
        ({}, "Is the ring on? It is.", "eos"),
    ],
)
def test_a_sequence_ends_where_it_was_asked_to(make_engine, settings, text, reason):
    engine = make_engine()
    written = "Is the ring on? It is.<|endoftext|>"
    forced(engine, written)
    if "stop_token_ids" in settings:
        settings = {"stop_token_ids": engine.tokenizer.encode(" the")}
    completion = engine.generate([[40]], sampling=Sampling(**{"max_tokens": 60} | settings))[0]
    assert (completion.finish_reason, completion.text) == (reason, text)
    assert len(completion.token_ids) == len(completion.logprobs)
    assert completion.token_ids == engine.tokenizer.encode(written)[: len(completion.token_ids)]


def test_min_tokens_keeps_a_sequence_from_ending(make_engine):
    engine = make_engine()
    stop_id = engine.tokenizer.encode("?")[0]
    compute_logits = engine.model.compute_logits

    @torch.inference_mode()
    def ending(*arguments):  # wants nothing but to end
        logits = compute_logits(*arguments)
        logits[:, :, [0, stop_id]] = 1000.0
        return logits

    engine.model.compute_logits = ending
    for guidance in (Guidance.none(), Guidance.contrastive(0.4), Guidance(1.0, -3.0, 0.0)):
        sampling = Sampling(max_tokens=20, min_tokens=7, stop_token_ids=(stop_id,))
        completions = engine.generate([[40], [41]], guidance=guidance, sampling=sampling)
        for completion in completions:
            assert not {0, stop_id} & set(completion.token_ids[:7])
            if sum(guidance.weights) > 0:
                assert len(completion.token_ids) == 8
                assert completion.finish_reason in ("eos", "stop")


# --- arguments


def test_an_empty_prompt_starts_with_the_beginning_of_text(make_engine):
    engine = make_engine()
    for empty in ("", []):
        assert torch.equal(engine.logits([empty]), engine.logits([[0]]))
        completions = engine.generate(
            [empty], negative_prompts=[empty], guidance=STEER, sampling=LENGTH
        )
        expected = engine.generate([[0]], negative_prompts=[[0]], guidance=STEER, sampling=LENGTH)
        assert completions == expected


def test_no_prompts_give_no_completions(make_engine):
    engine = make_engine()
    assert engine.generate([]) == []
    assert engine.logits([]).shape == (0, 320)
    assert engine.next_token_probs([]).shape == (0, 320)


def test_prompts_up_to_the_context_run(make_engine, backend):
    """256 tokens in all: the prompt may fill what max_tokens leaves, to the last one."""
    engine = make_engine(backend=backend, max_num_seqs=2)
    longest = [7] * 250
    completions = engine.generate([longest], sampling=Sampling(max_tokens=6, ignore_eos=True))
    assert len(completions[0].token_ids) == 6
    with pytest.raises(ValueError, match=r"251 tokens; with max_tokens 6 it passes max_model_len"):
        engine.generate([[7] * 251], sampling=Sampling(max_tokens=6))
    # Only the next token is asked for here.
    assert torch.isfinite(engine.logits([[7] * 255])).all()
    assert engine.next_token_probs([[7] * 255]).sum().item() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="256 tokens"):
        engine.logits([[7] * 256])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "one string"}, "prompts must be a list of prompts, got one str"),
        ({"prompts": [[1, 320]]}, r"prompts\[0\] holds token ids outside \[0, 320\)"),
        ({"prompts": [[1], [-1]]}, r"prompts\[1\] holds token ids outside \[0, 320\)"),
        ({"prompts": [5, 6]}, r"prompts\[0\] must be a str or a list of token ids"),
        ({"prompts": [None]}, r"prompts\[0\] must be a str or a list of token ids"),
        ({"prompts": ["\ud800"]}, r"prompts\[0\] holds a lone surrogate"),
        ({"guidance": STEER}, "negative weight, but negative_prompts is None"),
        (
            {"guidance": STEER, "negative_prompts": ["a"]},
            r"negative_prompts must have one entry per prompt \(2\), got 1",
        ),
        (
            {"guidance": STEER, "negative_prompts": "ab"},
            "negative_prompts must be a list of prompts, got one str",
        ),
        (
            {"guidance": STEER, "negative_prompts": ["a", [999]]},
            r"negative_prompts\[1\] holds token ids outside",
        ),
        (
            {"guidance": STEER, "negative_prompts": ["a", [5] * 200]},
            r"prompt 1 \(negative pass\) has 200 tokens",
        ),
        ({"seed": -1}, r"seed must be an int in \[0, 2\*\*64\), got -1"),
        ({"seed": 1 << 64}, "seed must be an int"),
        ({"seed": 1.5}, "seed must be an int"),
        ({"seed": True}, "seed must be an int"),
    ],
)
def test_a_bad_argument_of_generate_is_named(make_engine, arguments, message):
    engine = make_engine()
    with pytest.raises(ValueError, match=message):
        engine.generate(**{"prompts": ["a", "b"]} | arguments)
    # Nothing is left behind.
    assert not engine.scheduler.waiting
    assert len(engine.generate(["a"], sampling=Sampling(max_tokens=1))) == 1


def test_logits_of_an_unknown_model_are_refused(make_engine):
    with pytest.raises(ValueError, match="which must be 'domain' or 'base', got 'negative'"):
        make_engine().logits(["a"], which="negative")


def test_without_a_domain_model_base_guidance_is_refused(make_engine):
    engine = make_engine(domain=None)
    with pytest.raises(ValueError, match="loaded without one; pass domain="):
        engine.generate(["a"], guidance=Guidance.contrastive(0.2))
    with pytest.raises(ValueError, match="loaded without one; pass domain="):
        engine.generate_dataset("a", 2, guidance=Guidance.recommended())
    # The negative pass needs the one model only.
    guided = engine.generate(
        ["a"], negative_prompts=["b"], guidance=Guidance.cfg(1.5), sampling=LENGTH
    )
    assert len(guided[0].token_ids) == 12
    assert torch.equal(engine.logits(["a"]), engine.logits(["a"], which="base"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": "meta"}, "device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        ({"dtype": "float16"}, "dtype must be auto, float32 or bfloat16, got 'float16'"),
        ({"backend": "vulkan"}, "backend must be auto or one of reference, cpu"),
        ({"max_num_seqs": 0}, r"max_num_seqs must be an int in \[1, inf\), got 0"),
        ({"max_num_seqs": 2.5}, "max_num_seqs must be an int"),
        ({"max_model_len": 1}, "max_model_len must be an int"),
        ({"max_model_len": 257}, "max_model_len 257 is over the model's context of 256 tokens"),
        ({"kv_cache_gib": 0}, r"kv_cache_gib must be a number in \(0, inf\), got 0"),
        ({"kv_cache_gib": math.nan}, "kv_cache_gib must be a number"),
    ],
)
def test_a_bad_setting_is_named(make_engine, settings, message):
    with pytest.raises(ValueError, match=message):
        make_engine(**settings)


def test_a_device_that_is_not_there_is_named(make_engine):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="this torch sees no CUDA GPU; use cpu"):
        make_engine(device="cuda")


def test_max_prefill_tokens_must_be_positive():
    with pytest.raises(ValueError, match="max_prefill_tokens must be an int"):
        EngineConfig(max_prefill_tokens=0)


def test_a_cache_without_room_for_a_block_is_refused(make_engine):
    with pytest.raises(CapacityError, match=r"holds no block of 64 tokens .*raise kv_cache_gib"):
        make_engine(kv_cache_gib=1e-9)


def test_a_sequence_that_can_never_fit_is_refused_before_it_waits(make_engine):
    engine = make_engine(num_blocks=2)
    with pytest.raises(CapacityError, match="prompt 1 needs 3 KV-cache blocks of 64 tokens, the"):
        engine.generate([[5], [6] * 150], sampling=LENGTH)


def test_missing_directories_are_named(tiny_models, tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        Engine.from_pretrained(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="no such directory"):
        Engine.from_pretrained(tiny_models.base, tmp_path / "missing")


def test_prompts_may_be_text_or_token_ids(make_engine):
    engine = make_engine()
    text = "Where is the ring?"
    as_text = engine.generate([text], sampling=LENGTH)
    assert as_text == engine.generate([engine.tokenizer.encode(text)], sampling=LENGTH)
    assert as_text == engine.generate([tuple(engine.tokenizer.encode(text))], sampling=LENGTH)


def test_passes_follow_from_the_weights():
    assert Guidance.none().passes == (PassKind.DOMAIN,)
    assert Guidance.steer(0.0, 0.5).passes == (PassKind.DOMAIN, PassKind.NEGATIVE)
    assert Guidance(0.0, 1.0, 0.0, alpha=0.5).passes == (PassKind.DOMAIN, PassKind.BASE)

"""Contrastive search: the tokens of a search written straight from the formula on whole-sequence
forwards of transformers' Falcon, and the engine's promises about batches, endings and faults.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial

import helpers
import pytest
import torch

from steer_engine import (
    CapacityError,
    Engine,
    Guidance,
    Method,
    NegativePrompts,
    RunError,
    SamplingParams,
)
from steer_engine.contrastive_search import top_tokens
from steer_engine.guidance import PassKind
from steer_engine.sampling import ContrastiveSearch

search = partial(Method.of, "contrastive_search")
# One token; below, at and above the end of a block of 64, which 12 tokens also cross.
PROMPTS = [helpers.random_prompts(2, seed=n, longest=n)[1] for n in (1, 55, 63, 64, 65, 90)]
TWELVE = SamplingParams(max_tokens=12, ignore_eos=True)
REAL = [f"The question of {letter} is on {letter}" for letter in "abcdefghijkl"]


@torch.no_grad()
def scores_by_formula(
    model, token_ids: list[int], top_k: int, penalty_alpha: float, banned: Sequence[int] = ()
) -> dict[int, float]:
    """score(v) = (1 - a) * p(v) - a * max_j cos(h_v, h_j) of the top_k tokens, likeliest first."""
    out = model(torch.tensor([token_ids]), use_cache=False, output_hidden_states=True)
    logits = out.logits[0, -1].index_fill(
        0, torch.tensor(list(banned), dtype=torch.long), -math.inf
    )
    probs, candidates = logits.softmax(dim=0).topk(top_k)
    continued = torch.tensor([[*token_ids, v] for v in candidates.tolist()])
    after = model(continued, use_cache=False, output_hidden_states=True).hidden_states[-1]
    cosines = torch.cosine_similarity(after[:, -1:], out.hidden_states[-1], dim=-1)
    scores = (1 - penalty_alpha) * probs - penalty_alpha * cosines.max(dim=1).values
    return dict(zip(candidates.tolist(), scores.tolist(), strict=True))


def assert_follows_the_formula(model, prompt, token_ids, *settings, min_tokens=0, banned=()):
    """Every token has the highest score behind those before it; returns how many are not the
    likeliest. Scores closer than the rounding of two implementations count as equal.
    """
    num_others = 0
    for step, token_id in enumerate(token_ids):
        now_banned = banned if step < min_tokens else ()
        scores = scores_by_formula(model, [*prompt, *token_ids[:step]], *settings, now_banned)
        assert token_id in scores, f"step {step}: {token_id} is not among {list(scores)}"
        assert max(scores.values()) - scores[token_id] < 1e-4, f"step {step}: {scores}"
        num_others += token_id != next(iter(scores))
    return num_others


@pytest.fixture(scope="module")
def base_model():
    return helpers.hf_model(seed=0)


@pytest.mark.parametrize("variant", helpers.VARIANTS)
def test_tokens_equal_the_formula_on_every_architecture(variant, backend, tmp_path):
    model = helpers.hf_model(seed=3, **helpers.VARIANTS[variant])
    engine = Engine.from_pretrained(
        helpers.save(model, tmp_path), device="cpu", dtype="float32", backend=backend
    )
    completions = engine.generate(PROMPTS[:3], method=search(top_k=4), sampling=TWELVE)
    num_others = 0
    for prompt, completion in zip(PROMPTS, completions, strict=False):
        assert len(completion.token_ids) == 12
        num_others += assert_follows_the_formula(model, prompt, completion.token_ids, 4, 0.6)
    assert num_others > 0


@pytest.mark.parametrize(
    ("top_k", "penalty_alpha"), [(2, 0.3), (5, 0.6), (8, 0.9), (8, 1.0), (3, 0.0), (1, 0.6)]
)
def test_tokens_equal_the_formula_for_every_k_and_alpha(
    make_engine, backend, base_model, top_k, penalty_alpha
):
    engine = make_engine(domain=None, backend=backend)
    method = search(top_k=top_k, penalty_alpha=penalty_alpha)
    completions = engine.generate(PROMPTS, method=method, sampling=TWELVE)
    num_others = 0
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert len(completion.token_ids) == 12
        num_others += assert_follows_the_formula(
            base_model, prompt, completion.token_ids, top_k, penalty_alpha
        )
    assert (num_others > 0) == (top_k > 1 and penalty_alpha > 0)


def test_the_domain_model_is_searched(make_engine, backend):
    model = helpers.hf_model(seed=1)  # what the fine-tune was saved from
    engine = make_engine(domain="finetune", backend=backend)
    completions = engine.generate(PROMPTS[:2], method=search(penalty_alpha=0.9), sampling=TWELVE)
    num_others = 0
    for prompt, completion in zip(PROMPTS, completions, strict=False):
        num_others += assert_follows_the_formula(model, prompt, completion.token_ids, 8, 0.9)
    assert num_others > 0


@pytest.mark.parametrize("domain", [None, "lora"])
@pytest.mark.parametrize("settings", [{"top_k": 1}, {"penalty_alpha": 0.0}])
def test_one_candidate_or_no_penalty_is_greedy(make_engine, backend, domain, settings):
    engine = make_engine(domain=domain, backend=backend)
    greedy = engine.generate(PROMPTS, method="greedy", sampling=TWELVE)
    searched = engine.generate(PROMPTS, method=search(**settings), sampling=TWELVE)
    assert [c.token_ids for c in searched] == [c.token_ids for c in greedy]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("domain", ["lora", "finetune"])
def test_tokens_are_the_same_in_any_batch(make_engine, backend, domain, dtype):
    """Tokens and log-probabilities, bit for bit."""
    settings = {"backend": backend, "domain": domain, "dtype": dtype}
    prompts = PROMPTS[1:4] if backend == "reference" else [*PROMPTS, *helpers.random_prompts(6)]
    arguments = {"method": search(top_k=4), "sampling": TWELVE}
    alone = make_engine(max_num_seqs=1, **settings)
    expected = [alone.generate([p], **arguments)[0] for p in prompts]
    assert len({tuple(c.token_ids) for c in expected}) == len(prompts)
    for order, others in [
        (prompts, {"max_num_seqs": 32}),
        (prompts[::-1], {"max_num_seqs": 2}),
        (prompts, {"max_num_seqs": 7, "max_prefill_tokens": 3}),
        (prompts[::-1], {"max_num_seqs": 32, "num_blocks": 6}),  # one at a time fits
    ]:
        completions = make_engine(**settings, **others).generate(order, **arguments)
        assert completions == [expected[prompts.index(p)] for p in order], others


def test_tokens_do_not_depend_on_the_number_of_threads(make_engine, backend):
    engine = make_engine(backend=backend)
    before = torch.get_num_threads()
    completions = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            completions.append(
                engine.generate(PROMPTS[1:3], method="contrastive_search", sampling=TWELVE)
            )
    finally:
        torch.set_num_threads(before)
    assert completions[0] == completions[1] == completions[2]


def run_steps(engine, sequences, seed=0):
    """Run sequences to their ends: {key: sequence}."""
    engine.scheduler.waiting.extend(sequences)
    finished = {}
    try:
        while engine.scheduler.num_queued:
            finished |= {s.key: s for s in engine.step(seed)}
    finally:
        engine.scheduler.reset()
    return finished


def mixed_sequences(engine):
    """Searched with several settings, drawn and steered sequences, taking turns."""
    sequences = []
    for i, prompt in enumerate(PROMPTS):
        prompts = dict.fromkeys(PassKind, prompt)
        for searched in (None, ContrastiveSearch(3, 0.6), ContrastiveSearch(6, 0.4)):
            guidance = Guidance() if searched or i % 2 else Guidance.recommended()
            key = (i, searched)
            sequences.append(engine.make_sequence(key, i, prompts, guidance, TWELVE, searched))
    return sequences


def test_searched_and_drawn_sequences_run_side_by_side(make_engine, backend):
    engine = make_engine(backend=backend, max_num_seqs=5)
    expected = {}
    for sequence in mixed_sequences(engine):
        expected |= run_steps(engine, [sequence])
    together = run_steps(engine, mixed_sequences(engine))
    assert together.keys() == expected.keys()
    for key, sequence in together.items():
        assert sequence.token_ids == expected[key].token_ids, key
        assert sequence.logprobs == expected[key].logprobs, key


def test_logprobs_are_the_models_own(make_engine, backend):
    engine = make_engine(backend=backend)
    prompts = PROMPTS[:3]
    completions = engine.generate(prompts, method="contrastive_search", sampling=TWELVE)
    for step in range(12):
        probs = engine.next_token_probs(
            [p + c.token_ids[:step] for p, c in zip(prompts, completions, strict=True)],
            guidance=Guidance(),
        )
        for row, completion in zip(probs, completions, strict=True):
            expected = math.log(row[completion.token_ids[step]].item())
            assert completion.logprobs[step] == pytest.approx(expected, abs=1e-5)


class TestEndings:
    """Each ending cuts the tokens of the search that has none."""

    @pytest.fixture
    def engine(self, make_engine, backend):
        return make_engine(backend=backend)

    @pytest.fixture
    def prompt(self):
        return PROMPTS[1]

    def generate(self, engine, prompt, **sampling):
        settings = {"max_tokens": 12, "ignore_eos": True} | sampling
        return engine.generate(
            [prompt], method="contrastive_search", sampling=SamplingParams(**settings)
        )[0]

    def test_max_tokens(self, engine, prompt):
        free = self.generate(engine, prompt)
        assert free.finish_reason == "length"
        short = self.generate(engine, prompt, max_tokens=5)
        assert (short.token_ids, short.logprobs) == (free.token_ids[:5], free.logprobs[:5])
        assert short.finish_reason == "length"

    def test_a_stop_string(self, engine, prompt):
        free = self.generate(engine, prompt)
        stop = free.text[1]
        stopped = self.generate(engine, prompt, stop=(stop,), include_stop=False)
        assert stopped.finish_reason == "stop"
        assert stopped.text == free.text[: free.text.index(stop)]
        assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
        assert len(stopped.token_ids) < 12

    def test_a_stop_token(self, engine, prompt):
        free = self.generate(engine, prompt)
        token_id = free.token_ids[4]
        stopped = self.generate(engine, prompt, stop_token_ids=(token_id,))
        assert stopped.token_ids == free.token_ids[: free.token_ids.index(token_id) + 1]
        assert stopped.finish_reason == "stop"

    def test_the_end_of_text_token(self, engine, prompt):
        free = self.generate(engine, prompt)
        engine.eos_token_ids = (free.token_ids[4],)
        ended = self.generate(engine, prompt, ignore_eos=False)
        assert ended.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[4]) + 1]
        assert ended.finish_reason == "eos"

    def test_min_tokens_bans_endings_and_chooses_among_the_others(self, make_engine, backend):
        engine = make_engine(domain=None, backend=backend)
        free = self.generate(engine, PROMPTS[1])
        banned = (free.token_ids[0], free.token_ids[1])
        held = self.generate(engine, PROMPTS[1], stop_token_ids=banned, min_tokens=6)
        assert len(held.token_ids) >= 6 and not {*held.token_ids[:6]} & {*banned}
        assert_follows_the_formula(
            helpers.hf_model(seed=0),
            PROMPTS[1],
            held.token_ids,
            8,
            0.6,
            min_tokens=6,
            banned=(0, *banned),
        )


def test_a_banned_token_is_not_chosen_even_where_all_are_candidates(make_engine):
    engine = make_engine()
    allowed = (7, 9)
    banned = tuple(i for i in range(helpers.VOCAB_SIZE) if i not in allowed)
    sampling = SamplingParams(max_tokens=6, min_tokens=6, stop_token_ids=banned, ignore_eos=True)
    for settings in ({"penalty_alpha": 1.0}, {"top_k": helpers.VOCAB_SIZE + 5}):
        method = search(**{"top_k": 40} | settings)
        engine = make_engine(num_blocks=helpers.VOCAB_SIZE + 9)
        completion = engine.generate([[5, 6]], method=method, sampling=sampling)[0]
        assert len(completion.token_ids) == 6
        assert set(completion.token_ids) <= set(allowed)


def test_all_blocks_come_back_and_no_hidden_state_stays(make_engine, backend):
    engine = make_engine(backend=backend)
    finished = run_steps(engine, mixed_sequences(engine))
    assert engine.kv_cache.num_free_blocks == engine.kv_cache.num_blocks
    assert all(s.search_state is None for s in finished.values())


def test_stale_cache_content_is_not_read(make_engine, backend):
    engine = make_engine(backend=backend)
    expected = engine.generate(PROMPTS, method="contrastive_search", sampling=TWELVE)
    engine.kv_cache.k.fill_(math.nan)
    engine.kv_cache.v.fill_(math.nan)
    engine.scheduler.reset()
    assert engine.generate(PROMPTS, method="contrastive_search", sampling=TWELVE) == expected


def test_a_search_that_never_fits_the_cache_is_refused(make_engine):
    engine = make_engine(num_blocks=8)
    completion = engine.generate([[5, 6]], method="contrastive_search", sampling=TWELVE)[0]
    assert len(completion.token_ids) == 12
    with pytest.raises(CapacityError, match=r"needs 9 KV-cache blocks.*has 8"):
        engine.generate([[5, 6]], method=search(top_k=9), sampling=TWELVE)


@pytest.mark.parametrize("bad_step", [0, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_logits_end_one_sequence_and_leave_the_others(
    make_engine, backend, monkeypatch, bad_step, value
):
    engine = make_engine(backend=backend)
    expected = engine.generate(PROMPTS[:3], method="contrastive_search", sampling=TWELVE)
    compute_logits, calls = engine.model.compute_logits, []

    def broken(*arguments):
        logits = compute_logits(*arguments)
        if len(calls) == bad_step:
            logits[0, 1, 17] = value
        calls.append(None)
        return logits

    monkeypatch.setattr(engine.model, "compute_logits", broken)
    completions = engine.generate(PROMPTS[:3], method="contrastive_search", sampling=TWELVE)
    assert completions[0] == expected[0] and completions[2] == expected[2]
    assert completions[1].finish_reason == "error"
    assert completions[1].token_ids == expected[1].token_ids[:bad_step]


def test_a_bad_hidden_state_ends_its_sequence_alone(make_engine, monkeypatch):
    engine = make_engine()
    expected = engine.generate(PROMPTS[:2], method="contrastive_search", sampling=TWELVE)
    directions = engine._searcher._directions

    def broken(residual):
        found = directions(residual)
        if len(found) == 16:  # the first step: eight candidates of both
            found[9] = math.nan
        return found

    monkeypatch.setattr(engine._searcher, "_directions", broken)
    completions = engine.generate(PROMPTS[:2], method="contrastive_search", sampling=TWELVE)
    assert completions[0] == expected[0]
    assert (completions[1].finish_reason, completions[1].token_ids) == ("error", [])


def test_top_tokens_breaks_ties_by_index():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (5, 400), generator=generator).float()
    logits[1] *= 0.0  # zeros of both signs
    logits[2] = -torch.inf
    logits[3, ::2] = -torch.inf
    expected = logits.sort(dim=-1, descending=True, stable=True).indices
    for count in (1, 7, 400):
        assert torch.equal(top_tokens(logits, count), expected[:, :count])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"top_k": 0}, "top_k must be an int in [1"),
        ({"penalty_alpha": 1.5}, "penalty_alpha must be a number in [0, 1]"),
        ({"temperature": 0.5}, "temperature has no meaning with method contrastive_search"),
        ({"top_p": 0.5}, "top_p has no meaning"),
    ],
)
def test_bad_parameters_are_named(arguments, expected):
    with pytest.raises(ValueError) as error:
        search(**arguments)
    assert expected in str(error.value)


def test_sampling_may_name_the_number_of_candidates(make_engine):
    engine = make_engine()
    three = SamplingParams(max_tokens=12, ignore_eos=True, top_k=3)
    by_name = engine.generate(PROMPTS[:2], method="contrastive_search", sampling=three)
    assert by_name == engine.generate(PROMPTS[:2], method=search(top_k=3), sampling=TWELVE)
    with pytest.raises(ValueError, match="sampling has top_k 3, method contrastive_search 8"):
        engine.generate(PROMPTS[:2], method=search(), sampling=three)


REQUEST = {
    "prompt": {"a": "Ask a question:", "b": "First:"},
    "num_examples": 10,
    "real": REAL,
    # Examples last: this model's next token depends on the last few alone.
    "negatives": NegativePrompts(num_examples=3, lag=4, template="{prompt} {examples}"),
    "method": search(top_k=4, in_context=True),
    "sampling": SamplingParams(max_tokens=8, stop=("e",), ignore_eos=True),
    "seed": 4,
}


class TestDataSets:
    def test_examples_in_front_of_the_prompt_make_the_texts_differ(self, make_engine):
        engine = make_engine()
        dataset = engine.generate_dataset(**REQUEST)
        assert [e.label for e in dataset] == ["a", "b"] * 5
        assert len({tuple(e.token_ids) for e in dataset}) >= 8
        assert {e.finish_reason for e in dataset} <= {"stop", "length"}
        for example in dataset:
            known = {f"real/{i}": text for i, text in enumerate(REAL)}
            known |= {f"synthetic/{e.index}": e.text for e in dataset}
            text = REQUEST["negatives"].render(
                [known[source] for source in example.negatives], example.prompt
            )
            completion = engine.generate(
                [text], method=search(top_k=4), sampling=REQUEST["sampling"]
            )[0]
            assert completion.token_ids == example.token_ids

    def test_one_text_per_prompt(self, make_engine):
        request = REQUEST | {"method": "contrastive_search"}
        with pytest.raises(ValueError, match="10 examples of 2 prompts would repeat"):
            make_engine().generate_dataset(**request)
        dataset = make_engine().generate_dataset(**request | {"num_examples": 2})
        completions = make_engine().generate(
            list(request["prompt"].values()),
            method="contrastive_search",
            sampling=request["sampling"],
        )
        assert [e.token_ids for e in dataset] == [c.token_ids for c in completions]

    def test_a_cut_run_resumes_to_the_same_bytes(self, make_engine, tmp_path):
        make_engine().generate_dataset(**REQUEST, output=tmp_path / "whole")
        whole = (tmp_path / "whole" / "examples.jsonl").read_bytes()
        cut = tmp_path / "cut"
        make_engine().generate_dataset(**REQUEST, output=cut)
        (cut / "examples.jsonl").write_bytes(whole[: whole.index(b"\n", len(whole) // 2) - 5])
        (cut / "summary.json").unlink()
        make_engine().generate_dataset(**REQUEST, output=cut)
        assert (cut / "examples.jsonl").read_bytes() == whole
        settings = json.loads((cut / "run.json").read_text())
        assert settings["search"] == {"top_k": 4, "penalty_alpha": 0.6}
        other = REQUEST | {"method": search(top_k=4, penalty_alpha=0.5, in_context=True)}
        with pytest.raises(RunError, match=r"search.penalty_alpha was 0.6, now 0.5"):
            make_engine().generate_dataset(**other, output=cut)

"""Methods by name: what each one fills in, what it refuses, and that a call with a name equals the
call with its guidance and sampling written out.
"""

from __future__ import annotations

import helpers
import pytest

from steer_engine import Guidance, Method, NegativePrompts, SamplingParams
from steer_engine.methods import METHODS, PARAMETERS, defaults, unused_parameters

PROMPTS = helpers.random_prompts(3, longest=40)
NEGATIVES = helpers.random_prompts(3, seed=5, longest=40)
REAL = [f"The question of {letter} is on {letter}" for letter in "abcdefghijkl"]

# name: guidance, and what of SamplingParams the method changes
WRITTEN_OUT = {
    "greedy": (Guidance(), {"temperature": 0.0}),
    "temperature": (Guidance(), {}),
    "top_k": (Guidance(), {"top_k": 50}),
    "nucleus": (Guidance(), {"top_p": 0.9}),
    "contrastive_search": (Guidance(), {}),
    "contrastive": (Guidance(1.0, -0.2, 0.0), {"top_p": 0.9}),
    "negative": (Guidance(1.0, 0.0, -0.2), {"top_p": 0.9}),
    "cfg": (Guidance(1.5, 0.0, -0.5), {"top_p": 0.9}),
    "steer": (Guidance(1.2, -0.2, -0.2), {"top_p": 0.9}),
    "none": (Guidance(), {"top_p": 0.9}),
}


def test_every_method_is_written_out_here():
    assert set(WRITTEN_OUT) == set(METHODS)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_method_fills_in_guidance_and_sampling(name):
    guidance, changed = WRITTEN_OUT[name]
    method = Method.of(name)
    assert method.guidance.weights == pytest.approx(guidance.weights)
    assert SamplingParams(**method.shape) == SamplingParams(**changed)
    assert method.name == name


@pytest.mark.parametrize("name", [n for n in WRITTEN_OUT if n != "contrastive_search"])
def test_generate_by_name_equals_guidance_and_sampling_written_out(make_engine, name):
    _, changed = WRITTEN_OUT[name]
    guidance = Method.of(name).guidance
    engine = make_engine()
    lengths = {"max_tokens": 8, "ignore_eos": True}
    negatives = NEGATIVES if guidance.negative else None
    by_name = engine.generate(
        PROMPTS,
        negative_prompts=negatives,
        method=name.replace("_", "-"),
        sampling=SamplingParams(**lengths),
        seed=3,
    )
    assert by_name == engine.generate(
        PROMPTS,
        negative_prompts=negatives,
        guidance=guidance,
        sampling=SamplingParams(**lengths, **changed),
        seed=3,
    )
    assert all(len(c.token_ids) == 8 for c in by_name)


@pytest.mark.parametrize(
    ("name", "parameters", "weights"),
    [
        ("contrastive", {"gamma": 0.5}, (1.0, -0.5, 0.0)),
        ("contrastive", {"gamma": 0.5, "normalize": True}, (2.0, -1.0, 0.0)),
        ("negative", {"eta": 0.5}, (1.0, 0.0, -0.5)),
        ("negative", {"eta": 0.5, "form": "paper"}, (0.5, 0.0, 0.5)),
        ("negative", {"eta": 1.5, "form": "paper"}, (1.5, 0.0, -0.5)),
        ("steer", {"gamma": 0.3, "eta": 0.1}, (1.3, -0.3, -0.1)),
        ("steer", {"gamma": 0.3, "eta": 0.1, "form": "paper"}, (1.1, -0.3, 0.9)),
        ("cfg", {"scale": 3.0}, (3.0, 0.0, -2.0)),
        ("nucleus", {"in_context": True}, (0.0, 0.0, 1.0)),
    ],
)
def test_parameters_of_the_guidance_reach_the_weights(name, parameters, weights):
    assert Method.of(name, **parameters).guidance.weights == pytest.approx(weights)


def test_the_plausibility_cut_reaches_the_guidance():
    for name in ("contrastive", "negative", "cfg", "steer", "none"):
        assert Method.of(name, alpha=0.1).guidance.alpha == 0.1


def test_negative_prompting_as_printed_is_steer_without_its_first_equation():
    """log P- = log P~ + log P^: taking log P~ = log P_theta away leaves log P^."""
    eta = 0.7
    both = Guidance.steer(0.0, eta, form="paper").weights
    alone = Method.of("negative", eta=eta, form="paper").guidance.weights
    assert [a - b for a, b in zip(both, alone, strict=True)] == pytest.approx([1.0, 0.0, 0.0])


def test_what_sampling_changes_are_the_methods_parameters(make_engine):
    engine = make_engine()
    lengths = {"max_tokens": 6, "ignore_eos": True}
    for name, given in [
        ("nucleus", {"top_p": 0.5}),
        ("top_k", {"top_k": 3, "temperature": 0.7}),
        ("temperature", {"temperature": 1.6}),
        ("greedy", {"temperature": 0.0}),
    ]:
        written_out = SamplingParams(**lengths, **given)
        expected = engine.generate(PROMPTS, guidance=Guidance(), sampling=written_out)
        assert engine.generate(PROMPTS, method=name, sampling=written_out) == expected
        method = Method.of(name, **given)
        lengths_only = SamplingParams(**lengths)
        assert engine.generate(PROMPTS, method=method, sampling=lengths_only) == expected
        assert engine.generate(PROMPTS, method=method, sampling=written_out) == expected


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: Method.of("nuclues"), "did you mean 'nucleus'?"),
        (lambda: Method.of("greedy", top_p=0.5), "top_p has no meaning with method greedy"),
        (lambda: Method.of("greedy", temperature=0.5), "temperature has no meaning"),
        (lambda: Method.of("nucleus", top_k=5), "top_k has no meaning with method nucleus"),
        (lambda: Method.of("top-k", top_p=0.5), "top_p has no meaning with method top_k"),
        (lambda: Method.of("nucleus", gamma=0.1), "gamma has no meaning with method nucleus"),
        (lambda: Method.of("cfg", form="paper"), "form has no meaning with method cfg"),
        (lambda: Method.of("steer", in_context=True), "in_context has no meaning"),
        (lambda: Method.of("steer", gama=0.1), "gama has no meaning with method steer"),
        (lambda: Method.of("top_k", top_k=0), "top_k must be an int in [1"),
        (lambda: Method.of("nucleus", top_p=1.5), "top_p must be a number in (0, 1]"),
        (lambda: Method.of("negative", form="printed"), "form must be 'paper' or 'released'"),
        (lambda: Method.of("negative", eta="a", form="paper"), "eta must be a number"),
        (lambda: Method.of("none", alpha=0.1, in_context=True), "leave out in_context or alpha"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(call, expected):
    with pytest.raises(ValueError) as error:
        call()
    assert expected in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_is_either_taken_or_refused(name):
    refused = unused_parameters(name, dict.fromkeys(PARAMETERS))
    assert sorted(refused + list(defaults(name))) == sorted(PARAMETERS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"method": "nucleus", "guidance": Guidance()}, "give method or guidance, not both"),
        ({"method": "nucleus", "sampling": SamplingParams(top_k=5)}, "top_k has no meaning"),
        (
            {"method": Method.of("nucleus"), "sampling": SamplingParams(top_p=0.5)},
            "sampling has top_p 0.5, method nucleus 0.9",
        ),
        ({"method": "nucleus", "negative_prompts": NEGATIVES}, "negative_prompts has no meaning"),
        ({"method": "cfg"}, "negative_prompts is None"),
        ({"method": "stear"}, "did you mean 'steer'?"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(make_engine, arguments, expected):
    with pytest.raises(ValueError) as error:
        make_engine().generate(PROMPTS, **arguments)
    assert expected in str(error.value)


def test_methods_that_compare_with_the_base_need_a_domain_model(make_engine):
    for name in ("steer", "contrastive"):
        with pytest.raises(ValueError, match="loaded without one"):
            make_engine(domain=None).generate(PROMPTS, negative_prompts=None, method=name)


@pytest.mark.parametrize("name", ["nucleus", "steer", "negative"])
def test_a_data_set_by_name_equals_one_with_guidance(make_engine, name):
    engine = make_engine()
    lengths = {"max_tokens": 8, "ignore_eos": True}
    guidance = Method.of(name).guidance
    arguments = {"prompt": "Ask a question:", "num_examples": 12, "real": REAL, "seed": 2}
    by_name = engine.generate_dataset(**arguments, method=name, sampling=SamplingParams(**lengths))
    written_out = engine.generate_dataset(
        **arguments, guidance=guidance, sampling=SamplingParams(**lengths, top_p=0.9)
    )
    assert list(by_name) == list(written_out)
    assert len({tuple(e.token_ids) for e in by_name}) == 12


def test_a_greedy_data_set_of_one_prompt_is_refused_unless_examples_stand_in_front(make_engine):
    engine = make_engine()
    request = {
        "prompt": "Ask a question:",
        "num_examples": 12,
        "sampling": SamplingParams(max_tokens=8, ignore_eos=True),
    }
    with pytest.raises(ValueError, match=r"12 examples of 1 prompt would repeat.*in_context"):
        engine.generate_dataset(**request, real=REAL, method="greedy")
    in_context = Method.of("greedy", in_context=True)
    for changes in (
        {"real": None},
        {"negatives": NegativePrompts(num_examples=0)},
        {"negatives": NegativePrompts(share=2)},
    ):
        with pytest.raises(ValueError, match="needs real examples"):
            engine.generate_dataset(**request | {"real": REAL} | changes, method=in_context)
    # Examples last: this model's next token depends on the last few alone.
    negatives = NegativePrompts(template="{prompt} {examples}")
    dataset = engine.generate_dataset(**request, real=REAL, method=in_context, negatives=negatives)
    assert len({tuple(e.token_ids) for e in dataset}) > 6
    assert all(len(e.negatives) == 5 for e in dataset)


def test_in_context_continues_the_text_of_the_negative_prompt(make_engine):
    engine = make_engine()
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    dataset = engine.generate_dataset(
        "Ask a question:",
        4,
        REAL,
        sampling=sampling,
        method=Method.of("greedy", in_context=True),
    )
    for example in dataset:
        sources = [REAL[int(source.removeprefix("real/"))] for source in example.negatives]
        text = NegativePrompts().render(sources, "Ask a question:")
        completion = engine.generate([text], method="greedy", sampling=sampling)[0]
        assert completion.token_ids == example.token_ids


def test_one_text_per_prompt_needs_no_examples_in_front(make_engine):
    dataset = make_engine().generate_dataset(
        {"a": "First:", "b": "The ring"},
        2,
        sampling=SamplingParams(max_tokens=8, ignore_eos=True),
        method="greedy",
    )
    assert len(set(dataset.texts)) == 2


def test_a_rejected_greedy_text_is_not_drawn_again(make_engine):
    dataset = make_engine().generate_dataset(
        "First:",
        1,
        sampling=SamplingParams(max_tokens=8, ignore_eos=True),
        method="greedy",
        accept=lambda text: False,
    )
    assert len(dataset) == 0
    assert [e.attempts for e in dataset.failed] == [1]

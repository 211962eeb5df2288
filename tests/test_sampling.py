"""SamplingParams' ranges, and DecodingSequence: when a sequence ends and what its text is."""

from __future__ import annotations

import helpers
import pytest

from steer_engine import Engine, Guidance, SamplingParams
from steer_engine.guidance import PassKind
from steer_engine.sequence import DecodingSequence
from steer_engine.tokenizer import Tokenizer

EOS = 0  # the tiny tokenizer's end of text
OK, NAN, EMPTY, INF = 0, 1, 2, 4  # the sampler's status bits


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    helpers.write_tokenizer(directory)
    return Tokenizer(directory)


def decode(tokenizer, token_ids, **sampling) -> DecodingSequence:
    """Append tokens until the sequence ends; every token must have been asked for."""
    sequence = DecodingSequence(
        key=0,
        stream_id=0,
        prompts={PassKind.DOMAIN: [1]},
        guidance=Guidance.none(),
        sampling=SamplingParams(**sampling),
        tokenizer=tokenizer,
        eos_token_ids=(EOS,),
    )
    for token_id in token_ids:
        if sequence.finish_reason is not None:
            break
        sequence.append(token_id, -1.0, OK)
    return sequence


def bytes_of(tokenizer, text: str) -> list[int]:
    """One token per byte, so that every stop string crosses token borders."""
    single = {tokenizer.token_bytes(i): i for i in range(1, 257)}
    return [single[bytes([b])] for b in text.encode()]


# SamplingParams -----------------------------------------------------------------------------------

OUT_OF_RANGE = [
    ("temperature", [-0.1, float("nan"), float("inf"), "1", None]),
    ("top_p", [0.0, -0.5, 1.01, float("nan"), "0.9", None]),
    ("top_k", [-1, 1.5, 2**31, "5", True]),
    ("max_tokens", [0, -1, 2.0, "5", None]),
    ("min_tokens", [-1, 101, 1.0, None]),
    ("stop", [("",), ("a", 5), (None,), 5, None]),
    ("stop_token_ids", [("a",), (-1,), (1.0,), (True,), 5, None]),
    ("ignore_eos", [1, "yes", None]),
    ("include_stop", [0, "no", None]),
]


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in OUT_OF_RANGE for v in values])
def test_a_value_out_of_range_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("top_p", 1.0),
        ("top_p", 1e-6),
        ("top_k", 0),
        ("top_k", 2**31 - 1),
        ("max_tokens", 1),
        ("min_tokens", 100),
        ("stop", ("a", "b")),
        ("stop_token_ids", (0, 7)),
        ("ignore_eos", True),
        ("include_stop", False),
    ],
)
def test_the_ends_of_each_range_are_allowed(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_a_single_stop_string_and_lists_become_tuples():
    assert SamplingParams(stop="?").stop == ("?",)
    assert SamplingParams(stop=["?", "!"]).stop == ("?", "!")
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)


def test_min_tokens_may_not_pass_max_tokens():
    assert SamplingParams(max_tokens=5, min_tokens=5).min_tokens == 5
    with pytest.raises(ValueError, match=r"min_tokens must be an int in \[0, 5\], got 6"):
        SamplingParams(max_tokens=5, min_tokens=6)


# When a sequence ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, 17])
def test_exactly_max_tokens_are_drawn_when_nothing_stops(tokenizer, max_tokens):
    tokens = bytes_of(tokenizer, "abcdefghijklmnopqrstuvwxyz")
    sequence = decode(tokenizer, tokens, max_tokens=max_tokens)
    assert sequence.finish_reason == "length"
    assert sequence.token_ids == tokens[:max_tokens]
    assert sequence.text == "abcdefghijklmnopqrstuvwxyz"[:max_tokens]
    assert len(sequence.logprobs) == max_tokens


def test_end_of_text_ends_a_sequence_and_adds_no_text(tokenizer):
    sequence = decode(tokenizer, [*bytes_of(tokenizer, "ab"), EOS, 5])
    assert (sequence.finish_reason, sequence.text) == ("eos", "ab")
    assert sequence.token_ids == [*bytes_of(tokenizer, "ab"), EOS]


def test_end_of_text_as_the_last_allowed_token_counts_as_eos(tokenizer):
    assert decode(tokenizer, [*bytes_of(tokenizer, "a"), EOS], max_tokens=2).finish_reason == "eos"


def test_ignore_eos_goes_on_behind_the_end_of_text(tokenizer):
    tokens = [*bytes_of(tokenizer, "ab"), EOS, *bytes_of(tokenizer, "cd")]
    sequence = decode(tokenizer, tokens, ignore_eos=True, max_tokens=5)
    assert (sequence.finish_reason, sequence.text) == ("length", "abcd")
    assert sequence.token_ids == tokens


def test_a_stop_token_ends_a_sequence_and_keeps_its_text(tokenizer):
    a, b, c = bytes_of(tokenizer, "abc")
    sequence = decode(tokenizer, [a, b, c], stop_token_ids=(b,))
    assert (sequence.finish_reason, sequence.text) == ("stop", "ab")
    assert sequence.token_ids == [a, b]


@pytest.mark.parametrize("stop", ["c", "bc", "abc", "? é", "🙂", "a🙂b"])
def test_a_stop_string_is_found_across_token_borders(tokenizer, stop):
    text = f"xyz{stop}and more"
    sequence = decode(tokenizer, bytes_of(tokenizer, text), stop=stop)
    assert (sequence.finish_reason, sequence.text) == ("stop", f"xyz{stop}")
    assert sequence.token_ids == bytes_of(tokenizer, f"xyz{stop}"), "stops at once"


def test_include_stop_false_cuts_the_stop_string_off(tokenizer):
    tokens = bytes_of(tokenizer, "one? two")
    sequence = decode(tokenizer, tokens, stop="e? ", include_stop=False)
    assert (sequence.finish_reason, sequence.text) == ("stop", "on")
    assert sequence.token_ids == tokens[:5], "the drawn tokens stay as they were"


def test_text_behind_a_stop_string_within_one_token_is_cut(tokenizer):
    [quoted] = tokenizer.encode('?"')
    [the] = tokenizer.encode(" the")
    kept = decode(tokenizer, [the, quoted], stop="?")
    assert (kept.finish_reason, kept.text) == ("stop", " the?")
    assert decode(tokenizer, [the, quoted], stop="h", include_stop=False).text == " t"


def test_the_stop_string_that_ends_first_wins(tokenizer):
    [the] = tokenizer.encode(" the")  # one token holds both stop strings
    for stops in (("he", "t"), ("t", "he")):
        assert decode(tokenizer, [the], stop=stops).text == " t"
    # "the" begins before "h" and ends behind it.
    assert decode(tokenizer, [the], stop=("the", "h")).text == " th"


def test_of_stop_strings_that_end_together_the_longest_is_cut(tokenizer):
    [the] = tokenizer.encode(" the")
    for stops in (("e", "the"), ("the", "e")):
        assert decode(tokenizer, [the], stop=stops, include_stop=False).text == " "


def test_overlapping_beginnings_of_a_stop_string_do_not_hide_it(tokenizer):
    sequence = decode(tokenizer, bytes_of(tokenizer, "aaab aab!"), stop="aab")
    assert sequence.text == "aaab"


def test_a_stop_string_in_the_prompt_does_not_stop(tokenizer):
    # The prompt is no part of the text: only the second half of the stop string is drawn.
    assert decode(tokenizer, bytes_of(tokenizer, "b"), stop="ab", max_tokens=1).text == "b"


def test_a_stop_string_at_the_last_allowed_token_counts_as_stop(tokenizer):
    sequence = decode(tokenizer, bytes_of(tokenizer, "ab?"), stop="?", max_tokens=3)
    assert sequence.finish_reason == "stop"


def test_stop_strings_do_not_stop_before_min_tokens(tokenizer):
    tokens = bytes_of(tokenizer, "a?b?c?d")
    sequence = decode(tokenizer, tokens, stop="?", min_tokens=3)
    assert (sequence.finish_reason, sequence.text) == ("stop", "a?b?")
    exactly = decode(tokenizer, tokens, stop="?", min_tokens=4)
    assert exactly.text == "a?b?", "the token that reaches min_tokens may end the sequence"


def test_endings_are_banned_until_min_tokens_are_drawn(tokenizer):
    a, b = bytes_of(tokenizer, "ab")
    sequence = decode(tokenizer, [], min_tokens=2, stop_token_ids=(a, b))
    assert set(sequence.banned_token_ids) == {EOS, a, b}
    sequence.append(9, -1.0, OK)
    assert set(sequence.banned_token_ids) == {EOS, a, b}
    sequence.append(9, -1.0, OK)
    assert sequence.banned_token_ids == ()


def test_nothing_is_banned_without_min_tokens(tokenizer):
    assert decode(tokenizer, [], stop_token_ids=(5,)).banned_token_ids == ()


@pytest.mark.parametrize("status", [NAN, EMPTY, INF, NAN | INF])
def test_a_status_ends_the_sequence_with_error_and_drops_the_token(tokenizer, status):
    sequence = decode(tokenizer, bytes_of(tokenizer, "ab"))
    sequence.append(7, -1.0, status)
    assert (sequence.finish_reason, sequence.text) == ("error", "ab")
    assert sequence.token_ids == bytes_of(tokenizer, "ab")
    assert len(sequence.logprobs) == 2


def test_a_character_cut_by_the_end_is_left_out_of_the_text(tokenizer):
    tokens = bytes_of(tokenizer, "a🙂")[:4]
    sequence = decode(tokenizer, tokens, max_tokens=4)
    assert (sequence.finish_reason, sequence.text) == ("length", "a")


# Through the engine -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    directory = helpers.save(helpers.hf_model(), tmp_path_factory.mktemp("model") / "base")
    return Engine.from_pretrained(directory, device="cpu", dtype="float32", max_num_seqs=8)


def generate(engine, num_prompts=8, **sampling):
    return engine.generate(
        helpers.random_prompts(num_prompts, longest=20), sampling=SamplingParams(**sampling)
    )


def test_the_engine_draws_exactly_max_tokens(engine):
    for completion in generate(engine, ignore_eos=True, max_tokens=13):
        assert (len(completion.token_ids), completion.finish_reason) == (13, "length")


def test_the_engine_never_draws_an_ending_before_min_tokens(engine):
    endings = tuple(range(1, 160))  # half the vocabulary, so an unbanned run ends early
    unbanned = generate(engine, max_tokens=40, stop_token_ids=endings)
    assert sum(len(c.token_ids) <= 12 for c in unbanned) >= 6
    for completion in generate(engine, min_tokens=12, max_tokens=40, stop_token_ids=endings):
        assert not set(completion.token_ids[:12]) & {EOS, *endings}
        assert len(completion.token_ids) > 12
        assert (completion.finish_reason == "length") == (completion.token_ids[-1] not in endings)


def test_a_stop_token_outside_the_vocabulary_is_refused_by_name(engine):
    with pytest.raises(ValueError, match=r"stop_token_ids.*320"):
        generate(engine, min_tokens=2, stop_token_ids=(320,))
    with pytest.raises(ValueError, match=r"stop_token_ids.*320"):
        generate(engine, stop_token_ids=(10**6,))


def test_top_k_one_draws_the_greedy_tokens(engine):
    greedy = generate(engine, temperature=0, max_tokens=8, ignore_eos=True)
    only = generate(engine, top_k=1, max_tokens=8, ignore_eos=True)
    assert [c.token_ids for c in only] == [c.token_ids for c in greedy]

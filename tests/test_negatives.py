"""The negative pool: who may stand in front of which example, drawn how, and cut how."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_engine import NegativePrompts
from steer_engine.negatives import NegativePool, sample_without_replacement


class Letters:
    """A tokenizer with one token a character."""

    def __init__(self):
        self.num_encoded = 0

    def encode(self, text: str) -> list[int]:
        self.num_encoded += 1
        return [ord(c) for c in text]


PLENTY = 10_000


def make_pool(num_real: int = 5, num_synthetic: int = 0, seed: int = 0, **fields) -> NegativePool:
    fields = {"num_examples": 3, "lag": 0} | fields
    pool = NegativePool(
        NegativePrompts(**fields), [f"R{i}" for i in range(num_real)], Letters(), seed
    )
    for i in range(num_synthetic):
        pool.add(i, f"S{i}")
    return pool


def text_of(prompt) -> str:
    return "".join(map(chr, prompt.token_ids))


def sources(pool: NegativePool, index: int) -> list[str]:
    return pool.draw(index, "P", PLENTY).sources


# --- sample_without_replacement


@given(size=st.integers(0, 200), seed=st.integers(0, 2**64 - 1), stream=st.integers(0, 2**40))
def test_a_sample_is_a_permutation(size, seed, stream):
    assert sorted(sample_without_replacement(size, seed, stream)) == list(range(size))


def test_the_first_values_do_not_depend_on_how_many_are_taken():
    whole = list(sample_without_replacement(1000, 3, 4))
    assert list(itertools.islice(sample_without_replacement(1000, 3, 4), 7)) == whole[:7]


def test_every_permutation_is_equally_likely():
    """24 permutations of 4, chi-square over 48,000 draws; 62.2 is passed once in 50,000 seeds."""
    counts = Counter(tuple(sample_without_replacement(4, 1, stream)) for stream in range(48_000))
    assert len(counts) == 24
    statistic = sum((count - 2000) ** 2 / 2000 for count in counts.values())
    assert statistic < 62.2, f"chi-square {statistic:.1f} with 23 degrees"


def test_every_member_is_equally_likely_at_every_place():
    """3 of 13, 39,000 draws: one chi-square per place; 43.8 with 12 degrees is passed once in
    60,000.
    """
    draws = [list(itertools.islice(sample_without_replacement(13, 2, s), 3)) for s in range(39_000)]
    for place in range(3):
        counts = Counter(draw[place] for draw in draws)
        statistic = sum((counts[m] - 3000) ** 2 / 3000 for m in range(13))
        assert statistic < 43.8, f"place {place}: chi-square {statistic:.1f}"


def test_a_few_of_a_large_pool_are_cheap():
    """More members than 2**20; a sampler that walks the pool takes seconds for this."""
    started_at = time.process_time()
    for stream in range(100):
        few = list(itertools.islice(sample_without_replacement((1 << 20) + 7, 0, stream), 5))
        assert len(set(few)) == 5
    assert max(sample_without_replacement(3, 0, 0)) == 2
    assert time.process_time() - started_at < 1.0


def test_beyond_32_bits_every_member_can_be_drawn():
    size = 1 << 40
    drawn = [next(sample_without_replacement(size, 0, stream)) for stream in range(2000)]
    assert len(set(drawn)) == 2000
    quarters = Counter(4 * value // size for value in drawn)
    assert all(400 < quarters[q] < 600 for q in range(4))


# --- what is drawn


def test_examples_are_drawn_without_replacement():
    pool = make_pool(num_real=6, num_synthetic=6, num_examples=8)
    for index in range(6, 60):
        assert len(set(sources(pool, index))) == 8


def test_fewer_than_asked_for_are_all_taken():
    pool = make_pool(num_real=2, num_examples=5)
    assert sorted(sources(pool, 0)) == ["real/0", "real/1"]


def test_the_draw_depends_on_seed_and_index_alone():
    first, other_seed = make_pool(20), make_pool(20, seed=1)
    forward = [sources(first, i) for i in range(30)]
    again = make_pool(20)
    backward = [sources(again, i) for i in reversed(range(30))]
    assert forward == backward[::-1]
    assert forward != [sources(other_seed, i) for i in range(30)]
    assert len({tuple(s) for s in forward}) > 25


def test_later_examples_do_not_change_an_earlier_draw():
    pool = make_pool(num_real=3, num_synthetic=10, lag=2)
    before = [sources(pool, i) for i in range(13)]
    for i in range(10, 50):
        pool.add(i, f"S{i}")
    assert [sources(pool, i) for i in range(13)] == before


@pytest.mark.parametrize("lag", [0, 1, 5])
@pytest.mark.parametrize("share", [1, 4])
def test_lag_and_share_decide_which_examples_may_appear(lag, share):
    pool = make_pool(num_real=1, num_synthetic=40, num_examples=1000, lag=lag, share=share)
    for index in range(40):
        newest = max(0, index - index % share - lag)
        expected = {"real/0"} | {f"synthetic/{i}" for i in range(newest)}
        assert set(sources(pool, index)) == expected
        assert pool.settings.num_pool_indices(index) == newest


def test_a_group_shares_its_negatives_and_the_next_has_others():
    pool = make_pool(num_real=30, num_examples=5, share=4)
    drawn = [tuple(sources(pool, i)) for i in range(40)]
    groups = [set(drawn[i : i + 4]) for i in range(0, 40, 4)]
    assert all(len(group) == 1 for group in groups)
    assert len(set(drawn)) == 10
    starts = [pool.settings.group_start(i) for i in range(9)]
    assert starts == [0, 0, 0, 0, 4, 4, 4, 4, 8]


def test_lag_none_becomes_max_num_seqs():
    assert NegativePrompts().resolve(64).lag == 64
    assert NegativePrompts(lag=0).resolve(64).lag == 0


def test_empty_and_missing_examples_are_not_in_the_pool():
    """Index 1 was empty and index 3 failed: neither appears, and the others keep their numbers."""
    pool = make_pool(num_real=0, num_examples=100)
    pool.add(0, "a")
    pool.add(1, "  \n ")
    pool.add(2, " c ")
    pool.add(4, "e")
    drawn = pool.draw(10, "P", PLENTY)
    assert sorted(drawn.sources) == ["synthetic/0", "synthetic/2", "synthetic/4"]
    assert sorted(text_of(drawn).removesuffix("\nP").split(" ")) == ["a", "c", "e"]
    assert sorted(sources(pool, 3)) == ["synthetic/0", "synthetic/2"]
    assert pool.num_wanted(10) == 3


def test_real_and_synthetic_examples_are_equally_likely():
    pool = make_pool(num_real=10, num_synthetic=10, num_examples=1)
    counts = Counter(sources(pool, i)[0] for i in range(10, 8010))
    statistic = sum((counts[s] - 400) ** 2 / 400 for s in counts)
    assert len(counts) == 20
    assert statistic < 54.0, f"chi-square {statistic:.1f} with 19 degrees"


# --- layout


def test_the_layout_follows_the_template():
    pool = make_pool(num_real=3, separator="|", template="<{examples}>{prompt}!{prompt}")
    drawn = pool.draw(0, "P", PLENTY)
    texts = ["R" + s.removeprefix("real/") for s in drawn.sources]
    assert text_of(drawn) == f"<{'|'.join(texts)}>P!P"


def test_a_template_without_prompt_leaves_it_out():
    pool = make_pool(num_real=2, template="{examples}", separator=" ")
    assert sorted(text_of(pool.draw(0, "P", PLENTY)).split(" ")) == ["R0", "R1"]


@pytest.mark.parametrize("text", ["{prompt}", "{examples}", "{}", "{0}", "{", "a}{b", "%s", "\0"])
def test_examples_and_prompts_are_never_templates(text):
    settings = NegativePrompts(template="{examples} // {prompt}", separator=" {prompt} ")
    assert settings.render([text, "b"], "P") == f"{text} {{prompt}} b // P"
    assert settings.render(["a"], text) == f"a // {text}"


def test_without_examples_the_negative_prompt_is_the_prompt():
    assert make_pool(num_examples=0).draw(3, "PQ", PLENTY) == ([ord("P"), ord("Q")], [])
    assert make_pool(num_real=0).draw(3, "PQ", PLENTY) == ([ord("P"), ord("Q")], [])
    assert make_pool(num_real=0, template="{examples}").draw(3, "PQ", PLENTY).sources == []


# --- cut


def test_whole_examples_are_dropped_until_the_rest_fits():
    pool = make_pool(num_real=9, num_examples=9, separator=" ")
    whole = pool.draw(0, "P", PLENTY)
    assert len(whole.token_ids) == 9 * 3 - 1 + 2
    for max_tokens in range(1, 29):
        drawn = pool.draw(0, "P", max_tokens)
        num_kept = max(0, (max_tokens - 1) // 3)  # three characters each, "P" and the line end
        assert drawn.sources == whole.sources[:num_kept]
        assert len(drawn.token_ids) <= max_tokens
        assert text_of(drawn).endswith("P")


def test_a_prompt_that_does_not_fit_comes_back_as_it_is():
    drawn = make_pool().draw(0, "long prompt", 3)
    assert (text_of(drawn), drawn.sources) == ("long prompt", [])


def test_max_tokens_of_the_negatives_limits_them_further():
    pool = make_pool(num_real=9, num_examples=9, max_tokens=10)
    assert len(pool.draw(0, "P", PLENTY).token_ids) <= 10
    assert len(pool.draw(0, "P", PLENTY).sources) == 3
    assert len(pool.draw(0, "P", 7).sources) == 2


def test_max_takes_as_many_as_fit():
    pool = make_pool(num_real=50, num_examples="max", separator=" ")
    for max_tokens in (1, 2, 3, 4, 5, 30, 100, PLENTY):
        drawn = pool.draw(0, "P", max_tokens)
        assert len(drawn.token_ids) <= max(1, max_tokens)
        one_more = 1 + max(len(drawn.token_ids), 2) + 3
        assert len(drawn.sources) == 50 or one_more > max_tokens
    assert len(pool.draw(0, "P", PLENTY).sources) == 50
    assert pool.num_wanted(0) == 0


def test_max_does_not_read_the_whole_pool():
    pool = make_pool(num_real=20_000, num_examples="max")
    pool.draw(0, "P", 100)
    assert pool.tokenizer.num_encoded < 100


@settings(max_examples=50)
@given(
    num_real=st.integers(0, 30),
    num_examples=st.integers(0, 12) | st.just("max"),
    max_tokens=st.integers(1, 60),
    index=st.integers(0, 50),
)
def test_a_draw_is_a_prefix_of_the_permutation_and_fits(num_real, num_examples, max_tokens, index):
    pool = make_pool(num_real=num_real, num_examples=num_examples)
    order = [f"real/{m}" for m in sample_without_replacement(num_real, 0, index)]
    drawn = pool.draw(index, "P", max_tokens)
    assert drawn.sources == order[: len(drawn.sources)]
    assert len(drawn.token_ids) <= max_tokens
    expected = pool.settings.render([f"R{s.removeprefix('real/')}" for s in drawn.sources], "P")
    assert text_of(drawn) == expected
    if num_examples != "max":
        assert len(drawn.sources) <= pool.num_wanted(index) == min(num_examples, num_real)


# --- arguments


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_examples": -1}, r"negatives: num_examples must be an int .* \(or 'max'\)"),
        ({"num_examples": 2.5}, "num_examples must be an int"),
        ({"num_examples": "all"}, r"got 'all' \(or 'max'\)"),
        ({"num_examples": True}, "num_examples must be an int"),
        ({"template": "{prompt}"}, r"template must hold \{examples\}, got '\{prompt\}'"),
        ({"lag": -1}, "lag must be an int"),
        ({"share": 0}, "share must be an int"),
        ({"max_tokens": 0}, "negatives' max_tokens must be an int"),
    ],
)
def test_a_bad_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        NegativePrompts(**fields)

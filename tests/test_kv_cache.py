"""The paged cache: what is shared, what is copied, what is evicted, and who owns which block."""

from __future__ import annotations

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_engine import Guidance, SamplingParams
from steer_engine.config import FalconConfig
from steer_engine.kv_cache import Allocation, KVCache, WeightSet

BLOCK_SIZE = 4
DOMAIN, BASE = WeightSet.DOMAIN, WeightSet.BASE
CONFIG = FalconConfig.from_dict(
    {
        "model_type": "falcon",
        "vocab_size": 10,
        "hidden_size": 2,
        "num_attention_heads": 1,
        "num_hidden_layers": 2,
    }
)


def make_cache(num_blocks: int) -> KVCache:
    # int64 instead of a float dtype: a test can then write the name of a prefix into each slot.
    return KVCache(CONFIG, num_blocks, BLOCK_SIZE, torch.int64, torch.device("cpu"))


def tokens(num_tokens: int, first: int = 0) -> list[int]:
    return list(range(first, first + num_tokens))


def state_of(cache: KVCache) -> tuple:
    """Everything that decides what the cache does next; the order of free blocks included."""
    blocks = [(b.ref_count, tuple(b.keys)) for b in cache._blocks]
    return blocks, list(cache._free), dict(cache._entries)


def test_equal_prefixes_share_whole_blocks_by_reference():
    cache = make_cache(10)
    first = cache.allocate(DOMAIN, tokens(9), 12)
    second = cache.allocate(DOMAIN, tokens(9), 12)
    assert first.block_table[:2] == second.block_table[:2]
    assert first.block_table[2] != second.block_table[2]
    assert (first.num_shared, first.num_cached) == (0, 0)
    assert second.num_shared == 2
    assert cache.num_free_blocks == 10 - 4


def test_a_prefix_is_shared_within_one_weight_set_only():
    cache = make_cache(10)
    first = cache.allocate(DOMAIN, tokens(8), 8)
    second = cache.allocate(BASE, tokens(8), 8)
    assert not set(first.block_table) & set(second.block_table)
    assert (second.num_shared, second.num_cached) == (0, 0)
    third = cache.allocate(BASE, tokens(8), 8)
    assert third.block_table == second.block_table


def test_sharing_ends_at_the_first_different_token_even_if_later_blocks_are_equal():
    cache = make_cache(10)
    first = cache.allocate(DOMAIN, [1, 2, 3, 4, 5, 6, 7, 8], 8)
    second = cache.allocate(DOMAIN, [1, 2, 3, 0, 5, 6, 7, 8], 8)
    assert not set(first.block_table) & set(second.block_table)
    assert second.num_cached == 0


@pytest.mark.parametrize("prefix_len", [0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1])
def test_a_second_allocation_finds_the_whole_prefix(prefix_len):
    cache = make_cache(10)
    cache.allocate(DOMAIN, tokens(prefix_len), prefix_len + 1)
    second = cache.allocate(DOMAIN, tokens(prefix_len), prefix_len + 1)
    assert second.num_cached == prefix_len
    assert second.num_shared == prefix_len // BLOCK_SIZE
    assert second.num_copied == prefix_len % BLOCK_SIZE


def test_the_tail_is_copied_into_a_block_of_the_sequences_own():
    cache = make_cache(10)
    cache.k.fill_(-1)
    cache.v.fill_(-1)
    first = cache.allocate(DOMAIN, tokens(6), 8)
    tail = first.block_table[1]
    cache.k[:, tail] = 7
    cache.v[:, tail] = 8
    second = cache.allocate(DOMAIN, tokens(6), 8)
    own = second.block_table[1]
    assert (second.copy_from, second.copy_to, second.num_copied) == (tail, own, 2)
    assert second.num_cached == 6
    cache.copy_tails([second])
    for layer in range(2):
        assert cache.k[layer, own].flatten().tolist() == [7, 7, 7, 7, -1, -1, -1, -1]
        assert cache.v[layer, own].flatten().tolist() == [8, 8, 8, 8, -1, -1, -1, -1]
    assert second.copy_from is None
    cache.k[:, own, :2] = 9
    cache.copy_tails([second])  # done once, never again
    assert cache.k[0, own].flatten().tolist() == [9, 9, 9, 9, -1, -1, -1, -1]


def test_a_tail_of_another_length_is_not_copied():
    cache = make_cache(10)
    cache.allocate(DOMAIN, tokens(7), 8)
    shorter = cache.allocate(DOMAIN, tokens(6), 8)
    assert (shorter.num_cached, shorter.copy_from) == (4, None)


def test_a_copys_source_is_not_reused_before_the_copy():
    cache = make_cache(2)
    first = cache.allocate(DOMAIN, tokens(2), 4)
    cache.free(first)
    second = cache.allocate(DOMAIN, tokens(2), 4)
    assert second.copy_from == first.block_table[0] != second.copy_to
    assert cache.num_free_blocks == 0
    assert cache.allocate(DOMAIN, tokens(1, 50), 1) is None
    cache.copy_tails([second])
    assert cache.num_free_blocks == 1
    assert cache.allocate(DOMAIN, tokens(1, 50), 1).block_table == first.block_table


def test_where_the_copys_source_is_the_last_free_block_the_tail_is_computed_anew():
    cache = make_cache(1)
    cache.free(cache.allocate(DOMAIN, tokens(2), 4))
    second = cache.allocate(DOMAIN, tokens(2), 4)
    assert second is not None
    assert (second.num_cached, second.copy_from) == (0, None)


def test_a_copy_that_never_ran_gives_its_source_back():
    cache = make_cache(4)
    first = cache.allocate(DOMAIN, tokens(2), 4)
    second = cache.allocate(DOMAIN, tokens(2), 4)
    cache.free(second)
    cache.free(first)
    assert cache.num_free_blocks == 4
    assert all(b.ref_count == 0 for b in cache._blocks)


def test_a_freed_prefix_is_found_again():
    cache = make_cache(10)
    first = cache.allocate(DOMAIN, tokens(8), 9)
    cache.free(first)
    assert cache.num_free_blocks == 10
    again = cache.allocate(DOMAIN, tokens(8), 9)
    assert again.block_table[:2] == first.block_table[:2]
    assert again.num_cached == 8


def test_freed_blocks_are_reused_least_recently_used_first():
    cache = make_cache(4)
    old = cache.allocate(DOMAIN, tokens(4, 0), 4)
    new = cache.allocate(DOMAIN, tokens(4, 10), 4)
    cache.free(old)
    cache.free(new)
    others = [cache.allocate(DOMAIN, tokens(4, 20 + 10 * i), 4).block_table[0] for i in range(3)]
    # The two that were never used come first, then the one that was freed first.
    assert others == [2, 3, old.block_table[0]]
    assert cache.allocate(DOMAIN, tokens(4, 10), 4).num_cached == 4


def test_using_a_freed_prefix_again_makes_it_recent():
    cache = make_cache(2)
    first = cache.allocate(DOMAIN, tokens(4, 0), 4)
    second = cache.allocate(DOMAIN, tokens(4, 10), 4)
    cache.free(first)
    cache.free(second)
    cache.free(cache.allocate(DOMAIN, tokens(4, 0), 4))
    evicting = cache.allocate(DOMAIN, tokens(4, 20), 4)
    assert evicting.block_table == second.block_table


def test_the_end_of_a_prefix_is_evicted_before_its_front():
    cache = make_cache(3)
    cache.free(cache.allocate(DOMAIN, tokens(12), 12))
    cache.allocate(DOMAIN, tokens(4, 50), 4)
    assert cache.allocate(DOMAIN, tokens(8), 8).num_cached == 8


def test_blocks_without_a_prefix_are_reused_before_blocks_with_one():
    cache = make_cache(3)
    first = cache.allocate(DOMAIN, tokens(4), 12)  # one block of prompt, two for drawn tokens
    cache.free(first)
    second = cache.allocate(DOMAIN, tokens(8, 50), 8)
    assert set(second.block_table) == set(first.block_table[1:])
    assert cache.allocate(DOMAIN, tokens(4), 4).num_cached == 4


def test_an_evicted_prefix_is_computed_anew():
    cache = make_cache(2)
    cache.free(cache.allocate(DOMAIN, tokens(8), 8))
    cache.free(cache.allocate(DOMAIN, tokens(8, 50), 8))
    again = cache.allocate(DOMAIN, tokens(8), 8)
    assert (again.num_shared, again.num_cached, again.copy_from) == (0, 0, None)


def test_a_block_behind_an_evicted_front_is_not_found():
    cache = make_cache(4)
    first = cache.allocate(DOMAIN, tokens(8), 8)
    cache.free(first)
    # Eviction takes the end first, so this order is forced: the front goes, the end stays.
    cache._free.move_to_end(first.block_table[0], last=False)
    assert cache.allocate(DOMAIN, tokens(4, 50), 4).block_table == first.block_table[:1]
    assert cache.allocate(DOMAIN, tokens(4), 4).num_cached == 0
    again = cache.allocate(DOMAIN, tokens(8), 8)
    assert (again.num_shared, again.num_cached) == (1, 4)


def test_discard_leaves_nothing_findable():
    cache = make_cache(6)
    before = cache.num_free_blocks
    cache.discard(cache.allocate(DOMAIN, tokens(10), 12))
    assert cache.num_free_blocks == before
    again = cache.allocate(DOMAIN, tokens(10), 12)
    assert (again.num_cached, again.copy_from) == (0, None)


def test_discard_keeps_what_others_wrote():
    cache = make_cache(8)
    written = cache.allocate(DOMAIN, tokens(8), 8)
    cache.discard(cache.allocate(DOMAIN, [*tokens(8), 70, 71], 12))
    assert [cache._blocks[b].ref_count for b in written.block_table] == [1, 1]
    assert cache.allocate(DOMAIN, tokens(8), 8).num_cached == 8
    longer = cache.allocate(DOMAIN, [*tokens(8), 70, 71], 12)
    assert longer.num_cached == 8


def test_out_of_blocks_returns_none_and_changes_nothing():
    cache = make_cache(5)
    kept = cache.allocate(DOMAIN, tokens(8), 12)
    cache.free(cache.allocate(BASE, tokens(6, 30), 8))
    before = state_of(cache)
    assert cache.allocate(DOMAIN, tokens(8), 8 + 4 * 3) is None  # shares 2, needs 3, has 2
    assert cache.allocate(BASE, tokens(6, 30), 12) is None  # its free front counts once
    assert cache.allocate(DOMAIN, tokens(40), 40) is None
    assert state_of(cache) == before
    assert cache.allocate(DOMAIN, tokens(8), 8 + 4 * 2) is not None
    assert kept.block_table == [0, 1, 2]


def test_reset_forgets_owners_and_content():
    cache = make_cache(4)
    cache.allocate(DOMAIN, tokens(8), 16)
    cache.reset()
    assert cache.num_free_blocks == 4
    assert cache.allocate(DOMAIN, tokens(8), 16).num_cached == 0


def test_releasing_twice_is_caught():
    cache = make_cache(4)
    allocation = cache.allocate(DOMAIN, tokens(4), 8)
    cache.free(allocation)
    with pytest.raises(AssertionError, match="released once"):
        cache.free(allocation)


class Simulation:
    """A cache whose slots hold the number of the prefix that wrote them, beside plain books of who
    owns what.
    """

    def __init__(self, num_blocks: int):
        self.cache = make_cache(num_blocks)
        self.cache.k.fill_(-1)
        self.cache.v.fill_(-1)
        self.live: list[tuple[WeightSet, list[int], Allocation]] = []
        self.prefix_numbers: dict[tuple, int] = {}

    def number(self, weight_set: WeightSet, prefix: list[int], position: int) -> int:
        key = (weight_set, tuple(prefix[: position + 1]))
        return self.prefix_numbers.setdefault(key, len(self.prefix_numbers))

    def write(self, weight_set: WeightSet, prefix: list[int], table: list[int], position: int):
        number = self.number(weight_set, prefix, position)
        for layers in (self.cache.k, self.cache.v):
            layers[:, table[position // BLOCK_SIZE], position % BLOCK_SIZE] = number

    def admit(self, requests: list[tuple[WeightSet, list[int], int]], gives_up: bool) -> None:
        """Allocate all, then write and copy, as one admission of the scheduler does."""
        admitted = []
        for weight_set, prefix, num_new in requests:
            before = state_of(self.cache)
            allocation = self.cache.allocate(weight_set, prefix, len(prefix) + num_new)
            if allocation is None:
                assert state_of(self.cache) == before, "a refused allocation changed the cache"
                continue
            admitted.append((weight_set, prefix, allocation))
            self.live.append(admitted[-1])
            self.check_books()
        if gives_up and admitted:
            self.cache.discard(admitted.pop()[2])
            self.live.pop()
            self.check_books()
        for weight_set, prefix, allocation in admitted:
            for position in range(allocation.num_cached, len(prefix)):
                self.write(weight_set, prefix, allocation.block_table, position)
        self.cache.copy_tails([a for _, _, a in admitted])

    def decode_all(self) -> None:
        """Fill every slot behind the prefixes with drawn tokens that nobody may find."""
        for index, (weight_set, prefix, allocation) in enumerate(self.live):
            num_slots = len(allocation.block_table) * BLOCK_SIZE
            drawn = prefix + [1000 + index] * (num_slots - len(prefix))
            for position in range(len(prefix), num_slots):
                self.write(weight_set, drawn, allocation.block_table, position)

    def finish(self, which: int) -> None:
        if self.live:
            self.cache.free(self.live.pop(which % len(self.live))[2])

    def check_books(self) -> None:
        cache = self.cache
        counts = [0] * cache.num_blocks
        for _, _, allocation in self.live:
            assert len(set(allocation.block_table)) == len(allocation.block_table)
            for block in allocation.block_table:
                counts[block] += 1
            if allocation.copy_from is not None:
                counts[allocation.copy_from] += 1
        assert [b.ref_count for b in cache._blocks] == counts
        assert set(cache._free) == {b for b, count in enumerate(counts) if count == 0}
        # Every findable prefix lies in the block that says so.
        assert {k for b in cache._blocks for k in b.keys} == set(cache._entries)
        assert all(key in cache._blocks[block].keys for key, (_, block) in cache._entries.items())

    def check_content(self) -> None:
        for weight_set, prefix, allocation in self.live:
            for position in range(len(prefix)):
                slot = allocation.block_table[position // BLOCK_SIZE], position % BLOCK_SIZE
                expected = self.number(weight_set, prefix, position)
                found = self.cache.k[:, slot[0], slot[1]].unique().tolist()
                assert found == [expected], f"slot {slot} of prefix {prefix} holds another prefix"
                assert self.cache.v[:, slot[0], slot[1]].unique().tolist() == [expected]


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(list(WeightSet)),
        # Two tokens and many repeats make shared fronts, equal tails and near misses common.
        st.lists(st.integers(0, 1), max_size=14),
        st.integers(1, 6),
    ),
    min_size=1,
    max_size=4,
)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), REQUESTS, st.booleans()),
        st.tuples(st.just("finish"), st.integers(0, 20)),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(num_blocks=st.integers(1, 14), operations=OPERATIONS)
def test_no_block_is_lost_used_twice_or_found_with_other_content(num_blocks, operations):
    simulation = Simulation(num_blocks)
    for name, *arguments in operations:
        getattr(simulation, name)(*arguments)
        simulation.check_books()
        simulation.check_content()
        simulation.decode_all()
        simulation.check_content()
    while simulation.live:
        simulation.finish(0)
    simulation.check_books()
    assert simulation.cache.num_free_blocks == num_blocks


@pytest.mark.parametrize("domain", ["lora", "finetune"])
def test_unused_slots_full_of_nan_change_nothing(make_engine, backend, domain):
    """Prompts from 1 to two blocks and a half, so that unused slots lie behind and between."""
    engine = make_engine(backend=backend, domain=domain)
    prompts = helpers.random_prompts(6, longest=150)
    arguments = {
        "negative_prompts": prompts[::-1],
        "guidance": Guidance.steer(0.3, 0.4, form="released"),
    }
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    results = []
    for filling in (0.0, float("nan")):
        outputs = []
        for fill in (engine.kv_cache.k.fill_, engine.kv_cache.v.fill_):
            fill(filling)
        outputs.append(engine.next_token_probs(prompts, sampling=sampling, **arguments))
        for fill in (engine.kv_cache.k.fill_, engine.kv_cache.v.fill_):
            fill(filling)
        outputs.append(engine.logits(prompts))
        for fill in (engine.kv_cache.k.fill_, engine.kv_cache.v.fill_):
            fill(filling)
        outputs.append(engine.generate(prompts, sampling=sampling, **arguments))
        results.append(outputs)
    clean, poisoned = results
    assert torch.isfinite(poisoned[1]).all()
    assert torch.equal(clean[0], poisoned[0])
    assert torch.equal(clean[1], poisoned[1])
    assert clean[2] == poisoned[2]

"""The paged KV cache: reference-counted blocks, shared between sequences with equal prefixes.

A prefix is shared when weight set and tokens are equal from the first token on. Whole blocks are
shared by reference; the tokens behind the last whole block are copied into a block of the
sequence's own, because it will append there. A block whose last user is gone keeps its content
until the block is needed; the least recently used goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from .config import FalconConfig

ROOT = 0  # the parent of a sequence's first block


class WeightSet(IntEnum):
    """Whose weights wrote a block: K and V of one token differ between the models."""

    DOMAIN = 0
    BASE = 1


@dataclass(frozen=True)
class PrefixKey:
    """Identifies a block's content: the entry before it and the tokens inside.

    weight_set: whose K and V they are.
    parent: entry id of the prefix before the block; ROOT for a first block.
    token_ids: a full block, or a shorter tail.
    """

    weight_set: WeightSet
    parent: int
    token_ids: tuple[int, ...]


@dataclass
class Allocation:
    """The blocks of one pass of one sequence.

    block_table: block numbers in order.
    num_shared: how many of them, from the front, are shared with other sequences.
    num_cached: tokens of the prefix whose K and V need no computing.
    copy_from: block to copy a tail from, once its writer has run; None where nothing is to copy.
    num_copied: how many slots of it, from the front.
    copy_to: block to copy them to, the first that is not shared.
    """

    block_table: list[int]
    num_shared: int
    num_cached: int
    copy_from: int | None = None
    num_copied: int = 0
    copy_to: int | None = None


@dataclass
class _Block:
    ref_count: int = 0
    keys: list[PrefixKey] = field(default_factory=list)


class KVCache:
    """Pages of K and V for all layers, and who owns them.

    k, v: [num_layers, num_blocks, block_size, num_kv_heads, head_dim].
    """

    def __init__(
        self,
        config: FalconConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.num_blocks, self.block_size = num_blocks, block_size
        self._next_entry = ROOT + 1
        self.reset()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence uses (they may still hold a reusable prefix)."""
        return len(self._free)

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(
        self, weight_set: WeightSet, prefix: Sequence[int], num_tokens: int
    ) -> Allocation | None:
        """Take all blocks that a sequence of num_tokens will need; None if too few are free.

        The caller must write K and V of prefix[num_cached:] before the tokens of any later
        allocation run.

        prefix: the tokens that are known now (the prompt without its last token); those found in
            the cache are shared.
        """
        entries, parent = self._match_full_blocks(weight_set, prefix)
        num_shared = len(entries)
        needed = self.blocks_needed(num_tokens) - num_shared
        shared = [block for _, block in entries]
        # Shared blocks that nobody uses count as free until they are taken.
        if needed > len(self._free) - sum(self._blocks[b].ref_count == 0 for b in shared):
            return None
        for block in shared:
            self._take(block)
        num_cached = num_shared * self.block_size
        allocation = Allocation(shared, num_shared, num_cached)

        tail = tuple(prefix[num_cached:])
        source = self._entries.get(PrefixKey(weight_set, parent, tail))
        if tail and len(tail) < self.block_size and source is not None:
            # Pinned until the copy is done, lest another sequence overwrite it. If that takes the
            # last free block, computing the tail anew is the way out.
            is_free = self._blocks[source[1]].ref_count == 0
            if needed <= len(self._free) - is_free:
                self._take(source[1])
                allocation.copy_from, allocation.num_copied = source[1], len(tail)
                allocation.num_cached += len(tail)

        own = [self._take_free() for _ in range(needed)]
        if allocation.copy_from is not None:
            allocation.copy_to = own[0]
        else:
            self._register(weight_set, parent, tail, own)
        allocation.block_table = shared + own
        return allocation

    def discard(self, allocation: Allocation) -> None:
        """Give back an allocation that never ran; its unwritten blocks must not be found later."""
        for block in allocation.block_table[allocation.num_shared :]:
            self._forget(block)
        self.free(allocation)

    def reset(self) -> None:
        """Forget all owners and all content."""
        self._blocks = [_Block() for _ in range(self.num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))
        # Key -> (entry id, block). An entry id stands for the whole prefix up to here, so keys
        # chain like a trie.
        self._entries: dict[PrefixKey, tuple[int, int]] = {}

    def copy_tails(self, allocations: Sequence[Allocation]) -> None:
        """Do the pending copies of allocations whose sources have been written."""
        pending = [a for a in allocations if a.copy_from is not None]
        for allocation in pending:
            count = allocation.num_copied
            for cache in (self.k, self.v):
                cache[:, allocation.copy_to, :count] = cache[:, allocation.copy_from, :count]
            self._release(allocation.copy_from)
            allocation.copy_from = None

    def free(self, allocation: Allocation) -> None:
        """Give the blocks back; their content stays reusable until they are needed."""
        if allocation.copy_from is not None:
            self._release(allocation.copy_from)
            allocation.copy_from = None
        # Last block first, so that the front of a prefix, which more sequences share, goes last.
        for block in reversed(allocation.block_table):
            self._release(block)

    def _match_full_blocks(
        self, weight_set: WeightSet, prefix: Sequence[int]
    ) -> tuple[list[tuple[int, int]], int]:
        entries: list[tuple[int, int]] = []
        parent = ROOT
        for first in range(0, len(prefix) - self.block_size + 1, self.block_size):
            key = PrefixKey(weight_set, parent, tuple(prefix[first : first + self.block_size]))
            entry = self._entries.get(key)
            if entry is None:
                break
            entries.append(entry)
            parent = entry[0]
        return entries, parent

    def _register(
        self, weight_set: WeightSet, parent: int, token_ids: tuple[int, ...], blocks: list[int]
    ) -> None:
        """Make the blocks that this sequence will write findable, its tail included."""
        for index, first in enumerate(range(0, len(token_ids), self.block_size)):
            key = PrefixKey(weight_set, parent, token_ids[first : first + self.block_size])
            block = blocks[index]
            entry = self._entries.get(key)
            if entry is None:
                entry = (self._next_entry, block)
                self._next_entry += 1
                self._entries[key] = entry
                self._blocks[block].keys.append(key)
            parent = entry[0]

    def _take(self, block: int) -> None:
        self._blocks[block].ref_count += 1
        self._free.pop(block, None)

    def _take_free(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._blocks[block].ref_count = 1
        return block

    def _forget(self, block: int) -> None:
        for key in self._blocks[block].keys:
            del self._entries[key]
        self._blocks[block].keys = []

    def _release(self, block: int) -> None:
        state = self._blocks[block]
        assert state.ref_count > 0, "a block is released once per allocation that holds it"
        state.ref_count -= 1
        if state.ref_count == 0:
            self._free[block] = None
            if not state.keys:
                self._free.move_to_end(block, last=False)  # nothing to keep: first to be reused

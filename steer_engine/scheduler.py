"""Continuous batching: which sequences run, and what the model and the sampler read for them.

A sequence's passes, up to three, start and end together: admission takes the cache blocks of all of
them for the sequence's whole life, so a running sequence cannot run out of blocks; one that does
not fit waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from .batch import Batch, DecodeRows, build_batch
from .kv_cache import Allocation, KVCache
from .sequence import FINISH_DROPPED, DecodingSequence


class Scheduler:
    """Holds waiting and running sequences and the cache blocks of the running ones."""

    def __init__(self, kv_cache: KVCache, max_num_seqs: int):
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[DecodingSequence] = deque()
        self.running: list[DecodingSequence] = []
        self._rows: DecodeRows | None = None  # of the running sequences, once a step has run

    def admit(self) -> list[DecodingSequence]:
        """Move waiting sequences into free places, in order, as long as their blocks are free."""
        admitted = []
        while self.waiting and len(self.running) < self.max_num_seqs:
            if not self._allocate(self.waiting[0]):
                assert self.running, (
                    "a sequence that fits an empty cache is checked before it is queued"
                )
                break
            admitted.append(self.waiting.popleft())
            self.running.append(admitted[-1])
            self._rows = None
        return admitted

    def retire(self) -> list[DecodingSequence]:
        """Remove the sequences that have a finish_reason and free their blocks."""
        finished = [s for s in self.running if s.finish_reason is not None]
        if not finished:
            return finished
        self._rows = None
        self.running = [s for s in self.running if s.finish_reason is None]
        for sequence in finished:
            for running_pass in sequence.passes:
                self.kv_cache.free(running_pass.allocation)
        return finished

    def drop(self, is_unwanted: Callable[[DecodingSequence], bool]) -> None:
        """Forget the sequences that nobody waits for any more, and free their blocks."""
        self.waiting = deque(s for s in self.waiting if not is_unwanted(s))
        for sequence in self.running:
            if is_unwanted(sequence):
                sequence.finish_reason = FINISH_DROPPED
        self.retire()

    def reset(self) -> None:
        """Drop all sequences and the cache's content, which an interrupt may leave unwritten."""
        self.waiting.clear()
        self.running = []
        self._rows = None
        self.kv_cache.reset()

    def blocks_needed(self, sequence: DecodingSequence) -> int:
        """Blocks that the sequence takes if nothing is shared."""
        return sum(
            self.kv_cache.blocks_needed(len(p.prompt_ids) - 1 + sequence.sampling.max_tokens)
            for p in sequence.passes
        )

    def _allocate(self, sequence: DecodingSequence) -> bool:
        taken: list[Allocation] = []
        for running_pass in sequence.passes:
            prefix = running_pass.prompt_ids[:-1]
            # The last drawn token is never fed back, so it needs no slot.
            num_tokens = len(prefix) + sequence.sampling.max_tokens
            allocation = self.kv_cache.allocate(running_pass.weight_set, prefix, num_tokens)
            if allocation is None:
                for earlier in reversed(taken):
                    self.kv_cache.discard(earlier)
                return False
            taken.append(allocation)
            running_pass.allocation = allocation
        return True

    def prefill_batches(
        self, admitted: Sequence[DecodingSequence], max_tokens: int
    ) -> Iterator[Batch]:
        """The prompts' tokens that are not cached yet, in admission order, cut into batches.

        The last prompt token is left to the first decode step, which needs its logits. Order
        matters: a sequence may share blocks that one before it writes in the same batch.
        """
        tokens = [
            (running_pass, position)
            for sequence in admitted
            for running_pass in sequence.passes
            for position in range(
                running_pass.allocation.num_cached, len(running_pass.prompt_ids) - 1
            )
        ]
        for first in range(0, len(tokens), max_tokens):
            chunk = tokens[first : first + max_tokens]
            # Stable: the order within a weight set stays.
            chunk.sort(key=lambda item: item[0].weight_set)
            yield build_batch(
                [p for p, _ in chunk],
                [p.prompt_ids[position] for p, position in chunk],
                [position for _, position in chunk],
                block_size=self.kv_cache.block_size,
                is_prefill=True,
                device=self.kv_cache.k.device,
            )

    @property
    def most_steps_left(self) -> int:
        """Tokens that the running sequence with the most to go may still draw."""
        return max(s.sampling.max_tokens - s.step for s in self.running)

    def decode_rows(self) -> DecodeRows:
        """One token of every pass of every running sequence; the caller advances it each step."""
        if self._rows is None:
            cache = self.kv_cache
            self._rows = DecodeRows.build(self.running, cache.block_size, cache.k.device)
        return self._rows

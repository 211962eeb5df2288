"""Continuous batching: which sequences run, and what the model and the sampler read for them.

A sequence's passes, up to three, start and end together: admission takes the cache blocks of all of
them for the sequence's whole life, so a running sequence cannot run out of blocks; one that does
not fit waits. What is admitted runs its prompts, in order and in pieces, before it decodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .batch import Batch, DecodeRows, Span, build_batch
from .kv_cache import Allocation, KVCache
from .sequence import FINISH_DROPPED, DecodingSequence, RunningPass


@dataclass
class _Prefilling:
    """An admitted sequence and what of its prompts is not in the cache.

    The last token of a prompt is left to the first decode step, which needs its logits. A search
    runs its prompt itself.
    """

    sequence: DecodingSequence
    spans: deque[Span]

    @classmethod
    def of(cls, sequence: DecodingSequence) -> _Prefilling:
        spans = deque()
        for running_pass in sequence.passes if sequence.search is None else ():
            first = running_pass.allocation.num_cached
            missing = running_pass.prompt_ids[first:-1]
            if missing:
                spans.append(Span(running_pass, first, missing))
        return cls(sequence, spans)

    def take(self, max_tokens: int) -> Span:
        """The next tokens, at least one."""
        running_pass, first, input_ids = self.spans.popleft()
        if len(input_ids) > max_tokens:
            rest = Span(running_pass, first + max_tokens, input_ids[max_tokens:])
            self.spans.appendleft(rest)
        return Span(running_pass, first, input_ids[:max_tokens])


class Prefill(NamedTuple):
    """Prompt tokens of one forward.

    batch: None where the prompts were cached already.
    complete: sequences whose prompts end with it.
    """

    batch: Batch | None
    complete: list[DecodingSequence]


class Scheduler:
    """Holds the sequences, and the cache blocks of those that have been admitted.

    waiting: not admitted.
    running: decoding, their prompts are in the cache.
    """

    def __init__(self, kv_cache: KVCache, max_num_seqs: int):
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[DecodingSequence] = deque()
        self.running: list[DecodingSequence] = []
        self._prefilling: deque[_Prefilling] = deque()
        self._rows: DecodeRows | None = None  # of the running sequences, once a step has run

    @property
    def num_queued(self) -> int:
        """Sequences that have not ended."""
        return len(self.waiting) + self._num_admitted

    @property
    def _num_admitted(self) -> int:
        return len(self._prefilling) + len(self.running)

    @property
    def drawing(self) -> list[DecodingSequence]:
        """The running sequences whose tokens are drawn."""
        return [s for s in self.running if s.search is None]

    @property
    def searching(self) -> list[DecodingSequence]:
        """The running sequences whose tokens are searched for."""
        return [s for s in self.running if s.search is not None]

    def admit(self) -> None:
        """Move waiting sequences into free places, in order, as long as their blocks are free."""
        while self.waiting and self._num_admitted < self.max_num_seqs:
            if not self._allocate(self.waiting[0]):
                assert self._num_admitted, (
                    "a sequence that fits an empty cache is checked before it is queued"
                )
                break
            self._prefilling.append(_Prefilling.of(self.waiting.popleft()))

    def retire(self) -> list[DecodingSequence]:
        """Remove the sequences that have a finish_reason and free their blocks.

        Returns: those, but for dropped ones.
        """
        finished = [s for s in self.running if s.finish_reason is not None]
        if not finished:
            return finished
        self._rows = None
        self.running = [s for s in self.running if s.finish_reason is None]
        for sequence in finished:
            sequence.search_state = None  # large, and who called may keep the sequence
            for running_pass in sequence.passes:
                self.kv_cache.free(running_pass.allocation)
        return [s for s in finished if s.finish_reason != FINISH_DROPPED]

    def drop(self, is_unwanted: Callable[[DecodingSequence], bool]) -> None:
        """Forget the sequences that nobody waits for any more, and free their blocks."""
        self.waiting = deque(s for s in self.waiting if not is_unwanted(s))
        for sequence in [*self.running, *(p.sequence for p in self._prefilling)]:
            # One whose prompt is running goes when it is complete: others may share its blocks.
            if is_unwanted(sequence):
                sequence.finish_reason = FINISH_DROPPED
        self.retire()

    def reset(self) -> None:
        """Drop all sequences and the cache's content, which an interrupt may leave unwritten."""
        self.waiting.clear()
        self._prefilling.clear()
        self.running = []
        self._rows = None
        self.kv_cache.reset()

    def blocks_needed(self, sequence: DecodingSequence) -> int:
        """Blocks that the sequence takes if nothing is shared."""
        return sum(
            self.kv_cache.blocks_needed(self._num_slots(sequence, p)) for p in sequence.passes
        )

    def _num_slots(self, sequence: DecodingSequence, running_pass: RunningPass) -> int:
        """Slots of the cache that a pass takes."""
        num_tokens = sequence.num_cached_tokens(running_pass)
        if sequence.search is None:
            return num_tokens
        # Every candidate but the first has a block of its own behind those of the sequence.
        num_blocks = self.kv_cache.blocks_needed(num_tokens) + sequence.search.top_k - 1
        return num_blocks * self.kv_cache.block_size

    def _allocate(self, sequence: DecodingSequence) -> bool:
        taken: list[Allocation] = []
        for running_pass in sequence.passes:
            # A search needs the hidden states of its whole prompt, which no cache holds.
            prefix = running_pass.prompt_ids[:-1] if sequence.search is None else ()
            num_slots = self._num_slots(sequence, running_pass)
            allocation = self.kv_cache.allocate(running_pass.weight_set, prefix, num_slots)
            if allocation is None:
                for earlier in reversed(taken):
                    self.kv_cache.discard(earlier)
                return False
            taken.append(allocation)
            running_pass.allocation = allocation
        return True

    def next_prefill(self, max_tokens: int) -> Prefill | None:
        """The next prompt tokens, at most max_tokens; None if all prompts are in the cache.

        Call `start` with what is complete once the forward has run. Order matters: a sequence may
        share blocks that one before it writes in the same batch or in an earlier one.
        """
        if not self._prefilling:
            return None
        chunk: list[Span] = []
        complete: list[DecodingSequence] = []
        room = max_tokens
        while self._prefilling:
            prefilling = self._prefilling[0]
            while prefilling.spans and room > 0:
                chunk.append(prefilling.take(room))
                room -= len(chunk[-1].input_ids)
            if prefilling.spans:
                break
            complete.append(self._prefilling.popleft().sequence)
        if not chunk:
            return Prefill(None, complete)
        # Stable: the order within a weight set stays.
        chunk.sort(key=lambda span: span.running_pass.weight_set)
        batch = build_batch(
            chunk,
            block_size=self.kv_cache.block_size,
            is_prefill=True,
            device=self.kv_cache.k.device,
        )
        return Prefill(batch, complete)

    def start(self, sequences: Sequence[DecodingSequence]) -> None:
        """Let sequences decode whose prompts are in the cache."""
        self.kv_cache.copy_tails([p.allocation for s in sequences for p in s.passes])
        if sequences:
            self.running += sequences
            self._rows = None

    @property
    def most_steps_left(self) -> int:
        """Tokens that the sequence with the most to go may still draw."""
        return max(s.sampling.max_tokens - s.step for s in self.drawing)

    def decode_rows(self) -> DecodeRows:
        """One token of every pass of every drawing sequence; the caller advances it each step."""
        if self._rows is None:
            cache = self.kv_cache
            self._rows = DecodeRows.build(self.drawing, cache.block_size, cache.k.device)
        return self._rows

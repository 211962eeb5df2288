"""Continuous batching: which sequences run, and what the model and the sampler read for them.

A sequence's passes, up to three, start and end together: admission takes the cache blocks of all of
them for the sequence's whole life, so a running sequence cannot run out of blocks; one that does
not fit waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .guidance import PassKind
from .kv_cache import Allocation, KVCache, WeightSet
from .model import Batch
from .sequence import DecodingSequence, RunningPass

# Rows are stacked [domain | negative | base], so that one boundary separates the weight sets.
ROW_ORDER = (PassKind.DOMAIN, PassKind.NEGATIVE, PassKind.BASE)


class DecodeRows(NamedTuple):
    """One decode step: the batch, and where the sampler finds each pass of each sequence.

    logit_rows: [num_passes, num_seqs] int64, rows of the batch; a pass that a sequence does not run
        points at row 0 and has weight 0.
    passes: the kinds in logit_rows' order.
    """

    batch: Batch
    logit_rows: torch.Tensor
    passes: list[PassKind]


class Scheduler:
    """Holds waiting and running sequences and the cache blocks of the running ones."""

    def __init__(self, kv_cache: KVCache, max_num_seqs: int):
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[DecodingSequence] = deque()
        self.running: list[DecodingSequence] = []

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
        return admitted

    def retire(self) -> list[DecodingSequence]:
        """Remove the sequences that have a finish_reason and free their blocks."""
        finished = [s for s in self.running if s.finish_reason is not None]
        self.running = [s for s in self.running if s.finish_reason is None]
        for sequence in finished:
            for running_pass in sequence.passes:
                self.kv_cache.free(running_pass.allocation)
        return finished

    def reset(self) -> None:
        """Drop all sequences and the cache's content, which an interrupt may leave unwritten."""
        self.waiting.clear()
        self.running = []
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
            yield self._build_batch(
                [p for p, _ in chunk],
                [p.prompt_ids[position] for p, position in chunk],
                [position for _, position in chunk],
                is_prefill=True,
            )

    def decode_rows(self) -> DecodeRows:
        """One token of every pass of every running sequence, stacked [domain | negative | base]."""
        rows, input_ids, positions = [], [], []
        row_of: dict[tuple[int, PassKind], int] = {}
        for kind in ROW_ORDER:
            for index, sequence in enumerate(self.running):
                for running_pass in sequence.passes:
                    if running_pass.kind is not kind:
                        continue
                    row_of[index, kind] = len(rows)
                    rows.append(running_pass)
                    last = sequence.token_ids[-1] if sequence.step else running_pass.prompt_ids[-1]
                    input_ids.append(last)
                    positions.append(len(running_pass.prompt_ids) - 1 + sequence.step)
        present = {kind for _, kind in row_of}
        # The sampler reads the first pass as the domain's, for the plausibility cut.
        passes = [k for k in PassKind if k in present or k is PassKind.DOMAIN]
        logit_rows = [
            [row_of.get((i, kind), 0) for i in range(len(self.running))] for kind in passes
        ]
        batch = self._build_batch(rows, input_ids, positions, is_prefill=False)
        return DecodeRows(batch, self._tensor(logit_rows, np.int64), passes)

    def _build_batch(
        self,
        rows: list[RunningPass],
        input_ids: list[int],
        positions: list[int],
        *,
        is_prefill: bool,
    ) -> Batch:
        """rows: the pass that each token belongs to, domain-weight rows first."""
        table_of: dict[int, int] = {}
        tables: list[list[int]] = []
        for running_pass in rows:
            if id(running_pass) not in table_of:
                table_of[id(running_pass)] = len(tables)
                tables.append(running_pass.allocation.block_table)
        block_tables = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
        for index, table in enumerate(tables):
            block_tables[index, : len(table)] = table
        table_ids = np.array([table_of[id(p)] for p in rows], dtype=np.int32)
        position_array = np.array(positions, dtype=np.int32)
        block_size = self.kv_cache.block_size
        blocks = block_tables[table_ids, position_array // block_size].astype(np.int64)
        return Batch(
            input_ids=self._tensor(input_ids, np.int64),
            positions=self._tensor(position_array, np.int32),
            slot_mapping=self._tensor(blocks * block_size + position_array % block_size, np.int64),
            block_tables=self._tensor(block_tables, np.int32),
            table_ids=self._tensor(table_ids, np.int32),
            seq_lens=self._tensor(position_array + 1, np.int32),
            num_domain_tokens=sum(p.weight_set is WeightSet.DOMAIN for p in rows),
            is_prefill=is_prefill,
        )

    def _tensor(self, values, dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype)).to(
            self.kv_cache.k.device
        )

"""What one forward reads: the tokens of all passes, stacked, and where their keys lie.

Rows are stacked [domain | negative | base], so that one boundary separates the weight sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .guidance import PassKind
from .kernels.reference import last_slots
from .kv_cache import WeightSet
from .sequence import DecodingSequence, RunningPass

ROW_ORDER = (PassKind.DOMAIN, PassKind.NEGATIVE, PassKind.BASE)


class Batch(NamedTuple):
    """What one forward reads, flat over tokens; decode tokens and prefill tokens look alike.

    input_ids: [num_tokens] int64.
    block_tables: [num_tables, max_blocks] int32, one table per pass of a sequence.
    table_ids: [num_tokens] int32, each token's table.
    seq_lens: [num_tokens] int32, keys that each token sees, its own the last.
    num_domain_tokens: tokens before the boundary.
    block_size: slots per block of the cache.
    is_prefill: tokens of one table may stand together; else each is the last of a table of its own.
    """

    input_ids: torch.Tensor
    block_tables: torch.Tensor
    table_ids: torch.Tensor
    seq_lens: torch.Tensor
    num_domain_tokens: int
    block_size: int
    is_prefill: bool

    @property
    def positions(self) -> torch.Tensor:
        """[num_tokens] int32, each token's position in its sequence."""
        return self.seq_lens - 1

    @property
    def slot_mapping(self) -> torch.Tensor:
        """[num_tokens] int64, the cache slot where each token's K and V go."""
        return last_slots(self.block_tables, self.table_ids, self.seq_lens, self.block_size)[1]


class Span(NamedTuple):
    """Tokens of one pass that follow each other.

    first_position: of the first token in its sequence.
    """

    running_pass: RunningPass
    first_position: int
    input_ids: Sequence[int]


def build_batch(
    spans: Sequence[Span], *, block_size: int, is_prefill: bool, device: torch.device
) -> Batch:
    """spans: those of passes with the domain's weights first."""
    table_of: dict[int, int] = {}
    tables: list[list[int]] = []
    for running_pass, _, _ in spans:
        if id(running_pass) not in table_of:
            table_of[id(running_pass)] = len(tables)
            tables.append(running_pass.allocation.block_table)
    block_tables = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for index, table in enumerate(tables):
        block_tables[index, : len(table)] = table
    lengths = np.array([len(span.input_ids) for span in spans])
    is_domain = [span.running_pass.weight_set is WeightSet.DOMAIN for span in spans]
    # Positions rise by one with every token of the batch, but for a jump at the start of a span.
    ends = lengths.cumsum()
    jumps = np.array([span.first_position for span in spans]) - (ends - lengths)
    positions = np.arange(ends[-1]) + jumps.repeat(lengths)
    table_ids = np.array([table_of[id(span.running_pass)] for span in spans]).repeat(lengths)
    return Batch(
        input_ids=to_tensor([i for span in spans for i in span.input_ids], np.int64, device),
        block_tables=to_tensor(block_tables, np.int32, device),
        table_ids=to_tensor(table_ids, np.int32, device),
        seq_lens=to_tensor(positions + 1, np.int32, device),
        num_domain_tokens=int(lengths[is_domain].sum()),
        block_size=block_size,
        is_prefill=is_prefill,
    )


@dataclass(eq=False)
class DecodeRows:
    """The decode steps of one set of running sequences; each step advances it in place.

    batch: one token of every pass of every sequence.
    logit_rows: [num_passes, num_seqs] int64, where the sampler finds each pass of each sequence;
        a pass that a sequence does not run points at row 0 and has weight 0.
    passes: the kinds in logit_rows' order.
    row_seqs: [num_tokens] int64, the sequence of each row.
    limits: [num_tokens] int32, the keys that each row has slots for; behind them it runs on as a
        row without a sequence (seq_len 0) until the host looks.
    """

    batch: Batch
    logit_rows: torch.Tensor
    passes: list[PassKind]
    row_seqs: torch.Tensor
    limits: torch.Tensor

    @classmethod
    def build(
        cls, running: Sequence[DecodingSequence], block_size: int, device: torch.device
    ) -> DecodeRows:
        spans: list[Span] = []
        row_seqs, limits = [], []
        row_of: dict[tuple[int, PassKind], int] = {}
        for kind in ROW_ORDER:
            for index, sequence in enumerate(running):
                for running_pass in sequence.passes:
                    if running_pass.kind is not kind:
                        continue
                    row_of[index, kind] = len(spans)
                    row_seqs.append(index)
                    last = sequence.token_ids[-1] if sequence.step else running_pass.prompt_ids[-1]
                    first_drawn_from = len(running_pass.prompt_ids) - 1
                    spans.append(Span(running_pass, first_drawn_from + sequence.step, [last]))
                    # The last drawn token is never fed back, so it has no slot.
                    limits.append(first_drawn_from + sequence.sampling.max_tokens)
        present = {kind for _, kind in row_of}
        # The sampler reads the first pass as the domain's, for the plausibility cut.
        passes = [k for k in ROW_ORDER if k in present or k is PassKind.DOMAIN]
        logit_rows = [[row_of.get((i, kind), 0) for i in range(len(running))] for kind in passes]
        batch = build_batch(spans, block_size=block_size, is_prefill=False, device=device)
        return cls(
            batch,
            to_tensor(logit_rows, np.int64, device),
            passes,
            to_tensor(row_seqs, np.int64, device),
            to_tensor(limits, np.int32, device),
        )

    def advance(self, token_ids: torch.Tensor) -> None:
        """Append each sequence's drawn token to its passes, on the device.

        token_ids: [num_seqs] int64.
        """
        torch.index_select(token_ids, 0, self.row_seqs, out=self.batch.input_ids)
        seq_lens = self.batch.seq_lens
        has_slot = (seq_lens > 0) & (seq_lens < self.limits)
        seq_lens.add_(1).mul_(has_slot)


def to_tensor(values, dtype, device: torch.device) -> torch.Tensor:
    """Numbers of the host as a tensor of its own."""
    return torch.from_numpy(np.array(values, dtype=dtype)).to(device)

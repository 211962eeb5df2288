"""Contrastive search: the next token is likely, and its hidden state is unlike all before it.

    score(v) = (1 - penalty_alpha) * p(v) - penalty_alpha * max over j of cos(h_v, h_j)

v runs over the top_k likeliest tokens and the highest score wins, so nothing is random. p is the
model's distribution at temperature 1. h_j is the hidden state at position j, prompt included, and
h_v the one at v's position if v comes next. A hidden state is what the LM head reads: the output
of the final LayerNorm.

One step runs the candidates of all sequences as rows of one batch. A candidate's row reads the
sequence's blocks and writes its K and V to a last block of its own: the sequence's own last block
for the first candidate, one of top_k - 1 spare blocks for each other. They hold the same tokens up
to the new one; the winner's K and V are then copied into all of them. The winner's hidden state
gives the next distribution, so a step is one forward of top_k rows and one head row per sequence.

Prompts are not taken from the prefix cache, which holds K and V but no hidden states. The hidden
states take 4 * hidden_size bytes for each token of prompt and completion.

Source: Su et al. 2022 (arXiv:2202.06417).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .batch import Batch, Span, build_batch, to_tensor
from .guidance import Guidance, PassKind
from .kernels.reference.guided_sample import STATUS_NAN
from .kv_cache import KVCache
from .model import FalconModel
from .sampler import ban_endings
from .sequence import DecodingSequence


@dataclass
class SearchState:
    """What contrastive search keeps of one running sequence.

    directions: [prompt and max_tokens, hidden_size] fp32, the hidden states divided by their
        lengths; the first num_tokens are set.
    num_tokens: tokens whose K, V and hidden state are known.
    blocks: of the sequence itself, in order.
    spare_blocks: one for every candidate but the first.
    candidate_ids, candidate_logprobs: for the next token, the likeliest first.
    """

    directions: torch.Tensor
    blocks: list[int]
    spare_blocks: list[int]
    num_tokens: int = 0
    candidate_ids: list[int] = field(default_factory=list)
    candidate_logprobs: list[float] = field(default_factory=list)

    @classmethod
    def of(
        cls, sequence: DecodingSequence, kv_cache: KVCache, hidden_size: int, device: torch.device
    ) -> SearchState:
        """The state of an admitted sequence before its prompt has run."""
        (running_pass,) = sequence.passes
        table = running_pass.allocation.block_table
        num_tokens = sequence.num_cached_tokens(running_pass)
        num_blocks = kv_cache.blocks_needed(num_tokens)
        directions = torch.empty(num_tokens, hidden_size, dtype=torch.float32, device=device)
        return cls(directions, table[:num_blocks], table[num_blocks:])

    def append(self, direction: torch.Tensor) -> None:
        """Take the hidden state of the next token, [hidden_size]."""
        self.directions[self.num_tokens] = direction
        self.num_tokens += 1

    def last_blocks(self, block_size: int) -> list[int]:
        """The block where each candidate for the next token writes."""
        return [self.blocks[self.num_tokens // block_size], *self.spare_blocks]


class ContrastiveSearcher:
    """Runs the sequences that have `search` set, on the engine's model and cache."""

    def __init__(self, model: FalconModel, kv_cache: KVCache):
        self.model, self.kv_cache = model, kv_cache

    def prefill(self, sequences: Sequence[DecodingSequence], max_tokens: int) -> None:
        """Run the prompts of admitted sequences, at most so many tokens at a time."""
        model, cache = self.model, self.kv_cache
        for s in sequences:
            s.search_state = SearchState.of(s, cache, model.config.hidden_size, model.device)
        tokens = [(s, i) for s in sequences for i in range(len(s.passes[0].prompt_ids))]
        for first in range(0, len(tokens), max_tokens):
            chunk = tokens[first : first + max_tokens]
            batch = build_batch(
                [Span(s.passes[0], i, s.passes[0].prompt_ids[i : i + 1]) for s, i in chunk],
                block_size=cache.block_size,
                is_prefill=True,
                device=model.device,
            )
            residual = model.forward(batch, cache)
            directions = self._directions(residual)
            for row, (sequence, _) in enumerate(chunk):
                sequence.search_state.append(directions[row])
            self._propose(
                {
                    row: sequence
                    for row, (sequence, position) in enumerate(chunk)
                    if position == len(sequence.passes[0].prompt_ids) - 1
                },
                residual,
            )
        for sequence in sequences:
            self._copy_last_block(sequence.search_state)

    def step(self, sequences: Sequence[DecodingSequence]) -> None:
        """Append one token to every sequence that has not ended."""
        sequences = [s for s in sequences if s.finish_reason is None]
        if not sequences:
            return
        residual = self.model.forward(self._candidate_batch(sequences), self.kv_cache)
        directions = self._directions(residual)
        counts = [len(s.search_state.candidate_ids) for s in sequences]
        candidates = directions.split(counts)
        penalties = torch.cat(
            [self._penalties(s.search_state, c) for s, c in zip(sequences, candidates, strict=True)]
        )
        going_on: dict[int, DecodingSequence] = {}
        winners = []
        first = 0
        for sequence, its_penalties in zip(sequences, penalties.cpu().split(counts), strict=True):
            winner = _choose(sequence, its_penalties.tolist())
            winners.append(winner)
            if sequence.finish_reason is None:
                going_on[first + winner] = sequence
            first += len(its_penalties)
        self._keep(sequences, candidates, winners)
        self._propose(going_on, residual)

    def _candidate_batch(self, sequences: Sequence[DecodingSequence]) -> Batch:
        """A row for every candidate of every sequence, each with a table of its own."""
        block_size, device = self.kv_cache.block_size, self.model.device
        tables, input_ids, seq_lens = [], [], []
        for sequence in sequences:
            state = sequence.search_state
            shared = state.blocks[: state.num_tokens // block_size]
            own = state.last_blocks(block_size)[: len(state.candidate_ids)]
            tables += [[*shared, block] for block in own]
            input_ids += state.candidate_ids
            seq_lens += [state.num_tokens + 1] * len(own)
        block_tables = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
        for row, table in zip(block_tables, tables, strict=True):
            row[: len(table)] = table
        return Batch(
            input_ids=to_tensor(input_ids, np.int64, device),
            block_tables=to_tensor(block_tables, np.int32, device),
            table_ids=torch.arange(len(tables), dtype=torch.int32, device=device),
            seq_lens=to_tensor(seq_lens, np.int32, device),
            num_domain_tokens=len(tables),
            block_size=block_size,
            is_prefill=False,
        )

    def _directions(self, residual: torch.Tensor) -> torch.Tensor:
        """The hidden states, each divided by its length: [num_rows, hidden_size] fp32."""
        hidden = torch.empty(residual.shape, dtype=torch.float32, device=residual.device)
        self.model.final_norm(residual, len(residual), hidden)
        return hidden / torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)

    def _penalties(self, state: SearchState, candidates: torch.Tensor) -> torch.Tensor:
        """The largest cosine of each candidate with what came before it: [num_candidates] fp32.

        A product of the engine's own, whose bits depend on neither neighbours nor threads.
        """
        before = state.directions[: state.num_tokens]
        ops, out = self.model.ops, before.new_empty(len(before), len(candidates))
        ops.linear(before, ops.pack_weight(candidates.contiguous()), out)
        return out.amax(dim=0)

    def _propose(self, last_tokens: dict[int, DecodingSequence], residual: torch.Tensor) -> None:
        """Find the candidates for the next token of some sequences.

        last_tokens: the row of residual at which each of them ends.
        """
        if not last_tokens:
            return
        model, sequences = self.model, list(last_tokens.values())
        rows = to_tensor([list(last_tokens)], np.int64, model.device)
        guidances = [Guidance.none()] * len(sequences)
        head = model.head_rows(guidances, (PassKind.DOMAIN,), folds=False)
        logits = model.compute_logits(residual, rows, head)
        ban_endings(logits, head.weights, sequences, num_ahead=0)
        logits = logits[0]
        is_usable = (logits < torch.inf).all(dim=-1).tolist()  # NaN is not
        counts = [s.search.num_candidates(model.config.vocab_size) for s in sequences]
        token_ids = top_tokens(logits, max(counts))
        # Not logsumexp: it adds a single row up in as many parts as there are threads.
        logprobs = logits.log_softmax(dim=-1).gather(1, token_ids).tolist()
        for i, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            state = sequence.search_state
            state.candidate_ids = token_ids[i, :count].tolist()
            state.candidate_logprobs = logprobs[i][:count]
            if not is_usable[i]:
                sequence.append(0, math.nan, STATUS_NAN)

    def _keep(
        self,
        sequences: Sequence[DecodingSequence],
        candidates: Sequence[torch.Tensor],
        winners: Sequence[int],
    ) -> None:
        """Copy the winners' K and V to all blocks that will be read, and their hidden states."""
        block_size = self.kv_cache.block_size
        copied_from, copied_to, offsets = [], [], []
        for sequence, directions, winner in zip(sequences, candidates, winners, strict=True):
            if sequence.finish_reason is not None:
                continue
            state = sequence.search_state
            blocks = state.last_blocks(block_size)
            copied_from += [blocks[winner]] * len(blocks)
            copied_to += blocks
            offsets += [state.num_tokens % block_size] * len(blocks)
            state.append(directions[winner])
        source, target, offset = (
            to_tensor(values, np.int64, self.model.device)
            for values in (copied_from, copied_to, offsets)
        )
        for cache in (self.kv_cache.k, self.kv_cache.v):
            cache[:, target, offset] = cache[:, source, offset]

    def _copy_last_block(self, state: SearchState) -> None:
        """Give every candidate the tokens of the prompt's last block, unless that one is full."""
        count = state.num_tokens % self.kv_cache.block_size
        if not count or not state.spare_blocks:
            return
        own, *spare = state.last_blocks(self.kv_cache.block_size)
        for cache in (self.kv_cache.k, self.kv_cache.v):
            cache[:, spare, :count] = cache[:, own, :count].unsqueeze(1)


def _choose(sequence: DecodingSequence, penalties: list[float]) -> int:
    """Append the candidate with the highest score, the likelier one of equals; returns its index.

    penalties: the largest cosine of each candidate.
    """
    state, alpha = sequence.search_state, sequence.search.penalty_alpha
    scores = [
        # A token that may not be drawn has probability 0, which alone would not keep it out.
        (1 - alpha) * math.exp(logprob) - alpha * penalty if logprob > -math.inf else -math.inf
        for logprob, penalty in zip(state.candidate_logprobs, penalties, strict=True)
    ]
    winner = max(range(len(scores)), key=scores.__getitem__)
    status = STATUS_NAN if any(map(math.isnan, scores)) else 0
    sequence.append(state.candidate_ids[winner], state.candidate_logprobs[winner], status)
    return winner


def top_tokens(logits: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens with the largest logits, in the order (logit descending, index ascending).

    logits: [num_rows, vocab_size] fp32. torch.topk leaves the order of equal values open, so it
    is given distinct integers: the logit's bits in an order-preserving form, and the index below.
    Returns: [num_rows, count] int64.
    """
    bits = (logits + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    indices = torch.arange(logits.shape[1], device=logits.device)
    return ((ordered << 32) - indices).topk(count, dim=-1).indices

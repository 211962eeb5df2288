"""Decode steps captured as CUDA graphs: one launch per step instead of some hundred.

A graph reads and writes the same addresses at every replay, so a set of running sequences is copied
into buffers of its own, padded to the next size for which a graph exists: rows without a sequence
have seq_len 0, write no K and V, and draw a token that nobody reads. Everything that changes from
step to step lies on the device and is advanced there. What is drawn is the same with and without.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .batch import Batch, DecodeRows
from .guidance import PassKind
from .head import HeadRows
from .kernels.reference import Sampled, prepare_parameters
from .kv_cache import KVCache
from .model import FalconModel
from .sampler import Draw
from .sequence import DecodingSequence

MAX_GRAPHS = 64
NUM_WARM_UPS = 2

Step = Callable[[], Sampled]
Capture = Callable[[Step], Step]


class StepShape(NamedTuple):
    """What a graph is captured for. A seed is a number in the launch, so it counts as well."""

    num_domain_tokens: int
    num_base_tokens: int
    num_seqs: int
    passes: tuple[PassKind, ...]
    num_head_rows: int
    num_domain_head_rows: int
    seed: int

    @classmethod
    def of(cls, draw: Draw, seed: int) -> StepShape:
        batch, head = draw.rows.batch, draw.head
        num_tokens = batch.input_ids.shape[0]
        return cls(
            padded(batch.num_domain_tokens),
            padded(num_tokens - batch.num_domain_tokens),
            padded(len(draw.stream_ids)),
            tuple(head.passes),
            len(head.weights),
            head.num_domain_rows,
            seed,
        )


def padded(count: int) -> int:
    """The next size at or above count: eight between a power of two and the next."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


def capture_cuda_graph(step: Step) -> Step:
    """Capture a step whose rows are all without a sequence; running it changes nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(NUM_WARM_UPS):  # compiles, and lets buffers grow
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampled = step()

    def replay() -> Sampled:
        graph.replay()
        return sampled

    return replay


class StaticStep:
    """One decode step on buffers that stay where they are.

    loaded: whose state the buffers hold and advance.
    """

    def __init__(
        self,
        shape: StepShape,
        model: FalconModel,
        kv_cache: KVCache,
        draw_op: Callable[..., Sampled],
        max_blocks: int,
        capture: Capture,
    ):
        self._shape, self._model, self._kv_cache, self._draw_op = shape, model, kv_cache, draw_op
        self._rows = self._empty_rows(max_blocks)
        self._draw = self._empty_draw()
        self.loaded: Draw | None = None
        self._replay = capture(self._run)
        # The model replaces its buffers when it needs larger ones; the graph keeps to these.
        self._kept_alive = model.buffers

    def load(self, draw: Draw) -> None:
        """Take over the running sequences, unless they are those of the last step."""
        if draw is self.loaded:
            return
        self._load_rows(draw.rows)
        own, head, given = self._draw, self._draw.head, draw.head
        for static, values in zip(head[2:], given[2:], strict=True):
            _fill(static, values, dim=-1)
        for static, values in zip(own.parameters, draw.parameters, strict=True):
            _fill(static, values, dim=0)
        _fill(own.stream_ids, draw.stream_ids, dim=0)
        _fill(own.steps, draw.steps, dim=0)
        self.loaded = draw

    def __call__(self) -> Sampled:
        """Draw and advance; what is returned is the caller's."""
        num_seqs = len(self.loaded.stream_ids)
        return Sampled(*(field[:num_seqs].clone() for field in self._replay()))

    def _run(self) -> Sampled:
        rows, draw = self._rows, self._draw
        residual = self._model.forward(rows.batch, self._kv_cache)
        logits = self._model.compute_logits(residual, rows.logit_rows, draw.head)
        sampled = self._draw_op(
            logits,
            draw.head.weights,
            draw.parameters,
            seed=self._shape.seed,
            stream_ids=draw.stream_ids,
            steps=draw.steps,
        )
        draw.steps.add_(1)
        rows.advance(sampled.token_ids)
        return sampled

    def _load_rows(self, rows: DecodeRows) -> None:
        own, given, shape = self._rows, rows, self._shape
        num_domain, first_base = given.batch.num_domain_tokens, shape.num_domain_tokens
        parts = [(slice(0, num_domain), 0), (slice(num_domain, None), first_base)]
        for static, values in (
            (own.batch.input_ids, given.batch.input_ids),
            (own.batch.seq_lens, given.batch.seq_lens),
            (own.row_seqs, given.row_seqs),
            (own.limits, given.limits),
        ):
            static.zero_()
            for part, first in parts:
                static[first : first + len(values[part])] = values[part]
        # A decode row has a table of its own, in the same order.
        tables, num_blocks = given.batch.block_tables, given.batch.block_tables.shape[1]
        for part, first in parts:
            own.batch.block_tables[first : first + len(tables[part]), :num_blocks] = tables[part]
        behind = given.logit_rows >= num_domain
        moved = given.logit_rows + behind * (first_base - num_domain)
        _fill(own.logit_rows, moved, dim=-1)

    def _empty_rows(self, max_blocks: int) -> DecodeRows:
        shape, device = self._shape, self._model.device
        num_tokens = shape.num_domain_tokens + shape.num_base_tokens

        def zeros(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        batch = Batch(
            input_ids=zeros(num_tokens, dtype=torch.int64),
            block_tables=zeros(num_tokens, max_blocks, dtype=torch.int32),
            table_ids=torch.arange(num_tokens, dtype=torch.int32, device=device),
            seq_lens=zeros(num_tokens, dtype=torch.int32),
            num_domain_tokens=shape.num_domain_tokens,
            block_size=self._kv_cache.block_size,
            is_prefill=False,
        )
        return DecodeRows(
            batch,
            zeros(len(shape.passes), shape.num_seqs, dtype=torch.int64),
            list(shape.passes),
            zeros(num_tokens, dtype=torch.int64),
            zeros(num_tokens, dtype=torch.int32),
        )

    def _empty_draw(self) -> Draw:
        shape, device = self._shape, self._model.device
        head_size = (shape.num_head_rows, shape.num_seqs)
        head = HeadRows(
            shape.passes,
            shape.num_domain_head_rows,
            torch.zeros(head_size[0], len(shape.passes), head_size[1], device=device),
            torch.zeros(head_size, dtype=torch.bool, device=device),
            torch.zeros(head_size, device=device),
        )
        ones = torch.ones(shape.num_seqs, device=device)
        off = torch.zeros_like(ones)
        parameters = prepare_parameters(ones, ones, off.int(), off, self._model.config.vocab_size)
        return Draw(self._rows, head, parameters, off.long(), off.int())


def _fill(static: torch.Tensor, values: torch.Tensor, dim: int) -> None:
    """Copy values to the front of a larger buffer and repeat the last one behind them."""
    count = values.shape[dim]
    static.narrow(dim, 0, count).copy_(values)
    static.narrow(dim, count, static.shape[dim] - count).copy_(values.narrow(dim, count - 1, 1))


class DecodeGraphs:
    """The captured steps of an engine, by shape; the least recently used is dropped first."""

    def __init__(
        self,
        model: FalconModel,
        kv_cache: KVCache,
        draw_op: Callable[..., Sampled],
        max_model_len: int,
        capture: Capture = capture_cuda_graph,
    ):
        max_blocks = kv_cache.blocks_needed(max_model_len)
        self._arguments = (model, kv_cache, draw_op, max_blocks, capture)
        self._steps: OrderedDict[StepShape, StaticStep] = OrderedDict()
        self._last: StaticStep | None = None

    def step_for(
        self, draw: Draw, running: Sequence[DecodingSequence], seed: int
    ) -> StaticStep | None:
        """The step of these sequences, loaded; None if they need the host between two tokens."""
        if any(sequence.sampling.min_tokens for sequence in running):
            return None
        shape = StepShape.of(draw, seed)
        step = self._steps.get(shape)
        if step is None:
            step = self._steps[shape] = StaticStep(shape, *self._arguments)
            if len(self._steps) > MAX_GRAPHS:
                self._steps.popitem(last=False)
        self._steps.move_to_end(shape)
        if self._last is not step:
            if self._last is not None:
                assert self._last.loaded is not draw, "a running set keeps its seed"
                self._last.loaded = None
            self._last = step
        step.load(draw)
        return step

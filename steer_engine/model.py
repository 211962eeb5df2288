"""The Falcon forward pass over the stacked rows of all passes.

Rows of the domain weights (domain and negative passes) come first, the base's behind one boundary.
A LoRA domain model shares the base's weights: a product's weight is [W | scale*B], and its input is
[x | A x] for domain rows, [x | 0] for base rows, so one product serves all passes. A full fine-tune
has weights of its own and splits each product at the boundary. The residual stream is fp32.

Where one norm feeds attention and MLP (Falcon-7B), a layer is two products, on one wide buffer:

    [up | q | k | v] = norm(residual) [W_up, W_qkv]^T       GELU on up
    q = attention(q, k, v)                                  in place; k and v go to the cache
    residual += [up | q] [W_down | W_dense]^T

An adapter's A x of the second product takes the columns of k and v, which are in the cache by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

import torch

from .batch import Batch
from .config import FalconConfig
from .guidance import Guidance, PassKind
from .head import HeadRows, head_rows
from .kv_cache import KVCache

ROW_ALIGNMENT = 64  # numbers; rows of a buffer begin at a multiple of it


class Buffers(NamedTuple):
    """What a forward computes in; contents are garbage between layers but for the residual.

    residual: [num_rows, hidden_size] fp32.
    normed: [num_rows, at least hidden_size], a norm's output; room for A x behind it.
    wide: [num_rows, at least ffn_hidden_size + qkv_size], laid out [up | q | k | v].
    """

    residual: torch.Tensor
    normed: torch.Tensor
    wide: torch.Tensor

    @classmethod
    def allocate(
        cls, num_rows: int, widths: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> Buffers:
        """widths: of residual, normed and wide."""

        def rows(width: int, dtype: torch.dtype) -> torch.Tensor:
            aligned = -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT
            return torch.empty(num_rows, aligned, dtype=dtype, device=device)[:, :width]

        residual, normed, wide = widths
        return cls(rows(residual, torch.float32), rows(normed, dtype), rows(wide, dtype))

    def first(self, num_rows: int) -> Buffers:
        return Buffers(*(b[:num_rows] for b in self))


@dataclass
class StackedLinear:
    """One product for both weight sets.

    ops: the backend's module of functions.
    weight, bias: the base's; scale*B stands beside the weight where lora_a is set, as its tail if
        the weight is in int8 or compressed.
    domain_weight, domain_bias: a full fine-tune's own; None where the domain shares the base's.
    lora_a: A of an adapter, or None.
    """

    ops: ModuleType
    weight: NamedTuple
    bias: torch.Tensor | None = None
    domain_weight: NamedTuple | None = None
    domain_bias: torch.Tensor | None = None
    lora_a: NamedTuple | None = None

    @property
    def width(self) -> int:
        """Columns of the input, those for A x included."""
        return self.weight.in_features

    def __call__(
        self, x: torch.Tensor, num_domain: int, out: torch.Tensor, **epilogue
    ) -> torch.Tensor:
        """Apply the product to x, [num_rows, width]; writes and returns out.

        With an adapter the last columns of x are overwritten with A x, or 0 in the base's rows.

        num_domain: rows below it use the domain weights.
        epilogue: gelu_columns or accumulate, see reference.linear.
        """
        linear = self.ops.linear
        if self.domain_weight is not None:
            weights = (self.domain_weight, self.weight)
            biases = None if self.bias is None else (self.domain_bias, self.bias)
            return self.ops.grouped_linear(x, weights, num_domain, out, biases=biases, **epilogue)
        if self.lora_a is not None:
            in_features = self.lora_a.in_features
            linear(x[:num_domain, :in_features], self.lora_a, x[:num_domain, in_features:])
            x[num_domain:, in_features:] = 0
        return linear(x, self.weight, out, bias=self.bias, **epilogue)


@dataclass
class StackedNorm:
    """A LayerNorm for both weight sets.

    base, domain: (weight, bias), each [hidden_size] fp32; domain is None where the base's serves.
    """

    ops: ModuleType
    eps: float
    base: tuple[torch.Tensor, torch.Tensor]
    domain: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor, num_domain: int, out: torch.Tensor) -> torch.Tensor:
        """Normalise x, [num_rows, hidden_size] fp32, into the front columns of out; returns out."""
        to = out[:, : x.shape[1]]
        if self.domain is None:
            self.ops.layer_norm(x, *self.base, self.eps, to)
        else:
            self.ops.layer_norm(x[:num_domain], *self.domain, self.eps, to[:num_domain])
            self.ops.layer_norm(x[num_domain:], *self.base, self.eps, to[num_domain:])
        return out


@dataclass
class FusedLayer:
    """A block whose attention and MLP read one norm: two products (see the head of this file)."""

    norm: StackedNorm
    up_qkv: StackedLinear
    down_dense: StackedLinear

    @property
    def products(self) -> tuple[StackedLinear, ...]:
        return (self.up_qkv, self.down_dense)

    def forward(
        self, buffers: Buffers, config: FalconConfig, num_domain: int, attend: Callable
    ) -> None:
        """Add the block's output to the residual. attend: of one layer, in place over q."""
        residual, normed, wide = buffers
        ffn = config.ffn_hidden_size
        up_qkv = wide[:, : ffn + config.qkv_size]
        self.norm(residual, num_domain, normed)
        self.up_qkv(normed[:, : self.up_qkv.width], num_domain, up_qkv, gelu_columns=ffn)
        attend(up_qkv[:, ffn:])
        self.down_dense(wide[:, : self.down_dense.width], num_domain, residual, accumulate=True)


@dataclass
class SplitLayer:
    """A block with a norm each for attention and MLP: four products on the same buffers."""

    attention_norm: StackedNorm
    mlp_norm: StackedNorm
    qkv: StackedLinear
    dense: StackedLinear
    up: StackedLinear
    down: StackedLinear

    @property
    def products(self) -> tuple[StackedLinear, ...]:
        return (self.qkv, self.dense, self.up, self.down)

    def forward(
        self, buffers: Buffers, config: FalconConfig, num_domain: int, attend: Callable
    ) -> None:
        """See FusedLayer.forward."""
        residual, normed, wide = buffers
        ffn = config.ffn_hidden_size
        qkv = wide[:, ffn : ffn + config.qkv_size]
        self.attention_norm(residual, num_domain, normed)
        self.qkv(normed[:, : self.qkv.width], num_domain, qkv)
        attend(qkv)
        # In a parallel block both branches read the residual before either adds to it.
        if config.is_parallel:
            self._up(buffers, num_domain, ffn)
        self.dense(wide[:, ffn : ffn + self.dense.width], num_domain, residual, accumulate=True)
        if not config.is_parallel:
            self._up(buffers, num_domain, ffn)
        self.down(wide[:, : self.down.width], num_domain, residual, accumulate=True)

    def _up(self, buffers: Buffers, num_domain: int, ffn: int) -> None:
        residual, normed, wide = buffers
        self.mlp_norm(residual, num_domain, normed)
        self.up(normed[:, : self.up.width], num_domain, wide[:, :ffn], gelu_columns=ffn)


@dataclass
class FalconModel:
    """Weights of one or both models, and the forward pass over stacked rows.

    Domain parts (domain_embedding, domain_head, those of the layers) are None where the base's
    serve. A tied head is the embedding itself. Buffers are kept between calls, so what a call
    returns holds until the next one.
    """

    config: FalconConfig
    ops: ModuleType
    dtype: torch.dtype
    device: torch.device
    embedding: NamedTuple
    head: NamedTuple
    domain_embedding: NamedTuple | None
    domain_head: NamedTuple | None
    layers: list[FusedLayer | SplitLayer]
    final_norm: StackedNorm
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    alibi: torch.Tensor | None
    _buffers: Buffers | None = field(default=None, init=False)
    _logits: torch.Tensor | None = field(default=None, init=False)

    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """Run all tokens of the batch and write their K and V.

        Returns: the residual, [num_tokens, hidden_size] fp32.
        """
        num_domain = batch.num_domain_tokens
        slots = (batch.positions, batch.slot_mapping) if batch.is_prefill else None
        buffers = self._buffers_for(batch.input_ids.shape[0])
        self._embed(batch.input_ids, num_domain, buffers.residual)
        for index, layer in enumerate(self.layers):

            def attend(qkv: torch.Tensor, index: int = index) -> None:
                self._attend(qkv, batch, slots, kv_cache.k[index], kv_cache.v[index])

            layer.forward(buffers, self.config, num_domain, attend)
        return buffers.residual

    @property
    def buffers(self) -> tuple[Buffers | None, torch.Tensor | None]:
        """What forward and compute_logits write to, until they need more."""
        return self._buffers, self._logits

    @property
    def num_bytes(self) -> int:
        """Bytes of all weight matrices as they are stored; a tied head counts once."""
        packed = [self.embedding, self.head, self.domain_embedding, self.domain_head]
        for product in self._all_products():
            packed += [product.weight, product.domain_weight, product.lora_a]
        return sum({t.data_ptr(): t.nbytes for t in _tensors(packed)}.values())

    def head_rows(
        self, guidances: Sequence[Guidance], passes: Sequence[PassKind], *, folds: bool
    ) -> HeadRows:
        """See head.head_rows."""
        return head_rows(
            guidances,
            passes,
            folds=folds,
            shares_head=self.domain_head is None,
            dtype=self.dtype,
            device=self.device,
        )

    def compute_logits(
        self, residual: torch.Tensor, logit_rows: torch.Tensor, head: HeadRows
    ) -> torch.Tensor:
        """Logits [num_rows, num_seqs, vocab_size] fp32 of the head's rows.

        residual: [num_tokens, hidden_size] fp32.
        logit_rows: [num_passes, num_seqs] int64, rows of residual.
        """
        num_rows, num_passes, num_seqs = head.coefficients.shape
        logits = self._logits_for(num_rows, num_seqs)
        shape = (num_passes, num_seqs, self.config.hidden_size)
        hidden = torch.empty(shape, dtype=torch.float32, device=self.device)
        for kind, rows, out in zip(head.passes, logit_rows, hidden, strict=True):
            self.final_norm(residual[rows], 0 if kind is PassKind.BASE else num_seqs, out)
        x = torch.stack(
            [
                self._combine(hidden, coefficients, is_low)
                for coefficients, is_low in zip(head.coefficients, head.is_low, strict=True)
            ]
        )
        # All rows of a head in one product, so that its weights are read once.
        rows, out = x.flatten(0, 1), logits.flatten(0, 1)
        if self.domain_head is None:
            self.ops.linear(rows, self.head, out)
        else:
            boundary = head.num_domain_rows * num_seqs
            self.ops.grouped_linear(rows, (self.domain_head, self.head), boundary, out)
        return logits

    def _combine(
        self, hidden: torch.Tensor, coefficients: torch.Tensor, is_low: torch.Tensor
    ) -> torch.Tensor:
        """One row of HeadRows for all sequences: [num_seqs, hidden_size] in the model's dtype."""
        total = torch.zeros_like(hidden[0])
        for pass_hidden, coefficient in zip(hidden, coefficients, strict=True):
            # A pass that a sequence does not run may hold anything.
            term = torch.where(coefficient[:, None] == 0, 0.0, pass_hidden * coefficient[:, None])
            total = total + term
        rounded = total.to(self.dtype)
        return torch.where(is_low[:, None], (total - rounded.float()).to(self.dtype), rounded)

    def _attend(
        self,
        qkv: torch.Tensor,
        batch: Batch,
        slots: tuple[torch.Tensor, torch.Tensor] | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> None:
        """Rotary, KV write and attention of one layer; the result replaces q.

        slots: positions and slot_mapping of a prefill; None in a decode step.
        """
        config = self.config
        cos, sin = self.rotary or (None, None)
        keys = (k_cache, v_cache, batch.block_tables, batch.table_ids, batch.seq_lens)
        attended = qkv[:, : config.hidden_size]
        rest = (self.alibi, config.num_heads, 1.0 / math.sqrt(config.head_dim), attended)
        if slots is None:
            self.ops.mqa_decode(qkv, cos, sin, *keys, *rest)
            return
        self.ops.rotary_and_store(qkv, cos, sin, *slots, config.num_heads, k_cache, v_cache)
        self.ops.paged_attention(qkv, *keys, *rest)

    def _embed(self, input_ids: torch.Tensor, num_domain: int, out: torch.Tensor) -> None:
        if self.domain_embedding is None:
            out.copy_(self.ops.embedding(self.embedding, input_ids))
            return
        out[:num_domain] = self.ops.embedding(self.domain_embedding, input_ids[:num_domain])
        out[num_domain:] = self.ops.embedding(self.embedding, input_ids[num_domain:])

    def _buffers_for(self, num_rows: int) -> Buffers:
        if self._buffers is None or len(self._buffers.residual) < num_rows:
            hidden, ffn = self.config.hidden_size, self.config.ffn_hidden_size
            # A x may begin at the end of any input, so the widest adapter fits behind all of them.
            rank = max(p.lora_a.out_features if p.lora_a else 0 for p in self._all_products())
            widths = (hidden, hidden + rank, ffn + max(self.config.qkv_size, hidden + rank))
            self._buffers = Buffers.allocate(num_rows, widths, self.dtype, self.device)
        return self._buffers.first(num_rows)

    def _all_products(self) -> list[StackedLinear]:
        return [product for layer in self.layers for product in layer.products]

    def _logits_for(self, num_rows: int, num_seqs: int) -> torch.Tensor:
        """[num_rows, num_seqs, vocab_size] fp32, from the front of a buffer that only grows."""
        shape = (num_rows, num_seqs, self.config.vocab_size)
        if self._logits is None or self._logits.numel() < math.prod(shape):
            self._logits = torch.empty(math.prod(shape), dtype=torch.float32, device=self.device)
        return self._logits[: math.prod(shape)].view(shape)


def _tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """The tensors among the values and, where one is a weight, among its fields."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)

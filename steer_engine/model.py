"""The Falcon forward pass over the stacked rows of all passes.

Rows of the domain weights (domain and negative passes) come first, the base's behind one boundary.
A LoRA domain model shares the base's weights: an adapted module is one matrix [W | scale*B], and
its input is [x | A x] for domain rows, [x | 0] for base rows, so one product serves all passes. A
full fine-tune has weights of its own and splits each product at the boundary. The residual stream
is fp32.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from .checkpoint import Checkpoint, ModuleKind
from .config import FalconConfig
from .errors import CheckpointError
from .guidance import PassKind
from .kv_cache import KVCache
from .lora import LoraAdapter

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What one forward reads, flat over tokens; decode tokens and prefill tokens look alike.

    input_ids: [num_tokens] int64.
    positions: [num_tokens] int32.
    slot_mapping: [num_tokens] int64, the cache slot where each token's K and V go.
    block_tables: [num_tables, max_blocks] int32, one table per pass of a sequence.
    table_ids: [num_tokens] int32, each token's table.
    seq_lens: [num_tokens] int32, keys that each token sees.
    num_domain_tokens: tokens before the boundary.
    is_prefill: tokens of one table may stand together; else each is the last of a table of its own.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    table_ids: torch.Tensor
    seq_lens: torch.Tensor
    num_domain_tokens: int
    is_prefill: bool


@dataclass
class StackedLinear:
    """One linear module for both weight sets.

    ops: the backend's module of functions.
    weight, bias: the base's; scale*B stands beside the weight where lora_a is set.
    domain_weight, domain_bias: a full fine-tune's own; None where the domain shares the base's.
    lora_a: A of an adapter, or None.
    """

    ops: ModuleType
    weight: NamedTuple
    bias: torch.Tensor | None = None
    domain_weight: NamedTuple | None = None
    domain_bias: torch.Tensor | None = None
    lora_a: NamedTuple | None = None

    def __call__(
        self, x: torch.Tensor, num_domain: int, out: torch.Tensor, **epilogue
    ) -> torch.Tensor:
        """Apply the module to x, [num_rows, in_features]; writes and returns out.

        num_domain: rows below it use the domain weights.
        epilogue: gelu_columns or accumulate, see reference.linear.
        """
        linear = self.ops.linear
        if self.domain_weight is not None:
            pieces = (
                (slice(0, num_domain), self.domain_weight, self.domain_bias),
                (slice(num_domain, None), self.weight, self.bias),
            )
            for rows, weight, bias in pieces:
                linear(x[rows], weight, out[rows], bias=bias, **epilogue)
            return out
        if self.lora_a is not None:
            num_rows, in_features = x.shape
            extended = x.new_zeros(num_rows, self.weight.in_features)
            extended[:, :in_features] = x
            linear(x[:num_domain], self.lora_a, extended[:num_domain, in_features:])
            x = extended
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

    def __call__(self, x: torch.Tensor, num_domain: int, dtype: torch.dtype) -> torch.Tensor:
        """Normalise x, [num_rows, hidden_size] fp32; returns the same shape in dtype."""
        out = torch.empty_like(x, dtype=dtype)
        if self.domain is None:
            return self.ops.layer_norm(x, *self.base, self.eps, out)
        self.ops.layer_norm(x[:num_domain], *self.domain, self.eps, out[:num_domain])
        self.ops.layer_norm(x[num_domain:], *self.base, self.eps, out[num_domain:])
        return out


@dataclass
class Layer:
    """One block. mlp_norm is None where attention and MLP share a norm."""

    attention_norm: StackedNorm
    mlp_norm: StackedNorm | None
    linears: dict[ModuleKind, StackedLinear]


@dataclass
class FalconModel:
    """Weights of one or both models, and the forward pass over stacked rows.

    Domain parts (domain_embedding, domain_head, those of the layers) are None where the base's
    serve. A tied head is the embedding itself.
    """

    config: FalconConfig
    ops: ModuleType
    dtype: torch.dtype
    device: torch.device
    embedding: NamedTuple
    head: NamedTuple
    domain_embedding: NamedTuple | None
    domain_head: NamedTuple | None
    layers: list[Layer]
    final_norm: StackedNorm
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    alibi: torch.Tensor | None

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """Run all tokens of the batch and write their K and V.

        Returns: the residual, [num_tokens, hidden_size] fp32.
        """
        config, num_domain = self.config, batch.num_domain_tokens
        num_tokens = batch.input_ids.shape[0]
        residual = self._embed(batch.input_ids, num_domain)
        qkv = self._buffer(num_tokens, config.qkv_size)
        attended = self._buffer(num_tokens, config.hidden_size)
        up = self._buffer(num_tokens, config.ffn_hidden_size)
        for index, layer in enumerate(self.layers):
            normed = layer.attention_norm(residual, num_domain, self.dtype)
            layer.linears[ModuleKind.QKV](normed, num_domain, qkv)
            self._attend(qkv, batch, kv_cache, index, attended)
            if config.is_parallel:
                # Both branches read the residual before either adds to it.
                if layer.mlp_norm is not None:
                    normed = layer.mlp_norm(residual, num_domain, self.dtype)
                layer.linears[ModuleKind.DENSE](attended, num_domain, residual, accumulate=True)
            else:
                layer.linears[ModuleKind.DENSE](attended, num_domain, residual, accumulate=True)
                normed = layer.mlp_norm(residual, num_domain, self.dtype)
            layer.linears[ModuleKind.UP](
                normed, num_domain, up, gelu_columns=config.ffn_hidden_size
            )
            layer.linears[ModuleKind.DOWN](up, num_domain, residual, accumulate=True)
        return residual

    @torch.inference_mode()
    def compute_logits(
        self, residual: torch.Tensor, logit_rows: torch.Tensor, passes: list[PassKind]
    ) -> torch.Tensor:
        """Logits of chosen rows: [num_passes, num_seqs, vocab_size] fp32.

        residual: [num_tokens, hidden_size] fp32.
        logit_rows: [num_passes, num_seqs] int64, rows of residual.
        passes: the kind of each line of logit_rows, which decides the weight set.
        """
        num_passes, num_seqs = logit_rows.shape
        shape = (num_passes, num_seqs, self.config.vocab_size)
        logits = torch.empty(shape, dtype=torch.float32, device=self.device)
        rows = residual[logit_rows.flatten()]
        if self.final_norm.domain is None and self.domain_head is None:
            normed = self.final_norm(rows, 0, self.dtype)
            self.ops.linear(normed, self.head, logits.flatten(0, 1))
            return logits
        for kind, part, out in zip(passes, rows.split(num_seqs), logits, strict=True):
            is_base = kind is PassKind.BASE
            normed = self.final_norm(part, 0 if is_base else num_seqs, self.dtype)
            self.ops.linear(normed, self.head if is_base else self.domain_head or self.head, out)
        return logits

    def _attend(
        self, qkv: torch.Tensor, batch: Batch, kv_cache: KVCache, layer: int, out: torch.Tensor
    ) -> None:
        """Rotary, KV write and attention of one layer; writes out."""
        config = self.config
        k_cache, v_cache = kv_cache.k[layer], kv_cache.v[layer]
        cos, sin = self.rotary or (None, None)
        keys = (k_cache, v_cache, batch.block_tables, batch.table_ids, batch.seq_lens)
        rest = (self.alibi, config.num_heads, 1.0 / math.sqrt(config.head_dim), out)
        if not batch.is_prefill:
            self.ops.mqa_decode(qkv, cos, sin, *keys, *rest)
            return
        slots = (batch.positions, batch.slot_mapping)
        self.ops.rotary_and_store(qkv, cos, sin, *slots, config.num_heads, k_cache, v_cache)
        self.ops.paged_attention(qkv, *keys, *rest)

    def _embed(self, input_ids: torch.Tensor, num_domain: int) -> torch.Tensor:
        if self.domain_embedding is None:
            return self.ops.embedding(self.embedding, input_ids)
        return torch.cat(
            (
                self.ops.embedding(self.domain_embedding, input_ids[:num_domain]),
                self.ops.embedding(self.embedding, input_ids[num_domain:]),
            )
        )

    def _buffer(self, num_tokens: int, size: int) -> torch.Tensor:
        return torch.empty(num_tokens, size, dtype=self.dtype, device=self.device)


def rotary_tables(config: FalconConfig, max_model_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * theta**(-2 i / head_dim).

    Returns: two tables, [max_model_len, head_dim / 2] fp32 each.
    Source: RoPE, Su et al. 2021 (arXiv:2104.09864).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def alibi_table(config: FalconConfig, max_model_len: int) -> torch.Tensor:
    """Alibi's bias per head and key position, divided by sqrt(head_dim).

    Falcon-RW was trained with slopes, positions and their products rounded to bf16; rounding alike
    keeps the logits.

    Returns: [num_heads, max_model_len] fp32.
    Source: Press et al. 2021 (arXiv:2108.12409).
    """
    power = 2 ** math.floor(math.log2(config.num_heads))
    num_extra = config.num_heads - power
    slopes = torch.pow(torch.tensor(2.0 ** (-8 / power)), torch.arange(1, power + 1))
    extra = torch.pow(torch.tensor(2.0 ** (-4 / power)), 2 * torch.arange(num_extra) + 1)
    slopes = torch.cat((slopes, extra))
    products = slopes[:, None].bfloat16() * torch.arange(max_model_len)
    return products.float() / math.sqrt(config.head_dim)


class ModelLoader:
    """Streams checkpoints into a FalconModel tensor by tensor, so no second copy exists."""

    def __init__(
        self,
        base: Checkpoint,
        domain: Checkpoint | LoraAdapter | None,
        ops: ModuleType,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.base = base
        self.finetune = domain if isinstance(domain, Checkpoint) else None
        self.adapter = domain if isinstance(domain, LoraAdapter) else None
        self.ops, self.dtype, self.device = ops, dtype, device
        self._changes_logits = self.adapter is None or self.adapter.head is not None

    def load(self, max_model_len: int) -> FalconModel:
        """Read all weights.

        Raises: CheckpointError for NaN, infinity, files that changed since they were checked, and
            an adapter whose updates are all 0.
        """
        config = self.base.config
        embedding = self._pack(self.base.read_embedding())
        head = self._head(self.base, embedding)
        domain_embedding = domain_head = None
        if self.finetune is not None:
            domain_embedding = self._pack(self.finetune.read_embedding())
            domain_head = self._head(self.finetune, domain_embedding)
        elif self.adapter is not None and self.adapter.head is not None:
            domain_head = self._pack(self.adapter.read_head())
        layers = []
        for index in range(config.num_layers):
            layers.append(self._layer(index))
            logger.info("loaded layer %d of %d", index + 1, config.num_layers)
        if not self._changes_logits:
            raise CheckpointError(
                f"{self.adapter.directory}: every LoRA update is 0, so domain and base are the "
                "same model; train the adapter before using it"
            )
        tables = None if config.uses_alibi else rotary_tables(config, max_model_len)
        alibi = alibi_table(config, max_model_len).to(self.device) if config.uses_alibi else None
        return FalconModel(
            config=config,
            ops=self.ops,
            dtype=self.dtype,
            device=self.device,
            embedding=embedding,
            head=head,
            domain_embedding=domain_embedding,
            domain_head=domain_head,
            layers=layers,
            final_norm=self._norm(
                self.base.read_final_norm(), self.finetune and self.finetune.read_final_norm()
            ),
            rotary=tables and tuple(t.to(self.device) for t in tables),
            alibi=alibi,
        )

    def _layer(self, index: int) -> Layer:
        base_norms = self.base.read_norms(index)
        domain_norms = self.finetune.read_norms(index) if self.finetune else [None] * 2
        norms = [self._norm(b, d) for b, d in zip(base_norms, domain_norms, strict=False)]
        return Layer(
            attention_norm=norms[0],
            mlp_norm=norms[1] if len(norms) > 1 else None,
            linears={kind: self._linear(index, kind) for kind in ModuleKind},
        )

    def _linear(self, layer: int, kind: ModuleKind) -> StackedLinear:
        weight = self.base.read_linear(layer, kind)
        lora = self.adapter.read(layer, kind) if self.adapter else None
        if lora is not None:
            self._changes_logits |= bool(lora.a.any() and lora.b.any())
            weight = torch.cat((weight.to(self.dtype), lora.b.to(self.dtype)), dim=1)
        stacked = StackedLinear(
            ops=self.ops,
            weight=self._pack(weight),
            bias=self._vector(self.base.read_linear_bias(layer, kind)),
            lora_a=None if lora is None else self._pack(lora.a),
        )
        if self.finetune is not None:
            stacked.domain_weight = self._pack(self.finetune.read_linear(layer, kind))
            stacked.domain_bias = self._vector(self.finetune.read_linear_bias(layer, kind))
        return stacked

    def _head(self, checkpoint: Checkpoint, embedding):
        head = checkpoint.read_untied_head()
        return embedding if head is None else self._pack(head)

    def _norm(self, base, domain) -> StackedNorm:
        def to_fp32(pair):
            return tuple(self._vector(t) for t in pair) if pair else None

        return StackedNorm(
            self.ops, self.base.config.layer_norm_epsilon, to_fp32(base), to_fp32(domain)
        )

    def _vector(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.float().to(self.device)

    def _pack(self, weight: torch.Tensor):
        return self.ops.pack_weight(weight.to(self.device, self.dtype))

"""FalconModel with the forward pass as one call into csrc (csrc/cpu/forward.h).

The ops and their arguments are those of FalconModel, so the bits are the same; what is saved is the
way back to Python and the start of threads for every op, which for a small model is most of a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch

from .batch import Batch
from .guidance import PassKind
from .head import HeadRows
from .kernels.cpu import CompressedWeight
from .kernels.reference import Int8Weight, LinearWeight
from .kv_cache import KVCache
from .model import FalconModel, FusedLayer, SplitLayer, StackedLinear, StackedNorm

ABSENT = 0  # a null address
Weight = LinearWeight | Int8Weight | CompressedWeight


class CpuFalconModel(FalconModel):
    """See FalconModel; for weights in csrc's layout on the CPU."""

    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        buffers = self._buffers_for(batch.input_ids.shape[0])
        cos, sin = self.rotary or (None, None)
        torch.ops.steer_engine.forward(
            self._model_table,
            self._layer_table,
            self.config.layer_norm_epsilon,
            batch.input_ids,
            batch.block_tables,
            batch.table_ids,
            batch.seq_lens,
            batch.num_domain_tokens,
            cos,
            sin,
            self.alibi,
            kv_cache.k,
            kv_cache.v,
            *buffers,
        )
        return buffers.residual

    def compute_logits(
        self, residual: torch.Tensor, logit_rows: torch.Tensor, head: HeadRows
    ) -> torch.Tensor:
        num_rows, _, num_seqs = head.coefficients.shape
        logits = self._logits_for(num_rows, num_seqs)
        torch.ops.steer_engine.logits(
            self._model_table,
            self.config.layer_norm_epsilon,
            residual,
            logit_rows,
            [kind is PassKind.BASE for kind in head.passes],
            head.num_domain_rows,
            head.coefficients,
            head.is_low,
            torch.empty(num_rows * num_seqs, self.config.hidden_size, dtype=self.dtype),
            logits,
        )
        return logits

    @cached_property
    def _model_table(self) -> torch.Tensor:
        """struct ModelWeights."""
        config = self.config
        is_fused = isinstance(self.layers[0], FusedLayer)
        fields = [
            *_norm_fields(self.final_norm),
            *_flat(map(_weight_fields, (self.embedding, self.domain_embedding))),
            *_flat(map(_weight_fields, (self.head, self.domain_head))),
            config.hidden_size,
            config.ffn_hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.vocab_size,
            config.num_layers,
            int(is_fused),
            int(config.is_parallel),
        ]
        return torch.tensor([fields], dtype=torch.int64)

    @cached_property
    def _layer_table(self) -> torch.Tensor:
        """struct LayerWeights, one row per layer."""
        return torch.tensor([_layer_fields(layer) for layer in self.layers], dtype=torch.int64)


def _layer_fields(layer: FusedLayer | SplitLayer) -> list[int]:
    if isinstance(layer, FusedLayer):
        norms, products = (layer.norm, None), (layer.up_qkv, layer.down_dense, None, None)
    else:
        norms = (layer.attention_norm, layer.mlp_norm)
        products = (layer.up, layer.down, layer.qkv, layer.dense)
    return [*_flat(map(_norm_fields, norms)), *_flat(map(_product_fields, products))]


def _norm_fields(norm: StackedNorm | None) -> list[int]:
    """struct StackedNorm."""
    if norm is None:
        return [ABSENT] * 4
    return [_address(t) for t in (*norm.base, *(norm.domain or (None, None)))]


def _product_fields(product: StackedLinear | None) -> list[int]:
    """struct StackedProduct."""
    if product is None:
        return [ABSENT] * 13
    weight, lora_a = product.weight, product.lora_a
    lora_b = None if isinstance(weight, LinearWeight) else weight.tail
    return [
        *_weight_fields(weight),
        _address(product.bias),
        *_weight_fields(product.domain_weight),
        _address(product.domain_bias),
        _address(lora_a and lora_a.data),
        _address(lora_b and lora_b.data),
        weight.out_features,
        product.width,
        0 if lora_a is None else lora_a.out_features,
    ]


def _weight_fields(weight: Weight | None) -> list[int]:
    """struct PackedWeight."""
    scales = weight.scales if isinstance(weight, Int8Weight) else None
    raw = weight.raw if isinstance(weight, CompressedWeight) else None
    return [_address(weight and weight.data), _address(scales), _address(raw)]


def _address(tensor: torch.Tensor | None) -> int:
    return ABSENT if tensor is None else tensor.data_ptr()


def _flat(parts: Iterable[list[int]]) -> list[int]:
    return [field for part in parts for field in part]

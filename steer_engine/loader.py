"""Streams checkpoints into a FalconModel, tensor by tensor, so that no second copy exists."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch

from . import ops
from .checkpoint import Checkpoint, ModuleKind, linear_shape
from .config import FalconConfig
from .cpu_model import CpuFalconModel
from .errors import CheckpointError
from .lora import LoraAdapter, LoraWeights
from .model import FalconModel, FusedLayer, SplitLayer, StackedLinear, StackedNorm

logger = logging.getLogger(__name__)


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
    """Reads base and domain and packs their weights for one backend."""

    def __init__(
        self,
        base: Checkpoint,
        domain: Checkpoint | LoraAdapter | None,
        backend: str,
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_int8: bool = False,
    ):
        """is_int8: quantise the products' weights and the head; the rest stays in dtype."""
        self.base = base
        self.finetune = domain if isinstance(domain, Checkpoint) else None
        self.adapter = domain if isinstance(domain, LoraAdapter) else None
        self.ops, self.dtype, self.device = ops.implementation(backend), dtype, device
        self._is_int8 = is_int8
        self._model_class = CpuFalconModel if backend == "cpu" else FalconModel
        self._changes_logits = self.adapter is None or self.adapter.head is not None

    def load(self, max_model_len: int) -> FalconModel:
        """Read all weights.

        Raises: CheckpointError for NaN, infinity, files that changed since they were checked, and
            an adapter whose updates are all 0.
        """
        config = self.base.config
        embedding = self._pack_lossless(self.base.read_embedding())
        head = self._head(self.base, embedding)
        domain_embedding = domain_head = None
        if self.finetune is not None:
            domain_embedding = self._pack_lossless(self.finetune.read_embedding())
            domain_head = self._head(self.finetune, domain_embedding)
        elif self.adapter is not None and self.adapter.head is not None:
            domain_head = self._pack_product(self.adapter.read_head())
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
        return self._model_class(
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

    def _layer(self, index: int) -> FusedLayer | SplitLayer:
        base_norms = self.base.read_norms(index)
        domain_norms = self.finetune.read_norms(index) if self.finetune else [None] * 2
        norms = [self._norm(b, d) for b, d in zip(base_norms, domain_norms, strict=False)]
        if len(norms) == 1:
            return FusedLayer(
                norm=norms[0],
                up_qkv=self._linear(index, (ModuleKind.UP, ModuleKind.QKV), same_input=True),
                down_dense=self._linear(
                    index, (ModuleKind.DOWN, ModuleKind.DENSE), same_input=False
                ),
            )
        products = {kind.name.lower(): self._linear(index, (kind,)) for kind in ModuleKind}
        return SplitLayer(attention_norm=norms[0], mlp_norm=norms[1], **products)

    def _linear(
        self, layer: int, kinds: Sequence[ModuleKind], *, same_input: bool = True
    ) -> StackedLinear:
        """One product that does the work of several modules.

        same_input: the modules read one input and their outputs stand side by side; else their
            inputs stand side by side and their outputs are added.
        """
        weight = self._joined_weight(self.base, layer, kinds, same_input)
        lora = self._joined_adapter(layer, kinds, same_input)
        stacked = StackedLinear(
            ops=self.ops,
            weight=self._pack_product(weight, None if lora is None else lora.b),
            bias=self._joined_bias(self.base, layer, kinds, same_input),
            lora_a=None if lora is None else self._pack(lora.a),
        )
        if self.finetune is not None:
            stacked.domain_weight = self._pack_product(
                self._joined_weight(self.finetune, layer, kinds, same_input)
            )
            stacked.domain_bias = self._joined_bias(self.finetune, layer, kinds, same_input)
        return stacked

    def _joined_weight(self, checkpoint, layer, kinds, same_input) -> torch.Tensor:
        weights = [checkpoint.read_linear(layer, kind) for kind in kinds]
        return weights[0] if len(weights) == 1 else torch.cat(weights, dim=0 if same_input else 1)

    def _joined_bias(self, checkpoint, layer, kinds, same_input) -> torch.Tensor | None:
        biases = [self._vector(checkpoint.read_linear_bias(layer, kind)) for kind in kinds]
        if biases[0] is None:
            return None
        return torch.cat(biases) if same_input else torch.stack(biases).sum(dim=0)

    def _joined_adapter(self, layer, kinds, same_input) -> LoraWeights | None:
        """A and scaled B of the joined product; None if no module of it is adapted.

        same_input: A of all modules below each other, B block-diagonal; else the other way round.
        """
        adapters = [self.adapter.read(layer, kind) if self.adapter else None for kind in kinds]
        if all(adapter is None for adapter in adapters):
            return None
        a_parts, b_parts = [], []
        for kind, adapter in zip(kinds, adapters, strict=True):
            if adapter is None:
                out_features, in_features = linear_shape(kind, self.base.config)
                adapter = LoraWeights(torch.empty(0, in_features), torch.empty(out_features, 0))
            self._changes_logits |= bool(adapter.a.any() and adapter.b.any())
            a_parts.append(adapter.a)
            b_parts.append(adapter.b)
        if same_input:
            return LoraWeights(torch.cat(a_parts), torch.block_diag(*b_parts))
        return LoraWeights(torch.block_diag(*a_parts), torch.cat(b_parts, dim=1))

    def _head(self, checkpoint: Checkpoint, embedding):
        head = checkpoint.read_untied_head()
        if head is not None:
            return self._pack_product(head)
        # The embedding's rows are looked up, not multiplied: there int8 would save no time.
        return self._pack_product(checkpoint.read_embedding()) if self._is_int8 else embedding

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

    def _pack_lossless(self, weight: torch.Tensor, b: torch.Tensor | None = None):
        """[weight | b], where b is an adapter's; compressed where the backend can and it pays."""
        weight = weight.to(self.device, self.dtype)
        b = None if b is None else b.to(self.device, self.dtype)
        compress = getattr(self.ops, "compress_weight", None)
        compressed = compress and compress(weight, b)
        if compressed is not None:
            return compressed
        return self.ops.pack_weight(weight if b is None else torch.cat((weight, b), dim=1))

    def _pack_product(self, weight: torch.Tensor, b: torch.Tensor | None = None):
        """[weight | b], where b is an adapter's: small, and not quantised."""
        if not self._is_int8:
            return self._pack_lossless(weight, b)
        # From the checkpoint's own numbers: rounding them to bf16 first would be one error more.
        if weight.dtype == torch.float16:
            weight = weight.float()
        b = None if b is None else b.to(self.device, self.dtype)
        return self.ops.pack_int8_weight(weight.to(self.device), b)

"""The plain PyTorch twin of every op: the definition, on CPU and GPU."""

from .attention import paged_attention, rotary_and_store
from .guided_sample import Sampled, guided_probs, guided_sample
from .layer_norm import layer_norm
from .linear import LinearWeight, embedding, linear, pack_weight

__all__ = [
    "LinearWeight",
    "Sampled",
    "embedding",
    "guided_probs",
    "guided_sample",
    "layer_norm",
    "linear",
    "pack_weight",
    "paged_attention",
    "rotary_and_store",
]

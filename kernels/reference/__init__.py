"""The plain PyTorch twin of every op: the definition, on CPU and GPU."""

from .attention import last_slots, mqa_decode, paged_attention, rotary_and_store
from .guided_sample import Sampled, guided_probs, guided_sample
from .layer_norm import layer_norm
from .linear import LinearWeight, embedding, linear, pack_weight

__all__ = [
    "LinearWeight",
    "Sampled",
    "embedding",
    "guided_probs",
    "guided_sample",
    "last_slots",
    "layer_norm",
    "linear",
    "mqa_decode",
    "pack_weight",
    "paged_attention",
    "rotary_and_store",
]

"""The plain PyTorch twin of every op: the definition, on CPU and GPU."""

from .attention import last_slots, mqa_decode, paged_attention, rotary_and_store
from .guided_sample import (
    Sampled,
    SamplingTensors,
    draw,
    guided_probs,
    guided_sample,
    prepare_parameters,
)
from .layer_norm import layer_norm
from .linear import (
    Int8Weight,
    LinearWeight,
    embedding,
    grouped_linear,
    linear,
    pack_int8_weight,
    pack_weight,
)

__all__ = [
    "Int8Weight",
    "LinearWeight",
    "Sampled",
    "SamplingTensors",
    "draw",
    "embedding",
    "grouped_linear",
    "guided_probs",
    "guided_sample",
    "last_slots",
    "layer_norm",
    "linear",
    "mqa_decode",
    "pack_int8_weight",
    "pack_weight",
    "paged_attention",
    "prepare_parameters",
    "rotary_and_store",
]

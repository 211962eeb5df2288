"""The Triton backend: a kernel for every op but embedding and guided_probs, the reference's.

Importing this module needs triton. The kernels are proven against the reference in Triton's
interpreter and compiled for sm_80 and sm_90; they have not run on a GPU yet.
"""

from .grouped_linear import grouped_linear
from .guided_sample import draw, guided_sample
from .layer_norm import layer_norm
from .linear import linear, pack_weight
from .mqa_decode import mqa_decode, paged_attention
from .reference import embedding, guided_probs
from .rotary_and_store import rotary_and_store

__all__ = [
    "draw",
    "embedding",
    "grouped_linear",
    "guided_probs",
    "guided_sample",
    "layer_norm",
    "linear",
    "mqa_decode",
    "pack_weight",
    "paged_attention",
    "rotary_and_store",
]

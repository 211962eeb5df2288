"""The Triton backend: its own kernels where they are written, the reference's ops for the rest.

Importing this module needs triton. The kernels are proven against the reference in Triton's
interpreter and compiled for sm_80 and sm_90; they have not run on a GPU yet.
"""

from .guided_sample import guided_sample
from .layer_norm import layer_norm
from .linear import linear, pack_weight
from .reference import (
    embedding,
    guided_probs,
    mqa_decode,
    paged_attention,
    rotary_and_store,
)

__all__ = [
    "embedding",
    "guided_probs",
    "guided_sample",
    "layer_norm",
    "linear",
    "mqa_decode",
    "pack_weight",
    "paged_attention",
    "rotary_and_store",
]

"""Philox4x32-10, the counter-based generator behind every random choice.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Random123).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
MASK_32 = 0xFFFFFFFF

# The fourth counter word separates the uses of one seed.
STREAM_TOKENS = 0
STREAM_NEGATIVES = 1


class Words(NamedTuple):
    """Four 32-bit words, each in the low half of an int64 tensor (or a Python int)."""

    w0: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    w3: torch.Tensor


def _high_word(product):
    # The product wraps to 64 bits; the mask turns the arithmetic shift into a logical one.
    return (product >> 32) & MASK_32


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds of Philox4x32 on int64 tensors of equal shape, or on plain integers.

    Args:
        counter: four words in [0, 2**32).
        key: two words in [0, 2**32).
    Returns: four words in [0, 2**32), uniform and independent over distinct (counter, key).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        product0 = c0 * MULTIPLIERS[0]
        product1 = c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            _high_word(product1) ^ c1 ^ k0,
            product1 & MASK_32,
            _high_word(product0) ^ c3 ^ k1,
            product0 & MASK_32,
        )
        k0 = (k0 + KEY_INCREMENTS[0]) & MASK_32
        k1 = (k1 + KEY_INCREMENTS[1]) & MASK_32
    return Words(c0, c1, c2, c3)


def split_seed(seed: int) -> tuple[int, int]:
    """The 64-bit seed as the two key words, low word first."""
    return seed & MASK_32, (seed >> 32) & MASK_32


def random_bits(seed: int, stream_ids, steps, stream: int):
    """64 random bits per element as two 32-bit words (high, low).

    counter = (step, stream id low, stream id high, stream), key = seed; word 0 is the high half.

    Args:
        seed: int in [0, 2**64).
        stream_ids, steps: int64 tensors of equal shape, or ints.
        stream: which use of the seed this is (STREAM_TOKENS, STREAM_NEGATIVES).
    """
    counter = Words(
        steps & MASK_32, stream_ids & MASK_32, (stream_ids >> 32) & MASK_32, steps * 0 + stream
    )
    words = philox4x32(counter, split_seed(seed))
    return words.w0, words.w1

"""Guided sampling in Triton; reference/guided_sample.py defines it, and this file meets it bit for
bit: the same token, status, kept count and total mass, for every batch and every split.

    x_v = (w_d*l_d[v] + w_b*l_b[v] + w_n*l_n[v]) * (1/T)
    token ~ softmax(x), cut by alpha, then top-k, then top-p

How the nucleus is found without a sort. A token's *rank* is one integer, (order-preserving bits of
x_v, then the index reversed): ranks are distinct, and sorting by rank is the definition's order (x
descending, index ascending), ties included. Top-k and top-p then are the same question: the largest
rank at which a sum over the tokens at or above it reaches a target, of 1 per token (target k) or of
integer mass (target ceil(top_p * Z)). It is answered by narrowing a bracket:

    launch           one program owns           does
    domain_max       a slice of one row         max of l_d, for rows with alpha > 0
    combine          a slice of one row         x_v, status bits, highest rank (its x is max x)
    ladder, twice    a slice of one row         count and mass at or above 16 pivots, which divide
                                                the bracket evenly; 1st: [max x - 30, infinity)
    collect          a slice of one row         the ranks inside the final bracket, as a list
    select           one row                    narrows on the list alone: for top-k, then top-p
    block_mass       a slice of one row         kept mass of each block of the vocabulary
    draw             one row                    the random number; its block; its token

The programs of a row meet in a few integers (`counters`), added or maximised atomically: integer
sums depend on no order, so neither does any result. The bracket is not stored: whoever needs it
replays the rounds from their sums (a handful of 16-wide reductions). Any pivots give a right
bracket; their choice decides only how long the list is. If it is long (all logits equal), select
reads more blocks, at most 13 times: nothing overflows, and every loop is bounded.

Rejected: a last-arriver finish with a sorted bracket (tickets, resets and a 4096-wide tl.sort,
for two launches less); a radix select over the whole row (8 rounds of 16 masked sums).

Traffic per row of V tokens, R passes of b bytes: V*(R*b + 4) to combine, then 4V for each of two
ladder rounds, collect and block_mass, together V*(R*b + 20); with alpha another V*b. Up to about
150 rows, x stays in the L2 cache after combine. A ladder round is 169 instructions per token on
sm_90 (counted in SASS), of which 16 * 6 are sums of 64-bit masses and of counts: with hundreds of
rows it is bound by arithmetic, not by memory. Not timed yet; LaunchConfig.num_rounds = 1 trades a
round for longer lists.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .reference import guided_sample as reference_guided_sample
from .reference.guided_sample import (
    Sampled,
    SamplingTensors,
    checked_parameters,
    signed_seed,
)

# The definition's constants, in the form that kernels can read.
definition = sys.modules[reference_guided_sample.__module__]
LOG2_E = tl.constexpr(definition.LOG2_E)
MAX_LOGIT = tl.constexpr(definition.MAX_LOGIT)
MASS_BITS = tl.constexpr(definition.MASS_BITS)
LOWEST_EXPONENT = tl.constexpr(definition.LOWEST_EXPONENT)
C0, C1, C2, C3, C4, C5, C6 = (tl.constexpr(c) for c in definition.EXP2_COEFFICIENTS)
STATUS_NAN = tl.constexpr(definition.STATUS_NAN)
STATUS_EMPTY = tl.constexpr(definition.STATUS_EMPTY)
STATUS_INF = tl.constexpr(definition.STATUS_INF)
STREAM_TOKENS = tl.constexpr(definition.STREAM_TOKENS)

ROUND_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2**23: (t + it) - it rounds t half to even
LOWEST_FINITE = tl.constexpr(torch.finfo(torch.float32).min)
SPAN = tl.constexpr(30.0)  # nats; a token further below the best one has mass 0
INDEX_BITS = tl.constexpr(20)  # of a rank; the other 32 hold x
INDEX_MASK = tl.constexpr((1 << 20) - 1)
MAX_VOCAB_SIZE = 1 << 20

# Columns of counters, all zero when a call starts.
DOMAIN_MAX = tl.constexpr(0)  # as a rank
BEST = tl.constexpr(1)  # highest rank
STATUS = tl.constexpr(2)
LIST_LEN = tl.constexpr(3)
SUMS = tl.constexpr(4)  # per ladder round: NUM_PIVOTS masses, then NUM_PIVOTS counts
NUM_PIVOTS = tl.constexpr(16)


@triton.jit
def _first_rank(x):
    """The lowest rank of value x: `rank >= it` says `value >= x`. int64 > 0; -0 ranks as +0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    return key << INDEX_BITS


@triton.jit
def _rank(x, index):
    """Order-preserving bits of x, then the index reversed (INDEX_MASK - index)."""
    return _first_rank(x) | (index ^ INDEX_MASK).to(tl.int64)


@triton.jit
def _value_of(rank):
    key = ((rank >> INDEX_BITS) - 2147483648).to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _index_of(rank):
    return (rank & INDEX_MASK) ^ INDEX_MASK


@triton.jit
def _mass(x, x_max):
    """The definition's exp2_mass((x - x_max) * log2 e), operation by operation."""
    t = (x - x_max) * LOG2_E
    usable = t > LOWEST_EXPONENT  # False for -inf and NaN
    t = tl.where(usable, t, 0.0)
    n = (t + ROUND_TO_INTEGER) - ROUND_TO_INTEGER
    f = t - n
    e = f * C6 + C5
    e = e * f + C4
    e = e * f + C3
    e = e * f + C2
    e = e * f + C1
    e = e * f + C0
    power = ((n.to(tl.int32) + (127 + MASS_BITS)) << 23).to(tl.float32, bitcast=True)
    return tl.where(usable, (e * power + 0.5).to(tl.int64), 0)


@triton.jit
def _mass_target(total, top_p_fixed):
    """max(1, ceil(total * top_p_fixed / 2**32)) without leaving 64 bits."""
    total = total.to(tl.uint64)
    top_p_fixed = top_p_fixed.to(tl.uint64)
    low = ((total & 0xFFFFFFFF) * top_p_fixed + 0xFFFFFFFF) >> 32
    return tl.maximum(((total >> 32) * top_p_fixed + low).to(tl.int64), 1)


@triton.jit
def _slice(vocab_size, BLOCK_SIZE: tl.constexpr):
    """The part [start, end) of the row that this program owns: whole blocks but for the last."""
    num_blocks = tl.cdiv(vocab_size, BLOCK_SIZE)
    slice_len = tl.cdiv(num_blocks, tl.num_programs(0)) * BLOCK_SIZE
    start = tl.program_id(0) * slice_len
    return start, tl.minimum(start + slice_len, vocab_size)


@triton.jit
def _pivots(low, high, x_max):
    """NUM_PIVOTS values from min(high, x_max) down to exactly low, without overflow."""
    i = tl.arange(0, NUM_PIVOTS)
    fraction = i.to(tl.float32) * (1.0 / (NUM_PIVOTS - 1))
    pivots = tl.minimum(high, x_max) * (1.0 - fraction) + low * fraction
    return tl.where(i == NUM_PIVOTS - 1, low, pivots)


@triton.jit
def _bracket(counters_ptr, top_k, top_p_fixed, NUM_ROUNDS: tl.constexpr):
    """Replay the ladder rounds so far.

    Returns x_max; [low, high), the values among which both boundaries lie: all tokens at or above
    high are kept, none below low is; the mass and the count at or above high; the mass of the whole
    row; whether top-k cuts anything.
    """
    x_max = _value_of(tl.load(counters_ptr + BEST))
    low = x_max - SPAN
    high = tl.full([], float("inf"), tl.float32)
    mass_above = tl.full([], 0, tl.int64)
    count_above = tl.full([], 0, tl.int64)
    total = tl.full([], 0, tl.int64)
    cuts_k = top_k < 0
    for r in tl.static_range(NUM_ROUNDS):
        pivots = _pivots(low, high, x_max)
        sums_ptr = counters_ptr + SUMS + r * 2 * NUM_PIVOTS + tl.arange(0, NUM_PIVOTS)
        masses = tl.load(sums_ptr)
        counts = tl.load(sums_ptr + NUM_PIVOTS)
        if r == 0:  # the last pivot lies below every token that has a mass
            total = tl.max(masses, 0)
            cuts_k = top_k < tl.max(counts, 0)
        # What top-k keeps has at least this mass, so top-p keeps at least `target` of it.
        sure = tl.max(tl.where(counts < top_k, masses, mass_above), 0)
        target = _mass_target(tl.where(cuts_k, sure, total), top_p_fixed)
        is_low = tl.where(cuts_k, counts - top_k, masses - target) >= 0
        is_high = masses <= target
        low = tl.maximum(low, tl.max(tl.where(is_low, pivots, low), 0))
        high = tl.minimum(high, tl.min(tl.where(is_high, pivots, high), 0))
        mass_above = tl.maximum(mass_above, tl.max(tl.where(is_high, masses, 0), 0))
        count_above = tl.maximum(count_above, tl.max(tl.where(is_high, counts, 0), 0))
    return x_max, low, high, mass_above, count_above, total, cuts_k


@triton.jit
def domain_max_kernel(
    logits_ptr,
    seq_stride,
    log_alpha_ptr,
    counters_ptr,
    num_counters,
    vocab_size,
    BLOCK_SIZE: tl.constexpr,
):
    """Highest domain logit of rows with alpha > 0. One program per slice of a row."""
    seq = tl.program_id(1).to(tl.int64)
    start, end = _slice(vocab_size, BLOCK_SIZE)
    if (tl.load(log_alpha_ptr + seq) > -float("inf")) & (start < end):
        row_ptr = logits_ptr + seq * seq_stride
        best = tl.full([BLOCK_SIZE], -float("inf"), tl.float32)
        for offset in range(start, end, BLOCK_SIZE):
            index = offset + tl.arange(0, BLOCK_SIZE)
            domain = tl.load(row_ptr + index, mask=index < end, other=-float("inf"))
            domain = domain.to(tl.float32)
            best = tl.where(domain > best, domain, best)  # a NaN is not greater
        tl.atomic_max(
            counters_ptr + seq * num_counters + DOMAIN_MAX,
            _first_rank(tl.max(best, 0)),
            sem="relaxed",
        )


@triton.jit
def combine_kernel(
    logits_ptr,
    pass_stride,
    seq_stride,
    weights_ptr,
    inv_temperature_ptr,
    log_alpha_ptr,
    x_ptr,
    counters_ptr,
    num_counters,
    num_seqs,
    vocab_size,
    NUM_PASSES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """x, -inf where masked. One program per slice of a row; reads each pass of weight != 0 once."""
    seq = tl.program_id(1).to(tl.int64)
    start, end = _slice(vocab_size, BLOCK_SIZE)
    counters_ptr += seq * num_counters
    inv_temperature = tl.load(inv_temperature_ptr + seq)
    log_alpha = tl.load(log_alpha_ptr + seq)
    domain_end = tl.where(log_alpha > -float("inf"), end, 0)  # 0: alpha is off, all are allowed
    threshold = _value_of(tl.load(counters_ptr + DOMAIN_MAX)) + log_alpha
    threshold = tl.where(log_alpha > -float("inf"), threshold, -float("inf"))
    best = tl.full([BLOCK_SIZE], 0, tl.int64)
    status = tl.full([BLOCK_SIZE], 0, tl.int32)

    for offset in range(start, end, BLOCK_SIZE):
        index = offset + tl.arange(0, BLOCK_SIZE)
        in_row = index < end
        row_ptr = logits_ptr + seq * seq_stride + index
        pass_ptr = row_ptr

        # 1. Combine. A pass of weight 0 was not run: its logits may hold anything, NaN included.
        x = tl.full([BLOCK_SIZE], 0.0, tl.float32)
        for p in tl.static_range(NUM_PASSES):
            weight = tl.load(weights_ptr + p * num_seqs + seq)
            used_end = tl.where(weight != 0, end, 0)
            logits = tl.load(pass_ptr, mask=index < used_end, other=0.0)
            x += logits.to(tl.float32) * weight
            pass_ptr += pass_stride
        x *= inv_temperature

        # 2. Mask.
        is_nan = x != x
        is_inf = x > MAX_LOGIT
        status |= tl.where(in_row & is_nan, STATUS_NAN, 0)
        status |= tl.where(in_row & is_inf, STATUS_INF, 0)
        domain = tl.load(row_ptr, mask=index < domain_end, other=0.0).to(tl.float32)
        x = tl.where(is_inf, MAX_LOGIT, x)
        x = tl.where((domain >= threshold) & (x == x), x, -float("inf"))
        tl.store(x_ptr + seq * vocab_size + index, x, mask=in_row)
        best = tl.maximum(best, tl.where(in_row, _rank(x, index), 0))

    if start < end:
        tl.atomic_max(counters_ptr + BEST, tl.max(best, 0), sem="relaxed")
        has_nan = tl.max(status & STATUS_NAN, 0)
        has_inf = tl.max(status & STATUS_INF, 0)
        tl.atomic_or(counters_ptr + STATUS, (has_nan | has_inf).to(tl.int64), sem="relaxed")


@triton.jit
def ladder_kernel(
    x_ptr,
    top_k_ptr,
    top_p_fixed_ptr,
    counters_ptr,
    num_counters,
    vocab_size,
    ROUND: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Add this slice's mass and count at or above each pivot of a round to the row's sums."""
    seq = tl.program_id(1).to(tl.int64)
    start, end = _slice(vocab_size, BLOCK_SIZE)
    counters_ptr += seq * num_counters
    top_k = tl.load(top_k_ptr + seq)
    top_p_fixed = tl.load(top_p_fixed_ptr + seq)
    x_max, low, high, _, _, _, _ = _bracket(counters_ptr, top_k, top_p_fixed, ROUND)
    pivots = _pivots(low, high, x_max)[:, None]
    # One sum per lane until the end: a reduction per block would cost more than the sums.
    masses = tl.full([NUM_PIVOTS, BLOCK_SIZE], 0, tl.int64)
    counts = tl.full([NUM_PIVOTS, BLOCK_SIZE], 0, tl.int32)

    for offset in range(start, end, BLOCK_SIZE):
        index = offset + tl.arange(0, BLOCK_SIZE)
        x = tl.load(x_ptr + seq * vocab_size + index, mask=index < end, other=-float("inf"))
        mass = _mass(x, x_max)
        is_above = x[None, :] >= pivots
        masses += tl.where(is_above, mass[None, :], 0)
        counts += is_above.to(tl.int32)

    if start < end:
        sums_ptr = counters_ptr + SUMS + ROUND * 2 * NUM_PIVOTS + tl.arange(0, NUM_PIVOTS)
        tl.atomic_add(sums_ptr, tl.sum(masses, 1), sem="relaxed")
        tl.atomic_add(sums_ptr + NUM_PIVOTS, tl.sum(counts, 1).to(tl.int64), sem="relaxed")


@triton.jit
def collect_kernel(
    x_ptr,
    top_k_ptr,
    top_p_fixed_ptr,
    counters_ptr,
    ranks_ptr,
    num_counters,
    vocab_size,
    NUM_ROUNDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Append the ranks of this slice's tokens inside the bracket to the row's unordered list."""
    seq = tl.program_id(1).to(tl.int64)
    start, end = _slice(vocab_size, BLOCK_SIZE)
    counters_ptr += seq * num_counters
    top_k = tl.load(top_k_ptr + seq)
    top_p_fixed = tl.load(top_p_fixed_ptr + seq)
    _, low, high, _, _, _, _ = _bracket(counters_ptr, top_k, top_p_fixed, NUM_ROUNDS)

    for offset in range(start, end, BLOCK_SIZE):
        index = offset + tl.arange(0, BLOCK_SIZE)
        x = tl.load(x_ptr + seq * vocab_size + index, mask=index < end, other=-float("inf"))
        is_inside = (x >= low) & (x < high) & (x > -float("inf"))
        place = tl.cumsum(is_inside.to(tl.int32), 0)
        num_inside = tl.max(place, 0)
        if num_inside > 0:
            first = tl.atomic_add(counters_ptr + LIST_LEN, num_inside.to(tl.int64), sem="relaxed")
            list_ptr = ranks_ptr + seq * vocab_size + first
            tl.store(list_ptr + place - 1, _rank(x, index), mask=is_inside)


@triton.jit
def _mass_from(list_ptr, list_len, x_max, rank, BLOCK_SIZE: tl.constexpr):
    """Mass of the listed tokens at or above a rank."""
    masses = tl.full([BLOCK_SIZE], 0, tl.int64)
    for offset in range(0, list_len, BLOCK_SIZE):
        place = offset + tl.arange(0, BLOCK_SIZE)
        ranks = tl.load(list_ptr + place, mask=place < list_len, other=-1)
        masses += tl.where(ranks >= rank, _mass(_value_of(ranks), x_max), 0)
    return tl.sum(masses, 0)


@triton.jit
def _boundary(
    list_ptr,
    list_len,
    x_max,
    low,
    num_from_low,
    high,
    sum_above,
    target,
    BY_MASS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """A rank from which upwards the sum (mass or count) is the smallest that reaches target.

    Invariant: the sum from low reaches it, the sum from high, at first sum_above, does not.
    num_from_*: listed tokens at or above. Ranks are distinct, so once one token lies between, low
    is the answer; each step leaves a sixteenth of at most 2**52 ranks, so there are 13 at most.
    """
    low = tl.where(sum_above >= target, high, low)  # reached without any token of the list
    num_from_low = tl.where(sum_above >= target, 0, num_from_low)
    num_from_high = tl.full([], 0, tl.int32)
    while num_from_low - num_from_high > 1:
        pivots = low + ((high - low) * tl.arange(0, NUM_PIVOTS) >> 4)
        sums = tl.full([NUM_PIVOTS, BLOCK_SIZE], 0, tl.int64)
        counts = tl.full([NUM_PIVOTS, BLOCK_SIZE], 0, tl.int32)
        for offset in range(0, list_len, BLOCK_SIZE):
            place = offset + tl.arange(0, BLOCK_SIZE)
            ranks = tl.load(list_ptr + place, mask=place < list_len, other=-1)
            is_above = ranks[None, :] >= pivots[:, None]
            counts += is_above.to(tl.int32)
            if BY_MASS:
                sums += tl.where(is_above, _mass(_value_of(ranks), x_max)[None, :], 0)
        num_from = tl.sum(counts, 1)
        sum_from = tl.sum(sums, 1) if BY_MASS else num_from.to(tl.int64)
        reaches = sum_from >= target - sum_above
        low = tl.maximum(low, tl.max(tl.where(reaches, pivots, low), 0))
        high = tl.minimum(high, tl.min(tl.where(reaches, high, pivots), 0))
        num_from_low = tl.min(tl.where(reaches, num_from, num_from_low), 0)
        num_from_high = tl.max(tl.where(reaches, num_from_high, num_from), 0)
    return low, num_from_low


@triton.jit
def select_kernel(
    top_k_ptr,
    top_p_fixed_ptr,
    counters_ptr,
    ranks_ptr,
    lowest_kept_ptr,
    num_counters,
    vocab_size,
    NUM_ROUNDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The lowest rank that is kept. One program per row; reads the row's list once a step."""
    seq = tl.program_id(0).to(tl.int64)
    counters_ptr += seq * num_counters
    top_k = tl.load(top_k_ptr + seq).to(tl.int64)
    top_p_fixed = tl.load(top_p_fixed_ptr + seq)
    x_max, low, high, mass_above, count_above, total, cuts_k = _bracket(
        counters_ptr, top_k, top_p_fixed, NUM_ROUNDS
    )
    lowest = _first_rank(low)
    ceiling = _first_rank(high)
    list_ptr = ranks_ptr + seq * vocab_size
    list_len = tl.load(counters_ptr + LIST_LEN).to(tl.int32)
    num_from = list_len

    if cuts_k:
        lowest, num_from = _boundary(
            list_ptr, list_len, x_max, lowest, num_from, ceiling, count_above, top_k,
            False, BLOCK_SIZE,
        )  # fmt: skip
        total = mass_above + _mass_from(list_ptr, list_len, x_max, lowest, BLOCK_SIZE)
    target = _mass_target(total, top_p_fixed)
    lowest, _ = _boundary(
        list_ptr, list_len, x_max, lowest, num_from, ceiling, mass_above, target,
        True, BLOCK_SIZE,
    )  # fmt: skip
    tl.store(lowest_kept_ptr + seq, lowest)


@triton.jit
def block_mass_kernel(
    x_ptr,
    counters_ptr,
    lowest_kept_ptr,
    block_masses_ptr,
    block_counts_ptr,
    num_counters,
    num_blocks,
    vocab_size,
    BLOCK_SIZE: tl.constexpr,
):
    """Kept mass, and number of kept tokens, of each block of this slice."""
    seq = tl.program_id(1).to(tl.int64)
    start, end = _slice(vocab_size, BLOCK_SIZE)
    x_max = _value_of(tl.load(counters_ptr + seq * num_counters + BEST))
    lowest_kept = tl.load(lowest_kept_ptr + seq)
    for offset in range(start, end, BLOCK_SIZE):
        index = offset + tl.arange(0, BLOCK_SIZE)
        x = tl.load(x_ptr + seq * vocab_size + index, mask=index < end, other=-float("inf"))
        mass = tl.where(_rank(x, index) >= lowest_kept, _mass(x, x_max), 0)
        block = seq * num_blocks + offset // BLOCK_SIZE
        tl.store(block_masses_ptr + block, tl.sum(mass, 0))
        tl.store(block_counts_ptr + block, tl.sum((mass > 0).to(tl.int32), 0))


@triton.jit
def _fallback(row_ptr, vocab_size, BLOCK_SIZE: tl.constexpr):
    """The first of the highest finite domain logits; 0 if there is none."""
    best = tl.full([BLOCK_SIZE], 0, tl.int64)
    for offset in range(0, vocab_size, BLOCK_SIZE):
        index = offset + tl.arange(0, BLOCK_SIZE)
        domain = tl.load(row_ptr + index, mask=index < vocab_size, other=0.0).to(tl.float32)
        is_finite = tl.abs(domain) <= -LOWEST_FINITE
        rank = _rank(tl.where(is_finite, domain, LOWEST_FINITE), index)
        best = tl.maximum(best, tl.where(index < vocab_size, rank, 0))
    return _index_of(tl.max(best, 0))


@triton.jit
def draw_kernel(
    logits_ptr,
    seq_stride,
    x_ptr,
    greedy_ptr,
    counters_ptr,
    lowest_kept_ptr,
    block_masses_ptr,
    block_counts_ptr,
    seed_ptr,
    stream_ids_ptr,
    steps_ptr,
    token_ids_ptr,
    logprobs_ptr,
    status_ptr,
    num_kept_ptr,
    total_mass_ptr,
    num_counters,
    num_blocks,
    vocab_size,
    NUM_BLOCKS_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Draw one token by its place in the running mass. One program per row; reads one block."""
    seq = tl.program_id(0).to(tl.int64)
    counters_ptr += seq * num_counters
    best = tl.load(counters_ptr + BEST)
    status = tl.load(counters_ptr + STATUS).to(tl.int32)
    blocks = tl.arange(0, NUM_BLOCKS_PADDED)
    has_block = blocks < num_blocks
    block_masses = tl.load(block_masses_ptr + seq * num_blocks + blocks, mask=has_block, other=0)
    block_counts = tl.load(block_counts_ptr + seq * num_blocks + blocks, mask=has_block, other=0)
    total_mass = tl.sum(block_masses, 0)
    tl.store(num_kept_ptr + seq, tl.sum(block_counts, 0))
    tl.store(total_mass_ptr + seq, total_mass)

    if total_mass == 0:
        token = _fallback(logits_ptr + seq * seq_stride, vocab_size, BLOCK_SIZE)
        logprob = tl.full([], 0.0, tl.float32)
        status |= STATUS_EMPTY
    elif tl.load(greedy_ptr + seq):
        token = _index_of(best)
        logprob = tl.full([], 0.0, tl.float32)
    else:
        # 1. threshold = mulhi64(64 random bits, total mass): uniform over [0, total mass).
        stream_id = tl.load(stream_ids_ptr + seq)
        word0, word1, _, _ = tl.philox(
            tl.load(seed_ptr).to(tl.uint64, bitcast=True),
            tl.load(steps_ptr + seq).to(tl.uint32, bitcast=True),
            (stream_id & 0xFFFFFFFF).to(tl.uint32),
            ((stream_id >> 32) & 0xFFFFFFFF).to(tl.uint32),
            tl.full([], STREAM_TOKENS, tl.uint32),
        )
        bits = (word0.to(tl.uint64) << 32) | word1.to(tl.uint64)
        threshold = tl.umulhi(bits, total_mass.to(tl.uint64)).to(tl.int64)

        # 2. The block whose running mass passes the threshold, then the token inside it.
        block = tl.sum((has_block & (tl.cumsum(block_masses, 0) <= threshold)).to(tl.int32), 0)
        mass_before = tl.sum(tl.where(blocks < block, block_masses, 0), 0)
        index = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        in_row = index < vocab_size
        x = tl.load(x_ptr + seq * vocab_size + index, mask=in_row, other=-float("inf"))
        is_kept = _rank(x, index) >= tl.load(lowest_kept_ptr + seq)
        mass = tl.where(is_kept, _mass(x, _value_of(best)), 0)
        is_before = tl.cumsum(mass, 0) + mass_before <= threshold
        place = tl.sum(is_before.to(tl.int32), 0)
        token = (block * BLOCK_SIZE + place).to(tl.int64)
        drawn_mass = tl.sum(tl.where(index == token, mass, 0), 0)
        logprob = tl.log(drawn_mass.to(tl.float64) / total_mass.to(tl.float64)).to(tl.float32)

    tl.store(token_ids_ptr + seq, token)
    tl.store(logprobs_ptr + seq, logprob)
    tl.store(status_ptr + seq, status)


class LaunchConfig(NamedTuple):
    """Sizes that change the speed and never the result.

    num_splits: programs per row in the launches that read whole rows.    num_rounds: of the ladder;
    each shortens the list fifteenfold and reads x once more.    block_size, ladder_block_size,
    list_block_size, draw_block_size: tokens that a program holds at once, powers of 2.
    """

    num_splits: int
    num_rounds: int = 2
    block_size: int = 1024
    ladder_block_size: int = 256  # one token per thread; a second one would need 160 registers
    list_block_size: int = 256
    draw_block_size: int = 1024
    num_warps: int = 8

    @classmethod
    def for_batch(cls, num_seqs: int, vocab_size: int) -> LaunchConfig:
        # Two programs for each of 132 processors, but a block or more for each program.
        num_splits = min(264 // max(1, num_seqs), triton.cdiv(vocab_size, cls(1).block_size))
        return cls(max(1, num_splits))


class Scratch(NamedTuple):
    """What the launches of one call hand to each other; contents may be anything when it starts.

    x: [num_seqs, vocab_size] fp32.    ranks: [num_seqs, vocab_size] int64.
    counters: [num_seqs, num_counters] int64.    lowest_kept: [num_seqs] int64.
    block_masses: [num_seqs, num_blocks] int64.    block_counts: [num_seqs, num_blocks] int32.
    num_kept: [num_seqs] int32 and total_mass: [num_seqs] int64, of the nucleus, for tests.
    """

    x: torch.Tensor
    ranks: torch.Tensor
    counters: torch.Tensor
    lowest_kept: torch.Tensor
    block_masses: torch.Tensor
    block_counts: torch.Tensor
    num_kept: torch.Tensor
    total_mass: torch.Tensor

    @classmethod
    def allocate(cls, num_seqs, vocab_size, device, config: LaunchConfig) -> Scratch:
        num_blocks = triton.cdiv(vocab_size, config.draw_block_size)
        num_counters = SUMS.value + config.num_rounds * 2 * NUM_PIVOTS.value

        def empty(*shape, dtype=torch.int64):
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            x=empty(num_seqs, vocab_size, dtype=torch.float32),
            ranks=empty(num_seqs, vocab_size),
            counters=empty(num_seqs, num_counters),
            lowest_kept=empty(num_seqs),
            block_masses=empty(num_seqs, num_blocks),
            block_counts=empty(num_seqs, num_blocks, dtype=torch.int32),
            num_kept=empty(num_seqs, dtype=torch.int32),
            total_mass=empty(num_seqs),
        )


def launch_guided_sample(
    logits: torch.Tensor,
    weights: torch.Tensor,
    parameters: SamplingTensors,
    seed: torch.Tensor,
    stream_ids: torch.Tensor,
    steps: torch.Tensor,
    sampled: Sampled,
    scratch: Scratch,
    config: LaunchConfig,
) -> None:
    """The launches alone, for CUDA graphs: nothing is allocated, checked or read by the host.

    seed: [1] int64 on the device, so that a captured graph can serve another seed; the other
    arguments as in guided_sample, contiguous. Writes sampled.
    """
    num_passes, num_seqs, vocab_size = logits.shape
    pass_stride, seq_stride, _ = logits.stride()
    inv_temperature, greedy, log_alpha, top_k, top_p_fixed = parameters
    x, ranks, counters, lowest_kept, block_masses, block_counts, num_kept, total_mass = scratch
    num_counters, num_blocks = counters.shape[1], block_masses.shape[1]
    slices, rows = (config.num_splits, num_seqs), (num_seqs,)
    # Multiply and add round separately in the definition.
    options = {"num_warps": config.num_warps, "enable_fp_fusion": False}

    counters.zero_()
    domain_max_kernel[slices](
        logits, seq_stride, log_alpha, counters, num_counters, vocab_size,
        config.block_size, **options,
    )  # fmt: skip
    combine_kernel[slices](
        logits, pass_stride, seq_stride, weights, inv_temperature, log_alpha, x, counters,
        num_counters, num_seqs, vocab_size, num_passes, config.block_size, **options,
    )  # fmt: skip
    for ladder_round in range(config.num_rounds):
        ladder_kernel[slices](
            x, top_k, top_p_fixed, counters, num_counters, vocab_size,
            ladder_round, config.ladder_block_size, **options,
        )  # fmt: skip
    collect_kernel[slices](
        x, top_k, top_p_fixed, counters, ranks, num_counters, vocab_size,
        config.num_rounds, config.block_size, **options,
    )  # fmt: skip
    select_kernel[rows](
        top_k, top_p_fixed, counters, ranks, lowest_kept, num_counters, vocab_size,
        config.num_rounds, config.list_block_size, **options,
    )  # fmt: skip
    block_mass_kernel[slices](
        x, counters, lowest_kept, block_masses, block_counts, num_counters, num_blocks, vocab_size,
        config.draw_block_size, **options,
    )  # fmt: skip
    draw_kernel[rows](
        logits, seq_stride, x, greedy, counters, lowest_kept, block_masses, block_counts,
        seed, stream_ids, steps, *sampled, num_kept, total_mass, num_counters, num_blocks,
        vocab_size, triton.next_power_of_2(num_blocks), config.draw_block_size, **options,
    )  # fmt: skip


def guided_sample(
    logits, weights, *, temperature, top_p, top_k, alpha, seed, stream_ids, steps
) -> Sampled:
    """See reference.guided_sample; the same token, bit for bit.

    Raises: ValueError if an argument does not match, or vocab_size is above 2**20.
    """
    parameters = checked_parameters(
        logits,
        weights,
        temperature,
        top_p,
        top_k,
        alpha,
        stream_ids,
        steps,
        max_vocab_size=MAX_VOCAB_SIZE,
    )
    return draw(logits, weights, parameters, seed=seed, stream_ids=stream_ids, steps=steps)


def draw(logits, weights, parameters: SamplingTensors, *, seed, stream_ids, steps) -> Sampled:
    """See reference.draw."""
    _, num_seqs, vocab_size = logits.shape
    device = logits.device
    sampled = Sampled.empty(num_seqs, device)
    if num_seqs == 0:
        return sampled
    config = LaunchConfig.for_batch(num_seqs, vocab_size)
    launch_guided_sample(
        logits,
        weights.contiguous(),
        SamplingTensors(*(p.contiguous() for p in parameters)),
        torch.full((1,), signed_seed(seed), dtype=torch.int64, device=device),
        stream_ids.contiguous(),
        steps.contiguous(),
        sampled,
        Scratch.allocate(num_seqs, vocab_size, device, config),
        config,
    )
    return sampled

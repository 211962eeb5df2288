// How top-k and top-p are cut without a sort: a selection by digits of the rank.
//
// Both ask for the shortest prefix of the order (the highest ranks) that reaches a goal, of k
// tokens or of a mass. It is found digit by digit, as in a radix sort: sum mass and number of
// tokens per digit, walk the digits from the highest, and look only into the digit in which the
// goal is reached. The first digit is the bin, spread so that few tokens share one; typically a
// second digit ends it. The masses are exact 64-bit sums, so there is no list, no margin and
// nothing to overflow: equal logits only take more digits, 7 in all at most.
//
// The cluster owns the row's 1,024 sums. A block adds up those of its own tokens, then collects its
// share of the digits over all blocks; a thread adds its own tokens, and walks a few digits.
#pragma once

#include "cuda/tokens.cuh"

namespace steer {

// What a selection must reach: either of the two. The other is set so high that nothing reaches it.
using Goal = Sum;

__device__ inline bool reaches(Sum sum, Goal goal) {
  return sum.mass >= goal.mass || sum.count >= goal.count;
}

// The ranks [low, low + 2**bits).
struct Bracket {
  uint64_t low;
  int bits;
};

// What is kept: the tokens at or above lowest_rank that have a mass.
struct Kept {
  uint64_t lowest_rank;
  Sum sum;
};

// A 64-bit sum in two words, exact in any order: whoever makes the low word wrap adds the carry.
// Most masses are below 2**32 (5.5 nats under the best), so most tokens touch only two words.
__device__ inline void add_to_digit(Shared& shared, int digit, uint64_t mass) {
  const uint32_t low = static_cast<uint32_t>(mass);
  const uint32_t before = atomicAdd(&shared.mass_low[digit], low);
  const uint32_t high = static_cast<uint32_t>(mass >> 32) + (before + low < before);
  if (high != 0) atomicAdd(&shared.mass_high[digit], high);
  atomicAdd(&shared.count[digit], 1u);
}

__device__ inline int digit_shift(Bracket bracket) {
  return bracket.bits > kDigitBits ? bracket.bits - kDigitBits : 0;
}

// Sums the row's tokens in the bracket per digit, into the shares that `sums` is of each block.
template <class Group, class Tokens>
__device__ void sum_digits(const Group& group, const Tokens& tokens, Bracket bracket, float x_max,
                           Shared& shared, Sum* sums) {
  for (int digit = threadIdx.x; digit < kNumDigits; digit += num_threads()) {
    shared.mass_low[digit] = shared.mass_high[digit] = shared.count[digit] = 0;
  }
  __syncthreads();
  tokens.visit([&](float x, int index) {
    const uint64_t mass = mass_of(x, x_max);
    const uint64_t offset = rank_of(x, index, x_max) - bracket.low;  // wraps below low
    if (mass == 0 || offset >> bracket.bits != 0) return;
    add_to_digit(shared, static_cast<int>(offset >> digit_shift(bracket)), mass);
  });
  group.sync();
  const int share = kNumDigits / group.size(), first = share * group.block_rank();
  for (int digit = first + threadIdx.x; digit < first + share; digit += num_threads()) {
    Sum sum{};
    for (int rank = 0; rank < group.size(); ++rank) {
      const uint64_t high = group.of_block(shared.mass_high[digit], rank);
      sum = sum + Sum{high << 32 | group.of_block(shared.mass_low[digit], rank),
                      group.of_block(shared.count[digit], rank)};
    }
    sums[digit] = sum;
  }
  group.sync();
}

// Thread t owns these digits, from the highest: t * n to t * n + n - 1 from the top.
__device__ inline int digits_per_thread() { return (kNumDigits - 1) / num_threads() + 1; }

__device__ inline int owned_digit(int i) {
  return kNumDigits - 1 - (static_cast<int>(threadIdx.x) * digits_per_thread() + i);
}

template <class Group>
__device__ Sum row_sum(const Group& group, const Sum* sums, int digit) {
  return group.of_block(sums[digit], digit / (kNumDigits / group.size()));
}

// The sums over the digits of the threads before this one, whose digits are higher.
template <class Group>
__device__ Prefix scan_digits(const Group& group, Shared& shared, const Sum* sums) {
  Sum mine{};
  for (int i = 0; i < digits_per_thread(); ++i) {
    if (owned_digit(i) >= 0) mine = mine + row_sum(group, sums, owned_digit(i));
  }
  return prefix_in_block(shared, mine);
}

// Finds the digit in which the goal is reached (all digits together reach it): shared.found.
// `above` is what lies above the bracket.
template <class Group>
__device__ void find_digit(const Group& group, Shared& shared, const Sum* sums, Sum above,
                           Goal goal) {
  const Prefix prefix = scan_digits(group, shared, sums);
  above = above + prefix.before;
  if (!reaches(above, goal) && reaches(above + prefix.mine, goal)) {
    int i = 0;
    Sum inside = row_sum(group, sums, owned_digit(0));
    while (!reaches(above + inside, goal)) {
      above = above + inside;
      inside = row_sum(group, sums, owned_digit(++i));
    }
    shared.found = {owned_digit(i), above, inside};
  }
  __syncthreads();
}

// The keys that x can have in a bin, as a bracket of ranks: fewer digits than all 32 bits.
// With d = fl(x_max - x) in [b/32, (b+1)/32), monotone rounding puts x at or above
// fl(x_max - (b+1)/32), and not above fl(x_max - (b-1)/32). (Not b: x_max - x may round to b/32.)
__device__ inline Bracket narrow_to_bin(int digit, float x_max) {
  const float bin = static_cast<float>(kNumDigits - 1 - digit);
  const float lowest = __fsub_rn(x_max, __fmul_rn(bin + 1, 1 / kBinsPerNat));
  const float highest = __fsub_rn(x_max, __fmul_rn(fmaxf(bin - 1, 0), 1 / kBinsPerNat));
  const uint64_t num_keys = order_key(highest) - order_key(lowest) + uint64_t{1};
  return {static_cast<uint64_t>(digit) << (kKeyBits + kIndexBits) |
              static_cast<uint64_t>(order_key(lowest)) << kIndexBits,
          64 - __clzll((num_keys << kIndexBits) - 1)};
}

// The shortest prefix of the order that reaches the goal; shared.bins must be summed.
template <class Group, class Tokens>
__device__ Kept select(const Group& group, const Tokens& tokens, float x_max, Shared& shared,
                       Goal goal) {
  find_digit(group, shared, shared.bins, Sum{}, goal);
  Bracket bracket = narrow_to_bin(shared.found.digit, x_max);
  // Each round takes 10 bits off the bracket, so there are at most 6. What was found is read again
  // rather than kept: registers are scarce.
#pragma unroll 1
  while (shared.found.inside.count > 1 && bracket.bits > 0) {
    sum_digits(group, tokens, bracket, x_max, shared, shared.digits);
    find_digit(group, shared, shared.digits, shared.found.above, goal);
    bracket.bits = digit_shift(bracket);
    bracket.low += static_cast<uint64_t>(shared.found.digit) << bracket.bits;
  }
  // One token is inside, and it is the last that is kept.
  return {bracket.low, shared.found.above + shared.found.inside};
}

}  // namespace steer

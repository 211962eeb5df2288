// Guided sampling in one launch, bit for bit as kernels/reference/guided_sample.py defines it:
//
//   x_v = (w_d*l_d[v] + w_b*l_b[v] + w_n*l_n[v]) * (1/T)
//   token ~ softmax(x), cut by alpha, then top-k, then top-p
//
// One row belongs to one cluster of thread blocks (or to one block), each thread owns num_items of
// its tokens, and x stays where it was computed, in registers or in scratch, from step 1 to the
// end. Each logit is read once; rows with alpha > 0 read the domain's a second time.
//
// How the nucleus is found without a sort. Every token has a rank, one integer:
//
//   bits 61..52  distance of x below max x, in bins of 1/32 nat, reversed
//   bits 51..20  x, as an integer that ascends where x ascends
//   bits 19..0   index, reversed
//
// Ranks are distinct, and descending rank is the definition's order (x descending, index
// ascending): a bin's number never falls where x falls. Top-k and top-p are then the same question:
// the highest rank at which the tokens from it upwards reach a goal, of k tokens or of a mass. It
// is answered digit by digit, as in a radix sort: sum mass and number of tokens per digit, walk the
// digits from the highest, and look only into the digit in which the goal is reached. The first
// digit is the bin, spread so that few tokens share one; typically a second digit ends it. The
// masses are exact 64-bit sums, so there is no list, no margin and nothing to overflow: equal
// logits only take more digits, 7 in all at most.
//
// Blocks of a row meet at cluster barriers and read each other's shared memory. Nobody spins, and
// integer sums do not depend on their order: the result is the same for every split of a row.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#include "cuda/guided_sample.h"
#include "philox.h"

namespace steer {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 512;
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int32_t kStatusNan = 1, kStatusEmpty = 2, kStatusInf = 4;
constexpr float kMaxLogit = 3e38f;
constexpr float kLowestFinite = -3.402823466e38f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2E = 1.44269504f;
constexpr int kMassBits = 40;              // a mass is at most 2**40
constexpr float kLowestExponent = -42.0f;  // below 2**-41 of the top token a mass rounds to 0

constexpr int kDigitBits = 10;
constexpr int kNumDigits = 1 << kDigitBits;
constexpr int kKeyBits = 32;
constexpr int kRankBits = kDigitBits + kKeyBits + kIndexBits;
constexpr float kBinsPerNat = 32.0f;  // tokens with a mass lie within 29.2 nats, so in 935 bins

// Mass and number of some tokens.
struct Sum {
  uint64_t mass;
  uint32_t count;
};

__device__ inline Sum operator+(Sum a, Sum b) { return {a.mass + b.mass, a.count + b.count}; }

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

// A digit of a bracket's ranks: what lies above it, and what it holds.
struct Found {
  int digit;
  Sum above, inside;
};

// What is kept: the tokens at or above lowest_rank that have a mass.
struct Kept {
  uint64_t lowest_rank;
  Sum sum;
};

// Integers that the row's threads maximise or combine, each once per row: none is ever reset.
enum Slot {
  kDomainMax,
  kXMax,
  kStatus,
  kFirst,
  kFallbackMax,
  kFallbackFirst,
  kNumSlots,
};

struct Shared {
  uint32_t slots[kNumSlots];
  // This block's sums per digit. A 64-bit atomic add on shared memory is a loop, so a mass is added
  // in two words: see add_to_digit.
  uint32_t mass_low[kNumDigits], mass_high[kNumDigits], count[kNumDigits];
  // The row's sums: of the bins, and of the latest digits inside one. Each block holds its share.
  Sum bins[kNumDigits], digits[kNumDigits];
  Sum warp_sums[kMaxThreads / kWarpSize];
  Found found;
  uint64_t kept_mass;  // of this block
};

#ifdef _CG_HAS_CLUSTER_GROUP  // cooperative_groups.h has clusters for this target: sm_90 and newer
// How the blocks of a row meet: as a cluster.
struct Cluster {
  cooperative_groups::cluster_group group = cooperative_groups::this_cluster();

  __device__ int size() const { return static_cast<int>(group.num_blocks()); }
  __device__ int block_rank() const { return static_cast<int>(group.block_rank()); }
  __device__ int row() const { return static_cast<int>(blockIdx.x) / size(); }
  __device__ void sync() const { group.sync(); }
  // `own`, as block `rank` has it. Between writing and reading it lies a sync, and another before
  // it is written again or its block ends.
  template <class T>
  __device__ const T& of_block(const T& own, int rank) const {
    return *group.map_shared_rank(const_cast<T*>(&own), rank);
  }
};
#endif

// How the blocks of a row meet where the row has only one.
struct OneBlock {
  __device__ int size() const { return 1; }
  __device__ int block_rank() const { return 0; }
  __device__ int row() const { return static_cast<int>(blockIdx.x); }
  __device__ void sync() const { __syncthreads(); }
  template <class T>
  __device__ const T& of_block(const T& own, int) const {
    return own;
  }
};

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }
__device__ inline int num_threads() { return static_cast<int>(blockDim.x); }

// A thread's tokens. A warp owns 32 * num_items tokens in a row, of which lane l has every 32nd
// from the l-th: loads are coalesced, and warps are in index order.
struct TokenRange {
  int first, num_items;
  int num_held;  // items that lie in the vocabulary: the first of them

  template <class Group>
  static __device__ TokenRange of_thread(const Group& group, int vocab_size) {
    const int row_threads = group.size() * num_threads();
    const int num_items = (vocab_size + row_threads - 1) / row_threads;
    const int warp = group.block_rank() * (num_threads() / kWarpSize) + warp_id();
    const int first = warp * num_items * kWarpSize + lane_id();
    const int num_below = max(0, vocab_size - first + kWarpSize - 1) / kWarpSize;
    return {first, num_items, min(num_items, num_below)};
  }
  __device__ int index(int item) const { return first + item * kWarpSize; }
};

// A copy that the compiler knows nothing of. Without it, it computes masses, ranks and indices once
// for several steps and keeps them, in more registers than there are.
__device__ inline float forget(float x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(x));
#endif
  return x;
}

__device__ inline int forget(int index) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(index));
#endif
  return index;
}

// Where x lives: in registers, for at most kItems tokens per thread.
template <int kItems>
class InRegisters {
 public:
  __device__ InRegisters(const TokenRange& range, float*) : range_(range) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) x_[i] = -kInfinity;
  }
  // x = f(x, index) for the thread's tokens.
  template <class F>
  __device__ void update(F f) {
    const int first = forget(range_.first);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i < range_.num_held) x_[i] = f(x_[i], first + i * kWarpSize);
    }
  }
  // f(x, index), equally often in every thread: beyond the vocabulary x is -inf.
  template <class F>
  __device__ void visit(F f) const {
    const int first = forget(range_.first);
#pragma unroll
    for (int i = 0; i < kItems; ++i) f(forget(x_[i]), first + i * kWarpSize);
  }

 private:
  TokenRange range_;
  float x_[kItems];
};

// Where x lives: in the row's scratch. A thread touches its own tokens only.
class InMemory {
 public:
  __device__ InMemory(const TokenRange& range, float* x) : range_(range), x_(x) {}
  template <class F>
  __device__ void update(F f) {
    for (int i = 0; i < range_.num_held; ++i) {
      const int index = range_.index(i);
      x_[index] = f(x_[index], index);
    }
  }
  template <class F>
  __device__ void visit(F f) const {
    for (int i = 0; i < range_.num_items; ++i) {
      const int index = range_.index(i);
      f(i < range_.num_held ? x_[index] : -kInfinity, index);
    }
  }

 private:
  TokenRange range_;
  float* x_;
};

// ---- arithmetic: every multiplication and addition rounds by itself, none may become fma ----

// Ascending as an integer where x ascends; -0 must have become 0.
__device__ inline uint32_t order_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float key_value(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ inline uint64_t rank_of(float x, int index, float x_max) {
  const float bin = __fmul_rn(__fsub_rn(x_max, x), kBinsPerNat);
  const int digit = kNumDigits - 1 - static_cast<int>(fminf(bin, kNumDigits - 1));
  return static_cast<uint64_t>(digit) << (kKeyBits + kIndexBits) |
         static_cast<uint64_t>(order_key(x)) << kIndexBits | (kMaxVocabSize - 1 - index);
}

// The definition's exp2_mass: round(2**t * 2**40), 0 where t <= -42 or NaN.
__device__ inline uint64_t mass_of(float x, float x_max) {
  const float t = __fmul_rn(__fsub_rn(x, x_max), kLog2E);
  if (!(t > kLowestExponent)) return 0;
  const float n = rintf(t), f = __fsub_rn(t, n);
  float e = 0.00015353361959569156f;
  e = __fadd_rn(__fmul_rn(e, f), 0.0013398875016719103f);
  e = __fadd_rn(__fmul_rn(e, f), 0.00961843691766262f);
  e = __fadd_rn(__fmul_rn(e, f), 0.055503323674201965f);
  e = __fadd_rn(__fmul_rn(e, f), 0.24022647738456726f);
  e = __fadd_rn(__fmul_rn(e, f), 0.6931471824645996f);
  e = __fadd_rn(__fmul_rn(e, f), 1.0f);
  const float power =
      __uint_as_float(static_cast<uint32_t>(static_cast<int>(n) + 127 + kMassBits) << 23);
  return static_cast<uint64_t>(__fadd_rn(__fmul_rn(e, power), 0.5f));
}

// max(1, ceil(total * top_p_fixed / 2**32)); total < 2**60, top_p_fixed <= 2**32.
__device__ inline uint64_t mass_target(uint64_t total, uint64_t top_p_fixed) {
  const uint64_t low = (total & 0xffffffffu) * top_p_fixed + 0xffffffffu;
  const uint64_t target = (total >> 32) * top_p_fixed + (low >> 32);
  return target > 0 ? target : 1;
}

__device__ inline float to_float(float logit) { return logit; }
__device__ inline float to_float(uint16_t bf16) {
  return __uint_as_float(static_cast<uint32_t>(bf16) << 16);
}

__device__ inline bool is_finite(float x) { return fabsf(x) < kInfinity; }

// ---- meeting ----

// Posts to a slot; between posting and collecting lies a group.sync().
__device__ inline void post_max(Shared& shared, Slot slot, uint32_t value) {
  value = __reduce_max_sync(kAllLanes, value);
  if (lane_id() == 0) atomicMax(&shared.slots[slot], value);
}

__device__ inline void post_or(Shared& shared, Slot slot, uint32_t bits) {
  bits = __reduce_or_sync(kAllLanes, bits);
  if (lane_id() == 0) atomicOr(&shared.slots[slot], bits);
}

template <class Group>
__device__ uint32_t collect_max(const Group& group, const Shared& shared, Slot slot) {
  uint32_t highest = 0;
  for (int rank = 0; rank < group.size(); ++rank) {
    highest = max(highest, group.of_block(shared.slots[slot], rank));
  }
  return highest;
}

template <class Group>
__device__ uint32_t collect_or(const Group& group, const Shared& shared, Slot slot) {
  uint32_t bits = 0;
  for (int rank = 0; rank < group.size(); ++rank) {
    bits |= group.of_block(shared.slots[slot], rank);
  }
  return bits;
}

__device__ inline Sum shuffle_up(Sum sum, int delta) {
  return {__shfl_up_sync(kAllLanes, sum.mass, delta), __shfl_up_sync(kAllLanes, sum.count, delta)};
}

// The sum over this lane and those before it.
__device__ inline Sum sum_to_lane(Sum sum) {
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const Sum other = shuffle_up(sum, delta);
    if (lane_id() >= delta) sum = sum + other;
  }
  return sum;
}

// The sums over the threads before this one, and over all of the block.
struct Prefix {
  Sum mine, before, total;
};

__device__ inline Prefix prefix_in_block(Shared& shared, Sum mine) {
  __syncthreads();  // warp_sums may still be read from the call before
  const Sum to_lane = sum_to_lane(mine);
  if (lane_id() == kWarpSize - 1) shared.warp_sums[warp_id()] = to_lane;
  __syncthreads();
  Prefix prefix{mine, {to_lane.mass - mine.mass, to_lane.count - mine.count}, {}};
  for (int warp = 0; warp < num_threads() / kWarpSize; ++warp) {
    const Sum sum = shared.warp_sums[warp];
    if (warp < warp_id()) prefix.before = prefix.before + sum;
    prefix.total = prefix.total + sum;
  }
  return prefix;
}

// ---- sums per digit ----

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

// ---- selection ----

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

// ---- steps 1 and 2: combine and mask ----

struct RowArgs {
  const GuidedSampleArgs& a;
  int64_t seq;

  __device__ int64_t num_passes() const { return a.num_passes; }
  __device__ float weight(int64_t pass) const { return a.weights[pass * a.num_seqs + seq]; }
  // Clamped: a wrong value must not lead out of the digits.
  __device__ uint32_t top_k() const { return static_cast<uint32_t>(max(a.top_k[seq], 1)); }
  __device__ uint64_t top_p_fixed() const {
    return static_cast<uint64_t>(min(max(a.top_p_fixed[seq], int64_t{1}), int64_t{1} << 32));
  }
  // f(logits) with the pass's logits as a pointer to their type.
  template <class F>
  __device__ void with_logits(int64_t pass, F f) const {
    const int64_t offset = pass * a.pass_stride + seq * a.seq_stride;
    if (a.is_bf16) {
      f(static_cast<const uint16_t*>(a.logits) + offset);
    } else {
      f(static_cast<const float*>(a.logits) + offset);
    }
  }
};

// Raises `x_max` and gathers the status bits in the row's slots.
template <class Tokens>
__device__ void combine(const RowArgs& row, Tokens& tokens, Shared& shared) {
  tokens.update([](float, int) { return 0.0f; });
  for (int64_t pass = 0; pass < row.num_passes(); ++pass) {
    const float weight = row.weight(pass);
    if (weight == 0.0f) continue;  // not run: its logits may hold anything
    row.with_logits(pass, [&](const auto* logits) {
      tokens.update([&](float x, int index) {
        return __fadd_rn(x, __fmul_rn(to_float(logits[index]), weight));
      });
    });
  }
  const float inv_temperature = row.a.inv_temperature[row.seq];
  uint32_t status = 0;
  tokens.update([&](float x, int) {
    x = __fadd_rn(__fmul_rn(x, inv_temperature), 0.0f);  // -0 becomes 0: they are equal
    if (x != x) status |= kStatusNan;
    if (x > kMaxLogit) status |= kStatusInf;
    return x != x ? -kInfinity : fminf(x, kMaxLogit);
  });
  post_or(shared, kStatus, status);
}

// Cuts every token whose domain logit is not at least the highest + ln(alpha).
template <class Group, class Tokens>
__device__ void cut_implausible(const Group& group, const RowArgs& row, Tokens& tokens,
                                Shared& shared) {
  const float log_alpha = row.a.log_alpha[row.seq];
  if (!is_finite(log_alpha)) return;  // off, the same for the whole row
  float highest = -kInfinity;
  row.with_logits(0, [&](const auto* domain) {
    tokens.update([&](float x, int index) {
      highest = fmaxf(highest, to_float(domain[index]));  // drops a NaN
      return x;
    });
  });
  post_max(shared, kDomainMax, order_key(__fadd_rn(highest, 0.0f)));
  group.sync();
  const float lowest = __fadd_rn(key_value(collect_max(group, shared, kDomainMax)), log_alpha);
  row.with_logits(0, [&](const auto* domain) {
    tokens.update(
        [&](float x, int index) { return to_float(domain[index]) >= lowest ? x : -kInfinity; });
  });
}

template <class Group, class Tokens>
__device__ float find_max(const Group& group, const Tokens& tokens, Shared& shared, Slot slot) {
  float highest = -kInfinity;
  tokens.visit([&](float x, int) { highest = fmaxf(highest, x); });
  post_max(shared, slot, order_key(highest));
  group.sync();
  return key_value(collect_max(group, shared, slot));
}

// The lowest index whose x is x_max.
template <class Group, class Tokens>
__device__ int find_first(const Group& group, const Tokens& tokens, float x_max, Shared& shared,
                          Slot slot) {
  uint32_t reversed = 0;
  tokens.visit([&](float x, int index) {
    if (x == x_max) reversed = max(reversed, static_cast<uint32_t>(kMaxVocabSize - 1 - index));
  });
  post_max(shared, slot, reversed);
  group.sync();
  return static_cast<int>(kMaxVocabSize - 1 - collect_max(group, shared, slot));
}

// For a row with nothing left: the first of the highest finite domain logits.
template <class Group, class Tokens>
__device__ int find_fallback(const Group& group, const RowArgs& row, Tokens& tokens,
                             Shared& shared) {
  row.with_logits(0, [&](const auto* domain) {
    tokens.update([&](float, int index) {
      const float logit = __fadd_rn(to_float(domain[index]), 0.0f);
      return is_finite(logit) ? logit : kLowestFinite;
    });
  });
  const float highest = find_max(group, tokens, shared, kFallbackMax);
  return find_first(group, tokens, highest, shared, kFallbackFirst);
}

// ---- steps 3 to 5: masses, top-k and top-p ----

template <class Group, class Tokens>
__device__ Kept find_nucleus(const Group& group, const RowArgs& row, const Tokens& tokens,
                             float x_max, Shared& shared) {
  sum_digits(group, tokens, Bracket{0, kRankBits}, x_max, shared, shared.bins);
  Kept kept{0, scan_digits(group, shared, shared.bins).total};
#pragma unroll 1
  for (int cut = 0; cut < 2; ++cut) {  // a loop, so that select is compiled once
    // What top-k drops comes later in the order than what reaches a target of the rest.
    const Goal goal = cut == 0 ? Goal{~uint64_t{0}, row.top_k()}
                               : Goal{mass_target(kept.sum.mass, row.top_p_fixed()), ~uint32_t{0}};
    if (goal.count < kept.sum.count || goal.mass < kept.sum.mass) {
      kept = select(group, tokens, x_max, shared, goal);
    }
  }
  return kept;
}

// ---- step 6: draw ----

// The sum over the warp of masses up to 2**40, in two instructions.
__device__ inline uint64_t sum_of_warp(uint64_t mass) {
  const uint32_t low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(mass & 0x3ffffffu));
  const uint32_t high = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(mass >> 26));
  return low + (static_cast<uint64_t>(high) << 26);
}

// Writes the token of the row's `threshold`-th unit of kept mass, in index order. Blocks, then
// warps, then a warp's rows of 32 tokens, then lanes are in index order; one lane of all writes.
template <class Group, class Tokens>
__device__ void draw(const Group& group, const RowArgs& row, const Tokens& tokens, float x_max,
                     Shared& shared, const Kept& kept, uint64_t threshold) {
  const auto kept_mass = [&](float x, int index) {
    return rank_of(x, index, x_max) >= kept.lowest_rank ? mass_of(x, x_max) : 0;
  };
  uint64_t mine = 0;
  tokens.visit([&](float x, int index) { mine += kept_mass(x, index); });
  const Prefix prefix = prefix_in_block(shared, Sum{mine, 0});
  if (threadIdx.x == 0) shared.kept_mass = prefix.total.mass;
  group.sync();

  uint64_t start = __shfl_sync(kAllLanes, prefix.before.mass, 0);
  const uint64_t end = __shfl_sync(kAllLanes, prefix.before.mass + mine, kWarpSize - 1);
  const uint64_t warp_mass = end - start;
  for (int rank = 0; rank < group.block_rank(); ++rank) {
    start += group.of_block(shared.kept_mass, rank);
  }
  uint64_t left = threshold - start;  // wraps where the threshold lies before this warp
  if (left >= warp_mass) return;

  bool is_found = false;
  uint64_t mass = 0;
  int token = 0;
  tokens.visit([&](float x, int index) {
    if (is_found) return;  // the same for the whole warp
    mass = kept_mass(x, index);
    token = index;
    const uint64_t sum = sum_of_warp(mass);
    is_found = left < sum;
    if (!is_found) left -= sum;
  });
  const uint64_t to_lane = sum_to_lane(Sum{mass, 0}).mass;
  if (to_lane - mass <= left && left < to_lane) {
    row.a.token_ids[row.seq] = token;
    const double share = static_cast<double>(mass) / static_cast<double>(kept.sum.mass);
    row.a.logprobs[row.seq] = static_cast<float>(log(share));
  }
}

// ---- the row ----

template <class Tokens, class Group>
__device__ void sample_row(const GuidedSampleLaunch& launch, const Group& group, Shared& shared) {
  const RowArgs row{launch.args, group.row()};
  const GuidedSampleArgs& a = row.a;
  const int vocab_size = static_cast<int>(a.vocab_size);
  const bool is_first_thread = threadIdx.x == 0 && group.block_rank() == 0;
  if (threadIdx.x < kNumSlots) shared.slots[threadIdx.x] = 0;
  __syncthreads();

  // 1, 2. Combine and mask.
  float* x = launch.x ? launch.x + row.seq * a.vocab_size : nullptr;
  Tokens tokens(TokenRange::of_thread(group, vocab_size), x);
  combine(row, tokens, shared);
  cut_implausible(group, row, tokens, shared);
  const float x_max = find_max(group, tokens, shared, kXMax);
  const uint32_t status = collect_or(group, shared, kStatus);

  if (x_max == -kInfinity) {
    const int token = find_fallback(group, row, tokens, shared);
    if (is_first_thread) {
      a.token_ids[row.seq] = token;
      a.logprobs[row.seq] = 0.0f;
      a.status[row.seq] = static_cast<int32_t>(status) | kStatusEmpty;
      a.num_kept[row.seq] = 0;
      a.total_mass[row.seq] = 0;
    }
    group.sync();  // the last read of another block's memory lies before it
    return;
  }

  // 3 to 5. Masses, top-k and top-p.
  const Kept kept = find_nucleus(group, row, tokens, x_max, shared);

  // 6. Draw.
  if (a.greedy[row.seq]) {
    const int token = find_first(group, tokens, x_max, shared, kFirst);
    if (is_first_thread) {
      a.token_ids[row.seq] = token;
      a.logprobs[row.seq] = 0.0f;
    }
  } else {
    const uint64_t random = random_bits(static_cast<uint64_t>(*launch.seed), a.stream_ids[row.seq],
                                        a.steps[row.seq], kStreamTokens);
    draw(group, row, tokens, x_max, shared, kept, __umul64hi(random, kept.sum.mass));
  }
  if (is_first_thread) {
    a.status[row.seq] = static_cast<int32_t>(status);
    a.num_kept[row.seq] = static_cast<int32_t>(kept.sum.count);
    a.total_mass[row.seq] = static_cast<int64_t>(kept.sum.mass);
  }
  group.sync();  // the last read of another block's memory lies before it
}

// One cluster per row; from sm_90 on (for older targets it is empty, and never launched).
template <int kItems>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sample_in_cluster(const __grid_constant__ GuidedSampleLaunch launch) {
#ifdef _CG_HAS_CLUSTER_GROUP
  __shared__ Shared shared;
  sample_row<InRegisters<kItems>>(launch, Cluster{}, shared);
#endif
}

// One block per row.
__global__ void __launch_bounds__(kMaxThreads, 1)
    sample_in_block(const __grid_constant__ GuidedSampleLaunch launch) {
  __shared__ Shared shared;
  sample_row<InMemory>(launch, OneBlock{}, shared);
}

}  // namespace steer

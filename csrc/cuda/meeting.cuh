// How the threads of a row meet: shuffles in a warp, shared memory in a block, and between the
// blocks of a cluster, barriers and reads of each other's shared memory.
//
// A cluster owns one row, a block one part of it and one Shared. A thread posts what it has found
// to its own block's Shared; after a group.sync() every thread collects from all blocks. Nobody
// spins, and maxima and integer sums do not depend on their order: the result is the same for every
// split of a row.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#include "cuda/rank.cuh"

namespace steer {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 512;  // of a block
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }
__device__ inline int num_threads() { return static_cast<int>(blockDim.x); }

// Mass and number of some tokens.
struct Sum {
  uint64_t mass;
  uint32_t count;
};

__device__ inline Sum operator+(Sum a, Sum b) { return {a.mass + b.mass, a.count + b.count}; }

// A digit of the ranks in a bracket (selection.cuh): what lies above it, and what it holds.
struct Found {
  int digit;
  Sum above, inside;
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

// A block's shared memory: 44 KiB and a few numbers, of the 48 that a kernel has without asking.
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
// A row's blocks, where they are a cluster.
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

// A row's blocks, where it has only one.
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

// The sum over the warp of masses up to 2**40, in two instructions.
__device__ inline uint64_t sum_of_warp(uint64_t mass) {
  const uint32_t low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(mass & 0x3ffffffu));
  const uint32_t high = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(mass >> 26));
  return low + (static_cast<uint64_t>(high) << 26);
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

// A thread's own sum, the sum over the threads before it, and over all of the block.
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

}  // namespace steer

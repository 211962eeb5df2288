// Guided sampling in one launch, bit for bit as kernels/reference/guided_sample.py defines it:
//
//   x_v = (w_d*l_d[v] + w_b*l_b[v] + w_n*l_n[v]) * (1/T)
//   token ~ softmax(x), cut by alpha, then top-k, then top-p
//
// One cluster of thread blocks (or one block) owns one row, that is one sequence; a block owns a
// part of the row, and a thread num_items of its tokens. x stays where it was computed, in
// registers or in scratch, from step 1 to the end. In reading order:
//
//   rank.cuh       a token's mass, and its place in the order
//   meeting.cuh    how the threads of a row exchange what they find
//   tokens.cuh     which tokens a thread owns, and where x lives
//   combine.cuh    steps 1 and 2
//   selection.cuh  the cut that steps 4 and 5 make
//   this file      the row, step by step, and the kernels
#pragma once

#include "cuda/combine.cuh"
#include "cuda/selection.cuh"
#include "philox.h"

namespace steer {

// Steps 3 to 5: masses, top-k and top-p.
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

// A warp's kept mass, and what is kept in the row's warps before it.
struct WarpMass {
  uint64_t before, own;
};

template <class Group>
__device__ WarpMass mass_of_warp(const Group& group, Shared& shared, uint64_t mine) {
  const Prefix prefix = prefix_in_block(shared, Sum{mine, 0});
  if (threadIdx.x == 0) shared.kept_mass = prefix.total.mass;
  group.sync();
  uint64_t before = __shfl_sync(kAllLanes, prefix.before.mass, 0);
  const uint64_t end = __shfl_sync(kAllLanes, prefix.before.mass + mine, kWarpSize - 1);
  const uint64_t own = end - before;
  for (int rank = 0; rank < group.block_rank(); ++rank) {
    before += group.of_block(shared.kept_mass, rank);
  }
  return {before, own};
}

// Step 6: writes the token of the row's `threshold`-th unit of kept mass, in index order, and its
// logprob. One lane of all writes.
template <class Group, class Tokens>
__device__ void draw(const Group& group, const RowArgs& row, const Tokens& tokens, float x_max,
                     Shared& shared, const Kept& kept, uint64_t threshold) {
  const auto kept_mass = [&](float x, int index) {
    return rank_of(x, index, x_max) >= kept.lowest_rank ? mass_of(x, x_max) : 0;
  };
  uint64_t mine = 0;
  tokens.visit([&](float x, int index) { mine += kept_mass(x, index); });
  const WarpMass warp = mass_of_warp(group, shared, mine);
  uint64_t left = threshold - warp.before;  // wraps where the threshold lies before this warp
  if (left >= warp.own) return;

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
    const double share = static_cast<double>(mass) / static_cast<double>(kept.sum.mass);
    row.write_token(token, static_cast<float>(log(share)));
  }
}

template <class Tokens, class Group>
__device__ void sample_row(const GuidedSampleLaunch& launch, const Group& group, Shared& shared) {
  const RowArgs row{launch.args, group.row()};
  const GuidedSampleArgs& a = row.a;
  const bool is_first_thread = threadIdx.x == 0 && group.block_rank() == 0;
  if (threadIdx.x < kNumSlots) shared.slots[threadIdx.x] = 0;
  __syncthreads();

  // 1, 2. Combine and mask.
  float* x = launch.x ? launch.x + row.seq * a.vocab_size : nullptr;
  Tokens tokens(TokenRange::of_thread(group, static_cast<int>(a.vocab_size)), x);
  combine(row, tokens, shared);
  cut_implausible(group, row, tokens, shared);
  const float x_max = find_max(group, tokens, shared, kXMax);
  const uint32_t status = collect_or(group, shared, kStatus);

  if (x_max == -kInfinity) {
    const int token = find_fallback(group, row, tokens, shared);
    if (is_first_thread) {
      row.write_token(token, 0.0f);
      row.write_nucleus(status | kStatusEmpty, Sum{});
    }
  } else {
    // 3 to 5. Masses, top-k and top-p.
    const Kept kept = find_nucleus(group, row, tokens, x_max, shared);

    // 6. Draw.
    if (a.greedy[row.seq]) {
      const int token = find_first(group, tokens, x_max, shared, kFirst);
      if (is_first_thread) row.write_token(token, 0.0f);
    } else {
      const uint64_t random = random_bits(static_cast<uint64_t>(*launch.seed),
                                          a.stream_ids[row.seq], a.steps[row.seq], kStreamTokens);
      draw(group, row, tokens, x_max, shared, kept, __umul64hi(random, kept.sum.mass));
    }
    if (is_first_thread) row.write_nucleus(status, kept.sum);
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

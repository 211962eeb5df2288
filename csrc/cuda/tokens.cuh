// Which tokens of a row a thread owns, and where their x lives: in registers or in scratch.
//
// A cluster (or a single block) owns one row of vocab_size tokens; its warps, in the order of the
// blocks, own 32 * num_items tokens in a row each; lane l of a warp owns every 32nd from the l-th.
// So loads are coalesced, and blocks, then warps, then items, then lanes are in index order. A
// thread alone reads and writes the x of its tokens.
#pragma once

#include "cuda/meeting.cuh"

namespace steer {

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

// x in registers, for at most kItems tokens per thread.
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

// x in the row's scratch, [vocab_size].
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

}  // namespace steer

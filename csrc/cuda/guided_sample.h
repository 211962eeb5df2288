// The CUDA sampler's entry points, for callers that need not know CUDA. A cudaStream_t travels as
// the integer that Torch gives it out as.
#pragma once

#include <cstdint>

#include "cpu/ops.h"

namespace steer {

// What the kernel reads beside the arguments it shares with the CPU op (args.seed is not used).
struct GuidedSampleLaunch {
  GuidedSampleArgs args;
  const int64_t* seed;  // [1], on the device: a captured graph can serve another seed
  float* x;             // [num_seqs, vocab_size] scratch, or null where x stays in registers
};

// Of one token's place in the kernel's order.
constexpr int kIndexBits = 20;
constexpr int64_t kMaxVocabSize = int64_t{1} << kIndexBits;

// Of a cluster of 4: 32 for each of the 512 threads of a block.
constexpr int64_t kMaxVocabSizeInRegisters = 4 * 32 * 512;

constexpr bool is_cluster_size(int64_t size, int64_t vocab_size) {
  return size == 0 ||
         ((size == 4 || size == 8 || size == 16) && vocab_size <= kMaxVocabSizeInRegisters);
}

// How many thread blocks share a row on the current device: 4, 8 or 16, with x in registers; or
// 0: one block per row, with x in the caller's scratch (no clusters, or too large a vocabulary).
int choose_cluster_size(int64_t num_seqs, int64_t vocab_size);

// Launches on the current device; null, or what CUDA has against it. Neither allocates nor waits.
const char* launch_guided_sample(const GuidedSampleLaunch& launch, int cluster_size,
                                 int64_t stream);

}  // namespace steer

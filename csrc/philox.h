// Philox4x32-10, the counter-based generator behind every random choice
// (kernels/reference/philox.py). Source: Salmon et al. 2011, "Parallel random numbers: as easy as
// 1, 2, 3" (Random123).
#pragma once

#include <cstdint>

namespace steer {

// The fourth counter word separates the uses of one seed; 0 draws tokens.
constexpr uint32_t kStreamTokens = 0;

// 64 random bits: words 0 (high) and 1 (low) for key = seed, counter = (step, stream id low, high,
// stream).
constexpr uint64_t random_bits(uint64_t seed, int64_t stream_id, int64_t step, uint32_t stream) {
  uint32_t counter[4] = {static_cast<uint32_t>(step), static_cast<uint32_t>(stream_id),
                         static_cast<uint32_t>(static_cast<uint64_t>(stream_id) >> 32), stream};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(counter[0]) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(counter[2]) * 0xCD9E8D57u;
    counter[0] = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0];
    counter[1] = static_cast<uint32_t>(product1);
    counter[2] = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1];
    counter[3] = static_cast<uint32_t>(product0);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return static_cast<uint64_t>(counter[0]) << 32 | counter[1];
}

}  // namespace steer

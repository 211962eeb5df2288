// Cuts a list of tokens to a prefix in the order (x descending, index ascending), without sorting
// it.
#pragma once

#include <bit>
#include <cstdint>

namespace steer {

// Tokens that may be kept, by index ascending. A mass is a whole number below 2**41, exact in fp32.
// x is never NaN and never -0.
struct TokenList {
  float* x;
  float* mass;
  int32_t* index;
  int64_t size;
};

// Ascending as an integer where x ascends.
inline uint32_t order_key(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
inline float from_order_key(uint32_t key) {
  return std::bit_cast<float>(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// Both return the lowest x that is left. In x_by_index, -inf replaces the x of what is cut.
// members: scratch, [list.size].

// Keeps the first `count` tokens of the order; all if there are fewer.
float keep_first(TokenList& list, int64_t count, int32_t* members, float* x_by_index);

// Keeps the shortest prefix of the order whose mass reaches `target`, 0 < target <= the list's
// mass.
float keep_mass(TokenList& list, uint64_t target, int32_t* members, float* x_by_index);

uint64_t total_mass(const TokenList& list);

}  // namespace steer

// Cuts a list of tokens to a prefix in the order (x descending, index ascending), without sorting
// it.
#pragma once

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

// Keeps the first `count` tokens of the order; all if there are fewer. `members`: scratch,
// [list.size].
void keep_first(TokenList& list, int64_t count, int32_t* members);

// Keeps the shortest prefix of the order whose mass reaches `target`, 0 < target <= the list's
// mass.
void keep_mass(TokenList& list, uint64_t target, int32_t* members);

uint64_t total_mass(const TokenList& list);

}  // namespace steer

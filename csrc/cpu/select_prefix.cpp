#include "cpu/select_prefix.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace steer {

namespace {

// Where a prefix ends: every larger x stays, and of those that equal x the first num_ties.
struct Boundary {
  float x;
  uint64_t num_ties;
};

// The prefix's end by radix selection: the weights are summed per digit of the key, and only the
// digit in which the sum reaches the target is looked into. A digit is the 11 highest bits in which
// the members differ, so that there are at most three rounds, and none if all are equal. (A
// histogram of 2048 sums is 16 KB and stays in L1.)
template <class Weight>
Boundary find_boundary(const TokenList& list, uint64_t target, int32_t* members, Weight weight) {
  constexpr int kDigitBits = 11;
  constexpr uint32_t kNumDigits = 1 << kDigitBits;
  int64_t num_members = list.size;
  uint32_t differing = 0;  // bits
  for (int64_t i = 0; i < num_members; ++i) {
    members[i] = static_cast<int32_t>(i);
    differing |= order_key(list.x[i]) ^ order_key(list.x[0]);
  }
  uint64_t above = 0;  // weight of what certainly comes before the boundary
  while (differing != 0) {
    const int shift = std::max(0, static_cast<int>(std::bit_width(differing)) - kDigitBits);
    const auto digit_of = [&](int32_t member) {
      return order_key(list.x[member]) >> shift & (kNumDigits - 1);
    };
    uint64_t histogram[kNumDigits] = {};
    for (int64_t i = 0; i < num_members; ++i) histogram[digit_of(members[i])] += weight(members[i]);
    uint32_t digit = kNumDigits - 1;
    while (digit > 0 && above + histogram[digit] < target) above += histogram[digit--];
    int64_t num_left = 0;
    differing = 0;
    for (int64_t i = 0; i < num_members; ++i) {
      const int32_t member = members[i];
      if (digit_of(member) != digit) continue;
      members[num_left++] = member;
      differing |= order_key(list.x[member]) ^ order_key(list.x[members[0]]);
    }
    num_members = num_left;
  }
  // All members have the same x now, so the same weight.
  const uint64_t each = weight(members[0]);
  return {list.x[members[0]], (target - above + each - 1) / each};
}

// What is cut from the list becomes -inf in x_by_index.
float cut(TokenList& list, Boundary last, float* x_by_index) {
  int64_t size = 0;
  for (int64_t i = 0; i < list.size; ++i) {
    const float x = list.x[i];
    const bool is_tie = x == last.x;
    const bool stays = x > last.x || (is_tie && last.num_ties > 0);
    last.num_ties -= is_tie && last.num_ties > 0;
    if (!stays) x_by_index[list.index[i]] = -std::numeric_limits<float>::infinity();
    list.x[size] = x;
    list.mass[size] = list.mass[i];
    list.index[size] = list.index[i];
    size += stays;
  }
  list.size = size;
  return last.x;
}

}  // namespace

float keep_first(TokenList& list, int64_t count, int32_t* members, float* x_by_index) {
  if (count >= list.size) return *std::min_element(list.x, list.x + list.size);
  return cut(list, find_boundary(list, count, members, [](int32_t) { return uint64_t{1}; }),
             x_by_index);
}

float keep_mass(TokenList& list, uint64_t target, int32_t* members, float* x_by_index) {
  return cut(list,
             find_boundary(list, target, members,
                           [&](int32_t i) { return static_cast<uint64_t>(list.mass[i]); }),
             x_by_index);
}

uint64_t total_mass(const TokenList& list) {
  uint64_t total = 0;
  for (int64_t i = 0; i < list.size; ++i) total += static_cast<uint64_t>(list.mass[i]);
  return total;
}

}  // namespace steer

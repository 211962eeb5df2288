#include "cpu/select_prefix.h"

#include <bit>
#include <numeric>

namespace steer {

namespace {

// Where a prefix ends: every larger x stays, and of those that equal x the first num_ties.
struct Boundary {
  float x;
  uint64_t num_ties;
};

// Ascending as an integer where x ascends.
uint32_t order_key(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The prefix's end by radix selection: the weights are summed per digit of the key, highest digit
// first, and only the digit in which the sum reaches the target is looked into. Three rounds over
// at most size members, even if all are equal. (11, 11 and 10 bits: a histogram of 2048 sums is 16
// KB and stays in L1.)
template <class Weight>
Boundary find_boundary(const TokenList& list, uint64_t target, int32_t* members, Weight weight) {
  constexpr int kShifts[] = {21, 10, 0};
  constexpr uint32_t kNumDigits = 2048;
  int64_t num_members = list.size;
  std::iota(members, members + num_members, 0);
  uint64_t above = 0;  // weight of what certainly comes before the boundary
  for (const int shift : kShifts) {
    const uint32_t mask = shift == 0 ? 1023 : kNumDigits - 1;
    uint64_t histogram[kNumDigits] = {};
    for (int64_t i = 0; i < num_members; ++i) {
      histogram[order_key(list.x[members[i]]) >> shift & mask] += weight(members[i]);
    }
    uint32_t digit = mask;
    while (digit > 0 && above + histogram[digit] < target) above += histogram[digit--];
    int64_t num_left = 0;
    for (int64_t i = 0; i < num_members; ++i) {
      members[num_left] = members[i];
      num_left += (order_key(list.x[members[i]]) >> shift & mask) == digit;
    }
    num_members = num_left;
  }
  // All members have the same x now, so the same weight.
  const uint64_t each = weight(members[0]);
  return {list.x[members[0]], (target - above + each - 1) / each};
}

void cut(TokenList& list, Boundary last) {
  int64_t size = 0;
  for (int64_t i = 0; i < list.size; ++i) {
    const float x = list.x[i];
    const bool is_tie = x == last.x;
    const bool stays = x > last.x || (is_tie && last.num_ties > 0);
    last.num_ties -= is_tie && last.num_ties > 0;
    list.x[size] = x;
    list.mass[size] = list.mass[i];
    list.index[size] = list.index[i];
    size += stays;
  }
  list.size = size;
}

}  // namespace

void keep_first(TokenList& list, int64_t count, int32_t* members) {
  if (count >= list.size) return;
  cut(list, find_boundary(list, count, members, [](int32_t) { return uint64_t{1}; }));
}

void keep_mass(TokenList& list, uint64_t target, int32_t* members) {
  cut(list, find_boundary(list, target, members,
                          [&](int32_t i) { return static_cast<uint64_t>(list.mass[i]); }));
}

uint64_t total_mass(const TokenList& list) {
  uint64_t total = 0;
  for (int64_t i = 0; i < list.size; ++i) total += static_cast<uint64_t>(list.mass[i]);
  return total;
}

}  // namespace steer

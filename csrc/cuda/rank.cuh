// One token's mass and rank, from its x and the row's highest. A token belongs to one thread, which
// computes both anew wherever it needs them.
//
// The rank is the token's place in the definition's order (x descending, index ascending) as one
// integer; the higher, the earlier:
//
//   bits 61..52  distance of x below max x, in bins of 1/32 nat, reversed
//   bits 51..20  x, as an integer that ascends where x ascends
//   bits 19..0   index, reversed
//
// Ranks are distinct. The bin goes first because it spreads the tokens evenly, and it keeps the
// order: a bin's number never falls where x falls.
//
// Every multiplication and addition rounds by itself, none may become fma: the definition is exact.
#pragma once

#include <cstdint>

#include "cuda/guided_sample.h"

namespace steer {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2E = 1.44269504f;
constexpr int kMassBits = 40;              // a mass is at most 2**40
constexpr float kLowestExponent = -42.0f;  // below 2**-41 of the top token a mass rounds to 0

constexpr int kDigitBits = 10;
constexpr int kNumDigits = 1 << kDigitBits;
constexpr int kKeyBits = 32;
constexpr int kRankBits = kDigitBits + kKeyBits + kIndexBits;
constexpr float kBinsPerNat = 32.0f;  // tokens with a mass lie within 29.2 nats, so in 935 bins

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

// max(1, ceil(total * top_p_fixed / 2**32)); total <= 2**60, top_p_fixed <= 2**32.
__device__ inline uint64_t mass_target(uint64_t total, uint64_t top_p_fixed) {
  const uint64_t low = (total & 0xffffffffu) * top_p_fixed + 0xffffffffu;
  const uint64_t target = (total >> 32) * top_p_fixed + (low >> 32);
  return target > 0 ? target : 1;
}

}  // namespace steer

// bfloat16: the upper half of an fp32.
#pragma once

#include <cstdint>
#include <cstring>

namespace steer {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void assign(float& to, float x) { to = x; }

// Rounds to nearest even, as Torch does; NaN stays NaN.
inline void assign(bf16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool is_nan = x != x;
  to.bits = is_nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace steer

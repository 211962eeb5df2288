// F16: 16 fp32 lanes and what the kernels do with them. This file is the definition; simd_avx2.h
// and simd_avx512.h hold the same functions in instructions. All levels have 16 lanes, so layouts
// and loops are the same on all.
#pragma once

namespace steer::STEER_ISA {

// A tile of the matrix product: this many rows by this many groups of 16 columns are summed in
// registers.
constexpr int kRowTile = 2;
constexpr int kColumnTile = 1;

struct F16 {
  float v[16];
};

struct Mask {
  bool m[16];
};

template <class Function>
inline F16 each_lane(Function f) {
  F16 result;
  for (int i = 0; i < 16; ++i) result.v[i] = f(i);
  return result;
}

template <class Function>
inline Mask each_lane_mask(Function f) {
  Mask result;
  for (int i = 0; i < 16; ++i) result.m[i] = f(i);
  return result;
}

inline F16 splat(float x) {
  return each_lane([&](int) { return x; });
}
inline F16 load(const float* p) {
  return each_lane([&](int i) { return p[i]; });
}
inline F16 load(const bf16* p) {
  return each_lane([&](int i) { return to_float(p[i]); });
}
inline F16 load(const int8_t* p) {
  return each_lane([&](int i) { return static_cast<float>(p[i]); });
}
inline void store(float* p, F16 a) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
inline void store(bf16* p, F16 a) {
  for (int i = 0; i < 16; ++i) assign(p[i], a.v[i]);
}

// For whole numbers from 0 on, below 2**31 or below 2**52; int32_t: towards zero for others.
inline void store_whole(int32_t* p, F16 a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int32_t>(a.v[i]);
}
inline void store_whole(uint64_t* p, F16 a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint64_t>(a.v[i]);
}

inline F16 operator+(F16 a, F16 b) {
  return each_lane([&](int i) { return a.v[i] + b.v[i]; });
}
inline F16 operator-(F16 a, F16 b) {
  return each_lane([&](int i) { return a.v[i] - b.v[i]; });
}
inline F16 operator*(F16 a, F16 b) {
  return each_lane([&](int i) { return a.v[i] * b.v[i]; });
}
// a * b + c, with one rounding where the instruction set has it and two here.
inline F16 fma(F16 a, F16 b, F16 c) { return a * b + c; }
// Returns b where a is NaN or b is.
inline F16 max(F16 a, F16 b) {
  return each_lane([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F16 min(F16 a, F16 b) {
  return each_lane([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// For |a| < 2**22: adding 1.5 * 2**23 leaves no bits for a fraction.
inline F16 round_to_even(F16 a) {
  constexpr float kShift = 12582912.0f;
  return each_lane([&](int i) { return (a.v[i] + kShift) - kShift; });
}
// Towards zero, for |a| < 2**63.
inline F16 truncate(F16 a) {
  return each_lane([&](int i) { return static_cast<float>(static_cast<int64_t>(a.v[i])); });
}
// 2**n for whole n from -126 to 127.
inline F16 power_of_two(F16 n) {
  return each_lane(
      [&](int i) { return std::bit_cast<float>((static_cast<int32_t>(n.v[i]) + 127) << 23); });
}

// False where either side is NaN.
inline Mask greater(F16 a, F16 b) {
  return each_lane_mask([&](int i) { return a.v[i] > b.v[i]; });
}
// True where either side is NaN.
inline Mask not_greater_equal(F16 a, F16 b) {
  return each_lane_mask([&](int i) { return !(a.v[i] >= b.v[i]); });
}
inline Mask operator|(Mask a, Mask b) {
  return each_lane_mask([&](int i) { return a.m[i] | b.m[i]; });
}
inline F16 select(Mask m, F16 a, F16 b) {
  return each_lane([&](int i) { return m.m[i] ? a.v[i] : b.v[i]; });
}
// Bit i is lane i.
inline uint32_t bits(Mask m) {
  uint32_t result = 0;
  for (int i = 0; i < 16; ++i) result |= static_cast<uint32_t>(m.m[i]) << i;
  return result;
}

// Over the lanes, always in the same order.
inline float sum(F16 a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  }
  return a.v[0];
}
inline float maximum(F16 a) {
  for (int i = 1; i < 16; ++i) a.v[0] = a.v[0] > a.v[i] ? a.v[0] : a.v[i];
  return a.v[0];
}

// to[i][r] = rows[r][at + i], 16 x 16 elements of 32 bits: fp32 or pairs of bf16.
template <class T>
inline void transpose(const T* const (&rows)[16], int64_t at, T* to) {
  constexpr int kParts = 4 / sizeof(T);
  for (int r = 0; r < 16; ++r) {
    const T* row = rows[r] + at;
    for (int i = 0; i < 16 * kParts; ++i) {
      to[(i / kParts * 16 + r) * kParts + i % kParts] = row[i];
    }
  }
}

// A sum of whole numbers, exact while it stays below 2**53.
class ExactSum {
 public:
  void add(F16 a) {
    for (int i = 0; i < 16; ++i) total_ += static_cast<uint64_t>(a.v[i]);
  }
  uint64_t total() const { return total_; }

 private:
  uint64_t total_ = 0;
};

// From this many rows on a bf16 product is faster if weights and inputs are converted to fp32
// beforehand (measured on 4544 x 22848); kNever where bf16 products are an instruction.
constexpr int64_t kMinRowsToConvert = 3;

// Whether weights arrive sooner if they are asked for ahead of their use (bench/NOTES.md).
constexpr bool kPrefetchesWeights = false;

// Two inputs by 16 outputs of a packed bf16 weight; multiply_add adds both products to the sum.
struct Bf16Weights {
  F16 even, odd;
};
// Of whole numbers up to 256, which bf16 holds exactly.
inline Bf16Weights pair_up(F16 even, F16 odd) { return {even, odd}; }
inline void store(float* p, Bf16Weights w) {
  store(p, w.even);
  store(p + kLanes, w.odd);
}
inline Bf16Weights load_weights(const bf16* p) {
  return {each_lane([&](int i) { return to_float(p[2 * i]); }),
          each_lane([&](int i) { return to_float(p[2 * i + 1]); })};
}
// Pair kPair of a unit, see compressed_weight.h.
template <int kPair>
inline Bf16Weights decompress(const uint8_t* unit, const uint16_t* lowest_exponents) {
  uint16_t codes[2 * kLanes], rest[2 * kLanes];
  std::memcpy(codes, unit, sizeof codes);
  std::memcpy(rest, unit + (1 + kPair / 2) * sizeof rest, sizeof rest);
  bf16 values[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) {
    const int code = codes[i] >> (4 * kPair) & 0xf;
    const int kept = (kPair % 2 ? std::rotl(rest[i], 8) : rest[i]) & kSignAndMantissa;
    values[i].bits = static_cast<uint16_t>(kept | (lowest_exponents[i] + (code << kMantissaBits)));
  }
  return load_weights(values);
}
inline F16 multiply_add(F16 sum, const bf16* x_pair, Bf16Weights w) {
  sum = fma(splat(to_float(x_pair[0])), w.even, sum);
  return fma(splat(to_float(x_pair[1])), w.odd, sum);
}

}  // namespace steer::STEER_ISA

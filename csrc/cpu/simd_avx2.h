// F16, 16 fp32 lanes, as two AVX2 registers. simd_portable.h says what each function means.
#pragma once

namespace steer::STEER_ISA {

// 6 x 1 sums, a weight and a broadcast fill 15 of 16 registers.
constexpr int kRowTile = 6;
constexpr int kColumnTile = 1;

struct F16 {
  __m256 lo, hi;
};

struct Mask {
  __m256 lo, hi;
};

inline __m256 as_float(__m256i bits) { return _mm256_castsi256_ps(bits); }
inline __m256i as_bits(__m256 a) { return _mm256_castps_si256(a); }

inline F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F16 load(const bf16* p) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(p);
  const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(halves));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1));
  return {as_float(_mm256_slli_epi32(lo, 16)), as_float(_mm256_slli_epi32(hi, 16))};
}
inline F16 load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)))};
}
inline void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline __m256i rounded_to_bf16(__m256 a) {
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(as_bits(a), 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_add_epi32(as_bits(a), _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = as_bits(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), is_nan);
}
inline void store(bf16* p, F16 a) {
  const __m256i packed = _mm256_packus_epi32(rounded_to_bf16(a.lo), rounded_to_bf16(a.hi));
  // packus works within 128-bit halves; put the quarters back in order.
  const __m256i ordered = _mm256_permute4x64_epi64(packed, 0b11011000);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), ordered);
}

inline void store_whole(int32_t* p, F16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvttps_epi32(a.lo));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), _mm256_cvttps_epi32(a.hi));
}
inline void store_whole(uint64_t* p, __m128 a) {
  // 2**52 + a has a as its fraction's bits.
  const __m256d shift = _mm256_set1_pd(0x1p52);
  const __m256d shifted = _mm256_add_pd(_mm256_cvtps_pd(a), shift);
  _mm256_storeu_pd(reinterpret_cast<double*>(p), _mm256_xor_pd(shifted, shift));
}
inline void store_whole(uint64_t* p, F16 a) {
  store_whole(p, _mm256_castps256_ps128(a.lo));
  store_whole(p + 4, _mm256_extractf128_ps(a.lo, 1));
  store_whole(p + 8, _mm256_castps256_ps128(a.hi));
  store_whole(p + 12, _mm256_extractf128_ps(a.hi, 1));
}

inline F16 operator+(F16 a, F16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F16 operator-(F16 a, F16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F16 operator*(F16 a, F16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F16 round_to_even(F16 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
inline F16 truncate(F16 a) {
  constexpr int kMode = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
inline __m256 power_of_two(__m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return as_float(_mm256_slli_epi32(exponent, 23));
}
inline F16 power_of_two(F16 n) { return {power_of_two(n.lo), power_of_two(n.hi)}; }

inline Mask greater(F16 a, F16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
}
inline Mask not_greater_equal(F16 a, F16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_NGE_UQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_NGE_UQ)};
}
inline Mask operator|(Mask a, Mask b) {
  return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)};
}
inline F16 select(Mask m, F16 a, F16 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
inline uint32_t bits(Mask m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.lo)) |
         static_cast<uint32_t>(_mm256_movemask_ps(m.hi)) << 8;
}

inline float sum(F16 a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float maximum(F16 a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// 8 x 8 of the elements; columns of `to` are 16 apart.
inline void transpose_quarter(const int32_t* const (&rows)[8], int32_t* to) {
  __m256i a[8], b[8];
  for (int r = 0; r < 8; ++r) b[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r]));
  for (int r = 0; r < 8; r += 2) {
    a[r] = _mm256_unpacklo_epi32(b[r], b[r + 1]);
    a[r + 1] = _mm256_unpackhi_epi32(b[r], b[r + 1]);
  }
  for (int r = 0; r < 8; r += 4) {
    b[r] = _mm256_unpacklo_epi64(a[r], a[r + 2]);
    b[r + 1] = _mm256_unpackhi_epi64(a[r], a[r + 2]);
    b[r + 2] = _mm256_unpacklo_epi64(a[r + 1], a[r + 3]);
    b[r + 3] = _mm256_unpackhi_epi64(a[r + 1], a[r + 3]);
  }
  // Half h of b[4 p + i] is column 4 h + i of rows 4 p to 4 p + 3.
  for (int i = 0; i < 4; ++i) {
    const __m256i lower = _mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
    const __m256i upper = _mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * 16), lower);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (4 + i) * 16), upper);
  }
}
template <class T>
inline void transpose(const T* const (&rows)[16], int64_t at, T* to) {
  int32_t* columns = reinterpret_cast<int32_t*>(to);
  for (int row = 0; row < 16; row += 8) {
    for (int column = 0; column < 16; column += 8) {
      const int32_t* quarter[8];
      for (int r = 0; r < 8; ++r) {
        quarter[r] = reinterpret_cast<const int32_t*>(rows[row + r] + at) + column;
      }
      transpose_quarter(quarter, columns + column * 16 + row);
    }
  }
}

// A sum of whole numbers, exact while it stays below 2**53.
class ExactSum {
 public:
  // Written out: GCC would make the implicit constructor without the instruction set of the pragma.
  ExactSum() : lower_(_mm256_setzero_pd()), upper_(_mm256_setzero_pd()) {}
  void add(F16 a) {
    add(a.lo);
    add(a.hi);
  }
  uint64_t total() const {
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(lower_, upper_));
    return static_cast<uint64_t>(lanes[0] + lanes[1] + lanes[2] + lanes[3]);
  }

 private:
  void add(__m256 a) {
    lower_ = _mm256_add_pd(lower_, _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
    upper_ = _mm256_add_pd(upper_, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
  }
  __m256d lower_, upper_;
};

constexpr int64_t kMinRowsToConvert = 3;
constexpr bool kPrefetchesWeights = false;

struct Bf16Weights {
  F16 even, odd;
};
inline Bf16Weights pair_up(F16 even, F16 odd) { return {even, odd}; }
inline void store(float* p, Bf16Weights w) {
  store(p, w.even);
  store(p + kLanes, w.odd);
}
inline Bf16Weights split_pairs(__m256i lo, __m256i hi) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
  return {{as_float(_mm256_slli_epi32(lo, 16)), as_float(_mm256_slli_epi32(hi, 16))},
          {as_float(_mm256_and_si256(lo, upper)), as_float(_mm256_and_si256(hi, upper))}};
}
inline Bf16Weights load_weights(const bf16* p) {
  const __m256i* halves = reinterpret_cast<const __m256i*>(p);
  return split_pairs(_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1));
}
inline __m256i load_bits(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
template <int kPair>
inline __m256i decompress_pairs(const uint8_t* unit, const uint16_t* lowest_exponents) {
  const __m256i codes = load_bits(unit);
  constexpr int kShift = kMantissaBits - 4 * kPair;
  const __m256i shifted = kShift >= 0 ? _mm256_slli_epi16(codes, std::max(kShift, 0))
                                      : _mm256_srli_epi16(codes, std::max(-kShift, 0));
  const __m256i code = _mm256_and_si256(shifted, _mm256_set1_epi16(0xf << kMantissaBits));
  const __m256i exponent = _mm256_add_epi16(code, load_bits(lowest_exponents));
  __m256i rest = load_bits(unit + 64 * (1 + kPair / 2));
  if constexpr (kPair % 2 == 1) {
    const __m128i exchanged = _mm_set_epi8(14, 15, 12, 13, 10, 11, 8, 9, 6, 7, 4, 5, 2, 3, 0, 1);
    rest = _mm256_shuffle_epi8(rest, _mm256_broadcastsi128_si256(exchanged));
  }
  const __m256i kept = _mm256_set1_epi16(static_cast<int16_t>(kSignAndMantissa));
  return _mm256_or_si256(_mm256_and_si256(rest, kept), exponent);
}
template <int kPair>
inline Bf16Weights decompress(const uint8_t* unit, const uint16_t* lowest_exponents) {
  return split_pairs(decompress_pairs<kPair>(unit, lowest_exponents),
                     decompress_pairs<kPair>(unit + 32, lowest_exponents + kLanes));
}
inline F16 multiply_add(F16 sum, const bf16* x_pair, Bf16Weights w) {
  int32_t pair;
  std::memcpy(&pair, x_pair, sizeof pair);
  const __m256i pairs = _mm256_set1_epi32(pair);
  const Bf16Weights x = split_pairs(pairs, pairs);
  return fma(x.odd, w.odd, fma(x.even, w.even, sum));
}

}  // namespace steer::STEER_ISA

// F16, 16 fp32 lanes, as one AVX-512 register. simd_portable.h says what each function means.
#pragma once

namespace steer::STEER_ISA {

// 6 x 4 sums, 4 weights and a broadcast fill 29 of 32 registers.
constexpr int kRowTile = 6;
constexpr int kColumnTile = 4;

struct F16 {
  __m512 v;
};

struct Mask {
  __mmask16 m;
};

inline F16 splat(float x) { return {_mm512_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F16 load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline F16 load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, F16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i upper =
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(upper));
}

inline void store_whole(int32_t* p, F16 a) { _mm512_storeu_si512(p, _mm512_cvttps_epi32(a.v)); }
inline void store_whole(uint64_t* p, F16 a) {
  _mm512_storeu_si512(p, _mm512_cvttps_epi64(_mm512_castps512_ps256(a.v)));
  _mm512_storeu_si512(p + 8, _mm512_cvttps_epi64(_mm512_extractf32x8_ps(a.v, 1)));
}

inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 round_to_even(F16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline F16 truncate(F16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)};
}
inline F16 power_of_two(F16 n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}

inline Mask greater(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask not_greater_equal(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NGE_UQ)}; }
inline Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.m | b.m)}; }
inline F16 select(Mask m, F16 a, F16 b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
inline uint32_t bits(Mask m) { return m.m; }

inline float sum(F16 a) { return _mm512_reduce_add_ps(a.v); }
inline float maximum(F16 a) { return _mm512_reduce_max_ps(a.v); }

template <class T>
inline void transpose(const T* const (&rows)[16], int64_t at, T* to) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) b[r] = _mm512_loadu_si512(rows[r] + at);
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    a[r] = _mm512_unpacklo_epi32(b[r], b[r + 1]);
    a[r + 1] = _mm512_unpackhi_epi32(b[r], b[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {
    b[r] = _mm512_unpacklo_epi64(a[r], a[r + 2]);
    b[r + 1] = _mm512_unpackhi_epi64(a[r], a[r + 2]);
    b[r + 2] = _mm512_unpacklo_epi64(a[r + 1], a[r + 3]);
    b[r + 3] = _mm512_unpackhi_epi64(a[r + 1], a[r + 3]);
  }
  // Quarter q of b[4 p + i] is column 4 q + i of rows 4 p to 4 p + 3.
  constexpr int kEven = 0b10001000, kOdd = 0b11011101;  // quarters 0 and 2, 1 and 3
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i even_lower = _mm512_shuffle_i32x4(b[i], b[4 + i], kEven);
    const __m512i odd_lower = _mm512_shuffle_i32x4(b[i], b[4 + i], kOdd);
    const __m512i even_upper = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], kEven);
    const __m512i odd_upper = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], kOdd);
    __m512i* columns = reinterpret_cast<__m512i*>(to) + i;
    _mm512_storeu_si512(columns, _mm512_shuffle_i32x4(even_lower, even_upper, kEven));
    _mm512_storeu_si512(columns + 4, _mm512_shuffle_i32x4(odd_lower, odd_upper, kEven));
    _mm512_storeu_si512(columns + 8, _mm512_shuffle_i32x4(even_lower, even_upper, kOdd));
    _mm512_storeu_si512(columns + 12, _mm512_shuffle_i32x4(odd_lower, odd_upper, kOdd));
  }
}

// A sum of whole numbers, exact while it stays below 2**53.
class ExactSum {
 public:
  // Written out: GCC would make the implicit constructor without the instruction set of the pragma.
  ExactSum() : lower_(_mm512_setzero_pd()), upper_(_mm512_setzero_pd()) {}
  void add(F16 a) {
    const __m256 upper = _mm512_extractf32x8_ps(a.v, 1);
    lower_ = _mm512_add_pd(lower_, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
    upper_ = _mm512_add_pd(upper_, _mm512_cvtps_pd(upper));
  }
  uint64_t total() const {
    return static_cast<uint64_t>(_mm512_reduce_add_pd(_mm512_add_pd(lower_, upper_)));
  }

 private:
  __m512d lower_, upper_;
};

template <int kPair>
inline __m512i decompress_pairs(const uint8_t* unit, const uint16_t* lowest_exponents) {
  const __m512i codes = _mm512_loadu_si512(unit);
  constexpr int kShift = kMantissaBits - 4 * kPair;
  const __m512i shifted = kShift >= 0 ? _mm512_slli_epi16(codes, std::max(kShift, 0))
                                      : _mm512_srli_epi16(codes, std::max(-kShift, 0));
  const __m512i code = _mm512_and_si512(shifted, _mm512_set1_epi16(0xf << kMantissaBits));
  const __m512i exponent = _mm512_add_epi16(code, _mm512_loadu_si512(lowest_exponents));
  __m512i rest = _mm512_loadu_si512(unit + 64 * (1 + kPair / 2));
  if constexpr (kPair % 2 == 1) {
    const __m128i exchanged = _mm_set_epi8(14, 15, 12, 13, 10, 11, 8, 9, 6, 7, 4, 5, 2, 3, 0, 1);
    rest = _mm512_shuffle_epi8(rest, _mm512_broadcast_i32x4(exchanged));
  }
  constexpr int kFirstAndThirdOrSecond = 0xec;
  const __m512i kept = _mm512_set1_epi16(static_cast<int16_t>(kSignAndMantissa));
  return _mm512_ternarylogic_epi32(rest, exponent, kept, kFirstAndThirdOrSecond);
}

#ifdef STEER_HAS_AVX512_BF16
constexpr int64_t kMinRowsToConvert = kNever;
constexpr bool kPrefetchesWeights = true;

// The instruction multiplies pairs as they are stored.
struct Bf16Weights {
  __m512bh pairs;
};
inline Bf16Weights pair_up(F16 even, F16 odd) {
  // The lower half of a small whole number in fp32 is 0.
  const __m512i lower = _mm512_srli_epi32(_mm512_castps_si512(even.v), 16);
  return {(__m512bh)_mm512_or_si512(lower, _mm512_castps_si512(odd.v))};
}
inline void store(bf16* p, Bf16Weights w) { _mm512_storeu_si512(p, (__m512i)w.pairs); }
inline Bf16Weights load_weights(const bf16* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
template <int kPair>
inline Bf16Weights decompress(const uint8_t* unit, const uint16_t* lowest_exponents) {
  return {(__m512bh)decompress_pairs<kPair>(unit, lowest_exponents)};
}
inline F16 multiply_add(F16 sum, const bf16* x_pair, Bf16Weights w) {
  int32_t pair;
  std::memcpy(&pair, x_pair, sizeof pair);
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(pair), w.pairs)};
}
#else
constexpr int64_t kMinRowsToConvert = 30;
constexpr bool kPrefetchesWeights = false;

struct Bf16Weights {
  F16 even, odd;
};
inline Bf16Weights pair_up(F16 even, F16 odd) { return {even, odd}; }
inline void store(float* p, Bf16Weights w) {
  store(p, w.even);
  store(p + kLanes, w.odd);
}
inline Bf16Weights split_pairs(__m512i pairs) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(pairs, upper))}};
}
inline Bf16Weights load_weights(const bf16* p) { return split_pairs(_mm512_loadu_si512(p)); }
template <int kPair>
inline Bf16Weights decompress(const uint8_t* unit, const uint16_t* lowest_exponents) {
  return split_pairs(decompress_pairs<kPair>(unit, lowest_exponents));
}
inline F16 multiply_add(F16 sum, const bf16* x_pair, Bf16Weights w) {
  int32_t pair;
  std::memcpy(&pair, x_pair, sizeof pair);
  const Bf16Weights x = split_pairs(_mm512_set1_epi32(pair));
  return fma(x.odd, w.odd, fma(x.even, w.even, sum));
}
#endif

}  // namespace steer::STEER_ISA

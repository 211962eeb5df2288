// What the kernels share beside single instructions: rows whose length is no multiple of 16, exp2,
// GELU.
#pragma once

namespace steer::STEER_ISA {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;  // the sampler's definition names it to these digits

// The first n <= 16 lanes, `fill` in the others; reads nothing behind the n-th value.
template <class T>
inline F16 load(const T* p, int64_t n, float fill = 0.0f) {
  if (n >= kLanes) return load(p);
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}

template <class T>
inline void store(T* p, F16 a, int64_t n) {
  if (n >= kLanes) return store(p, a);
  float lanes[kLanes];
  store(lanes, a);
  for (int64_t i = 0; i < n; ++i) assign(p[i], lanes[i]);
}

alignas(64) constexpr float kLaneNumbers[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                    8, 9, 10, 11, 12, 13, 14, 15};

// Lanes 0 .. n - 1; n may be more than kLanes or below 0.
inline Mask is_first(int64_t n) {
  const float num_lanes = static_cast<float>(std::min(n, kLanes));
  return greater(splat(num_lanes), load(kLaneNumbers));
}
inline F16 first_lanes(F16 a, int64_t n, float fill) {
  return n >= kLanes ? a : select(is_first(n), a, splat(fill));
}

// 2**f on [-0.5, 0.5], relative error 2e-9 before rounding: the sampler's own polynomial, so every
// multiplication and addition rounds by itself (kernels/reference/guided_sample.py,
// EXP2_COEFFICIENTS).
inline F16 exp2_of_fraction(F16 f) {
  F16 e = splat(0.00015353361959569156f);
  e = e * f + splat(0.0013398875016719103f);
  e = e * f + splat(0.00961843691766262f);
  e = e * f + splat(0.055503323674201965f);
  e = e * f + splat(0.24022647738456726f);
  e = e * f + splat(0.6931471824645996f);
  return e * f + splat(1.0f);
}

// 2**t for t <= 0, relative error 1.5e-7; 0 below 2**-126 and for NaN.
inline F16 exp2(F16 t) {
  const Mask usable = greater(t, splat(-126.0f));
  t = select(usable, t, splat(0.0f));
  const F16 n = round_to_even(t);
  return select(usable, exp2_of_fraction(t - n) * power_of_two(n), splat(0.0f));
}

// GELU, the erf form: x * Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2.
// Phi(-u) = exp2(P(u)) for u in [0, 6], P fitted to log2 Phi(-u) with the weight u * Phi(-u);
// beyond 6 it is below 1e-9 and taken as 0. Error of Phi 6e-8 at most (of erf 1.2e-7), of the
// result 3e-8 * max(1, |x|).
inline F16 gelu(F16 x) {
  const Mask is_positive = greater(x, splat(0.0f));
  const F16 u = select(is_positive, x, splat(0.0f) - x);
  F16 p = splat(-5.456537266468331e-08f);
  p = fma(p, u, splat(1.35803884404595e-06f));
  p = fma(p, u, splat(-1.496150616731029e-05f));
  p = fma(p, u, splat(9.347304148832336e-05f));
  p = fma(p, u, splat(-0.00032126143923960626f));
  p = fma(p, u, splat(5.8668181736720726e-05f));
  p = fma(p, u, splat(0.006901302840560675f));
  p = fma(p, u, splat(-0.052423931658267975f));
  p = fma(p, u, splat(-0.4592231810092926f));
  p = fma(p, u, splat(-1.151104211807251f));
  p = fma(p, u, splat(-1.0f));
  const F16 below = select(greater(u, splat(6.0f)), splat(0.0f), exp2(p));  // Phi(-u)
  return select(is_positive, x - x * below, x * below);
}

}  // namespace steer::STEER_ISA

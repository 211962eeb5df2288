// sums[row][column] += sum over k of x[row][k] * packed[k][column], the inner product of linear and
// of attention.
//
// The order of the additions for one (row, column) is k = 0, 1, 2, ... in one accumulator, whatever
// tile the row falls into and however k is cut into calls: sums go to memory and back unrounded. So
// a row's result does not depend on its neighbours.
//
// kAhead: bytes of packed weights that are asked for ahead of their use; 0: the machine's own
// prefetcher does as well, or they lie in cache.
//
// Inputs x are of type T, weights of type W: the same, or int8, whose values every T holds exactly.
#pragma once

namespace steer::STEER_ISA {

// fp32 weights: one input by 16 outputs. (bf16: two inputs by 16 outputs, see Bf16Weights.)
inline F16 load_weights(const float* p) { return load(p); }
inline F16 multiply_add(F16 sum, const float* x, F16 w) { return fma(splat(*x), w, sum); }

template <class T>
constexpr int64_t kStep = sizeof(T) == 2 ? 2 : 1;

// Inputs of a packed weight come in whole numbers of these.
template <class W>
constexpr int64_t kPackedStep = sizeof(W) == sizeof(float) ? 1 : 2;

// The weights of one step as multiply_add takes them beside inputs of type T.
template <class T>
inline auto load_step(const T* packed) {
  return load_weights(packed);
}
template <class T>
inline auto load_step(const int8_t* packed) {
  if constexpr (kStep<T> == 2) {
    return pair_up(load(packed), load(packed + kLanes));
  } else {
    return load(packed);
  }
}

// What a tile does with the weights that it has loaded and converted.
struct DropWeights {
  template <class Weights>
  void operator()(int64_t, int64_t, const Weights&) const {}
};
template <class C>
struct KeepWeights {
  C* to;  // of the tile's first group
  int64_t group_stride;

  template <class Weights>
  void operator()(int64_t k, int64_t group, const Weights& weights) const {
    store(to + group * group_stride + k * kLanes, weights);
  }
};

// One step over all sums of a tile, from input k on.
template <int kRows, int kGroups, int64_t kAhead, class T, class W, class Keep>
[[gnu::always_inline]] inline void multiply_step(const T* x, int64_t x_row_stride, const W* packed,
                                                 int64_t group_stride, int64_t k, const Keep& keep,
                                                 F16 (&sums)[kRows][kGroups]) {
  decltype(load_step<T>(packed)) weights[kGroups];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) {
    const W* group = packed + g * group_stride + k * kLanes;
    weights[g] = load_step<T>(group);
    keep(k, g, weights[g]);
    if constexpr (kAhead > 0) __builtin_prefetch(reinterpret_cast<const char*>(group) + kAhead);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      sums[r][g] = multiply_add(sums[r][g], x + r * x_row_stride, weights[g]);
    }
  }
}

template <int kRows, int kGroups, int64_t kAhead, class T, class W, class Keep = DropWeights>
inline void multiply_tile(const T* x, int64_t x_row_stride, const W* packed, int64_t group_stride,
                          int64_t k_len, float* sums_in_memory, int64_t sums_row_stride,
                          const Keep& keep = {}) {
  F16 sums[kRows][kGroups];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      sums[r][g] = load(sums_in_memory + r * sums_row_stride + g * kLanes);
    }
  }
  int64_t k = 0;
  for (; k + kStep<T> <= k_len; k += kStep<T>) {
    multiply_step<kRows, kGroups, kAhead>(x + k, x_row_stride, packed, group_stride, k, keep, sums);
  }
  if (k < k_len) {
    // An odd last input: its partner is 0, as in the packed weight; what lies behind the row may be
    // NaN.
    T last[kRows][kStep<T>] = {};
    for (int r = 0; r < kRows; ++r) last[r][0] = x[r * x_row_stride + k];
    multiply_step<kRows, kGroups, 0>(&last[0][0], kStep<T>, packed, group_stride, k, keep, sums);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      store(sums_in_memory + r * sums_row_stride + g * kLanes, sums[r][g]);
    }
  }
}

// Groups of columns beside each other in a tile of few rows: a multiply-add takes some four cycles,
// so two are started per cycle only if enough sums are independent of each other; AVX2 has
// registers for no more than these.
template <int kRows>
constexpr int kFewRowsColumnTile = std::max(kColumnTile, kRows == 1   ? 4
                                                         : kRows == 2 ? 2
                                                                      : 1);

// One tile's rows by all groups.
template <int kRows, int64_t kAhead, class T, class W>
inline void multiply_few_rows(const T* x, int64_t x_row_stride, const W* packed,
                              int64_t group_stride, int64_t num_groups, int64_t k_len, float* sums,
                              int64_t sums_row_stride) {
  constexpr int kGroups = kFewRowsColumnTile<kRows>;
  int64_t group = 0;
  for (; group + kGroups <= num_groups; group += kGroups) {
    multiply_tile<kRows, kGroups, kAhead>(x, x_row_stride, packed + group * group_stride,
                                          group_stride, k_len, sums + group * kLanes,
                                          sums_row_stride);
  }
  for (; group < num_groups; ++group) {
    multiply_tile<kRows, 1, kAhead>(x, x_row_stride, packed + group * group_stride, group_stride,
                                    k_len, sums + group * kLanes, sums_row_stride);
  }
}

// num_rows < kRows.
template <int kRows, int64_t kAhead, class T, class W>
inline void multiply_last_rows(int64_t num_rows, const T* x, int64_t x_row_stride, const W* packed,
                               int64_t group_stride, int64_t num_groups, int64_t k_len, float* sums,
                               int64_t sums_row_stride) {
  if constexpr (kRows > 1) {
    if (num_rows == kRows - 1) {
      multiply_few_rows<kRows - 1, kAhead>(x, x_row_stride, packed, group_stride, num_groups,
                                           k_len, sums, sums_row_stride);
    } else {
      multiply_last_rows<kRows - 1, kAhead>(num_rows, x, x_row_stride, packed, group_stride,
                                            num_groups, k_len, sums, sums_row_stride);
    }
  }
}

// All tiles of num_rows x num_groups. packed points at the first k of the first group; the next
// group of 16 columns begins group_stride values further.
template <int64_t kAhead = 0, class T, class W>
inline void multiply(const T* x, int64_t x_row_stride, int64_t num_rows, const W* packed,
                     int64_t group_stride, int64_t num_groups, int64_t k_len, float* sums,
                     int64_t sums_row_stride) {
  const int64_t num_tiled = num_rows / kRowTile * kRowTile;
  for (int64_t group = 0; num_tiled > 0 && group < num_groups;) {
    const bool is_full = num_groups - group >= kColumnTile;
    const W* tile = packed + group * group_stride;
    for (int64_t row = 0; row < num_tiled; row += kRowTile) {
      const T* x_tile = x + row * x_row_stride;
      float* sums_tile = sums + row * sums_row_stride + group * kLanes;
      if (is_full) {
        multiply_tile<kRowTile, kColumnTile, kAhead>(x_tile, x_row_stride, tile, group_stride,
                                                     k_len, sums_tile, sums_row_stride);
      } else {
        multiply_tile<kRowTile, 1, kAhead>(x_tile, x_row_stride, tile, group_stride, k_len,
                                           sums_tile, sums_row_stride);
      }
    }
    group += is_full ? kColumnTile : 1;
  }
  multiply_last_rows<kRowTile, kAhead>(num_rows - num_tiled, x + num_tiled * x_row_stride,
                                       x_row_stride, packed, group_stride, num_groups, k_len,
                                       sums + num_tiled * sums_row_stride, sums_row_stride);
}

// The tiles of the first kRowTile rows, which read int8 and leave it converted for the rows behind
// them: like this reading from memory and multiplying overlap.
template <int64_t kAhead, class T, class C>
inline void multiply_first_rows(const T* x, int64_t x_row_stride, const int8_t* packed,
                                int64_t group_stride, int64_t num_groups, int64_t k_len, C* to,
                                int64_t to_group_stride, float* sums, int64_t sums_row_stride) {
  int64_t group = 0;
  const auto tile = [&](auto groups) {
    const KeepWeights<C> keep{to + group * to_group_stride, to_group_stride};
    multiply_tile<kRowTile, groups(), kAhead>(x, x_row_stride, packed + group * group_stride,
                                              group_stride, k_len, sums + group * kLanes,
                                              sums_row_stride, keep);
    group += groups();
  };
  while (group + kColumnTile <= num_groups) tile(std::integral_constant<int, kColumnTile>());
  while (group < num_groups) tile(std::integral_constant<int, 1>());
}

// Whether products of T may be done in fp32, from kMinRowsToConvert rows on.
template <class T>
constexpr bool kCanConvert = sizeof(T) == sizeof(bf16) && kMinRowsToConvert != kNever;

// What weights, and inputs beside them, are converted to: the same products in the same order, so
// the same bits.
template <class T>
using Converted = std::conditional_t<kCanConvert<T>, float, T>;

// Both sides are padded with zeros, a line of x to whole vectors and the weight to pairs of inputs.
// (T is bf16; a parameter, so that levels with bf16 products compile nothing.)
template <class T>
inline void convert(const T* x, int64_t k_len, float* to) {
  for (int64_t k = 0; k < k_len; k += kLanes) store(to + k, load(x + k, k_len - k));
}

template <class T>
inline void convert_weights(const T* packed, int64_t group_stride, int64_t num_groups,
                            int64_t k_len, float* to, int64_t to_group_stride) {
  for (int64_t group = 0; group < num_groups; ++group) {
    for (int64_t k = 0; k < k_len; k += 2) {
      store(to + group * to_group_stride + k * kLanes,
            load_weights(packed + group * group_stride + k * kLanes));
    }
  }
}

}  // namespace steer::STEER_ISA

// sums += x W^T for any number of rows and groups of columns, the inner product of linear and of
// attention, cut into the tiles of multiply_tile.h.
#pragma once

namespace steer::STEER_ISA {

// Groups of columns beside each other in a tile of few rows: a multiply-add takes some four cycles,
// so two are started per cycle only if enough sums are independent of each other; AVX2 has
// registers for no more than these.
template <int kRows>
constexpr int kFewRowsColumnTile = std::max(kColumnTile, kRows == 1   ? 4
                                                         : kRows == 2 ? 2
                                                                      : 1);

// One tile's rows by all groups.
template <int kRows, int64_t kAhead, class T, class Columns>
inline void multiply_few_rows(const T* x, int64_t x_row_stride, const Columns& columns,
                              int64_t num_groups, int64_t k_len, float* sums,
                              int64_t sums_row_stride) {
  constexpr int kGroups = kFewRowsColumnTile<kRows>;
  int64_t group = 0;
  for (; group + kGroups <= num_groups; group += kGroups) {
    multiply_tile<kRows, kGroups, kAhead>(x, x_row_stride, columns.from_group(group), k_len,
                                          sums + group * kLanes, sums_row_stride);
  }
  for (; group < num_groups; ++group) {
    multiply_tile<kRows, 1, kAhead>(x, x_row_stride, columns.from_group(group), k_len,
                                    sums + group * kLanes, sums_row_stride);
  }
}

// num_rows < kRows.
template <int kRows, int64_t kAhead, class T, class Columns>
inline void multiply_last_rows(int64_t num_rows, const T* x, int64_t x_row_stride,
                               const Columns& columns, int64_t num_groups, int64_t k_len,
                               float* sums, int64_t sums_row_stride) {
  if constexpr (kRows > 1) {
    if (num_rows == kRows - 1) {
      multiply_few_rows<kRows - 1, kAhead>(x, x_row_stride, columns, num_groups, k_len, sums,
                                           sums_row_stride);
    } else {
      multiply_last_rows<kRows - 1, kAhead>(num_rows, x, x_row_stride, columns, num_groups, k_len,
                                            sums, sums_row_stride);
    }
  }
}

// All tiles of num_rows x num_groups.
template <int64_t kAhead = 0, class T, class Columns>
inline void multiply(const T* x, int64_t x_row_stride, int64_t num_rows, const Columns& columns,
                     int64_t num_groups, int64_t k_len, float* sums, int64_t sums_row_stride) {
  const int64_t num_tiled = num_rows / kRowTile * kRowTile;
  for (int64_t group = 0; num_tiled > 0 && group < num_groups;) {
    const bool is_full = num_groups - group >= kColumnTile;
    const Columns tile = columns.from_group(group);
    for (int64_t row = 0; row < num_tiled; row += kRowTile) {
      const T* x_tile = x + row * x_row_stride;
      float* sums_tile = sums + row * sums_row_stride + group * kLanes;
      if (is_full) {
        multiply_tile<kRowTile, kColumnTile, kAhead>(x_tile, x_row_stride, tile, k_len, sums_tile,
                                                     sums_row_stride);
      } else {
        multiply_tile<kRowTile, 1, kAhead>(x_tile, x_row_stride, tile, k_len, sums_tile,
                                           sums_row_stride);
      }
    }
    group += is_full ? kColumnTile : 1;
  }
  multiply_last_rows<kRowTile, kAhead>(num_rows - num_tiled, x + num_tiled * x_row_stride,
                                       x_row_stride, columns, num_groups, k_len,
                                       sums + num_tiled * sums_row_stride, sums_row_stride);
}

// The tiles of the first kRowTile rows, which read int8 or compressed weights and leave them
// decoded for the rows behind them: like this reading from memory and multiplying overlap.
template <int64_t kAhead, class T, class Columns, class C>
inline void multiply_first_rows(const T* x, int64_t x_row_stride, const Columns& columns,
                                int64_t num_groups, int64_t k_len, C* to, int64_t to_group_stride,
                                float* sums, int64_t sums_row_stride) {
  int64_t group = 0;
  const auto tile = [&](auto groups) {
    const KeepWeights<C> keep{to + group * to_group_stride, to_group_stride};
    multiply_tile<kRowTile, groups(), kAhead>(x, x_row_stride, columns.from_group(group), k_len,
                                              sums + group * kLanes, sums_row_stride, keep);
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
inline void convert_weights(const PackedColumns<T>& columns, int64_t num_groups, int64_t k_len,
                            float* to, int64_t to_group_stride) {
  for (int64_t group = 0; group < num_groups; ++group) {
    const T* packed = columns.from_group(group).packed;
    for (int64_t k = 0; k < k_len; k += 2) {
      store(to + group * to_group_stride + k * kLanes, load_weights(packed + k * kLanes));
    }
  }
}

}  // namespace steer::STEER_ISA

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
template <int kRows, int64_t kAhead, int kGroups = kFewRowsColumnTile<kRows>, class T,
          class Columns>
inline void multiply_few_rows(const T* x, int64_t x_row_stride, const Columns& columns,
                              int64_t num_groups, int64_t k_len, float* sums,
                              int64_t sums_row_stride) {
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

// The tiles of the first kRowTile rows, which do something for the rows or the block behind them,
// too: like this reading from memory and multiplying overlap.
template <int64_t kAhead, class T, class Columns, class Keep>
inline void multiply_first_rows(const T* x, int64_t x_row_stride, const Columns& columns,
                                int64_t num_groups, int64_t k_len, float* sums,
                                int64_t sums_row_stride, const Keep& keep) {
  int64_t group = 0;
  const auto tile = [&](auto groups) {
    multiply_tile<kRowTile, groups(), kAhead>(x, x_row_stride, columns.from_group(group), k_len,
                                              sums + group * kLanes, sums_row_stride,
                                              keep.from_group(group));
    group += groups();
  };
  while (group + kColumnTile <= num_groups) tile(std::integral_constant<int, kColumnTile>());
  while (group < num_groups) tile(std::integral_constant<int, 1>());
}

// Tiles for compressed weights and many rows: decoding a weight takes as long as some products, and
// goes on beside them if there are enough, so a tile has as many rows as registers hold sums.
constexpr int kTallRowTile = 12;
constexpr int kTallColumnTile = 2;

template <int kRows, int64_t kAhead>
inline void multiply_tall_tile(int64_t num_rows, const bf16* x, int64_t x_row_stride,
                               const CompressedColumns& columns, int64_t num_groups, int64_t k_len,
                               float* sums, int64_t sums_row_stride) {
  if constexpr (kRows > kTallRowTile / 2) {
    if (num_rows < kRows) {
      multiply_tall_tile<kRows - 1, kAhead>(num_rows, x, x_row_stride, columns, num_groups, k_len,
                                            sums, sums_row_stride);
      return;
    }
  }
  multiply_few_rows<kRows, kAhead, kTallColumnTile>(x, x_row_stride, columns, num_groups, k_len,
                                                    sums, sums_row_stride);
}

// num_rows: at least half of a tall tile's; all tiles get as many, or one less.
template <int64_t kAhead>
inline void multiply_tall(const bf16* x, int64_t x_row_stride, int64_t num_rows,
                          const CompressedColumns& columns, int64_t num_groups, int64_t k_len,
                          float* sums, int64_t sums_row_stride) {
  const int64_t num_tiles = round_up(num_rows, kTallRowTile) / kTallRowTile;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t row = num_rows * tile / num_tiles;
    multiply_tall_tile<kTallRowTile, kAhead>(
        num_rows * (tile + 1) / num_tiles - row, x + row * x_row_stride, x_row_stride, columns,
        num_groups, k_len, sums + row * sums_row_stride, sums_row_stride);
  }
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

// To bf16 or fp32. k_len: a multiple of kUnitInputs.
template <class C>
inline void convert_weights(const CompressedColumns& columns, int64_t num_groups, uint64_t k_len,
                            C* to, int64_t to_group_stride) {
  for (uint64_t unit = 0; unit < k_len / kUnitInputs; ++unit) {
    const uint64_t raw_groups = columns.raw_groups(unit);
    for (int64_t group = 0; group < num_groups; ++group) {
      C* own_to = to + group * to_group_stride + unit * kUnitInputs * kLanes;
      if (raw_groups >> group & 1) [[unlikely]] {
        const bf16* raw = columns.raw_unit(unit, group);
        if (kPrefetchesWeights) prefetch_raw(raw + kRawUnitsAhead * kUnitValues);
        for (int64_t i = 0; i < kUnitValues; i += 2 * kLanes) {
          store(own_to + i, load_weights(raw + i));
        }
        continue;
      }
      // All of them before the first is stored: for all that GCC knows, a store changes the unit.
      const uint8_t* packed = columns.unit(unit, group);
      const uint16_t* lowest_exponents = columns.lowest_exponents(group);
      const Bf16Weights pairs[] = {
          decompress<0>(packed, lowest_exponents), decompress<1>(packed, lowest_exponents),
          decompress<2>(packed, lowest_exponents), decompress<3>(packed, lowest_exponents)};
#pragma GCC unroll 4
      for (int64_t pair = 0; pair < kUnitPairs; ++pair) {
        store(own_to + pair * 2 * kLanes, pairs[pair]);
      }
    }
  }
}

}  // namespace steer::STEER_ISA

// sums[row][column] += sum over k of x[row][k] * weight[k][column], for one tile of rows and
// columns whose sums lie in registers.
//
// The order of the additions for one (row, column) is k = 0, 1, 2, ... in one accumulator, whatever
// tile the row falls into and however k is cut into calls: sums go to memory and back unrounded. So
// a row's result does not depend on its neighbours.
//
// kAhead: bytes of weights that are asked for ahead of their use; 0: the machine's own prefetcher
// does as well, or they lie in cache.
//
// Inputs x are of type T. Weights are PackedColumns<W>, where W is T or int8, whose values every T
// holds exactly, or CompressedColumns, where T is bf16.
#pragma once

namespace steer::STEER_ISA {

// Columns in groups of 16, from some group and input on. The next group begins group_stride values
// further.
template <class W>
struct PackedColumns {
  const W* packed;
  int64_t group_stride;

  PackedColumns from_group(int64_t group) const {
    return {packed + group * group_stride, group_stride};
  }
  PackedColumns from_input(int64_t input) const { return {packed + input * kLanes, group_stride}; }
};

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

// Always inlined: GCC drops calls of a function that does nothing but this, as without effect.
[[gnu::always_inline]] inline void prefetch(const void* p, int64_t ahead = 0) {
  __builtin_prefetch(static_cast<const char*>(p) + ahead);
}

// What a tile does with weights that it has loaded, beside multiplying them.
struct DropWeights {
  template <class Weights>
  void operator()(int64_t, int64_t, const Weights&) const {}
};
// Leaves them as they are multiplied.
template <class C>
struct KeepWeights {
  C* to;  // of the tile's first group
  int64_t group_stride;

  KeepWeights from_group(int64_t group) const { return {to + group * group_stride, group_stride}; }
  template <class Weights>
  void operator()(int64_t k, int64_t group, const Weights& weights) const {
    store(to + group * group_stride + k * kLanes, weights);
  }
};
// Asks for compressed units of as many inputs, three lines of cache for each pair.
struct AskForUnits {
  const uint8_t* units;

  AskForUnits from_group(int64_t) const { return *this; }
  template <class Weights>
  [[gnu::always_inline]] void operator()(int64_t k, int64_t group, const Weights&) const {
    constexpr int64_t kLines = kPanelGroups * kUnitBytes / kUnitPairs / 64;
    if (group < kLines) prefetch(units + (k / 2 * kLines + group) * 64);
  }
};

template <int kRows, int kGroups>
struct TileSums {
  F16 sums[kRows][kGroups];

  [[gnu::always_inline]] void load_from(const float* memory, int64_t row_stride) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int g = 0; g < kGroups; ++g) sums[r][g] = load(memory + r * row_stride + g * kLanes);
    }
  }
  [[gnu::always_inline]] void store_to(float* memory, int64_t row_stride) const {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int g = 0; g < kGroups; ++g) store(memory + r * row_stride + g * kLanes, sums[r][g]);
    }
  }
  // The products of one step.
  template <class T, class Weights>
  [[gnu::always_inline]] void add(const T* x, int64_t x_row_stride,
                                  const Weights (&weights)[kGroups]) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int g = 0; g < kGroups; ++g) {
        sums[r][g] = multiply_add(sums[r][g], x + r * x_row_stride, weights[g]);
      }
    }
  }
};

// One step over all sums of a tile, from input k on.
template <int kRows, int kGroups, int64_t kAhead, class T, class W, class Keep>
[[gnu::always_inline]] inline void multiply_step(const T* x, int64_t x_row_stride,
                                                 const PackedColumns<W>& columns, int64_t k,
                                                 const Keep& keep, TileSums<kRows, kGroups>& tile) {
  decltype(load_step<T>(columns.packed)) weights[kGroups];
#pragma GCC unroll 16
  for (int g = 0; g < kGroups; ++g) {
    const W* group = columns.packed + g * columns.group_stride + k * kLanes;
    weights[g] = load_step<T>(group);
    keep(k, g, weights[g]);
    if constexpr (kAhead > 0) prefetch(group, kAhead);
  }
  tile.add(x, x_row_stride, weights);
}

template <int kRows, int kGroups, int64_t kAhead, class T, class W, class Keep = DropWeights>
inline void multiply_tile(const T* x, int64_t x_row_stride, const PackedColumns<W>& columns,
                          int64_t k_len, float* sums, int64_t sums_row_stride,
                          const Keep& keep = {}) {
  TileSums<kRows, kGroups> tile;
  tile.load_from(sums, sums_row_stride);
  int64_t k = 0;
  for (; k + kStep<T> <= k_len; k += kStep<T>) {
    multiply_step<kRows, kGroups, kAhead>(x + k, x_row_stride, columns, k, keep, tile);
  }
  if (k < k_len) {
    // An odd last input: its partner is 0, as in the packed weight; what lies behind the row may be
    // NaN.
    T last[kRows][kStep<T>] = {};
    for (int r = 0; r < kRows; ++r) last[r][0] = x[r * x_row_stride + k];
    multiply_step<kRows, kGroups, 0>(&last[0][0], kStep<T>, columns, k, keep, tile);
  }
  tile.store_to(sums, sums_row_stride);
}

// Raw units are read one after the other, but seldom, so the machine does not see it coming.
constexpr int64_t kRawUnitsAhead = 4;
[[gnu::always_inline]] inline void prefetch_raw(const bf16* unit) {
  for (int64_t i = 0; i < kUnitValues; i += 64 / sizeof(bf16)) prefetch(unit + i);
}

constexpr int kNumSumsBesideExponents = 20;

// One pair of inputs of a unit over all sums of a tile.
template <int kPair, bool kHasRaw, int kRows, int kGroups>
[[gnu::always_inline]] inline void multiply_pair(const bf16* x, int64_t x_row_stride,
                                                 const CompressedColumns& columns, uint64_t unit,
                                                 const bf16* const (&raw)[kGroups],
                                                 TileSums<kRows, kGroups>& tile) {
  Bf16Weights weights[kGroups];
#pragma GCC unroll 16
  for (int g = 0; g < kGroups; ++g) {
    if (kHasRaw && raw[g]) {
      weights[g] = load_weights(raw[g] + kPair * 2 * kLanes);
      continue;
    }
    const uint16_t* lowest_exponents = columns.lowest_exponents(g);
    // They are read anew for each pair. Else GCC keeps them in registers, which the sums of a full
    // tile need, and spills both.
    if constexpr (kRows * kGroups > kNumSumsBesideExponents) {
      asm volatile("" : "+r"(lowest_exponents));
    }
    weights[g] = decompress<kPair>(columns.unit(unit, g), lowest_exponents);
  }
  tile.add(x + 2 * kPair, x_row_stride, weights);
}

template <bool kHasRaw, int kRows, int kGroups>
[[gnu::always_inline]] inline void multiply_unit(const bf16* x, int64_t x_row_stride,
                                                 const CompressedColumns& columns, uint64_t unit,
                                                 const bf16* const (&raw)[kGroups],
                                                 TileSums<kRows, kGroups>& tile) {
  multiply_pair<0, kHasRaw>(x, x_row_stride, columns, unit, raw, tile);
  multiply_pair<1, kHasRaw>(x, x_row_stride, columns, unit, raw, tile);
  multiply_pair<2, kHasRaw>(x, x_row_stride, columns, unit, raw, tile);
  multiply_pair<3, kHasRaw>(x, x_row_stride, columns, unit, raw, tile);
}

// k_len: a multiple of kUnitInputs.
template <int kRows, int kGroups, int64_t kAhead, class T>
inline void multiply_tile(const T* x, int64_t x_row_stride, const CompressedColumns& columns,
                          uint64_t k_len, float* sums, int64_t sums_row_stride) {
  static_assert(kUnitPairs == 4 && std::is_same_v<T, bf16>);
  constexpr uint64_t kAllGroups = (1u << kGroups) - 1;
  TileSums<kRows, kGroups> tile;
  tile.load_from(sums, sums_row_stride);
  const bf16* raw[kGroups] = {};
  for (uint64_t unit = 0; unit < k_len / kUnitInputs; ++unit, x += kUnitInputs) {
    if constexpr (kAhead > 0) {
      for (int64_t i = 0; i < kGroups * kUnitBytes; i += 64) {
        prefetch(columns.unit(unit, 0) + i, kAhead);
      }
    }
    const uint64_t raw_groups = columns.raw_groups(unit) & kAllGroups;
    if (raw_groups == 0) [[likely]] {
      multiply_unit<false>(x, x_row_stride, columns, unit, raw, tile);
      continue;
    }
    for (int g = 0; g < kGroups; ++g) {
      raw[g] = raw_groups >> g & 1 ? columns.raw_unit(unit, g) : nullptr;
      if (kAhead > 0 && raw[g]) prefetch_raw(raw[g] + kRawUnitsAhead * kUnitValues);
    }
    multiply_unit<true>(x, x_row_stride, columns, unit, raw, tile);
  }
  tile.store_to(sums, sums_row_stride);
}

}  // namespace steer::STEER_ISA

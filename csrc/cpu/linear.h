// out = x W^T + bias, then GELU on the first columns, then stored or added to out.
//
// A weight in int8 is W = scales * packed: whole numbers are summed, and sums scaled. A compressed
// one is decoded, in registers or by the block. The tail of either, the last columns of W, is added
// behind that as it is.
//
// A task is a panel of 64 columns. Its weights are read from memory once, in blocks of kBlockLen
// inputs, and every block is used for all rows of a chunk while it lies in cache.
#pragma once

namespace steer::STEER_ISA {

// Inputs of a block. 64 columns x 1024 are 128 KB of L2 in bf16, 6 rows x 1024 are 12 KB of L1.
constexpr int64_t kBlockLen = 1024;
// With more rows than a tile has, memory would idle while a block is used again, so blocks are
// short, and the first use of one asks for the next.
constexpr int64_t kShortBlockLen = 96;
// Rows for which compressed weights are decoded in registers, again for each tile, and not once to
// memory.
constexpr int64_t kMaxTallRows = 48;
// Bytes ahead for a single tile of rows, in each group of columns, or in a compressed panel.
constexpr int64_t kAheadOfOneTile = 1024;
constexpr int64_t kAheadOfOneCompressedTile = 4096;
// Of a block converted to fp32. For few rows, 64 columns x 64 are 16 KB of L1, written and read
// once or twice. For many, a tile's columns, 16 x kColumnTile, are those 16 KB, and longer pieces
// of x read better, since its rows lie far apart.
constexpr int64_t kFp32BlockLenOfFewRows = 64;
constexpr int64_t kFp32BlockLen = 256 / kColumnTile;
constexpr int64_t kManyRows = 12;
// Of a block that int8 or a compressed weight is decoded to for many rows: the bytes of those in
// fp32.
template <class C>
constexpr int64_t kMaxConvertedLen = kFp32BlockLen * sizeof(float) / sizeof(C);
// The sums of a chunk of rows, 240 x 64 in fp32, are 60 KB of L2.
constexpr int64_t kRowChunk = 240;

template <class Columns>
constexpr bool kIsInt8 = std::is_same_v<Columns, PackedColumns<int8_t>>;
template <class Columns>
constexpr bool kIsCompressed = std::is_same_v<Columns, CompressedColumns>;

// Bytes of 16 columns and so many inputs.
template <class W>
constexpr int64_t group_bytes(int64_t k_len) {
  return k_len * kLanes * sizeof(W);
}

// The sums of a chunk of rows and room for converted blocks, with a padded last input.
struct PanelScratch {
  float* sums;     // [kRowChunk, kPanelWidth]
  float* x;        // [kRowChunk, kFp32BlockLen]
  float* weights;  // [kPanelWidth / kLanes, kFp32BlockLen, kLanes], or bf16 and twice as long
};

// One call of `multiply`, for weights that are converted first, and inputs where they have to be.
// rows: more than a tile's for int8 and compressed weights.
template <class T, class Columns>
inline void multiply_converted(const T* x, int64_t x_row_stride, int64_t rows,
                               const Columns& columns, int64_t num_groups, int64_t k_len,
                               const PanelScratch& scratch) {
  using C = Converted<T>;
  C* to = reinterpret_cast<C*>(scratch.weights);
  const PackedColumns<C> weights{to, kMaxConvertedLen<C> * kLanes};
  float* sums = scratch.sums;
  const auto skip_tile = [&] {
    x += kRowTile * x_row_stride;
    sums += kRowTile * kPanelWidth;
    rows -= kRowTile;
  };
  if constexpr (kIsInt8<Columns>) {
    constexpr int64_t kAhead = kPrefetchesWeights ? group_bytes<int8_t>(kMaxConvertedLen<C>) : 0;
    multiply_first_rows<kAhead>(x, x_row_stride, columns, num_groups, k_len, sums, kPanelWidth,
                                KeepWeights<C>{to, weights.group_stride});
    skip_tile();
  } else {
    convert_weights(columns, num_groups, k_len, to, weights.group_stride);
    if constexpr (kIsCompressed<Columns> && kPrefetchesWeights) {
      multiply_first_rows<0>(x, x_row_stride, weights, num_groups, k_len, sums, kPanelWidth,
                             AskForUnits{columns.from_input(k_len).unit(0, 0)});
      skip_tile();
    }
  }
  if constexpr (std::is_same_v<C, T>) {
    multiply(x, x_row_stride, rows, weights, num_groups, k_len, sums, kPanelWidth);
  } else {
    for (int64_t row = 0; row < rows; ++row) {
      convert(x + row * x_row_stride, k_len, scratch.x + row * kFp32BlockLen);
    }
    multiply(scratch.x, kFp32BlockLen, rows, weights, num_groups, round_up(k_len, kStep<T>), sums,
             kPanelWidth);
  }
}

// GELU on the first n lanes; n may be beyond them or below 0.
inline F16 gelu_first(F16 y, int64_t n) { return n <= 0 ? y : select(is_first(n), gelu(y), y); }

template <class Out>
inline void finish_row(const LinearArgs& a, const float* sums, int64_t row, int64_t first_column) {
  const int64_t width = std::min(kPanelWidth, a.out_features - first_column);
  Out* out = static_cast<Out*>(a.out) + row * a.out_row_stride + first_column;
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t n = width - i;
    F16 y = load(sums + i);
    if (a.bias) y = y + load(a.bias + first_column + i, n);
    y = gelu_first(y, a.gelu_columns - first_column - i);
    if (a.accumulate) y = load(out + i, n) + y;
    store(out + i, y, n);
  }
}

template <int64_t kLen, int64_t kAhead, class T, class Columns>
inline void multiply_blocks(const T* x, int64_t x_row_stride, int64_t rows, const Columns& columns,
                            int64_t num_groups, int64_t in_features, float* sums) {
  for (int64_t k = 0; k < in_features; k += kLen) {
    multiply<kAhead>(x + k, x_row_stride, rows, columns.from_input(k), num_groups,
                     std::min(kLen, in_features - k), sums, kPanelWidth);
  }
}

// One tile of rows.
template <class T, class Columns>
inline void multiply_one_tile(const T* x, int64_t x_row_stride, int64_t rows,
                              const Columns& columns, int64_t num_groups, int64_t in_features,
                              float* sums) {
  constexpr int64_t kAhead = kIsCompressed<Columns> ? kAheadOfOneCompressedTile : kAheadOfOneTile;
  multiply_blocks<kBlockLen, kPrefetchesWeights ? kAhead : 0>(x, x_row_stride, rows, columns,
                                                              num_groups, in_features, sums);
}

// sums += x W^T for some columns of a panel and the inputs that x begins with.
template <class T, class Columns>
inline void multiply_panel(const T* x, int64_t x_row_stride, int64_t rows, const Columns& columns,
                           int64_t num_groups, int64_t in_features, const PanelScratch& scratch) {
  if constexpr (kIsCompressed<Columns> && !kCanConvert<T>) {
    if (rows > kRowTile && rows <= kMaxTallRows) {
      constexpr int64_t kAhead = kShortBlockLen / kUnitInputs * kPanelGroups * kUnitBytes;
      for (int64_t k = 0; k < in_features; k += kShortBlockLen) {
        multiply_tall<kAhead>(x + k, x_row_stride, rows, columns.from_input(k), num_groups,
                              std::min(kShortBlockLen, in_features - k), scratch.sums, kPanelWidth);
      }
      return;
    }
  }
  constexpr bool kIsEncoded = kIsInt8<Columns> || kIsCompressed<Columns>;
  constexpr int64_t kMinRows = kIsEncoded       ? kRowTile + 1
                               : kCanConvert<T> ? kMinRowsToConvert
                                                : kNever;
  if constexpr (kMinRows != kNever) {
    if (rows >= kMinRows) {
      const int64_t block_len =
          rows < kManyRows ? kFp32BlockLenOfFewRows : kMaxConvertedLen<Converted<T>>;
      for (int64_t k = 0; k < in_features; k += block_len) {
        multiply_converted(x + k, x_row_stride, rows, columns.from_input(k), num_groups,
                           std::min(block_len, in_features - k), scratch);
      }
      return;
    }
  }
  if constexpr (kPrefetchesWeights && !kIsEncoded) {
    if (rows > kRowTile) {
      multiply_blocks<kShortBlockLen, group_bytes<T>(kShortBlockLen)>(
          x, x_row_stride, rows, columns, num_groups, in_features, scratch.sums);
      return;
    }
  }
  multiply_one_tile(x, x_row_stride, rows, columns, num_groups, in_features, scratch.sums);
}

inline void scale_sums(const LinearArgs& a, int64_t first_column, int64_t rows, float* sums) {
  const int64_t width = std::min(kPanelWidth, a.out_features - first_column);
  for (int64_t i = 0; i < width; i += kLanes) {
    const F16 scales = load(a.scales + first_column + i, width - i);
    for (int64_t row = 0; row < rows; ++row) {
      float* at = sums + row * kPanelWidth + i;
      store(at, load(at) * scales);
    }
  }
}

// The panel's columns of a weight that is packed as W.
template <class W>
inline PackedColumns<W> packed_columns(const void* packed, int64_t in_features,
                                       int64_t first_column) {
  const int64_t group_stride = kLanes * round_up(in_features, kPackedStep<W>);
  return {static_cast<const W*>(packed) + first_column / kLanes * group_stride, group_stride};
}

// scratch.sums = x W^T for the rows from row_begin on.
template <class T>
inline void sum_panel(const LinearArgs& a, int64_t first_column, int64_t row_begin, int64_t rows,
                      const PanelScratch& scratch) {
  const int64_t width = std::min(kPanelWidth, a.out_features - first_column);
  const int64_t num_groups = round_up(width, kLanes) / kLanes;
  const T* x = static_cast<const T*>(a.x) + row_begin * a.x_row_stride;
  const auto multiply_by = [&](const auto& columns) {
    multiply_panel(x, a.x_row_stride, rows, columns, num_groups, a.in_features, scratch);
  };
  std::memset(scratch.sums, 0, rows * kPanelWidth * sizeof(float));
  if (a.scales) {
    multiply_by(packed_columns<int8_t>(a.packed, a.in_features, first_column));
    scale_sums(a, first_column, rows, scratch.sums);
  } else if (a.raw) {
    if constexpr (std::is_same_v<T, bf16>) {
      const CompressedLayout layout(a.out_features, a.in_features);
      multiply_by(CompressedColumns::of_panel(a.packed, a.raw, layout, first_column / kPanelWidth));
    }
  } else {
    multiply_by(packed_columns<T>(a.packed, a.in_features, first_column));
  }
  if (!a.tail) return;
  multiply_panel(x + a.in_features, a.x_row_stride, rows,
                 packed_columns<T>(a.tail, a.tail_features, first_column), num_groups,
                 a.tail_features, scratch);
}

template <class T>
inline void linear_panel(const LinearArgs& a, int64_t panel) {
  constexpr int64_t kSums = kRowChunk * kPanelWidth, kX = kRowChunk * kFp32BlockLen;
  constexpr int64_t kWeights = kPanelWidth * kFp32BlockLen;
  Scratch parts((kSums + kX + kWeights) * sizeof(float));
  const PanelScratch scratch{parts.take<float>(kSums), parts.take<float>(kX),
                             parts.take<float>(kWeights)};
  const int64_t first_column = panel * kPanelWidth;
  for (int64_t row_begin = 0; row_begin < a.num_rows; row_begin += kRowChunk) {
    const int64_t rows = std::min(kRowChunk, a.num_rows - row_begin);
    sum_panel<T>(a, first_column, row_begin, rows, scratch);
    for (int64_t row = 0; row < rows; ++row) {
      const float* sums = scratch.sums + row * kPanelWidth;
      a.out_is_bf16 ? finish_row<bf16>(a, sums, row_begin + row, first_column)
                    : finish_row<float>(a, sums, row_begin + row, first_column);
    }
  }
}

inline void linear(const LinearArgs& args, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    args.is_bf16 ? linear_panel<bf16>(args, panel) : linear_panel<float>(args, panel);
  }
}

}  // namespace steer::STEER_ISA

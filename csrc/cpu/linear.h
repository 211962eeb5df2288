// out = x W^T + bias, then GELU on the first columns, then stored or added to out.
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
template <class T>
constexpr int64_t kBytesPerInput = kLanes * sizeof(T);  // of 16 columns
// Bytes ahead for a single tile of rows.
constexpr int64_t kAheadOfOneTile = 1024;
// Of a block converted to fp32. For few rows, 64 columns x 64 are 16 KB of L1, written and read
// once or twice. For many, a tile's columns, 16 x kColumnTile, are those 16 KB, and longer pieces
// of x read better, since its rows lie far apart.
constexpr int64_t kFp32BlockLenOfFewRows = 64;
constexpr int64_t kFp32BlockLen = 256 / kColumnTile;
constexpr int64_t kManyRows = 12;
// The sums of a chunk of rows, 240 x 64 in fp32, are 60 KB of L2.
constexpr int64_t kRowChunk = 240;

// The sums of a chunk of rows and room for blocks in fp32, with a padded last input.
struct PanelScratch {
  float* sums;     // [kRowChunk, kPanelWidth]
  float* x;        // [kRowChunk, kFp32BlockLen]
  float* weights;  // [kPanelWidth / kLanes, kFp32BlockLen, kLanes]
};

// One call of `multiply` for bf16 by fp32 arithmetic.
template <class T>
inline void multiply_converted(const T* x, int64_t x_row_stride, int64_t rows, const T* packed,
                               int64_t group_stride, int64_t num_groups, int64_t k_len,
                               const PanelScratch& scratch) {
  for (int64_t row = 0; row < rows; ++row) {
    convert(x + row * x_row_stride, k_len, scratch.x + row * kFp32BlockLen);
  }
  convert_weights(packed, group_stride, num_groups, k_len, scratch.weights, kFp32BlockLen * kLanes);
  multiply(scratch.x, kFp32BlockLen, rows, scratch.weights, kFp32BlockLen * kLanes, num_groups,
           round_up(k_len, kStep<T>), scratch.sums, kPanelWidth);
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

template <int64_t kLen, int64_t kAhead, class T>
inline void multiply_blocks(const T* x, int64_t x_row_stride, int64_t rows, const T* packed,
                            int64_t group_stride, int64_t num_groups, int64_t in_features,
                            float* sums) {
  for (int64_t k = 0; k < in_features; k += kLen) {
    multiply<kAhead>(x + k, x_row_stride, rows, packed + k * kLanes, group_stride, num_groups,
                     std::min(kLen, in_features - k), sums, kPanelWidth);
  }
}

// scratch.sums = x W^T for the rows from row_begin on.
template <class T>
inline void multiply_panel(const LinearArgs& a, int64_t first_column, int64_t row_begin,
                           int64_t rows, const PanelScratch& scratch) {
  const int64_t width = std::min(kPanelWidth, a.out_features - first_column);
  const int64_t num_groups = round_up(width, kLanes) / kLanes;
  const int64_t group_stride = kLanes * round_up(a.in_features, kStep<T>);
  const T* packed = static_cast<const T*>(a.packed) + first_column / kLanes * group_stride;
  const T* x = static_cast<const T*>(a.x) + row_begin * a.x_row_stride;
  std::memset(scratch.sums, 0, rows * kPanelWidth * sizeof(float));
  if constexpr (kCanConvert<T>) {
    if (rows >= kMinRowsToConvert) {
      const int64_t block_len = rows < kManyRows ? kFp32BlockLenOfFewRows : kFp32BlockLen;
      for (int64_t k = 0; k < a.in_features; k += block_len) {
        multiply_converted(x + k, a.x_row_stride, rows, packed + k * kLanes, group_stride,
                           num_groups, std::min(block_len, a.in_features - k), scratch);
      }
      return;
    }
  }
  if (kPrefetchesWeights && rows > kRowTile) {
    multiply_blocks<kShortBlockLen, kShortBlockLen * kBytesPerInput<T>>(
        x, a.x_row_stride, rows, packed, group_stride, num_groups, a.in_features, scratch.sums);
  } else {
    multiply_blocks<kBlockLen, kPrefetchesWeights ? kAheadOfOneTile : 0>(
        x, a.x_row_stride, rows, packed, group_stride, num_groups, a.in_features, scratch.sums);
  }
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
    multiply_panel<T>(a, first_column, row_begin, rows, scratch);
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

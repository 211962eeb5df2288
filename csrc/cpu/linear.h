// out = x W^T + bias, then GELU, then stored or added to out.
//
// A task is a panel of 64 columns. Its weights are read from memory once, in blocks of kBlockLen inputs, and every
// block is used for all rows of a chunk while it lies in L2.
#pragma once

namespace steer::STEER_ISA {

// 6 rows x 1024 bf16 inputs are 12 KB of L1, 64 columns x 1024 are 128 KB of L2.
constexpr int64_t kBlockLen = 1024;
// The sums of a chunk, 240 x 64 in fp32, are 60 KB of L2.
constexpr int64_t kRowChunk = 240;

template <class Out>
inline void finish_row(const LinearArgs& a, const float* sums, int64_t row, int64_t first_column) {
  const int64_t width = std::min(kPanelWidth, a.out_features - first_column);
  Out* out = static_cast<Out*>(a.out) + row * a.out_row_stride + first_column;
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t n = width - i;
    F16 y = load(sums + i);
    if (a.bias) y = y + load(a.bias + first_column + i, n);
    if (a.gelu) y = gelu(y);
    if (a.accumulate) y = load(out + i, n) + y;
    store(out + i, y, n);
  }
}

template <class T>
inline void linear_panel(const LinearArgs& a, int64_t panel) {
  const int64_t first_column = panel * kPanelWidth;
  const int64_t num_groups =
      std::min(kPanelWidth, round_up(a.out_features - first_column, kLanes)) / kLanes;
  const int64_t group_stride = kLanes * round_up(a.in_features, kStep<T>);
  const T* packed = static_cast<const T*>(a.packed) + first_column / kLanes * group_stride;
  float* sums = Scratch(kRowChunk * kPanelWidth * sizeof(float))
                    .take<float>(kRowChunk * kPanelWidth);  // [rows of the chunk, kPanelWidth]

  for (int64_t row_begin = 0; row_begin < a.num_rows; row_begin += kRowChunk) {
    const int64_t rows = std::min(kRowChunk, a.num_rows - row_begin);
    std::memset(sums, 0, rows * kPanelWidth * sizeof(float));
    for (int64_t k = 0; k < a.in_features; k += kBlockLen) {
      const T* x = static_cast<const T*>(a.x) + row_begin * a.x_row_stride + k;
      multiply(x, a.x_row_stride, rows, packed + k * kLanes, group_stride, num_groups,
               std::min(kBlockLen, a.in_features - k), sums, kPanelWidth);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float* row_sums = sums + row * kPanelWidth;
      a.out_is_bf16 ? finish_row<bf16>(a, row_sums, row_begin + row, first_column)
                    : finish_row<float>(a, row_sums, row_begin + row, first_column);
    }
  }
}

inline void linear(const LinearArgs& args, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    args.is_bf16 ? linear_panel<bf16>(args, panel) : linear_panel<float>(args, panel);
  }
}

}  // namespace steer::STEER_ISA

// out = (x - mean) / sqrt(variance + eps) * weight + bias, per row; mean and variance in fp32, in
// two passes.
#pragma once

namespace steer::STEER_ISA {

template <class Out>
inline void layer_norm_row(const LayerNormArgs& a, int64_t row) {
  const float* x = a.x + row * a.x_row_stride;
  Out* out = static_cast<Out*>(a.out) + row * a.out_row_stride;
  const int64_t size = a.hidden_size;

  F16 total = splat(0.0f);
  for (int64_t i = 0; i < size; i += kLanes) total = total + load(x + i, size - i);
  const float mean = sum(total) / static_cast<float>(size);

  F16 squares = splat(0.0f);
  for (int64_t i = 0; i < size; i += kLanes) {
    const F16 centered = load(x + i, size - i, /*fill=*/mean) - splat(mean);
    squares = fma(centered, centered, squares);
  }
  const float variance = sum(squares) / static_cast<float>(size);
  const float scale = 1.0f / std::sqrt(variance + a.eps);

  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t n = size - i;
    const F16 normed = (load(x + i, n) - splat(mean)) * splat(scale);
    store(out + i, fma(normed, load(a.weight + i, n), load(a.bias + i, n)), n);
  }
}

inline void layer_norm(const LayerNormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    args.out_is_bf16 ? layer_norm_row<bf16>(args, row) : layer_norm_row<float>(args, row);
  }
}

}  // namespace steer::STEER_ISA

// Rotates the query and key heads of each token in place and writes its keys and values to the
// cache:
//   (x1, x2) -> (x1 * cos - x2 * sin, x2 * cos + x1 * sin), x1 and x2 the halves of a head (RoPE,
//   half-split form).
// Source: Su et al. 2021 (arXiv:2104.09864).
#pragma once

namespace steer::STEER_ISA {

template <class T>
inline void rotate_head(T* head, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    const F16 x1 = load(head + i, n), x2 = load(head + half + i, n);
    const F16 c = load(cos + i, n), s = load(sin + i, n);
    store(head + i, x1 * c - x2 * s, n);
    store(head + half + i, x2 * c + x1 * s, n);
  }
}

template <class T>
inline void rotary_and_store_token(const RotaryAndStoreArgs& a, int64_t token) {
  T* q = static_cast<T*>(a.qkv) + token * a.qkv_row_stride;
  T* k = q + a.num_heads * a.head_dim;
  const T* v = k + a.num_kv_heads * a.head_dim;
  if (a.cos) {
    const int64_t half = a.head_dim / 2;
    const int64_t row = a.positions[token] * half;
    for (int64_t head = 0; head < a.num_heads + a.num_kv_heads; ++head) {
      rotate_head(q + head * a.head_dim, a.cos + row, a.sin + row, half);
    }
  }
  const int64_t slot = a.slot_mapping[token];
  if (slot < 0) return;
  const int64_t slot_size = a.num_kv_heads * a.head_dim;
  std::memcpy(static_cast<T*>(a.k_cache) + slot * slot_size, k, slot_size * sizeof(T));
  std::memcpy(static_cast<T*>(a.v_cache) + slot * slot_size, v, slot_size * sizeof(T));
}

inline void rotary_and_store(const RotaryAndStoreArgs& args, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    args.is_bf16 ? rotary_and_store_token<bf16>(args, token)
                 : rotary_and_store_token<float>(args, token);
  }
}

}  // namespace steer::STEER_ISA

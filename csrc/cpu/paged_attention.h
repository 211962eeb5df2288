// out[row][head] = sum over keys of softmax(scale * q.k + alibi) * v, keys 0 .. seq_len - 1 through
// the block table.
//
// A task is one row, one kv head and a split of the query heads that share it. Keys are packed, a
// tile at a time, like the weight of a linear layer, so that scores are one matrix product over all
// heads (71 for Falcon-7B) and each key is read once; values likewise. A head's arithmetic is the
// same for every split. The scores of all keys are kept, so the softmax is the plain one with the
// true maximum.
#pragma once

namespace steer::STEER_ISA {

constexpr int64_t kKeyTile = 64;

// The keys or values of one (row, kv head).
template <class T>
struct PagedRows {
  const T* cache;
  const int32_t* block_table;
  int64_t block_size, slot_stride, head_offset;

  const T* operator[](int64_t position) const {
    const int64_t block = block_table[position / block_size];
    return cache + (block * block_size + position % block_size) * slot_stride + head_offset;
  }
};

// packed[key / 16][d / step][key % 16][d % step] = keys[first + key][d]: a packed weight whose
// columns are keys.
template <class T>
inline void pack_keys(const PagedRows<T>& keys, int64_t first, int64_t num_keys, int64_t head_dim,
                      T* packed) {
  const int64_t group_stride = kLanes * round_up(head_dim, kStep<T>);
  std::memset(packed, 0, round_up(num_keys, kLanes) * (group_stride / kLanes) * sizeof(T));
  for (int64_t key = 0; key < num_keys; ++key) {
    const T* from = keys[first + key];
    T* to = packed + key / kLanes * group_stride + key % kLanes * kStep<T>;
    int64_t d = 0;
    for (; d + kStep<T> <= head_dim; d += kStep<T>) {
      std::memcpy(to + d * kLanes, from + d, kStep<T> * sizeof(T));
    }
    if (d < head_dim) to[d * kLanes] = from[d];
  }
}

// packed[d / 16][key][d % 16] = values[first + key][d] in fp32: a packed weight whose inputs are
// keys.
template <class T>
inline void pack_values(const PagedRows<T>& values, int64_t first, int64_t num_keys,
                        int64_t head_dim, float* packed) {
  for (int64_t key = 0; key < num_keys; ++key) {
    const T* from = values[first + key];
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      store(packed + d * kKeyTile + key * kLanes, load(from + d, head_dim - d));
    }
  }
}

// scores = softmax(scale * scores + alibi) in place.
inline void softmax(float* scores, int64_t seq_len, float scale, const float* alibi) {
  F16 highest = splat(kMinusInf);
  for (int64_t i = 0; i < seq_len; i += kLanes) {
    const int64_t n = seq_len - i;
    F16 s = load(scores + i, n, kMinusInf) * splat(scale);
    if (alibi) s = s + load(alibi + i, n);
    store(scores + i, s);
    highest = max(s, highest);
  }
  const F16 top = splat(maximum(highest));
  F16 total = splat(0.0f);
  for (int64_t i = 0; i < seq_len; i += kLanes) {
    const F16 e = exp2((load(scores + i) - top) * splat(kLog2E));
    store(scores + i, e);
    total = total + e;
  }
  const F16 inv_total = splat(1.0f / sum(total));
  for (int64_t i = 0; i < seq_len; i += kLanes) store(scores + i, load(scores + i) * inv_total);
}

// A task: query heads that share the keys and values of one row.
template <class T>
struct HeadGroup {
  const T* q;  // [num_heads, head_dim]
  T* out;      // [num_heads, head_dim]
  const float* alibi;
  PagedRows<T> keys, values;
  int64_t num_heads, seq_len;
};

template <class T>
inline HeadGroup<T> head_group(const PagedAttentionArgs& a, int64_t row, int64_t kv_head,
                               int64_t split) {
  const int64_t heads_per_kv = a.num_heads / a.num_kv_heads;
  const int64_t begin = split * heads_per_kv / a.num_splits;
  const int64_t end = (split + 1) * heads_per_kv / a.num_splits;
  const int64_t first_head = kv_head * heads_per_kv + begin;
  PagedRows<T> rows{nullptr, a.block_tables + a.table_ids[row] * a.max_blocks, a.block_size,
                    a.num_kv_heads * a.head_dim, kv_head * a.head_dim};
  HeadGroup<T> group{};
  group.q = static_cast<const T*>(a.qkv) + row * a.qkv_row_stride + first_head * a.head_dim;
  group.out = static_cast<T*>(a.out) + row * a.out_row_stride + first_head * a.head_dim;
  if (a.alibi) group.alibi = a.alibi + first_head * a.max_model_len;
  group.keys = group.values = rows;
  group.keys.cache = static_cast<const T*>(a.k_cache);
  group.values.cache = static_cast<const T*>(a.v_cache);
  group.num_heads = end - begin;
  group.seq_len = a.seq_lens[row];
  return group;
}

template <class T>
inline void paged_attention_task(const PagedAttentionArgs& a, const HeadGroup<T>& group) {
  const int64_t num_heads = group.num_heads, seq_len = group.seq_len, head_dim = a.head_dim;
  const int64_t padded_len = round_up(seq_len, kKeyTile);
  const int64_t padded_dim = round_up(head_dim, kLanes);
  const int64_t key_group_stride = kLanes * round_up(head_dim, kStep<T>);
  const int64_t num_scores = num_heads * padded_len, num_sums = num_heads * padded_dim;
  const int64_t tile_size = kKeyTile * padded_dim;
  Scratch scratch((num_scores + num_sums + 2 * tile_size) * sizeof(float));
  float* scores = scratch.take<float>(num_scores);  // [num_heads, padded_len]
  float* sums = scratch.take<float>(num_sums);      // [num_heads, padded_dim]
  T* packed_keys = scratch.take<T>(tile_size);
  float* packed_values = scratch.take<float>(tile_size);

  std::memset(scores, 0, num_scores * sizeof(float));
  for (int64_t first = 0; first < seq_len; first += kKeyTile) {
    const int64_t num_keys = std::min(kKeyTile, seq_len - first);
    pack_keys(group.keys, first, num_keys, head_dim, packed_keys);
    multiply(group.q, head_dim, num_heads, packed_keys, key_group_stride,
             round_up(num_keys, kLanes) / kLanes, head_dim, scores + first, padded_len);
  }
  for (int64_t head = 0; head < num_heads; ++head) {
    const float* alibi = group.alibi ? group.alibi + head * a.max_model_len : nullptr;
    softmax(scores + head * padded_len, seq_len, a.scale, alibi);
  }
  std::memset(sums, 0, num_sums * sizeof(float));
  for (int64_t first = 0; first < seq_len; first += kKeyTile) {
    const int64_t num_keys = std::min(kKeyTile, seq_len - first);
    pack_values(group.values, first, num_keys, head_dim, packed_values);
    multiply(scores + first, padded_len, num_heads, packed_values, kKeyTile * kLanes,
             padded_dim / kLanes, num_keys, sums, padded_dim);
  }
  for (int64_t head = 0; head < num_heads; ++head) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      store(group.out + head * head_dim + d, load(sums + head * padded_dim + d), head_dim - d);
    }
  }
}

inline void paged_attention(const PagedAttentionArgs& args, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t split = task % args.num_splits;
    const int64_t kv_head = task / args.num_splits % args.num_kv_heads;
    const int64_t row = task / args.num_splits / args.num_kv_heads;
    args.is_bf16 ? paged_attention_task(args, head_group<bf16>(args, row, kv_head, split))
                 : paged_attention_task(args, head_group<float>(args, row, kv_head, split));
  }
}

}  // namespace steer::STEER_ISA

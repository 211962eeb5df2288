// out[row][head] = sum over keys of softmax(scale * q.k + alibi) * v, keys 0 .. seq_len - 1 through
// the block table.
//
// A task is a group of rows, one kv head and a split of the query heads that share it. The rows of
// a group follow each other in one sequence, as in a prefill; in a decode step each is a group of
// its own. Keys are packed, a tile at a time, like the weight of a linear layer, so that scores are
// one matrix product over all queries (rows x heads) and each key is read once per group; values
// likewise. The scores of all keys are kept, so the softmax is the plain one with the true maximum.
//
// A query's arithmetic is the same in every group and split. Scores are computed for all keys of
// the group's last row, but a row's softmax and its sum of values stop at its own last key: a key
// behind it never counts as 0 * v, which would be NaN for an infinite v.
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
// columns are keys. The columns behind the last key repeat it.
template <class T>
inline void pack_keys(const PagedRows<T>& keys, int64_t first, int64_t num_keys, int64_t head_dim,
                      T* packed) {
  constexpr int64_t kSquare = kLanes * kStep<T>;  // elements of 16 times 32 bits
  const int64_t group_stride = kLanes * round_up(head_dim, kStep<T>);
  for (int64_t begin = 0; begin < num_keys; begin += kLanes, packed += group_stride) {
    const T* rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = keys[first + std::min(begin + i, num_keys - 1)];
    int64_t d = 0;
    for (; d + kSquare <= head_dim; d += kSquare) transpose(rows, d, packed + d * kLanes);
    for (; d < head_dim; d += kStep<T>) {
      for (int64_t i = 0; i < kLanes; ++i) {
        for (int64_t k = 0; k < kStep<T>; ++k) {
          packed[d * kLanes + i * kStep<T> + k] = d + k < head_dim ? rows[i][d + k] : T{};
        }
      }
    }
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

// scores = softmax(scale * scores + alibi) in place, with zeros up to a whole vector. What stands
// behind seq_len may be anything.
inline void softmax(float* scores, int64_t seq_len, float scale, const float* alibi) {
  F16 highest = splat(kMinusInf);
  for (int64_t i = 0; i < seq_len; i += kLanes) {
    const int64_t n = seq_len - i;
    F16 s = load(scores + i) * splat(scale);
    if (alibi) s = s + load(alibi + i, n);
    s = first_lanes(s, n, kMinusInf);
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

// A task: the queries of some rows and heads that share keys and values. Row r sees the first
// first_seq_len + r keys.
template <class T>
struct QueryGroup {
  const T* q;  // [num_rows, num_heads, head_dim]
  T* out;      // [num_rows, num_heads, head_dim]
  int64_t q_row_stride, out_row_stride;
  const float* alibi;  // [num_heads, max_model_len] or null
  PagedRows<T> keys, values;
  int64_t num_rows, num_heads, first_seq_len;

  int64_t num_queries() const { return num_rows * num_heads; }
  int64_t seq_len(int64_t row) const { return first_seq_len + row; }
  int64_t num_keys() const { return seq_len(num_rows - 1); }
};

template <class T>
inline QueryGroup<T> query_group(const PagedAttentionArgs& a, int64_t index, int64_t kv_head,
                                 int64_t split) {
  const int64_t row = a.group_begins[index];
  const int64_t heads_per_kv = a.num_heads / a.num_kv_heads;
  const int64_t begin = split * heads_per_kv / a.num_splits;
  const int64_t end = (split + 1) * heads_per_kv / a.num_splits;
  const int64_t first_head = kv_head * heads_per_kv + begin;
  PagedRows<T> rows{nullptr, a.block_tables + a.table_ids[row] * a.max_blocks, a.block_size,
                    a.num_kv_heads * a.head_dim, kv_head * a.head_dim};
  QueryGroup<T> group{};
  group.q = static_cast<const T*>(a.qkv) + row * a.qkv_row_stride + first_head * a.head_dim;
  group.out = static_cast<T*>(a.out) + row * a.out_row_stride + first_head * a.head_dim;
  group.q_row_stride = a.qkv_row_stride;
  group.out_row_stride = a.out_row_stride;
  if (a.alibi) group.alibi = a.alibi + first_head * a.max_model_len;
  group.keys = group.values = rows;
  group.keys.cache = static_cast<const T*>(a.k_cache);
  group.values.cache = static_cast<const T*>(a.v_cache);
  group.num_rows = a.group_begins[index + 1] - row;
  group.num_heads = end - begin;
  group.first_seq_len = a.seq_lens[row];
  return group;
}

// What a task computes, a line per query, and room for one tile.
template <class T>
struct AttentionScratch {
  int64_t padded_len, padded_dim;
  float* scores;         // [num_queries, padded_len]
  float* sums;           // [num_queries, padded_dim]
  float* queries;        // [num_queries, padded_dim], of T or converted
  T* packed_keys;        // a tile
  float *keys, *values;  // tiles in fp32
};

// scores = q.k for all keys of the group. Product: T, or fp32 to convert queries and keys first.
template <class Product, class T>
inline void multiply_keys_as(const QueryGroup<T>& group, int64_t head_dim,
                             const AttentionScratch<T>& s) {
  constexpr bool kConverts = !std::is_same_v<Product, T>;
  const int64_t packed_stride = kLanes * round_up(head_dim, kStep<T>);
  Product* queries = reinterpret_cast<Product*>(s.queries);
  for (int64_t row = 0; row < group.num_rows; ++row) {
    for (int64_t head = 0; head < group.num_heads; ++head) {
      const T* from = group.q + row * group.q_row_stride + head * head_dim;
      Product* to = queries + (row * group.num_heads + head) * s.padded_dim;
      if constexpr (kConverts) {
        convert(from, head_dim, to);
      } else {
        std::memcpy(to, from, head_dim * sizeof(T));
      }
    }
  }
  std::memset(s.scores, 0, group.num_queries() * s.padded_len * sizeof(float));
  for (int64_t first = 0; first < group.num_keys(); first += kKeyTile) {
    const int64_t num_keys = std::min(kKeyTile, group.num_keys() - first);
    const int64_t num_groups = round_up(num_keys, kLanes) / kLanes;
    pack_keys(group.keys, first, num_keys, head_dim, s.packed_keys);
    const PackedColumns<T> packed{s.packed_keys, packed_stride};
    PackedColumns<Product> keys{nullptr, packed_stride};
    if constexpr (kConverts) {
      convert_weights(packed, num_groups, head_dim, s.keys, packed_stride);
      keys.packed = s.keys;
    } else {
      keys = packed;
    }
    multiply(queries, s.padded_dim, group.num_queries(), keys, num_groups,
             kConverts ? round_up(head_dim, kStep<T>) : head_dim, s.scores + first, s.padded_len);
  }
}

template <class T>
inline void multiply_keys(const QueryGroup<T>& group, int64_t head_dim,
                          const AttentionScratch<T>& scratch) {
  if constexpr (kCanConvert<T>) {
    if (group.num_queries() >= kMinRowsToConvert) {
      multiply_keys_as<float>(group, head_dim, scratch);
      return;
    }
  }
  multiply_keys_as<T>(group, head_dim, scratch);
}

// sums = weights (in scores) times values, each row to its own last key.
template <class T>
inline void multiply_values(const QueryGroup<T>& group, int64_t head_dim,
                            const AttentionScratch<T>& s) {
  // The tile's keys begin .. end - 1 for some rows.
  const auto add = [&](int64_t row, int64_t num_rows, int64_t first, int64_t begin, int64_t end) {
    if (begin >= end) return;
    const int64_t query = row * group.num_heads;
    const PackedColumns<float> values{s.values + begin * kLanes, kKeyTile * kLanes};
    multiply(s.scores + query * s.padded_len + first + begin, s.padded_len,
             num_rows * group.num_heads, values, s.padded_dim / kLanes, end - begin,
             s.sums + query * s.padded_dim, s.padded_dim);
  };
  std::memset(s.sums, 0, group.num_queries() * s.padded_dim * sizeof(float));
  for (int64_t first = 0; first < group.num_keys(); first += kKeyTile) {
    const int64_t num_keys = std::min(kKeyTile, group.num_keys() - first);
    pack_values(group.values, first, num_keys, head_dim, s.values);
    // Keys that all rows see, then those that only later rows see.
    const int64_t num_common = std::clamp<int64_t>(group.first_seq_len - first, 0, num_keys);
    add(0, group.num_rows, first, 0, num_common);
    for (int64_t row = 1; row < group.num_rows; ++row) {
      add(row, 1, first, num_common, std::min(group.seq_len(row) - first, num_keys));
    }
  }
}

template <class T>
inline void paged_attention_task(const PagedAttentionArgs& a, const QueryGroup<T>& group) {
  const int64_t num_heads = group.num_heads, num_queries = group.num_queries();
  const int64_t padded_len = round_up(group.num_keys(), kKeyTile);
  const int64_t padded_dim = round_up(a.head_dim, kLanes);
  const int64_t num_scores = num_queries * padded_len, num_sums = num_queries * padded_dim;
  const int64_t tile_size = kKeyTile * padded_dim;
  Scratch parts((num_scores + 2 * num_sums + 3 * tile_size) * sizeof(float));
  const AttentionScratch<T> scratch{
      padded_len,
      padded_dim,
      parts.take<float>(num_scores),
      parts.take<float>(num_sums),
      parts.take<float>(num_sums),
      parts.take<T>(tile_size),
      parts.take<float>(tile_size),
      parts.take<float>(tile_size),
  };
  multiply_keys(group, a.head_dim, scratch);
  for (int64_t query = 0; query < num_queries; ++query) {
    const float* alibi = group.alibi ? group.alibi + query % num_heads * a.max_model_len : nullptr;
    softmax(scratch.scores + query * padded_len, group.seq_len(query / num_heads), a.scale, alibi);
  }
  multiply_values(group, a.head_dim, scratch);
  for (int64_t query = 0; query < num_queries; ++query) {
    const float* sums = scratch.sums + query * padded_dim;
    T* out = group.out + query / num_heads * group.out_row_stride + query % num_heads * a.head_dim;
    for (int64_t d = 0; d < a.head_dim; d += kLanes) store(out + d, load(sums + d), a.head_dim - d);
  }
}

inline void paged_attention(const PagedAttentionArgs& args, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t split = task % args.num_splits;
    const int64_t kv_head = task / args.num_splits % args.num_kv_heads;
    const int64_t group = task / args.num_splits / args.num_kv_heads;
    args.is_bf16 ? paged_attention_task(args, query_group<bf16>(args, group, kv_head, split))
                 : paged_attention_task(args, query_group<float>(args, group, kv_head, split));
  }
}

}  // namespace steer::STEER_ISA

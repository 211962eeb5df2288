// The CPU ops: their arguments and their entry points. Plain pointers and sizes; bindings.cpp has
// checked them. (GuidedSampleArgs serves the CUDA sampler, too.)
//
// Every op is a number of independent tasks, and an entry point runs the tasks [begin, end). No
// task's arithmetic depends on how the tasks are grouped, so results do not depend on the number of
// threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace steer {

struct bf16;  // cpu/bf16.h

// A packed weight is [out_features / kLanes][in_features / step][kLanes][step], zero padded; step
// is 2 in bf16 and 1 in fp32. So 16 output columns lie side by side, as the multiply-add
// instructions want them. In int8 step is 1, too, but inputs are padded to pairs, so that one
// layout serves inputs in bf16 and in fp32.
constexpr int64_t kLanes = 16;

// Weights in int8 lie in [-kMaxInt8, kMaxInt8], so that a sign costs nothing.
constexpr int kMaxInt8 = 127;

// A task of `linear` is this many output columns. 64 columns of 4544 inputs are 0.6 MB in bf16,
// which stays in L2 while all rows pass over it.
constexpr int64_t kPanelWidth = 64;

// Queries (rows x heads) that paged_attention handles together: enough that packing the keys is a
// small part, few enough that their scores of 256 keys take 192 KB of L2. Rows at most: a group
// scores the last row's keys for all its rows.
constexpr int64_t kQueriesPerGroup = 192, kMaxRowsPerGroup = 16;

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// has_pairs: bf16 and int8.
constexpr int64_t packed_size(int64_t out_features, int64_t in_features, bool has_pairs) {
  return round_up(out_features, kLanes) * (has_pairs ? round_up(in_features, 2) : in_features);
}

// Tasks of `linear`.
constexpr int64_t num_panels(int64_t out_features) {
  return round_up(out_features, kPanelWidth) / kPanelWidth;
}

struct PackWeightArgs {
  const void* weight;  // [out_features, in_features]
  void* packed;
  int64_t out_features, in_features;
  bool is_bf16;
};

struct PackInt8Args {
  const void* weight;  // [out_features, in_features]
  int8_t* packed;
  float* scales;  // [out_features]
  int64_t out_features, in_features;
  bool is_bf16;
};

struct LinearArgs {
  const void* x;  // [num_rows, in_features + tail_features]
  int64_t x_row_stride;
  const void* packed;  // [out_features, in_features], as x if neither scales nor raw are given
  const float* bias;   // [out_features] or null
  void* out;           // [num_rows, out_features]
  int64_t out_row_stride;
  int64_t num_rows, in_features, out_features;
  int64_t gelu_columns;  // GELU applies to the first of out_features
  bool is_bf16, out_is_bf16, accumulate;
  const float* scales = nullptr;  // [out_features], of a weight in int8
  const bf16* raw = nullptr;      // raw units, of a compressed weight
  const void* tail = nullptr;     // the weight's last columns, packed as x, or null
  int64_t tail_features = 0;
};

struct LayerNormArgs {
  const float* x;  // [num_rows, hidden_size]
  int64_t x_row_stride;
  const float *weight, *bias;  // [hidden_size]
  void* out;                   // [num_rows, hidden_size]
  int64_t out_row_stride;
  int64_t num_rows, hidden_size;
  float eps;
  bool out_is_bf16;
};

struct RotaryAndStoreArgs {
  void* qkv;  // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
  int64_t qkv_row_stride;
  const float *cos, *sin;       // [max_model_len, head_dim / 2], or null: no rotation
  const int32_t* positions;     // [num_tokens]
  const int64_t* slot_mapping;  // [num_tokens], -1 = do not store
  void *k_cache, *v_cache;      // [num_slots, num_kv_heads, head_dim]
  int64_t num_tokens, num_heads, num_kv_heads, head_dim;
  bool is_bf16;
};

struct PagedAttentionArgs {
  const void* qkv;  // [num_rows, >= num_heads * head_dim]
  int64_t qkv_row_stride;
  const void *k_cache, *v_cache;  // [num_blocks, block_size, num_kv_heads, head_dim]
  const int32_t* block_tables;    // [num_tables, max_blocks]
  int64_t max_blocks;
  const int32_t *table_ids, *seq_lens;  // [num_rows]
  const float* alibi;                   // [num_heads, max_model_len] or null
  int64_t max_model_len;
  void* out;  // [num_rows, num_heads * head_dim]
  int64_t out_row_stride;
  int64_t num_rows, num_heads, num_kv_heads, head_dim, block_size;
  float scale;
  // Rows group_begins[i] .. group_begins[i + 1] - 1 read one table, each one key more than the row
  // before it.
  const int64_t* group_begins;  // [num_groups + 1]
  int64_t num_groups;
  int64_t num_splits;  // a group's heads are this many tasks per kv head
  bool is_bf16;
};

struct GuidedSampleArgs {
  const void* logits;  // [num_passes, num_seqs, vocab_size]
  int64_t pass_stride, seq_stride;
  const float* weights;          // [num_passes, num_seqs]
  const float* inv_temperature;  // this and the following: [num_seqs]
  const bool* greedy;
  const float* log_alpha;
  const int32_t* top_k;
  const int64_t* top_p_fixed;
  uint64_t seed;
  const int64_t* stream_ids;
  const int32_t* steps;
  int64_t* token_ids;
  float* logprobs;
  int32_t *status, *num_kept;
  int64_t* total_mass;
  int64_t num_passes, num_seqs, vocab_size;
  bool is_bf16;
};

// Tasks: groups of 16 output columns.
void pack_weight(const PackWeightArgs& args, int64_t begin, int64_t end);
void pack_int8_weight(const PackInt8Args& args, int64_t begin, int64_t end);

// The kernels of one instruction set.
struct Kernels {
  void (*linear)(const LinearArgs&, int64_t, int64_t);                    // tasks: panels
  void (*layer_norm)(const LayerNormArgs&, int64_t, int64_t);             // tasks: rows
  void (*rotary_and_store)(const RotaryAndStoreArgs&, int64_t, int64_t);  // tasks: tokens
  void (*paged_attention)(const PagedAttentionArgs&, int64_t,
                          int64_t);                                  // tasks: group, kv head, split
  void (*guided_sample)(const GuidedSampleArgs&, int64_t, int64_t);  // tasks: sequences
};

}  // namespace steer

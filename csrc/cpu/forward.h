// The forward pass of a Falcon over the stacked rows of all passes, as one team's stages; the same
// ops with the same arguments as FalconModel.forward (steer_engine/model.py), so the same bits.
#pragma once

#include "cpu/ops.h"
#include "cpu/team.h"

namespace steer {

// The five structs of weights below are filled from Python as tables of int64
// (steer_engine/cpu_model.py): addresses and sizes, 8 bytes each, in this order. A null address:
// not there.

// A LayerNorm for both weight sets; without domain_weight the domain uses the base's.
struct StackedNorm {
  const float *weight, *bias;  // [hidden_size]
  const float *domain_weight, *domain_bias;
};

// In int8 where there are scales, compressed where there are raw units, else in the model's dtype.
struct PackedWeight {
  const void* data = nullptr;
  const float* scales = nullptr;  // [out_features]
  const bf16* raw = nullptr;
};

// A product for both weight sets. With lora_a, `weight` is [W | scale*B] and the last `rank`
// columns of the input receive A x. In int8 and compressed, `weight` is W alone and lora_b holds
// scale*B.
struct StackedProduct {
  PackedWeight weight;  // packed [out_features, in_features]
  const float* bias;    // [out_features]
  PackedWeight domain_weight;
  const float* domain_bias;
  const void* lora_a;  // packed [rank, in_features - rank]
  const void* lora_b;  // packed [out_features, rank]
  int64_t out_features, in_features, rank;
};

// Where one norm feeds attention and MLP: norm, up_qkv in `up` and down_dense in `down`; else all.
struct LayerWeights {
  StackedNorm norm, mlp_norm;
  StackedProduct up, down, qkv, dense;
};

struct ModelWeights {
  StackedNorm final_norm;
  PackedWeight embedding, domain_embedding;  // [vocab_size, hidden_size], never in int8
  PackedWeight head, domain_head;
  int64_t hidden_size, ffn_hidden_size, num_heads, num_kv_heads, vocab_size, num_layers;
  int64_t is_fused, is_parallel;
};

struct ForwardArgs {
  const ModelWeights* model;
  const LayerWeights* layers;  // [num_layers]
  float eps;
  bool is_bf16;
  int64_t num_rows, num_domain;
  const int64_t* input_ids;  // [num_rows]
  // As in PagedAttentionArgs; a row's own K and V go to the last of the keys that it sees.
  const int32_t *block_tables, *table_ids, *seq_lens;
  int64_t max_blocks;
  const int64_t* group_begins;  // [num_groups + 1]
  int64_t num_groups, num_splits;
  const float *cos, *sin, *alibi;
  int64_t max_model_len;    // columns of alibi
  void *k_cache, *v_cache;  // [num_layers, num_blocks, block_size, num_kv_heads, head_dim]
  int64_t num_blocks, block_size;
  float* residual;        // [num_rows, hidden_size]
  void *normed, *wide;    // see Buffers in model.py
  int32_t* positions;     // [num_rows], scratch
  int64_t* slot_mapping;  // [num_rows], scratch
  int64_t residual_stride, normed_stride, wide_stride;
};

// At most so many stages: a split layer has two norms and four products with an adapter each, and
// attention has two.
constexpr int64_t forward_stages(int64_t num_layers) { return 1 + 12 * num_layers; }

// Every member of the team calls it.
void forward(const ForwardArgs& args, Team& team);

// Row (i, s) of the head is the head of sum over passes of coefficient * final norm, or what bf16
// loses of that sum where is_low is set; see HeadRows in steer_engine/head.py.
struct LogitsArgs {
  const ModelWeights* model;
  float eps;
  bool is_bf16;
  const float* residual;  // [num_tokens, hidden_size]
  int64_t residual_stride;
  const int64_t* logit_rows;  // [num_passes, num_seqs], rows of residual
  bool is_base[3];            // per pass: which weight set
  const float* coefficients;  // [num_rows, num_passes, num_seqs]
  const bool* is_low;         // [num_rows, num_seqs]
  void* normed;               // [num_rows * num_seqs, hidden_size], scratch
  float* logits;              // [num_rows, num_seqs, vocab_size]
  int64_t num_rows, num_domain_rows, num_passes, num_seqs;  // the rows behind use the base's head
};

constexpr int64_t kLogitsStages = 2;

// The final norm, the combination and the head. Every member of the team calls it.
void logits(const LogitsArgs& args, Team& team);

}  // namespace steer

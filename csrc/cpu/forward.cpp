#include "cpu/forward.h"

#include <cmath>
#include <cstring>

#include "cpu/bf16.h"
#include "cpu/compressed_weight.h"
#include "cpu/dispatch.h"
#include "cpu/scratch.h"

namespace steer {

namespace {

// Rows of a buffer, from some column on.
struct Rows {
  void* data;
  int64_t stride;  // in elements
  bool is_bf16;

  void* row(int64_t index) const {
    return static_cast<char*>(data) + index * stride * (is_bf16 ? 2 : 4);
  }
  Rows from_row(int64_t index) const { return {row(index), stride, is_bf16}; }
  Rows from_column(int64_t index) const {
    return {static_cast<char*>(data) + index * (is_bf16 ? 2 : 4), stride, is_bf16};
  }
};

LinearArgs linear_args(PackedWeight weight, const float* bias, Rows x, int64_t in_features,
                       Rows out, int64_t out_features, int64_t num_rows) {
  return {
      .x = x.data,
      .x_row_stride = x.stride,
      .packed = weight.data,
      .bias = bias,
      .out = out.data,
      .out_row_stride = out.stride,
      .num_rows = num_rows,
      .in_features = in_features,
      .out_features = out_features,
      .gelu_columns = 0,
      .is_bf16 = x.is_bf16,
      .out_is_bf16 = out.is_bf16,
      .accumulate = false,
      .scales = weight.scales,
      .raw = weight.raw,
  };
}

// Both weight sets' products in one queue, so that no member waits between them.
void products(Team& team, const LinearArgs& domain, const LinearArgs& base) {
  const int64_t num_domain_tasks = domain.num_rows > 0 ? num_panels(domain.out_features) : 0;
  const int64_t num_base_tasks = base.num_rows > 0 ? num_panels(base.out_features) : 0;
  team.stage(num_domain_tasks + num_base_tasks, [&](int64_t begin, int64_t end) {
    const int64_t boundary = std::clamp(num_domain_tasks, begin, end);
    kernels().linear(domain, begin, boundary);
    kernels().linear(base, boundary - num_domain_tasks, end - num_domain_tasks);
  });
}

// One row of an embedding in fp32: the row's values lie kLanes pairs (bf16) or values apart.
template <class T>
void unpack_row(const void* packed, int64_t index, int64_t in_features, float* out) {
  constexpr int64_t step = sizeof(T) == 2 ? 2 : 1;
  const int64_t group_size = kLanes * round_up(in_features, step);
  const T* from =
      static_cast<const T*>(packed) + index / kLanes * group_size + index % kLanes * step;
  for (int64_t k = 0; k < in_features; ++k) {
    out[k] = to_float(from[k / step * step * kLanes + k % step]);
  }
}

class ForwardPass {
 public:
  ForwardPass(const ForwardArgs& args, Team& team)
      : a_(args), m_(*args.model), team_(team), head_dim_(m_.hidden_size / m_.num_heads) {}

  void run() {
    embed();
    for (int64_t layer = 0; layer < m_.num_layers; ++layer) {
      m_.is_fused ? run_fused(a_.layers[layer], layer) : run_split(a_.layers[layer], layer);
    }
  }

 private:
  Rows residual() const { return {a_.residual, a_.residual_stride, false}; }
  Rows normed() const { return {a_.normed, a_.normed_stride, a_.is_bf16}; }
  Rows wide() const { return {a_.wide, a_.wide_stride, a_.is_bf16}; }  // [up | q | k | v]
  Rows qkv() const { return wide().from_column(m_.ffn_hidden_size); }

  void run_fused(const LayerWeights& w, int64_t layer) {
    norm(w.norm);
    product(w.up, normed(), wide(), m_.ffn_hidden_size);
    attend(layer);
    product(w.down, wide(), residual(), 0, /*accumulate=*/true);
  }

  void run_split(const LayerWeights& w, int64_t layer) {
    norm(w.norm);
    product(w.qkv, normed(), qkv());
    attend(layer);
    // In a parallel block both branches read the residual before either adds to it.
    if (m_.is_parallel) up(w);
    product(w.dense, qkv(), residual(), 0, /*accumulate=*/true);
    if (!m_.is_parallel) up(w);
    product(w.down, wide(), residual(), 0, /*accumulate=*/true);
  }

  void up(const LayerWeights& w) {
    norm(w.mlp_norm);
    product(w.up, normed(), wide(), m_.ffn_hidden_size);
  }

  void embed() {
    team_.stage(a_.num_rows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const bool is_domain = row < a_.num_domain && m_.domain_embedding.data;
        embed(is_domain ? m_.domain_embedding : m_.embedding, a_.input_ids[row],
              static_cast<float*>(residual().row(row)));
        locate(row);
      }
    });
  }

  void embed(const PackedWeight& embedding, int64_t input_id, float* out) const {
    if (embedding.raw) {
      decompress_column(embedding.data, embedding.raw, m_.vocab_size, m_.hidden_size, input_id,
                        out);
    } else if (a_.is_bf16) {
      unpack_row<bf16>(embedding.data, input_id, m_.hidden_size, out);
    } else {
      unpack_row<float>(embedding.data, input_id, m_.hidden_size, out);
    }
  }

  // Where a row stands and where its K and V go; nowhere for a row without keys.
  void locate(int64_t row) {
    const int64_t position = std::max(a_.seq_lens[row] - 1, 0);
    const int64_t block =
        a_.block_tables[a_.table_ids[row] * a_.max_blocks + position / a_.block_size];
    a_.positions[row] = static_cast<int32_t>(position);
    a_.slot_mapping[row] =
        a_.seq_lens[row] > 0 ? block * a_.block_size + position % a_.block_size : -1;
  }

  // residual -> normed
  void norm(const StackedNorm& w) {
    LayerNormArgs base{
        .x = a_.residual,
        .x_row_stride = a_.residual_stride,
        .weight = w.weight,
        .bias = w.bias,
        .out = a_.normed,
        .out_row_stride = a_.normed_stride,
        .num_rows = a_.num_rows,
        .hidden_size = m_.hidden_size,
        .eps = a_.eps,
        .out_is_bf16 = a_.is_bf16,
    };
    LayerNormArgs domain = base;
    if (w.domain_weight) {
      domain.weight = w.domain_weight;
      domain.bias = w.domain_bias;
    }
    team_.stage(a_.num_rows, [&](int64_t begin, int64_t end) {
      const int64_t boundary = std::clamp(a_.num_domain, begin, end);
      kernels().layer_norm(domain, begin, boundary);
      kernels().layer_norm(base, boundary, end);
    });
  }

  void product(const StackedProduct& p, Rows x, Rows out, int64_t gelu_columns = 0,
               bool accumulate = false) {
    if (p.lora_a) adapt(p, x);
    const bool has_two = p.domain_weight.data != nullptr;
    const int64_t num_base = has_two ? a_.num_rows - a_.num_domain : a_.num_rows;
    const int64_t first_base = a_.num_rows - num_base;
    LinearArgs base = linear_args(p.weight, p.bias, x.from_row(first_base), p.in_features,
                                  out.from_row(first_base), p.out_features, num_base);
    base.gelu_columns = gelu_columns;
    base.accumulate = accumulate;
    if (p.lora_b) {
      base.in_features -= p.rank;
      base.tail = p.lora_b;
      base.tail_features = p.rank;
    }
    LinearArgs domain = base;
    domain.packed = p.domain_weight.data;
    domain.scales = p.domain_weight.scales;
    domain.raw = p.domain_weight.raw;
    domain.bias = p.domain_bias;
    domain.x = x.data;
    domain.out = out.data;
    domain.num_rows = has_two ? a_.num_domain : 0;
    products(team_, domain, base);
  }

  // The last columns of x: A x for domain rows, 0 for the base's.
  void adapt(const StackedProduct& p, Rows x) {
    const int64_t in_features = p.in_features - p.rank;
    const Rows s = x.from_column(in_features);
    const LinearArgs args =
        linear_args({.data = p.lora_a}, nullptr, x, in_features, s, p.rank, a_.num_domain);
    const int64_t num_tasks = a_.num_domain > 0 ? num_panels(p.rank) : 0;
    team_.stage(num_tasks + 1, [&](int64_t begin, int64_t end) {
      kernels().linear(args, begin, std::min(end, num_tasks));
      if (end <= num_tasks) return;
      for (int64_t row = a_.num_domain; row < a_.num_rows; ++row) {
        std::memset(s.row(row), 0, p.rank * (s.is_bf16 ? 2 : 4));
      }
    });
  }

  // Rotary, KV write and attention; the result replaces q.
  void attend(int64_t layer) {
    const int64_t layer_bytes =
        a_.num_blocks * a_.block_size * m_.num_kv_heads * head_dim_ * (a_.is_bf16 ? 2 : 4) * layer;
    void* k_cache = static_cast<char*>(a_.k_cache) + layer_bytes;
    void* v_cache = static_cast<char*>(a_.v_cache) + layer_bytes;
    const RotaryAndStoreArgs rotary{
        .qkv = qkv().data,
        .qkv_row_stride = a_.wide_stride,
        .cos = a_.cos,
        .sin = a_.sin,
        .positions = a_.positions,
        .slot_mapping = a_.slot_mapping,
        .k_cache = k_cache,
        .v_cache = v_cache,
        .num_tokens = a_.num_rows,
        .num_heads = m_.num_heads,
        .num_kv_heads = m_.num_kv_heads,
        .head_dim = head_dim_,
        .is_bf16 = a_.is_bf16,
    };
    team_.stage(a_.num_rows, [&](int64_t begin, int64_t end) {
      kernels().rotary_and_store(rotary, begin, end);
    });
    const PagedAttentionArgs attention{
        .qkv = qkv().data,
        .qkv_row_stride = a_.wide_stride,
        .k_cache = k_cache,
        .v_cache = v_cache,
        .block_tables = a_.block_tables,
        .max_blocks = a_.max_blocks,
        .table_ids = a_.table_ids,
        .seq_lens = a_.seq_lens,
        .alibi = a_.alibi,
        .max_model_len = a_.max_model_len,
        .out = qkv().data,
        .out_row_stride = a_.wide_stride,
        .num_rows = a_.num_rows,
        .num_heads = m_.num_heads,
        .num_kv_heads = m_.num_kv_heads,
        .head_dim = head_dim_,
        .block_size = a_.block_size,
        .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim_))),
        .group_begins = a_.group_begins,
        .num_groups = a_.num_groups,
        .num_splits = a_.num_splits,
        .is_bf16 = a_.is_bf16,
    };
    team_.stage(a_.num_groups * m_.num_kv_heads * a_.num_splits, [&](int64_t begin, int64_t end) {
      kernels().paged_attention(attention, begin, end);
    });
  }

  const ForwardArgs& a_;
  const ModelWeights& m_;
  Team& team_;
  int64_t head_dim_;
};

// The final norm of one pass of one sequence, in fp32.
void final_norm(const LogitsArgs& a, int64_t pass, int64_t seq, float* out) {
  const StackedNorm& norm = a.model->final_norm;
  const bool uses_domain = norm.domain_weight && !a.is_base[pass];
  const int64_t hidden_size = a.model->hidden_size;
  const LayerNormArgs args{
      .x = a.residual + a.logit_rows[pass * a.num_seqs + seq] * a.residual_stride,
      .x_row_stride = hidden_size,
      .weight = uses_domain ? norm.domain_weight : norm.weight,
      .bias = uses_domain ? norm.domain_bias : norm.bias,
      .out = out,
      .out_row_stride = hidden_size,
      .num_rows = 1,
      .hidden_size = hidden_size,
      .eps = a.eps,
      .out_is_bf16 = false,
  };
  kernels().layer_norm(args, 0, 1);
}

// One row of the head's input. T is its type.
template <class T>
void combine_row(const LogitsArgs& a, int64_t row) {
  const int64_t hidden_size = a.model->hidden_size, seq = row % a.num_seqs;
  Scratch scratch(2 * (hidden_size * sizeof(float) + 64));
  float* total = scratch.take<float>(hidden_size);
  float* hidden = scratch.take<float>(hidden_size);
  std::fill_n(total, hidden_size, 0.0f);
  for (int64_t pass = 0; pass < a.num_passes; ++pass) {
    const int64_t place = (row / a.num_seqs * a.num_passes + pass) * a.num_seqs + seq;
    const float coefficient = a.coefficients[place];
    if (coefficient == 0.0f) continue;  // not run, or not part of this row
    final_norm(a, pass, seq, hidden);
    for (int64_t i = 0; i < hidden_size; ++i) total[i] += hidden[i] * coefficient;
  }
  T* out = static_cast<T*>(a.normed) + row * hidden_size;
  for (int64_t i = 0; i < hidden_size; ++i) {
    assign(out[i], total[i]);
    if (a.is_low[row]) assign(out[i], total[i] - to_float(out[i]));
  }
}

}  // namespace

void forward(const ForwardArgs& args, Team& team) { ForwardPass(args, team).run(); }

void logits(const LogitsArgs& a, Team& team) {
  const ModelWeights& m = *a.model;
  team.stage(a.num_rows * a.num_seqs, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      a.is_bf16 ? combine_row<bf16>(a, row) : combine_row<float>(a, row);
    }
  });

  const Rows normed{a.normed, m.hidden_size, a.is_bf16}, out{a.logits, m.vocab_size, false};
  const int64_t num_domain = a.num_domain_rows * a.num_seqs;
  const int64_t num_base = a.num_rows * a.num_seqs - num_domain;
  const PackedWeight domain_head = m.domain_head.data ? m.domain_head : m.head;
  products(team,
           linear_args(domain_head, nullptr, normed, m.hidden_size, out, m.vocab_size, num_domain),
           linear_args(m.head, nullptr, normed.from_row(num_domain), m.hidden_size,
                       out.from_row(num_domain), m.vocab_size, num_base));
}

}  // namespace steer

// torch.ops.steer_engine: checks tensors, takes their pointers and runs the kernels on Torch's
// threads. Outputs are the caller's. The only file (with check_tensor.h) that includes Torch, and
// of Torch only the stable ABI.
#ifdef STEER_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <numeric>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "check_tensor.h"
#include "cpu/compressed_weight.h"
#include "cpu/dispatch.h"
#include "cpu/forward.h"
#include "cpu/ops.h"
#ifdef STEER_CUDA
#include "cuda/guided_sample.h"
#endif

// The CUDA targets that are compiled in, empty without CUDA; CMake names them.
#ifndef STEER_CUDA_ARCHS
#define STEER_CUDA_ARCHS ""
#endif

namespace steer {

namespace {

constexpr ScalarType kFp32 = ScalarType::Float;
constexpr ScalarType kBf16 = ScalarType::BFloat16;
constexpr ScalarType kByte = ScalarType::Byte;
constexpr ScalarType kInt8 = ScalarType::Char;
constexpr ScalarType kInt32 = ScalarType::Int;
constexpr ScalarType kInt64 = ScalarType::Long;

bool is_bf16(const Tensor& tensor) { return tensor.scalar_type() == kBf16; }

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Runs body(team) on every thread of Torch's pool at once.
template <class Body>
void run_team(int64_t num_stages, const Body& body) {
  const int64_t size = torch::stable::get_num_threads();
  TeamState state(num_stages, size);
  torch::stable::parallel_for(0, size, 1, [&](int64_t begin, int64_t end) {
    Team team(state, begin, end, size);
    try {
      body(team);
    } catch (...) {
      team.fail();
      throw;
    }
  });
}

// Runs all tasks on Torch's pool.
template <class Args>
void run_tasks(int64_t num_tasks, const Args& args, void (*kernel)(const Args&, int64_t, int64_t)) {
  if (num_tasks <= 1 || torch::stable::get_num_threads() <= 1) {
    kernel(args, 0, num_tasks);
    return;
  }
  run_team(1, [&](Team& team) {
    team.stage(num_tasks, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

// Memory for a weight packed in dtype.
Tensor new_packed(const Tensor& weight, ScalarType dtype) {
  const int64_t size = packed_size(weight.size(0), weight.size(1), dtype != kFp32);
  return torch::stable::new_empty(weight, {size}, dtype);
}

Tensor pack_weight_op(const Tensor& weight) {
  check_tensor(weight, "weight", {{"out_features"}, {"in_features"}}, {kBf16, kFp32});
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  Tensor packed = new_packed(weight, weight.scalar_type());
  const PackWeightArgs args{data<void>(weight), mutable_data<void>(packed), out_features,
                            in_features, is_bf16(weight)};
  run_tasks(round_up(out_features, kLanes) / kLanes, args, pack_weight);
  return packed;
}

std::tuple<Tensor, Tensor> pack_int8_weight_op(const Tensor& weight) {
  check_tensor(weight, "weight", {{"out_features"}, {"in_features"}}, {kBf16, kFp32});
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  Tensor packed = new_packed(weight, kInt8);
  Tensor scales = torch::stable::new_empty(weight, {out_features}, kFp32);
  const PackInt8Args args{
      .weight = data<void>(weight),
      .packed = mutable_data<int8_t>(packed),
      .scales = mutable_data<float>(scales),
      .out_features = out_features,
      .in_features = in_features,
      .is_bf16 = is_bf16(weight),
  };
  run_tasks(round_up(out_features, kLanes) / kLanes, args, pack_int8_weight);
  return {packed, scales};
}

void check_whole_units(int64_t in_features) {
  check_that(in_features % kUnitInputs == 0, "in_features must be a multiple of " +
                                                 std::to_string(kUnitInputs) + ", got " +
                                                 std::to_string(in_features));
}

// The raw units are at least one, so that their address says that the weight is compressed.
std::tuple<Tensor, Tensor> compress_weight_op(const Tensor& weight) {
  check_tensor(weight, "weight", {{"out_features"}, {"in_features"}}, {kBf16});
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  check_whole_units(in_features);
  const CompressedLayout layout(out_features, in_features);
  Tensor packed = torch::stable::new_empty(weight, {layout.bytes()}, kByte);
  std::vector<int64_t> raw_begins(layout.num_panels + 1);
  CompressArgs args{
      .weight = data<bf16>(weight),
      .packed = mutable_data<uint8_t>(packed),
      .raw = nullptr,
      .raw_begins = raw_begins.data(),
      .out_features = out_features,
      .in_features = in_features,
  };
  run_tasks(layout.num_panels, args, choose_exponents);
  std::partial_sum(raw_begins.begin(), raw_begins.end(), raw_begins.begin());
  const int64_t num_raw = std::max<int64_t>(raw_begins.back(), 1);
  Tensor raw = torch::stable::new_empty(weight, {num_raw, kUnitValues}, kBf16);
  args.raw = mutable_data<bf16>(raw);
  run_tasks(layout.num_panels, args, compress_units);
  return {packed, raw};
}

// What every form of linear checks, and its arguments but for the weight. in_features: of x that
// `packed` covers.
LinearArgs linear_args(const Tensor& x, int64_t in_features, const std::optional<Tensor>& bias,
                       int64_t out_features, int64_t gelu_columns, bool accumulate,
                       const Tensor& out) {
  check_that(out_features > 0,
             "out_features must be positive, got " + std::to_string(out_features));
  check_that(gelu_columns >= 0 && gelu_columns <= out_features,
             "gelu_columns must lie in [0, out_features=" + std::to_string(out_features) +
                 "], got " + std::to_string(gelu_columns));
  const int64_t num_rows = x.size(0);
  if (bias) check_tensor(*bias, "bias", {{"out_features", out_features}}, {kFp32});
  check_tensor(out, "out", {{"num_rows", num_rows}, {"out_features", out_features}}, {kBf16, kFp32},
               Layout::kUnitStride);
  check_that(!accumulate || !is_bf16(out), "out must be fp32 where accumulate is set, got bf16");
  return {
      .x = data<void>(x),
      .x_row_stride = x.stride(0),
      .packed = nullptr,
      .bias = data<float>(bias),
      .out = mutable_data<void>(out),
      .out_row_stride = out.stride(0),
      .num_rows = num_rows,
      .in_features = in_features,
      .out_features = out_features,
      .gelu_columns = gelu_columns,
      .is_bf16 = is_bf16(x),
      .out_is_bf16 = is_bf16(out),
      .accumulate = accumulate,
  };
}

void run_linear(const LinearArgs& args) {
  run_tasks(args.num_rows == 0 ? 0 : num_panels(args.out_features), args, kernels().linear);
}

void linear_op(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
               int64_t out_features, int64_t gelu_columns, bool accumulate, const Tensor& out) {
  check_tensor(x, "x", {{"num_rows"}, {"in_features"}}, {kBf16, kFp32}, Layout::kUnitStride);
  LinearArgs args = linear_args(x, x.size(1), bias, out_features, gelu_columns, accumulate, out);
  check_tensor(packed, "packed",
               {{"packed_size", packed_size(out_features, x.size(1), is_bf16(x))}},
               {x.scalar_type()});
  args.packed = data<void>(packed);
  run_linear(args);
}

// The arguments of a product whose weight ends in a tail: its last tail_features columns, packed in
// x's dtype.
LinearArgs linear_with_tail_args(const Tensor& x, const std::optional<Tensor>& tail,
                                 int64_t tail_features, const std::optional<Tensor>& bias,
                                 int64_t out_features, int64_t gelu_columns, bool accumulate,
                                 const Tensor& out) {
  check_that(tail_features >= 0 && tail_features <= x.size(1),
             "tail_features must lie in [0, in_features=" + std::to_string(x.size(1)) + "], got " +
                 std::to_string(tail_features));
  check_that(tail.has_value() == (tail_features > 0),
             "tail must be given where tail_features is not 0");
  LinearArgs args =
      linear_args(x, x.size(1) - tail_features, bias, out_features, gelu_columns, accumulate, out);
  if (tail) {
    check_tensor(*tail, "tail",
                 {{"packed_size", packed_size(out_features, tail_features, is_bf16(x))}},
                 {x.scalar_type()});
    args.tail = data<void>(*tail);
  }
  args.tail_features = tail_features;
  return args;
}

void linear_int8_op(const Tensor& x, const Tensor& packed, const Tensor& scales,
                    const std::optional<Tensor>& tail, int64_t tail_features,
                    const std::optional<Tensor>& bias, int64_t out_features, int64_t gelu_columns,
                    bool accumulate, const Tensor& out) {
  check_tensor(x, "x", {{"num_rows"}, {"in_features"}}, {kBf16, kFp32}, Layout::kUnitStride);
  LinearArgs args = linear_with_tail_args(x, tail, tail_features, bias, out_features, gelu_columns,
                                          accumulate, out);
  check_tensor(packed, "packed",
               {{"packed_size", packed_size(out_features, args.in_features, true)}}, {kInt8});
  check_tensor(scales, "scales", {{"out_features", out_features}}, {kFp32});
  args.packed = data<void>(packed);
  args.scales = data<float>(scales);
  run_linear(args);
}

void check_compressed(const Tensor& packed, const Tensor& raw, int64_t out_features,
                      int64_t in_features) {
  check_whole_units(in_features);
  check_tensor(packed, "packed",
               {{"packed_size", CompressedLayout(out_features, in_features).bytes()}}, {kByte});
  check_tensor(raw, "raw", {{"num_raw"}, {"unit_values", kUnitValues}}, {kBf16});
}

void linear_compressed_op(const Tensor& x, const Tensor& packed, const Tensor& raw,
                          const std::optional<Tensor>& tail, int64_t tail_features,
                          const std::optional<Tensor>& bias, int64_t out_features,
                          int64_t gelu_columns, bool accumulate, const Tensor& out) {
  check_tensor(x, "x", {{"num_rows"}, {"in_features"}}, {kBf16}, Layout::kUnitStride);
  LinearArgs args = linear_with_tail_args(x, tail, tail_features, bias, out_features, gelu_columns,
                                          accumulate, out);
  check_compressed(packed, raw, out_features, args.in_features);
  args.packed = data<void>(packed);
  args.raw = data<bf16>(raw);
  run_linear(args);
}

// Rows input_ids of a compressed embedding in fp32.
Tensor embedding_compressed_op(const Tensor& packed, const Tensor& raw, int64_t num_embeddings,
                               int64_t embedding_dim, const Tensor& input_ids) {
  check_compressed(packed, raw, num_embeddings, embedding_dim);
  check_tensor(input_ids, "input_ids", {{"num_tokens"}}, {kInt64});
  const int64_t num_tokens = input_ids.size(0);
  check_range(data<int64_t>(input_ids), num_tokens, 0, num_embeddings, "input_ids");
  Tensor out = torch::stable::new_empty(input_ids, {num_tokens, embedding_dim}, kFp32);
  for (int64_t i = 0; i < num_tokens; ++i) {
    decompress_column(data<void>(packed), data<bf16>(raw), num_embeddings, embedding_dim,
                      data<int64_t>(input_ids)[i], mutable_data<float>(out) + i * embedding_dim);
  }
  return out;
}

void layer_norm_op(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                   const Tensor& out) {
  check_tensor(x, "x", {{"num_rows"}, {"hidden_size"}}, {kFp32}, Layout::kUnitStride);
  const int64_t num_rows = x.size(0), hidden_size = x.size(1);
  check_tensor(weight, "weight", {{"hidden_size", hidden_size}}, {kFp32});
  check_tensor(bias, "bias", {{"hidden_size", hidden_size}}, {kFp32});
  check_tensor(out, "out", {{"num_rows", num_rows}, {"hidden_size", hidden_size}}, {kBf16, kFp32},
               Layout::kUnitStride);
  const LayerNormArgs args{
      .x = data<float>(x),
      .x_row_stride = x.stride(0),
      .weight = data<float>(weight),
      .bias = data<float>(bias),
      .out = mutable_data<void>(out),
      .out_row_stride = out.stride(0),
      .num_rows = num_rows,
      .hidden_size = hidden_size,
      .eps = static_cast<float>(eps),
      .out_is_bf16 = is_bf16(out),
  };
  run_tasks(num_rows, args, kernels().layer_norm);
}

void rotary_and_store_op(const Tensor& qkv, const std::optional<Tensor>& cos,
                         const std::optional<Tensor>& sin, const Tensor& positions,
                         const Tensor& slot_mapping, int64_t num_heads, const Tensor& k_cache,
                         const Tensor& v_cache) {
  check_tensor(k_cache, "k_cache", {{"num_blocks"}, {"block_size"}, {"num_kv_heads"}, {"head_dim"}},
               {kBf16, kFp32});
  const int64_t num_slots = k_cache.size(0) * k_cache.size(1);
  const int64_t num_kv_heads = k_cache.size(2), head_dim = k_cache.size(3);
  check_tensor(v_cache, "v_cache",
               {{"num_blocks", k_cache.size(0)},
                {"block_size", k_cache.size(1)},
                {"num_kv_heads", num_kv_heads},
                {"head_dim", head_dim}},
               {k_cache.scalar_type()});
  check_tensor(qkv, "qkv",
               {{"num_tokens"}, {"qkv_size", (num_heads + 2 * num_kv_heads) * head_dim}},
               {k_cache.scalar_type()}, Layout::kUnitStride);
  const int64_t num_tokens = qkv.size(0);
  check_tensor(positions, "positions", {{"num_tokens", num_tokens}}, {kInt32});
  check_tensor(slot_mapping, "slot_mapping", {{"num_tokens", num_tokens}}, {kInt64});
  check_range(data<int64_t>(slot_mapping), num_tokens, -1, num_slots, "slot_mapping");
  check_that(cos.has_value() == sin.has_value(), "cos and sin must both be given or both be None");
  if (cos) {
    check_that(head_dim % 2 == 0, "head_dim must be even, got " + std::to_string(head_dim));
    check_tensor(*cos, "cos", {{"max_model_len"}, {"head_dim / 2", head_dim / 2}}, {kFp32});
    check_tensor(*sin, "sin", {{"max_model_len", cos->size(0)}, {"head_dim / 2", head_dim / 2}},
                 {kFp32});
    check_range(data<int32_t>(positions), num_tokens, 0, cos->size(0), "positions");
  }
  const RotaryAndStoreArgs args{
      .qkv = mutable_data<void>(qkv),
      .qkv_row_stride = qkv.stride(0),
      .cos = data<float>(cos),
      .sin = data<float>(sin),
      .positions = data<int32_t>(positions),
      .slot_mapping = data<int64_t>(slot_mapping),
      .k_cache = mutable_data<void>(k_cache),
      .v_cache = mutable_data<void>(v_cache),
      .num_tokens = num_tokens,
      .num_heads = num_heads,
      .num_kv_heads = num_kv_heads,
      .head_dim = head_dim,
      .is_bf16 = is_bf16(qkv),
  };
  run_tasks(num_tokens, args, kernels().rotary_and_store);
}

// Every block that a row will read must be in the cache.
void check_block_tables(const PagedAttentionArgs& a, int64_t num_tables, int64_t num_blocks) {
  check_range(a.table_ids, a.num_rows, 0, num_tables, "table_ids");
  check_range(a.seq_lens, a.num_rows, 0, a.max_blocks * a.block_size + 1, "seq_lens");
  if (a.alibi) check_range(a.seq_lens, a.num_rows, 0, a.max_model_len + 1, "seq_lens");
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t blocks_read = (a.seq_lens[row] + a.block_size - 1) / a.block_size;
    check_range(a.block_tables + a.table_ids[row] * a.max_blocks, blocks_read, 0, num_blocks,
                "block_tables");
  }
}

// The tasks of paged_attention.
struct AttentionTasks {
  std::vector<int64_t> group_begins;
  int64_t num_splits;

  int64_t num_groups() const { return static_cast<int64_t>(group_begins.size()) - 1; }
};

// Rows that follow each other in one sequence form groups. A task is a group and a kv head, unless
// that leaves threads idle: then a group's heads are split.
AttentionTasks attention_tasks(const int32_t* table_ids, const int32_t* seq_lens, int64_t num_rows,
                               int64_t num_kv_heads, int64_t heads_per_kv) {
  const int64_t max_rows =
      std::clamp<int64_t>(kQueriesPerGroup / heads_per_kv, 1, kMaxRowsPerGroup);
  AttentionTasks tasks;
  for (int64_t row = 0; row < num_rows; ++row) {
    const bool follows =
        row > 0 && table_ids[row] == table_ids[row - 1] && seq_lens[row] == seq_lens[row - 1] + 1;
    if (!follows || row - tasks.group_begins.back() >= max_rows) tasks.group_begins.push_back(row);
  }
  tasks.group_begins.push_back(num_rows);
  const int64_t num_threads = torch::stable::get_num_threads();
  const int64_t num_tasks = tasks.num_groups() * num_kv_heads;
  const bool are_enough = num_threads <= 1 || num_tasks == 0 || num_tasks >= 4 * num_threads;
  tasks.num_splits =
      are_enough ? 1 : std::min(heads_per_kv, (4 * num_threads + num_tasks - 1) / num_tasks);
  return tasks;
}

void paged_attention_op(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& block_tables, const Tensor& table_ids, const Tensor& seq_lens,
                        const std::optional<Tensor>& alibi, int64_t num_heads, double scale,
                        const Tensor& out) {
  check_tensor(k_cache, "k_cache", {{"num_blocks"}, {"block_size"}, {"num_kv_heads"}, {"head_dim"}},
               {kBf16, kFp32});
  const int64_t num_blocks = k_cache.size(0), block_size = k_cache.size(1);
  const int64_t num_kv_heads = k_cache.size(2), head_dim = k_cache.size(3);
  check_tensor(v_cache, "v_cache",
               {{"num_blocks", num_blocks},
                {"block_size", block_size},
                {"num_kv_heads", num_kv_heads},
                {"head_dim", head_dim}},
               {k_cache.scalar_type()});
  check_that(num_heads > 0 && num_kv_heads > 0 && num_heads % num_kv_heads == 0,
             "num_heads must be a multiple of num_kv_heads=" + std::to_string(num_kv_heads) +
                 ", got " + std::to_string(num_heads));
  check_tensor(qkv, "qkv", {{"num_rows"}, {"qkv_size", (num_heads + 2 * num_kv_heads) * head_dim}},
               {k_cache.scalar_type()}, Layout::kUnitStride);
  const int64_t num_rows = qkv.size(0);
  check_tensor(block_tables, "block_tables", {{"num_tables"}, {"max_blocks"}}, {kInt32});
  check_tensor(table_ids, "table_ids", {{"num_rows", num_rows}}, {kInt32});
  check_tensor(seq_lens, "seq_lens", {{"num_rows", num_rows}}, {kInt32});
  if (alibi) {
    check_tensor(*alibi, "alibi", {{"num_heads", num_heads}, {"max_model_len"}}, {kFp32});
  }
  check_tensor(out, "out", {{"num_rows", num_rows}, {"num_heads * head_dim", num_heads * head_dim}},
               {k_cache.scalar_type()}, Layout::kUnitStride);
  const AttentionTasks tasks = attention_tasks(data<int32_t>(table_ids), data<int32_t>(seq_lens),
                                               num_rows, num_kv_heads, num_heads / num_kv_heads);
  const PagedAttentionArgs args{
      .qkv = data<void>(qkv),
      .qkv_row_stride = qkv.stride(0),
      .k_cache = data<void>(k_cache),
      .v_cache = data<void>(v_cache),
      .block_tables = data<int32_t>(block_tables),
      .max_blocks = block_tables.size(1),
      .table_ids = data<int32_t>(table_ids),
      .seq_lens = data<int32_t>(seq_lens),
      .alibi = data<float>(alibi),
      .max_model_len = alibi ? alibi->size(1) : 0,
      .out = mutable_data<void>(out),
      .out_row_stride = out.stride(0),
      .num_rows = num_rows,
      .num_heads = num_heads,
      .num_kv_heads = num_kv_heads,
      .head_dim = head_dim,
      .block_size = block_size,
      .scale = static_cast<float>(scale),
      .group_begins = tasks.group_begins.data(),
      .num_groups = tasks.num_groups(),
      .num_splits = tasks.num_splits,
      .is_bf16 = is_bf16(qkv),
  };
  check_block_tables(args, block_tables.size(0), num_blocks);
  run_tasks(args.num_groups * num_kv_heads * args.num_splits, args, kernels().paged_attention);
}

// A table of addresses and sizes that is one struct, or an array of them.
template <class T>
const T* struct_table(const Tensor& table, const char* name, int64_t count) {
  check_tensor(table, name, {{"count", count}, {"fields", sizeof(T) / sizeof(int64_t)}}, {kInt64});
  return static_cast<const T*>(table.const_data_ptr());
}

struct CacheShape {
  int64_t num_blocks, block_size;
};

// k_cache, v_cache: [num_layers, num_blocks, block_size, num_kv_heads, head_dim].
CacheShape check_caches(const Tensor& k_cache, const Tensor& v_cache, const ModelWeights& model,
                        ScalarType dtype) {
  const int64_t head_dim = model.hidden_size / model.num_heads;
  for (const auto& [cache, name] : {std::pair{&k_cache, "k_cache"}, {&v_cache, "v_cache"}}) {
    check_tensor(*cache, name,
                 {{"num_layers", model.num_layers},
                  {"num_blocks", k_cache.size(1)},
                  {"block_size", k_cache.size(2)},
                  {"num_kv_heads", model.num_kv_heads},
                  {"head_dim", head_dim}},
                 {dtype});
  }
  return {k_cache.size(1), k_cache.size(2)};
}

// All that a forward's attention addresses memory with.
void check_forward_indices(const ForwardArgs& a, int64_t num_tables, int64_t num_positions) {
  const ModelWeights& m = *a.model;
  check_range(a.input_ids, a.num_rows, 0, m.vocab_size, "input_ids");
  check_block_tables({.block_tables = a.block_tables,
                      .max_blocks = a.max_blocks,
                      .table_ids = a.table_ids,
                      .seq_lens = a.seq_lens,
                      .alibi = a.alibi,
                      .max_model_len = a.max_model_len,
                      .num_rows = a.num_rows,
                      .block_size = a.block_size},
                     num_tables, a.num_blocks);
  if (a.cos) check_range(a.seq_lens, a.num_rows, 0, num_positions + 1, "seq_lens");
}

void forward_op(const Tensor& model, const Tensor& layers, double eps, const Tensor& input_ids,
                const Tensor& block_tables, const Tensor& table_ids, const Tensor& seq_lens,
                int64_t num_domain, const std::optional<Tensor>& cos,
                const std::optional<Tensor>& sin, const std::optional<Tensor>& alibi,
                const Tensor& k_cache, const Tensor& v_cache, const Tensor& residual,
                const Tensor& normed, const Tensor& wide) {
  const ModelWeights& m = *struct_table<ModelWeights>(model, "model", 1);
  const LayerWeights* layer_weights = struct_table<LayerWeights>(layers, "layers", m.num_layers);
  const int64_t num_rows = input_ids.size(0);
  check_tensor(input_ids, "input_ids", {{"num_rows"}}, {kInt64});
  check_tensor(block_tables, "block_tables", {{"num_tables"}, {"max_blocks"}}, {kInt32});
  check_tensor(table_ids, "table_ids", {{"num_rows", num_rows}}, {kInt32});
  check_tensor(seq_lens, "seq_lens", {{"num_rows", num_rows}}, {kInt32});
  check_that(num_domain >= 0 && num_domain <= num_rows,
             "num_domain must lie in [0, num_rows], got " + std::to_string(num_domain));
  const ScalarType dtype = wide.scalar_type();
  const CacheShape shape = check_caches(k_cache, v_cache, m, dtype);
  const auto check_buffer = [&](const Tensor& buffer, const char* name, ScalarType buffer_dtype) {
    check_tensor(buffer, name, {{"num_rows", num_rows}, {"width"}}, {buffer_dtype},
                 Layout::kUnitStride);
  };
  check_buffer(residual, "residual", kFp32);
  check_buffer(normed, "normed", dtype);
  check_buffer(wide, "wide", dtype);
  std::vector<int32_t> positions(num_rows);
  std::vector<int64_t> slot_mapping(num_rows);
  const AttentionTasks tasks =
      attention_tasks(data<int32_t>(table_ids), data<int32_t>(seq_lens), num_rows, m.num_kv_heads,
                      m.num_heads / m.num_kv_heads);
  const ForwardArgs args{
      .model = &m,
      .layers = layer_weights,
      .eps = static_cast<float>(eps),
      .is_bf16 = is_bf16(wide),
      .num_rows = num_rows,
      .num_domain = num_domain,
      .input_ids = data<int64_t>(input_ids),
      .block_tables = data<int32_t>(block_tables),
      .table_ids = data<int32_t>(table_ids),
      .seq_lens = data<int32_t>(seq_lens),
      .max_blocks = block_tables.size(1),
      .group_begins = tasks.group_begins.data(),
      .num_groups = tasks.num_groups(),
      .num_splits = tasks.num_splits,
      .cos = data<float>(cos),
      .sin = data<float>(sin),
      .alibi = data<float>(alibi),
      .max_model_len = alibi ? alibi->size(1) : 0,
      .k_cache = mutable_data<void>(k_cache),
      .v_cache = mutable_data<void>(v_cache),
      .num_blocks = shape.num_blocks,
      .block_size = shape.block_size,
      .residual = mutable_data<float>(residual),
      .normed = mutable_data<void>(normed),
      .wide = mutable_data<void>(wide),
      .positions = positions.data(),
      .slot_mapping = slot_mapping.data(),
      .residual_stride = residual.stride(0),
      .normed_stride = normed.stride(0),
      .wide_stride = wide.stride(0),
  };
  check_forward_indices(args, block_tables.size(0), cos ? cos->size(0) : 0);
  run_team(forward_stages(m.num_layers), [&](Team& team) { forward(args, team); });
}

void logits_op(const Tensor& model, double eps, const Tensor& residual, const Tensor& logit_rows,
               std::vector<bool> is_base, int64_t num_domain_rows, const Tensor& coefficients,
               const Tensor& is_low, const Tensor& normed, const Tensor& out) {
  const ModelWeights& m = *struct_table<ModelWeights>(model, "model", 1);
  check_tensor(residual, "residual", {{"num_rows"}, {"hidden_size", m.hidden_size}}, {kFp32},
               Layout::kUnitStride);
  check_tensor(logit_rows, "logit_rows", {{"num_passes"}, {"num_seqs"}}, {kInt64});
  const int64_t num_passes = logit_rows.size(0), num_seqs = logit_rows.size(1);
  check_that(num_passes >= 1 && num_passes <= 3,
             "logit_rows must have 1 to 3 passes, got " + std::to_string(num_passes));
  check_that(static_cast<int64_t>(is_base.size()) == num_passes,
             "is_base must have one value per pass, got " + std::to_string(is_base.size()));
  check_tensor(coefficients, "coefficients",
               {{"num_rows"}, {"num_passes", num_passes}, {"num_seqs", num_seqs}}, {kFp32});
  const int64_t num_rows = coefficients.size(0);
  check_that(num_rows >= 1 && num_rows <= num_passes,
             "coefficients must have 1 to num_passes rows, got " + std::to_string(num_rows));
  check_that(num_domain_rows >= 1 && num_domain_rows <= num_rows,
             "num_domain_rows must be 1 to num_rows, got " + std::to_string(num_domain_rows));
  check_tensor(is_low, "is_low", {{"num_rows", num_rows}, {"num_seqs", num_seqs}},
               {ScalarType::Bool});
  check_tensor(normed, "normed",
               {{"num_rows * num_seqs", num_rows * num_seqs}, {"hidden_size", m.hidden_size}},
               {kBf16, kFp32});
  check_tensor(out, "out",
               {{"num_rows", num_rows}, {"num_seqs", num_seqs}, {"vocab_size", m.vocab_size}},
               {kFp32});
  check_range(data<int64_t>(logit_rows), num_passes * num_seqs, 0, residual.size(0), "logit_rows");
  LogitsArgs args{
      .model = &m,
      .eps = static_cast<float>(eps),
      .is_bf16 = is_bf16(normed),
      .residual = data<float>(residual),
      .residual_stride = residual.stride(0),
      .logit_rows = data<int64_t>(logit_rows),
      .is_base = {},
      .coefficients = data<float>(coefficients),
      .is_low = data<bool>(is_low),
      .normed = mutable_data<void>(normed),
      .logits = mutable_data<float>(out),
      .num_rows = num_rows,
      .num_domain_rows = num_domain_rows,
      .num_passes = num_passes,
      .num_seqs = num_seqs,
  };
  std::copy(is_base.begin(), is_base.end(), args.is_base);
  run_team(kLogitsStages, [&](Team& team) { logits(args, team); });
}

GuidedSampleArgs guided_sample_args(const Tensor& logits, const Tensor& weights,
                                    const Tensor& inv_temperature, const Tensor& greedy,
                                    const Tensor& log_alpha, const Tensor& top_k,
                                    const Tensor& top_p_fixed, int64_t seed,
                                    const Tensor& stream_ids, const Tensor& steps,
                                    const Tensor& token_ids, const Tensor& logprobs,
                                    const Tensor& status, const Tensor& num_kept,
                                    const Tensor& total_mass) {
  check_tensor(logits, "logits", {{"num_passes"}, {"num_seqs"}, {"vocab_size"}}, {kBf16, kFp32},
               Layout::kUnitStride);
  const int64_t num_passes = logits.size(0), num_seqs = logits.size(1);
  check_that(num_passes >= 1 && num_passes <= 3 && logits.size(2) >= 1,
             "logits must have 1 to 3 passes and a vocabulary, got " + describe(logits));
  check_tensor(weights, "weights", {{"num_passes", num_passes}, {"num_seqs", num_seqs}}, {kFp32});
  const auto check_per_seq = [&](const Tensor& tensor, const char* name, ScalarType dtype) {
    check_tensor(tensor, name, {{"num_seqs", num_seqs}}, {dtype});
  };
  check_per_seq(inv_temperature, "inv_temperature", kFp32);
  check_per_seq(greedy, "greedy", ScalarType::Bool);
  check_per_seq(log_alpha, "log_alpha", kFp32);
  check_per_seq(top_k, "top_k", kInt32);
  check_per_seq(top_p_fixed, "top_p_fixed", kInt64);
  check_per_seq(stream_ids, "stream_ids", kInt64);
  check_per_seq(steps, "steps", kInt32);
  check_per_seq(token_ids, "token_ids", kInt64);
  check_per_seq(logprobs, "logprobs", kFp32);
  check_per_seq(status, "status", kInt32);
  check_per_seq(num_kept, "num_kept", kInt32);
  check_per_seq(total_mass, "total_mass", kInt64);
  return {
      .logits = data<void>(logits),
      .pass_stride = logits.stride(0),
      .seq_stride = logits.stride(1),
      .weights = data<float>(weights),
      .inv_temperature = data<float>(inv_temperature),
      .greedy = data<bool>(greedy),
      .log_alpha = data<float>(log_alpha),
      .top_k = data<int32_t>(top_k),
      .top_p_fixed = data<int64_t>(top_p_fixed),
      .seed = static_cast<uint64_t>(seed),
      .stream_ids = data<int64_t>(stream_ids),
      .steps = data<int32_t>(steps),
      .token_ids = mutable_data<int64_t>(token_ids),
      .logprobs = mutable_data<float>(logprobs),
      .status = mutable_data<int32_t>(status),
      .num_kept = mutable_data<int32_t>(num_kept),
      .total_mass = mutable_data<int64_t>(total_mass),
      .num_passes = num_passes,
      .num_seqs = num_seqs,
      .vocab_size = logits.size(2),
      .is_bf16 = is_bf16(logits),
  };
}

void guided_sample_op(const Tensor& logits, const Tensor& weights, const Tensor& inv_temperature,
                      const Tensor& greedy, const Tensor& log_alpha, const Tensor& top_k,
                      const Tensor& top_p_fixed, int64_t seed, const Tensor& stream_ids,
                      const Tensor& steps, const Tensor& token_ids, const Tensor& logprobs,
                      const Tensor& status, const Tensor& num_kept, const Tensor& total_mass) {
  const GuidedSampleArgs args = guided_sample_args(
      logits, weights, inv_temperature, greedy, log_alpha, top_k, top_p_fixed, seed, stream_ids,
      steps, token_ids, logprobs, status, num_kept, total_mass);
  run_tasks(args.num_seqs, args, kernels().guided_sample);
}

#ifdef STEER_CUDA
int64_t guided_sample_cluster_size_op(int64_t num_seqs, int64_t vocab_size) {
  return choose_cluster_size(num_seqs, vocab_size);
}

// seed: [1] on the device. scratch: [num_seqs, vocab_size] where cluster_size is 0. stream: a
// cudaStream_t; the stable ABI of Torch 2.11 does not give it out.
void guided_sample_cuda_op(const Tensor& logits, const Tensor& weights,
                           const Tensor& inv_temperature, const Tensor& greedy,
                           const Tensor& log_alpha, const Tensor& top_k, const Tensor& top_p_fixed,
                           const Tensor& seed, const Tensor& stream_ids, const Tensor& steps,
                           const Tensor& token_ids, const Tensor& logprobs, const Tensor& status,
                           const Tensor& num_kept, const Tensor& total_mass,
                           const std::optional<Tensor>& scratch, int64_t cluster_size,
                           int64_t stream) {
  GuidedSampleLaunch launch{};
  launch.args =
      guided_sample_args(logits, weights, inv_temperature, greedy, log_alpha, top_k, top_p_fixed, 0,
                         stream_ids, steps, token_ids, logprobs, status, num_kept, total_mass);
  const int64_t num_seqs = launch.args.num_seqs, vocab_size = launch.args.vocab_size;
  check_that(vocab_size <= kMaxVocabSize, "vocab_size must be at most " +
                                              std::to_string(kMaxVocabSize) + ", got " +
                                              std::to_string(vocab_size));
  check_that(is_cluster_size(cluster_size, vocab_size),
             "cluster_size must be 0, 4, 8 or 16, and 0 for a vocabulary above " +
                 std::to_string(kMaxVocabSizeInRegisters) + ", got " +
                 std::to_string(cluster_size));
  check_tensor(seed, "seed", {{"1", 1}}, {kInt64});
  launch.seed = data<int64_t>(seed);
  if (cluster_size == 0) {
    check_that(scratch.has_value(), "scratch must be given where cluster_size is 0");
    check_tensor(*scratch, "scratch", {{"num_seqs", num_seqs}, {"vocab_size", vocab_size}},
                 {kFp32});
    launch.x = mutable_data<float>(*scratch);
  }
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const char* error = launch_guided_sample(launch, static_cast<int>(cluster_size), stream);
  if (error != nullptr) throw std::runtime_error(std::string("guided_sample: CUDA: ") + error);
}
#endif

std::string cuda_archs() { return STEER_CUDA_ARCHS; }

void set_cpu_isa_op(std::string name) { set_cpu_isa(name); }

}  // namespace

}  // namespace steer

STABLE_TORCH_LIBRARY(steer_engine, m) {
  m.def("cuda_archs() -> str");
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str name) -> ()");
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int gelu_columns, "
      "bool accumulate, Tensor(a!) out) -> ()");
  m.def("pack_int8_weight(Tensor weight) -> (Tensor, Tensor)");
  m.def(
      "linear_int8(Tensor x, Tensor packed, Tensor scales, Tensor? tail, int tail_features, "
      "Tensor? bias, int out_features, int gelu_columns, bool accumulate, Tensor(a!) out) -> ()");
  m.def("compress_weight(Tensor weight) -> (Tensor, Tensor)");
  m.def(
      "linear_compressed(Tensor x, Tensor packed, Tensor raw, Tensor? tail, int tail_features, "
      "Tensor? bias, int out_features, int gelu_columns, bool accumulate, Tensor(a!) out) -> ()");
  m.def(
      "embedding_compressed(Tensor packed, Tensor raw, int num_embeddings, int embedding_dim, "
      "Tensor input_ids) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor(a!) out) -> ()");
  m.def(
      "rotary_and_store(Tensor(a!) qkv, Tensor? cos, Tensor? sin, Tensor positions, "
      "Tensor slot_mapping, int num_heads, Tensor(b!) k_cache, Tensor(c!) v_cache) -> ()");
  m.def(
      "paged_attention(Tensor qkv, Tensor k_cache, Tensor v_cache, Tensor block_tables, "
      "Tensor table_ids, Tensor seq_lens, Tensor? alibi, int num_heads, float scale, "
      "Tensor(a!) out) -> ()");
  m.def(
      "forward(Tensor model, Tensor layers, float eps, Tensor input_ids, Tensor block_tables, "
      "Tensor table_ids, Tensor seq_lens, "
      "int num_domain, Tensor? cos, Tensor? sin, Tensor? alibi, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor(c!) residual, Tensor(d!) normed, Tensor(e!) wide) -> ()");
  m.def(
      "logits(Tensor model, float eps, Tensor residual, Tensor logit_rows, bool[] is_base, "
      "int num_domain_rows, Tensor coefficients, Tensor is_low, Tensor(a!) normed, Tensor(b!) out) "
      "-> ()");
  m.def(
      "guided_sample(Tensor logits, Tensor weights, Tensor inv_temperature, Tensor greedy, "
      "Tensor log_alpha, Tensor top_k, Tensor top_p_fixed, int seed, Tensor stream_ids, "
      "Tensor steps, Tensor(a!) token_ids, Tensor(b!) logprobs, Tensor(c!) status, "
      "Tensor(d!) num_kept, Tensor(e!) total_mass) -> ()");
#ifdef STEER_CUDA
  m.def("guided_sample_cluster_size(int num_seqs, int vocab_size) -> int");
  m.def(
      "guided_sample_cuda(Tensor logits, Tensor weights, Tensor inv_temperature, Tensor greedy, "
      "Tensor log_alpha, Tensor top_k, Tensor top_p_fixed, Tensor seed, Tensor stream_ids, "
      "Tensor steps, Tensor(a!) token_ids, Tensor(b!) logprobs, Tensor(c!) status, "
      "Tensor(d!) num_kept, Tensor(e!) total_mass, Tensor(f!)? scratch, int cluster_size, "
      "int stream) -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(steer_engine, CompositeExplicitAutograd, m) {
  m.impl("cuda_archs", TORCH_BOX(&steer::cuda_archs));
#ifdef STEER_CUDA
  m.impl("guided_sample_cluster_size", TORCH_BOX(&steer::guided_sample_cluster_size_op));
#endif
  m.impl("cpu_isa", TORCH_BOX(&steer::cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&steer::set_cpu_isa_op));
}

STABLE_TORCH_LIBRARY_IMPL(steer_engine, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&steer::pack_weight_op));
  m.impl("linear", TORCH_BOX(&steer::linear_op));
  m.impl("pack_int8_weight", TORCH_BOX(&steer::pack_int8_weight_op));
  m.impl("linear_int8", TORCH_BOX(&steer::linear_int8_op));
  m.impl("compress_weight", TORCH_BOX(&steer::compress_weight_op));
  m.impl("linear_compressed", TORCH_BOX(&steer::linear_compressed_op));
  m.impl("embedding_compressed", TORCH_BOX(&steer::embedding_compressed_op));
  m.impl("layer_norm", TORCH_BOX(&steer::layer_norm_op));
  m.impl("rotary_and_store", TORCH_BOX(&steer::rotary_and_store_op));
  m.impl("paged_attention", TORCH_BOX(&steer::paged_attention_op));
  m.impl("forward", TORCH_BOX(&steer::forward_op));
  m.impl("logits", TORCH_BOX(&steer::logits_op));
  m.impl("guided_sample", TORCH_BOX(&steer::guided_sample_op));
}

#ifdef STEER_CUDA
STABLE_TORCH_LIBRARY_IMPL(steer_engine, CUDA, m) {
  m.impl("guided_sample_cuda", TORCH_BOX(&steer::guided_sample_cuda_op));
}
#endif

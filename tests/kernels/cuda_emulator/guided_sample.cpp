// The sampler's kernel on the CPU, for ctypes: any number of threads, blocks and items.
#include <cooperative_groups.h>

#include "cuda/guided_sample.cuh"

namespace {

using namespace steer;

template <class Tokens, class Group>
std::string run_rows(const GuidedSampleLaunch& launch, int num_blocks, int num_threads,
                     uint64_t order) {
  for (int64_t seq = 0; seq < launch.args.num_seqs; ++seq) {
    const std::string error = emulator::run_cluster(
        num_blocks, num_threads, sizeof(Shared), static_cast<int>(seq) * num_blocks,
        order == 0 ? 0 : order + seq, [&](emulator::Block& block) {
          sample_row<Tokens>(launch, Group{}, *reinterpret_cast<Shared*>(block.shared.data()));
        });
    if (!error.empty()) return "row " + std::to_string(seq) + ": " + error;
  }
  return "";
}

template <class Group>
std::string run_items(const GuidedSampleLaunch& launch, int num_items, int num_blocks,
                      int num_threads, uint64_t order) {
  switch (num_items) {
    case 0:
      return run_rows<InMemory, Group>(launch, num_blocks, num_threads, order);
    case 1:
      return run_rows<InRegisters<1>, Group>(launch, num_blocks, num_threads, order);
    case 8:
      return run_rows<InRegisters<8>, Group>(launch, num_blocks, num_threads, order);
    case 32:
      return run_rows<InRegisters<32>, Group>(launch, num_blocks, num_threads, order);
    default:
      return "no such number of items is compiled";
  }
}

}  // namespace

// num_items: tokens per thread in registers; 0: in scratch. num_blocks: per cluster; 0: one block
// without a cluster. Returns what went wrong, or an empty text.
extern "C" const char* emulate_guided_sample(
    const void* logits, int64_t pass_stride, int64_t seq_stride, const float* weights,
    const float* inv_temperature, const bool* greedy, const float* log_alpha, const int32_t* top_k,
    const int64_t* top_p_fixed, const int64_t* seed, const int64_t* stream_ids,
    const int32_t* steps, int64_t* token_ids, float* logprobs, int32_t* status, int32_t* num_kept,
    int64_t* total_mass, float* x, int64_t num_passes, int64_t num_seqs, int64_t vocab_size,
    bool is_bf16, int num_items, int num_blocks, int num_threads, uint64_t order) {
  GuidedSampleLaunch launch{};
  launch.args = {.logits = logits,
                 .pass_stride = pass_stride,
                 .seq_stride = seq_stride,
                 .weights = weights,
                 .inv_temperature = inv_temperature,
                 .greedy = greedy,
                 .log_alpha = log_alpha,
                 .top_k = top_k,
                 .top_p_fixed = top_p_fixed,
                 .seed = 0,
                 .stream_ids = stream_ids,
                 .steps = steps,
                 .token_ids = token_ids,
                 .logprobs = logprobs,
                 .status = status,
                 .num_kept = num_kept,
                 .total_mass = total_mass,
                 .num_passes = num_passes,
                 .num_seqs = num_seqs,
                 .vocab_size = vocab_size,
                 .is_bf16 = is_bf16};
  launch.seed = seed;
  launch.x = num_items == 0 ? x : nullptr;
  static std::string error;
  error = num_blocks == 0 ? run_items<OneBlock>(launch, num_items, 1, num_threads, order)
                          : run_items<Cluster>(launch, num_items, num_blocks, num_threads, order);
  return error.c_str();
}

// Steps 1 and 2 of the sampler: x of every token, from the passes' logits, and the cut by alpha.
//
//   x_v = (w_d*l_d[v] + w_b*l_b[v] + w_n*l_n[v]) * (1/T)
//
// A cluster owns one sequence's logits in all passes, of which a thread reads those of its own
// tokens: each once, and the domain's twice more where alpha > 0.
#pragma once

#include "cuda/tokens.cuh"

namespace steer {

constexpr uint32_t kStatusNan = 1, kStatusEmpty = 2, kStatusInf = 4;
constexpr float kMaxLogit = 3e38f;
constexpr float kLowestFinite = -3.402823466e38f;

__device__ inline float to_float(float logit) { return logit; }
__device__ inline float to_float(uint16_t bf16) {
  return __uint_as_float(static_cast<uint32_t>(bf16) << 16);
}

__device__ inline bool is_finite(float x) { return fabsf(x) < kInfinity; }

// A sequence's arguments and outputs.
struct RowArgs {
  const GuidedSampleArgs& a;
  int64_t seq;

  __device__ int64_t num_passes() const { return a.num_passes; }
  __device__ float weight(int64_t pass) const { return a.weights[pass * a.num_seqs + seq]; }
  // Clamped: a wrong value must not lead out of the digits.
  __device__ uint32_t top_k() const { return static_cast<uint32_t>(max(a.top_k[seq], 1)); }
  __device__ uint64_t top_p_fixed() const {
    return static_cast<uint64_t>(min(max(a.top_p_fixed[seq], int64_t{1}), int64_t{1} << 32));
  }
  // f(logits) with the pass's logits as a pointer to their type.
  template <class F>
  __device__ void with_logits(int64_t pass, F f) const {
    const int64_t offset = pass * a.pass_stride + seq * a.seq_stride;
    if (a.is_bf16) {
      f(static_cast<const uint16_t*>(a.logits) + offset);
    } else {
      f(static_cast<const float*>(a.logits) + offset);
    }
  }
  __device__ void write_token(int token, float logprob) const {
    a.token_ids[seq] = token;
    a.logprobs[seq] = logprob;
  }
  __device__ void write_nucleus(uint32_t status, Sum kept) const {
    a.status[seq] = static_cast<int32_t>(status);
    a.num_kept[seq] = static_cast<int32_t>(kept.count);
    a.total_mass[seq] = static_cast<int64_t>(kept.mass);
  }
};

// Step 1: x = the weighted sum of the logits / T. A NaN becomes -inf; kStatus gets the status bits.
template <class Tokens>
__device__ void combine(const RowArgs& row, Tokens& tokens, Shared& shared) {
  tokens.update([](float, int) { return 0.0f; });
  for (int64_t pass = 0; pass < row.num_passes(); ++pass) {
    const float weight = row.weight(pass);
    if (weight == 0.0f) continue;  // not run: its logits may hold anything
    row.with_logits(pass, [&](const auto* logits) {
      tokens.update([&](float x, int index) {
        return __fadd_rn(x, __fmul_rn(to_float(logits[index]), weight));
      });
    });
  }
  const float inv_temperature = row.a.inv_temperature[row.seq];
  uint32_t status = 0;
  tokens.update([&](float x, int) {
    x = __fadd_rn(__fmul_rn(x, inv_temperature), 0.0f);  // -0 becomes 0: they are equal
    if (x != x) status |= kStatusNan;
    if (x > kMaxLogit) status |= kStatusInf;
    return x != x ? -kInfinity : fminf(x, kMaxLogit);
  });
  post_or(shared, kStatus, status);
}

// Step 2: cuts every token whose domain logit is not at least the highest + ln(alpha).
template <class Group, class Tokens>
__device__ void cut_implausible(const Group& group, const RowArgs& row, Tokens& tokens,
                                Shared& shared) {
  const float log_alpha = row.a.log_alpha[row.seq];
  if (!is_finite(log_alpha)) return;  // off, the same for the whole row
  float highest = -kInfinity;
  row.with_logits(0, [&](const auto* domain) {
    tokens.update([&](float x, int index) {
      highest = fmaxf(highest, to_float(domain[index]));  // drops a NaN
      return x;
    });
  });
  post_max(shared, kDomainMax, order_key(__fadd_rn(highest, 0.0f)));
  group.sync();
  const float lowest = __fadd_rn(key_value(collect_max(group, shared, kDomainMax)), log_alpha);
  row.with_logits(0, [&](const auto* domain) {
    tokens.update(
        [&](float x, int index) { return to_float(domain[index]) >= lowest ? x : -kInfinity; });
  });
}

template <class Group, class Tokens>
__device__ float find_max(const Group& group, const Tokens& tokens, Shared& shared, Slot slot) {
  float highest = -kInfinity;
  tokens.visit([&](float x, int) { highest = fmaxf(highest, x); });
  post_max(shared, slot, order_key(highest));
  group.sync();
  return key_value(collect_max(group, shared, slot));
}

// The lowest index whose x is x_max.
template <class Group, class Tokens>
__device__ int find_first(const Group& group, const Tokens& tokens, float x_max, Shared& shared,
                          Slot slot) {
  uint32_t reversed = 0;
  tokens.visit([&](float x, int index) {
    if (x == x_max) reversed = max(reversed, static_cast<uint32_t>(kMaxVocabSize - 1 - index));
  });
  post_max(shared, slot, reversed);
  group.sync();
  return static_cast<int>(kMaxVocabSize - 1 - collect_max(group, shared, slot));
}

// For a row with nothing left: the first of the highest finite domain logits.
template <class Group, class Tokens>
__device__ int find_fallback(const Group& group, const RowArgs& row, Tokens& tokens,
                             Shared& shared) {
  row.with_logits(0, [&](const auto* domain) {
    tokens.update([&](float, int index) {
      const float logit = __fadd_rn(to_float(domain[index]), 0.0f);
      return is_finite(logit) ? logit : kLowestFinite;
    });
  });
  const float highest = find_max(group, tokens, shared, kFallbackMax);
  return find_first(group, tokens, highest, shared, kFallbackFirst);
}

}  // namespace steer

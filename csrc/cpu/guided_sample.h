// One token per sequence from the combined logits of its passes, bit for bit as
// kernels/reference/guided_sample.py defines it (the numbered steps are that file's).
//
// No sort: masses are integers, so their sum over any part of the vocabulary is exact, and tokens
// too light to reach the nucleus are dropped before the few that are left are searched for its
// edge. Every fp32 multiplication and addition below rounds by itself; none may become fma.
#pragma once

namespace steer::STEER_ISA {

constexpr int32_t kStatusNan = 1, kStatusEmpty = 2, kStatusInf = 4;
constexpr float kMaxLogit = 3e38f;
// Below 2**-41 of the top token a mass rounds to 0.
constexpr float kLowestExponent = -42.0f;
// The masses of 1024 tokens are added up together: at most 2**50, exact in fp64.
constexpr int64_t kMassBlock = 1024;

// One sequence's input.
template <class T>
struct Row {
  const T* pass_logits[3];  // those of weight 0 are left out
  float weights[3];
  int num_passes;
  const T* domain;
  float inv_temperature;
  float lowest_domain;  // tokens whose domain logit is not >= this are cut
  bool has_cut;
  int64_t vocab_size;
};

// What is drawn from: x is [vocab_size], padded with -inf to a multiple of 16.
struct Combined {
  float* x;
  float x_max;
  int32_t status;
};

struct Draw {
  int64_t token;
  uint64_t mass, total;
  int32_t num_kept;
};

template <class T>
inline float max_but_nan(const T* logits, int64_t size) {
  F16 highest = splat(kMinusInf);
  for (int64_t v = 0; v < size; v += kLanes) {
    highest = max(load(logits + v, size - v, kMinusInf), highest);  // a NaN on the left is dropped
  }
  return maximum(highest);
}

template <class T>
inline Row<T> read_row(const GuidedSampleArgs& a, int64_t seq) {
  const T* logits = static_cast<const T*>(a.logits) + seq * a.seq_stride;
  Row<T> row{};
  row.domain = logits;
  row.inv_temperature = a.inv_temperature[seq];
  row.vocab_size = a.vocab_size;
  for (int64_t pass = 0; pass < a.num_passes; ++pass) {
    const float weight = a.weights[pass * a.num_seqs + seq];
    if (weight == 0.0f) continue;  // not run: its logits may hold anything
    row.pass_logits[row.num_passes] = logits + pass * a.pass_stride;
    row.weights[row.num_passes++] = weight;
  }
  row.has_cut = std::isfinite(a.log_alpha[seq]);
  if (row.has_cut) row.lowest_domain = max_but_nan(logits, a.vocab_size) + a.log_alpha[seq];
  return row;
}

// Steps 1 and 2: combine and mask.
template <class T>
inline Combined combine(const Row<T>& row, float* x_out) {
  const F16 inv_temperature = splat(row.inv_temperature);
  F16 highest = splat(kMinusInf);
  Mask is_nan = greater(highest, highest), is_inf = is_nan;  // none
  for (int64_t v = 0; v < row.vocab_size; v += kLanes) {
    const int64_t n = row.vocab_size - v;
    F16 x = splat(0.0f);
    for (int pass = 0; pass < row.num_passes; ++pass) {
      x = x + load(row.pass_logits[pass] + v, n) * splat(row.weights[pass]);
    }
    x = x * inv_temperature + splat(0.0f);  // -0 becomes 0, which order_key would tell apart
    if (n < kLanes) {
      store(x_out + v, x);
      x = load(x_out + v, n, kMinusInf);
    }
    const Mask nan_here = not_greater_equal(x, x);
    is_nan = is_nan | nan_here;
    is_inf = is_inf | greater(x, splat(kMaxLogit));
    x = select(nan_here, splat(kMinusInf), min(x, splat(kMaxLogit)));
    if (row.has_cut) {
      const Mask cut = not_greater_equal(load(row.domain + v, n), splat(row.lowest_domain));
      x = select(cut, splat(kMinusInf), x);
    }
    store(x_out + v, x);
    highest = max(x, highest);
  }
  return {x_out, maximum(highest),
          (bits(is_nan) ? kStatusNan : 0) | (bits(is_inf) ? kStatusInf : 0)};
}

inline F16 exponent(F16 x, float x_max) { return (x - splat(x_max)) * splat(kLog2E); }

// Step 3: floor(2**t * 2**40 + 0.5), 0 where t <= -42 or NaN.
inline F16 exp2_mass(F16 t) {
  const Mask usable = greater(t, splat(kLowestExponent));
  t = select(usable, t, splat(0.0f));
  const F16 n = round_to_even(t);
  const F16 mass = exp2_of_fraction(t - n) * power_of_two(n + splat(40.0f)) + splat(0.5f);
  return select(usable, truncate(mass), splat(0.0f));
}

// The mass of each block of kMassBlock tokens, and the number of tokens that have one.
inline int32_t sum_masses(const Combined& c, int64_t vocab_size, uint64_t* block_masses) {
  int32_t num_kept = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += kMassBlock) {
    ExactSum block;
    const int64_t end = std::min(begin + kMassBlock, vocab_size);
    for (int64_t v = begin; v < end; v += kLanes) {
      const F16 mass = exp2_mass(exponent(load(c.x + v), c.x_max));
      block.add(mass);
      num_kept += std::popcount(bits(greater(mass, splat(0.0f))));
    }
    block_masses[begin / kMassBlock] = block.total();
  }
  return num_kept;
}

// The tokens with exponent > lowest, which are a prefix of the order: the exponent ascends with x.
inline void collect(const Combined& c, int64_t vocab_size, float lowest, TokenList& list) {
  list.size = 0;
  for (int64_t v = 0; v < vocab_size; v += kLanes) {
    const F16 t = exponent(load(c.x + v), c.x_max);
    for (uint32_t left = bits(greater(t, splat(lowest))); left != 0; left &= left - 1) {
      const int64_t token = v + std::countr_zero(left);
      list.x[list.size] = c.x[token];
      list.index[list.size++] = static_cast<int32_t>(token);
    }
  }
  for (int64_t i = 0; i < list.size; i += kLanes) {
    store(list.mass + i, exp2_mass(exponent(load(list.x + i, list.size - i), c.x_max)));
  }
}

// max(1, ceil(total * top_p_fixed / 2**32)); total < 2**56, top_p_fixed <= 2**32.
inline uint64_t mass_target(uint64_t total, uint64_t top_p_fixed) {
  const uint64_t low = (total & 0xffffffffu) * top_p_fixed + 0xffffffffu;
  return std::max<uint64_t>(1, (total >> 32) * top_p_fixed + (low >> 32));
}

// Tokens whose exponent is at most this need not be searched. Their masses are at most
// (total - target) / vocab_size each, so at most total - target together: the others, which come
// first in the order, reach the target without them. The 0.01 covers the rounding of the masses.
inline float lowest_useful_exponent(uint64_t total, uint64_t target, int64_t vocab_size) {
  const uint64_t dispensable = (total - target) / static_cast<uint64_t>(vocab_size);
  if (dispensable == 0) return kLowestExponent;
  const float exponent = std::log2(static_cast<float>(dispensable)) - 40.01f;
  return std::max(kLowestExponent, exponent);
}

inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

// Step 6: the first position of the masses whose running sum exceeds `threshold`.
inline int64_t first_above(const float* masses, uint64_t threshold) {
  uint64_t running = 0;
  for (int64_t i = 0;; ++i) {
    running += static_cast<uint64_t>(masses[i]);
    if (running > threshold) return i;
  }
}

// From all tokens, where neither top-k nor top-p cuts.
inline Draw draw_from_all(const Combined& c, int64_t vocab_size, uint64_t random,
                          const uint64_t* block_masses, uint64_t total, int32_t num_kept) {
  uint64_t threshold = multiply_high(random, total);
  int64_t block = 0;
  while (threshold >= block_masses[block]) threshold -= block_masses[block++];
  float masses[kMassBlock];
  const int64_t size = std::min(kMassBlock, vocab_size - block * kMassBlock);
  for (int64_t i = 0; i < size; i += kLanes) {
    store(masses + i, exp2_mass(exponent(load(c.x + block * kMassBlock + i), c.x_max)));
  }
  const int64_t i = first_above(masses, threshold);
  return {block * kMassBlock + i, static_cast<uint64_t>(masses[i]), total, num_kept};
}

inline Draw draw_from_list(const TokenList& list, uint64_t random) {
  const uint64_t total = total_mass(list);
  const int64_t i = first_above(list.mass, multiply_high(random, total));
  const auto num_kept =
      std::count_if(list.mass, list.mass + list.size, [](float m) { return m > 0; });
  return {list.index[i], static_cast<uint64_t>(list.mass[i]), total,
          static_cast<int32_t>(num_kept)};
}

// Steps 3 to 6. list: room for vocab_size tokens, padded to 16; members: [vocab_size].
inline Draw draw_token(const GuidedSampleArgs& a, int64_t seq, const Combined& c, TokenList list,
                       int32_t* members, uint64_t* block_masses) {
  const uint64_t random = random_bits(a.seed, a.stream_ids[seq], a.steps[seq], kStreamTokens);
  // prepare_parameters keeps both in range; a wrong value must not lead out of the buffers.
  const uint64_t top_p = std::clamp<int64_t>(a.top_p_fixed[seq], 1, int64_t{1} << 32);
  const int64_t top_k = std::max(a.top_k[seq], 1);
  if (top_k < a.vocab_size) {
    collect(c, a.vocab_size, kLowestExponent, list);
    keep_first(list, top_k, members);
    const uint64_t total = total_mass(list), target = mass_target(total, top_p);
    if (target < total) keep_mass(list, target, members);
    return draw_from_list(list, random);
  }
  const int32_t num_kept = sum_masses(c, a.vocab_size, block_masses);
  uint64_t total = 0;
  for (int64_t i = 0; i * kMassBlock < a.vocab_size; ++i) total += block_masses[i];
  const uint64_t target = mass_target(total, top_p);
  if (target == total) {
    return draw_from_all(c, a.vocab_size, random, block_masses, total, num_kept);
  }
  collect(c, a.vocab_size, lowest_useful_exponent(total, target, a.vocab_size), list);
  keep_mass(list, target, members);
  return draw_from_list(list, random);
}

// The lowest index of the largest finite domain logit, for a row with nothing left.
template <class T>
inline int64_t fallback_token(const T* domain, int64_t vocab_size) {
  float highest = std::numeric_limits<float>::lowest();
  int64_t token = 0;
  for (int64_t v = 0; v < vocab_size; ++v) {
    const float logit = to_float(domain[v]);
    if (std::isfinite(logit) && logit > highest) {
      highest = logit;
      token = v;
    }
  }
  return token;
}

template <class T>
inline void guided_sample_row(const GuidedSampleArgs& a, int64_t seq) {
  const int64_t padded = round_up(a.vocab_size, kLanes);
  const int64_t num_blocks = (a.vocab_size + kMassBlock - 1) / kMassBlock;
  Scratch scratch(5 * padded * 4 + (num_blocks + 8) * 8);
  float* x = scratch.take<float>(padded);
  const TokenList list{scratch.take<float>(padded), scratch.take<float>(padded),
                       scratch.take<int32_t>(padded), 0};
  int32_t* members = scratch.take<int32_t>(padded);
  uint64_t* block_masses = scratch.take<uint64_t>(num_blocks);

  const Combined c = combine(read_row<T>(a, seq), x);
  a.status[seq] = c.status;
  a.logprobs[seq] = 0.0f;
  if (c.x_max == kMinusInf) {
    a.token_ids[seq] =
        fallback_token(static_cast<const T*>(a.logits) + seq * a.seq_stride, a.vocab_size);
    a.status[seq] |= kStatusEmpty;
    a.num_kept[seq] = 0;
    a.total_mass[seq] = 0;
    return;
  }
  const Draw draw = draw_token(a, seq, c, list, members, block_masses);
  a.num_kept[seq] = draw.num_kept;
  a.total_mass[seq] = static_cast<int64_t>(draw.total);
  if (a.greedy[seq]) {
    a.token_ids[seq] = std::find(x, x + a.vocab_size, c.x_max) - x;
  } else {
    const double share = static_cast<double>(draw.mass) / static_cast<double>(draw.total);
    a.token_ids[seq] = draw.token;
    a.logprobs[seq] = static_cast<float>(std::log(share));
  }
}

inline void guided_sample(const GuidedSampleArgs& args, int64_t begin, int64_t end) {
  for (int64_t seq = begin; seq < end; ++seq) {
    args.is_bf16 ? guided_sample_row<bf16>(args, seq) : guided_sample_row<float>(args, seq);
  }
}

}  // namespace steer::STEER_ISA

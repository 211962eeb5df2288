// One token per sequence from the combined logits of its passes, bit for bit as
// kernels/reference/guided_sample.py defines it (the numbered steps are that file's).
//
// No sort: masses are integers, so their sum over any part of the vocabulary is exact. A histogram
// of masses finds the bin that holds the nucleus' edge; only that bin's tokens are listed and
// searched, and what is cut of them becomes -inf, so that the nucleus is all x from its lowest on.
// The largest x of every 16th token of a block bounds what can be skipped. Every fp32
// multiplication and addition below rounds by itself; none may become fma.
#pragma once

namespace steer::STEER_ISA {

constexpr int32_t kStatusNan = 1, kStatusEmpty = 2, kStatusInf = 4;
constexpr float kMaxLogit = 3e38f;
// Below 2**-41 of the top token a mass rounds to 0.
constexpr float kLowestExponent = -42.0f;
// The masses of a block are added up together: at most 2**49, exact in fp64.
constexpr int64_t kBlock = 512;

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

// What is drawn from.
struct Combined {
  float* x;          // [vocab_size], padded with -inf to a multiple of 16
  float* group_max;  // [num_blocks, 16]: the largest x of every 16th token of a block
  int64_t vocab_size, num_blocks;
  float x_max;
  int32_t status;

  int64_t begin(int64_t block) const { return block * kBlock; }
  int64_t end(int64_t block) const { return std::min(begin(block) + kBlock, vocab_size); }
  float max_of_block(int64_t block) const { return maximum(load(group_max + block * kLanes)); }
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
template <int kNumPasses, class T>
inline void combine(const Row<T>& row, Combined& c) {
  F16 weights[kNumPasses + 1];
  for (int pass = 0; pass < kNumPasses; ++pass) weights[pass] = splat(row.weights[pass]);
  const F16 inv_temperature = splat(row.inv_temperature);
  F16 row_max = splat(kMinusInf);
  Mask is_nan = greater(row_max, row_max), is_inf = is_nan;  // none
  for (int64_t block = 0; block < c.num_blocks; ++block) {
    F16 block_max = splat(kMinusInf);
    for (int64_t v = c.begin(block); v < c.end(block); v += kLanes) {
      const int64_t n = c.vocab_size - v;
      F16 x = splat(0.0f);
      for (int pass = 0; pass < kNumPasses; ++pass) {
        x = x + load(row.pass_logits[pass] + v, n) * weights[pass];
      }
      x = x * inv_temperature + splat(0.0f);  // -0 becomes 0, which order_key would tell apart
      if (n < kLanes) {
        store(c.x + v, x);
        x = load(c.x + v, n, kMinusInf);
      }
      is_nan = is_nan | not_greater_equal(x, x);
      is_inf = is_inf | greater(x, splat(kMaxLogit));
      x = min(max(x, splat(kMinusInf)), splat(kMaxLogit));  // NaN becomes -inf
      if (row.has_cut) {
        const Mask cut = not_greater_equal(load(row.domain + v, n), splat(row.lowest_domain));
        x = select(cut, splat(kMinusInf), x);
      }
      store(c.x + v, x);
      block_max = max(x, block_max);
    }
    store(c.group_max + block * kLanes, block_max);
    row_max = max(block_max, row_max);
  }
  c.x_max = maximum(row_max);
  c.status = (bits(is_nan) ? kStatusNan : 0) | (bits(is_inf) ? kStatusInf : 0);
}

inline F16 exponent(F16 x, float x_max) { return (x - splat(x_max)) * splat(kLog2E); }

// Step 3: floor(2**t * 2**40 + 0.5), which is 0 from kLowestExponent down; NaN does not occur.
inline F16 exp2_mass(F16 t) {
  t = max(t, splat(kLowestExponent));
  const F16 n = round_to_even(t);
  return truncate(exp2_of_fraction(t - n) * power_of_two(n + splat(40.0f)) + splat(0.5f));
}

// max(1, ceil(total * top_p_fixed / 2**32)); total <= 2**60, top_p_fixed <= 2**32.
inline uint64_t mass_target(uint64_t total, uint64_t top_p_fixed) {
  const uint64_t low = (total & 0xffffffffu) * top_p_fixed + 0xffffffffu;
  return std::max<uint64_t>(1, (total >> 32) * top_p_fixed + (low >> 32));
}

// Tokens whose exponent is at most this need not be searched. Their masses are at most
// (total - target) / vocab_size each, so at most total - target together: the others, which come
// first in the order, reach the target without them. The total is not known yet; that of some of
// the tokens, the groups' largest, is a lower bound. The 0.01 covers the rounding of the masses.
inline float lowest_useful_exponent(const Combined& c, uint64_t top_p_fixed) {
  uint64_t total = 0;
  for (int64_t block = 0; block < c.num_blocks; ++block) {
    ExactSum sum;
    sum.add(exp2_mass(exponent(load(c.group_max + block * kLanes), c.x_max)));
    total += sum.total();
  }
  const uint64_t dispensable =
      (total - mass_target(total, top_p_fixed)) / static_cast<uint64_t>(c.vocab_size);
  if (dispensable == 0) return kLowestExponent;
  const float exponent = std::log2(static_cast<float>(dispensable)) - 40.01f;
  return std::max(kLowestExponent, exponent);
}

// Masses summed by exponent: bins of equal width from 0 down to `lowest`, the last of which also
// holds everything below. Neighbouring tokens go to different copies: adding twice in a row to one
// sum would wait for the first addition.
class MassHistogram {
 public:
  static constexpr int kNumBins = 512, kNumCopies = 4;

  explicit MassHistogram(float lowest) : bins_per_exponent_((kNumBins - 1) / lowest) {}

  // A fraction; its whole part is the bin. Falls as x ascends.
  F16 bin(F16 t) const {
    return min(t * splat(bins_per_exponent_), splat(static_cast<float>(kNumBins - 1)));
  }

  void add(F16 t, F16 mass) {
    int32_t bins[kLanes];
    uint64_t masses[kLanes];
    store_whole(bins, bin(t));
    store_whole(masses, mass);
    for (int i = 0; i < kLanes; ++i) sums_[i % kNumCopies][bins[i]] += masses[i];
  }

  uint64_t mass(int bin) const {
    return sums_[0][bin] + sums_[1][bin] + sums_[2][bin] + sums_[3][bin];
  }

  uint64_t total() const {
    uint64_t total = 0;
    for (int bin = 0; bin < kNumBins; ++bin) total += mass(bin);
    return total;
  }

 private:
  float bins_per_exponent_;  // negative
  // (8 more: copies 4096 bytes apart would share cache sets and confuse the load-store unit.)
  uint64_t sums_[kNumCopies][kNumBins + 8] = {};
};

// The mass of all tokens. The histogram gets those with exponent > lowest, and some others.
inline uint64_t sum_by_exponent(const Combined& c, float lowest, MassHistogram& histogram) {
  uint64_t others = 0;
  for (int64_t block = 0; block < c.num_blocks; ++block) {
    ExactSum sum;
    for (int64_t v = c.begin(block); v < c.end(block); v += kLanes) {
      const F16 t = exponent(load(c.x + v), c.x_max);
      const F16 mass = exp2_mass(t);
      bits(greater(t, splat(lowest))) ? histogram.add(t, mass) : sum.add(mass);
    }
    others += sum.total();
  }
  return others + histogram.total();
}

// The smallest x whose bin is at most `bin`, by bisection on the order of floats.
inline float lowest_x_of(int bin, const MassHistogram& histogram, float x_max) {
  uint32_t low = order_key(kMinusInf), high = order_key(x_max);  // x_max is in bin 0
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    const F16 t = exponent(splat(from_order_key(middle)), x_max);
    const bool is_in = bits(greater(splat(static_cast<float>(bin + 1)), histogram.bin(t))) != 0;
    is_in ? high = middle : low = middle + 1;
  }
  return from_order_key(high);
}

// Lists the tokens with lowest <= x < end, and returns how many have x >= end.
inline int32_t collect(const Combined& c, float lowest, float end, TokenList& list) {
  constexpr uint32_t kAll = 0xffff;
  list.size = 0;
  F16 num_above = splat(0.0f);
  for (int64_t block = 0; block < c.num_blocks; ++block) {
    if (c.max_of_block(block) < lowest) continue;
    for (int64_t v = c.begin(block); v < c.end(block); v += kLanes) {
      const F16 x = load(c.x + v);
      const Mask is_below_end = not_greater_equal(x, splat(end));
      num_above = num_above + select(is_below_end, splat(0.0f), splat(1.0f));
      uint32_t left = bits(is_below_end) & (bits(not_greater_equal(x, splat(lowest))) ^ kAll);
      for (; left != 0; left &= left - 1) {
        const int64_t token = v + std::countr_zero(left);
        list.x[list.size] = c.x[token];
        list.index[list.size++] = static_cast<int32_t>(token);
      }
    }
  }
  for (int64_t i = 0; i < list.size; i += kLanes) {
    store(list.mass + i, exp2_mass(exponent(load(list.x + i, list.size - i), c.x_max)));
  }
  return static_cast<int32_t>(sum(num_above));
}

// Not above the count-th largest x: the count-th largest of the groups' largest.
inline float bound_of_largest(const Combined& c, int64_t count, float* scratch) {
  const int64_t num_groups = c.num_blocks * kLanes;
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  if (count > num_groups) return kLowest;
  std::copy_n(c.group_max, num_groups, scratch);
  float* bound = scratch + count - 1;
  std::nth_element(scratch, bound, scratch + num_groups, [](float a, float b) { return a > b; });
  return std::max(*bound, kLowest);
}

inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline F16 kept_mass(const Combined& c, F16 x, float lowest) {
  return select(not_greater_equal(x, splat(lowest)), splat(0.0f), exp2_mass(exponent(x, c.x_max)));
}

inline uint64_t kept_mass_of_block(const Combined& c, int64_t block, float lowest) {
  if (c.max_of_block(block) < lowest) return 0;
  ExactSum sum;
  for (int64_t v = c.begin(block); v < c.end(block); v += kLanes) {
    const F16 x = load(c.x + v);
    const bool has_kept = bits(not_greater_equal(x, splat(lowest))) != 0xffff;
    if (has_kept) sum.add(kept_mass(c, x, lowest));
  }
  return sum.total();
}

// Step 6: from the tokens with x >= lowest, whose masses add up to `total`. Blocks are added up
// from the nearer end.
template <class MassOfBlock>
inline Draw draw_from(const Combined& c, float lowest, uint64_t total, uint64_t random,
                      MassOfBlock mass_of_block) {
  uint64_t before = multiply_high(random, total);  // mass to leave in front
  int64_t block = 0;
  uint64_t mass;
  if (before < total / 2) {
    while ((mass = mass_of_block(block)) <= before) {
      before -= mass;
      ++block;
    }
  } else {
    uint64_t behind = total - before;  // at least 1
    block = c.num_blocks - 1;
    while ((mass = mass_of_block(block)) < behind) {
      behind -= mass;
      --block;
    }
    before = mass - behind;
  }
  for (int64_t v = c.begin(block);; v += kLanes) {
    float masses[kLanes];
    store(masses, kept_mass(c, load(c.x + v), lowest));
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t mass = static_cast<uint64_t>(masses[i]);
      if (mass > before) return {v + i, mass, total, 0};
      before -= mass;
    }
  }
}

inline Draw draw_from(const Combined& c, float lowest, uint64_t total, uint64_t random) {
  return draw_from(c, lowest, total, random,
                   [&](int64_t block) { return kept_mass_of_block(c, block, lowest); });
}

// Steps 3 to 6 where neither top-k nor top-p cuts.
inline Draw draw_from_all(const Combined& c, uint64_t random, uint64_t* block_masses) {
  uint64_t total = 0;
  F16 num_kept = splat(0.0f);
  for (int64_t block = 0; block < c.num_blocks; ++block) {
    ExactSum sum;
    for (int64_t v = c.begin(block); v < c.end(block); v += kLanes) {
      const F16 mass = exp2_mass(exponent(load(c.x + v), c.x_max));
      sum.add(mass);
      num_kept = num_kept + select(greater(mass, splat(0.0f)), splat(1.0f), splat(0.0f));
    }
    total += block_masses[block] = sum.total();
  }
  Draw draw =
      draw_from(c, kMinusInf, total, random, [&](int64_t block) { return block_masses[block]; });
  draw.num_kept = static_cast<int32_t>(sum(num_kept));
  return draw;
}

// Steps 3 to 6 with top-p alone: the histogram finds the bin that holds the nucleus' edge.
inline Draw draw_from_nucleus(const Combined& c, uint64_t top_p_fixed, uint64_t random,
                              TokenList& list, int32_t* members) {
  const float lowest_exponent = lowest_useful_exponent(c, top_p_fixed);
  MassHistogram histogram(lowest_exponent);
  const uint64_t total = sum_by_exponent(c, lowest_exponent, histogram);
  const uint64_t target = mass_target(total, top_p_fixed);
  uint64_t above = 0;
  int bin = 0;
  while (bin < histogram.kNumBins - 1 && above + histogram.mass(bin) < target) {
    above += histogram.mass(bin++);
  }
  const float lowest_in_bin =
      std::max(lowest_x_of(bin, histogram, c.x_max), std::numeric_limits<float>::lowest());
  const float end_of_bin = bin == 0 ? -kMinusInf : lowest_x_of(bin - 1, histogram, c.x_max);
  const int32_t num_above = collect(c, lowest_in_bin, end_of_bin, list);
  const float lowest = keep_mass(list, target - above, members, c.x);
  Draw draw = draw_from(c, lowest, above + total_mass(list), random);
  draw.num_kept = num_above + static_cast<int32_t>(list.size);
  return draw;
}

// Steps 3 to 6 with top-k.
inline Draw draw_from_first(const Combined& c, int64_t top_k, uint64_t top_p_fixed, uint64_t random,
                            TokenList& list, int32_t* members) {
  collect(c, bound_of_largest(c, top_k, list.mass), -kMinusInf, list);
  float lowest = keep_first(list, top_k, members, c.x);
  const uint64_t total = total_mass(list), target = mass_target(total, top_p_fixed);
  if (target < total) lowest = keep_mass(list, target, members, c.x);
  Draw draw = draw_from(c, lowest, total_mass(list), random);
  draw.num_kept = static_cast<int32_t>(
      std::count_if(list.mass, list.mass + list.size, [](float m) { return m > 0; }));
  return draw;
}

// list: room for vocab_size tokens, padded to 16; members: [vocab_size].
inline Draw draw_token(const GuidedSampleArgs& a, int64_t seq, const Combined& c, TokenList list,
                       int32_t* members, uint64_t* block_masses) {
  constexpr int64_t kOne = int64_t{1} << 32;
  const uint64_t random = random_bits(a.seed, a.stream_ids[seq], a.steps[seq], kStreamTokens);
  // prepare_parameters keeps both in range; a wrong value must not lead out of the buffers.
  const int64_t top_p = std::clamp<int64_t>(a.top_p_fixed[seq], 1, kOne);
  const int64_t top_k = std::max(a.top_k[seq], 1);
  if (top_k < a.vocab_size) return draw_from_first(c, top_k, top_p, random, list, members);
  if (top_p < kOne) return draw_from_nucleus(c, top_p, random, list, members);
  return draw_from_all(c, random, block_masses);
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
  const int64_t num_blocks = (a.vocab_size + kBlock - 1) / kBlock;
  Scratch scratch(5 * padded * 4 + num_blocks * (kLanes * 4 + 8) + 8 * 64);
  float* x = scratch.take<float>(padded);
  const TokenList list{scratch.take<float>(padded), scratch.take<float>(padded),
                       scratch.take<int32_t>(padded), 0};
  int32_t* members = scratch.take<int32_t>(padded);
  uint64_t* block_masses = scratch.take<uint64_t>(num_blocks);

  Combined c{x, scratch.take<float>(num_blocks * kLanes), a.vocab_size, num_blocks, 0, 0};
  const Row<T> row = read_row<T>(a, seq);
  switch (row.num_passes) {
    case 0:
      combine<0>(row, c);
      break;
    case 1:
      combine<1>(row, c);
      break;
    case 2:
      combine<2>(row, c);
      break;
    default:
      combine<3>(row, c);
  }
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

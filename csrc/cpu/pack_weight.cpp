// packed[n / 16][k / step][n % 16][k % step] = weight[n][k]; step is 2 in bf16, 1 in fp32; padding
// is zero.
#include <cstring>

#include "cpu/bf16.h"
#include "cpu/ops.h"

namespace steer {

namespace {

template <class T>
void pack_group(const PackWeightArgs& a, int64_t group) {
  constexpr int64_t step = sizeof(T) == 2 ? 2 : 1;
  const int64_t group_size = kLanes * round_up(a.in_features, step);
  const T* weight = static_cast<const T*>(a.weight);
  T* packed = static_cast<T*>(a.packed) + group * group_size;
  std::memset(packed, 0, group_size * sizeof(T));
  const int64_t first = group * kLanes;
  const int64_t num_columns = std::min(kLanes, a.out_features - first);
  // k outside, in pieces that keep 16 lines of the weight in L1.
  for (int64_t k_begin = 0; k_begin < a.in_features; k_begin += 64) {
    const int64_t k_end = std::min(k_begin + 64, a.in_features);
    for (int64_t column = 0; column < num_columns; ++column) {
      const T* from = weight + (first + column) * a.in_features;
      for (int64_t k = k_begin; k < k_end; ++k) {
        packed[k / step * step * kLanes + column * step + k % step] = from[k];
      }
    }
  }
}

}  // namespace

void pack_weight(const PackWeightArgs& args, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    args.is_bf16 ? pack_group<bf16>(args, group) : pack_group<float>(args, group);
  }
}

}  // namespace steer

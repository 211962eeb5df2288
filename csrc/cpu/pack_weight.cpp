// packed[n / 16][k / step][n % 16][k % step] = weight[n][k]; step is 2 in bf16, 1 in fp32; padding
// is zero. Int8: packed[n / 16][k][n % 16] = weight[n][k] / scales[n], rounded to nearest even.
#include <cmath>
#include <cstring>
#include <limits>

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

// The largest weight becomes 127; a scale of 0 would make 0 / 0 of a column of zeros.
template <class T>
float int8_scale(const T* weight, int64_t in_features) {
  float largest = 0.0f;
  for (int64_t k = 0; k < in_features; ++k) {
    largest = std::max(largest, std::abs(to_float(weight[k])));
  }
  return std::max(largest / kMaxInt8, std::numeric_limits<float>::min());
}

template <class T>
void pack_int8_group(const PackInt8Args& a, int64_t group) {
  const int64_t group_size = kLanes * round_up(a.in_features, 2);
  int8_t* packed = a.packed + group * group_size;
  std::memset(packed, 0, group_size);
  const int64_t first = group * kLanes;
  const int64_t num_columns = std::min(kLanes, a.out_features - first);
  for (int64_t column = 0; column < num_columns; ++column) {
    const T* from = static_cast<const T*>(a.weight) + (first + column) * a.in_features;
    const float scale = a.scales[first + column] = int8_scale(from, a.in_features);
    for (int64_t k = 0; k < a.in_features; ++k) {
      constexpr float kShift = 12582912.0f;  // 1.5 * 2**23 leaves no bits for a fraction
      const float rounded = (to_float(from[k]) / scale + kShift) - kShift;
      packed[k * kLanes + column] = static_cast<int8_t>(rounded);
    }
  }
}

}  // namespace

void pack_int8_weight(const PackInt8Args& args, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    args.is_bf16 ? pack_int8_group<bf16>(args, group) : pack_int8_group<float>(args, group);
  }
}

void pack_weight(const PackWeightArgs& args, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    args.is_bf16 ? pack_group<bf16>(args, group) : pack_group<float>(args, group);
  }
}

}  // namespace steer

// One growing buffer per thread, kept between calls: a fresh 260 KB buffer would cost more page
// faults (40 us) than the sampler's own work on a row.
#pragma once

#include <cstdint>

namespace steer {

// Hands out the parts of the calling thread's buffer, 64-byte aligned. One Scratch at a time per
// thread.
class Scratch {
 public:
  // num_bytes: of all parts together, each rounded up to 64.
  explicit Scratch(int64_t num_bytes);

  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return part;
  }

 private:
  char* next_;
};

}  // namespace steer

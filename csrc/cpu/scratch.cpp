#include "cpu/scratch.h"

#include <cstddef>
#include <vector>

namespace steer {

namespace {
struct alignas(64) CacheLine {
  char bytes[64];
};
}  // namespace

Scratch::Scratch(int64_t num_bytes) {
  thread_local std::vector<CacheLine> buffer;
  const size_t num_lines = static_cast<size_t>(num_bytes + 63) / 64;
  if (buffer.size() < num_lines) buffer = std::vector<CacheLine>(num_lines);
  next_ = reinterpret_cast<char*>(buffer.data());
}

}  // namespace steer

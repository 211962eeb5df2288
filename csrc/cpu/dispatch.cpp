#include "cpu/dispatch.h"

#ifdef STEER_X86
#include <cpuid.h>
#endif

#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace steer {

namespace portable {
extern const Kernels kernels;
}
#ifdef STEER_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
};

constexpr std::array kLevels = {
    Level{"portable", &portable::kernels},
#ifdef STEER_X86
    Level{"avx2", &avx2::kernels},
    Level{"avx512", &avx512::kernels},
    Level{"avx512_bf16", &avx512_bf16::kernels},
#endif
};

// The highest level that the machine can run.
int highest_level() {
#ifdef STEER_X86
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!has_avx512) return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

// The fastest level. Machines with AMX (Intel since Sapphire Rapids) run vdpbf16ps at a quarter of
// the rate of fp32 multiply-adds (measured: 1.8 and 7.0 per ns), so fp32 arithmetic wins there
// although it does half as much at once.
int fastest_level() {
#ifdef STEER_X86
  unsigned eax, ebx, ecx, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  const bool has_amx_bf16 = edx & (1u << 22);
  if (has_amx_bf16) return std::min(2, highest_level());
#endif
  return highest_level();
}

int level_named(const std::string& name) {
  for (int level = 0; level < static_cast<int>(kLevels.size()); ++level) {
    if (name == kLevels[level].name) return std::min(level, highest_level());
  }
  std::string known;
  for (const Level& level : kLevels) known += std::string(known.empty() ? "" : ", ") + level.name;
  throw std::invalid_argument("STEER_CPU_ISA must be one of " + known + ", got '" + name + "'");
}

// Read at the first use, not when the library is loaded: an exception would end the process there.
std::atomic<int>& current_level() {
  static std::atomic<int> level = [] {
    const char* name = std::getenv("STEER_CPU_ISA");
    return name && *name ? level_named(name) : fastest_level();
  }();
  return level;
}

}  // namespace

const Kernels& kernels() { return *kLevels[current_level()].kernels; }

std::string cpu_isa() { return kLevels[current_level()].name; }

void set_cpu_isa(const std::string& name) { current_level() = level_named(name); }

}  // namespace steer

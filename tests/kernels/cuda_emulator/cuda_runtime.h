// A stand-in for CUDA's header, to run kernels on the CPU: every CUDA thread is a fiber.
//
// It finds errors of logic and indices, missing barriers (run with several orders), barriers that
// not all threads reach, and reads of another block's shared memory after that block has ended. A
// fiber runs from one synchronisation to the next, so it finds no race inside of one step but for
// those around atomics, where fibers may give way. x86-64 only (the switch of stacks).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 32768;

// Where threads wait.
enum class Wait { kNone, kWarp, kBlock, kCluster, kExit };

// A line of the kernel. Threads that meet must come from the same one.
struct Place {
  const char* file = "";
  int line = 0;

  bool operator==(const Place& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
  std::string name() const {
    const char* slash = std::strrchr(file, '/');
    return (slash ? slash + 1 : file) + (":" + std::to_string(line));
  }
};

struct Fiber {
  void* stack_pointer = nullptr;
  int thread = 0, block = 0;
  Wait wait = Wait::kNone;
  Place place;
};

// Threads that have arrived at a barrier.
struct Barrier {
  int size = 0, num_arrived = 0;
  Place place;
  uint64_t generation = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][kWarpSize];  // of this exchange and the one before, which may still be read
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<char> shared;
  int num_running = 0;
};

struct Launch {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  Barrier cluster;
  int num_threads = 0, num_ended = 0, first_block = 0;
  uint64_t random = 0;  // 0: fibers run in order
  std::function<void(Block&)> body;
  std::string error;
};

inline Launch* launch = nullptr;
inline Fiber* self = nullptr;
inline void* scheduler_stack = nullptr;

// Saves the callee-saved registers on the stack, stores its pointer, and goes on with the other.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

inline void to_scheduler() { switch_stack(&self->stack_pointer, scheduler_stack); }

// Ends the launch; the fibers are abandoned where they stand.
[[noreturn]] inline void fail(const std::string& message) {
  launch->error = message;
  to_scheduler();
  std::abort();
}

inline uint64_t next_random() {
  launch->random ^= launch->random << 13;
  launch->random ^= launch->random >> 7;
  launch->random ^= launch->random << 17;
  return launch->random;
}

// With a random order, other threads may run before an atomic operation.
inline void give_way() {
  if (launch->random == 0 || next_random() % 8 != 0) return;
  launch->ready.push_back(self);
  to_scheduler();
}

inline void meet(Barrier& barrier, Wait wait, Place place) {
  if (barrier.num_arrived == 0) barrier.place = place;
  if (!(barrier.place == place)) {
    fail("threads of " + place.name() + " meet threads of " + barrier.place.name());
  }
  self->wait = wait;
  self->place = place;
  if (++barrier.num_arrived < barrier.size) {
    barrier.waiting.push_back(self);
    to_scheduler();
    return;
  }
  barrier.num_arrived = 0;
  ++barrier.generation;
  launch->ready.insert(launch->ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
  self->wait = Wait::kNone;
  give_way();
}

inline Block& own_block() { return launch->blocks[self->block]; }
inline Warp& own_warp() { return own_block().warps[self->thread / kWarpSize]; }
inline int own_lane() { return self->thread % kWarpSize; }

// What the lanes of the warp hand in, to be read by each.
template <class T>
const uint64_t* exchange(unsigned mask, T value, Place place) {
  if (mask != 0xffffffffu) fail("a warp operation with a partial mask");
  Warp& warp = own_warp();
  uint64_t* values = warp.values[warp.barrier.generation % 2];
  values[own_lane()] = 0;
  std::memcpy(&values[own_lane()], &value, sizeof(T));
  meet(warp.barrier, Wait::kWarp, place);
  return values;
}

template <class T>
T as(uint64_t value) {
  T result;
  std::memcpy(&result, &value, sizeof(T));
  return result;
}

inline void fiber_main() {
  Block& block = own_block();
  launch->body(block);
  self->wait = Wait::kExit;
  ++launch->num_ended;
  // Whoever reads the shared memory of a block that has ended shall see it.
  if (--block.num_running == 0) std::fill(block.shared.begin(), block.shared.end(), char(0x5a));
  to_scheduler();
  std::abort();
}

inline void prepare(Fiber& fiber, char* stack) {
  auto* top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // as if fiber_main had been called: aligned to 16, less a return address
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the callee-saved registers
  fiber.stack_pointer = top;
}

inline Fiber* take_ready(size_t& next) {
  std::vector<Fiber*>& ready = launch->ready;
  if (launch->random != 0) {
    std::swap(ready[next_random() % ready.size()], ready.back());
    Fiber* fiber = ready.back();
    ready.pop_back();
    return fiber;
  }
  Fiber* fiber = ready[next++];
  if (next == ready.size()) {
    ready.clear();
    next = 0;
  }
  return fiber;
}

inline std::string describe_stuck() {
  std::string text = "threads wait for others that do not come:";
  int num_named = 0;
  for (const Fiber& fiber : launch->fibers) {
    if (fiber.wait == Wait::kExit || ++num_named > 4) continue;
    const char* names[] = {"nothing", "its warp", "its block", "the cluster", "exit"};
    text += " [block " + std::to_string(fiber.block) + " thread " + std::to_string(fiber.thread) +
            ": " + names[static_cast<int>(fiber.wait)] + ", " + fiber.place.name() + "]";
  }
  return text;
}

// Runs one cluster: `body` once per thread. Returns what went wrong, or "". `order` 0 runs threads
// in order, any other number is the seed of a random order.
inline std::string run_cluster(int num_blocks, int num_threads, size_t shared_bytes,
                               int first_block, uint64_t order, std::function<void(Block&)> body) {
  Launch current;
  static std::vector<char> stacks;
  const size_t num_fibers = static_cast<size_t>(num_blocks) * num_threads;
  if (stacks.size() < num_fibers * kStackBytes + 16) stacks.resize(num_fibers * kStackBytes + 16);
  char* base = stacks.data() + (16 - reinterpret_cast<uintptr_t>(stacks.data()) % 16) % 16;
  current.body = std::move(body);
  current.random = order;
  current.num_threads = num_threads;
  current.first_block = first_block;
  current.cluster.size = static_cast<int>(num_fibers);
  current.blocks.resize(num_blocks);
  current.fibers.resize(num_fibers);
  launch = &current;
  for (int b = 0; b < num_blocks; ++b) {
    Block& block = current.blocks[b];
    block.shared.assign(shared_bytes, char(0xa5));  // not zero: it starts with anything
    block.barrier.size = block.num_running = num_threads;
    block.warps.resize(num_threads / kWarpSize);
    for (Warp& warp : block.warps) warp.barrier.size = kWarpSize;
    for (int t = 0; t < num_threads; ++t) {
      const size_t i = static_cast<size_t>(b) * num_threads + t;
      current.fibers[i].thread = t;
      current.fibers[i].block = b;
      prepare(current.fibers[i], base + i * kStackBytes);
      current.ready.push_back(&current.fibers[i]);
    }
  }
  size_t next = 0;
  while (!current.ready.empty() && current.error.empty()) {
    self = take_ready(next);
    switch_stack(&scheduler_stack, self->stack_pointer);
  }
  if (current.error.empty() && current.num_ended < static_cast<int>(num_fibers)) {
    current.error = describe_stuck();
  }
  launch = nullptr;
  return current.error;
}

}  // namespace emulator

// The kernel's view. Indices are in one dimension.
#define threadIdx (dim3{static_cast<unsigned>(emulator::self->thread)})
#define blockDim (dim3{static_cast<unsigned>(emulator::launch->num_threads)})
#define blockIdx \
  (dim3{static_cast<unsigned>(emulator::launch->first_block + emulator::self->block)})

// As a default argument: the place of the call.
#define EMULATOR_PLACE {__builtin_FILE(), __builtin_LINE()}

using std::max;
using std::min;

inline void __syncthreads(emulator::Place place = EMULATOR_PLACE) {
  emulator::meet(emulator::own_block().barrier, emulator::Wait::kBlock, place);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, emulator::Place place = EMULATOR_PLACE) {
  return emulator::as<T>(emulator::exchange(mask, value, place)[lane % 32]);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, emulator::Place place = EMULATOR_PLACE) {
  const int lane = emulator::own_lane();
  return emulator::as<T>(
      emulator::exchange(mask, value, place)[lane >= delta ? lane - delta : lane]);
}

inline uint32_t __reduce_max_sync(unsigned mask, uint32_t value,
                                  emulator::Place place = EMULATOR_PLACE) {
  const uint64_t* values = emulator::exchange(mask, value, place);
  return static_cast<uint32_t>(*std::max_element(values, values + 32));
}

inline uint32_t __reduce_or_sync(unsigned mask, uint32_t value,
                                 emulator::Place place = EMULATOR_PLACE) {
  const uint64_t* values = emulator::exchange(mask, value, place);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(values[i]);
  return bits;
}

inline uint32_t __reduce_add_sync(unsigned mask, uint32_t value,
                                  emulator::Place place = EMULATOR_PLACE) {
  const uint64_t* values = emulator::exchange(mask, value, place);
  uint32_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += static_cast<uint32_t>(values[i]);
  return sum;
}

inline uint32_t atomicAdd(uint32_t* p, uint32_t value) {
  emulator::give_way();
  const uint32_t before = *p;
  *p += value;
  return before;
}

inline uint32_t atomicMax(uint32_t* p, uint32_t value) {
  emulator::give_way();
  const uint32_t before = *p;
  *p = std::max(before, value);
  return before;
}

inline uint32_t atomicOr(uint32_t* p, uint32_t bits) {
  emulator::give_way();
  const uint32_t before = *p;
  *p |= bits;
  return before;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline int __clzll(uint64_t bits) { return bits == 0 ? 64 : __builtin_clzll(bits); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float __uint_as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// A team of threads that go through the same stages together, without going back to Torch between
// them: a decode step has some hundred stages, and starting threads for each costs more than most.
//
// A stage is a number of independent tasks. Each member takes the next task when it is free, since
// tasks differ in length and a core may be busy with another process; after its last one it waits
// for the others. All members must go through the same stages in the same order.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <thread>

#ifdef STEER_X86
#include <immintrin.h>
#endif

namespace steer {

// What the members of one team share.
struct TeamState {
  alignas(64) std::atomic<int64_t> next_task{0};  // over all stages, see Team::stage
  alignas(64) std::atomic<int64_t> num_arrived{0};
  alignas(64) std::atomic<int64_t> num_members{0};  // 0: not known yet
  std::atomic<bool> has_failed{false};
};

class Team {
 public:
  // Joins the team that divides [0, size) among its members, as the one that got [begin, end).
  // Torch gives each thread the same number of places, but for the last, and perhaps not every
  // thread that it was asked for.
  Team(TeamState& state, int64_t begin, int64_t end, int64_t size) : state_(state) {
    if (begin == 0) state_.num_members = (size + end - 1) / end;
    wait_until([&] { return state_.num_members.load() > 0; });
    num_members_ = state_.num_members;
  }

  int64_t num_members() const { return num_members_; }

  // Runs task(begin, end) for parts of [0, num_tasks), and returns when all members have.
  template <class Task>
  void stage(int64_t num_tasks, const Task& task) {
    if (num_members_ == 1) {
      if (num_tasks > 0) task(0, num_tasks);
      return;
    }
    // Every member asks once in vain, so a stage moves the counter by exactly num_tasks +
    // num_members_ and needs no reset.
    for (int64_t t; (t = state_.next_task.fetch_add(1) - first_task_) < num_tasks;) task(t, t + 1);
    first_task_ += num_tasks + num_members_;
    arrive_and_wait();
  }

  // For a member that leaves because of an exception: the others must not wait for it.
  void fail() { state_.has_failed = true; }

 private:
  void arrive_and_wait() {
    num_to_arrive_ += num_members_;
    state_.num_arrived.fetch_add(1, std::memory_order_acq_rel);
    wait_until(
        [&] { return state_.num_arrived.load(std::memory_order_acquire) >= num_to_arrive_; });
  }

  // Spins for some microseconds, then lets other threads run: they may hold the core that the last
  // member needs.
  template <class Condition>
  void wait_until(const Condition& is_met) {
    constexpr int kSpins = 2000;
    for (int spins = 0; !is_met(); ++spins) {
      if (state_.has_failed) throw std::runtime_error("another thread of the team failed");
      if (spins >= kSpins) {
        std::this_thread::yield();
        continue;
      }
#ifdef STEER_X86
      _mm_pause();
#endif
    }
  }

  TeamState& state_;
  int64_t num_members_ = 0, first_task_ = 0, num_to_arrive_ = 0;
};

}  // namespace steer

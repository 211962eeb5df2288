// A team of threads that go through the same stages together, without going back to Torch between
// them: a decode step has some hundred stages, and starting threads for each costs more than most.
//
// A stage is a number of independent tasks. Each member takes the next task when it is free, and
// the next stage begins when all tasks are done. Nobody waits for a member that holds no task: on a
// busy machine one may be without a core for milliseconds, and finds, when it is back, that the
// others did its share. All members must go through the same stages in the same order.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <thread>
#include <vector>

#ifdef STEER_X86
#include <immintrin.h>
#endif

namespace steer {

// What the members of one team share. A stage's counters are used once, so a late member can do no
// harm to the stages after it.
struct TeamState {
  struct alignas(64) Stage {
    std::atomic<int64_t> next_task{0}, num_done{0};
  };

  // num_stages: an upper bound.
  explicit TeamState(int64_t num_stages) : stages(num_stages) {}

  std::vector<Stage> stages;
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
    is_alone_ = state_.num_members == 1;
  }

  // Runs task(begin, end) for parts of [0, num_tasks), and returns when all of them are done.
  template <class Task>
  void stage(int64_t num_tasks, const Task& task) {
    if (is_alone_) {
      if (num_tasks > 0) task(0, num_tasks);
      return;
    }
    TeamState::Stage& stage = state_.stages.at(stage_index_++);
    int64_t num_done = 0;
    for (int64_t t; (t = stage.next_task.fetch_add(1)) < num_tasks; ++num_done) task(t, t + 1);
    if (num_done > 0) stage.num_done.fetch_add(num_done, std::memory_order_acq_rel);
    wait_until([&] { return stage.num_done.load(std::memory_order_acquire) >= num_tasks; });
  }

  // For a member that leaves because of an exception: the others must not wait for its task.
  void fail() { state_.has_failed = true; }

 private:
  // Spins for some microseconds, then lets other threads run: they may hold the core that the last
  // task needs.
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
  size_t stage_index_ = 0;
  bool is_alone_ = false;
};

}  // namespace steer

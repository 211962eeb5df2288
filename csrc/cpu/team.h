// A team of threads that go through the same stages together, without going back to Torch between
// them: a decode step has some hundred stages, and starting threads for each costs more than most.
//
// A stage is a number of independent tasks. Each member has a share of them, in a row, so that what
// it asks for ahead of its use (linear.h) is its own next task's; when it is done it goes on with
// what is left of the others' shares. The next stage begins when all tasks are done. Nobody waits
// for a member that holds no task: on a busy machine one may be without a core for milliseconds,
// and finds, when it is back, that the others did its share. All members must go through the same
// stages in the same order.
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
class TeamState {
 public:
  // num_stages, max_members: upper bounds.
  TeamState(int64_t num_stages, int64_t max_members)
      : max_members_(max_members), counters_(num_stages * (max_members + 1)) {}

  // Tasks of a member's share that are taken.
  std::atomic<int64_t>& num_taken(size_t stage, int64_t member) {
    return counters_.at(stage * (max_members_ + 1) + member).value;
  }
  // Tasks of all shares that are done.
  std::atomic<int64_t>& num_done(size_t stage) { return num_taken(stage, max_members_); }

  alignas(64) std::atomic<int64_t> num_members{0};  // 0: not known yet
  std::atomic<bool> has_failed{false};

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };

  int64_t max_members_;
  std::vector<Counter> counters_;
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
    const int64_t places = (size + num_members_ - 1) / num_members_;
    index_ = begin / places;
  }

  // Runs task(begin, end) for parts of [0, num_tasks), and returns when all of them are done.
  template <class Task>
  void stage(int64_t num_tasks, const Task& task) {
    if (num_members_ == 1) {
      if (num_tasks > 0) task(0, num_tasks);
      return;
    }
    const size_t stage = stage_index_++;
    int64_t num_done = 0;
    for (int64_t i = 0; i < num_members_; ++i) {
      const int64_t member = (index_ + i) % num_members_;
      const int64_t begin = num_tasks * member / num_members_;
      const int64_t size = num_tasks * (member + 1) / num_members_ - begin;
      std::atomic<int64_t>& num_taken = state_.num_taken(stage, member);
      for (int64_t t; (t = num_taken.fetch_add(1)) < size; ++num_done) {
        task(begin + t, begin + t + 1);
      }
    }
    std::atomic<int64_t>& all_done = state_.num_done(stage);
    if (num_done > 0) all_done.fetch_add(num_done, std::memory_order_acq_rel);
    wait_until([&] { return all_done.load(std::memory_order_acquire) >= num_tasks; });
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
  int64_t num_members_, index_;
  size_t stage_index_ = 0;
};

}  // namespace steer

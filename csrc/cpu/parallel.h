// SPDX-License-Identifier: Apache-2.0
// Threads: one parallel region for each call of an op, in which thread 0 runs the op and the others
// help with its loops. Nobody waits for a helper that has not come, so a busy core costs its own
// share and no more. A piece of a loop is a fixed part of the problem and is reduced in a fixed
// order afterwards, whoever computed it: the number of threads never shows in a result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace specens {

// About 15 us of work for one thread; less is not worth another one.
constexpr int64_t kElementsPerThread = 65536;

class Team {
 public:
  // A team of the calling thread alone.
  Team() = default;
  Team(const Team&) = delete;

  // Calls body(team) with the helpers, up to `threads` - 1, that so many elements are worth.
  template <typename Body>
  static void run(int threads, int64_t elements, const Body& body) {
    Team team;
#if defined(_OPENMP)
    team.size_ = static_cast<int>(std::min<int64_t>(threads, elements / kElementsPerThread));
    if (team.size_ > 1) {
#pragma omp parallel num_threads(team.size_)
      {
        if (omp_get_thread_num() == 0) {
          body(team);
          team.over_.store(true, std::memory_order_release);
        } else {
          team.help(omp_get_thread_num());
        }
      }
      return;
    }
#endif
    (void)threads;
    (void)elements;
    team.size_ = 1;
    body(team);
  }

  // Threads that may call a loop's function, numbered from 0.
  int size() const { return size_; }

  // Calls function(thread, index) once for every index below `count`, `piece` of them at a time.
  template <typename Function>
  void for_each(int64_t count, int64_t piece, const Function& function) const {
    if (size_ == 1 || count <= piece) {
      for (int64_t i = 0; i < count; ++i) function(0, i);
      return;
    }
    next_.store(0, std::memory_order_relaxed);
    count_ = count;
    piece_ = piece;
    context_ = &function;
    call_ = [](const void* context, int thread, int64_t begin, int64_t end) {
      const auto& function = *static_cast<const Function*>(context);
      for (int64_t i = begin; i < end; ++i) function(thread, i);
    };
    open_.store(true);
    work(0);
    open_.store(false);
    // Whoever entered while the loop was open finishes its piece; whoever comes now turns back.
    while (inside_.load() != 0) pause();
  }

 private:
  void work(int thread) const {
    for (int64_t begin; (begin = next_.fetch_add(piece_, std::memory_order_relaxed)) < count_;) {
      call_(context_, thread, begin, std::min(begin + piece_, count_));
    }
  }

  void help(int thread) const {
    for (int idle = 0; !over_.load(std::memory_order_acquire); ++idle) {
      if (!open_.load(std::memory_order_relaxed)) {
        pause();
        if (idle > kPatience) std::this_thread::yield();
        continue;
      }
      inside_.fetch_add(1);
      if (open_.load()) work(thread);
      inside_.fetch_sub(1);
      idle = 0;
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  // Idle rounds, some 50 us, after which a helper lets others have its core.
  static constexpr int kPatience = 1000;

  using Call = void (*)(const void* context, int thread, int64_t begin, int64_t end);

  int size_ = 1;
  mutable Call call_ = nullptr;
  mutable const void* context_ = nullptr;
  mutable int64_t count_ = 0;
  mutable int64_t piece_ = 0;
  alignas(64) mutable std::atomic<int64_t> next_{0};
  alignas(64) mutable std::atomic<bool> open_{false};
  mutable std::atomic<bool> over_{false};
  alignas(64) mutable std::atomic<int> inside_{0};
};

}  // namespace specens

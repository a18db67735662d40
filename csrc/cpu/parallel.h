// SPDX-License-Identifier: Apache-2.0
// Threads: a loop whose pieces may run anywhere, in any order. Every piece is a fixed part of the
// problem and is reduced in a fixed order afterwards, so the number of threads never shows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace specens {

// Below this many elements, about 15 us of work, a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;

class Team {
 public:
  explicit Team(int threads) : threads_(threads) {}

  int threads() const { return threads_; }

  // The threads that are worth waking for this many elements.
  int threads_for(int64_t elements) const {
    return static_cast<int>(std::min<int64_t>(threads_, elements / kElementsPerThread));
  }

  // Calls function(thread, index) for every index below `count`, `chunk` of them at a time.
  template <typename Function>
  void for_each(int64_t count, int64_t elements, int64_t chunk, const Function& function) const {
#if defined(_OPENMP)
    const int threads = threads_for(elements);
    if (threads > 1) {
      std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
      {
        const int thread = omp_get_thread_num();
        for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < count;) {
          const int64_t end = std::min(begin + chunk, count);
          for (int64_t i = begin; i < end; ++i) function(thread, i);
        }
      }
      return;
    }
#endif
    (void)elements;
    (void)chunk;
    for (int64_t i = 0; i < count; ++i) function(0, i);
  }

 private:
  int threads_;
};

}  // namespace specens

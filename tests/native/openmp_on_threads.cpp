// SPDX-License-Identifier: Apache-2.0
// The part of the OpenMP runtime that the kernels use, on std::thread, for ThreadSanitizer builds:
// it sees these joins, as it does not see the futexes of libgomp. A kernel that uses one more
// feature of OpenMP fails to link here until its entry is added.
#include <algorithm>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

thread_local int thread_num = 0;
thread_local int team_size = 1;

int max_threads() {
  const char* wanted = std::getenv("OMP_NUM_THREADS");
  return wanted == nullptr ? 4 : std::max(1, std::atoi(wanted));
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return thread_num; }
int omp_get_num_threads() { return team_size; }
int omp_get_max_threads() { return max_threads(); }
int omp_in_parallel() { return team_size > 1; }

// GCC's call for `#pragma omp parallel`; 0 threads means the default, and a nested team has one.
void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned /*flags*/) {
  const int size = team_size > 1 ? 1 : num_threads == 0 ? max_threads() : int(num_threads);
  if (size == 1) return body(data);
  std::vector<std::thread> team;
  for (int i = 0; i < size; ++i) {
    team.emplace_back([=] {
      thread_num = i;
      team_size = size;
      body(data);
    });
  }
  for (std::thread& thread : team) thread.join();
}

}  // extern "C"

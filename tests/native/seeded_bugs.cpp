// SPDX-License-Identifier: Apache-2.0
// One small kernel of each pattern that the CUDA backend lives by, on the emulator, with one bug of
// choice: -DSPECENS_SEED_BUG=1 a missing barrier, 2 an overrun, 3 a missing fence, 4 a missing wait
// for an asynchronous copy, 5 a barrier that not every thread reaches, 6 a missing wait for the
// launch before; 0 none. tests/kernels/test_seeded_bugs.py builds each and expects the
// tests' tools to see it. To add a bug: its number here and its line there.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda/compat.cuh"

namespace {

using namespace specens;

constexpr int kThreads = 64;
constexpr int kBlocks = 4;
constexpr int kCount = kThreads * kBlocks;

struct Shared {
  float sums[kThreads / kLanes];
  alignas(16) float copied[kThreads];
  bool is_last;
};

__device__ float block_sum(Shared& shared, float value) {
  for (int bits = kLanes / 2; bits > 0; bits /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, bits);
  }
  if (lane_id() == 0) shared.sums[warp_id()] = value;
#if SPECENS_SEED_BUG != 1
  __syncthreads();
#endif
  float total = 0.0f;
  for (const float sum : shared.sums) total += sum;
  return total;
}

// The sum of `in` doubled, which `out` holds.
__global__ void sum_doubled(const float* in, float* out, float* partials, unsigned* ticket,
                            float* total) {
  SPECENS_SHARED(Shared, shared);
#if SPECENS_SEED_BUG != 6
  await_previous();
#endif
  const int thread = static_cast<int>(threadIdx.x);
  const int place = static_cast<int>(blockIdx.x) * kThreads + thread;
  if (thread % 4 == 0) {
    __pipeline_memcpy_async(&shared.copied[thread], in + place, 16);
    __pipeline_commit();
#if SPECENS_SEED_BUG != 4
    __pipeline_wait_prior(0);
#endif
  }
#if SPECENS_SEED_BUG == 5
  if (thread < kLanes) __syncthreads();
#endif
  __syncthreads();
  const float value = 2.0f * shared.copied[thread];
#if SPECENS_SEED_BUG == 2
  store(out + place + 1, value);
#else
  store(out + place, value);
#endif
  const float sum = block_sum(shared, value);
#if SPECENS_SEED_BUG == 3
  if (thread == 0) {
    store(partials + blockIdx.x, sum);
    shared.is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!shared.is_last) return;
#else
  if (thread == 0) store(partials + blockIdx.x, sum);
  if (!last_block(ticket, gridDim.x, &shared.is_last)) return;
#endif
  if (thread != 0) return;
  float all = 0.0f;
  for (int i = 0; i < kBlocks; ++i) all += load_fresh(partials + i);
  store(total, all);
}

}  // namespace

int main() {
  const std::vector<float> in(kCount, 1.0f);
  std::vector<float> out(kCount), partials(kBlocks);
  unsigned ticket = 0;
  float total = 0.0f;
  const float* from = in.data();
  float *to = out.data(), *sums = partials.data(), *result = &total;
  unsigned* arrivals = &ticket;
  try {
    SPECENS_LAUNCH_EARLY(sum_doubled, dim3(kBlocks), dim3(kThreads), sizeof(Shared), nullptr, from,
                         to, sums, arrivals, result);
  } catch (const simt::Error& error) {
    std::printf("emulator: %s\n", error.what());
    return 1;
  }
  if (total == 2.0f * kCount) return 0;
  std::printf("wrong result: %s\n", std::isnan(total) ? "NaN" : "a number");
  return 2;
}

// SPDX-License-Identifier: Apache-2.0
// One small kernel of each pattern that the CUDA backend lives by, on the emulator, with one bug of
// choice: -DSPECENS_SEED_BUG=1 a missing barrier, 2 an overrun, 3 a missing fence, 4 a missing wait
// for an asynchronous copy, 5 a barrier that not every thread reaches, 6 a missing wait for the
// launch before, 7 a wait that lets one copy too many be under way, 8 a copy over what another warp
// still reads; 0 none. tests/kernels/test_seeded_bugs.py builds each and expects the tests' tools
// to see it. To add a bug: its number here and its line there.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda/matrix.cuh"

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

constexpr int kSteps = 4, kStages = 2;

// A step's operands (16, 16): rows of A, then columns of B.
struct Tiles {
  alignas(128) uint16_t stage[kStages][2 * 256];
};

// out (16, 16) is the sum over steps of A B; a warp has half of the columns.
__global__ void multiply_steps(const uint16_t* in, float* out) {
  SPECENS_SHARED(Tiles, shared);
  const auto copy = [&](int step) {
    const int half = static_cast<int>(threadIdx.x) * 8;
    if (step < kSteps) copy_async(&shared.stage[step % 2][half], in + step * 512 + half, true);
    __pipeline_commit();
  };
  float sums[4] = {};
  copy(0);
  for (int step = 0; step < kSteps; ++step) {
#if SPECENS_SEED_BUG == 7
    copy(step + 1);
#endif
    __pipeline_wait_prior(SPECENS_SEED_BUG == 7 ? 2 : 0);
#if SPECENS_SEED_BUG == 8
    copy(step + 1);
#endif
    __syncthreads();
#if SPECENS_SEED_BUG != 7 && SPECENS_SEED_BUG != 8
    copy(step + 1);
#endif
    const uint16_t* tile = shared.stage[step % 2];
    const int matrix = lane_id() / 8, row = lane_id() % 8;
    uint32_t a[4], both[4];
    load_matrices<false>(a, tile + (row + matrix % 2 * 8) * 16 + matrix / 2 * 8);
    load_matrices<false>(both, tile + 256 + (row + matrix / 2 * 8) * 16 + matrix % 2 * 8);
    const uint32_t b[2] = {both[2 * warp_id()], both[2 * warp_id() + 1]};
    BFloat16::multiply_add(sums, a, b);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = lane_id() / 4 + i / 2 * 8, column = lane_id() % 4 * 2 + i % 2;
    store(out + row * 16 + warp_id() * 8 + column, sums[i]);
  }
}

// Whether the products are those of small integers, which are exact.
bool multiplies() {
  std::vector<uint16_t> in(kSteps * 512);
  std::vector<float> out(256), right(256);
  for (int step = 0; step < kSteps; ++step) {
    for (int i = 0; i < 256; ++i) {
      const float a = static_cast<float>(step + i % 7), b = static_cast<float>(i % 5 - step);
      in[step * 512 + i] = static_cast<uint16_t>(simt::round_to_bfloat16(a));
      in[step * 512 + 256 + i] = static_cast<uint16_t>(simt::round_to_bfloat16(b));
    }
    for (int i = 0; i < 256; ++i) {
      for (int k = 0; k < 16; ++k) {
        right[i] += from_bfloat16(in[step * 512 + i / 16 * 16 + k]) *
                    from_bfloat16(in[step * 512 + 256 + i % 16 * 16 + k]);
      }
    }
  }
  const uint16_t* from = in.data();
  float* to = out.data();
  SPECENS_LAUNCH(multiply_steps, dim3(1), dim3(kThreads), sizeof(Tiles), nullptr, from, to);
  return out == right;
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
    if (!multiplies()) {
      std::printf("wrong products\n");
      return 3;
    }
  } catch (const simt::Error& error) {
    std::printf("emulator: %s\n", error.what());
    return 1;
  }
  if (total == 2.0f * kCount) return 0;
  std::printf("wrong result: %s\n", std::isnan(total) ? "NaN" : "a number");
  return 2;
}

// SPDX-License-Identifier: Apache-2.0
// Philox-4x32-10, a block of four numbers for each (seed, position). Source: Salmon et al. 2011.
#include "compat.cuh"
#include "cuda.h"

namespace specens {
namespace {

constexpr int kUniformThreads = 128;

struct alignas(16) Numbers {
  float value[4];
};

struct Words {
  uint32_t word[4];
};

__device__ __forceinline__ Words philox(Words counter, uint64_t seed) {
  auto key0 = static_cast<uint32_t>(seed);
  auto key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

__global__ void __launch_bounds__(kUniformThreads) write_uniforms(UniformsParams params) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kUniformThreads + threadIdx.x;
  if (place >= params.batch * params.rows) return;
  const int64_t b = place / params.rows, t = place % params.rows;
  const auto position = static_cast<uint64_t>(params.positions.at(b, t));
  const Words block = philox({{static_cast<uint32_t>(position),
                               static_cast<uint32_t>(position >> 32), params.stream, params.index}},
                             static_cast<uint64_t>(params.seeds.at(b)));
  Numbers numbers;
  for (int i = 0; i < 4; ++i) {
    numbers.value[i] = static_cast<float>(block.word[i] >> 8) * 0x1p-24f;
  }
  store(reinterpret_cast<Numbers*>(params.out) + place, numbers);
}

}  // namespace

int cuda_uniforms(const UniformsParams& params, cudaStream_t stream) {
  const int64_t count = params.batch * params.rows;
  if (count == 0) return 0;
  const auto blocks = static_cast<unsigned>((count + kUniformThreads - 1) / kUniformThreads);
  SPECENS_LAUNCH(write_uniforms, dim3(blocks), dim3(kUniformThreads), 0, stream, params);
  return launch_error();
}

}  // namespace specens

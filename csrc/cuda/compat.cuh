// SPDX-License-Identifier: Apache-2.0
// The one include of every kernel file: CUDA under nvcc, the emulator of tests/simt under another
// compiler. Kernels use only what both have. Reads and writes of global memory go through `load`,
// `load_fresh` and `store`, which the emulator counts. To add an intrinsic: use it, and give it a
// twin in simt.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#if !defined(__CUDA_ARCH__)
#define SPECENS_HOST_PASS
#endif

// The dynamic shared memory of the block, as one struct.
#define SPECENS_SHARED(Type, name)                                 \
  extern __shared__ __align__(128) unsigned char specens_shared[]; \
  Type& name = *reinterpret_cast<Type*>(specens_shared)

#define SPECENS_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)

// Before a launch whose blocks have more than 48 KiB of shared memory.
#define SPECENS_ALLOW_SHARED(kernel, bytes) \
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))

// `SPECENS_LAUNCH` for a kernel whose threads all call `await_previous`: its blocks may be on the
// device while the launch before it ends.
#define SPECENS_LAUNCH_EARLY(kernel, grid, block, shared, stream, ...) \
  ::specens::launch_early(kernel, grid, block, shared, stream, __VA_ARGS__)

namespace specens {
inline int launch_error() { return static_cast<int>(cudaGetLastError()); }

// Bytes of shared memory that a block may have on the current device.
inline size_t most_shared() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return static_cast<size_t>(bytes);
}

// Programmatic dependent launch, where the device has it. `launch_error` sees what goes wrong.
template <typename... Parameters>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                  cudaStream_t stream, const Parameters&... arguments) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = major >= 9 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}
}  // namespace specens
#else
#include "simt/matrix.h"
#include "simt/simt.h"

#define SPECENS_SHARED(Type, name) Type& name = *reinterpret_cast<Type*>(::simt::block().shared)

// The emulator throws where a kernel is wrong.
#define SPECENS_SIMT_LAUNCH(kernel, grid, block, shared, stream, early, ...)               \
  do {                                                                                     \
    (void)(stream);                                                                        \
    ::simt::launch(#kernel, {grid, block, shared, early}, [=] { (kernel)(__VA_ARGS__); }); \
  } while (0)
#define SPECENS_LAUNCH(kernel, grid, block, shared, stream, ...) \
  SPECENS_SIMT_LAUNCH(kernel, grid, block, shared, stream, false, __VA_ARGS__)
#define SPECENS_LAUNCH_EARLY(kernel, grid, block, shared, stream, ...) \
  SPECENS_SIMT_LAUNCH(kernel, grid, block, shared, stream, true, __VA_ARGS__)
#define SPECENS_ALLOW_SHARED(kernel, bytes) ::simt::allow_shared(#kernel, bytes)

namespace specens {
inline int launch_error() { return 0; }
inline size_t most_shared() { return ::simt::most_shared(); }
}  // namespace specens
#endif

namespace specens {

constexpr unsigned kAllLanes = ~0u;
constexpr int kLanes = 32;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kLanes; }

// Lets an early launch that follows start when all blocks of this one have come here or ended. What
// it does before `await_previous` then happens beside us.
__device__ __forceinline__ void release_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the launch before this one has ended and all that it wrote is seen. Every thread of
// an early launch comes here before it reads what that launch wrote, and before it writes: so this
// launch does not end first either, and the next one, which is not early, follows both.
__device__ __forceinline__ void await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#elif !defined(__CUDACC__)
  ::simt::await_previous();
#endif
}

// Reads memory that nobody writes while the kernel runs, nor the one before an early launch.
template <typename T>
__device__ __forceinline__ T load(const T* from) {
#if defined(__CUDACC__)
  return __ldg(from);
#else
  ::simt::count_loaded(sizeof(T));
  return *from;
#endif
}

// Reads what another block may have written; the caller has passed `last_block`, or the launch that
// wrote it has ended.
template <typename T>
__device__ __forceinline__ T load_fresh(const T* from) {
#if defined(__CUDACC__)
  using Word = std::conditional_t<
      sizeof(T) % 16 == 0, uint4,
      std::conditional_t<sizeof(T) % 8 == 0, uint2,
                         std::conditional_t<sizeof(T) % 4 == 0, unsigned,
                                            std::conditional_t<sizeof(T) % 2 == 0, unsigned short,
                                                               unsigned char>>>>;
  Word words[sizeof(T) / sizeof(Word)];
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / sizeof(Word); ++i) {
    words[i] = __ldcg(reinterpret_cast<const Word*>(from) + i);
  }
  T value;
  memcpy(&value, words, sizeof value);
  return value;
#else
  ::simt::expect_awaited();
  ::simt::count_loaded(sizeof(T));
  return *from;
#endif
}

template <typename T>
__device__ __forceinline__ void store(T* to, const T& value) {
#if !defined(__CUDACC__)
  ::simt::expect_awaited();
  ::simt::count_stored(sizeof(T));
#endif
  *to = value;
}

// 16 bytes at once, from an address that is a multiple of 16.
struct alignas(16) Bits {
  uint32_t word[4];
};

__device__ __forceinline__ Bits load_bits(const void* from) {
#if defined(__CUDACC__)
  const uint4 bits = __ldg(static_cast<const uint4*>(from));
  return {{bits.x, bits.y, bits.z, bits.w}};
#else
  ::simt::count_loaded(sizeof(Bits));
  Bits bits;
  memcpy(&bits, from, sizeof bits);
  return bits;
#endif
}

__device__ __forceinline__ float from_bfloat16(uint32_t bits) {
  return __uint_as_float(bits << 16);
}

__device__ __forceinline__ float from_float16(uint32_t bits) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#else
  const uint32_t sign = (bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
  if (magnitude < 0x0400) {
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return __uint_as_float(__float_as_uint(value) | sign);
  }
  const uint32_t exponent = magnitude >= 0x7C00 ? 0x70000000 : 0x38000000;
  return __uint_as_float(sign | ((magnitude << 13) + exponent));
#endif
}

// 2 to the power of a number, and 0 where that is no normal one.
__device__ __forceinline__ float exp2_flushed(float exponent) {
#if defined(__CUDACC__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
#else
  const float power = std::exp2(exponent);
  return power < 0x1p-126f ? 0.0f : power;
#endif
}

constexpr float kNoMass = -__builtin_huge_valf();

// True in the last block to arrive, which then sees what the others wrote before they came. The
// ticket, zero at first, is zero again.
__device__ __forceinline__ bool last_block(unsigned* ticket, unsigned arrivals, bool* is_last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *is_last = atomicAdd(ticket, 1u) == arrivals - 1;
    if (*is_last) atomicExch(ticket, 0u);
  }
  __syncthreads();
  if (*is_last) __threadfence();
  return *is_last;
}

}  // namespace specens

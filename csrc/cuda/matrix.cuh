// SPDX-License-Identifier: Apache-2.0
// Matrix instructions on halves and asynchronous copies to shared memory, of sm_80 and later: what
// compat.cuh is for all else. The twins are in tests/simt/matrix.h.
#pragma once

#include "compat.cuh"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#endif

namespace specens {

// 16 bytes from global to shared memory, which are there after the wait and a barrier; zeros, and
// nothing is read, if not `real`.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool real) {
  __pipeline_memcpy_async(to, from, 16, real ? 0 : 16);
}

// Halves as they lie in memory; two in a word, the first in its lower half.
struct BFloat16 {
  using Bits = uint16_t;
  static constexpr uint32_t kExponent = 0x7F80;

  static __device__ __forceinline__ uint32_t pack(float first, float second) {
#if defined(__CUDACC__)
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
#else
    return ::simt::round_to_bfloat16(first) | ::simt::round_to_bfloat16(second) << 16;
#endif
  }

  // sums (16, 8) += a (16, 16) b (16, 8), in the fragments of mma.m16n8k16.
  static __device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    ::simt::multiply_add(sums, a, b, from_bfloat16);
#endif
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr uint32_t kExponent = 0x7C00;

  static __device__ __forceinline__ uint32_t pack(float first, float second) {
#if defined(__CUDACC__)
    const __half2 pair = __floats2half2_rn(first, second);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
#else
    return ::simt::round_to_float16(first) | ::simt::round_to_float16(second) << 16;
#endif
  }

  static __device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    ::simt::multiply_add(sums, a, b, from_float16);
#endif
  }
};

// Four matrices (8, 8) of halves from shared memory; lane i gives the address of row i % 8 of
// matrix i / 8, and gets of each two neighbours in a row, or in a column if they are transposed.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
#if defined(__CUDACC__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
#else
  ::simt::load_matrices(words, row, kTransposed);
#endif
}

}  // namespace specens

// SPDX-License-Identifier: Apache-2.0
// Builds kernels.inc for each instruction set and chooses among the builds, once. To add a set: its
// target options and vector width here, its few intrinsics in vectors.inc, its line in `builds`.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#pragma GCC diagnostic push
// GCC 12 reports the deliberately undefined operands of its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <cpuid.h>
#include <immintrin.h>
#pragma GCC diagnostic pop
#if defined(__linux__) && !defined(SPECENS_STAND_INS) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define SPECENS_HAS_BFLOAT16
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define SPECENS_INLINE inline __attribute__((always_inline))
#define SPECENS_INLINE_LAMBDA __attribute__((always_inline))

#define SPECENS_ISA baseline
#define SPECENS_NAME "baseline"
#define SPECENS_WIDTH 4
#include "kernels.inc"
#undef SPECENS_ISA
#undef SPECENS_NAME
#undef SPECENS_WIDTH

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define SPECENS_ISA avx2
#define SPECENS_NAME "avx2"
#define SPECENS_WIDTH 8
#include "kernels.inc"
#undef SPECENS_ISA
#undef SPECENS_NAME
#undef SPECENS_WIDTH
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#define SPECENS_ISA avx512
#define SPECENS_NAME "avx512"
#define SPECENS_WIDTH 16
#include "kernels.inc"
#undef SPECENS_ISA
#undef SPECENS_NAME
#undef SPECENS_WIDTH
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

// Sets that attend to bfloat16 in their own way, and are another set in all else. Tests build them
// on the baseline, from the same sources without the instructions (SPECENS_STAND_INS).
#if defined(SPECENS_STAND_INS)
#define SPECENS_BASE baseline
#define SPECENS_WIDTH 4
#define SPECENS_ISA avx512bf16
#define SPECENS_NAME "avx512bf16"
#include "bfloat16.inc"
#undef SPECENS_ISA
#undef SPECENS_NAME
#define SPECENS_TILES
#define SPECENS_ISA amx
#define SPECENS_NAME "amx"
#include "bfloat16.inc"
#undef SPECENS_ISA
#undef SPECENS_NAME
#undef SPECENS_TILES
#undef SPECENS_WIDTH
#undef SPECENS_BASE
#elif defined(SPECENS_HAS_BFLOAT16)
#define SPECENS_BASE avx512
#define SPECENS_WIDTH 16
#define SPECENS_DOTS
#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,prefer-vector-width=512")
#endif
#define SPECENS_ISA avx512bf16
#define SPECENS_NAME "avx512bf16"
#include "bfloat16.inc"
#undef SPECENS_ISA
#undef SPECENS_NAME
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                                 \
    __attribute__((                                                                           \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16")
#endif
#define SPECENS_TILES
#define SPECENS_TILES_HERE
#define SPECENS_ISA amx
#define SPECENS_NAME "amx"
#include "bfloat16.inc"
#undef SPECENS_ISA
#undef SPECENS_NAME
#undef SPECENS_TILES
#undef SPECENS_TILES_HERE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SPECENS_DOTS
#undef SPECENS_WIDTH
#undef SPECENS_BASE
#endif

namespace specens {
namespace {

struct Build {
  const Kernels* kernels;
  bool (*supported)();
  bool only_if_asked = false;
};

bool always() { return true; }

#if defined(__x86_64__)
// As `__builtin_cpu_supports("f16c")`, which GCC knows since 11 and Clang since 18.
bool supports_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool supports_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c();
}

bool supports_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(SPECENS_HAS_BFLOAT16)
bool supports_avx512bf16() {
  unsigned eax, ebx, ecx, edx;
  return supports_avx512() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 &&
         (eax & 1u << 5) != 0;
}

// The processor's word, and the system's: a process asks for the tiles' memory, once.
bool supports_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kTilesAndDots = 1u << 24 | 1u << 22;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return supports_avx512bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 &&
         (edx & kTilesAndDots) == kTilesAndDots &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// One that is not asked for is not tried either: tiles once granted stay with the process.
const Kernels& choose(const Build* begin, const Build* end) {
  const char* name = std::getenv("SPECENS_CPU_ISA");
  const bool any = name == nullptr || *name == 0;
  for (const Build* build = begin; build != end; ++build) {
    const bool asked = any ? !build->only_if_asked : build->kernels->name == std::string(name);
    if (asked && build->supported()) return *build->kernels;
  }
  std::string known;
  for (const Build* build = begin; build != end; ++build) {
    if (!build->only_if_asked && build->supported())
      known += (known.empty() ? "" : ", ") + std::string(build->kernels->name);
  }
  throw std::runtime_error("SPECENS_CPU_ISA: expected one of " + known + " on this machine, got '" +
                           name + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const Build builds[] = {
#if defined(SPECENS_STAND_INS)
        {&amx::kKernels, always},
        {&avx512bf16::kKernels, always},
#elif defined(SPECENS_HAS_BFLOAT16)
        // They have run as stand-ins alone, on no processor that has tiles.
        {&amx::kKernels, supports_amx, true},
        {&avx512bf16::kKernels, supports_avx512bf16},
#endif
#if defined(__x86_64__)
        {&avx512::kKernels, supports_avx512},
        {&avx2::kKernels, supports_avx2},
#endif
        {&baseline::kKernels, always},
    };
    return choose(std::begin(builds), std::end(builds));
  }();
  return chosen;
}

const char* cpu_isa() { return kernels().name; }

double exponential(double x) {
  double values[1] = {x};
  baseline::exp_f64<double, uint64_t>(values);
  return values[0];
}

double logarithm(double x) { return baseline::log_f64<double, uint64_t>(x); }

float load_value(const void* row, DType dtype, int64_t index) {
  using baseline::bits;
  if (dtype == DType::kFloat32) return static_cast<const float*>(row)[index];
  const uint32_t half = static_cast<const uint16_t*>(row)[index];
  if (dtype == DType::kBFloat16) return bits<float>(half << 16);
  const uint32_t magnitude = half & 0x7FFF;
  const uint32_t normal = (magnitude << 13) + ((magnitude >= 0x7C00 ? 224u : 112u) << 23);
  const uint32_t subnormal = bits<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  return bits<float>((magnitude < 0x0400 ? subnormal : normal) | ((half & 0x8000) << 16));
}

}  // namespace specens

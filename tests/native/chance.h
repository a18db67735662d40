// SPDX-License-Identifier: Apache-2.0
// What the situations are made of: random numbers and 16-bit floats; and how a failure is reported.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

#include "specens.h"

namespace native_tests {

using specens::DType;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Context {
  const char* isa = "";
  uint64_t seed = 0;
  const char* op = "";
  int threads = 1;
  std::string about;
};

inline Context context;

[[noreturn]] inline void fail(const char* what, double got) {
  std::fprintf(stderr, "FAILED: %s: %s (got %.9g)\n  %s, %d thread(s), seed %llu%s\n", context.op,
               what, got, context.isa, context.threads,
               static_cast<unsigned long long>(context.seed), context.about.c_str());
  std::exit(1);
}

inline void expect(bool holds, const char* what, double got) {
  if (!holds) fail(what, got);
}

// SplitMix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t count) { return static_cast<int64_t>(next() % uint64_t(count)); }
  bool one_in(int count) { return below(count) == 0; }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }
  // Roughly normal.
  float normal() {
    const uint64_t bits = next();
    int sum = 0;
    for (int shift = 0; shift < 64; shift += 16) sum += static_cast<int>((bits >> shift) & 0xFFFF);
    return (static_cast<float>(sum) - 131070.0f) / 37837.0f;
  }
  template <typename T, size_t kCount>
  T pick(const T (&choices)[kCount]) {
    return choices[below(kCount)];
  }

 private:
  uint64_t state_;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Towards zero; a NaN stays one.
inline uint16_t to_bfloat16(float value) {
  return static_cast<uint16_t>(std::isnan(value) ? 0x7FC0 : bits_of(value) >> 16);
}

inline float from_bfloat16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const float magnitude = std::fabs(value);
  uint32_t half;
  if (std::isnan(value)) {
    half = 0x7E00;
  } else if (magnitude >= 65536.0f) {
    half = std::isinf(value) ? 0x7C00 : 0x7BFF;
  } else if (magnitude < 0x1p-14f) {
    half = static_cast<uint32_t>(magnitude * 0x1p24f);
  } else {
    half = ((bits & 0x7FFFFFFF) >> 13) - (112 << 10);
  }
  return static_cast<uint16_t>(sign | half);
}

inline float from_float16(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const int mantissa = half & 1023;
  float value;
  if (exponent == 31) {
    value = mantissa != 0 ? kNan : kInf;
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    value = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return (half & 0x8000) != 0 ? -value : value;
}

inline float rounded(float value, DType dtype) {
  if (dtype == DType::kBFloat16) return from_bfloat16(to_bfloat16(value));
  if (dtype == DType::kFloat16) return from_float16(to_float16(value));
  return value;
}

}  // namespace native_tests

// SPDX-License-Identifier: Apache-2.0
// The emulator's matrix instructions and asynchronous copies. What a copy brings is there when its
// thread waits; until then the place is NaN, so that a missing wait shows, and so does a copy over
// what somebody still reads. Products of halves are exact and a fragment's sum is rounded once,
// which is at least as precise as a device is. To add an instruction: its twin below, with what
// each lane gives and gets from the table in NVIDIA's PTX manual.
#pragma once

#include <array>

#include "simt.h"

namespace simt {

inline bool is_aligned(const void* address, size_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// To the nearest, ties to even.
inline uint32_t round_to_float16(float value) {
  if (std::isnan(value)) return 0x7E00;
  const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size < 0x1p-14f) return sign | static_cast<uint32_t>(std::nearbyintf(size * 0x1p24f));
  uint32_t bits;
  std::memcpy(&bits, &size, sizeof bits);
  bits += 0xFFF + (bits >> 13 & 1);
  return sign | ((bits >> 13) - (112 << 10));
}
inline uint32_t round_to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// A lane's part of A (16, 16) and B (16, 8).
struct Operands {
  uint32_t a[4], b[2];
};

// sums (16, 8) += A B. `widen` makes a float of the low 16 bits.
template <typename Widen>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const Widen& widen, SIMT_PLACE) {
  const Operands given = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const int row = current->lane / 4, column = current->lane % 4 * 2;
  double added[4] = {};
  collective(~0u, given, place, [&](auto get) {
    for (int j = 0; j < 4; ++j) {
      const Operands left = get(4 * row + j);
      for (int c = 0; c < 2; ++c) {
        const Operands right = get(4 * (column + c) + j);
        for (int k = 0; k < 4; ++k) {
          const int shift = k % 2 * 16, half = k / 2;
          const double factor = widen(right.b[half] >> shift & 0xFFFF);
          added[c] += factor * widen(left.a[2 * half] >> shift & 0xFFFF);
          added[c + 2] += factor * widen(left.a[2 * half + 1] >> shift & 0xFFFF);
        }
      }
    }
    return 0;
  });
  for (int i = 0; i < 4; ++i) sums[i] = static_cast<float>(sums[i] + added[i]);
}

// How many more turns the banks take for eight rows of 16 bytes than if they did not meet.
inline int bank_conflicts(const std::array<const char*, kWarp>& rows, int matrix) {
  int most = 0;
  for (uintptr_t bank = 0; bank < 8; ++bank) {
    std::array<const char*, 8> met{};
    int count = 0;
    for (int i = 0; i < 8; ++i) {
      const char* row = rows[static_cast<size_t>(8 * matrix + i)];
      if (reinterpret_cast<uintptr_t>(row) / 16 % 8 != bank) continue;
      if (std::find(met.begin(), met.begin() + count, row) != met.begin() + count) continue;
      met[static_cast<size_t>(count++)] = row;
    }
    most = std::max(most, count);
  }
  return most - 1;
}

// Four matrices (8, 8) of halves; lane i gives the address of row i % 8 of matrix i / 8.
inline void load_matrices(uint32_t (&words)[4], const void* row, bool transposed, SIMT_PLACE) {
  if (!is_aligned(row, 16)) fail("load of matrices " + place.text() + ": a row is not aligned");
  const auto* given = static_cast<const char*>(row);
  const auto rows = collective(~0u, given, place, [&](auto get) {
    std::array<const char*, kWarp> all{};
    for (int lane = 0; lane < kWarp; ++lane) all[static_cast<size_t>(lane)] = get(lane);
    return all;
  });
  const auto g = static_cast<size_t>(current->lane / 4), t = static_cast<size_t>(current->lane % 4);
  if (current->lane == 0) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      current_traffic->conflicts.fetch_add(bank_conflicts(rows, matrix), std::memory_order_relaxed);
    }
  }
  for (size_t matrix = 0; matrix < 4; ++matrix) {
    const auto half = [&](size_t i, size_t column) {
      uint16_t value;
      std::memcpy(&value, rows[8 * matrix + i] + 2 * column, sizeof value);
      return uint32_t{value};
    };
    const uint32_t low = transposed ? half(2 * t, g) : half(g, 2 * t);
    const uint32_t high = transposed ? half(2 * t + 1, g) : half(g, 2 * t + 1);
    words[matrix] = low | high << 16;
  }
}

}  // namespace simt

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0,
                                    SIMT_PLACE) {
  const bool sized = bytes == 4 || bytes == 8 || bytes == 16;
  if (!sized || zeros > bytes || !simt::is_aligned(to, bytes) || !simt::is_aligned(from, bytes)) {
    simt::fail("asynchronous copy " + place.text() + ": wrong size or alignment");
  }
  std::memset(to, 0xFF, bytes);
  simt::count_loaded(bytes - zeros);
  simt::current_traffic->copied.fetch_add(static_cast<int64_t>(bytes - zeros),
                                          std::memory_order_relaxed);
  simt::Quiet quiet;
  simt::current->copies.push_back({to, from, bytes, zeros});
}
inline void __pipeline_commit() {
  simt::Quiet quiet;
  simt::current->groups.push_back(std::exchange(simt::current->copies, {}));
}
inline void __pipeline_wait_prior(size_t keep) {
  std::vector<simt::Copy> arrived;
  {
    simt::Quiet quiet;
    auto& groups = simt::current->groups;
    for (; groups.size() > keep; groups.pop_front()) {
      arrived.insert(arrived.end(), groups.front().begin(), groups.front().end());
    }
  }
  for (const simt::Copy& copy : arrived) {
    const size_t real = copy.bytes - copy.zeros;
    std::memcpy(copy.to, copy.from, real);
    std::memset(static_cast<char*>(copy.to) + real, 0, copy.zeros);
  }
}

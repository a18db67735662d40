// SPDX-License-Identifier: Apache-2.0
// The draw of a token from masses, in three steps: a tile, a sub-tile of it, a token of that.
#pragma once

#include <algorithm>
#include <cstdint>

#include "law.h"

namespace specens {

// The first index whose cumulative mass exceeds `threshold`, the last with mass if none does, from
// what `cumulative` has been before; mass(i) for i below count.
template <typename Mass>
int pick_beyond(int count, double threshold, double cumulative, const Mass& mass) {
  int last = 0;
  for (int i = 0; i < count && !(cumulative > threshold); ++i) {
    const double here = mass(i);
    cumulative += here;
    if (here > 0.0) last = i;
  }
  return last;
}

// The same with threshold = number x total.
template <typename Mass>
int pick(int count, double number, const Mass& mass) {
  double total = 0.0;
  for (int i = 0; i < count; ++i) total += mass(i);
  return pick_beyond(count, number * total, 0.0, mass);
}

// The same over a sub-tile, in blocks; the buffer is padded with zeros.
int pick_token(const double* masses, int count, double number);

// The draw: a tile, a sub-tile, both by `masses` of the sub-tiles, and a token by what
// fill(sub_tile, buffer) says.
template <typename Fill>
int64_t draw(const double* masses, int64_t vocab_size, const double (&numbers)[3],
             const Fill& fill) {
  const int sub_tiles = static_cast<int>((vocab_size + kSubTile - 1) / kSubTile);
  const int tiles = (sub_tiles + kSubTilesPerTile - 1) / kSubTilesPerTile;
  const int tile = pick(tiles, numbers[0], [&](int i) {
    double sum = 0.0;
    for (int j = i * kSubTilesPerTile; j < std::min((i + 1) * kSubTilesPerTile, sub_tiles); ++j) {
      sum += masses[j];
    }
    return sum;
  });
  const int first = tile * kSubTilesPerTile;
  const int sub_tile = first + pick(std::min(kSubTilesPerTile, sub_tiles - first), numbers[1],
                                    [&](int i) { return masses[first + i]; });
  const int64_t begin = static_cast<int64_t>(sub_tile) * kSubTile;
  const int count = static_cast<int>(std::min<int64_t>(kSubTile, vocab_size - begin));
  double buffer[kSubTile];
  fill(sub_tile, buffer);
  return begin + pick_token(buffer, count, numbers[2]);
}

// Words 1 to 3 of a block of uniforms.
struct DrawNumbers {
  double value[3];
};

inline DrawNumbers draw_numbers(const Values<float>& uniforms, int64_t batch, int64_t row) {
  return {{uniforms.at(batch, row, 1), uniforms.at(batch, row, 2), uniforms.at(batch, row, 3)}};
}

// The token that a block of uniforms draws; 0 from an empty law.
int64_t draw_from(const RowLaw& law, const Values<float>& uniforms, int64_t batch, int64_t row);

}  // namespace specens

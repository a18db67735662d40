// SPDX-License-Identifier: Apache-2.0
// The benchmark's floor: the sweep that no verification can do without, and nothing else.
#include <algorithm>
#include <limits>
#include <memory>

#include "row_laws.h"

namespace specens {

double floor_sweep(const FloorParams& params, int threads) {
  const int64_t vocab_size = params.vocab_size, rows = params.rows;
  const int64_t sub_tiles = (vocab_size + kSubTile - 1) / kSubTile;
  const int64_t units = params.batch * rows * params.num_members;
  std::unique_ptr<Peak[]> peaks(new Peak[units * sub_tiles]);
  Team::run(threads, units * vocab_size, [&](const Team& team) {
    team.for_each(units * sub_tiles, kSubTilesPerPiece, [&](int, int64_t piece) {
      const int64_t unit = piece / sub_tiles;
      const Logits& member = params.members[unit % params.num_members];
      const int64_t row = unit / params.num_members;
      const int64_t begin = piece % sub_tiles * kSubTile;
      const int64_t count = std::min<int64_t>(kSubTile, vocab_size - begin);
      const auto* data = static_cast<const char*>(row_of(member, row / rows, row % rows));
      peaks[piece] = kernels().statistics(
          {data + begin * element_size(member.dtype), member.dtype, static_cast<int>(count)},
          -std::numeric_limits<float>::infinity(), 1.0);
    });
  });
  double total = 0.0;
  for (int64_t unit = 0; unit < units; ++unit) {
    const Peak* row = &peaks[unit * sub_tiles];
    double top = -kInfinity;
    for (int64_t s = 0; s < sub_tiles; ++s) top = std::max(top, row[s].max);
    double sum = 0.0;
    for (int64_t s = 0; s < sub_tiles; ++s) sum += row[s].sum * exponential(row[s].max - top);
    total += top + logarithm(sum);
  }
  return total;
}

}  // namespace specens

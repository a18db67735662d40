// SPDX-License-Identifier: Apache-2.0
// The last step reads its sub-tile in blocks, whose sums have a fixed order.
#include "draw.h"

namespace specens {

int pick_token(const double* masses, int count, double number) {
  double sums[kSubTile / kLanes];
  const int blocks = padded(count) / kLanes;
  for (int block = 0; block < blocks; ++block) {
    double partial[8] = {};
    for (int i = 0; i < kLanes; i += 8) {
      for (int j = 0; j < 8; ++j) partial[j] += masses[block * kLanes + i + j];
    }
    sums[block] = ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
                  ((partial[1] + partial[5]) + (partial[3] + partial[7]));
  }
  double total = 0.0;
  for (int i = 0; i < blocks; ++i) total += sums[i];
  const double threshold = number * total;
  const int block = pick_beyond(blocks, threshold, 0.0, [&](int i) { return sums[i]; });
  double before = 0.0;
  for (int i = 0; i < block; ++i) before += sums[i];
  const double* first = masses + block * kLanes;
  return block * kLanes + pick_beyond(kLanes, threshold, before, [&](int i) { return first[i]; });
}

int64_t draw_from(const RowLaw& law, const Values<float>& uniforms, int64_t batch, int64_t row) {
  if (law.empty()) return 0;
  return draw(law.masses(), law.vocab_size(), draw_numbers(uniforms, batch, row).value,
              [&](int sub_tile, double* out) {
                std::fill_n(out, padded(law.count(sub_tile)), 0.0);
                law.add_masses(sub_tile, 1.0, out);
              });
}

}  // namespace specens

// SPDX-License-Identifier: Apache-2.0
// `mix`: the ensemble's law, written out; a sweep of a row for its law and one for its values.
#include "row_laws.h"

namespace specens {
namespace {

void mix_row(const MixParams& params, RowLaws& laws, int64_t batch, int64_t row) {
  laws.measure_target(batch, row, Proposal{});
  const RowLaw& law = laws.target();
  const int64_t place = batch * params.rows + row;
  params.status[place] = laws.status() | (law.empty() ? kEmptyLaw : 0);
  float* out = params.log_probs + place * law.vocab_size();
  laws.team().for_each(law.sub_tiles(), 1, [&](int, int64_t index) {
    const int sub_tile = static_cast<int>(index);
    double buffer[kSubTile];
    law.log_probabilities(sub_tile, buffer);
    for (int i = 0; i < law.count(sub_tile); ++i) {
      out[index * kSubTile + i] = static_cast<float>(buffer[i]);
    }
  });
}

}  // namespace

void mix(const MixParams& params, int threads) {
  for_each_row(params.ensemble, params.batch * params.rows, 1, threads,
               [&](RowLaws& laws, int64_t place) {
                 mix_row(params, laws, place / params.rows, place % params.rows);
               });
}

}  // namespace specens

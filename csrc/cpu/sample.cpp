// SPDX-License-Identifier: Apache-2.0
// `sample`: one sweep of a row for its law, then the draw of a token, which reads one sub-tile
// again.
#include "draw.h"
#include "row_laws.h"

namespace specens {
namespace {

void sample_row(const SampleParams& params, RowLaws& laws, int64_t batch, int64_t row) {
  if (params.member >= 0) {
    laws.measure_member(batch, row, params.member);
  } else {
    laws.measure_target(batch, row, Proposal{});
  }
  const RowLaw& law = laws.target();
  int64_t token = 0;
  if (!law.empty()) {
    token = greedy_row(params.ensemble, batch) ? laws.argmax()
                                               : draw_from(law, params.uniforms, batch, row);
  }
  const int64_t place = batch * params.rows + row;
  params.tokens[place] = token;
  params.log_probs[place] = static_cast<float>(law.log_probability(token));
  params.lse[place] = static_cast<float>(law.lse());
  params.status[place] = laws.status() | (law.empty() ? kEmptyLaw : 0);
}

}  // namespace

void sample(const SampleParams& params, int threads) {
  for_each_row(params.ensemble, params.batch * params.rows, 1, threads,
               [&](RowLaws& laws, int64_t place) {
                 sample_row(params, laws, place / params.rows, place % params.rows);
               });
}

}  // namespace specens

// SPDX-License-Identifier: Apache-2.0
// `sample`: one sweep of a row for its law, then the draw of a token, which reads one sub-tile
// again; of several tokens, each draw leaves its sub-tile to be summed once more without it.
#include <vector>

#include "draw.h"
#include "leftover.h"

namespace specens {
namespace {

// Tokens of one row that differ.
class Draws {
 public:
  Draws(RowLaws& laws, bool greedy)
      : laws_(laws),
        target_(laws.target()),
        greedy_(greedy),
        best_(laws),
        masses_(target_.masses(), target_.masses() + target_.sub_tiles()) {}

  // The next one, kPadding if there is none.
  int64_t next(const DrawNumbers& numbers) {
    if (target_.empty()) return kPadding;
    if (greedy_) {
      const int64_t token = drawn_.empty() ? laws_.argmax() : best_.argmax();
      if (token != kPadding) best_.exclude(token);
      drawn_.push_back(token);
      return token;
    }
    double left = 0.0;
    for (const double mass : masses_) left += mass;
    if (!(left > 0.0)) return kPadding;
    const int64_t token = draw(masses_.data(), target_.vocab_size(), numbers.value,
                               [&](int sub_tile, double* out) { fill(sub_tile, out); });
    drawn_.push_back(token);
    const int sub_tile = static_cast<int>(token / kSubTile);
    double buffer[kSubTile];
    fill(sub_tile, buffer);
    masses_[sub_tile] = 0.0;
    for (int i = 0; i < target_.count(sub_tile); ++i) masses_[sub_tile] += buffer[i];
    return token;
  }

 private:
  void fill(int sub_tile, double* out) const {
    std::fill_n(out, padded(target_.count(sub_tile)), 0.0);
    target_.add_masses(sub_tile, 1.0, out);
    for (const int64_t token : drawn_) {
      if (token / kSubTile == sub_tile) out[token % kSubTile] = 0.0;
    }
  }

  RowLaws& laws_;
  const RowLaw& target_;
  bool greedy_;
  Leftover best_;
  std::vector<double> masses_;  // of sub-tiles, without what was drawn
  std::vector<int64_t> drawn_;
};

void draw_several(const SampleParams& params, RowLaws& laws, int64_t batch, int64_t row) {
  const int64_t place = (batch * params.rows + row) * params.count;
  Draws draws(laws, greedy_row(params.ensemble, batch));
  Values<float> numbers = params.uniforms;
  for (int64_t i = 0; i < params.count; ++i, numbers.data += params.block_stride) {
    const int64_t token = draws.next(draw_numbers(numbers, batch, row));
    params.tokens[place + i] = token;
    params.log_probs[place + i] =
        static_cast<float>(token == kPadding ? -kInfinity : laws.target().log_probability(token));
  }
}

void sample_row(const SampleParams& params, RowLaws& laws, int64_t batch, int64_t row) {
  if (params.member >= 0) {
    laws.measure_member(batch, row, params.member);
  } else {
    laws.measure_target(batch, row, Proposal{});
  }
  const RowLaw& law = laws.target();
  const int64_t place = batch * params.rows + row;
  params.lse[place] = static_cast<float>(law.lse());
  params.status[place] = laws.status() | (law.empty() ? kEmptyLaw : 0);
  if (params.count > 0) return draw_several(params, laws, batch, row);
  int64_t token = 0;
  if (!law.empty()) {
    token = greedy_row(params.ensemble, batch) ? laws.argmax()
                                               : draw_from(law, params.uniforms, batch, row);
  }
  params.tokens[place] = token;
  params.log_probs[place] = static_cast<float>(law.log_probability(token));
}

}  // namespace

void sample(const SampleParams& params, int threads) {
  for_each_row(params.ensemble, params.batch * params.rows, 1, threads,
               [&](RowLaws& laws, int64_t place) {
                 sample_row(params, laws, place / params.rows, place % params.rows);
               });
}

}  // namespace specens

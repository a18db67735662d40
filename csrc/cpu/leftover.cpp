// SPDX-License-Identifier: Apache-2.0
// Sweeps of a signed mixture: in single precision, unless next to nothing is left.
#include "leftover.h"

#include <algorithm>

#include "draw.h"

namespace specens {
namespace {

// Below this total the rounding of single precision would show in what one rejection leaves, and
// below this one in what several leave, whose tokens and masses are asked for again.
constexpr double kLeastSingle = 1e-4;
constexpr double kLeastSingleOfSeveral = 1e-2;

// What is left of less mass is rounding, and empty; the reference's LEAST_RESIDUAL.
constexpr double kLeast = 0x1p-40;

double sum(const double* values, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}

bool is_cascade(Left left) {
  return left == Left::kCascadeByTarget || left == Left::kCascadeByDraft;
}

}  // namespace

double draft_probability(const RowLaws& laws, const Drafted& drafted, int64_t token) {
  if (!drafted.dense()) return token == drafted.token ? 1.0 : 0.0;
  for (const int64_t other : drafted.gone) {
    if (other == token) return 0.0;
  }
  return drafted.share * laws.draft(drafted.slot).probability(token);
}

void fill_draft(const RowLaws& laws, const Drafted& drafted, int sub_tile, double* out) {
  std::fill_n(out, padded(laws.target().count(sub_tile)), 0.0);
  if (drafted.dense()) {
    laws.draft(drafted.slot).add_masses(sub_tile, drafted.share, out);
    for (const int64_t token : drafted.gone) {
      if (token / kSubTile == sub_tile) out[token % kSubTile] = 0.0;
    }
  } else if (drafted.token / kSubTile == sub_tile) {
    out[drafted.token % kSubTile] = 1.0;
  }
}

double rest_of(RowLaws& laws, const Drafted& drafted) {
  laws.complete_draft();
  const LogitsLaw& law = laws.draft(drafted.slot);
  Drafted alone = drafted;
  alone.share = 1.0;
  double rest = 0.0;
  for (int s = 0; s < law.sub_tiles(); ++s) {
    double mass = law.masses()[s];
    const auto here = [&](int64_t token) { return token / kSubTile == s; };
    if (std::any_of(alone.gone.begin(), alone.gone.end(), here)) {
      double buffer[kSubTile];
      fill_draft(laws, alone, s, buffer);
      mass = sum(buffer, law.count(s));
    }
    rest += mass;
  }
  return rest;
}

// Writes the signed mixture of this state's coefficients as a sum of parts.
void Leftover::combine(State& state) const {
  state.num_parts = laws_->target().parts(state.parts);
  state.on_target = state.num_parts == 0;
  for (int slot = 0; slot <= kMaxMembers; ++slot) {
    const double coefficient = state.coefficients[slot];
    if (coefficient == 0.0 || laws_->draft(slot).empty()) continue;
    const LogitsLaw* law = &laws_->draft(slot);
    Part* end = state.parts + state.num_parts;
    Part* part = std::find_if(state.parts, end, [&](const Part& one) { return one.law == law; });
    if (part == end) *part = {law, 0.0};
    if (part == end) ++state.num_parts;
    part->share -= coefficient;
  }
}

bool Leftover::is_excluded(const State& state, int sub_tile) const {
  return std::any_of(state.excluded.begin(), state.excluded.end(),
                     [&](int64_t token) { return token / kSubTile == sub_tile; });
}

void Leftover::defer(const Deferral& deferral, int sub_tile, double* out) const {
  double drafted[kSubTile];
  fill_draft(*laws_, deferral.drafted, sub_tile, drafted);
  for (int i = 0; i < laws_->target().count(sub_tile); ++i) {
    const double before = std::max(out[i], 0.0) / deferral.divisor;
    const double seen = deferral.left == Left::kCascadeByTarget ? before : drafted[i];
    if (seen < deferral.bound) out[i] -= deferral.factor * drafted[i];
  }
}

// Masses of a sub-tile, not normalised.
void Leftover::fill_raw(const State& state, int sub_tile, double* out) const {
  const int count = laws_->target().count(sub_tile);
  std::fill_n(out, padded(count), 0.0);
  if (state.whole || state.on_target) laws_->target().add_masses(sub_tile, 1.0, out);
  for (int k = 0; k < state.num_parts; ++k) {
    state.parts[k].law->add_masses(sub_tile, state.parts[k].share, out);
  }
  for (const Deferral& deferral : state.deferrals) defer(deferral, sub_tile, out);
  for (int i = 0; i < count; ++i) out[i] = out[i] > 0.0 ? out[i] : 0.0;
  for (const int64_t token : state.excluded) {
    if (token / kSubTile == sub_tile) out[token % kSubTile] = 0.0;
  }
}

double Leftover::raw(const State& state, int64_t token) const {
  for (const int64_t other : state.excluded) {
    if (other == token) return 0.0;
  }
  double mass = state.on_target ? laws_->target().probability(token) : 0.0;
  for (int k = 0; k < state.num_parts; ++k) {
    mass += state.parts[k].share * state.parts[k].law->probability(token);
  }
  for (const Deferral& deferral : state.deferrals) {
    const double drafted = draft_probability(*laws_, deferral.drafted, token);
    const double before = std::max(mass, 0.0) / deferral.divisor;
    const double seen = deferral.left == Left::kCascadeByTarget ? before : drafted;
    if (seen < deferral.bound) mass -= deferral.factor * drafted;
  }
  return mass > 0.0 ? mass : 0.0;
}

double Leftover::measure(const State& state, int sub_tile) const {
  double buffer[kSubTile];
  fill_raw(state, sub_tile, buffer);
  return sum(buffer, laws_->target().count(sub_tile));
}

bool Leftover::reject(const Drafted& drafted, const Judgement& judgement, bool exactly) {
  laws_->complete_draft();
  const RowLaw& target = laws_->target();
  const bool takes = judgement.left != Left::kTarget;
  const double scale = takes ? judgement.scale : 1.0;
  mass_ = 0.0;
  if (scale == 0.0) return false;
  if (!takes && !judgement.without_token) return true;
  State next = state_;
  next.whole = false;
  const bool sweeps = takes && drafted.dense();
  if (judgement.without_token || (takes && !drafted.dense())) {
    next.excluded.push_back(drafted.token);
  }
  const double factor = state_.divisor / scale;
  if (sweeps && is_cascade(judgement.left)) {
    next.deferrals.push_back({judgement.left, judgement.bound, drafted, state_.divisor, factor});
  } else if (sweeps) {
    next.coefficients[drafted.slot] += factor * drafted.share;
  }
  combine(next);
  const int sub_tiles = target.sub_tiles();
  const bool single = !exactly && sweeps && !is_cascade(judgement.left);
  if (single && (next.on_target || laws_->draft(drafted.slot).empty())) return false;
  std::unique_ptr<double[]> masses(new double[sub_tiles]);
  if (sweeps) {
    laws_->team().for_each(sub_tiles, kSubTilesPerPiece, [&](int, int64_t index) {
      const int sub_tile = static_cast<int>(index);
      masses[index] = this->masses()[index] == 0.0 ? 0.0
                      : single && !is_excluded(next, sub_tile)
                          ? positive_mass(next.parts, next.num_parts, sub_tile)
                          : measure(next, sub_tile);
    });
  } else {
    const int sub_tile = static_cast<int>(drafted.token / kSubTile);
    std::copy_n(this->masses(), sub_tiles, masses.get());
    masses[sub_tile] = measure(next, sub_tile);
  }
  const double total = sum(masses.get(), sub_tiles);
  mass_ = scale * total / state_.divisor;
  next.chance *= mass_;
  const double least = !single ? kLeast : state_.whole ? kLeastSingle : kLeastSingleOfSeveral;
  if (!(next.chance > least)) return false;
  next.divisor = total;
  state_ = std::move(next);
  masses_ = std::move(masses);
  return true;
}

void Leftover::exclude(int64_t token) {
  state_.whole = false;
  state_.excluded.push_back(token);
  combine(state_);
}

double Leftover::probability(int64_t token) const {
  return whole() ? laws_->target().probability(token) : raw(state_, token) / state_.divisor;
}

void Leftover::fill(int sub_tile, double* out) const {
  fill_raw(state_, sub_tile, out);
  if (state_.divisor == 1.0) return;
  for (int i = 0; i < laws_->target().count(sub_tile); ++i) out[i] /= state_.divisor;
}

double Leftover::bound(int sub_tile) const {
  // Sub-tiles' masses are of single precision.
  return masses()[sub_tile] * (1.0 + 1e-5) / state_.divisor;
}

double Leftover::highest() const {
  const RowLaw& target = laws_->target();
  if (whole()) return target.highest();
  return largest_mass(*laws_, [&](int sub_tile, double* out) { fill(sub_tile, out); });
}

int64_t Leftover::draw_from(const double (&numbers)[3]) const {
  return draw(masses(), laws_->target().vocab_size(), numbers,
              [&](int sub_tile, double* out) { fill(sub_tile, out); });
}

int64_t Leftover::argmax() const {
  laws_->refine();
  const double most = highest();
  if (!(most > 0.0)) return kPadding;
  const double tied = least(most);
  for (int s = 0; s < laws_->target().sub_tiles(); ++s) {
    if (bound(s) < tied) continue;
    double here[kSubTile];
    fill(s, here);
    double* end = here + laws_->target().count(s);
    double* place = std::find_if(here, end, [&](double mass) { return mass >= tied; });
    if (place != end) return static_cast<int64_t>(s) * kSubTile + (place - here);
  }
  return kPadding;
}

}  // namespace specens

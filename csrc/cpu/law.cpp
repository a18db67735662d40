// SPDX-License-Identifier: Apache-2.0
// What warped laws share, whatever their values are: sweeps, normalisers and masses; and sums of
// laws.
#include "law.h"

#include <algorithm>
#include <cmath>

#include "logits_law.h"

namespace specens {

float round_up(double x) {
  const auto nearest = static_cast<float>(x);
  return nearest < x ? std::nextafterf(nearest, static_cast<float>(kInfinity)) : nearest;
}

void WarpedLaw::warp(double temperature, const Filter& filter) {
  hard_ = !(temperature > 0.0);
  temperature_ = hard_ ? 1.0 : temperature;
  inverse_temperature_ = 1.0 / temperature_;
  filter_ = filter;
  cut_ = false;
  cutoff_ = -kInfinity;
}

void WarpedLaw::take_lse() {
  empty_ = false;
  // Likely tokens are near it, where single precision is at its best; and it is a float, as logits
  // are, which single precision does not round.
  top_ = static_cast<double>(static_cast<float>(lse_ * temperature_));
  log_sum_ = lse_ - top_ * inverse_temperature_;
}

double WarpedLaw::lse() const {
  return empty_ ? -kInfinity : top_ * inverse_temperature_ + log_sum_;
}

void WarpedLaw::scan(int sub_tile) {
  Peak& peak = peaks_[sub_tile];
  peak = cut_ && peak.max < cutoff_ ? Peak{-kInfinity, 0.0} : statistics(sub_tile);
}

void WarpedLaw::scan_all(const Team& team) {
  team.for_each(sub_tiles_, kSubTilesPerPiece, [&](int, int64_t s) { scan(static_cast<int>(s)); });
}

void WarpedLaw::find_top() {
  top_ = -kInfinity;
  for (int s = 0; s < sub_tiles_; ++s) top_ = std::max(top_, peaks_[s].max);
}

void WarpedLaw::find_cutoff(const Team& team) {
  cut_ = has_cutoff();
  if (cut_) cutoff_ = hard_ ? top_ : filter_cutoff(*this, team);
}

void WarpedLaw::normalise() {
  const bool given = !std::isnan(lse_);
  find_top();
  empty_ = top_ == -kInfinity;
  if (empty_) {
    std::fill_n(masses_, sub_tiles_, 0.0);
    if (given) {
      take_lse();
      log_sum_ = kInfinity;  // the largest probability is 0
    }
    return;
  }
  for (int s = 0; s < padded(sub_tiles_); ++s) {
    masses_[s] = s < sub_tiles_ ? peaks_[s].max : -kInfinity;
  }
  kernels().score_masses(masses_, sub_tiles_, -kInfinity, {top_, inverse_temperature_, 0.0});
  double sum = 0.0;
  for (int s = 0; s < sub_tiles_; ++s) sum += masses_[s] *= peaks_[s].sum;
  log_sum_ = given ? lse_ - top_ * inverse_temperature_ : logarithm(sum);
  if (given) sum = exponential(log_sum_);
  for (int s = 0; s < sub_tiles_; ++s) masses_[s] /= sum;
}

void WarpedLaw::refine(const Team& team) {
  if (empty_) return;
  const bool given = !std::isnan(lse_);
  if (!given) log_sum_ = 0.0;
  team.for_each(sub_tiles_, kSubTilesPerPiece, [&](int, int64_t index) {
    const int s = static_cast<int>(index);
    double masses[kSubTile];
    std::fill_n(masses, padded(count(s)), 0.0);
    if (masses_[s] > 0.0) add_masses(s, 1.0, masses);
    masses_[s] = 0.0;
    for (int i = 0; i < count(s); ++i) masses_[s] += masses[i];
  });
  if (given) return;
  double sum = 0.0;
  for (int s = 0; s < sub_tiles_; ++s) sum += masses_[s];
  for (int s = 0; s < sub_tiles_; ++s) masses_[s] /= sum;
  log_sum_ = logarithm(sum);
}

void WarpedLaw::weigh(int sub_tile, const double* edges, double high, Weighing weighing,
                      double* out) const {
  double collected[kSubTile], masses[kSubTile];
  const int size = collect(sub_tile, edges[kEdges - 1], high, collected);
  std::fill_n(masses, size, 1.0);
  if (weighing != Weighing::kCount) {
    std::copy_n(collected, size, masses);
    std::fill(masses + size, masses + padded(size), -kInfinity);
    kernels().score_masses(masses, size, -kInfinity, {top_, inverse_temperature_, 0.0});
  }
  const int whole = (size + 7) / 8 * 8;
  std::fill(collected + size, collected + whole, 0.0);
  std::fill(masses + size, masses + whole, 0.0);
  for (int e = 0; e < kEdges; ++e) {
    double sums[8] = {};
    for (int i = 0; i < whole; i += 8) {
      for (int j = 0; j < 8; ++j) sums[j] += collected[i + j] >= edges[e] ? masses[i + j] : 0.0;
    }
    out[e] =
        ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  }
}

double WarpedLaw::log_probability(int64_t token) const {
  if (empty_) return -kInfinity;
  const double here = value(token);
  return here < cutoff_ ? -kInfinity : affine()(here);
}

double WarpedLaw::probability(int64_t token) const { return exponential(log_probability(token)); }

double WarpedLaw::highest() const { return empty_ ? 0.0 : exponential(-log_sum_); }

void WarpedLaw::add_masses(int sub_tile, double weight, double* out) const {
  if (empty_) return;
  double scores[kSubTile];
  values(sub_tile, scores);
  kernels().score_masses(scores, count(sub_tile), cutoff_, affine());
  for (int i = 0; i < count(sub_tile); ++i) out[i] += weight * scores[i];
}

void WarpedLaw::log_probabilities(int sub_tile, double* out) const {
  const int size = count(sub_tile);
  if (empty_) {
    std::fill_n(out, size, -kInfinity);
    return;
  }
  values(sub_tile, out);
  const Affine law = affine();
  for (int i = 0; i < size; ++i) out[i] = out[i] < cutoff_ ? -kInfinity : law(out[i]);
}

double positive_mass(const Part* parts, int count, int sub_tile) {
  float scratch[kMaxSigned][kSubTile];
  Term terms[kMaxSigned];
  bool one_dtype = true;
  for (int k = 0; k < count; ++k) {
    terms[k] = parts[k].law->term(sub_tile, parts[k].share, scratch[k]);
    one_dtype &= terms[k].span.dtype == terms[0].span.dtype;
  }
  for (int k = 0; k < count && !one_dtype; ++k) {
    if (terms[k].span.dtype == DType::kFloat32) continue;
    kernels().clean(terms[k].span, Cleaning::kNone, 0.0f, scratch[k]);
    terms[k].span = {scratch[k], DType::kFloat32, terms[k].span.count};
  }
  return kernels().positive_mass(terms, count);
}

}  // namespace specens

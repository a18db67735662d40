// SPDX-License-Identifier: Apache-2.0
// A mixture asks its parts for everything; what is searched for, the most probable token or a
// filter's cutoff, is bounded by the peaks of the parts first.
#include "mixture_law.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

namespace specens {
namespace {

// Single-precision masses of a mixture are closer than this to the true ones, unless they are
// negligible.
constexpr double kCandidateSlack = 1e-5;
constexpr double kNegligible = 1e-30;

// The order of rounding in bounds of mixtures differs from that of the masses they bound.
constexpr double kBoundSlack = 1e-12;

}  // namespace

void MixtureLaw::clear() {
  num_parts_ = 0;
  status_ = 0;
}

void MixtureLaw::add_part(const LogitsLaw& part, double weight) {
  status_ |= part.status();
  if (!part.empty()) parts_[num_parts_++] = {&part, weight};
}

void MixtureLaw::finish_shares() {
  double total = 0.0;
  for (int k = 0; k < num_parts_; ++k) total += parts_[k].share;
  empty_ = !(total > 0.0);
  if (empty_) num_parts_ = 0;
  for (int k = 0; k < num_parts_; ++k) parts_[k].share /= total;
}

void MixtureLaw::finish() {
  finish_shares();
  double total = 0.0;
  for (int s = 0; s < sub_tiles_; ++s) {
    double mass = 0.0;
    for (int k = 0; k < num_parts_; ++k) mass += parts_[k].share * parts_[k].law->masses()[s];
    total += masses_[s] = mass;
  }
  empty_ = total == 0.0;  // a part whose normaliser was given is never empty, but may have no mass
}

bool MixtureLaw::has_part(const LogitsLaw& part) const {
  return std::any_of(parts_, parts_ + num_parts_,
                     [&](const Part& own) { return own.law == &part; });
}

int MixtureLaw::parts(Part* out) const {
  std::copy_n(parts_, num_parts_, out);
  return num_parts_;
}

double MixtureLaw::most(int sub_tile) const {
  double mass = 0.0;
  for (int k = 0; k < num_parts_; ++k) mass += parts_[k].share * parts_[k].law->peak_mass(sub_tile);
  return mass;
}

double MixtureLaw::attained(int sub_tile) const {
  double mass = 0.0;
  for (int k = 0; k < num_parts_; ++k) {
    mass = std::max(mass, parts_[k].share * parts_[k].law->peak_mass(sub_tile));
  }
  return mass;
}

int MixtureLaw::candidates(int sub_tile, double low, double high, double* out) const {
  float scratch[kMaxMembers][kSubTile];
  Term terms[kMaxMembers];
  for (int k = 0; k < num_parts_; ++k) {
    terms[k] = parts_[k].law->term(sub_tile, parts_[k].share, scratch[k]);
  }
  const double least = exponential(low) * (1.0 - kCandidateSlack);
  const double most = exponential(std::min(high, 1.0)) * (1.0 + kCandidateSlack);
  uint16_t places[kSubTile];
  const int size =
      kernels().select(terms, num_parts_, least < kNegligible ? 0.0f : static_cast<float>(least),
                       static_cast<float>(most), places);
  std::fill_n(out, padded(size), 0.0);
  for (int k = 0; k < num_parts_; ++k) {
    const Term& term = terms[k];
    float gathered[kSubTile];
    for (int i = 0; i < size; ++i) {
      gathered[i] = load_value(term.span.data, term.span.dtype, places[i]);
    }
    kernels().add_masses({gathered, DType::kFloat32, size}, term.cutoff, term.law, term.share, out);
  }
  kernels().logarithms(out, size);
  return size;
}

double MixtureLaw::probability(int64_t token) const {
  double mass = 0.0;
  for (int k = 0; k < num_parts_; ++k) mass += parts_[k].share * parts_[k].law->probability(token);
  return mass;
}

double MixtureLaw::log_probability(int64_t token) const {
  return empty_ ? -kInfinity : logarithm(probability(token));
}

double MixtureLaw::highest() const { return argmax(0.0).mass; }

// Looks into sub-tiles from the highest bound down, until no bound is left that reaches the best.
Argmax MixtureLaw::argmax(double tie) const {
  if (empty_) return {};
  std::unique_ptr<double[]> bounds(new double[sub_tiles_]);
  for (int s = 0; s < sub_tiles_; ++s) bounds[s] = most(s);
  const double least = 1.0 - std::max(tie, kBoundSlack);
  Argmax best = {0, -1.0, false};
  std::vector<Argmax> seen;  // what came close to the best of its time
  for (;;) {
    const int s =
        static_cast<int>(std::max_element(bounds.get(), bounds.get() + sub_tiles_) - bounds.get());
    if (!(bounds[s] >= best.mass * least) || bounds[s] < 0.0) break;
    bounds[s] = -1.0;
    double masses[kSubTile] = {};
    add_masses(s, 1.0, masses);
    best.mass = std::max(best.mass, *std::max_element(masses, masses + count(s)));
    for (int i = 0; i < count(s); ++i) {
      if (masses[i] < best.mass * (1.0 - tie)) continue;
      seen.push_back({static_cast<int64_t>(s) * kSubTile + i, masses[i], false});
    }
  }
  int ties = 0;
  for (const Argmax& close : seen) {
    if (close.mass < best.mass * (1.0 - tie)) continue;
    if (ties++ == 0 || close.token < best.token) best.token = close.token;
  }
  best.tied = ties > 1;
  return best;
}

void MixtureLaw::add_masses(int sub_tile, double weight, double* out) const {
  if (empty_) return;
  for (int k = 0; k < num_parts_; ++k) {
    parts_[k].law->add_masses(sub_tile, weight * parts_[k].share, out);
  }
}

void MixtureLaw::log_probabilities(int sub_tile, double* out) const {
  std::fill_n(out, padded(count(sub_tile)), 0.0);
  add_masses(sub_tile, 1.0, out);
  kernels().logarithms(out, count(sub_tile));
}

void WarpedMixture::set(const MixtureLaw& mixture, double temperature, const Filter& filter,
                        const Team& team) {
  mixture_ = &mixture;
  status_ = mixture.status();
  warp(temperature, filter);
  top_ = logarithm(mixture.highest());
  for (int s = 0; s < sub_tiles_; ++s) {
    peaks_[s] = {logarithm(mixture.most(s)) + kBoundSlack, 1.0};
    masses_[s] = logarithm(mixture.attained(s)) - kBoundSlack;
  }
  find_cutoff(team);
  scan_all(team);
  normalise();
}

int WarpedMixture::collect(int sub_tile, double low, double high, double* out) const {
  const int size = mixture_->candidates(sub_tile, low, high, out);
  const auto outside = [&](double value) { return !(value >= low && value < high); };
  return static_cast<int>(std::remove_if(out, out + size, outside) - out);
}

double WarpedMixture::rough_mass() const {
  return temperature_ == 1.0 ? exponential(-top_) : std::nan("");
}

Argmax WarpedMixture::argmax(double tie) const { return empty_ ? Argmax{} : mixture_->argmax(tie); }

Peak WarpedMixture::statistics(int sub_tile) const {
  double scores[kSubTile];
  values(sub_tile, scores);
  return kernels().score_statistics(scores, count(sub_tile), cutoff_, inverse_temperature_);
}

}  // namespace specens

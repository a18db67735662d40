// SPDX-License-Identifier: Apache-2.0
// A sweep of healthy rows runs without branches; a NaN or +inf shows in its sums and sends the law
// through `repair` and a second sweep.
#include "logits_law.h"

#include <algorithm>
#include <cmath>

namespace specens {
namespace {

constexpr float kInfinityF = std::numeric_limits<float>::infinity();

// Of a law that is given; what is none counts as 0.
bool is_probability(float value) { return value > 0.0f && value < kInfinityF; }

float cleaned(float value, Cleaning cleaning, float threshold) {
  if (cleaning == Cleaning::kNone) return value;
  if (cleaning == Cleaning::kLogarithm) {
    return is_probability(value) ? static_cast<float>(logarithm(value)) : -kInfinityF;
  }
  if (std::isnan(value)) value = -kInfinityF;
  if (cleaning == Cleaning::kInfinite) return value == kInfinityF ? 0.0f : -kInfinityF;
  if (cleaning == Cleaning::kMask) return value < threshold ? -kInfinityF : 0.0f;
  return value;
}

}  // namespace

float Source::value(int64_t token) const {
  const float raw = cleaned(load_value(row, dtype, token), cleaning, threshold);
  return raw < cutoff ? -kInfinityF : raw;
}

void LogitsLaw::set(double temperature, const Filter& filter) {
  num_sources_ = 0;
  infinite_wins_ = false;
  repaired_ = false;
  infinite_ = false;
  status_ = 0;
  lse_ = std::nan("");
  warp(temperature, filter);
}

Source& LogitsLaw::add_source(const void* row, DType dtype, double weight) {
  Source& source = sources_[num_sources_++];
  source = Source{static_cast<const char*>(row), dtype, weight};
  return source;
}

void LogitsLaw::set_nan(Source& source) {
  source.cleaning = Cleaning::kNan;
  status_ |= kNanLogits;
}

void LogitsLaw::set_lse(double lse) {
  lse_ = lse;
  take_lse();
}

double LogitsLaw::lse() const { return infinite_ && !empty_ ? kInfinity : WarpedLaw::lse(); }

int LogitsLaw::parts(Part* out) const {
  out[0] = {this, 1.0};
  return 1;
}

Span LogitsLaw::raw_span(const Source& source, int sub_tile) const {
  const int64_t begin = static_cast<int64_t>(sub_tile) * kSubTile;
  return {source.row + begin * element_size(source.dtype), source.dtype, count(sub_tile)};
}

Span LogitsLaw::span(const Source& source, int sub_tile, float* scratch) const {
  const Span raw = raw_span(source, sub_tile);
  if (source.cleaning == Cleaning::kNone) return raw;
  kernels().clean(raw, source.cleaning, source.threshold, scratch);
  return {scratch, DType::kFloat32, raw.count};
}

// The values of a sub-tile; true if a NaN or +inf was seen that `repair` has not.
bool LogitsLaw::fold(int sub_tile, double* out) const {
  const int size = count(sub_tile);
  bool plain = true;
  for (int k = 0; k < num_sources_; ++k) {
    plain &= sources_[k].dtype == sources_[0].dtype && sources_[k].cleaning == Cleaning::kNone;
  }
  bool odd = false;
  if (num_sources_ == 0) {
    std::fill_n(out, size, 0.0);
  } else if (plain) {
    odd = fold_spans(sub_tile, nullptr, out);
  } else {
    float scratch[kMaxTerms][kSubTile];
    odd = fold_spans(sub_tile, scratch, out);
  }
  std::fill(out + size, out + padded(size), -kInfinity);
  if (repaired_) kernels().settle(out, size, infinite_ && !one_member());
  return odd && !repaired_;
}

// With `scratch`, every source is rewritten there first.
bool LogitsLaw::fold_spans(int sub_tile, float (*scratch)[kSubTile], double* out) const {
  Logit terms[kMaxTerms];
  for (int k = 0; k < num_sources_; ++k) {
    const Source& source = sources_[k];
    Span here = raw_span(source, sub_tile);
    if (scratch != nullptr) {
      kernels().clean(here, source.cleaning, source.threshold, scratch[k]);
      here = {scratch[k], DType::kFloat32, here.count};
    }
    terms[k] = {here, source.cutoff, source.weight};
  }
  return kernels().fold(terms, num_sources_, out);
}

Peak LogitsLaw::statistics(int sub_tile) const {
  if (one_member()) {
    float scratch[kSubTile];
    const Span here = span(sources_[0], sub_tile, scratch);
    return has_cutoff() && !cut_ && !filter_.by_mass()
               ? kernels().maximum(here)
               : kernels().statistics(here, member_cutoff(), inverse_temperature_);
  }
  // By cache lines, which a vector's store would else split.
  alignas(64) double scores[kSubTile];
  const bool odd = fold(sub_tile, scores);
  Peak peak = kernels().score_statistics(scores, count(sub_tile), cutoff_, inverse_temperature_);
  if (odd) peak.sum = std::nan("");
  return peak;
}

bool LogitsLaw::odd() const {
  for (int s = 0; s < sub_tiles_; ++s) {
    if (std::isnan(peaks_[s].sum)) return true;
  }
  return false;
}

void LogitsLaw::repair(const Team& team) {
  for (int k = 0; k < num_sources_; ++k) {
    Source& source = sources_[k];
    bool nan = false, infinite = false;
    for (int64_t token = 0; token < vocab_size_; ++token) {
      const float value = load_value(source.row, source.dtype, token);
      nan |= std::isnan(value);
      infinite |= value == kInfinityF;
    }
    if (source.cleaning == Cleaning::kMask) continue;
    status_ |= (nan ? kNanLogits : 0) | (infinite ? kInfiniteLogits : 0);
    if (nan) source.cleaning = Cleaning::kNan;
    if (infinite && one_member()) {
      source.cleaning = Cleaning::kInfinite;
      source.cutoff = -kInfinityF;
      infinite_ = true;
    } else if (infinite && infinite_wins_) {
      source.cutoff = kInfinityF;
    }
  }
  repaired_ = true;
  scan_all(team);
  if (!odd()) return;
  infinite_ = true;
  scan_all(team);
}

void LogitsLaw::find_cutoff(const Team& team) {
  if (!infinite_) return WarpedLaw::find_cutoff(team);
  cut_ = has_cutoff();
  if (cut_) top_ = 0.0;
}

void LogitsLaw::measure(LogitsLaw* const* laws, int count, const Team& team, bool tops_only) {
  if (count == 0) return;
  const int sub_tiles = laws[0]->sub_tiles_;
  const auto sweep = [&](bool cut) {
    LogitsLaw* swept[kMaxMembers + 2];
    int size = 0;
    for (int k = 0; k < count; ++k) {
      if (laws[k]->cut_ == cut) swept[size++] = laws[k];
    }
    team.for_each(static_cast<int64_t>(size) * sub_tiles, kSubTilesPerPiece,
                  [&](int, int64_t unit) {
                    swept[unit / sub_tiles]->scan(static_cast<int>(unit % sub_tiles));
                  });
  };
  sweep(false);
  for (int k = 0; k < count; ++k) {
    if (laws[k]->odd()) laws[k]->repair(team);
    laws[k]->find_top();
    laws[k]->find_cutoff(team);
  }
  if (tops_only) return;
  sweep(true);
  for (int k = 0; k < count; ++k) laws[k]->normalise();
}

double LogitsLaw::rough_mass() const {
  double sum = 0.0;
  for (int s = 0; s < sub_tiles_; ++s) {
    if (peaks_[s].sum == 0.0) continue;
    sum += peaks_[s].sum * exponential((peaks_[s].max - top_) * inverse_temperature_);
  }
  return sum;
}

int LogitsLaw::collect_member(int sub_tile, double low, double high, float* out) const {
  float scratch[kSubTile];
  const float least = std::max(round_up(low), sources_[0].cutoff);
  return kernels().collect(span(sources_[0], sub_tile, scratch), least, round_up(high), out);
}

int LogitsLaw::collect(int sub_tile, double low, double high, double* out) const {
  if (one_member()) {
    float collected[kSubTile + kLanes];
    const int size = collect_member(sub_tile, low, high, collected);
    std::copy_n(collected, size, out);
    return size;
  }
  fold(sub_tile, out);
  const auto outside = [&](double value) { return !(value >= low && value < high); };
  return static_cast<int>(std::remove_if(out, out + count(sub_tile), outside) - out);
}

void LogitsLaw::weigh(int sub_tile, const double* edges, double high, Weighing weighing,
                      double* out) const {
  if (!one_member() || weighing == Weighing::kMass) {
    WarpedLaw::weigh(sub_tile, edges, high, weighing, out);
    return;
  }
  float collected[kSubTile + kLanes], least[kEdges];
  const int size = collect_member(sub_tile, edges[kEdges - 1], high, collected);
  for (int i = 0; i < kEdges; ++i) least[i] = round_up(edges[i]);
  kernels().weigh(collected, size, least, weighing != Weighing::kCount, affine(), out);
}

// In double precision, where single precision would round a logarithm.
double LogitsLaw::given_probability(int64_t token) const {
  const float given = load_value(sources_[0].row, sources_[0].dtype, token);
  return is_probability(given) ? given : 0.0;
}

double LogitsLaw::value(int64_t token) const {
  if (is_given()) return logarithm(given_probability(token));
  double folded = 0.0;
  bool vetoed = false;
  for (int k = 0; k < num_sources_; ++k) {
    const double value = sources_[k].value(token);
    vetoed |= value == -kInfinity;
    folded += sources_[k].weight * value;
  }
  if (vetoed || std::isnan(folded)) return -kInfinity;
  if (infinite_ && !one_member()) return folded == kInfinity ? 0.0 : -kInfinity;
  return folded;
}

Argmax LogitsLaw::argmax(double /*tie*/) const {
  if (empty_) return {};
  const Affine law = affine();
  const double best = law(top_) - kTieGap;
  for (int s = 0; s < sub_tiles_; ++s) {
    if (law(peaks_[s].max) < best) continue;
    double scores[kSubTile];
    fold(s, scores);
    for (int i = 0; i < count(s); ++i) {
      if (law(scores[i]) >= best) return {static_cast<int64_t>(s) * kSubTile + i};
    }
  }
  return {};
}

void LogitsLaw::add_masses(int sub_tile, double weight, double* out) const {
  if (empty_) return;
  if (!one_member()) {
    WarpedLaw::add_masses(sub_tile, weight, out);
    return;
  }
  if (is_given()) {
    const int64_t begin = static_cast<int64_t>(sub_tile) * kSubTile;
    for (int i = 0; i < count(sub_tile); ++i) out[i] += weight * given_probability(begin + i);
    return;
  }
  float scratch[kSubTile];
  kernels().add_masses(span(sources_[0], sub_tile, scratch), member_cutoff(), affine(), weight,
                       out);
}

Term LogitsLaw::term(int sub_tile, double share, float* scratch) const {
  const double weight = share * exponential(-log_sum_);
  if (one_member()) {
    return {span(sources_[0], sub_tile, scratch), member_cutoff(), affine(), share, weight};
  }
  double scores[kSubTile];
  fold(sub_tile, scores);
  kernels().below(scores, count(sub_tile), cutoff_, top_, scratch);
  const Span below = {scratch, DType::kFloat32, count(sub_tile)};
  return {below, -kInfinityF, {0.0, inverse_temperature_, log_sum_}, share, weight};
}

}  // namespace specens

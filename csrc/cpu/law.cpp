// SPDX-License-Identifier: Apache-2.0
// Laws: sweeps, normalisers, single tokens and single sub-tiles. A sweep of healthy rows runs
// without branches; a NaN or +inf shows in its sums and sends the law through `repair` and a second
// sweep.
#include "law.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace specens {
namespace {

constexpr float kInfinityF = std::numeric_limits<float>::infinity();

// Fetching a finished sub-tile costs too little to be worth less than this many at a time.
constexpr int kSubTilesPerPiece = 8;

// Single-precision masses of a mixture are closer than this to the true ones, unless they are
// negligible.
constexpr double kCandidateSlack = 1e-5;
constexpr double kNegligible = 1e-30;

// Log-probabilities this close, in nats, are tied; the reference's TIE. Single-precision
// normalisers cannot tell apart what is nearer than the second.
constexpr double kTie = 0x1p-40;
constexpr double kNearTie = 1e-6;

// The order of rounding in bounds of mixtures differs from that of the masses they bound.
constexpr double kBoundSlack = 1e-12;

float cleaned(float value, Cleaning cleaning, float threshold) {
  if (cleaning == Cleaning::kNone) return value;
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

float round_up(double x) {
  const auto nearest = static_cast<float>(x);
  return nearest < x ? std::nextafterf(nearest, kInfinityF) : nearest;
}

// --- what a law is ---

void Law::attach(int64_t vocab_size, Peak* peaks, double* masses) {
  vocab_size_ = vocab_size;
  sub_tiles_ = static_cast<int>((vocab_size + kSubTile - 1) / kSubTile);
  peaks_ = peaks;
  masses_ = masses;
}

void Law::warp(double temperature, const Filter& filter) {
  hard_ = !(temperature > 0.0);
  temperature_ = hard_ ? 1.0 : temperature;
  inverse_temperature_ = 1.0 / temperature_;
  filter_ = filter;
  cut_ = false;
  cutoff_ = -kInfinity;
}

void Law::set_logits(double temperature, const Filter& filter) {
  is_mixture_ = false;
  warped_ = true;
  num_sources_ = 0;
  infinite_wins_ = false;
  repaired_ = false;
  infinite_ = false;
  status_ = 0;
  lse_ = std::nan("");
  warp(temperature, filter);
}

void Law::set_lse(double lse) {
  lse_ = lse;
  empty_ = false;
  // Likely tokens are near it, where single precision is at its best; and it is a float, as logits
  // are, which single precision does not round.
  top_ = static_cast<double>(static_cast<float>(lse * temperature_));
  log_sum_ = lse - top_ * inverse_temperature_;
}

Source& Law::add_source(const void* row, DType dtype, double weight) {
  Source& source = sources_[num_sources_++];
  source = Source{static_cast<const char*>(row), dtype, weight};
  return source;
}

void Law::set_nan(Source& source) {
  source.cleaning = Cleaning::kNan;
  status_ |= kNanLogits;
}

void Law::set_mixture() {
  lse_ = std::nan("");
  is_mixture_ = true;
  warped_ = false;
  num_parts_ = 0;
  infinite_ = false;
  repaired_ = false;
  status_ = 0;
  warp(1.0, Filter{});
}

void Law::add_part(const Law& part, double weight) {
  status_ |= part.status_;
  if (part.empty_) return;
  parts_[num_parts_] = &part;
  shares_[num_parts_++] = weight;
}

void Law::finish_shares() {
  double total = 0.0;
  for (int k = 0; k < num_parts_; ++k) total += shares_[k];
  empty_ = !(total > 0.0);
  if (empty_) num_parts_ = 0;
  for (int k = 0; k < num_parts_; ++k) shares_[k] /= total;
}

void Law::finish() {
  finish_shares();
  double total = 0.0;
  for (int s = 0; s < sub_tiles_; ++s) {
    double mass = 0.0;
    for (int k = 0; k < num_parts_; ++k) mass += shares_[k] * parts_[k]->masses_[s];
    total += masses_[s] = mass;
  }
  empty_ = total == 0.0;  // a part whose normaliser was given is never empty, but may have no mass
}

void Law::finish_warped(double temperature, const Filter& filter, const Team& team) {
  finish();
  if (empty_) return;
  const double best = mixture_argmax(0.0).mass;
  warped_ = true;
  warp(temperature, filter);
  top_ = logarithm(best);
  for (int s = 0; s < sub_tiles_; ++s) {
    double attained = 0.0;
    for (int k = 0; k < num_parts_; ++k) {
      const Law& part = *parts_[k];
      const double mass = exponential(part.affine()(part.peaks_[s].max));
      attained = std::max(attained, shares_[k] * mass);
    }
    peaks_[s] = {logarithm(bound(s)) + kBoundSlack, 1.0};
    masses_[s] = logarithm(attained) - kBoundSlack;
  }
  find_cutoff(team);
  scan_all(team);
  normalise();
}

bool Law::is_made_of(const Law& part) const {
  return is_mixture_ && !warped_ &&
         std::find(parts_, parts_ + num_parts_, &part) != parts_ + num_parts_;
}

double Law::value_top() const { return infinite_ ? kInfinity : top_; }

double Law::lse() const {
  if (empty_) return -kInfinity;
  if (!warped_) return 0.0;
  return infinite_ ? kInfinity : top_ * inverse_temperature_ + log_sum_;
}

// --- sweeps ---

Span Law::raw_span(const Source& source, int sub_tile) const {
  const int64_t begin = static_cast<int64_t>(sub_tile) * kSubTile;
  return {source.row + begin * element_size(source.dtype), source.dtype, count(sub_tile)};
}

Span Law::span(const Source& source, int sub_tile, float* scratch) const {
  const Span raw = raw_span(source, sub_tile);
  if (source.cleaning == Cleaning::kNone) return raw;
  kernels().clean(raw, source.cleaning, source.threshold, scratch);
  return {scratch, DType::kFloat32, raw.count};
}

float Law::member_cutoff() const { return std::max(sources_[0].cutoff, round_up(cutoff_)); }

bool Law::fold(int sub_tile, double* out) const {
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
bool Law::fold_spans(int sub_tile, float (*scratch)[kSubTile], double* out) const {
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

void Law::values(int sub_tile, double* out) const {
  if (!is_mixture_) {
    fold(sub_tile, out);
    return;
  }
  std::fill_n(out, padded(count(sub_tile)), 0.0);
  for (int k = 0; k < num_parts_; ++k) parts_[k]->add_masses(sub_tile, shares_[k], out);
  kernels().logarithms(out, count(sub_tile));
}

void Law::scan(int sub_tile) {
  Peak& peak = peaks_[sub_tile];
  if (cut_ && peak.max < cutoff_) {
    peak = {-kInfinity, 0.0};
  } else if (!is_mixture_ && one_member()) {
    float scratch[kSubTile];
    const Span here = span(sources_[0], sub_tile, scratch);
    peak = has_cutoff() && !cut_ && !filter_.by_mass()
               ? kernels().maximum(here)
               : kernels().statistics(here, member_cutoff(), inverse_temperature_);
  } else {
    double scores[kSubTile];
    bool odd = false;
    if (is_mixture_) {
      values(sub_tile, scores);
    } else {
      odd = fold(sub_tile, scores);
    }
    peak = kernels().score_statistics(scores, count(sub_tile), cutoff_, inverse_temperature_);
    if (odd) peak.sum = std::nan("");
  }
}

void Law::scan_all(const Team& team) {
  team.for_each(sub_tiles_, kSubTilesPerPiece, [&](int, int64_t s) { scan(static_cast<int>(s)); });
}

bool Law::odd() const {
  for (int s = 0; s < sub_tiles_; ++s) {
    if (std::isnan(peaks_[s].sum)) return true;
  }
  return false;
}

void Law::repair(const Team& team) {
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

void Law::find_top() {
  top_ = -kInfinity;
  for (int s = 0; s < sub_tiles_; ++s) top_ = std::max(top_, peaks_[s].max);
}

void Law::find_cutoff(const Team& team) {
  cut_ = has_cutoff();
  if (!cut_) return;
  if (infinite_) {
    top_ = 0.0;
    return;
  }
  cutoff_ = hard_ ? top_ : filter_cutoff(*this, team);
}

void Law::normalise() {
  const bool given = !std::isnan(lse_);
  find_top();
  empty_ = top_ == -kInfinity;
  if (empty_) {
    std::fill_n(masses_, sub_tiles_, 0.0);
    if (given) set_lse(lse_);
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

void Law::refine(const Team& team) {
  if (empty_) return;
  if (is_mixture_ && !warped_) return;
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

void measure(Law* const* laws, int count, const Team& team, bool tops_only) {
  if (count == 0) return;
  const int sub_tiles = laws[0]->sub_tiles_;
  const auto sweep = [&](bool cut) {
    Law* swept[kMaxMembers + 2];
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

// --- searches ---

double Law::lower_bound(int sub_tile) const {
  return is_mixture_ ? masses_[sub_tile] : peaks_[sub_tile].max;
}

double Law::rough_mass() const {
  if (is_mixture_) return temperature_ == 1.0 ? exponential(-top_) : std::nan("");
  double sum = 0.0;
  for (int s = 0; s < sub_tiles_; ++s) {
    if (peaks_[s].sum == 0.0) continue;
    sum += peaks_[s].sum * exponential((peaks_[s].max - top_) * inverse_temperature_);
  }
  return sum;
}

int Law::collect_member(int sub_tile, double low, double high, float* out) const {
  float scratch[kSubTile];
  const float least = std::max(round_up(low), sources_[0].cutoff);
  return kernels().collect(span(sources_[0], sub_tile, scratch), least, round_up(high), out);
}

// The values of a mixture that may lie in [low, high): candidates are found in single precision,
// and only they are looked at.
int Law::mixture_candidates(int sub_tile, double low, double high, double* out) const {
  float scratch[kMaxMembers][kSubTile];
  Term terms[kMaxMembers];
  for (int k = 0; k < num_parts_; ++k) {
    terms[k] = parts_[k]->term(sub_tile, shares_[k], scratch[k]);
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
    kernels().add_masses({gathered, DType::kFloat32, size}, term.cutoff, term.law, shares_[k], out);
  }
  kernels().logarithms(out, size);
  return size;
}

int Law::collect(int sub_tile, double low, double high, double* out) const {
  if (!is_mixture_ && one_member()) {
    float found[kSubTile + kLanes];
    const int size = collect_member(sub_tile, low, high, found);
    std::copy_n(found, size, out);
    return size;
  }
  const int size = is_mixture_ ? mixture_candidates(sub_tile, low, high, out) : count(sub_tile);
  if (!is_mixture_) values(sub_tile, out);
  int found = 0;
  for (int i = 0; i < size; ++i) {
    if (out[i] >= low && out[i] < high) out[found++] = out[i];
  }
  return found;
}

void Law::weigh(int sub_tile, const double* edges, double high, Weighing weighing,
                double* out) const {
  if (!is_mixture_ && one_member() && weighing != Weighing::kMass) {
    float found[kSubTile + kLanes], least[kEdges];
    const int size = collect_member(sub_tile, edges[kEdges - 1], high, found);
    for (int i = 0; i < kEdges; ++i) least[i] = round_up(edges[i]);
    kernels().weigh(found, size, least, weighing != Weighing::kCount, affine(), out);
    return;
  }
  double found[kSubTile], masses[kSubTile];
  const int size = collect(sub_tile, edges[kEdges - 1], high, found);
  std::fill_n(masses, size, 1.0);
  if (weighing != Weighing::kCount) {
    std::copy_n(found, size, masses);
    std::fill(masses + size, masses + padded(size), -kInfinity);
    kernels().score_masses(masses, size, -kInfinity, {top_, inverse_temperature_, 0.0});
  }
  const int whole = (size + 7) / 8 * 8;
  std::fill(found + size, found + whole, 0.0);
  std::fill(masses + size, masses + whole, 0.0);
  for (int e = 0; e < kEdges; ++e) {
    double sums[8] = {};
    for (int i = 0; i < whole; i += 8) {
      for (int j = 0; j < 8; ++j) sums[j] += found[i + j] >= edges[e] ? masses[i + j] : 0.0;
    }
    out[e] =
        ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  }
}

// --- tokens ---

double Law::value(int64_t token) const {
  if (is_mixture_) {
    double mass = 0.0;
    for (int k = 0; k < num_parts_; ++k) mass += shares_[k] * parts_[k]->probability(token);
    return logarithm(mass);
  }
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

double Law::log_probability(int64_t token) const {
  if (empty_) return -kInfinity;
  const double here = value(token);
  if (!warped_) return here;
  return here < cutoff_ ? -kInfinity : affine()(here);
}

double Law::probability(int64_t token) const {
  if (!is_mixture_ || warped_) return exponential(log_probability(token));
  double mass = 0.0;
  for (int k = 0; k < num_parts_; ++k) mass += shares_[k] * parts_[k]->probability(token);
  return mass;
}

double Law::highest() const {
  if (empty_) return 0.0;
  return is_mixture_ && !warped_ ? mixture_argmax(0.0).mass : exponential(-log_sum_);
}

Argmax Law::argmax(double tie) const {
  if (empty_) return {};
  if (is_mixture_) return mixture_argmax(tie);
  const Affine law = affine();
  const double best = law(top_) - kTie;
  for (int s = 0; s < sub_tiles_; ++s) {
    if (law(peaks_[s].max) < best) continue;
    double scores[kSubTile];
    values(s, scores);
    for (int i = 0; i < count(s); ++i) {
      if (law(scores[i]) >= best) return {static_cast<int64_t>(s) * kSubTile + i};
    }
  }
  return {};
}

// No token of the sub-tile has more mass than this in a mixture.
double Law::bound(int sub_tile) const {
  double bound = 0.0;
  for (int k = 0; k < num_parts_; ++k) {
    const Law& part = *parts_[k];
    bound += shares_[k] * exponential(part.affine()(part.peaks_[sub_tile].max));
  }
  return bound;
}

// Looks into sub-tiles from the highest bound down, until no bound is left that reaches the best.
Argmax Law::mixture_argmax(double tie) const {
  // The peaks of a mixture are free before it is warped, and all that is needed of them is
  // unpacked.
  std::unique_ptr<double[]> bounds(new double[sub_tiles_]);
  for (int s = 0; s < sub_tiles_; ++s) bounds[s] = bound(s);
  const double least = 1.0 - std::max(tie, kBoundSlack);
  Argmax found = {0, -1.0, false};
  std::vector<Argmax> seen;  // what came close to the best of its time
  for (;;) {
    const int s =
        static_cast<int>(std::max_element(bounds.get(), bounds.get() + sub_tiles_) - bounds.get());
    if (!(bounds[s] >= found.mass * least) || bounds[s] < 0.0) break;
    bounds[s] = -1.0;
    double masses[kSubTile] = {};
    for (int k = 0; k < num_parts_; ++k) parts_[k]->add_masses(s, shares_[k], masses);
    found.mass = std::max(found.mass, *std::max_element(masses, masses + count(s)));
    for (int i = 0; i < count(s); ++i) {
      if (masses[i] < found.mass * (1.0 - tie)) continue;
      seen.push_back({static_cast<int64_t>(s) * kSubTile + i, masses[i], false});
    }
  }
  int ties = 0;
  for (const Argmax& one : seen) {
    if (one.mass < found.mass * (1.0 - tie)) continue;
    if (ties++ == 0 || one.token < found.token) found.token = one.token;
  }
  found.tied = ties > 1;
  return found;
}

// --- sub-tiles ---

void Law::add_masses(int sub_tile, double weight, double* out) const {
  if (empty_) return;
  if (is_mixture_ && !warped_) {
    for (int k = 0; k < num_parts_; ++k) parts_[k]->add_masses(sub_tile, weight * shares_[k], out);
  } else if (!is_mixture_ && one_member()) {
    float scratch[kSubTile];
    kernels().add_masses(span(sources_[0], sub_tile, scratch), member_cutoff(), affine(), weight,
                         out);
  } else {
    double scores[kSubTile];
    values(sub_tile, scores);
    kernels().score_masses(scores, count(sub_tile), cutoff_, affine());
    for (int i = 0; i < count(sub_tile); ++i) out[i] += weight * scores[i];
  }
}

void Law::log_probabilities(int sub_tile, double* out) const {
  const int size = count(sub_tile);
  if (empty_) {
    std::fill_n(out, size, -kInfinity);
    return;
  }
  values(sub_tile, out);
  if (!warped_) return;
  const Affine law = affine();
  for (int i = 0; i < size; ++i) out[i] = out[i] < cutoff_ ? -kInfinity : law(out[i]);
}

Term Law::term(int sub_tile, double share, float* scratch) const {
  const double weight = share * exponential(-log_sum_);
  if (one_member()) {
    return {span(sources_[0], sub_tile, scratch), member_cutoff(), affine(), share, weight};
  }
  double scores[kSubTile];
  values(sub_tile, scores);
  kernels().below(scores, count(sub_tile), cutoff_, top_, scratch);
  const Span below = {scratch, DType::kFloat32, count(sub_tile)};
  return {below, -kInfinityF, {0.0, inverse_temperature_, log_sum_}, share, weight};
}

double Law::residual(int sub_tile, const Law& draft, double scale) const {
  const Law* self = this;
  const Law* const* parts = is_mixture_ ? parts_ : &self;
  const int size = is_mixture_ ? num_parts_ : 1;
  float scratch[kMaxTerms][kSubTile];
  Term terms[kMaxTerms];
  int draft_part = -1;
  for (int k = 0; k < size; ++k) {
    if (parts[k] == &draft) draft_part = k;
    terms[k] = parts[k]->term(sub_tile, scale * (is_mixture_ ? shares_[k] : 1.0), scratch[k]);
  }
  terms[size] = draft.term(sub_tile, 1.0, scratch[size]);
  bool one_dtype = true;
  for (int k = 0; k < size; ++k) one_dtype &= terms[k].span.dtype == terms[size].span.dtype;
  for (int k = 0; k <= size && !one_dtype; ++k) {
    if (terms[k].span.dtype == DType::kFloat32) continue;
    kernels().clean(terms[k].span, Cleaning::kNone, 0.0f, scratch[k]);
    terms[k].span = {scratch[k], DType::kFloat32, terms[k].span.count};
  }
  return kernels().residual(terms, size, terms[size], draft_part);
}

// --- rows ---

bool greedy_row(const Ensemble& ensemble, int64_t batch) {
  for (int k = 0; k < ensemble.num_members; ++k) {
    if (ensemble.temperature.at(batch, 0, k) > 0.0f) return false;
  }
  return true;
}

RowLaws::RowLaws(const Ensemble& ensemble, const Team& team) : ensemble_(ensemble), team_(team) {
  const int count = ensemble.num_members + 2;
  const int sub_tiles = static_cast<int>((ensemble.vocab_size + kSubTile - 1) / kSubTile);
  laws_.reset(new Law[count]);
  peaks_.reset(new Peak[static_cast<size_t>(count) * sub_tiles]);
  masses_.reset(new double[static_cast<size_t>(count) * padded(sub_tiles)]);
  for (int i = 0; i < count; ++i) {
    laws_[i].attach(ensemble.vocab_size, &peaks_[static_cast<size_t>(i) * sub_tiles],
                    &masses_[static_cast<size_t>(i) * padded(sub_tiles)]);
  }
}

RowLaws::Warp RowLaws::warp_of(int64_t batch) const {
  Warp warp{greedy_row(ensemble_, batch), Filter{}};
  if (warp.greedy) return warp;
  if (ensemble_.top_k.data != nullptr) warp.filter.top_k = ensemble_.top_k.at(batch);
  if (ensemble_.top_p.data != nullptr) warp.filter.top_p = ensemble_.top_p.at(batch);
  if (ensemble_.min_p.data != nullptr) warp.filter.min_p = ensemble_.min_p.at(batch);
  return warp;
}

double RowLaws::Warp::temperature(const Ensemble& ensemble, int64_t batch, int member) const {
  return greedy ? 1.0 : ensemble.temperature.at(batch, 0, member);
}

const void* row_of(const Logits& logits, int64_t batch, int64_t row) {
  const int64_t offset = batch * logits.batch_stride + row * logits.row_stride;
  return static_cast<const char*>(logits.data) + offset * element_size(logits.dtype);
}

void RowLaws::set_member(Law& law, int64_t batch, int64_t row, int member, double temperature,
                         const Filter& filter) const {
  const Logits& logits = ensemble_.members[member];
  law.set_logits(temperature, filter);
  law.add_source(row_of(logits, batch, row), logits.dtype, 1.0);
}

void RowLaws::measure_member(int64_t batch, int64_t row, int member) {
  const Warp warp = warp_of(batch);
  Law* law = &laws_[member];
  set_member(*law, batch, row, member, warp.temperature(ensemble_, batch, member), warp.filter);
  measure(&law, 1, team_);
  target_ = law;
  draft_ = nullptr;
  status_ = law->status();
}

void RowLaws::measure_target(int64_t batch, int64_t row, const Proposal& proposal) {
  const Warp warp = warp_of(batch);
  Law* pending[kMaxMembers + 2];
  int count = 0;
  batch_ = batch;
  row_ = row;
  num_late_ = 0;
  draft_ = late_draft_ = nullptr;
  if (proposal.dense()) {
    Law& draft = laws_[ensemble_.num_members + 1];
    draft_ = &draft;
    const int member = proposal.member;
    if (member == kPadding) {
      const double temperature = warp.greedy ? 1.0 : proposal.temperature;
      draft.set_logits(temperature, warp.filter);
      draft.add_source(proposal.row, proposal.dtype, 1.0);
      if (!warp.greedy && set_known(draft, proposal.lse, temperature)) late_draft_ = &draft;
      if (late_draft_ == nullptr) pending[count++] = &draft;
    } else {
      const double temperature = warp.temperature(ensemble_, batch, member);
      // A member of a mixture is measured there, unless the mixture is what is warped.
      const bool bare = temperature == 1.0 && !warp.filter.active();
      if (ensemble_.space == Space::kProbabilities && (ensemble_.warp_members || bare) &&
          ensemble_.weights.at(batch, row, member) != 0.0f) {
        draft_ = &laws_[member];
      } else {
        set_member(draft, batch, row, member, temperature, warp.filter);
        if (!warp.greedy && set_known(draft, lse_at(batch, row, member), temperature)) {
          late_draft_ = &draft;
        }
        if (late_draft_ == nullptr) pending[count++] = &draft;
      }
    }
  }
  if (ensemble_.space == Space::kProbabilities) {
    measure_mixture(batch, row, warp, pending, count);
  } else {
    measure_product(batch, row, warp, pending, count);
  }
  // A member that is not swept yet has no status bits.
  draft_status_ = draft_ == nullptr || late_draft_ != nullptr ? 0 : draft_->status();
}

void RowLaws::complete() {
  if (num_late_ == 0) return;
  measure(late_, num_late_, team_);
  num_late_ = 0;
  finish_mixture(batch_, row_, warp_of(batch_));
}

void RowLaws::complete_draft() {
  complete();
  if (late_draft_ != nullptr) measure(&late_draft_, 1, team_);
  late_draft_ = nullptr;
}

double RowLaws::lse_at(int64_t batch, int64_t row, int member) const {
  return ensemble_.lse.data == nullptr ? kInfinity : ensemble_.lse.at(batch, row, member);
}

bool RowLaws::set_known(Law& law, double lse, double temperature) {
  if (!std::isfinite(lse) || !(temperature > 0.0)) return false;
  law.set_lse(lse);
  return true;
}

void RowLaws::refine() {
  complete_draft();
  const int last = ensemble_.num_members + 1;
  // The values of a warped mixture, and so its cutoff, come from its parts as they are.
  for (int k = 0; k <= last; ++k) {
    Law& law = laws_[k];
    const bool part = k < ensemble_.num_members && target_->is_made_of(law);
    if (&law == target_ || &law == draft_ || part) law.refine(team_);
  }
}

int64_t RowLaws::argmax() {
  complete();
  const Argmax found = target_->argmax(kNearTie);
  if (!found.tied) return found.token;
  refine();
  return target_->argmax(kTie).token;
}

void RowLaws::measure_mixture(int64_t batch, int64_t row, const Warp& warp, Law** pending,
                              int count) {
  const bool by_member = ensemble_.warp_members;
  for (int k = 0; k < ensemble_.num_members; ++k) {
    if (ensemble_.weights.at(batch, row, k) == 0.0f) continue;
    const double temperature = by_member ? warp.temperature(ensemble_, batch, k) : 1.0;
    set_member(laws_[k], batch, row, k, temperature, by_member ? warp.filter : Filter{});
    const bool known = !warp.greedy && set_known(laws_[k], lse_at(batch, row, k), temperature);
    (known ? late_[num_late_++] : pending[count++]) = &laws_[k];
  }
  measure(pending, count, team_);
  finish_mixture(batch, row, warp);
  status_ = target_->status();
}

// From its parts, as far as they are measured.
void RowLaws::finish_mixture(int64_t batch, int64_t row, const Warp& warp) {
  const bool by_member = ensemble_.warp_members;
  Law& mixture = laws_[ensemble_.num_members];
  mixture.set_mixture();
  for (int k = 0; k < ensemble_.num_members; ++k) {
    const double weight = ensemble_.weights.at(batch, row, k);
    if (weight != 0.0) mixture.add_part(laws_[k], weight);
  }
  const double temperature = warp.temperature(ensemble_, batch, 0);
  if (num_late_ > 0) {
    mixture.finish_shares();
  } else if (by_member || (temperature == 1.0 && !warp.filter.active())) {
    mixture.finish();
  } else {
    mixture.finish_warped(temperature, warp.filter, team_);
  }
  target_ = &mixture;
}

// The member whose law the product is, if it is one's: weights 1 and 0, and no mask.
int RowLaws::only_member(int64_t batch, int64_t row) const {
  int only = -1;
  if (ensemble_.plausibility > 0.0) return -1;
  for (int k = 0; k < ensemble_.num_members; ++k) {
    const float weight = ensemble_.weights.at(batch, row, k);
    if (weight == 0.0f) continue;
    if (weight != 1.0f || only >= 0) return -1;
    only = k;
  }
  return only;
}

void RowLaws::measure_product(int64_t batch, int64_t row, const Warp& warp, Law** pending,
                              int count) {
  Law& product = laws_[ensemble_.num_members];
  const int alone = only_member(batch, row);
  if (alone >= 0) {
    set_member(product, batch, row, alone, warp.temperature(ensemble_, batch, alone), warp.filter);
  } else if (ensemble_.warp_members) {
    product.set_logits(1.0, Filter{});
    product.set_infinite_wins();
    add_fold_sources(product, batch, row, warp);
  } else {
    product.set_logits(warp.temperature(ensemble_, batch, 0), warp.filter);
    add_fold_sources(product, batch, row, warp);
  }
  pending[count++] = &product;
  measure(pending, count, team_);
  target_ = &product;
  status_ = product.status();
}

void RowLaws::add_fold_sources(Law& law, int64_t batch, int64_t row, const Warp& warp) {
  const Ensemble& e = ensemble_;
  const bool by_member = e.warp_members;
  // Members whose values are cut before they are folded are looked at on their own first.
  Law* alone[kMaxMembers];
  bool known[kMaxMembers] = {};
  int count = 0;
  for (int k = 0; k < e.num_members; ++k) {
    const double temperature = by_member ? warp.temperature(e, batch, k) : 1.0;
    const bool used = e.weights.at(batch, row, k) != 0.0f;
    const bool cut = by_member && used && (warp.filter.active() || !(temperature > 0.0));
    if (!cut && !(k == 0 && e.plausibility > 0.0)) continue;
    set_member(laws_[k], batch, row, k, temperature, by_member ? warp.filter : Filter{});
    alone[count++] = &laws_[k];
    known[k] = true;
  }
  measure(alone, count, team_, /*tops_only=*/true);
  for (int k = 0; k < e.num_members; ++k) {
    const double weight = e.weights.at(batch, row, k);
    const double temperature = by_member ? warp.temperature(e, batch, k) : 1.0;
    const bool hard = !(temperature > 0.0);
    const bool plausible_only = k == 0 && e.plausibility > 0.0;
    const void* data = row_of(e.members[k], batch, row);
    double least = -kInfinity;
    if (plausible_only) {
      const double scale = hard ? 1.0 : temperature;
      least = laws_[k].value_top() + scale * logarithm(e.plausibility);
    }
    if (weight == 0.0) {
      if (least == -kInfinity) continue;
      Source& mask = law.add_source(data, e.members[k].dtype, 1.0);
      mask.cleaning = Cleaning::kMask;
      mask.threshold = round_up(least);
      continue;
    }
    Source& source = law.add_source(data, e.members[k].dtype, hard ? weight : weight / temperature);
    if (known[k] && (laws_[k].status() & kNanLogits) != 0) law.set_nan(source);
    if (by_member && (warp.filter.active() || hard)) least = std::max(least, laws_[k].cutoff());
    source.cutoff = round_up(least);
  }
}

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

int64_t draw_from(const Law& law, const Values<float>& uniforms, int64_t batch, int64_t row) {
  if (law.empty()) return 0;
  return draw(law.masses(), law.vocab_size(), draw_numbers(uniforms, batch, row).value,
              [&](int sub_tile, double* out) {
                std::fill_n(out, padded(law.count(sub_tile)), 0.0);
                law.add_masses(sub_tile, 1.0, out);
              });
}

double floor_sweep(const Logits* members, int num_members, int64_t batch, int64_t rows,
                   int64_t vocab_size, int threads) {
  const int64_t sub_tiles = (vocab_size + kSubTile - 1) / kSubTile;
  const int64_t units = batch * rows * num_members;
  std::unique_ptr<Peak[]> peaks(new Peak[units * sub_tiles]);
  Team::run(threads, units * vocab_size, [&](const Team& team) {
    team.for_each(units * sub_tiles, kSubTilesPerPiece, [&](int, int64_t piece) {
      const int64_t unit = piece / sub_tiles;
      const Logits& member = members[unit % num_members];
      const int64_t row = unit / num_members;
      const int64_t begin = piece % sub_tiles * kSubTile;
      const int64_t count = std::min<int64_t>(kSubTile, vocab_size - begin);
      const auto* data = static_cast<const char*>(row_of(member, row / rows, row % rows));
      peaks[piece] = kernels().statistics(
          {data + begin * element_size(member.dtype), member.dtype, static_cast<int>(count)},
          -kInfinityF, 1.0);
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

// SPDX-License-Identifier: Apache-2.0
// The laws at one row, without a vocabulary-sized buffer: a `Law` knows its rows, its normaliser
// and the mass of each sub-tile, and computes anything else again from the logits. `RowLaws` makes
// the ensemble's law and a proposer's at one (batch, row) after another; every op goes through it.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace specens {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A member's row as a law reads it.
struct Source {
  const char* row;
  DType dtype;
  double weight;
  Cleaning cleaning = Cleaning::kNone;
  float threshold = 0.0f;  // of Cleaning::kMask
  float cutoff = -std::numeric_limits<float>::infinity();

  float value(int64_t token) const;
};

// 0, 1 and 0 are off.
struct Filter {
  int64_t top_k = 0;
  double top_p = 1.0;
  double min_p = 0.0;

  bool active() const { return top_k > 0 || top_p < 1.0 || min_p > 0.0; }
  bool by_mass() const { return top_p < 1.0; }
};

// A most probable token, and whether another one ties with it; the mass is a mixture's only.
struct Argmax {
  int64_t token = 0;
  double mass = 0.0;
  bool tied = false;
};

// One law over the vocabulary, of either kind:
// * logits: a weighted sum of sources (one of weight 1 for a member alone), then the temperature
//   and the filter;
// * a mixture of such laws, and, if it is warped, its logarithm, then the temperature and the
//   filter.
class Law {
 public:
  // Storage for a peak and a mass for each sub-tile, the latter rounded up to kLanes.
  void attach(int64_t vocab_size, Peak* peaks, double* masses);

  // A law of logits: its sources follow, then `measure`.
  void set_logits(double temperature, const Filter& filter);
  Source& add_source(const void* row, DType dtype, double weight);
  // What a +inf does to a source of several: it leaves that source nothing else.
  void set_infinite_wins() { infinite_wins_ = true; }

  // What was found of a source when it was looked at alone: a cutoff would pass over its NaNs.
  void set_nan(Source& source);

  // The log-sum-exp of one member's row at its temperature, which is then the normaliser: single
  // tokens can be asked for at once, all else after `measure`.
  void set_lse(double lse);

  // A mixture: its parts follow, measured, then `finish` or `finish_warped`.
  void set_mixture();
  void add_part(const Law& part, double weight);
  void finish();
  // The same for single tokens alone: the parts need not be measured.
  void finish_shares();
  void finish_warped(double temperature, const Filter& filter, const Team& team);

  // Computes the normaliser again in double precision.
  void refine(const Team& team);

  bool empty() const { return empty_; }
  // An unwarped mixture with this part.
  bool is_made_of(const Law& part) const;
  int32_t status() const { return status_; }
  double top() const { return top_; }
  // The largest value as it was given, which `top` is not if it is +inf.
  double value_top() const;
  double cutoff() const { return cutoff_; }
  double temperature() const { return temperature_; }
  const Filter& filter() const { return filter_; }
  double lse() const;
  int64_t vocab_size() const { return vocab_size_; }
  int sub_tiles() const { return sub_tiles_; }
  int count(int sub_tile) const {
    const int64_t left = vocab_size_ - static_cast<int64_t>(sub_tile) * kSubTile;
    return left < kSubTile ? static_cast<int>(left) : kSubTile;
  }

  // Of each sub-tile; they sum to 1.
  const double* masses() const { return masses_; }
  double probability(int64_t token) const;
  double log_probability(int64_t token) const;
  // The largest probability.
  double highest() const;
  // The most probable token, the lowest id of those within `tie` nats; 0 if there is none.
  Argmax argmax(double tie) const;

  // Before the temperature and the filter: an upper bound of a sub-tile's values, a lower bound of
  // its largest, and the values themselves, -inf where there is no mass.
  double upper_bound(int sub_tile) const { return peaks_[sub_tile].max; }
  double lower_bound(int sub_tile) const;
  void values(int sub_tile, double* out) const;

  // The values in [low, high) of a sub-tile, for a finite low; returns their number.
  int collect(int sub_tile, double low, double high, double* out) const;
  // The weight of the values in [edge, high) of a sub-tile for each of kEdges descending edges:
  // their number, or the sum of exp((value - top) / temperature), if that is rough good to 1e-7.
  void weigh(int sub_tile, const double* edges, double high, Weighing weighing, double* out) const;
  // An estimate, good to 1e-7, of all mass before the filter, in the same unit; NaN if there is
  // none.
  double rough_mass() const;

  // Fillers of a buffer of kSubTile elements.
  void add_masses(int sub_tile, double weight, double* out) const;
  void log_probabilities(int sub_tile, double* out) const;
  // The sum of max(scale * this - draft, 0) over a sub-tile, in single precision; a warped mixture
  // has no such sum.
  bool has_single_precision() const { return !is_mixture_ || !warped_; }
  double residual(int sub_tile, const Law& draft, double scale) const;

 private:
  friend void measure(Law* const* laws, int count, const Team& team, bool tops_only);

  bool one_member() const { return num_sources_ == 1 && sources_[0].weight == 1.0; }
  bool has_cutoff() const { return hard_ || filter_.active(); }
  Affine affine() const { return {top_, inverse_temperature_, log_sum_}; }
  Span raw_span(const Source& source, int sub_tile) const;
  Span span(const Source& source, int sub_tile, float* scratch) const;
  bool fold_spans(int sub_tile, float (*scratch)[kSubTile], double* out) const;
  int collect_member(int sub_tile, double low, double high, float* out) const;
  int mixture_candidates(int sub_tile, double low, double high, double* out) const;
  float member_cutoff() const;
  double value(int64_t token) const;
  void warp(double temperature, const Filter& filter);
  bool fold(int sub_tile, double* out) const;
  void scan(int sub_tile);
  void scan_all(const Team& team);
  bool odd() const;
  void repair(const Team& team);
  void find_top();
  void find_cutoff(const Team& team);
  void normalise();
  double bound(int sub_tile) const;
  Argmax mixture_argmax(double tie) const;
  Term term(int sub_tile, double share, float* scratch) const;

  int64_t vocab_size_;
  int sub_tiles_;
  Peak* peaks_;
  double* masses_;

  int num_sources_;
  int num_parts_;
  Source sources_[kMaxTerms];
  const Law* parts_[kMaxMembers];
  double shares_[kMaxMembers];
  bool is_mixture_;
  bool warped_;

  double temperature_;
  double inverse_temperature_;
  Filter filter_;
  double lse_;  // as it was given, else NaN
  bool hard_;   // temperature 0: the largest values share the mass
  bool infinite_wins_;
  bool repaired_;  // what `repair` found is taken care of
  bool infinite_;  // the largest value is +inf; `top_` is then 0
  bool cut_;       // the cutoff is known
  double cutoff_;
  double top_;
  double log_sum_;
  bool empty_;
  int32_t status_;
};

// Sweeps the rows of these laws of logits and normalises them; with `tops_only`, finds their
// largest values and cutoffs and no more.
void measure(Law* const* laws, int count, const Team& team, bool tops_only = false);

// The least value of a law that its filter keeps; filters.cpp.
double filter_cutoff(const Law& law, const Team& team);

// The least float >= x: a float is below x iff it is below this.
float round_up(double x);

// What the children of a row were drawn from, where it is not a point mass.
struct Proposal {
  int member = kPadding;
  const void* row = nullptr;  // of separate draft logits
  DType dtype = DType::kFloat32;
  double temperature = 1.0;
  double lse = kInfinity;  // not known

  bool dense() const { return member != kPadding || row != nullptr; }
};

class RowLaws {
 public:
  // `team` outlives this.
  RowLaws(const Ensemble& ensemble, const Team& team);

  // Makes the ensemble's law at this row, and the proposal's if it is dense. Rows whose log-sum-exp
  // is known are not swept: single tokens can be asked for, all else of the target after
  // `complete`, of the draft after `complete_draft`, which completes both.
  void measure_target(int64_t batch, int64_t row, const Proposal& proposal);
  void complete();
  void complete_draft();
  // Makes the law of one member alone.
  void measure_member(int64_t batch, int64_t row, int member);

  // The target's most probable token, the lowest id on ties.
  int64_t argmax();

  // Makes the normalisers of both exact up to double precision.
  void refine();

  const Law& target() const { return *target_; }
  const Law& draft() const { return *draft_; }
  bool draft_is_empty() const { return draft_ == nullptr || draft_->empty(); }
  // Of the rows of the target that were not known; of the draft's, if it was not.
  int32_t status() const { return status_; }
  int32_t draft_status() const { return draft_status_; }
  const Team& team() const { return team_; }

 private:
  // What holds for one batch row.
  struct Warp {
    bool greedy;
    Filter filter;
    double temperature(const Ensemble& ensemble, int64_t batch, int member) const;
  };

  Warp warp_of(int64_t batch) const;
  void set_member(Law& law, int64_t batch, int64_t row, int member, double temperature,
                  const Filter& filter) const;
  double lse_at(int64_t batch, int64_t row, int member) const;
  static bool set_known(Law& law, double lse, double temperature);
  void finish_mixture(int64_t batch, int64_t row, const Warp& warp);
  void measure_mixture(int64_t batch, int64_t row, const Warp& warp, Law** pending, int count);
  void measure_product(int64_t batch, int64_t row, const Warp& warp, Law** pending, int count);
  int only_member(int64_t batch, int64_t row) const;
  void add_fold_sources(Law& law, int64_t batch, int64_t row, const Warp& warp);

  const Ensemble& ensemble_;
  const Team& team_;
  std::unique_ptr<Law[]> laws_;  // of each member, of the ensemble, of the draft
  std::unique_ptr<Peak[]> peaks_;
  std::unique_ptr<double[]> masses_;
  const Law* target_ = nullptr;
  const Law* draft_ = nullptr;
  // Not swept yet:
  Law* late_[kMaxMembers];
  int num_late_ = 0;
  Law* late_draft_ = nullptr;
  int64_t batch_ = 0, row_ = 0;  // of the target
  int32_t status_ = 0;
  int32_t draft_status_ = 0;
};

bool greedy_row(const Ensemble& ensemble, int64_t batch);
const void* row_of(const Logits& logits, int64_t batch, int64_t row);

// The first index whose cumulative mass exceeds `threshold`, the last with mass if none does, from
// what `cumulative` has been before; mass(i) for i below count.
template <typename Mass>
int pick_beyond(int count, double threshold, double cumulative, const Mass& mass) {
  int last = 0;
  for (int i = 0; i < count && !(cumulative > threshold); ++i) {
    const double here = mass(i);
    cumulative += here;
    if (here > 0.0) last = i;
  }
  return last;
}

// The same with threshold = number x total.
template <typename Mass>
int pick(int count, double number, const Mass& mass) {
  double total = 0.0;
  for (int i = 0; i < count; ++i) total += mass(i);
  return pick_beyond(count, number * total, 0.0, mass);
}

// The same over a sub-tile, in blocks; the buffer is padded with zeros.
int pick_token(const double* masses, int count, double number);

// The walk: a tile, a sub-tile, both by `masses` of the sub-tiles, and a token by what
// fill(sub_tile, buffer) says.
template <typename Fill>
int64_t draw(const double* masses, int64_t vocab_size, const double (&numbers)[3],
             const Fill& fill) {
  const int sub_tiles = static_cast<int>((vocab_size + kSubTile - 1) / kSubTile);
  const int tiles = (sub_tiles + kSubTilesPerTile - 1) / kSubTilesPerTile;
  const int tile = pick(tiles, numbers[0], [&](int i) {
    double sum = 0.0;
    for (int j = i * kSubTilesPerTile; j < std::min((i + 1) * kSubTilesPerTile, sub_tiles); ++j) {
      sum += masses[j];
    }
    return sum;
  });
  const int first = tile * kSubTilesPerTile;
  const int sub_tile = first + pick(std::min(kSubTilesPerTile, sub_tiles - first), numbers[1],
                                    [&](int i) { return masses[first + i]; });
  const int64_t begin = static_cast<int64_t>(sub_tile) * kSubTile;
  const int count = static_cast<int>(std::min<int64_t>(kSubTile, vocab_size - begin));
  double buffer[kSubTile];
  fill(sub_tile, buffer);
  return begin + pick_token(buffer, count, numbers[2]);
}

// Words 1 to 3 of a block of uniforms.
struct DrawNumbers {
  double value[3];
};

inline DrawNumbers draw_numbers(const Values<float>& uniforms, int64_t batch, int64_t row) {
  return {{uniforms.at(batch, row, 1), uniforms.at(batch, row, 2), uniforms.at(batch, row, 3)}};
}

// The token that a block of uniforms draws; 0 from an empty law.
int64_t draw_from(const Law& law, const Values<float>& uniforms, int64_t batch, int64_t row);

// Calls function(laws, index) for every index below `count`, each about `sweeps` rows of work: on
// one thread each where there are enough of them, else one after another with the whole team.
template <typename Function>
void for_each_row(const Ensemble& ensemble, int64_t count, int64_t sweeps, int threads,
                  const Function& function) {
  const int64_t elements = count * sweeps * ensemble.num_members * ensemble.vocab_size;
  Team::run(threads, elements, [&](const Team& team) {
    const Team alone;
    const bool apart = team.size() > 1 && count >= team.size();
    std::vector<RowLaws> laws;
    for (int i = 0; i < (apart ? team.size() : 1); ++i) {
      laws.emplace_back(ensemble, apart ? alone : team);
    }
    if (apart) {
      team.for_each(count, 1, [&](int thread, int64_t i) { function(laws[thread], i); });
    } else {
      for (int64_t i = 0; i < count; ++i) function(laws[0], i);
    }
  });
}

}  // namespace specens

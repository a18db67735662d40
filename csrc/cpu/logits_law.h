// SPDX-License-Identifier: Apache-2.0
// The law of a weighted sum of logits: a member alone, a separate draft, or a product. Filtered
// members of a product are laws of their own first. A separate draft's probabilities may be given
// in place of its logits; single precision then reads their logarithms.
#pragma once

#include "law.h"

namespace specens {

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

class LogitsLaw final : public WarpedLaw {
 public:
  // A new law: its sources follow, then `measure`.
  void set(double temperature, const Filter& filter);
  Source& add_source(const void* row, DType dtype, double weight);
  // What a +inf does to a source of several: it leaves that source nothing else.
  void set_infinite_wins() { infinite_wins_ = true; }
  // What was seen in a source when it was looked at alone: a cutoff would pass over its NaNs.
  void set_nan(Source& source);
  // The log-sum-exp of one member's row at its temperature, which is then the normaliser: single
  // tokens can be asked for at once, all else after `measure`.
  void set_lse(double lse);

  // Sweeps the rows of these laws and normalises them; with `tops_only`, finds their largest values
  // and cutoffs and no more.
  static void measure(LogitsLaw* const* laws, int count, const Team& team, bool tops_only = false);

  // The largest value as it was given, which `top` is not if it is +inf.
  double value_top() const { return infinite_ ? kInfinity : top_; }
  // The largest probability in a sub-tile.
  double peak_mass(int sub_tile) const { return exponential(affine()(peaks_[sub_tile].max)); }
  // `share` of the law in one sub-tile; `scratch` has kSubTile elements.
  Term term(int sub_tile, double share, float* scratch) const;

  double lower_bound(int sub_tile) const override { return peaks_[sub_tile].max; }
  int collect(int sub_tile, double low, double high, double* out) const override;
  void weigh(int sub_tile, const double* edges, double high, Weighing weighing,
             double* out) const override;
  double rough_mass() const override;

  Argmax argmax(double tie) const override;
  double lse() const override;
  void add_masses(int sub_tile, double weight, double* out) const override;
  int parts(Part* out) const override;

 private:
  double value(int64_t token) const override;
  void values(int sub_tile, double* out) const override { fold(sub_tile, out); }
  Peak statistics(int sub_tile) const override;

  // Whether its probabilities are given, and not to be found.
  bool is_given() const {
    return num_sources_ == 1 && sources_[0].cleaning == Cleaning::kLogarithm;
  }
  double given_probability(int64_t token) const;
  bool one_member() const { return num_sources_ == 1 && sources_[0].weight == 1.0; }
  float member_cutoff() const { return std::max(sources_[0].cutoff, round_up(cutoff_)); }
  Span raw_span(const Source& source, int sub_tile) const;
  Span span(const Source& source, int sub_tile, float* scratch) const;
  int collect_member(int sub_tile, double low, double high, float* out) const;
  bool fold(int sub_tile, double* out) const;
  bool fold_spans(int sub_tile, float (*scratch)[kSubTile], double* out) const;
  bool odd() const;
  void repair(const Team& team);
  void find_cutoff(const Team& team);

  int num_sources_ = 0;
  Source sources_[kMaxTerms];
  bool infinite_wins_ = false;
  bool repaired_ = false;  // what `repair` saw is taken care of
  bool infinite_ = false;  // the largest value is +inf; `top_` is then 0
};

}  // namespace specens

// SPDX-License-Identifier: Apache-2.0
// Mixtures of members' laws, as they are and warped as a whole.
#pragma once

#include "logits_law.h"

namespace specens {

class MixtureLaw final : public RowLaw {
 public:
  using RowLaw::attach;

  // A new law: its parts follow, measured, then `finish`.
  void clear();
  void add_part(const LogitsLaw& part, double weight);
  void finish();
  // The same for single tokens alone: the parts need not be measured.
  void finish_shares();

  bool has_part(const LogitsLaw& part) const;
  // Of the likeliest token of a sub-tile: what it has at most, and what it has for certain.
  double most(int sub_tile) const;
  double attained(int sub_tile) const;
  // The logarithms of those masses of a sub-tile that may lie in [exp(low), exp(high)); returns
  // their number. Candidates are found in single precision, and only they are looked at.
  int candidates(int sub_tile, double low, double high, double* out) const;

  double probability(int64_t token) const override;
  double log_probability(int64_t token) const override;
  double highest() const override;
  Argmax argmax(double tie) const override;
  double lse() const override { return empty_ ? -kInfinity : 0.0; }
  void add_masses(int sub_tile, double weight, double* out) const override;
  void log_probabilities(int sub_tile, double* out) const override;
  int parts(Part* out) const override;
  // The normalisers are the parts'.
  void refine(const Team& /*team*/) override {}

 private:
  int num_parts_ = 0;
  Part parts_[kMaxMembers];
};

// Its values are the logarithms of a mixture's masses.
class WarpedMixture final : public WarpedLaw {
 public:
  // Of a mixture that is not empty, and outlives this law.
  void set(const MixtureLaw& mixture, double temperature, const Filter& filter, const Team& team);

  // While the cutoff is looked for, the place of the masses holds this.
  double lower_bound(int sub_tile) const override { return masses_[sub_tile]; }
  int collect(int sub_tile, double low, double high, double* out) const override;
  double rough_mass() const override;

  Argmax argmax(double tie) const override;
  int parts(Part* /*out*/) const override { return 0; }

 private:
  double value(int64_t token) const override { return mixture_->log_probability(token); }
  void values(int sub_tile, double* out) const override {
    mixture_->log_probabilities(sub_tile, out);
  }
  Peak statistics(int sub_tile) const override;

  const MixtureLaw* mixture_ = nullptr;
};

}  // namespace specens

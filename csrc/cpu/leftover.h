// SPDX-License-Identifier: Apache-2.0
// What rejections leave of the target at one row: where it is positive, the target less one
// coefficient times each proposer's law, without the tokens that were rejected as points. So it has
// no buffer of the vocabulary's size, whatever the number of siblings. Token cascades, which spare
// some tokens of a rejection, are kept one by one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "row_laws.h"

namespace specens {

// A valid draft token, at the row whose laws have been measured.
struct Drafted {
  int64_t token = 0;
  int slot = kPadding;   // of the law that it was drawn from, in `RowLaws`; else it is a point mass
  bool at_zero = false;  // the temperature is 0
  double memory = 0.0;
  const double* parameters = nullptr;  // of the rule
  // Of a draw without replacement: the tokens of earlier siblings, which its law does not have, and
  // what it is multiplied by; 0 if nothing is left of it.
  std::vector<int64_t> gone = {};
  double share = 1.0;

  bool dense() const { return slot != kPadding; }
};

double draft_probability(const RowLaws& laws, const Drafted& drafted, int64_t token);
// The mass of its law without the tokens that are gone.
double rest_of(RowLaws& laws, const Drafted& drafted);
void fill_draft(const RowLaws& laws, const Drafted& drafted, int sub_tile, double* out);

// The largest of what fill(sub_tile, buffer) says.
template <typename Fill>
double largest_mass(const RowLaws& laws, const Fill& fill) {
  const RowLaw& target = laws.target();
  std::unique_ptr<double[]> best(new double[target.sub_tiles()]);
  laws.team().for_each(target.sub_tiles(), kSubTilesPerPiece, [&](int, int64_t index) {
    const int sub_tile = static_cast<int>(index);
    double here[kSubTile];
    fill(sub_tile, here);
    best[index] = *std::max_element(here, here + target.count(sub_tile));
  });
  return *std::max_element(best.get(), best.get() + target.sub_tiles());
}

class Leftover {
 public:
  // The target itself.
  explicit Leftover(RowLaws& laws) : laws_(&laws) {}

  // Takes a rejected draft's part away, as its judgement says. False if what is left may be
  // rounding: then nothing is changed. What is next to nothing needs normalisers that are exact up
  // to double precision, by laws.refine() and judgements made after it.
  bool reject(const Drafted& drafted, const Judgement& judgement, bool exactly);
  // Takes a token away, and does not normalise.
  void exclude(int64_t token);

  bool whole() const { return state_.whole; }
  // What the last rejection left of what was there before, even if it was rounding.
  double mass() const { return mass_; }
  double probability(int64_t token) const;
  double highest() const;
  void fill(int sub_tile, double* out) const;
  // No token of a sub-tile has more.
  double bound(int sub_tile) const;
  int64_t draw_from(const double (&numbers)[3]) const;
  // The most probable token, the lowest id on ties; -1 if there is none.
  int64_t argmax() const;

 private:
  // A token cascade's rejection: of tokens that it does not spare, `factor` times the draft's law.
  struct Deferral {
    Left left;
    double bound;
    Drafted drafted;
    double divisor;  // what makes masses of what was there before
    double factor;
  };
  struct State {
    bool whole = true;
    double coefficients[kMaxMembers + 1] = {};  // of the laws of slots
    std::vector<Deferral> deferrals = {};
    std::vector<int64_t> excluded = {};
    double divisor = 1.0;  // of the sum of the signed mixture's positive masses
    double chance = 1.0;   // that all was rejected
    // The signed mixture: the target's parts, and what is subtracted; not the target if it has
    // none.
    Part parts[kMaxSigned] = {};
    int num_parts = 0;
    bool on_target = true;  // the target itself is added to the parts
  };

  void combine(State& state) const;
  bool is_excluded(const State& state, int sub_tile) const;
  void fill_raw(const State& state, int sub_tile, double* out) const;
  void defer(const Deferral& deferral, int sub_tile, double* out) const;
  double raw(const State& state, int64_t token) const;
  double measure(const State& state, int sub_tile) const;
  const double* masses() const { return masses_ ? masses_.get() : laws_->target().masses(); }

  RowLaws* laws_;
  State state_;
  std::unique_ptr<double[]> masses_;  // of sub-tiles, not normalised; else the target's
  double mass_ = 0.0;
};

}  // namespace specens

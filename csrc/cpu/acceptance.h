// SPDX-License-Identifier: Apache-2.0
// One drafted token at one row: what the rules of csrc/rules ask about it, swept for in double
// precision over a sub-tile at a time, and the draw of what replaces it. A new sum is listed in
// dispatch.h; nothing else here knows a rule.
#pragma once

#include <cstdint>
#include <memory>

#include "row_laws.h"

namespace specens {

// A valid draft token, at the row whose laws have been measured.
struct Drafted {
  int64_t token;
  bool dense;    // drawn from laws.draft(); else a point mass
  bool at_zero;  // the temperature is 0
  double memory;
};

Judgement judge(const VerifyParams& params, RowLaws& laws, const Drafted& drafted);

// Where the temperature is 0: whether the rule is asked, and whether about the draft's law.
bool is_asked_at_zero(RuleId rule);
bool needs_draft_at_zero(RuleId rule);

// What a judgement leaves of the target at one row.
class Leftover {
 public:
  Leftover(RowLaws& laws, const Drafted& drafted, const Judgement& judgement)
      : laws_(laws), drafted_(drafted), judgement_(judgement) {}

  // Finds its mass; false if that may be rounding. What is next to nothing needs normalisers that
  // are exact up to double precision, by laws.refine() and a judgement made after it.
  bool measure(bool exactly);
  double mass() const { return mass_; }
  // A token of what was measured.
  int64_t draw_from(const double (&numbers)[3]) const;

 private:
  void measure_point();
  void measure_dense(bool exactly);
  double measure_sub_tile(int sub_tile) const;
  void fill(int sub_tile, double* out) const;

  RowLaws& laws_;
  Drafted drafted_;
  Judgement judgement_;
  std::unique_ptr<double[]> masses_;
  double mass_ = 0.0;
};

// The target's most probable token but for this one, the lowest id on ties; 0 if there is none.
int64_t best_but(RowLaws& laws, int64_t token);

}  // namespace specens

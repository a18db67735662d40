// SPDX-License-Identifier: Apache-2.0
// `mentored`: the law nearest to the draft's, within a divergence of the target's.
#pragma once

#include "plain.h"
#include "sums.h"

namespace specens {

// The search for the a and b of `mentored`, each step of it after a sweep. h sums to less, and is
// further from p, the larger a or b is, and the solution has the smaller a, and the larger b, the
// more is allowed. So where h sums to too much and is too far, a is too small and b too large;
// where too little and too near, the reverse; else neither is known. Newton's step of both decides
// most of it; where it leaves what is known, a is halved, or b found for this a alone, which ends.
struct MentorSearch {
  static constexpr int kMostSweeps = 64;
  static constexpr double kMostLogB =
      29.0;  // what h has more than q is then less than any residual
  static constexpr double kLeastLogA = -700.0;
  static constexpr double kClose = 1e-7;  // Newton's next step is of its square
  static constexpr double kFine = 1e-10;
  static constexpr double kRounding = 1e-14;  // of a sum

  double divergence;
  double log_b = 1.3 * minimum(1.0, ::sqrt(2.0 * divergence));
  double log_a = -log_b;
  double a_low = kLeastLogA, a_high = 0.0, b_low = 0.0, b_high = kMostLogB;
  int undecided = 0;
  bool found = false;

  SPECENS_HOST_DEVICE Clipped clipped() const { return {::exp(log_a), ::exp(log_b)}; }

  // Newton's b for this a, which from below does not pass it.
  SPECENS_HOST_DEVICE double b_alone(double above, double excess) const {
    if (!(above > 0.0)) return excess > 0.0 ? kMostLogB : log_b / 2.0;
    const double inverse = ::exp(-log_b) - excess / above;
    if (inverse <= ::exp(-kMostLogB)) return kMostLogB;
    return inverse < 1.0 ? -::log(inverse) : 0.0;
  }

  SPECENS_HOST_DEVICE void move(double to_a, double to_b) {
    log_a = minimum(to_a, 0.0);
    log_b = to_b > 0.0 ? to_b : 0.0;
  }

  SPECENS_HOST_DEVICE void step(const Sums& sums) {
    const double below = sums.value[0], above = sums.value[1];
    const double inverse_a = ::exp(-log_a), inverse_b = ::exp(-log_b);
    // Not h's sum less 1: normalisers are good to single precision.
    const double excess = below * inverse_a + above * inverse_b - sums.value[2];
    const double nats = below * log_a + above * log_b + sums.value[3] - divergence;
    const double alone = b_alone(above, excess);
    const bool sums_to_1 = ::fabs(alone - log_b) < kFine;
    // No token is that much too probable to the draft: a is as good as 0.
    found = below == 0.0 && sums_to_1 && nats <= 0.0;
    if (found) return move(log_a, alone);

    const bool far = nats >= -kRounding, near = nats <= kRounding;
    const bool more = excess >= -kRounding, less = excess <= kRounding && below > 0.0;
    const bool raise = (more && (far || log_b >= b_high)) || (sums_to_1 && far);
    const bool lower = !raise && ((less && (near || log_b <= b_low)) || sums_to_1);
    if (raise) a_low = log_a;
    if (lower) a_high = log_a;
    if (raise && far) b_high = minimum(b_high, log_b);
    if (lower && near) b_low = -minimum(-b_low, -log_b);
    undecided = raise || lower ? 0 : undecided + 1;
    found = a_high - a_low < kFine;
    if (found) return;

    const double slope = inverse_a - inverse_b;
    const double by_a = (excess + nats * inverse_b) / (below * slope);
    const double by_b = -(excess + nats * inverse_a) / (above * slope);
    const bool regular = below > 0.0 && above > 0.0 && slope > 0.0;
    found = regular && ::fabs(by_a) < kClose && ::fabs(by_b) < kClose;
    const double to_a = log_a + by_a, to_b = log_b + by_b;
    const double least_a = a_low < 3.0 * log_a - 1.0 ? 3.0 * log_a - 1.0 : a_low;
    const bool inside = to_a > least_a - kFine && to_a < a_high + kFine && to_b > b_low - kFine &&
                        to_b < b_high + kFine;
    if (found || (regular && inside && undecided < 2)) return move(to_a, to_b);
    if (raise || lower) {
      const double middle = (a_low + a_high) / 2.0;
      const double known = b_low > log_b ? b_low : log_b;
      move(middle < 2.0 * log_a ? 2.0 * log_a : middle,
           b_high < kMostLogB ? (b_low + b_high) / 2.0 : known);
    } else {
      const double least_b = below > 0.0 ? b_low : 0.0;
      move(log_a, minimum(alone > least_b ? alone : least_b, b_high));
    }
  }
};

struct Mentored : Rule {
  static constexpr bool kSweeps = true;

  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    const double divergence = at.parameters[0];
    Judgement judgement = Rejection::judge(at);
    // As a is at most 1, what the target likes no less is kept whatever a is.
    const bool kept = at.p >= at.q && at.q > 0.0;
    if (divergence == 0.0 || kept) return judgement;
    const bool empty = !(at.highest(Side::kDraft) > 0.0);
    MentorSearch search{divergence};
    for (int sweep = 0; sweep < MentorSearch::kMostSweeps && !search.found; ++sweep) {
      const Sums sums = at.sums(search.clipped());
      if (sums.value[4] <= divergence) {
        judgement.kept = at.q;
        judgement.scale = 0.0;
        return judgement;
      }
      if (empty) return judgement;
      search.step(sums);
    }
    // Where q is between p / b and p / a, nothing is left, and all is kept.
    judgement.kept = minimum(at.p * ::exp(-search.log_a), at.q);
    judgement.scale = ::exp(-search.log_b);
    return judgement;
  }
};

}  // namespace specens

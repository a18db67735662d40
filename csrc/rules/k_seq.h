// SPDX-License-Identifier: Apache-2.0
// `k_seq` of several candidates: the ratio at which what k tokens keep is what is taken from the
// target. For one candidate it is `rejection`.
#pragma once

#include "sums.h"

namespace specens {

// The search for the rho with left(rho) = refused(rho)^k, each step of it after a sweep. The left
// side falls and the right one rises with rho, from 1 to k. Newton's step is taken where it stays
// within what is known.
struct KSeqSearch {
  static constexpr int kMostSweeps = 100;
  static constexpr double kFine = 1e-14;
  static constexpr double kLeastRest = 0x1p-40;

  KSeqSearch(int candidates, bool with_rest) : k(candidates), rest(with_rest), high(candidates) {}

  int k;
  bool rest;  // what the laws sum to less than 1 counts
  double ratio = 1.0, low = 1.0, high;
  int sweeps = 0;
  bool found = false;

  Refused refused() const { return {ratio}; }

  // What a law lacks of 1, unless it is rounding.
  double lacking(double kept) const {
    const double lost = 1.0 - kept;
    return rest && ::fabs(lost) > kLeastRest ? lost : 0.0;
  }

  void step(const Sums& sums) {
    const double left =
        sums.value[0] + lacking(sums.value[0] + ratio * sums.value[2] + sums.value[3]);
    const double refused =
        sums.value[1] + lacking(sums.value[1] + sums.value[3] / ratio + sums.value[2]);
    const double excess = left - ::pow(refused, k);
    (excess >= 0.0 ? low : high) = ratio;
    const double slope =
        sums.value[2] + k * ::pow(refused, k - 1) * sums.value[3] / (ratio * ratio);
    double next = slope > 0.0 ? ratio + excess / slope : high;
    if (!(next > low && next < high)) next = (low + high) / 2.0;
    found = high - low <= kFine * low || ::fabs(next - ratio) <= kFine || ++sweeps == kMostSweeps;
    ratio = next;
  }
};

}  // namespace specens

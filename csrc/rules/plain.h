// SPDX-License-Identifier: Apache-2.0
// Rules that look at one token alone.
#pragma once

#include "judgement.h"

namespace specens {

struct Rejection : Rule {
  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    Judgement judgement;
    judgement.kept = minimum(at.p, at.q);
    return judgement;
  }
};

struct Lenient : Rule {
  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    Judgement judgement;
    judgement.kept = minimum(at.p / at.parameters[0], at.q);
    return judgement;
  }
};

// The target has collapsed onto its most probable token before this is asked.
struct Greedy : Rule {
  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    Judgement judgement;
    judgement.kept = at.p;
    return judgement;
  }
};

struct Cactus : Rule {
  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    const double others = 1.0 - at.p;
    const double spread = at.p * others;
    const double variance = spread > 0.0 ? 2.0 * at.parameters[0] * spread : 0.0;
    const double raised = minimum(at.p + ::sqrt(variance), 1.0);
    Judgement judgement;
    judgement.kept = minimum(raised, at.q);
    judgement.scale = others > 0.0 ? (1.0 - raised) / others : 0.0;
    judgement.without_token = true;
    return judgement;
  }
};

// A rate, which the caller has chosen by the draft's depth; also where the temperature is 0.
struct Synthetic : Rule {
  static constexpr bool kAtZero = true;

  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    Judgement judgement;
    judgement.kept = at.parameters[0] * at.q;
    return judgement;
  }
};

}  // namespace specens

// SPDX-License-Identifier: Apache-2.0
// Gates, which keep x whatever its probability or draw from the target afresh; and the veto.
#pragma once

#include "plain.h"
#include "sums.h"

namespace specens {

// Keeps x where the gate is open; else the target is drawn from afresh.
struct Gate : Rule {
  static constexpr bool kAtZero = true;

  static SPECENS_HOST_DEVICE Judgement gate(double q, bool open) {
    Judgement judgement;
    judgement.kept = open ? q : 0.0;
    judgement.left = Left::kTarget;
    judgement.trusted = open;
    return judgement;
  }
};

// Of a divergence: over all tokens, or over the target's best and one token for the rest.
template <typename Term>
struct DivergenceGate : Gate {
  static constexpr bool kSweeps = true;
  static constexpr bool kNeedsDraft = true;

  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    const double top = at.parameters[1];
    double distance;
    if (top > 0.0 && top < static_cast<double>(at.vocab_size)) {
      const double bound = at.least_of_top(Side::kTarget, static_cast<int64_t>(top));
      const Sums inside = at.sums(Inside<Term>{least(bound)});
      const double rest = Term::term(inside.value[1], inside.value[2], StandardLog{});
      distance = inside.value[0] + rest;
    } else {
      distance = at.sums(Whole<Term>{}).value[0];
    }
    return gate(at.q, minimum(distance, Term::kMost) <= at.parameters[0]);
  }
};

struct Typical : Gate {
  static constexpr bool kSweeps = true;

  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    const double entropy = at.sums(TargetEntropy{}).value[0];
    return gate(at.q, at.p > minimum(::exp(-entropy) * at.parameters[1], at.parameters[0]));
  }
};

struct TopK : Gate {
  static constexpr bool kSweeps = true;

  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    return gate(at.q, at.sums(Above{at.p}).value[0] < at.parameters[0]);
  }
};

// The memory of `likelihood` after one more emitted token.
SPECENS_HOST_DEVICE double remember(double memory, double log_prob, double smoothing) {
  return smoothing * memory - (1.0 - smoothing) * log_prob;
}

struct Likelihood : Gate {
  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    const double surprise = remember(at.memory, ::log(at.p), at.parameters[1]);
    return gate(at.q, surprise <= at.parameters[0]);
  }
};

// Both unsure, and of the same tokens: whatever the draft says, the target says another.
struct EntropyVeto : Rule {
  static constexpr bool kSweeps = true;
  static constexpr bool kAtZero = true;
  static constexpr bool kNeedsDraft = true;

  template <typename At>
  static SPECENS_JUDGE bool vetoes(const At& at) {
    if (!(at.p < 1.0)) return false;
    const Sums entropies = at.sums(Entropies{});
    if (!(entropies.value[0] > at.parameters[0] && entropies.value[1] > at.parameters[1])) {
      return false;
    }
    const auto top = static_cast<int64_t>(at.parameters[3]);
    if (top >= at.vocab_size) return true;
    const double target = least(at.least_of_top(Side::kTarget, top));
    const double draft = least(at.least_of_top(Side::kDraft, top));
    const double common = at.sums(Common{target, draft}).value[0];
    return common >= at.parameters[2] * static_cast<double>(top);
  }

  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    Judgement judgement = Rejection::judge(at);
    if (!vetoes(at)) return judgement;
    judgement.kept = 0.0;
    judgement.left = Left::kTarget;
    judgement.without_token = true;
    judgement.vetoed = true;
    return judgement;
  }
};

}  // namespace specens

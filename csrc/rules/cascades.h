// SPDX-License-Identifier: Apache-2.0
// Cascades: the draft's law where it may answer by itself, by the row or by the token.
#pragma once

#include "sums.h"

namespace specens {

// q where the row does not defer, p where it does.
struct RowCascade : Rule {
  static constexpr bool kSweeps = true;
  static constexpr bool kAtZero = true;
  static constexpr bool kNeedsDraft = true;

  template <typename At>
  static SPECENS_JUDGE Judgement judge_row(const At& at, double bound) {
    Judgement judgement;
    judgement.trusted = !(at.highest(Side::kDraft) < least(bound));
    judgement.kept = judgement.trusted ? at.q : minimum(at.p, at.q);
    judgement.scale = judgement.trusted ? 0.0 : 1.0;
    return judgement;
  }
};

struct CascadeChow : RowCascade {
  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    return judge_row(at, 1.0 - at.parameters[0]);
  }
};

struct CascadeDiff : RowCascade {
  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    return judge_row(at, at.highest(Side::kTarget) - at.parameters[0]);
  }
};

struct CascadeOpt : RowCascade {
  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    const double distance = at.sums(Whole<TvTerm>{}).value[0];
    return judge_row(at, at.highest(Side::kTarget) - at.parameters[0] * distance);
  }
};

// The draft's mass on tokens that defer goes to p.
template <Side kSide>
struct TokenCascade : Rule {
  static constexpr bool kSweeps = true;
  static constexpr bool kAtZero = true;
  static constexpr bool kNeedsDraft = kSide == Side::kDraft;

  template <typename At>
  static SPECENS_JUDGE Judgement judge_tokens(const At& at, double highest_that_defers) {
    Judgement judgement;
    judgement.left = kSide == Side::kTarget ? Left::kCascadeByTarget : Left::kCascadeByDraft;
    judgement.bound = least(highest_that_defers);
    judgement.trusted = !((kSide == Side::kTarget ? at.p : at.q) < judgement.bound);
    if (at.at_zero) return judgement;
    const bool some = judgement.bound > 0.0;
    judgement.scale = some ? at.sums(Deferred<kSide>{judgement.bound}).value[0] : 0.0;
    const double law = judgement.scale * at.p + (judgement.trusted ? at.q : 0.0);
    judgement.kept = minimum(law, at.q);
    return judgement;
  }
};

struct CascadeV1 : TokenCascade<Side::kDraft> {
  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    return judge_tokens(at, at.highest(Side::kTarget) - at.parameters[0]);
  }
};

struct CascadeV2 : TokenCascade<Side::kTarget> {
  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    return judge_tokens(at, at.highest(Side::kTarget) - at.parameters[0]);
  }
};

struct CascadeV3 : TokenCascade<Side::kTarget> {
  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    return judge_tokens(at, (1.0 - at.parameters[0]) * at.highest(Side::kTarget));
  }
};

}  // namespace specens

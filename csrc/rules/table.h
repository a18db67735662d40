// SPDX-License-Identifier: Apache-2.0
// Acceptance rules: the arithmetic of specens_kernels/acceptance/, written once for CPU and CUDA,
// and the names under which Python finds it. To add a rule: its struct in the file of its kind, its
// id, its line in `kRules` and in `with_rule`.
#pragma once

#include "block.h"
#include "cascades.h"
#include "gates.h"
#include "mentored.h"
#include "plain.h"

namespace specens {

enum class RuleId : int {
  kRejection,
  kLenient,
  kGreedy,
  kBlock,
  kMentored,
  kCactus,
  kCascadeChow,
  kCascadeDiff,
  kCascadeOpt,
  kCascadeV1,
  kCascadeV2,
  kCascadeV3,
  kJsFsd,
  kJs,
  kKl,
  kReverseKl,
  kTv,
  kTypical,
  kTopK,
  kLikelihood,
  kEntropyVeto,
  kSynthetic,
};

// What Python calls an id.
template <typename Id>
struct Named {
  const char* name;
  Id id;
};

constexpr Named<RuleId> kRules[] = {
    {"rejection", RuleId::kRejection},
    {"k_seq", RuleId::kRejection},  // of one token
    {"lenient", RuleId::kLenient},
    {"greedy", RuleId::kGreedy},
    {"block", RuleId::kBlock},
    {"mentored", RuleId::kMentored},
    {"cactus", RuleId::kCactus},
    {"cascade_chow", RuleId::kCascadeChow},
    {"cascade_diff", RuleId::kCascadeDiff},
    {"cascade_opt", RuleId::kCascadeOpt},
    {"cascade_v1", RuleId::kCascadeV1},
    {"cascade_v2", RuleId::kCascadeV2},
    {"cascade_v3", RuleId::kCascadeV3},
    {"js_fsd", RuleId::kJsFsd},
    {"js", RuleId::kJs},
    {"kl", RuleId::kKl},
    {"reverse_kl", RuleId::kReverseKl},
    {"tv", RuleId::kTv},
    {"typical", RuleId::kTypical},
    {"top_k", RuleId::kTopK},
    {"likelihood", RuleId::kLikelihood},
    {"entropy_veto", RuleId::kEntropyVeto},
    {"synthetic", RuleId::kSynthetic},
};

// Calls function(rule) with the struct of `id`.
template <typename Function>
SPECENS_HOST_DEVICE auto with_rule(RuleId id, Function&& function) {
  switch (id) {
    case RuleId::kLenient:
      return function(Lenient{});
    case RuleId::kGreedy:
      return function(Greedy{});
    case RuleId::kMentored:
      return function(Mentored{});
    case RuleId::kCactus:
      return function(Cactus{});
    case RuleId::kCascadeChow:
      return function(CascadeChow{});
    case RuleId::kCascadeDiff:
      return function(CascadeDiff{});
    case RuleId::kCascadeOpt:
      return function(CascadeOpt{});
    case RuleId::kCascadeV1:
      return function(CascadeV1{});
    case RuleId::kCascadeV2:
      return function(CascadeV2{});
    case RuleId::kCascadeV3:
      return function(CascadeV3{});
    case RuleId::kJsFsd:
      return function(DivergenceGate<JsFsdTerm>{});
    case RuleId::kJs:
      return function(DivergenceGate<JsTerm>{});
    case RuleId::kKl:
      return function(DivergenceGate<KlTerm>{});
    case RuleId::kReverseKl:
      return function(DivergenceGate<ReverseKlTerm>{});
    case RuleId::kTv:
      return function(DivergenceGate<TvTerm>{});
    case RuleId::kTypical:
      return function(Typical{});
    case RuleId::kTopK:
      return function(TopK{});
    case RuleId::kLikelihood:
      return function(Likelihood{});
    case RuleId::kEntropyVeto:
      return function(EntropyVeto{});
#if !defined(__CUDACC__)  // where nobody chooses a rate by the depth
    case RuleId::kSynthetic:
      return function(Synthetic{});
#endif
    default:
      return function(Rejection{});
  }
}

}  // namespace specens

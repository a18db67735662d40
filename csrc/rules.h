// SPDX-License-Identifier: Apache-2.0
// Acceptance rules and ensembles: the arithmetic of specens_kernels/acceptance.py and ensembles.py,
// for scalars, vectors and CUDA threads alike, and the names under which Python finds it. To add
// one: its functor, its id, its line in the table and in the dispatch below.
#pragma once

#if defined(__CUDACC__)
#define SPECENS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPECENS_HOST_DEVICE inline
#endif

namespace specens {

SPECENS_HOST_DEVICE float minimum(float a, float b) { return a < b ? a : b; }
SPECENS_HOST_DEVICE double minimum(double a, double b) { return a < b ? a : b; }

// --- acceptance rules ---
// kept(target, draft, lenience): the mass of each token that is kept.

struct Rejection {
  template <typename T>
  static SPECENS_HOST_DEVICE T kept(T target, T draft, T /*lenience*/) {
    return minimum(target, draft);
  }
};

struct Lenient {
  template <typename T>
  static SPECENS_HOST_DEVICE T kept(T target, T draft, T lenience) {
    return minimum(target / lenience, draft);
  }
};

// The target has collapsed onto its most probable token before this is asked.
struct Greedy {
  template <typename T>
  static SPECENS_HOST_DEVICE T kept(T target, T /*draft*/, T /*lenience*/) {
    return target;
  }
};

enum class RuleId : int { kRejection, kLenient, kGreedy };

struct RuleEntry {
  const char* name;
  RuleId id;
};

constexpr RuleEntry kRules[] = {
    {"rejection", RuleId::kRejection},
    {"lenient", RuleId::kLenient},
    {"greedy", RuleId::kGreedy},
};

// Calls function(rule) with the functor of `id`.
template <typename Function>
SPECENS_HOST_DEVICE auto with_rule(RuleId id, Function&& function) {
  switch (id) {
    case RuleId::kLenient:
      return function(Lenient{});
    case RuleId::kGreedy:
      return function(Greedy{});
    default:
      return function(Rejection{});
  }
}

// --- ensembles ---
// fold(folded, value, weight), starting at 0.

struct WeightedSum {
  template <typename T>
  static SPECENS_HOST_DEVICE T fold(T folded, T value, T weight) {
    return folded + weight * value;
  }
};

// What is folded: probabilities, or logits with one softmax afterwards.
enum class Space : int { kProbs, kLogits };
enum class EnsembleId : int { kMixture, kProduct };

struct EnsembleEntry {
  const char* name;
  EnsembleId id;
  Space space;
};

constexpr EnsembleEntry kEnsembles[] = {
    {"mixture", EnsembleId::kMixture, Space::kProbs},
    {"product", EnsembleId::kProduct, Space::kLogits},
};

SPECENS_HOST_DEVICE constexpr Space space_of(EnsembleId id) {
  return id == EnsembleId::kMixture ? Space::kProbs : Space::kLogits;
}

}  // namespace specens

// SPDX-License-Identifier: Apache-2.0
// A rule judges one drafted token x at one row: `judge(at)` asks a backend's `At` for what it needs
// and answers with a `Judgement`, a few numbers that say what x keeps and, for any token, what is
// left. An `At` has
//   double p, q              the probabilities of x: the target's and the draft's
//   double memory            what the rule remembers of the tokens before
//   const double* parameters in the registry's order
//   int64_t vocab_size
//   bool at_zero             the temperature is 0: only `trusted` and `vetoed` will be read
//   double highest(Side)     the largest probability of a law
//   double least_of_top(Side, int64_t n)  the n-th largest, for n below vocab_size
//   Sums sums(const Sum&)    one sweep: the sums of sums.h
// The last three are collective: on a GPU every thread of a block calls them, and gets the same.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SPECENS_HOST_DEVICE __host__ __device__ __forceinline__
// What asks an `At`, which is of one side only.
#define SPECENS_JUDGE __device__ __forceinline__
#else
// Inlined, so that a sweep's instruction set is also its sums'.
#define SPECENS_HOST_DEVICE inline __attribute__((always_inline))
#define SPECENS_JUDGE inline
#endif

namespace specens {

SPECENS_HOST_DEVICE float minimum(float a, float b) { return a < b ? a : b; }
SPECENS_HOST_DEVICE double minimum(double a, double b) { return a < b ? a : b; }

constexpr int kMaxParameters = 4;

// Probabilities closer than this, relatively, are tied; the reference's TIE.
constexpr double kTieGap = 0x1p-40;

// a < least(b) iff a < b and they are not tied; b > 0, or nothing is below.
SPECENS_HOST_DEVICE double least(double b) { return b * (1.0 - kTieGap); }

enum class Side : int { kTarget, kDraft };

// What replaces a token that is not kept, not normalised.
enum class Left : int {
  kTarget,           // p
  kScaled,           // max(scale p - q, 0)
  kCascadeByTarget,  // max(scale p - q, 0) for tokens with p < bound, else scale p
  kCascadeByDraft,   // the same by q < bound
};

struct Judgement {
  double kept = 0.0;  // x is kept iff coin * q < kept
  Left left = Left::kScaled;
  double scale = 1.0;
  double bound = 0.0;
  bool without_token = false;  // nothing is left of x itself
  // Where the temperature is 0: x is kept though it is not the target's most probable token; x may
  // not be emitted.
  bool trusted = false;
  bool vetoed = false;
};

// What is left of a token other than x, or of x if not `without_token`.
template <typename T>
SPECENS_HOST_DEVICE T left_of(const Judgement& judgement, T p, T q) {
  if (judgement.left == Left::kTarget) return p;
  const T bound = static_cast<T>(judgement.bound);
  const bool spared = (judgement.left == Left::kCascadeByTarget && !(p < bound)) ||
                      (judgement.left == Left::kCascadeByDraft && !(q < bound));
  const T whole = static_cast<T>(judgement.scale) * p;
  const T rest = spared ? whole : whole - q;
  return rest > T(0) ? rest : T(0);
}

// What a backend may know of a rule beforehand.
struct Rule {
  static constexpr bool kSweeps = false;      // calls `highest`, `least_of_top` or `sums`
  static constexpr bool kAtZero = false;      // is asked where the temperature is 0
  static constexpr bool kNeedsDraft = false;  // reads the draft's law there, too
};

}  // namespace specens

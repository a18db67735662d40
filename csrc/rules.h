// SPDX-License-Identifier: Apache-2.0
// Acceptance rules: the arithmetic of specens_kernels/acceptance.py, written once for CPU and CUDA,
// and the names under which Python finds it.
//
// A rule judges one drafted token x at one row: `judge(at)` asks a backend's `At` for what it needs
// and answers with a `Judgement`, a few numbers that say what x keeps and, for any token, what is
// left. An `At` has
//   double p, q              the probabilities of x: the target's and the draft's
//   double memory            what the rule remembers of the tokens before
//   const double* parameters in the registry's order
//   int64_t vocab_size
//   bool bare                the temperature is 0: only `trusted` and `vetoed` will be read
//   double highest(Side)     the largest probability of a law
//   double least_of_top(Side, int64_t n)  the n-th largest, for n below vocab_size
//   Sums sums(const Measure&)  one sweep: sums over the vocabulary of a function of p and q
// The last three are collective: on a GPU every thread of a block calls them, and gets the same.
//
// To add a rule: its struct, its id, its line in the table and in `with_rule`.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SPECENS_HOST_DEVICE __host__ __device__ __forceinline__
// What asks an `At`, which is of one side only.
#define SPECENS_JUDGE __device__ __forceinline__
#else
// Inlined, so that a sweep's instruction set is also its measure's.
#define SPECENS_HOST_DEVICE inline __attribute__((always_inline))
#define SPECENS_JUDGE inline
#endif

namespace specens {

SPECENS_HOST_DEVICE float minimum(float a, float b) { return a < b ? a : b; }
SPECENS_HOST_DEVICE double minimum(double a, double b) { return a < b ? a : b; }

// --- acceptance rules ---

constexpr int kMaxParameters = 4;
constexpr int kMaxSums = 5;

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

// --- measures: sums over the vocabulary ---
// add(p, q, log, sums) adds one token's terms; log is the backend's, for positive finite numbers.
// A backend need not make q where it is not read.

struct Sums {
  double value[kMaxSums];
};

template <typename T, typename Log>
SPECENS_HOST_DEVICE T entropy_term(T p, const Log& log) {
  const T term = p * log(p);
  return p > T(0) ? -term : T(0);
}

template <typename T, typename Log>
SPECENS_HOST_DEVICE T kl_term(T p, T q, const Log& log) {
  const T term = p * log(p / q);
  return p > T(0) ? (q > T(0) ? term : static_cast<T>(HUGE_VAL)) : T(0);
}

// Divergences: terms of p and q in nats, which are 0 where both are.
struct JsFsdTerm {
  template <typename T, typename Log>
  static SPECENS_HOST_DEVICE T term(T p, T q, const Log& log) {
    const T middle = (p + q) / T(2);
    return (kl_term(middle, p, log) + kl_term(middle, q, log)) / T(2);
  }
};

struct JsTerm {
  template <typename T, typename Log>
  static SPECENS_HOST_DEVICE T term(T p, T q, const Log& log) {
    const T middle = (p + q) / T(2);
    return (kl_term(p, middle, log) + kl_term(q, middle, log)) / T(2);
  }
};

struct KlTerm {
  template <typename T, typename Log>
  static SPECENS_HOST_DEVICE T term(T p, T q, const Log& log) {
    return kl_term(p, q, log);
  }
};

struct ReverseKlTerm {
  template <typename T, typename Log>
  static SPECENS_HOST_DEVICE T term(T p, T q, const Log& log) {
    return kl_term(q, p, log);
  }
};

struct TvTerm {
  template <typename T, typename Log>
  static SPECENS_HOST_DEVICE T term(T p, T q, const Log& /*log*/) {
    return (p > q ? p - q : q - p) / T(2);
  }
};

// A divergence over all tokens.
template <typename Divergence>
struct Whole {
  static constexpr int kSums = 1;
  static constexpr bool kReadsDraft = true;

  template <typename T, typename Log>
  SPECENS_HOST_DEVICE void add(T p, T q, const Log& log, T (&sums)[kSums]) const {
    sums[0] += Divergence::term(p, q, log);
  }
};

// A divergence over tokens with p >= bound, and both laws' masses elsewhere.
template <typename Divergence>
struct Inside {
  static constexpr int kSums = 3;
  static constexpr bool kReadsDraft = true;
  double bound;

  template <typename T, typename Log>
  SPECENS_HOST_DEVICE void add(T p, T q, const Log& log, T (&sums)[kSums]) const {
    const bool inside = p >= static_cast<T>(bound);
    sums[0] += Divergence::term(inside ? p : T(0), inside ? q : T(0), log);
    sums[1] += inside ? T(0) : p;
    sums[2] += inside ? T(0) : q;
  }
};

// The draft's mass on tokens with p < bound, or q < bound.
template <Side kSide>
struct Deferred {
  static constexpr int kSums = 1;
  static constexpr bool kReadsDraft = true;
  double bound;

  template <typename T, typename Log>
  SPECENS_HOST_DEVICE void add(T p, T q, const Log& /*log*/, T (&sums)[kSums]) const {
    const T seen = kSide == Side::kTarget ? p : q;
    sums[0] += seen < static_cast<T>(bound) ? q : T(0);
  }
};

// Of h = median(p / b, q, p / a): p's mass where q is too large, and where it is too small, and q's
// of both; p's nats of the rest, and of all, KL(p || q).
struct Clipped {
  static constexpr int kSums = 5;
  static constexpr bool kReadsDraft = true;
  double a, b;

  template <typename T, typename Log>
  SPECENS_HOST_DEVICE void add(T p, T q, const Log& log, T (&sums)[kSums]) const {
    const bool below = p<static_cast<T>(a) * q, above = p> static_cast<T>(b) * q;
    const bool inside = !(below | above);
    sums[0] += below ? p : T(0);
    sums[1] += above ? p : T(0);
    sums[2] += inside ? T(0) : q;
    const T nats = kl_term(p, q, log);
    sums[3] += inside ? nats : T(0);
    sums[4] += nats;
  }
};

// The target's entropy in nats.
struct TargetEntropy {
  static constexpr int kSums = 1;
  static constexpr bool kReadsDraft = false;

  template <typename T, typename Log>
  SPECENS_HOST_DEVICE void add(T p, T /*q*/, const Log& log, T (&sums)[kSums]) const {
    sums[0] += entropy_term(p, log);
  }
};

// Both entropies in nats.
struct Entropies {
  static constexpr int kSums = 2;
  static constexpr bool kReadsDraft = true;

  template <typename T, typename Log>
  SPECENS_HOST_DEVICE void add(T p, T q, const Log& log, T (&sums)[kSums]) const {
    sums[0] += entropy_term(p, log);
    sums[1] += entropy_term(q, log);
  }
};

// The number of tokens with more than p.
struct Above {
  static constexpr int kSums = 1;
  static constexpr bool kReadsDraft = false;
  double p;

  template <typename T, typename Log>
  SPECENS_HOST_DEVICE void add(T here, T /*q*/, const Log& /*log*/, T (&sums)[kSums]) const {
    sums[0] += static_cast<T>(p) < here * static_cast<T>(1.0 - kTieGap) ? T(1) : T(0);
  }
};

// The number of tokens that both laws have at a bound or above.
struct Common {
  static constexpr int kSums = 1;
  static constexpr bool kReadsDraft = true;
  double target_bound;
  double draft_bound;

  template <typename T, typename Log>
  SPECENS_HOST_DEVICE void add(T p, T q, const Log& /*log*/, T (&sums)[kSums]) const {
    const bool inside = (p >= static_cast<T>(target_bound)) & (q >= static_cast<T>(draft_bound));
    sums[0] += inside ? T(1) : T(0);
  }
};

// `log` for what is not in a sweep.
struct StandardLog {
  SPECENS_HOST_DEVICE double operator()(double x) const { return ::log(x); }
};

// --- rules ---

// What a backend may know of a rule beforehand.
struct Rule {
  static constexpr bool kSweeps = false;      // calls `highest`, `least_of_top` or `sums`
  static constexpr bool kAtZero = false;      // is asked where the temperature is 0
  static constexpr bool kNeedsDraft = false;  // reads the draft's law there, too
};

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

// --- rules: the law nearest to the draft's ---

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

// --- rules: cascades ---

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
    if (at.bare) return judgement;
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

// --- rules: gates ---

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
template <typename Divergence>
struct DivergenceGate : Gate {
  static constexpr bool kSweeps = true;
  static constexpr bool kNeedsDraft = true;

  template <typename At>
  static SPECENS_JUDGE Judgement judge(const At& at) {
    const double top = at.parameters[1];
    double found;
    if (top > 0.0 && top < static_cast<double>(at.vocab_size)) {
      const double bound = at.least_of_top(Side::kTarget, static_cast<int64_t>(top));
      const Sums inside = at.sums(Inside<Divergence>{least(bound)});
      const double rest = Divergence::term(inside.value[1], inside.value[2], StandardLog{});
      found = inside.value[0] + rest;
    } else {
      found = at.sums(Whole<Divergence>{}).value[0];
    }
    return gate(at.q, found <= at.parameters[0]);
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

// --- rules: the whole chain ---
// `block` judges a chain at once; where the temperature is 0 it is `rejection`.

// How much of the path so far is kept, capped: c_i = min(1, c_{i-1} p(x_i) / q(x_i)).
SPECENS_HOST_DEVICE double block_step(double reach, double p, double q) {
  return q > 0.0 ? minimum(1.0, reach * (p / q)) : 0.0;
}

// Chance that a block ends no earlier than here; `mass_left` = sum max(reach p - q, 0) over the
// row after x_i.
SPECENS_HOST_DEVICE double block_threshold(double reach, double mass_left) {
  return mass_left > 0.0 ? mass_left / (mass_left + (1.0 - reach)) : (reach >= 1.0 ? 1.0 : 0.0);
}

// --- names ---

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
    default:
      return function(Rejection{});
  }
}

}  // namespace specens

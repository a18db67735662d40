// SPDX-License-Identifier: Apache-2.0
// What rules sum over the vocabulary. add(p, q, log, sums) of a sum adds one token's terms; log is
// the backend's, for positive finite numbers. A backend need not make q where it is not read. To
// add a sum: its struct here, and its name in csrc/cpu/dispatch.h.
#pragma once

#include "judgement.h"

namespace specens {

constexpr int kMaxSums = 5;

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

// Divergences: terms of p and q in nats, which are 0 where both are. kMost: what the sum may not
// exceed, however its terms are rounded, if a threshold in single precision can be that number.
struct Divergence {
  static constexpr double kMost = HUGE_VAL;
};

struct JsFsdTerm : Divergence {
  template <typename T, typename Log>
  static SPECENS_HOST_DEVICE T term(T p, T q, const Log& log) {
    const T middle = (p + q) / T(2);
    return (kl_term(middle, p, log) + kl_term(middle, q, log)) / T(2);
  }
};

struct JsTerm : Divergence {
  template <typename T, typename Log>
  static SPECENS_HOST_DEVICE T term(T p, T q, const Log& log) {
    const T middle = (p + q) / T(2);
    return (kl_term(p, middle, log) + kl_term(q, middle, log)) / T(2);
  }
};

struct KlTerm : Divergence {
  template <typename T, typename Log>
  static SPECENS_HOST_DEVICE T term(T p, T q, const Log& log) {
    return kl_term(p, q, log);
  }
};

struct ReverseKlTerm : Divergence {
  template <typename T, typename Log>
  static SPECENS_HOST_DEVICE T term(T p, T q, const Log& log) {
    return kl_term(q, p, log);
  }
};

struct TvTerm {
  static constexpr double kMost = 1.0;

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
    const bool below = p < static_cast<T>(a) * q;
    const bool above = p > static_cast<T>(b) * q;
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

}  // namespace specens

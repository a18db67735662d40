# SPDX-License-Identifier: Apache-2.0
"""The search of `mentored` for the law nearest to the draft's, a sweep over the vocabulary a step.

`MentorSearch` of csrc/ is the same, and says why.
"""

import math

import triton
import triton.language as tl

from .rules import kl, number

MOST_SWEEPS = tl.constexpr(64)
_MOST_LOG_B = tl.constexpr(29.0)
_LEAST_INVERSE_B = tl.constexpr(math.exp(-29.0))
_LEAST_LOG_A = tl.constexpr(-700.0)
_CLOSE = tl.constexpr(1e-7)
_FINE = tl.constexpr(1e-10)
_ROUNDING = tl.constexpr(1e-14)


@triton.jit
def clipped_terms(p, q, a, b):
    """Of h = median(p / b, q, p / a): p where q is too large, or small; q of both; else nats."""
    below, above = p < a * q, p > b * q
    inside = (below | above) == 0
    nats = kl(tl.where(inside, p, 0.0), tl.where(inside, q, 0.0))
    return tl.where(below, p, 0.0), tl.where(above, p, 0.0), tl.where(inside, 0.0, q), nats


@triton.jit
def start(divergence):
    """What `step` moves: log a, log b, the bounds of both, and undecided steps."""
    log_b = 1.3 * tl.minimum(tl.sqrt(2.0 * divergence), 1.0)
    undecided = tl.full((), 0, tl.int32)
    none, least_a, most_b = number(0.0), number(_LEAST_LOG_A), number(_MOST_LOG_B)
    return -log_b, log_b, least_a, none, none, most_b, undecided


@triton.jit
def _b_alone(log_b, above, excess):
    """Newton's b for this a, which from below does not pass it."""
    inverse = tl.exp(-log_b) - excess / tl.where(above > 0, above, 1.0)
    alone = -tl.log(tl.minimum(tl.maximum(inverse, _LEAST_INVERSE_B), 1.0))
    without = tl.where(excess > 0, log_b * 0.0 + _MOST_LOG_B, log_b / 2.0)
    return tl.where(above > 0, alone, without)


@triton.jit
def step(log_a, log_b, a_low, a_high, b_low, b_high, undecided, sums, divergence):
    """The same after a sweep that found `sums` of `clipped_terms`; and whether it is found."""
    below, above, drafted, nats = sums
    inverse_a, inverse_b = tl.exp(-log_a), tl.exp(-log_b)
    # Not the sum less 1: normalisers are good to single precision.
    excess = below * inverse_a + above * inverse_b - drafted
    nats = below * log_a + above * log_b + nats - divergence
    alone = _b_alone(log_b, above, excess)
    sums_to_1 = tl.abs(alone - log_b) < _FINE
    as_0 = (below == 0) & sums_to_1 & (nats <= 0)

    far, near = nats >= -_ROUNDING, nats <= _ROUNDING
    more, less = excess >= -_ROUNDING, (excess <= _ROUNDING) & (below > 0)
    rises = (more & (far | (log_b >= b_high))) | (sums_to_1 & far)
    falls = (rises == 0) & ((less & (near | (log_b <= b_low))) | sums_to_1)
    a_low = tl.where(rises, log_a, a_low)
    a_high = tl.where(falls, log_a, a_high)
    b_high = tl.where(rises & far, tl.minimum(b_high, log_b), b_high)
    b_low = tl.where(falls & near, tl.maximum(b_low, log_b), b_low)
    decided = rises | falls
    undecided = tl.where(decided, 0, undecided + 1)
    narrow = a_high - a_low < _FINE

    slope = inverse_a - inverse_b
    regular = (below > 0) & (above > 0) & (slope > 0)
    by_a = (excess + nats * inverse_b) / tl.where(regular, below * slope, 1.0)
    by_b = -(excess + nats * inverse_a) / tl.where(regular, above * slope, 1.0)
    ends = regular & (tl.abs(by_a) < _CLOSE) & (tl.abs(by_b) < _CLOSE)
    to_a, to_b = log_a + by_a, log_b + by_b
    known = (to_a > tl.maximum(a_low, 3.0 * log_a - 1.0) - _FINE) & (to_a < a_high + _FINE)
    known = known & (to_b > b_low - _FINE) & (to_b < b_high + _FINE)
    steps = ends | (regular & known & (undecided < 2))

    half_a = tl.maximum((a_low + a_high) / 2.0, 2.0 * log_a)
    half_b = tl.where(b_high < _MOST_LOG_B, (b_low + b_high) / 2.0, tl.maximum(b_low, log_b))
    alone_b = tl.minimum(tl.maximum(alone, tl.where(below > 0, b_low, 0.0)), b_high)
    to_a = tl.where(steps, to_a, tl.where(decided, half_a, log_a))
    to_b = tl.where(steps, to_b, tl.where(decided, half_b, alone_b))
    to_a = tl.where(as_0 | narrow, log_a, tl.minimum(to_a, 0.0))
    to_b = tl.where(as_0, alone, tl.where(narrow, log_b, tl.maximum(to_b, 0.0)))
    is_found = as_0 | narrow | ends
    return to_a, to_b, a_low, a_high, b_low, b_high, undecided, is_found


@triton.jit
def kept_and_scale(p, q, log_a, log_b):
    """What x keeps, and the scale of what is left."""
    return tl.minimum(p * tl.exp(-log_a), q), tl.exp(-log_b)

# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules as device functions, under the names of the registries' entries.

The simplest rules say what x keeps of its p and q alone, and leave what `rejection` does. Of the
others a row's scalars, at most one of them a sum over the vocabulary, make a judgement, (kept,
scale, bound, trusted): what x keeps, two numbers that say what is left of any token, and whether x
is kept at temperature 0 though it is not the target's best. Numbers are float64. To add one: its
entry in `acceptance/`, then the same arithmetic here, named in `RULES`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Probabilities closer than this, relatively, are tied; the reference's TIE.
_TIE = tl.constexpr(2.0**-40)


@triton.jit
def least(b):
    """a < least(b) iff a < b and they are not tied; b > 0, or nothing is below."""
    return b * (1.0 - _TIE)


@triton.jit
def number(value):
    """A parameter; a bare constant would be of single precision."""
    return tl.full((), value, tl.float64)


@triton.jit
def rejection(target, draft, lenience):
    return tl.minimum(target, draft)


@triton.jit
def lenient(target, draft, lenience):
    return tl.minimum(target / lenience, draft)


@triton.jit
def greedy(target, draft, lenience):
    return target


# drafted: whether the token is x.


@triton.jit
def left_scaled(p, q, drafted, scale, bound):
    # The minimum changes nothing but the registers, which are fewer.
    return tl.maximum(scale * p - tl.minimum(scale * p, q), 0.0)


@triton.jit
def left_without_token(p, q, drafted, scale, bound):
    return tl.where(drafted, 0.0, tl.maximum(scale * p - q, 0.0))


@triton.jit
def left_below_target(p, q, drafted, scale, bound):
    """The draft's own mass is left out of tokens that do not defer."""
    return tl.where(p < bound, tl.maximum(scale * p - q, 0.0), scale * p)


@triton.jit
def left_below_draft(p, q, drafted, scale, bound):
    return tl.where(q < bound, tl.maximum(scale * p - q, 0.0), scale * p)


@triton.jit
def left_unless_vetoed(p, q, drafted, scale, bound):
    """The bound says whether x is vetoed."""
    return tl.where(bound > 0, tl.where(drafted, 0.0, p), tl.maximum(p - q, 0.0))


@triton.jit
def kl(p, q):
    return tl.where(p > 0, tl.where(q > 0, p * tl.log(p / q), float("inf")), 0.0)


@triton.jit
def term_js_fsd(p, q, bound):
    middle = (p + q) / 2
    return (kl(middle, p) + kl(middle, q)) / 2


@triton.jit
def term_js(p, q, bound):
    middle = (p + q) / 2
    return (kl(p, middle) + kl(q, middle)) / 2


@triton.jit
def term_kl(p, q, bound):
    return kl(p, q)


@triton.jit
def term_reverse_kl(p, q, bound):
    return kl(q, p)


@triton.jit
def term_tv(p, q, bound):
    return tl.abs(p - q) / 2


@triton.jit
def term_entropy(p, q, bound):
    return tl.where(p > 0, -p * tl.log(p), 0.0)


@triton.jit
def term_above(p, q, bound):
    return tl.where(bound < least(p), 1.0, 0.0)


@triton.jit
def term_below_target(p, q, bound):
    return tl.where(p < bound, q, 0.0)


@triton.jit
def term_below_draft(p, q, bound):
    return tl.where(q < bound, q, 0.0)


# Of what a term or what is left compares with. best: the target's highest probability.


@triton.jit
def bound_token(p, best, parameters):
    return p


@triton.jit
def bound_difference(p, best, parameters):
    return least(best - number(parameters[0]))


@triton.jit
def bound_ratio(p, best, parameters):
    return least((1.0 - number(parameters[0])) * best)


# best, draft_best: the highest probabilities. statistic: the sum. memory: of the tokens before.


@triton.jit
def plain(p, q, best, draft_best, bound, statistic, memory, parameters):
    one = tl.full((), 1.0, tl.float64)
    return tl.minimum(p, q), one, bound, p < 0


@triton.jit
def cactus(p, q, best, draft_best, bound, statistic, memory, parameters):
    others = 1.0 - p
    spread = p * others
    variance = tl.where(spread > 0, 2.0 * number(parameters[0]) * tl.maximum(spread, 1e-300), 0.0)
    raised = tl.minimum(p + tl.sqrt(variance), 1.0)
    scale = tl.where(others > 0, (1.0 - raised) / tl.where(others > 0, others, 1.0), 0.0)
    return tl.minimum(raised, q), scale, bound, p < 0


@triton.jit
def _row_cascade(p, q, draft_best, bound, least_best):
    """q where the row does not defer, p where it does."""
    defers = draft_best < least(least_best)
    scale = tl.where(defers, 1.0, 0.0).to(tl.float64)
    return tl.where(defers, tl.minimum(p, q), q), scale, bound, defers == 0


@triton.jit
def cascade_chow(p, q, best, draft_best, bound, statistic, memory, parameters):
    return _row_cascade(p, q, draft_best, bound, 1.0 - number(parameters[0]))


@triton.jit
def cascade_diff(p, q, best, draft_best, bound, statistic, memory, parameters):
    return _row_cascade(p, q, draft_best, bound, best - number(parameters[0]))


@triton.jit
def cascade_opt(p, q, best, draft_best, bound, statistic, memory, parameters):
    return _row_cascade(p, q, draft_best, bound, best - number(parameters[0]) * statistic)


@triton.jit
def _token_cascade(p, q, bound, deferred, trusted):
    """The draft's mass on tokens that defer goes to p."""
    law = deferred * p + tl.where(trusted, q, 0.0)
    return tl.minimum(law, q), deferred, bound, trusted


@triton.jit
def cascade_by_draft(p, q, best, draft_best, bound, statistic, memory, parameters):
    return _token_cascade(p, q, bound, statistic, q >= bound)


@triton.jit
def cascade_by_target(p, q, best, draft_best, bound, statistic, memory, parameters):
    return _token_cascade(p, q, bound, statistic, p >= bound)


@triton.jit
def _gate(q, bound, is_open):
    one = tl.full((), 1.0, tl.float64)
    return tl.where(is_open, q, 0.0), one, bound, is_open


@triton.jit
def divergence_gate(p, q, best, draft_best, bound, statistic, memory, parameters):
    return _gate(q, bound, statistic <= number(parameters[0]))


@triton.jit
def tv_gate(p, q, best, draft_best, bound, statistic, memory, parameters):
    # Rounding may lift the sum above what it can be.
    return _gate(q, bound, tl.minimum(statistic, 1.0) <= number(parameters[0]))


@triton.jit
def typical(p, q, best, draft_best, bound, statistic, memory, parameters):
    most = tl.minimum(tl.exp(-statistic) * number(parameters[1]), number(parameters[0]))
    return _gate(q, bound, p > most)


@triton.jit
def top_k(p, q, best, draft_best, bound, statistic, memory, parameters):
    return _gate(q, bound, statistic < number(parameters[0]))


@triton.jit
def remember(memory, log_prob, smoothing):
    """The memory of `likelihood` after one more emitted token."""
    return number(smoothing) * memory - (1.0 - number(smoothing)) * log_prob


@triton.jit
def likelihood(p, q, best, draft_best, bound, statistic, memory, parameters):
    surprise = remember(memory, tl.log(p), parameters[1])
    return _gate(q, bound, surprise <= number(parameters[0]))


@triton.jit
def block_step(reach, p, q):
    """How much of the path so far is kept, capped."""
    return tl.where(q > 0, tl.minimum(1.0, reach * (p / tl.where(q > 0, q, 1.0))), 0.0)


@triton.jit
def block_threshold(reach, mass_left):
    """Chance that a block ends no earlier than here."""
    share = mass_left / tl.where(mass_left > 0, mass_left + (1.0 - reach), 1.0)
    return tl.where(mass_left > 0, share, tl.where(reach >= 1.0, 1.0, 0.0))


class Rule(NamedTuple):
    """How x is judged at one row; functions are None where the rule does without.

    kept: what x keeps, where its p and q say it; else judge, of the row's scalars. left: of a
    token; the target if None. term, bound: of the sum, and of what compares with it. reads_draft:
    whether the term reads q. finds_best: whether the target's best is asked for. at_zero: whether
    the rule is asked at temperature 0. walks: whether a row depends on those before. narrows:
    whether the second parameter says how many of the target's tokens the sum tells apart, if not 0.
    vetoes: whether x is refused where both laws are unsure. mentors: whether a sum that is above
    the parameter, but for 0, is followed by a search for what is kept and left.
    """

    kept: Any = None
    judge: Any = None
    left: Any = left_scaled
    term: Any = None
    bound: Any = None
    reads_draft: Any = False
    finds_best: Any = False
    at_zero: Any = False
    walks: Any = False
    narrows: Any = False
    vetoes: Any = False
    mentors: Any = False


def _cascade(judge: Any, **options: Any) -> Rule:
    return Rule(judge=judge, finds_best=True, at_zero=True, **options)


def _token_cascade_of(judge: Any, left: Any, term: Any, bound: Any) -> Rule:
    return _cascade(judge, left=left, term=term, bound=bound, reads_draft=True)


def _gate_of(judge: Any, **options: Any) -> Rule:
    return Rule(judge=judge, left=None, at_zero=True, **options)


_BY_TARGET = (cascade_by_target, left_below_target, term_below_target)
_BY_DRAFT = (cascade_by_draft, left_below_draft, term_below_draft)
_DIVERGENCES = {
    "js_fsd": term_js_fsd,
    "js": term_js,
    "kl": term_kl,
    "reverse_kl": term_reverse_kl,
}
RULES = {
    "rejection": Rule(rejection),
    "k_seq": Rule(rejection),  # of one token
    "lenient": Rule(lenient),
    "greedy": Rule(greedy),
    "block": Rule(judge=plain, walks=True),
    "mentored": Rule(judge=plain, term=term_kl, reads_draft=True, mentors=True),
    "cactus": Rule(judge=cactus, left=left_without_token),
    "cascade_chow": Rule(judge=cascade_chow, at_zero=True),
    "cascade_diff": _cascade(cascade_diff),
    "cascade_opt": _cascade(cascade_opt, term=term_tv, reads_draft=True),
    "cascade_v1": _token_cascade_of(*_BY_DRAFT, bound_difference),
    "cascade_v2": _token_cascade_of(*_BY_TARGET, bound_difference),
    "cascade_v3": _token_cascade_of(*_BY_TARGET, bound_ratio),
    **{
        name: _gate_of(divergence_gate, term=term, reads_draft=True, narrows=True)
        for name, term in _DIVERGENCES.items()
    },
    "tv": _gate_of(tv_gate, term=term_tv, reads_draft=True, narrows=True),
    "typical": _gate_of(typical, term=term_entropy),
    "top_k": _gate_of(top_k, term=term_above, bound=bound_token),
    "entropy_veto": Rule(judge=plain, left=left_unless_vetoed, at_zero=True, vetoes=True),
    "likelihood": _gate_of(likelihood, walks=True),
}

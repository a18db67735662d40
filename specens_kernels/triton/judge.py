# SPDX-License-Identifier: Apache-2.0
"""`judge`: what becomes of a draft under rules that look at whole laws, or at several rows.

Both laws are computed again, block by block, from the normalisers that the sweep found; sums are of
double precision. One program judges one row; under a rule that goes from row to row, one walks the
whole chain. `rules.py` holds the arithmetic of each rule and knows no kernel.
"""

import triton
import triton.language as tl

from . import mentored, rules
from .chain import (
    BEST,
    DENSE,
    KEPT,
    LEAST_SINGLE_RESIDUAL,
    NOTHING,
    PADDING,
    POINT,
    TARGET,
    draft_token,
    read_row,
    refined_laws,
)
from .cutoffs import halved
from .draw import most_probable
from .logits import log_prob, look
from .parameters import is_greedy, no, yes

BLOCK = tl.constexpr(1024)

# Where p and q of a block's token are this near, or what is left is next to nothing, single
# precision would show.
NEARLY_EQUAL = tl.constexpr(1e-5)
LEAST_SLACK = tl.constexpr(1e-3)


@triton.jit
def _look_at_token(law, proposal, laws, b, t, proposer, token):
    """p and q of one token, which a point draft was drawn from."""
    offsets = token + tl.arange(0, 1)
    p, q = look(law, proposal, laws, b, t, proposer, offsets, offsets >= 0, tl.float64)
    return tl.max(p, 0), tl.where(proposer >= 0, tl.max(q, 0), 1.0)


@triton.jit
def _look_at_block(law, proposal, laws, b, t, proposer, token, start):
    """p and q of a block of tokens; 0 past the last."""
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < law.vocab_size
    p, q = look(law, proposal, laws, b, t, proposer, offsets, mask, tl.float64)
    return p, tl.where(proposer >= 0, q, tl.where(offsets == token, 1.0, 0.0))


@triton.jit
def _sum(law, proposal, verdict, laws, b, t, proposer, token, bound):
    """Of the rule's term over the vocabulary."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, law.vocab_size, BLOCK):
        if verdict.rule.reads_draft:
            p, q = _look_at_block(law, proposal, laws, b, t, proposer, token, start)
            sums += verdict.rule.term(p, q, bound)
        else:
            p, _q = _look_at_block(law, None, laws, b, t, -1, token, start)
            sums += verdict.rule.term(p, p, bound)
    return tl.sum(sums, 0)


@triton.jit
def _side(p, q, OF_DRAFT: tl.constexpr):
    if OF_DRAFT:
        return q
    else:
        return p


@triton.jit
def _least_of_top(law, proposal, laws, b, t, proposer, token, count, OF_DRAFT: tl.constexpr):
    """Tokens are among the `count` most probable, or tie with them, iff not below this.

    Halves the interval, and shrinks it to the probabilities inside: some ten sweeps.
    """
    low = tl.full((), 0.0, tl.float64)
    high = tl.full((), 1.0, tl.float64)
    step = tl.full((), 0, tl.int32)
    while low < high:
        edge = halved(low, high, step)
        sums = tl.zeros((BLOCK,), tl.float64)
        above = tl.full((BLOCK,), 1.0, tl.float64)
        below = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, law.vocab_size, BLOCK):
            p, q = _look_at_block(law, proposal, laws, b, t, proposer, token, start)
            side = _side(p, q, OF_DRAFT)
            beyond = side > edge
            sums += tl.where(beyond, 1.0, 0.0)
            above = tl.minimum(above, tl.where(beyond, side, 1.0))
            below = tl.maximum(below, tl.where(beyond, 0.0, side))
        enough = tl.sum(sums, 0) < count
        high = tl.where(enough, tl.maximum(tl.max(below, 0), low), high)
        low = tl.where(enough, low, tl.minimum(tl.min(above, 0), high))
        step += 1
    return rules.least(high)


@triton.jit
def _count(law, value):
    """How many tokens a parameter asks for, at most all."""
    return tl.minimum(rules.number(value), law.vocab_size).to(tl.int64).to(tl.float64)


@triton.jit
def _narrowed_sum(law, proposal, verdict, laws, b, t, proposer, token):
    """Of the rule's term over the target's most probable tokens, and over the rest as one token."""
    count = _count(law, verdict.parameters[1])
    bound = tl.full((), 0.0, tl.float64)
    if count < law.vocab_size:
        bound = _least_of_top(law, proposal, laws, b, t, proposer, token, count, False)
    sums = tl.zeros((BLOCK,), tl.float64)
    rest = tl.zeros((BLOCK,), tl.float64)
    drafted_rest = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, law.vocab_size, BLOCK):
        p, q = _look_at_block(law, proposal, laws, b, t, proposer, token, start)
        inside = p >= bound
        sums += tl.where(inside, verdict.rule.term(p, q, bound), 0.0)
        rest += tl.where(inside, 0.0, p)
        drafted_rest += tl.where(inside, 0.0, q)
    return tl.sum(sums, 0) + verdict.rule.term(tl.sum(rest, 0), tl.sum(drafted_rest, 0), bound)


@triton.jit
def _vetoes(law, proposal, verdict, laws, b, t, proposer, token, p_of_token):
    """Whether both laws are unsure, and of the same tokens."""
    sums = tl.zeros((BLOCK,), tl.float64)
    drafted_sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, law.vocab_size, BLOCK):
        p, q = _look_at_block(law, proposal, laws, b, t, proposer, token, start)
        sums += rules.term_entropy(p, q, 0.0)
        drafted_sums += rules.term_entropy(q, p, 0.0)
    vetoed = tl.sum(sums, 0) > rules.number(verdict.parameters[0])
    vetoed = vetoed & (tl.sum(drafted_sums, 0) > rules.number(verdict.parameters[1]))
    vetoed = vetoed & (p_of_token < 1)
    count = _count(law, verdict.parameters[3])
    if vetoed & (count < law.vocab_size):
        bound = _least_of_top(law, proposal, laws, b, t, proposer, token, count, False)
        draft_bound = _least_of_top(law, proposal, laws, b, t, proposer, token, count, True)
        common = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, law.vocab_size, BLOCK):
            p, q = _look_at_block(law, proposal, laws, b, t, proposer, token, start)
            exists = start + tl.arange(0, BLOCK) < law.vocab_size
            common += tl.where(exists & (p >= bound) & (q >= draft_bound), 1.0, 0.0)
        vetoed = tl.sum(common, 0) >= rules.number(verdict.parameters[2]) * count
    return vetoed


@triton.jit
def _best_but(law, laws, b, t, token):
    """The lowest of the target's most probable tokens other than one."""
    best = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, law.vocab_size, BLOCK):
        p, _q = _look_at_block(law, None, laws, b, t, -1, token, start)
        offsets = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.where(offsets == token, 0.0, p))
    bound = rules.least(tl.max(best, 0))
    first = tl.full((BLOCK,), 2**31 - 1, tl.int32)
    for start in range(0, law.vocab_size, BLOCK):
        p, _q = _look_at_block(law, None, laws, b, t, -1, token, start)
        offsets = start + tl.arange(0, BLOCK)
        first = tl.minimum(first, tl.where((p >= bound) & (offsets != token), offsets, first))
    return tl.min(first, 0)


@triton.jit
def _clipped_sums(law, proposal, laws, b, t, proposer, token, log_a, log_b):
    lower, upper = tl.exp(log_a), tl.exp(log_b)
    below = tl.zeros((BLOCK,), tl.float64)
    above = tl.zeros((BLOCK,), tl.float64)
    drafted = tl.zeros((BLOCK,), tl.float64)
    nats = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, law.vocab_size, BLOCK):
        p, q = _look_at_block(law, proposal, laws, b, t, proposer, token, start)
        terms = mentored.clipped_terms(p, q, lower, upper)
        below += terms[0]
        above += terms[1]
        drafted += terms[2]
        nats += terms[3]
    return tl.sum(below, 0), tl.sum(above, 0), tl.sum(drafted, 0), tl.sum(nats, 0)


@triton.jit
def _mentored(law, proposal, verdict, laws, b, t, proposer, token, p, q, nats):
    """What x keeps, and the scale of what is left, where KL(p || q) is known."""
    divergence = rules.number(verdict.parameters[0])
    log_a, log_b, a_low, a_high, b_low, b_high, undecided = mentored.start(divergence)
    # As a is at most 1, what the target likes no less is kept whatever a is.
    asks = (nats > divergence) & ((p < q) | (q == 0))
    sweeps = tl.where(asks, mentored.MOST_SWEEPS, 0)
    while sweeps > 0:
        sums = _clipped_sums(law, proposal, laws, b, t, proposer, token, log_a, log_b)
        log_a, log_b, a_low, a_high, b_low, b_high, undecided, ends = mentored.step(
            log_a, log_b, a_low, a_high, b_low, b_high, undecided, sums, divergence
        )
        sweeps = tl.where(ends, 0, sweeps - 1)
    kept, scale = mentored.kept_and_scale(p, q, log_a, log_b)
    return tl.where(nats > divergence, kept, q), tl.where(nats > divergence, scale, 0.0)


@triton.jit
def judgement(law, proposal, work, verdict, laws, row, b, t, proposer, token, greedy, memory):
    """q of a drafted token, and what its rule says: kept, scale, bound, trusted.

    Of a rule that vetoes, the bound is 1 if x is vetoed.
    """
    p, q = _look_at_token(law, proposal, laws, b, t, proposer, token)
    best = tl.full((), 0.0, tl.float64)
    if verdict.rule.finds_best:
        top = most_probable(law, work, row, b, t, laws, greedy)
        best, _q = _look_at_token(law, None, laws, b, t, -1, top)
    draft_best = tl.where(proposer >= 0, laws[2][law.members], 1.0)
    bound = tl.full((), 0.0, tl.float64)
    if verdict.rule.bound is not None:
        bound = verdict.rule.bound(p, best, verdict.parameters)
    statistic = tl.full((), 0.0, tl.float64)
    if verdict.rule.narrows and verdict.parameters[-1] > 0:
        statistic = _narrowed_sum(law, proposal, verdict, laws, b, t, proposer, token)
    elif verdict.rule.term is not None:
        statistic = _sum(law, proposal, verdict, laws, b, t, proposer, token, bound)
    kept, scale, bound, trusted = verdict.rule.judge(
        p, q, best, draft_best, bound, statistic, memory, verdict.parameters
    )
    if verdict.rule.mentors and verdict.parameters[0] > 0:
        if (draft_best > 0) | (statistic <= rules.number(verdict.parameters[0])):
            kept, scale = _mentored(
                law, proposal, verdict, laws, b, t, proposer, token, p, q, statistic
            )
    if verdict.rule.vetoes:
        if _vetoes(law, proposal, verdict, laws, b, t, proposer, token, p):
            kept *= 0.0
            bound += 1.0
    return q, kept, scale, bound, trusted


@triton.jit
def _coin(verdict, b, node):
    at = verdict.numbers + b * verdict.numbers_batch + node * verdict.numbers_row
    return tl.load(at).to(tl.float64)


@triton.jit
def _judge_row(law, proposal, work, verdict, b, t, memory):
    """Whether a row's child is kept, and its log-probability if it is."""
    row = b * law.rows + t
    greedy, proposer, laws, empty, status, token, valid, emits = read_row(
        law, proposal, work, verdict, row, b, t
    )
    best = tl.full((), 0, tl.int32)
    if greedy & emits & (empty == 0):
        best = most_probable(law, work, row, b, t, laws, greedy)
    kept = valid & greedy & (token == best) & (empty == 0)
    asks = valid
    if not verdict.rule.at_zero:
        asks = valid & (greedy == 0)
    if asks:
        q, mass, scale, bound, trusted = judgement(
            law, proposal, work, verdict, laws, row, b, t, proposer, token, greedy, memory
        )
        kept = tl.where(greedy, kept | trusted, _coin(verdict, b, t + 1) * q < mass)
        if verdict.rule.vetoes:
            kept = kept & (bound == 0)
            if greedy & (bound > 0):
                best = _best_but(law, laws, b, t, token)
        tl.store(verdict.scalars + row * 2, scale)
        tl.store(verdict.scalars + row * 2 + 1, bound)
    kept_log_prob = tl.full((), 0.0, tl.float64)
    if kept:
        kept_log_prob = log_prob(law, laws, b, t, token)
        tl.store(verdict.draft_log_probs + row, kept_log_prob.to(tl.float32))
    outcome = tl.full((), 0, tl.int32) + TARGET
    if verdict.rule.left is not None:
        outcome = tl.where(valid & (empty == 0), tl.where(proposer >= 0, DENSE, POINT), TARGET)
    outcome = tl.where(greedy, BEST, outcome)
    outcome = tl.where(emits, outcome, NOTHING)
    tl.store(verdict.outcomes + row, tl.where(kept, KEPT, outcome))
    tl.store(verdict.best + row, best)
    tl.store(verdict.statuses + row, status)
    return kept, kept_log_prob


@triton.jit
def _walk(law, proposal, work, verdict, b):
    memory = tl.full((), 0.0, tl.float64)
    if verdict.memory is not None:
        memory = tl.load(verdict.memory + b * verdict.memory_batch).to(tl.float64)
    t = tl.full((), 0, tl.int32)
    going = yes()
    while going:
        kept, kept_log_prob = _judge_row(law, proposal, work, verdict, b, t, memory)
        if verdict.rule.judge == rules.likelihood:
            memory = rules.remember(memory, kept_log_prob, verdict.parameters[1])
        t += 1
        going = kept & (t < law.rows)


@triton.jit
def _mass_left(law, proposal, laws, b, t, proposer, token, reach):
    """sum max(reach p - q, 0)."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, law.vocab_size, BLOCK):
        p, q = _look_at_block(law, proposal, laws, b, t, proposer, token, start)
        sums += tl.maximum(reach * p - q, 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _block_step(law, proposal, work, laws, row, b, t, proposer, token, reach):
    """The chance that a block ends no earlier than at a valid draft's row, and the reach after."""
    p, q = _look_at_token(law, proposal, laws, b, t, proposer, token)
    left = tl.full((), 1.0, tl.float64)
    if t > 0:
        left = _mass_left(law, proposal, laws, b, t, proposer, token, reach)
    near = (left < LEAST_SINGLE_RESIDUAL) | (left + 1.0 - reach < LEAST_SLACK)
    if near | (tl.abs(p - q) <= q * NEARLY_EQUAL):
        laws = refined_laws(law, proposal, work, row, b, t, proposer)
        p, q = _look_at_token(law, proposal, laws, b, t, proposer, token)
        if t > 0:
            left = _mass_left(law, proposal, laws, b, t, proposer, token, reach)
    return rules.block_threshold(reach, left), rules.block_step(reach, p, q)


@triton.jit
def _judge_block(law, proposal, work, verdict, b):
    """The longest block that is kept: every row is looked at before it is known."""
    t = tl.full((), 0, tl.int32)
    kept = tl.full((), 0, tl.int32)
    stop = tl.full((), 0, tl.int32) + NOTHING
    status = tl.full((), 0, tl.int32)
    reach = tl.full((), 1.0, tl.float64)
    kept_reach = tl.full((), 1.0, tl.float64)
    going = yes()
    while going:
        outcome = tl.full((), 0, tl.int32) + NOTHING
        threshold = reach
        next_reach = reach
        going = no()
        emits = (t < law.rows) & (draft_token(proposal, b, t) != PADDING)
        if verdict.bonus:
            emits = yes()
        if emits:
            row = b * law.rows + t
            _greedy, proposer, laws, empty, bits, token, valid, _emits = read_row(
                law, proposal, work, verdict, row, b, t
            )
            status |= bits
            tl.store(verdict.statuses + row, bits)
            going = valid
            outcome = tl.where(valid & (empty == 0), tl.where(proposer >= 0, DENSE, POINT), TARGET)
            if valid:
                tl.store(verdict.outcomes + row, KEPT)
                kept_log_prob = log_prob(law, laws, b, t, token)
                tl.store(verdict.draft_log_probs + row, kept_log_prob.to(tl.float32))
                threshold, next_reach = _block_step(
                    law, proposal, work, laws, row, b, t, proposer, token, reach
                )
        longer = t == 0
        if t > 0:
            longer = _coin(verdict, b, t) < threshold
        kept = tl.where(longer, t, kept)
        stop = tl.where(longer, outcome, stop)
        kept_reach = tl.where(longer, reach, kept_reach)
        reach = next_reach
        t += 1
    if kept < law.rows:
        row = b * law.rows + kept
        tl.debug_barrier()
        tl.store(verdict.outcomes + row, stop)
        tl.store(verdict.scalars + row * 2, kept_reach)
        tl.store(verdict.scalars + row * 2 + 1, 0.0)
        if stop != NOTHING:
            tl.store(verdict.statuses + row, status)


@triton.jit
def judge(law, proposal, work, verdict):
    """Grid: sequences, and rows unless the rule walks."""
    b = tl.program_id(0).to(tl.int64)
    if not verdict.rule.walks:
        _judge_row(law, proposal, work, verdict, b, tl.program_id(1), 0.0)
    elif verdict.rule.judge == rules.likelihood:
        _walk(law, proposal, work, verdict, b)
    elif is_greedy(law, b):
        _walk(law, proposal, work, verdict, b)
    else:
        _judge_block(law, proposal, work, verdict, b)

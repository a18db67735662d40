# SPDX-License-Identifier: Apache-2.0
"""Top-k, top-p and min-p as one threshold on a value, by bisection.

Only laws with filters, or with a least plausibility, launch this. One program finds the threshold
of one field of one row. A sweep for each step also finds the values next to the edge, so that some
ten steps end on the value itself.
"""

import triton
import triton.language as tl

from .logits import clean, load_raw, member_row, proposal_row, scores
from .parameters import (
    is_greedy,
    member_temperature,
    own_temperature,
    proposal_temperature,
    proposer_of,
)
from .totals import member_laws, term_laws, with_source

WARPS = 16
TARGET_WARPS = 8
BLOCK = tl.constexpr(2048)


@triton.jit
def order_of(value):
    """An integer that is ordered as the number is."""
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = value.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(order):
    if order.dtype == tl.int64:
        bits = order ^ ((order >> 63) & 0x7FFFFFFFFFFFFFFF)
        return bits.to(tl.float64, bitcast=True)
    else:
        bits = order ^ ((order >> 31) & 0x7FFFFFFF)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _nothing(law, FIELD: tl.constexpr):
    """-inf, in the precision of a field's values."""
    if FIELD > law.members:
        return tl.full((), -float("inf"), tl.float64)
    else:
        return tl.full((), -float("inf"), tl.float32)


@triton.jit
def _values(law, proposal, laws, b, t, proposer, start, FIELD: tl.constexpr):
    """Values of a block of a field: a member, the proposal (M) or the target (M + 1).

    A target's are folded, of double precision: two of them may round to one float32.
    """
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < law.vocab_size
    if FIELD < law.members:
        values = clean(load_raw(member_row(law, b, t, FIELD), offsets, mask))
    elif FIELD == law.members:
        if proposal.logits is not None:
            values = clean(load_raw(proposal_row(proposal, b, t), offsets, mask))
        else:
            values = tl.full((BLOCK,), -float("inf"), tl.float32)
            for k in tl.static_range(law.members):
                if proposer == k:
                    values = clean(load_raw(member_row(law, b, t, k), offsets, mask))
    else:
        combined, _drafted = scores(law, None, laws, b, t, -1, offsets, mask, tl.float64)
        values = tl.where(mask, combined, -float("inf"))
    return values


@triton.jit
def _top(law, proposal, laws, b, t, proposer, FIELD: tl.constexpr):
    top = _nothing(law, FIELD)
    for start in range(0, law.vocab_size, BLOCK):
        values = _values(law, proposal, laws, b, t, proposer, start, FIELD)
        top = tl.maximum(top, tl.max(values, 0))
    return top


@triton.jit
def _split(
    law, proposal, laws, b, t, proposer, edge, floor, top, inverse,
    FIELD: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """Of the values that reach the floor: how many lie above an edge, or their mass; the least of
    them; and the largest that does not lie above it."""
    weight = tl.full((), 0.0, tl.float64)
    above = -_nothing(law, FIELD)
    below = _nothing(law, FIELD)
    for start in range(0, law.vocab_size, BLOCK):
        values = _values(law, proposal, laws, b, t, proposer, start, FIELD)
        reaches = (values >= floor) & (values > -float("inf"))
        beyond = reaches & (values > edge)
        if BY_MASS:
            masses = tl.exp((values.to(tl.float64) - top.to(tl.float64)) * inverse)
            weight += tl.sum(tl.where(beyond, masses, 0.0), 0)
        else:
            weight += tl.sum(beyond.to(tl.int32), 0).to(tl.float64)
        above = tl.minimum(above, tl.min(tl.where(beyond, values, float("inf")), 0))
        within = reaches & (values <= edge)
        below = tl.maximum(below, tl.max(tl.where(within, values, -float("inf")), 0))
    return weight, above, below


@triton.jit
def halved(low, high, step):
    """An edge in [low, high): by bits and by value in turn."""
    first, last = order_of(low), order_of(high)
    middle = (first >> 1) + (last >> 1) + (first & last & 1)
    edge = tl.where((step & 1) == 0, value_of(middle), low * 0.5 + high * 0.5)
    return tl.where((edge >= low) & (edge < high), edge, low)


@triton.jit
def _least(
    law, proposal, laws, b, t, proposer, floor, top, inverse, target,
    FIELD: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """The least value, not below the floor, that less than the target lies above of.

    Halves the interval, and shrinks it to the values inside.
    """
    low = floor
    high = top
    step = tl.full((), 0, tl.int32)
    while low < high:
        edge = halved(low, high, step)
        weight, above, below = _split(
            law, proposal, laws, b, t, proposer, edge, floor, top, inverse, FIELD, BY_MASS
        )
        enough = weight < target
        high = tl.where(enough, tl.maximum(below, low), high)
        low = tl.where(enough, low, tl.minimum(above, high))
        step += 1
    return high


@triton.jit
def _round_up(value):
    nearest = value.to(tl.float32)
    return tl.where(nearest.to(tl.float64) < value, value_of(order_of(nearest) + 1), nearest)


@triton.jit
def _cutoff(law, proposal, laws, b, t, proposer, top, temperature, FIELD: tl.constexpr):
    """Of a row whose top is finite."""
    lowest = _nothing(law, FIELD)
    inverse = 1.0 / temperature.to(tl.float64)
    if law.top_k is not None:
        k = tl.load(law.top_k + b * law.top_k_batch)
        if k > 0:
            lowest = _least(
                law, proposal, laws, b, t, proposer, lowest, top, inverse, k.to(tl.float64),
                FIELD, False,
            )  # fmt: skip
    if law.top_p is not None:
        p = tl.load(law.top_p + b * law.top_p_batch).to(tl.float64)
        if p < 1:
            edge = _nothing(law, FIELD)
            mass, _above, _below = _split(
                law, proposal, laws, b, t, proposer, edge, lowest, top, inverse, FIELD, True
            )
            lowest = _least(
                law, proposal, laws, b, t, proposer, lowest, top, inverse, p * mass, FIELD, True
            )
    if law.min_p is not None:
        p = tl.load(law.min_p + b * law.min_p_batch).to(tl.float64)
        if p > 0:
            least = top.to(tl.float64) + temperature.to(tl.float64) * tl.log(tl.minimum(p, 1.0))
            if FIELD <= law.members:
                least = _round_up(least)
            lowest = tl.maximum(lowest, least)
    return lowest


@triton.jit
def _find(
    law, proposal, laws, work, row, b, t, proposer, temperature, hard, greedy, FIELD: tl.constexpr
):  # fmt: skip
    top = _top(law, proposal, laws, b, t, proposer, FIELD)
    cutoff = _nothing(law, FIELD)
    if law.filtered:
        finite = (top > -float("inf")) & (top < float("inf"))
        if finite & (hard == 0) & (greedy == 0):
            cutoff = _cutoff(law, proposal, laws, b, t, proposer, top, temperature, FIELD)
    at = work.cutoffs + row * (law.members + 3)
    tl.store(at + FIELD, cutoff)
    if law.plausible and FIELD == 0:
        scale, _hard = member_temperature(law, b, 0, greedy)
        least = top.to(tl.float64) + scale.to(tl.float64) * law.log_plausibility
        tl.store(at + law.members + 2, _round_up(least))


@triton.jit
def member_cutoffs(law, proposal, work, MEMBERS: tl.constexpr, PROPOSAL: tl.constexpr):
    """Grid: rows, the first MEMBERS members and the proposal if it is asked for."""
    row, field = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = row // law.rows, row % law.rows
    greedy = is_greedy(law, b)
    for k in tl.static_range(MEMBERS):
        if field == k:
            temperature, hard = own_temperature(law, b, k, greedy)
            _find(law, None, None, work, row, b, t, -1, temperature, hard, greedy, k)
    if PROPOSAL:
        proposer = proposer_of(law, proposal, b, t, greedy)
        if (field == MEMBERS) & (proposer >= 0):
            temperature, hard = proposal_temperature(law, proposal, b, proposer)
            _find(
                law,
                proposal,
                None,
                work,
                row,
                b,
                t,
                proposer,
                temperature,
                hard,
                greedy,
                law.members,
            )


@triton.jit
def _bare_laws(law, work, row, b, t, greedy):
    """`laws` of what a law of scope "ensemble" folds."""
    zero = tl.full((), 0.0, tl.float64)
    if law.kind == "warped":
        laws, _empty, _status = member_laws(law, None, work, row, b, t, greedy)
    else:
        laws, _alive = term_laws(law, work, row, b, t, greedy)
    return with_source(laws, zero, zero, zero, zero)


@triton.jit
def target_cutoffs(law, work):
    """Of what is warped as a whole. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // law.rows, row % law.rows
    greedy = is_greedy(law, b)
    laws = _bare_laws(law, work, row, b, t, greedy)
    temperature, hard = own_temperature(law, b, 0, greedy)
    _find(law, None, laws, work, row, b, t, -1, temperature, hard, greedy, law.members + 1)

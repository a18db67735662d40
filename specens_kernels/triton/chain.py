# SPDX-License-Identifier: Apache-2.0
"""What the kernels of `verify` share: the verdict, one row's draft, and exact normalisers.

A row's outcome says whether its child is kept, or what is emitted instead; it does not know whether
the rows before were kept. To add an outcome, name it here and draw it in `verify.py`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .draw import sub_tile_tokens
from .logits import clean, load_raw, look, mass_of, member_row
from .parameters import is_greedy, known_lse, known_proposal_lse, proposer_of, weight_of, yes
from .totals import load_laws, normalise, reciprocal, store_laws

INVALID_DRAFT = tl.constexpr(8)
EMPTY_RESIDUAL = tl.constexpr(16)
PADDING = tl.constexpr(-1)

# What happens at a row: its child is kept, or what is emitted instead.
NOTHING = tl.constexpr(0)
KEPT = tl.constexpr(1)
BEST = tl.constexpr(2)
TARGET = tl.constexpr(3)
DENSE = tl.constexpr(4)
POINT = tl.constexpr(5)

# Below this total the rounding of single precision would show in a residual's masses.
LEAST_SINGLE_RESIDUAL = tl.constexpr(1e-4)
LEAST_RESIDUAL = tl.constexpr(2.0**-40)


class Verdict(NamedTuple):
    """Arguments of the walk, what it leaves for each row, and its results.

    scalars: (rows, 2) float64 scale and bound of what a rule leaves; None if it is not judged.
    residuals: (B, sub-tiles) float64 mass that a rejected dense draft leaves. wholes: of the target
        there; None if every drafted row is swept. flags: (B, sub-tiles) status bits of what is only
        swept at the chain's end; None if nothing is.
    """

    numbers: Any
    numbers_batch: Any
    numbers_row: Any
    numbers_word: Any
    parameters: Any
    memory: Any
    memory_batch: Any
    outcomes: Any
    best: Any
    statuses: Any
    draft_log_probs: Any
    scalars: Any
    residuals: Any
    wholes: Any
    flags: Any
    tokens: Any
    log_probs: Any
    num_accepted: Any
    path: Any
    status: Any
    bonus: Any
    rule: Any
    steps: Any


@triton.jit
def draft_token(proposal, b, t):
    at = proposal.tokens + b * proposal.tokens_batch + t * proposal.tokens_node
    return tl.load(at, mask=t < proposal.nodes, other=PADDING).to(tl.int64)


@triton.jit
def _known_proposer(law, proposal, b, t):
    if proposal.proposers is None:
        return yes()
    else:
        at = proposal.proposers + b * proposal.proposers_batch + t * proposal.proposers_node
        proposer = tl.load(at, mask=t < proposal.nodes, other=0)
        return (proposer >= PADDING) & (proposer < law.members)


@triton.jit
def read_row(law, proposal, work, verdict, row, b, t):
    """What stands at a row: greedy, proposer, laws, empty, status, token, valid, emits."""
    greedy = is_greedy(law, b)
    proposer = proposer_of(law, proposal, b, t, greedy)
    laws, empty, _lse, status, draft_status = normalise(
        law, proposal, work, row, b, t, proposer, greedy
    )
    store_laws(law, work, row, laws)
    token = draft_token(proposal, b, t)
    child = (t < proposal.nodes) & (token != PADDING)
    valid = child & (token >= 0) & (token < law.vocab_size)
    valid = valid & _known_proposer(law, proposal, b, t)
    emits = child
    if verdict.bonus:
        emits = yes()
    status |= tl.where(child & (valid == 0), INVALID_DRAFT, 0)
    status |= tl.where(valid & (proposer >= 0), draft_status, 0)
    return greedy, proposer, laws, empty, status, token, valid, emits


@triton.jit
def _rescaled(law, laws, source: tl.constexpr, factor):
    """`laws` with the scale of one source multiplied."""
    scales = ()
    for k in tl.static_range(law.sources):
        if k == source:
            scales = scales + (laws[2][k] * factor,)
        else:
            scales = scales + (laws[2][k],)
    return (laws[0], laws[1], scales, laws[3])


@triton.jit
def _loosened(law, laws):
    """`laws` with a lower cutoff of the target, by what its values move when they are refined."""
    cutoffs = ()
    for k in tl.static_range(law.sources):
        cutoff = laws[3][k]
        if k == law.members + 1:
            size = tl.abs(cutoff)
            cutoff = tl.where(size < float("inf"), cutoff - (1e-6 + 2.5e-7 * size), cutoff)
        cutoffs = cutoffs + (cutoff,)
    return (laws[0], laws[1], laws[2], cutoffs)


@triton.jit
def _member_sum(law, laws, b, t, k: tl.constexpr):
    """Mass of one member of a mixture, in double precision."""
    mass = tl.full((), 0.0, tl.float64)
    for sub_tile in range(0, law.sub_tiles):
        offsets, mask = sub_tile_tokens(law, sub_tile)
        values = clean(load_raw(member_row(law, b, t, k), offsets, mask & (laws[2][k] != 0)))
        mass += tl.sum(mass_of(values, laws, k, tl.float64), 0)
    return mass


@triton.jit
def _refined_members(law, laws, b, t, greedy):
    share = tl.full((), 0.0, tl.float64)
    for k in tl.static_range(law.members):
        share += tl.where(laws[2][k] != 0, weight_of(law, b, t, k), 0.0)
    for k in tl.static_range(law.members):
        factor = tl.full((), 1.0, tl.float64)
        if known_lse(law, b, t, k, greedy) == float("inf"):
            mass = _member_sum(law, laws, b, t, k)
            factor = weight_of(law, b, t, k) * reciprocal(share) * reciprocal(mass)
        laws = _rescaled(law, laws, k, factor)
    return laws


@triton.jit
def refined_laws(law, proposal, work, row, b, t, proposer):
    """`laws` of one row with normalisers in double precision, which replace those in memory.

    Those that were given stay.
    """
    laws = load_laws(law, work, row)
    greedy = is_greedy(law, b)
    if law.kind != "product":
        laws = _refined_members(law, laws, b, t, greedy)
    if law.kind == "warped":
        laws = _loosened(law, laws)
    target_mass = tl.full((), 0.0, tl.float64)
    draft_mass = tl.full((), 0.0, tl.float64)
    for sub_tile in range(0, law.sub_tiles):
        offsets, mask = sub_tile_tokens(law, sub_tile)
        target, draft = look(law, proposal, laws, b, t, proposer, offsets, mask, tl.float64)
        target_mass += tl.sum(target, 0)
        draft_mass += tl.sum(draft, 0)
    known = known_proposal_lse(law, proposal, b, t, proposer, greedy) < float("inf")
    laws = _rescaled(law, laws, law.members, tl.where(known, 1.0, reciprocal(draft_mass)))
    if law.kind != "mixture":
        laws = _rescaled(law, laws, law.members + 1, reciprocal(target_mass))
    store_laws(law, work, row, laws)
    return laws

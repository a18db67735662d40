# SPDX-License-Identifier: Apache-2.0
"""`verify` for chains, after the sweep: decide every row, find the residual, emit.

`decide` has one program for each row: totals, then the draft token's coin against a few gathered
logits. The first row whose child is not kept is where the sequence stops. `residual` weighs what a
rejected dense draft leaves of that row alone, a program for each tile. `emit` draws, one program
for each sequence.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specens_kernels.law import LawTensors
from specens_kernels.native import Unsupported

from . import rules
from .arguments import Law, Proposal, law_arguments, proposal_arguments, workspace
from .laws import (
    SUB_TILE,
    clean,
    is_greedy,
    load_laws,
    load_raw,
    log_prob,
    look,
    mass_of,
    measure,
    member_row,
    most_probable,
    pick,
    pick_sub_tile,
    proposer_of,
    reciprocal,
    store_laws,
    sub_tile_ids,
    sub_tile_masses,
    sub_tile_tokens,
    total,
    weight_of,
    yes,
)
from .stats import NARROW_WARPS, tile_tokens
from .sweep import sweep

# Chosen so that nothing spills, or little with eight members; benchmarks/gpu_report.py shows it.
DECIDE_WARPS = 16
EMIT_WARPS = 4
WARPS_OF_MANY = 8  # of both, for more than three members
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

    residuals: (B, sub-tiles) float64 mass that a rejected dense draft leaves.
    """

    numbers: Any
    numbers_batch: Any
    numbers_row: Any
    numbers_word: Any
    lenience: Any
    outcomes: Any
    best: Any
    statuses: Any
    draft_log_probs: Any
    residuals: Any
    tokens: Any
    log_probs: Any
    num_accepted: Any
    path: Any
    status: Any
    bonus: Any
    kept: Any
    steps: Any


@triton.jit
def _draft_token(proposal, b, t):
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
def _is_kept(law, proposal, verdict, laws, b, t, proposer, token):
    """The coin of a valid draft token."""
    offsets = token + tl.arange(0, 1)
    targets, drafts = look(law, proposal, laws, b, t, proposer, offsets, offsets >= 0, tl.float64)
    target = tl.max(targets, 0)
    draft = tl.where(proposer >= 0, tl.max(drafts, 0), 1.0)
    at = verdict.numbers + b * verdict.numbers_batch + (t + 1) * verdict.numbers_row
    coin = tl.load(at).to(tl.float64)
    return coin * draft < verdict.kept(target, draft, verdict.lenience)


@triton.jit
def decide(law, proposal, work, verdict):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // law.rows, row % law.rows
    greedy = is_greedy(law, b)
    proposer = proposer_of(law, proposal, b, t, greedy)
    laws, empty, _lse, status, draft_status = measure(
        law, proposal, work, row, b, t, proposer, greedy
    )
    store_laws(law, work, row, laws)
    token = _draft_token(proposal, b, t)
    child = (t < proposal.nodes) & (token != PADDING)
    valid = child & (token >= 0) & (token < law.vocab_size)
    valid = valid & _known_proposer(law, proposal, b, t)
    collapses = greedy
    if proposal.greedy:
        collapses = yes()
    emits = child
    if verdict.bonus:
        emits = yes()
    best = tl.full((), 0, tl.int32)
    if collapses & emits & (empty == 0):
        best = most_probable(law, work, row, b, t, laws, greedy)
    kept = valid & (token == best) & (empty == 0)
    if valid & (collapses == 0):
        kept = _is_kept(law, proposal, verdict, laws, b, t, proposer, token)
    if kept:
        found = log_prob(law, laws, b, t, token)
        tl.store(verdict.draft_log_probs + row, found.to(tl.float32))
    outcome = tl.where(valid & (empty == 0), tl.where(proposer >= 0, DENSE, POINT), TARGET)
    outcome = tl.where(collapses, BEST, outcome)
    outcome = tl.where(emits, outcome, NOTHING)
    tl.store(verdict.outcomes + row, tl.where(kept, KEPT, outcome))
    tl.store(verdict.best + row, best)
    status |= tl.where(child & (valid == 0), INVALID_DRAFT, 0)
    status |= tl.where(valid & (proposer >= 0), draft_status, 0)
    tl.store(verdict.statuses + row, status)


@triton.jit
def _stop(law, verdict, b):
    """The first row whose child is not kept, and what happens there."""
    t = tl.arange(0, verdict.steps)
    outcomes = tl.load(verdict.outcomes + b * law.rows + t, mask=t < law.rows, other=NOTHING)
    stop = tl.min(tl.where(outcomes != KEPT, t, verdict.steps), 0)
    return stop, tl.sum(tl.where(t == stop, outcomes, 0), 0)


@triton.jit
def _left(verdict, target, draft):
    return tl.maximum(target - verdict.kept(target, draft, verdict.lenience), 0.0)


@triton.jit
def residual(law, proposal, work, verdict):
    """Grid: sequences, narrow tiles."""
    b, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    stop, outcome = _stop(law, verdict, b)
    if outcome == DENSE:
        greedy = is_greedy(law, b)
        row = b * law.rows + stop
        proposer = proposer_of(law, proposal, b, stop, greedy)
        laws = load_laws(law, work, row)
        offsets, mask = tile_tokens(law, tile, law.narrow)
        target, draft = look(law, proposal, laws, b, stop, proposer, offsets, mask, tl.float32)
        masses = tl.sum(_left(verdict, target, draft), 1).to(tl.float64)
        at = b * law.sub_tiles + tile * law.narrow + tl.arange(0, law.narrow)
        tl.store(verdict.residuals + at, masses)


# --- nearly equal laws ----------------------------------------------------------------------------


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
def _refined_members(law, laws, b, t):
    share = tl.full((), 0.0, tl.float64)
    for k in tl.static_range(law.members):
        share += tl.where(laws[2][k] != 0, weight_of(law, b, t, k), 0.0)
    for k in tl.static_range(law.members):
        mass = _member_sum(law, laws, b, t, k)
        factor = weight_of(law, b, t, k) * reciprocal(share) * reciprocal(mass)
        laws = _rescaled(law, laws, k, factor)
    return laws


@triton.jit
def _measure_again(law, proposal, work, verdict, row, b, t, proposer):
    """Normalisers and residual of one row in double precision."""
    laws = load_laws(law, work, row)
    if law.kind != "product":
        laws = _refined_members(law, laws, b, t)
    if law.kind == "warped":
        laws = _loosened(law, laws)
    target_mass = tl.full((), 0.0, tl.float64)
    draft_mass = tl.full((), 0.0, tl.float64)
    for sub_tile in range(0, law.sub_tiles):
        offsets, mask = sub_tile_tokens(law, sub_tile)
        target, draft = look(law, proposal, laws, b, t, proposer, offsets, mask, tl.float64)
        target_mass += tl.sum(target, 0)
        draft_mass += tl.sum(draft, 0)
    laws = _rescaled(law, laws, law.members, reciprocal(draft_mass))
    if law.kind != "mixture":
        laws = _rescaled(law, laws, law.members + 1, reciprocal(target_mass))
    for sub_tile in range(0, law.sub_tiles):
        offsets, mask = sub_tile_tokens(law, sub_tile)
        target, draft = look(law, proposal, laws, b, t, proposer, offsets, mask, tl.float64)
        left = tl.sum(_left(verdict, target, draft), 0)
        tl.store(verdict.residuals + b * law.sub_tiles + sub_tile, left)
    store_laws(law, work, row, laws)


# --- the token after the accepted ones ------------------------------------------------------------


@triton.jit
def _residual_masses(law, verdict, b):
    ids, exists = sub_tile_ids(law)
    return tl.load(verdict.residuals + b * law.sub_tiles + ids, mask=exists, other=0.0)


@triton.jit
def _without_point(law, verdict, laws, b, t, token, masses):
    """Sub-tile masses of a target when a draft token that was a point mass is rejected."""
    ids, _exists = sub_tile_ids(law)
    sub_tile = token // SUB_TILE
    offsets, mask = sub_tile_tokens(law, sub_tile)
    target, _drafted = look(law, None, laws, b, t, -1, offsets, mask, tl.float64)
    target = tl.where(offsets == token, _left(verdict, target, 1.0), target)
    return tl.where(ids == sub_tile, tl.sum(target, 0), masses)


@triton.jit
def _drawn(law, proposal, work, verdict, row, b, t, proposer, greedy, outcome):
    """A token from the target or from what is left of it; and whether nothing was left."""
    laws = load_laws(law, work, row)
    token = tl.maximum(_draft_token(proposal, b, t), 0).to(tl.int32)
    whole = sub_tile_masses(law, work, row, b, t, laws, greedy, True)
    masses = whole
    if outcome == DENSE:
        masses = _residual_masses(law, verdict, b)
    if outcome == POINT:
        masses = _without_point(law, verdict, laws, b, t, token, masses)
    emptied = (outcome != TARGET) & (total(masses) <= LEAST_RESIDUAL)
    outcome = tl.where(emptied, TARGET, outcome)
    masses = tl.where(emptied, whole, masses)
    numbers = verdict.numbers + b * verdict.numbers_batch + t * verdict.numbers_row
    sub_tile = pick_sub_tile(law, masses, numbers, verdict.numbers_word)
    offsets, mask = sub_tile_tokens(law, sub_tile)
    target, draft = look(law, proposal, laws, b, t, proposer, offsets, mask, tl.float64)
    draft = tl.where(outcome == POINT, 1.0, draft)
    shrinks = (outcome == DENSE) | ((outcome == POINT) & (offsets == token))
    target = tl.where(shrinks, _left(verdict, target, draft), target)
    third = tl.load(numbers + 3 * verdict.numbers_word).to(tl.float64)
    return sub_tile * SUB_TILE + pick(target, third), emptied


@triton.jit
def _walked_status(law, verdict, b, stop, outcome):
    """Status bits of the rows that were consulted."""
    t = tl.arange(0, verdict.steps)
    consulted = (t < law.rows) & ((t < stop) | ((t == stop) & (outcome != NOTHING)))
    statuses = tl.load(verdict.statuses + b * law.rows + t, mask=consulted, other=0)
    status = tl.full((), 0, tl.int32)
    for bit in tl.static_range(5):
        status |= tl.max(statuses & (1 << bit), 0)
    return status


@triton.jit
def emit(law, proposal, work, verdict):
    """Grid: sequences."""
    b = tl.program_id(0).to(tl.int64)
    stop, outcome = _stop(law, verdict, b)
    status = _walked_status(law, verdict, b, stop, outcome)
    row = b * law.rows + stop
    drawn = tl.full((), PADDING, tl.int32)
    drawn_log_prob = tl.full((), 0.0, tl.float64)
    if outcome != NOTHING:
        greedy = is_greedy(law, b)
        proposer = proposer_of(law, proposal, b, stop, greedy)
        if outcome == DENSE:
            if total(_residual_masses(law, verdict, b)) < LEAST_SINGLE_RESIDUAL:
                _measure_again(law, proposal, work, verdict, row, b, stop, proposer)
                tl.debug_barrier()
        if outcome == BEST:
            drawn = tl.load(verdict.best + row)
        else:
            drawn, emptied = _drawn(
                law, proposal, work, verdict, row, b, stop, proposer, greedy, outcome
            )
            status |= tl.where(emptied, EMPTY_RESIDUAL, 0)
        drawn_log_prob = log_prob(law, load_laws(law, work, row), b, stop, drawn)
    t = tl.arange(0, verdict.steps)
    kept = t < stop
    tokens = tl.load(
        proposal.tokens + b * proposal.tokens_batch + t * proposal.tokens_node,
        mask=kept,
        other=PADDING,
    )
    tokens = tl.where(t == stop, drawn, tokens.to(tl.int64))
    at = b * (proposal.nodes + 1) + t
    log_probs = tl.load(verdict.draft_log_probs + b * law.rows + t, mask=kept, other=0.0)
    log_probs = tl.where(t == stop, drawn_log_prob.to(tl.float32), log_probs)
    tl.store(verdict.tokens + at, tokens, mask=t <= proposal.nodes)
    tl.store(verdict.log_probs + at, log_probs, mask=t <= proposal.nodes)
    path = tl.where(kept, t + 1, PADDING)
    tl.store(verdict.path + b * proposal.nodes + t, path, mask=t < proposal.nodes)
    tl.store(verdict.num_accepted + b, stop)
    tl.store(verdict.status + b, status)


def verify(
    logits: list[Tensor],
    draft_tokens: Tensor,
    numbers: Tensor,
    parents: Tensor | None,
    proposers: Tensor | None,
    draft_logits: Tensor | None,
    draft_temperature: Tensor | None,
    law: LawTensors,
    acceptance: str,
    parameters: Sequence[float],
    memory: Tensor | None,
    bonus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.verify`."""
    if parents is not None:
        raise Unsupported("trees have no Triton kernel")
    if acceptance not in rules.KEPT:
        raise Unsupported(f"rule {acceptance!r} has no Triton kernel; add it to triton/rules.py")
    batch, nodes = draft_tokens.shape
    made = law_arguments(logits, law)
    greedy = acceptance == "greedy"
    proposal = proposal_arguments(
        draft_tokens, proposers, draft_logits, draft_temperature, law, greedy
    )
    work = workspace(made, batch)
    lenience = parameters[0] if parameters else 1.0
    verdict = _verdict(made, numbers, batch, nodes, acceptance, lenience, bonus)
    many = len(logits) > 3
    if batch > 0 and made.rows > 0:
        sweep(made, proposal, work, batch)
        warps = WARPS_OF_MANY if many else DECIDE_WARPS
        decide[(batch * made.rows,)](made, proposal, work, verdict, num_warps=warps)
        if _is_dense(proposal) and not greedy:
            tiles = made.sub_tiles // made.narrow.value
            residual[(batch, tiles)](made, proposal, work, verdict, num_warps=NARROW_WARPS)
    if batch > 0:
        warps = WARPS_OF_MANY if many else EMIT_WARPS
        emit[(batch,)](made, proposal, work, verdict, num_warps=warps)
    return verdict.tokens, verdict.log_probs, verdict.num_accepted, verdict.path, verdict.status


def _is_dense(proposal: Proposal) -> bool:
    return proposal.logits is not None or proposal.proposers is not None


def _verdict(
    law: Law,
    numbers: Tensor,
    batch: int,
    nodes: int,
    acceptance: str,
    lenience: float,
    bonus: bool,
) -> Verdict:
    device = numbers.device
    rows = batch * law.rows

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    batch_stride, row_stride, word_stride = numbers.stride()
    return Verdict(
        numbers=numbers,
        numbers_batch=batch_stride,
        numbers_row=row_stride,
        numbers_word=word_stride,
        lenience=tl.constexpr(lenience),
        outcomes=empty(rows),
        best=empty(rows),
        statuses=empty(rows),
        draft_log_probs=empty(rows, dtype=torch.float32),
        residuals=empty(batch, law.sub_tiles, dtype=torch.float64),
        tokens=empty(batch, nodes + 1, dtype=torch.int64),
        log_probs=empty(batch, nodes + 1, dtype=torch.float32),
        num_accepted=empty(batch),
        path=empty(batch, nodes),
        status=empty(batch),
        bonus=tl.constexpr(bonus),
        kept=tl.constexpr(rules.KEPT[acceptance]),
        steps=tl.constexpr(triton.next_power_of_2(nodes + 1)),
    )

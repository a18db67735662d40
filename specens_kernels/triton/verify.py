# SPDX-License-Identifier: Apache-2.0
"""`verify` for chains, after the sweep: decide or judge every row, find the residual, emit.

`decide` has one program for each row: totals, then the draft token's coin against a few gathered
logits. For rules that look at more, `judge` of judge.py stands in its place. The first row whose
child is not kept is where the sequence stops. `residual` weighs what a rejected dense draft leaves
of that row alone, a program for each tile, or sweeps what was put off until the row was known.
`emit` draws, one program for each sequence.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..acceptance import ACCEPTANCE_RULES
from ..call import VerifyCall
from ..refusal import Unsupported
from . import rules
from .chain import (
    BEST,
    DENSE,
    EMPTY_RESIDUAL,
    KEPT,
    LEAST_RESIDUAL,
    LEAST_SINGLE_RESIDUAL,
    NOTHING,
    PADDING,
    POINT,
    TARGET,
    Verdict,
    draft_token,
    read_row,
    refined_laws,
)
from .draw import most_probable, pick, pick_sub_tile, sub_tile_tokens
from .judge import judge, judgement
from .launch import LawArguments, Proposal, law_arguments, proposal_arguments, workspace
from .logits import flagged_look, log_prob, look
from .parameters import (
    EMPTY_LAW,
    INFINITE_LOGITS,
    NAN_LOGITS,
    SUB_TILE,
    is_greedy,
    proposer_of,
    yes,
)
from .stats import NARROW_WARPS, late_peaks, tile_tokens
from .sweep import sweep
from .totals import (
    known_flags,
    load_laws,
    maximum,
    normalise,
    store_laws,
    sub_tile_ids,
    sub_tile_masses,
    total,
)

# Chosen so that nothing spills, or little with eight members; benchmarks/gpu_report.py shows it.
DECIDE_WARPS = 16
JUDGE_WARPS = 8
EMIT_WARPS = 4
WARPS_OF_MANY = 8  # of both for more than three members, of `emit` where log-sum-exps are known


@triton.jit
def _is_kept(law, proposal, verdict, laws, b, t, proposer, token):
    """The coin of a valid draft token."""
    offsets = token + tl.arange(0, 1)
    targets, drafts = look(law, proposal, laws, b, t, proposer, offsets, offsets >= 0, tl.float64)
    target = tl.max(targets, 0)
    draft = tl.where(proposer >= 0, tl.max(drafts, 0), 1.0)
    at = verdict.numbers + b * verdict.numbers_batch + (t + 1) * verdict.numbers_row
    coin = tl.load(at).to(tl.float64)
    return coin * draft < verdict.rule.kept(target, draft, verdict.parameters[0])


@triton.jit
def decide(law, proposal, work, verdict):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // law.rows, row % law.rows
    greedy, proposer, laws, empty, status, token, valid, emits = read_row(
        law, proposal, work, verdict, row, b, t
    )
    collapses = greedy
    if proposal.greedy:
        collapses = yes()
    best = tl.full((), 0, tl.int32)
    if collapses & emits & (empty == 0):
        best = most_probable(law, work, row, b, t, laws, greedy)
    kept = valid & (token == best) & (empty == 0)
    if valid & (collapses == 0):
        kept = _is_kept(law, proposal, verdict, laws, b, t, proposer, token)
    if kept:
        kept_log_prob = log_prob(law, laws, b, t, token)
        tl.store(verdict.draft_log_probs + row, kept_log_prob.to(tl.float32))
    outcome = tl.where(valid & (empty == 0), tl.where(proposer >= 0, DENSE, POINT), TARGET)
    outcome = tl.where(collapses, BEST, outcome)
    outcome = tl.where(emits, outcome, NOTHING)
    tl.store(verdict.outcomes + row, tl.where(kept, KEPT, outcome))
    tl.store(verdict.best + row, best)
    tl.store(verdict.statuses + row, status)


@triton.jit
def _stop(law, verdict, b):
    """The first row whose child is not kept, and what happens there."""
    t = tl.arange(0, verdict.steps)
    outcomes = tl.load(verdict.outcomes + b * law.rows + t, mask=t < law.rows, other=NOTHING)
    stop = tl.min(tl.where(outcomes != KEPT, t, verdict.steps), 0)
    return stop, tl.sum(tl.where(t == stop, outcomes, 0), 0)


@triton.jit
def _scalars(verdict, row):
    """Scale and bound of what is left at a row."""
    if verdict.scalars is None:
        return 1.0, 0.0
    else:
        return tl.load(verdict.scalars + row * 2), tl.load(verdict.scalars + row * 2 + 1)


@triton.jit
def _left(law, proposal, verdict, laws, b, t, proposer, token, row, offsets, mask):
    """What a rejected dense draft leaves of the target's masses, the masses, and status bits.

    Of a rule that compares, in double precision.
    """
    scale, bound = _scalars(verdict, row)
    if verdict.scalars is None:
        p, q, flags = flagged_look(law, proposal, laws, b, t, proposer, offsets, mask, tl.float32)
        return verdict.rule.left(p, q, offsets == token, scale, bound), p, flags
    else:
        p, q, flags = flagged_look(law, proposal, laws, b, t, proposer, offsets, mask, tl.float64)
        return verdict.rule.left(p, q, offsets == token, scale, bound), p, flags


@triton.jit
def residual(law, proposal, work, verdict):
    """Grid: sequences, narrow tiles."""
    b, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    stop, outcome = _stop(law, verdict, b)
    row = b * law.rows + stop
    at = b * law.sub_tiles + tile * law.narrow + tl.arange(0, law.narrow)
    if law.late:
        if (outcome == TARGET) | (outcome == POINT):
            greedy = is_greedy(law, b)
            flags = late_peaks(law, proposal, work, row, b, stop, tile, greedy)
            tl.store(verdict.flags + at, flags)
    if outcome == DENSE:
        greedy = is_greedy(law, b)
        proposer = proposer_of(law, proposal, b, stop, greedy)
        laws = load_laws(law, work, row)
        offsets, mask = tile_tokens(law, tile, law.narrow)
        token = draft_token(proposal, b, stop)
        left, whole, flags = _left(
            law, proposal, verdict, laws, b, stop, proposer, token, row, offsets, mask
        )
        tl.store(verdict.residuals + at, tl.sum(left, 1).to(tl.float64))
        if verdict.wholes is not None:
            tl.store(verdict.wholes + at, tl.sum(whole, 1).to(tl.float64))
            tl.store(verdict.flags + at, flags)


@triton.jit
def _measure_again(law, proposal, work, verdict, row, b, t, proposer, token):
    """Normalisers, scalars and residual of one row in double precision."""
    laws = refined_laws(law, proposal, work, row, b, t, proposer)
    scale, bound = _scalars(verdict, row)
    if verdict.rule.judge is not None and not verdict.rule.walks:
        greedy = is_greedy(law, b)
        _q, _kept, scale, bound, _trusted = judgement(
            law, proposal, work, verdict, laws, row, b, t, proposer, token, greedy, 0.0
        )
        tl.store(verdict.scalars + row * 2, scale)
        tl.store(verdict.scalars + row * 2 + 1, bound)
    for sub_tile in range(0, law.sub_tiles):
        offsets, mask = sub_tile_tokens(law, sub_tile)
        target, draft = look(law, proposal, laws, b, t, proposer, offsets, mask, tl.float64)
        left = verdict.rule.left(target, draft, offsets == token, scale, bound)
        tl.store(verdict.residuals + b * law.sub_tiles + sub_tile, tl.sum(left, 0))


@triton.jit
def _residual_masses(law, verdict, b):
    ids, exists = sub_tile_ids(law)
    return tl.load(verdict.residuals + b * law.sub_tiles + ids, mask=exists, other=0.0)


@triton.jit
def _whole_masses(law, work, verdict, row, b, t, laws, greedy, outcome):
    """Sub-tile masses of the target."""
    if verdict.wholes is not None:
        ids, exists = sub_tile_ids(law)
        if outcome == DENSE:
            whole = tl.load(verdict.wholes + b * law.sub_tiles + ids, mask=exists, other=0.0)
        else:
            whole = sub_tile_masses(law, work, row, b, t, laws, greedy, True)
        return whole
    else:
        return sub_tile_masses(law, work, row, b, t, laws, greedy, True)


@triton.jit
def _late_flags(law, verdict, b, outcome):
    """Status bits of what `residual` has read."""
    ids, exists = sub_tile_ids(law)
    wanted = exists & (outcome != BEST)
    if verdict.wholes is None:
        wanted = wanted & (outcome != DENSE)
    flags = tl.load(verdict.flags + b * law.sub_tiles + ids, mask=wanted, other=0)
    return maximum(flags & NAN_LOGITS) | maximum(flags & INFINITE_LOGITS)


@triton.jit
def _without_point(law, verdict, laws, row, b, t, token, masses):
    """Sub-tile masses of a target when a draft token that was a point mass is rejected."""
    scale, bound = _scalars(verdict, row)
    ids, _exists = sub_tile_ids(law)
    sub_tile = token // SUB_TILE
    offsets, mask = sub_tile_tokens(law, sub_tile)
    target, _drafted = look(law, None, laws, b, t, -1, offsets, mask, tl.float64)
    drafted = offsets == token
    left = verdict.rule.left(target, tl.where(drafted, 1.0, 0.0), drafted, scale, bound)
    return tl.where(ids == sub_tile, tl.sum(left, 0), scale * masses)


@triton.jit
def _drawn(law, proposal, work, verdict, row, b, t, proposer, greedy, outcome):
    """A token from the target or from what is left of it; and the status bits."""
    laws = load_laws(law, work, row)
    token = tl.maximum(draft_token(proposal, b, t), 0).to(tl.int32)
    whole = _whole_masses(law, work, verdict, row, b, t, laws, greedy, outcome)
    masses = whole
    if outcome == DENSE:
        masses = _residual_masses(law, verdict, b)
    if verdict.rule.left is not None and outcome == POINT:
        masses = _without_point(law, verdict, laws, row, b, t, token, masses)
    emptied = (outcome != TARGET) & (total(masses) <= LEAST_RESIDUAL)
    outcome = tl.where(emptied, TARGET, outcome)
    masses = tl.where(emptied, whole, masses)
    numbers = verdict.numbers + b * verdict.numbers_batch + t * verdict.numbers_row
    sub_tile = pick_sub_tile(law, masses, numbers, verdict.numbers_word)
    offsets, mask = sub_tile_tokens(law, sub_tile)
    target, draft = look(law, proposal, laws, b, t, proposer, offsets, mask, tl.float64)
    if verdict.rule.left is not None:
        drafted = offsets == token
        draft = tl.where(outcome == POINT, tl.where(drafted, 1.0, 0.0), draft)
        scale, bound = _scalars(verdict, row)
        left = verdict.rule.left(target, draft, drafted, scale, bound)
        target = tl.where(outcome == TARGET, target, left)
    third = tl.load(numbers + 3 * verdict.numbers_word).to(tl.float64)
    status = tl.where(emptied, EMPTY_RESIDUAL, 0)
    if verdict.wholes is not None:
        status = tl.where(total(whole) > 0, status, EMPTY_LAW)
    return sub_tile * SUB_TILE + pick(target, third), status


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
        if law.late:
            if (stop == proposal.nodes) & (outcome == TARGET):
                laws, _empty, _lse, _status, _bits = normalise(
                    law, None, work, row, b, stop, -1, greedy
                )
                store_laws(law, work, row, laws)
                tl.debug_barrier()
        if outcome == DENSE:
            if total(_residual_masses(law, verdict, b)) < LEAST_SINGLE_RESIDUAL:
                token = draft_token(proposal, b, stop)
                _measure_again(law, proposal, work, verdict, row, b, stop, proposer, token)
                tl.debug_barrier()
        if outcome == BEST:
            drawn = tl.load(verdict.best + row)
        else:
            drawn, bits = _drawn(
                law, proposal, work, verdict, row, b, stop, proposer, greedy, outcome
            )
            status |= bits
        drawn_log_prob = log_prob(law, load_laws(law, work, row), b, stop, drawn)
        if law.late:
            status |= _late_flags(law, verdict, b, outcome)
        elif law.lse is not None:
            status |= known_flags(law, work, row, b, stop, greedy)
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


def verify(call: VerifyCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.verify`."""
    call.layout.refuse("triton")
    if call.parents is not None:
        raise Unsupported("triton", "parents", "None", "a tree")
    if call.proposers is not None and call.draft_logits is not None:
        raise Unsupported("triton", "proposers", "None beside draft_logits", "a tensor")
    if call.acceptance not in rules.RULES:
        raise Unsupported.unknown("triton", "acceptance", call.acceptance, rules.RULES)
    rule = rules.RULES[call.acceptance]
    batch, nodes = call.draft_tokens.shape
    arguments = law_arguments(call.logits, call.law, lse=call.lse)
    proposal = proposal_arguments(call)
    is_greedy_rule = ACCEPTANCE_RULES[call.acceptance].greedy
    if rule.judge is None and not is_greedy_rule and nodes > 0:
        puts_off = call.lse is not None or (call.bonus and _is_dense(proposal))
        late = puts_off and arguments.kind.value == "mixture" and not arguments.filtered.value
        arguments = arguments._replace(late=tl.constexpr(late))
    work = workspace(arguments, batch)
    verdict = _verdict(arguments, call, rule)
    many = len(call.logits) > 3
    if batch > 0 and arguments.rows > 0:
        sweep(arguments, proposal, work, batch)
        warps = WARPS_OF_MANY if many else DECIDE_WARPS
        if rule.judge is None:
            decide[(batch * arguments.rows,)](arguments, proposal, work, verdict, num_warps=warps)
        else:
            rows = 1 if rule.walks else arguments.rows
            judge[(batch, rows)](arguments, proposal, work, verdict, num_warps=JUDGE_WARPS)
        leaves = _is_dense(proposal) and rule.left is not None and not is_greedy_rule
        if leaves or arguments.late.value:
            tiles = arguments.sub_tiles // arguments.narrow.value
            residual[(batch, tiles)](arguments, proposal, work, verdict, num_warps=NARROW_WARPS)
    if batch > 0:
        warps = WARPS_OF_MANY if many or call.lse is not None else EMIT_WARPS
        emit[(batch,)](arguments, proposal, work, verdict, num_warps=warps)
    return verdict.tokens, verdict.log_probs, verdict.num_accepted, verdict.path, verdict.status


def _is_dense(proposal: Proposal) -> bool:
    return proposal.logits is not None or proposal.proposers is not None


def _constants(values: Any) -> tuple[Any, ...]:
    """As compile-time constants; None stays."""
    return tuple(None if value is None else tl.constexpr(value) for value in values)


def _verdict(law: LawArguments, call: VerifyCall, rule: rules.Rule) -> Verdict:
    numbers, memory = call.uniforms, call.memory
    batch, nodes = call.draft_tokens.shape
    device = numbers.device
    rows = batch * law.rows
    known = law.late.value and law.lse is not None

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    batch_stride, row_stride, word_stride = numbers.stride()
    return Verdict(
        numbers=numbers,
        numbers_batch=batch_stride,
        numbers_row=row_stride,
        numbers_word=word_stride,
        parameters=_constants(call.parameters or (1.0,)),
        memory=memory,
        memory_batch=0 if memory is None else memory.stride(0),
        outcomes=empty(rows),
        best=empty(rows),
        statuses=empty(rows),
        draft_log_probs=empty(rows, dtype=torch.float32),
        scalars=None if rule.judge is None else empty(rows, 2, dtype=torch.float64),
        residuals=empty(batch, law.sub_tiles, dtype=torch.float64),
        wholes=empty(batch, law.sub_tiles, dtype=torch.float64) if known else None,
        flags=empty(batch, law.sub_tiles) if law.late.value else None,
        tokens=empty(batch, nodes + 1, dtype=torch.int64),
        log_probs=empty(batch, nodes + 1, dtype=torch.float32),
        num_accepted=empty(batch),
        path=empty(batch, nodes),
        status=empty(batch),
        bonus=tl.constexpr(call.bonus),
        rule=rules.Rule(*_constants(rule)),
        steps=tl.constexpr(triton.next_power_of_2(nodes + 1)),
    )

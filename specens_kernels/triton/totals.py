# SPDX-License-Identifier: Apache-2.0
"""From what a sweep has left to `laws`: tops, masses and status bits of whole rows."""

import triton
import triton.language as tl

from .logits import mass_below
from .parameters import (
    EMPTY_LAW,
    INFINITE_LOGITS,
    NAN_LOGITS,
    by_lse,
    coefficient_of,
    given,
    is_late,
    is_unswept,
    known_lse,
    known_proposal_lse,
    least_plausible,
    member_temperature,
    no,
    own_temperature,
    proposal_temperature,
    stored_cutoff,
    target_cutoff,
    weight_of,
    yes,
)


@triton.jit
def sub_tile_ids(law):
    """(tiles, width) ids, and which of them exist."""
    ids = tl.arange(0, law.tiles)[:, None] * law.width + tl.arange(0, law.width)[None, :]
    return ids, ids < law.sub_tiles


@triton.jit
def source_at(law, row, source):
    return (row * (law.members + 2) + source) * law.sub_tiles


@triton.jit
def maximum(values):
    return tl.max(tl.max(values, 1), 0)


@triton.jit
def total(values):
    return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def _peaks(law, work, row, source, alive):
    """Largest value and mass of every sub-tile of a source; nothing where it is not alive."""
    ids, exists = sub_tile_ids(law)
    at = source_at(law, row, source) + ids
    tops = tl.load(work.tops + at, mask=exists & alive, other=-float("inf"))
    sums = tl.load(work.sums + at, mask=exists & alive, other=0.0).to(tl.float64)
    return tops, sums


@triton.jit
def _top_and_mass(law, work, row, source, inverse, hard, alive):
    """Top and mass relative to it."""
    tops, sums = _peaks(law, work, row, source, alive)
    top = maximum(tops)
    masses = sums * mass_below(tops, top, inverse.to(tl.float64), tl.float64)
    masses = tl.where((tops > -float("inf")) & ((tops == top) | (hard == 0)), masses, 0.0)
    return top, total(masses)


@triton.jit
def known_flags(law, work, row, b, t, greedy):
    """Status bits of members that are known and were swept all the same."""
    status = tl.full((), 0, tl.int32)
    for k in tl.static_range(law.members):
        known = known_lse(law, b, t, k, greedy) < float("inf")
        status |= _flags(law, work, row, k, known & (weight_of(law, b, t, k) != 0))
    return status


@triton.jit
def _flags(law, work, row, source, wanted):
    tile = tl.arange(0, law.tiles)
    tiles = law.sub_tiles // law.width
    at = work.flags + (row * (law.members + 2) + source) * tiles + tile
    flags = tl.load(at, mask=(tile < tiles) & wanted, other=0)
    return tl.max(flags & NAN_LOGITS, 0) | tl.max(flags & INFINITE_LOGITS, 0)


@triton.jit
def reciprocal(value):
    return tl.where(value > 0, 1.0 / tl.where(value > 0, value, 1.0), 0.0)


@triton.jit
def member_laws(law, proposal, work, row, b, t, greedy):
    """`laws` of the members of a mixture, whether none has mass, and their status bits.

    Of members whose log-sum-exp is known the bits count only where a token is drawn. Rows that were
    not swept have mass, but only those that are known have a law.
    """
    tops = ()
    inverses = ()
    shares = ()
    cutoffs = ()
    share = tl.full((), 0.0, tl.float64)
    alive = no()
    status = tl.full((), 0, tl.int32)
    for k in tl.static_range(law.members):
        weight = weight_of(law, b, t, k)
        used = weight != 0
        temperature, hard = member_temperature(law, b, k, greedy)
        inverse = 1.0 / temperature.to(tl.float64)
        lse = known_lse(law, b, t, k, greedy)
        late = is_late(law, proposal, b, t, k, greedy)
        top, mass = _top_and_mass(law, work, row, k, inverse, hard, used & (late == 0))
        alive = alive | (used & (late | (top > -float("inf"))))
        if law.lse is not None:
            top, mass = by_lse(top, mass, lse, inverse)
        cutoff = tl.full((), -float("inf"), tl.float32)
        if law.by_member:
            cutoff = stored_cutoff(law, work, row, k)
        used = used & (mass > 0)
        # Nothing reaches it, though the member is read where it proposes.
        top = tl.where(used, top, float("inf"))
        share += tl.where(used, weight, 0.0)
        wanted = (weight != 0) & (late == 0) & (lse == float("inf"))
        status |= _flags(law, work, row, k, wanted)
        tops = tops + (top,)
        inverses = inverses + (inverse,)
        shares = shares + (tl.where(used, weight, 0.0) * reciprocal(mass),)
        cutoffs = cutoffs + (tl.where(hard | (top == float("inf")), top, cutoff),)
    scales = ()
    for k in tl.static_range(law.members):
        scales = scales + (shares[k] * reciprocal(share),)
    if law.lse is None and not law.late:
        alive = share > 0
    return (tops, inverses, scales, cutoffs), alive == 0, status


@triton.jit
def _pinned(law, b, k, top, greedy):
    """Whether only the tokens with a member's largest logit survive in a product."""
    _temperature, hard = member_temperature(law, b, k, greedy)
    return hard | (top == float("inf"))


@triton.jit
def term_laws(law, work, row, b, t, greedy):
    """`laws` of the members of a product, and the sub-tiles where a token may survive them.

    A scale is a coefficient here; in place of top and inverse stands the least plausible value.
    """
    ids, exists = sub_tile_ids(law)
    alive = exists
    least = least_plausible(law, work, row)
    tops = ()
    inverses = ()
    scales = ()
    cutoffs = ()
    for k in tl.static_range(law.members):
        coefficient = coefficient_of(law, b, t, k, greedy)
        used = coefficient != 0
        cutoff = tl.full((), -float("inf"), tl.float32)
        if law.by_member:
            cutoff = stored_cutoff(law, work, row, k)
            at = work.maxima + (row * law.members + k) * law.sub_tiles + ids
            maxima = tl.load(at, mask=exists & used, other=-float("inf"))
            top = maximum(maxima)
            pinned = used & _pinned(law, b, k, top, greedy)
            cutoff = tl.where(pinned, top, cutoff)
            alive = alive & ((maxima == top) | (pinned == 0))
        tops = tops + (least,)
        inverses = inverses + (least,)
        scales = scales + (coefficient,)
        cutoffs = cutoffs + (cutoff,)
    return (tops, inverses, scales, cutoffs), alive


@triton.jit
def is_identity(law, b, greedy):
    """Whether warping a mixture as a whole would leave it as it is."""
    if law.filtered:
        return no()
    else:
        temperature, _hard = own_temperature(law, b, 0, greedy)
        return temperature == 1.0


@triton.jit
def with_source(laws, top, inverse, scale, cutoff):
    tops, inverses, scales, cutoffs = laws
    return (
        tops + (top,),
        inverses + (inverse,),
        scales + (scale,),
        cutoffs + (cutoff,),
    )


@triton.jit
def proposal_laws(law, proposal, work, row, b, t, proposer, greedy, laws):
    """`laws` with the proposal's, and its status bits."""
    if not given(proposal):
        zero = tl.full((), 0.0, tl.float64)
        return with_source(laws, zero, zero, zero, zero), tl.full((), 0, tl.int32)
    else:
        source = tl.full((), 0, tl.int32) + law.members
        if law.kind == "mixture":
            source = tl.where(proposer >= 0, proposer, law.members)
        temperature, hard = proposal_temperature(law, proposal, b, proposer)
        inverse = 1.0 / temperature.to(tl.float64)
        lse = known_proposal_lse(law, proposal, b, t, proposer, greedy)
        unknown = (proposer >= 0) & (lse == float("inf"))
        swept = proposer >= 0
        if proposal.logits is None:
            if law.late:
                swept = unknown
        else:
            swept = swept & (is_unswept(law, proposal, b, t, proposer, greedy) == 0)
        top, mass = _top_and_mass(law, work, row, source, inverse, hard, swept)
        if law.lse is not None or proposal.lse is not None:
            top, mass = by_lse(top, mass, lse, inverse)
        cutoff = stored_cutoff(law, work, row, law.members)
        cutoff = tl.where(hard | (top == float("inf")), top, cutoff)
        status = _flags(law, work, row, source, unknown)
        return with_source(laws, top, inverse, reciprocal(mass), cutoff), status


@triton.jit
def normalise(law, proposal, work, row, b, t, proposer, greedy):
    """`laws` of every source; whether the target is empty; its log-sum-exp; both status bits."""
    if law.kind == "product":
        laws, alive = term_laws(law, work, row, b, t, greedy)
        empty = no()
        status = _flags(law, work, row, law.members + 1, yes())
    else:
        laws, empty, status = member_laws(law, proposal, work, row, b, t, greedy)
        alive = empty == 0
    laws, draft_status = proposal_laws(law, proposal, work, row, b, t, proposer, greedy, laws)
    if law.kind == "mixture":
        lse = tl.full((), 0.0, tl.float64)
        if law.weights is None:
            lse = laws[0][0] * laws[1][0] - tl.log(tl.where(empty, 1.0, laws[2][0]))
        lse = tl.where(empty, -float("inf"), lse)
    else:
        inverse = tl.full((), 1.0, tl.float64)
        if not law.by_member:
            temperature, _hard = own_temperature(law, b, 0, greedy)
            inverse = 1.0 / temperature.to(tl.float64)
        source = law.members + 1
        identity = no()
        if law.kind == "warped":
            identity = is_identity(law, b, greedy)
            alive = alive & (identity == 0)
        top, mass = _top_and_mass(law, work, row, source, inverse, no(), alive)
        top = tl.where(identity, 0.0, top)
        mass = tl.where(identity, 1.0, mass)
        cutoff = tl.full((), -float("inf"), tl.float64)
        if not law.by_member:
            cutoff = target_cutoff(law, work, row)
        empty = empty | (mass <= 0)
        laws = with_source(laws, top, inverse, tl.where(empty, 0.0, reciprocal(mass)), cutoff)
        lse = tl.where(empty, -float("inf"), top * inverse + tl.log(tl.where(empty, 1.0, mass)))
    status |= tl.where(empty, EMPTY_LAW, 0)
    return laws, empty, lse, status, draft_status


@triton.jit
def store_laws(law, work, row, laws):
    for source in tl.static_range(law.sources):
        at = work.records + (row * (law.members + 2) + source) * 4
        for i in tl.static_range(4):
            tl.store(at + i, laws[i][source].to(tl.float64))


@triton.jit
def load_laws(law, work, row):
    """What `store_laws` left."""
    tops = ()
    inverses = ()
    scales = ()
    cutoffs = ()
    for source in tl.static_range(law.sources):
        at = work.records + (row * (law.members + 2) + source) * 4
        tops = tops + (tl.load(at),)
        inverses = inverses + (tl.load(at + 1),)
        scales = scales + (tl.load(at + 2),)
        cutoffs = cutoffs + (tl.load(at + 3),)
    return (tops, inverses, scales, cutoffs)


@triton.jit
def _weighed(law, work, row, laws, source: tl.constexpr, alive, WHOLE: tl.constexpr):
    """Mass of every sub-tile of a source, or the largest that one token of it may have."""
    tops, sums = _peaks(law, work, row, source, alive)
    if not WHOLE:
        sums = tl.where(tops > -float("inf"), 1.0, 0.0).to(tl.float64)
    masses = sums * mass_below(tops, laws[0][source], laws[1][source], tl.float64)
    return tl.where(
        tops.to(laws[3][source].dtype) >= laws[3][source], laws[2][source] * masses, 0.0
    )


@triton.jit
def sub_tile_masses(law, work, row, b, t, laws, greedy, WHOLE: tl.constexpr):
    """(tiles, width) mass of the target in each sub-tile; or bounds of a token's mass there."""
    if law.kind == "product":
        _laws, alive = term_laws(law, work, row, b, t, greedy)
        masses = _weighed(law, work, row, laws, law.members + 1, alive, WHOLE)
    else:
        masses = tl.zeros((law.tiles, law.width), tl.float64)
        for k in tl.static_range(law.members):
            masses += _weighed(law, work, row, laws, k, laws[2][k] != 0, WHOLE)
        if law.kind == "warped":
            identity = is_identity(law, b, greedy)
            whole = _weighed(law, work, row, laws, law.members + 1, identity == 0, WHOLE)
            masses = tl.where(identity, masses, whole)
    return masses

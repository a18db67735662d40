# SPDX-License-Identifier: Apache-2.0
"""The sweep: for every sub-tile of every source its largest value and the mass relative to it.

A row of logits is read once, by one program for each tile: of a mixture, one for each member too;
of a product, all members by the same one. Where a temperature is 0, or a logit infinite, only the
tokens with the largest value survive: those of each sub-tile are weighed, and the totals leave out
the sub-tiles that do not hold the row's largest value.
"""

import triton
import triton.language as tl

from .logits import (
    clean,
    flags_of,
    fold_in,
    folded_value,
    load_raw,
    mass_below,
    member_row,
    proposal_row,
    scores,
)
from .parameters import (
    INFINITE_LOGITS,
    NAN_LOGITS,
    SUB_TILE,
    coefficient_of,
    given,
    is_greedy,
    is_late,
    is_unswept,
    least_plausible,
    member_temperature,
    no,
    own_temperature,
    proposal_temperature,
    proposer_of,
    stored_cutoff,
    target_cutoff,
    weight_of,
    yes,
)
from .totals import is_identity, member_laws, source_at, with_source

WARPS = 16
NARROW_WARPS = 8


@triton.jit
def tile_tokens(law, tile, WIDTH: tl.constexpr):
    """(WIDTH, 1024) tokens of a group of sub-tiles, and which of them exist."""
    sub_tile = tile * WIDTH + tl.arange(0, WIDTH)
    offsets = sub_tile[:, None] * SUB_TILE + tl.arange(0, SUB_TILE)[None, :]
    return offsets, offsets < law.vocab_size


@triton.jit
def _store_peaks(law, work, row, tile, source, values, inverse, hard, cutoff):
    tops = tl.max(values, 1)
    top = tops[:, None]
    masses = mass_below(values, top.to(tl.float64), inverse, tl.float32)
    kept = (values > -float("inf")) & (values.to(cutoff.dtype) >= cutoff)
    kept = kept & ((values == top) | (hard == 0))
    sums = tl.sum(tl.where(kept, masses, 0.0), 1)
    sub_tile = tile * values.shape[0] + tl.arange(0, values.shape[0])
    at = source_at(law, row, source) + sub_tile
    tl.store(work.tops + at, tops.to(tl.float64))
    tl.store(work.sums + at, sums)


@triton.jit
def _store_flags(law, work, row, tile, source, nan, infinite):
    flags = tl.where(nan, NAN_LOGITS, 0) | tl.where(infinite, INFINITE_LOGITS, 0)
    tiles = law.sub_tiles // law.width
    tl.store(work.flags + (row * (law.members + 2) + source) * tiles + tile, flags)


@triton.jit
def _any(condition):
    return tl.max(tl.max(condition.to(tl.int32), 1), 0) > 0


@triton.jit
def _own_peaks(law, proposal, work, row, b, tile, source, proposer, raw):
    """Of the proposal's own law."""
    values = clean(raw)
    temperature, hard = proposal_temperature(law, proposal, b, proposer)
    cutoff = stored_cutoff(law, work, row, law.members)
    _store_peaks(law, work, row, tile, source, values, 1.0 / temperature, hard, cutoff)
    _store_flags(law, work, row, tile, source, _any(raw != raw), _any(raw == float("inf")))


@triton.jit
def _separate_peaks(law, proposal, work, row, b, t, tile, proposer, greedy):
    """Of separate draft logits, for the rows that have some and need it."""
    if (proposer == law.members) & (is_unswept(law, proposal, b, t, proposer, greedy) == 0):
        offsets, mask = tile_tokens(law, tile, law.width)
        raw = load_raw(proposal_row(proposal, b, t), offsets, mask)
        _own_peaks(law, proposal, work, row, b, tile, law.members, proposer, raw)


@triton.jit
def _peaks_of_member(law, work, row, b, t, tile, greedy, k: tl.constexpr, WIDTH: tl.constexpr):
    """Its logits as they are."""
    offsets, mask = tile_tokens(law, tile, WIDTH)
    raw = load_raw(member_row(law, b, t, k), offsets, mask)
    temperature, hard = member_temperature(law, b, k, greedy)
    cutoff = tl.full((), -float("inf"), tl.float32)
    if law.by_member:
        cutoff = stored_cutoff(law, work, row, k)
    _store_peaks(law, work, row, tile, k, clean(raw), 1.0 / temperature, hard, cutoff)
    return raw


@triton.jit
def _member_peaks(law, proposal, work, row, b, t, tile, proposer, greedy, k: tl.constexpr):
    drafts = no()
    if given(proposal):
        drafts = proposer == k
    late = is_late(law, proposal, b, t, k, greedy)
    if ((weight_of(law, b, t, k) != 0) | drafts) & (late == 0):
        raw = _peaks_of_member(law, work, row, b, t, tile, greedy, k, law.width)
        _store_flags(law, work, row, tile, k, _any(raw != raw), _any(raw == float("inf")))
        if given(proposal):
            if law.kind == "warped":
                if drafts:
                    _own_peaks(law, proposal, work, row, b, tile, law.members, proposer, raw)


@triton.jit
def late_peaks(law, proposal, work, row, b, t, tile, greedy):
    """Of the members that were not swept, in a narrow tile; status bits of its sub-tiles."""
    flags = tl.zeros((law.narrow,), tl.int32)
    for k in tl.static_range(law.members):
        if is_late(law, proposal, b, t, k, greedy) & (weight_of(law, b, t, k) != 0):
            raw = _peaks_of_member(law, work, row, b, t, tile, greedy, k, law.narrow)
            flags |= flags_of(raw)
    return flags


@triton.jit
def mixture_stats(law, proposal, work):
    """Grid: rows, tiles, members and separate draft logits."""
    row, tile, source = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    b, t = row // law.rows, row % law.rows
    greedy = is_greedy(law, b)
    proposer = tl.full((), -1, tl.int32)
    if given(proposal):
        proposer = proposer_of(law, proposal, b, t, greedy)
    for k in tl.static_range(law.members):
        if source == k:
            _member_peaks(law, proposal, work, row, b, t, tile, proposer, greedy, k)
    if given(proposal):
        if proposal.logits is not None:
            if source == law.members:
                _separate_peaks(law, proposal, work, row, b, t, tile, proposer, greedy)


@triton.jit
def _product_peaks(law, proposal, work, row, b, t, tile, proposer, greedy):
    offsets, mask = tile_tokens(law, tile, law.width)
    folded = tl.zeros(offsets.shape, tl.float64)
    vetoed = mask == 0
    nan = no()
    infinite = no()
    for k in tl.static_range(law.members):
        coefficient = coefficient_of(law, b, t, k, greedy)
        used = coefficient != 0
        read = used
        if given(proposal):
            read = read | (proposer == k)
        if law.plausible and k == 0:
            read = yes()
        raw = load_raw(member_row(law, b, t, k), offsets, mask & read)
        values = clean(raw)
        nan = nan | (used & _any(raw != raw))
        cutoff = tl.full((1, 1), -float("inf"), tl.float32)
        maxima = tl.max(values, 1)
        infinite = infinite | (used & (tl.max(maxima, 0) == float("inf")))
        if law.by_member:
            at = (row * law.members + k) * law.sub_tiles + tile * law.width
            tl.store(work.maxima + at + tl.arange(0, law.width), maxima)
            _temperature, hard = member_temperature(law, b, k, greedy)
            pinned = hard | (maxima == float("inf"))
            cutoff = tl.where(pinned, maxima, stored_cutoff(law, work, row, k))[:, None]
        folded, vetoed = fold_in(law, folded, vetoed, values, coefficient, cutoff)
        if law.plausible and k == 0:
            vetoed = vetoed | (values < least_plausible(law, work, row))
        if given(proposal):
            if proposer == k:
                _own_peaks(law, proposal, work, row, b, tile, law.members, proposer, raw)
    values = folded_value(folded, vetoed)
    inverse = tl.full((), 1.0, tl.float32)
    cutoff = tl.full((), -float("inf"), tl.float64)
    if not law.by_member:
        temperature, _hard = own_temperature(law, b, 0, greedy)
        inverse = 1.0 / temperature
        cutoff = target_cutoff(law, work, row)
    _store_peaks(law, work, row, tile, law.members + 1, values, inverse, no(), cutoff)
    _store_flags(law, work, row, tile, law.members + 1, nan, infinite)


@triton.jit
def product_stats(law, proposal, work):
    """Grid: rows, tiles, the product and separate draft logits."""
    row, tile, source = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    b, t = row // law.rows, row % law.rows
    greedy = is_greedy(law, b)
    proposer = tl.full((), -1, tl.int32)
    if given(proposal):
        proposer = proposer_of(law, proposal, b, t, greedy)
    if source == 0:
        _product_peaks(law, proposal, work, row, b, t, tile, proposer, greedy)
    if given(proposal):
        if proposal.logits is not None:
            if source == 1:
                _separate_peaks(law, proposal, work, row, b, t, tile, proposer, greedy)


@triton.jit
def warped_stats(law, work):
    """The mixture as a whole, in rows that warping changes. Grid: rows, narrow tiles."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = row // law.rows, row % law.rows
    greedy = is_greedy(law, b)
    if is_identity(law, b, greedy) == 0:
        laws, _empty, _status = member_laws(law, None, work, row, b, t, greedy)
        zero = tl.full((), 0.0, tl.float64)
        laws = with_source(laws, zero, zero, zero, zero)
        offsets, mask = tile_tokens(law, tile, law.narrow)
        values, _drafted = scores(law, None, laws, b, t, -1, offsets, mask, tl.float64)
        temperature, _hard = own_temperature(law, b, 0, greedy)
        cutoff = target_cutoff(law, work, row)
        _store_peaks(law, work, row, tile, law.members + 1, values, 1.0 / temperature, no(), cutoff)

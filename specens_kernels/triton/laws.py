# SPDX-License-Identifier: Apache-2.0
"""What kernels share: parameters, rows of logits, totals, masses and draws.

`laws` in these functions is four tuples over the sources, (tops, inverses, scales, cutoffs): the
mass of a token of value x is scale * exp((x - top) * inverse) if x >= cutoff, else 0. Values are
float32 where they are a member's logits and float64 where they are folded; cutoffs compare with
their float32 image.
"""

import triton
import triton.language as tl

SUB_TILE = tl.constexpr(1024)
NAN_LOGITS = tl.constexpr(1)
INFINITE_LOGITS = tl.constexpr(2)
EMPTY_LAW = tl.constexpr(4)

# The rounding of bounds differs from that of the masses they bound.
BOUND_SLACK = tl.constexpr(1e-12)

_NOWHERE = tl.constexpr(2**31 - 1)


def given(value):
    """Whether an argument that may be a tuple is one and not None, which Triton 3.6 cannot tell."""
    return not (value is None or (isinstance(value, tl.constexpr) and value.value is None))


given.__triton_builtin__ = True  # type: ignore[attr-defined]  # runs while kernels are compiled


@triton.jit
def no():
    return tl.full((), 0, tl.int1)


@triton.jit
def yes():
    return tl.full((), 1, tl.int1)


# --- parameters -----------------------------------------------------------------------------------


@triton.jit
def is_greedy(law, b):
    column = tl.arange(0, 8)
    at = law.temperature + b * law.temperature_batch + column * law.temperature_member
    temperature = tl.load(at, mask=column < law.columns, other=0.0)
    return tl.max((temperature > 0).to(tl.int32), 0) == 0


@triton.jit
def _or_one(temperature, greedy):
    """The temperature, 1 where it is 0 or the row greedy, and whether it is a hard 0."""
    soft = temperature > 0
    return tl.where(soft, temperature, 1.0).to(tl.float32), (greedy == 0) & (soft == 0)


@triton.jit
def own_temperature(law, b, k, greedy):
    at = law.temperature + b * law.temperature_batch + (law.first + k) * law.temperature_member
    return _or_one(tl.load(at).to(tl.float32), greedy)


@triton.jit
def member_temperature(law, b, k, greedy):
    """As the member is folded: bare members have temperature 1."""
    if law.by_member:
        return own_temperature(law, b, k, greedy)
    else:
        return tl.full((), 1.0, tl.float32), no()


@triton.jit
def proposal_temperature(law, proposal, b, proposer):
    """Of a dense proposal; 1 in a greedy row, which has one only where the rule asks for it."""
    greedy = no()
    if proposal.at_zero:
        greedy = is_greedy(law, b)
    if proposal.logits is not None:
        at = proposal.temperature + b * proposal.temperature_batch
        temperature, hard = _or_one(tl.load(at).to(tl.float32), greedy)
        return tl.where(greedy, 1.0, temperature), hard
    else:
        return own_temperature(law, b, tl.maximum(proposer, 0), greedy)


@triton.jit
def weight_of(law, b, t, k):
    if law.weights is None:
        return tl.full((), 1.0, tl.float64)
    else:
        at = law.weights + b * law.weights_batch + t * law.weights_row + k * law.weights_member
        return tl.load(at).to(tl.float64)


@triton.jit
def coefficient_of(law, b, t, k, greedy):
    """What a product multiplies the logits of a member by."""
    temperature, _hard = member_temperature(law, b, k, greedy)
    return weight_of(law, b, t, k) / temperature.to(tl.float64)


@triton.jit
def proposer_of(law, proposal, b, t, greedy):
    """The source of row t's dense proposal: a member, M for separate logits; -1 for a point."""
    dense = t < proposal.nodes
    if proposal.greedy:
        dense = no()
    if not proposal.at_zero:
        dense = dense & (greedy == 0)
    if proposal.logits is not None:
        return tl.where(dense, law.members, -1)
    elif proposal.proposers is None:
        return tl.full((), -1, tl.int32)
    else:
        at = proposal.proposers + b * proposal.proposers_batch + t * proposal.proposers_node
        proposer = tl.load(at, mask=dense, other=-1).to(tl.int32)
        return tl.where((proposer >= 0) & (proposer < law.members), proposer, -1)


@triton.jit
def stored_cutoff(law, work, row, source):
    """Of a member or the proposal, whose values are float32."""
    if law.filtered:
        return tl.load(work.cutoffs + row * (law.members + 3) + source).to(tl.float32)
    else:
        return tl.full((), -float("inf"), tl.float32)


@triton.jit
def target_cutoff(law, work, row):
    """Of what is warped as a whole, whose values are float64."""
    if law.filtered:
        return tl.load(work.cutoffs + row * (law.members + 3) + law.members + 1)
    else:
        return tl.full((), -float("inf"), tl.float64)


@triton.jit
def least_plausible(law, work, row):
    if law.plausible:
        at = work.cutoffs + row * (law.members + 3) + law.members + 2
        return tl.load(at).to(tl.float32)
    else:
        return tl.full((), -float("inf"), tl.float32)


# --- known log-sum-exps ---------------------------------------------------------------------------


@triton.jit
def _if_known(lse, hard, greedy):
    """A log-sum-exp as it was given; +inf where it does not count."""
    lse = lse.to(tl.float64)
    counts = (tl.abs(lse) < float("inf")) & (hard == 0) & (greedy == 0)
    return tl.where(counts, lse, float("inf"))


@triton.jit
def known_lse(law, b, t, k, greedy):
    """Of a member's row; +inf where it is not known."""
    if law.lse is None:
        return tl.full((), float("inf"), tl.float64)
    else:
        at = law.lse + b * law.lse_batch + t * law.lse_row + k * law.lse_member
        _temperature, hard = own_temperature(law, b, k, greedy)
        return _if_known(tl.load(at), hard, greedy)


@triton.jit
def known_proposal_lse(law, proposal, b, t, proposer, greedy):
    """Of what a dense proposal was drawn from; +inf where it is not known."""
    if proposal.logits is None:
        lse = known_lse(law, b, t, tl.maximum(proposer, 0), greedy)
        return tl.where(proposer >= 0, lse, float("inf"))
    elif proposal.lse is None:
        return tl.full((), float("inf"), tl.float64)
    else:
        at = proposal.lse + b * proposal.lse_batch + t * proposal.lse_row
        _temperature, hard = proposal_temperature(law, proposal, b, proposer)
        return _if_known(tl.load(at, mask=proposer >= 0, other=float("inf")), hard, greedy)


@triton.jit
def is_late(law, proposal, b, t, k, greedy):
    """Whether a member's row is swept only if the chain ends there.

    The bonus row is not late any more where no proposal is given.
    """
    late = no()
    if law.late:
        late = known_lse(law, b, t, k, greedy) < float("inf")
        if given(proposal):
            late = late | ((t == proposal.nodes) & (greedy == 0))
    return late


@triton.jit
def is_unswept(law, proposal, b, t, proposer, greedy):
    """Whether nobody asks for more of a separate draft than single tokens."""
    if proposal.lse is None or proposal.at_zero:
        return no()
    else:
        return known_proposal_lse(law, proposal, b, t, proposer, greedy) < float("inf")


@triton.jit
def _normalised(top, mass, lse, inverse):
    """Top and mass relative to it; by the log-sum-exp, where it is known.

    Where the row was not swept, the top is a float32 near the likely tokens, as logits are.
    """
    known = lse < float("inf")
    near = (lse / inverse).to(tl.float32).to(tl.float64)
    top = tl.where(known & (tl.abs(top) == float("inf")), near, top)
    return top, tl.where(known, tl.exp(lse - top * inverse), mass)


# --- rows of logits -------------------------------------------------------------------------------


@triton.jit
def row_of(logits, b, t, batch_stride, row_stride, WIDE: tl.constexpr):
    """Where a row begins. b has 64 bits; for t to have them takes registers, which may spill."""
    if WIDE:
        t = t.to(tl.int64)
    return logits + b * batch_stride + t * row_stride


@triton.jit
def member_row(law, b, t, k: tl.constexpr):
    return row_of(law.logits[k], b, t, law.batch_strides[k], law.row_strides[k], law.wide)


@triton.jit
def proposal_row(proposal, b, t):
    """Of separate draft logits."""
    return row_of(proposal.logits, b, t, proposal.batch_stride, proposal.row_stride, proposal.wide)


@triton.jit
def load_raw(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def flags_of(raw):
    """Status bits of a sub-tile, or of each of several; one sum counts NaNs and infinities."""
    oddities = tl.where(raw != raw, 1, tl.where(raw == float("inf"), 1 << 16, 0))
    counts = tl.sum(oddities, len(raw.shape) - 1)
    nan = tl.where((counts & 0xFFFF) != 0, NAN_LOGITS, 0)
    return nan | tl.where(counts >= 1 << 16, INFINITE_LOGITS, 0)


@triton.jit
def clean(raw):
    return tl.where(raw != raw, -float("inf"), raw)


@triton.jit
def fold_in(law, folded, vetoed, value, coefficient, cutoff):
    """One member of a product; a token that it gives no mass has none."""
    used = coefficient != 0
    value = tl.where(value < cutoff, -float("inf"), value)
    vetoed = vetoed | (used & (value == -float("inf")))
    return tl.where(used, folded + coefficient * value.to(tl.float64), folded), vetoed


@triton.jit
def folded_value(folded, vetoed):
    return tl.where(vetoed | (folded != folded), -float("inf"), folded)


@triton.jit
def mass_below(value, top, inverse, DTYPE: tl.constexpr):
    """exp((value - top) * inverse), where infinities are equal to themselves."""
    if DTYPE == tl.float32 and value.dtype == tl.float32:
        below = value - top.to(tl.float32)
    else:
        below = (value.to(tl.float64) - top).to(DTYPE)
    return tl.exp(tl.where(value == top, 0.0, below) * inverse.to(DTYPE))


@triton.jit
def mass_of(value, laws, source: tl.constexpr, DTYPE: tl.constexpr):
    kept = (value > -float("inf")) & (value.to(laws[3][source].dtype) >= laws[3][source])
    # A member of weight 0 has no top, and is read where it proposes.
    kept = kept & (laws[2][source] != 0)
    mass = mass_below(value, laws[0][source], laws[1][source], DTYPE)
    return tl.where(kept, laws[2][source].to(DTYPE) * mass, 0.0)


@triton.jit
def log_mass_of(value, laws, source: tl.constexpr):
    kept = (value > -float("inf")) & (value.to(laws[3][source].dtype) >= laws[3][source])
    below = tl.where(value == laws[0][source], 0.0, value.to(tl.float64) - laws[0][source])
    return tl.where(kept, below * laws[1][source] + tl.log(laws[2][source]), -float("inf"))


@triton.jit
def flagged_scores(law, proposal, laws, b, t, proposer, offsets, mask, DTYPE: tl.constexpr):
    """`scores`, and the target's status bits where rows may be known."""
    flags = tl.full((), 0, tl.int32)
    if law.kind == "mixture":
        found = tl.zeros(offsets.shape, DTYPE)
    else:
        found = tl.zeros(offsets.shape, tl.float64)
    vetoed = mask == 0
    drafted = tl.full(offsets.shape, -float("inf"), tl.float32)
    for k in tl.static_range(law.members):
        read = laws[2][k] != 0
        if given(proposal):
            read = read | (proposer == k)
        if law.plausible and k == 0:
            read = yes()
        raw = load_raw(member_row(law, b, t, k), offsets, mask & read)
        if law.late and law.lse is not None:
            flags |= tl.where(laws[2][k] != 0, flags_of(raw), 0)
        value = clean(raw)
        if given(proposal):
            drafted = tl.where(proposer == k, value, drafted)
        if law.kind == "product":
            found, vetoed = fold_in(law, found, vetoed, value, laws[2][k], laws[3][k])
            if law.plausible and k == 0:
                vetoed = vetoed | (value < laws[0][k])
        else:
            found += mass_of(value, laws, k, found.dtype)
    if law.kind == "product":
        found = folded_value(found, vetoed)
    elif law.kind == "warped":
        found = tl.where(found > 0, tl.log(found), -float("inf"))
    if given(proposal):
        if proposal.logits is not None:
            read = mask & (proposer == law.members)
            drafted = clean(load_raw(proposal_row(proposal, b, t), offsets, read))
    return found, drafted, flags


@triton.jit
def scores(law, proposal, laws, b, t, proposer, offsets, mask, DTYPE: tl.constexpr):
    """What the target is made of, and the proposal's logits.

    A mixture's masses; of a product or a mixture that is warped, the values before that.
    """
    found, drafted, _flags = flagged_scores(
        law, proposal, laws, b, t, proposer, offsets, mask, DTYPE
    )
    return found, drafted


@triton.jit
def flagged_look(law, proposal, laws, b, t, proposer, offsets, mask, DTYPE: tl.constexpr):
    """`look`, and the target's status bits where rows may be known."""
    found, drafted, flags = flagged_scores(
        law, proposal, laws, b, t, proposer, offsets, mask, DTYPE
    )
    if law.kind != "mixture":
        found = mass_of(found, laws, law.members + 1, DTYPE)
    if given(proposal):
        drafted = mass_of(drafted, laws, law.members, DTYPE)
    return found, drafted, flags


@triton.jit
def look(law, proposal, laws, b, t, proposer, offsets, mask, DTYPE: tl.constexpr):
    """Masses of tokens under the target and under the proposal."""
    found, drafted, _flags = flagged_look(law, proposal, laws, b, t, proposer, offsets, mask, DTYPE)
    return found, drafted


@triton.jit
def log_probs(law, laws, b, t, offsets, mask):
    """Log-probabilities of tokens under the target."""
    found, _drafted = scores(law, None, laws, b, t, -1, offsets, mask, tl.float64)
    if law.kind == "mixture":
        return tl.where(found > 0, tl.log(found), -float("inf"))
    else:
        return log_mass_of(found, laws, law.members + 1)


@triton.jit
def log_prob(law, laws, b, t, token):
    """Of one token, which may be none."""
    offsets = token + tl.arange(0, 1)
    found = log_probs(law, laws, b, t, offsets, (offsets >= 0) & (offsets < law.vocab_size))
    return tl.max(found, 0)


# --- totals ---------------------------------------------------------------------------------------


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
def _measure(law, work, row, source, inverse, hard, alive):
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
        top, mass = _measure(law, work, row, k, inverse, hard, used & (late == 0))
        alive = alive | (used & (late | (top > -float("inf"))))
        if law.lse is not None:
            top, mass = _normalised(top, mass, lse, inverse)
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
def is_bare(law, b, greedy):
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
        top, mass = _measure(law, work, row, source, inverse, hard, swept)
        if law.lse is not None or proposal.lse is not None:
            top, mass = _normalised(top, mass, lse, inverse)
        cutoff = stored_cutoff(law, work, row, law.members)
        cutoff = tl.where(hard | (top == float("inf")), top, cutoff)
        status = _flags(law, work, row, source, unknown)
        return with_source(laws, top, inverse, reciprocal(mass), cutoff), status


@triton.jit
def measure(law, proposal, work, row, b, t, proposer, greedy):
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
        bare = no()
        if law.kind == "warped":
            bare = is_bare(law, b, greedy)
            alive = alive & (bare == 0)
        top, mass = _measure(law, work, row, source, inverse, no(), alive)
        top = tl.where(bare, 0.0, top)
        mass = tl.where(bare, 1.0, mass)
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
            bare = is_bare(law, b, greedy)
            whole = _weighed(law, work, row, laws, law.members + 1, bare == 0, WHOLE)
            masses = tl.where(bare, masses, whole)
    return masses


# --- draws ----------------------------------------------------------------------------------------


@triton.jit
def pick(masses, number):
    """First index whose cumulative mass exceeds number x total; the last with mass if none does."""
    ids = tl.arange(0, masses.shape[0])
    cumulative = tl.cumsum(masses, 0)
    last = tl.max(tl.where(masses > 0, ids, 0), 0)
    whole = tl.max(cumulative, 0)
    return tl.minimum(tl.sum((cumulative <= number * whole).to(tl.int32), 0), last)


@triton.jit
def pick_sub_tile(law, masses, numbers, word):
    """A tile by the first number, one of its sub-tiles by the second."""
    tile = pick(tl.sum(masses, 1), tl.load(numbers + word).to(tl.float64))
    chosen = tl.arange(0, law.tiles)[:, None] == tile
    within = tl.sum(tl.where(chosen, masses, 0.0), 0)
    return tile * law.width + pick(within, tl.load(numbers + 2 * word).to(tl.float64))


@triton.jit
def sub_tile_tokens(law, sub_tile):
    offsets = sub_tile * SUB_TILE + tl.arange(0, SUB_TILE)
    return offsets, offsets < law.vocab_size


@triton.jit
def most_probable(law, work, row, b, t, laws, greedy):
    """The lowest of the target's most probable tokens; only sub-tiles that can win are read."""
    ids, _exists = sub_tile_ids(law)
    bounds = sub_tile_masses(law, work, row, b, t, laws, greedy, False)
    best = tl.full((), 0.0, tl.float64)
    token = tl.full((), 0, tl.int32)
    bound = maximum(bounds)
    while (bound > 0) & (bound >= best * (1.0 - BOUND_SLACK)):
        sub_tile = tl.min(tl.min(tl.where(bounds == bound, ids, _NOWHERE), 1), 0)
        offsets, mask = sub_tile_tokens(law, sub_tile)
        masses, _drafted = look(law, None, laws, b, t, -1, offsets, mask, tl.float64)
        here = tl.max(masses, 0)
        first = tl.min(tl.where(masses == here, offsets, _NOWHERE), 0)
        better = (here > best) | ((here == best) & (first < token))
        token = tl.where(better, first, token)
        best = tl.where(better, here, best)
        bounds = tl.where(ids == sub_tile, -1.0, bounds)
        bound = maximum(bounds)
    return token

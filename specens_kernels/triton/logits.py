# SPDX-License-Identifier: Apache-2.0
"""Rows of logits: values, masses and log-probabilities of single tokens under `laws`."""

import triton
import triton.language as tl

from .parameters import INFINITE_LOGITS, NAN_LOGITS, given, yes


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
        combined = tl.zeros(offsets.shape, DTYPE)
    else:
        combined = tl.zeros(offsets.shape, tl.float64)
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
            combined, vetoed = fold_in(law, combined, vetoed, value, laws[2][k], laws[3][k])
            if law.plausible and k == 0:
                vetoed = vetoed | (value < laws[0][k])
        else:
            combined += mass_of(value, laws, k, combined.dtype)
    if law.kind == "product":
        combined = folded_value(combined, vetoed)
    elif law.kind == "warped":
        combined = tl.where(combined > 0, tl.log(combined), -float("inf"))
    if given(proposal):
        if proposal.logits is not None:
            read = mask & (proposer == law.members)
            drafted = clean(load_raw(proposal_row(proposal, b, t), offsets, read))
    return combined, drafted, flags


@triton.jit
def scores(law, proposal, laws, b, t, proposer, offsets, mask, DTYPE: tl.constexpr):
    """What the target is made of, and the proposal's logits.

    A mixture's masses; of a product or a mixture that is warped, the values before that.
    """
    combined, drafted, _flags = flagged_scores(
        law, proposal, laws, b, t, proposer, offsets, mask, DTYPE
    )
    return combined, drafted


@triton.jit
def flagged_look(law, proposal, laws, b, t, proposer, offsets, mask, DTYPE: tl.constexpr):
    """`look`, and the target's status bits where rows may be known."""
    masses, drafted, flags = flagged_scores(
        law, proposal, laws, b, t, proposer, offsets, mask, DTYPE
    )
    if law.kind != "mixture":
        masses = mass_of(masses, laws, law.members + 1, DTYPE)
    if given(proposal):
        drafted = mass_of(drafted, laws, law.members, DTYPE)
    return masses, drafted, flags


@triton.jit
def look(law, proposal, laws, b, t, proposer, offsets, mask, DTYPE: tl.constexpr):
    """Masses of tokens under the target and under the proposal."""
    masses, drafted, _flags = flagged_look(
        law, proposal, laws, b, t, proposer, offsets, mask, DTYPE
    )
    return masses, drafted


@triton.jit
def log_probs(law, laws, b, t, offsets, mask):
    """Log-probabilities of tokens under the target."""
    combined, _drafted = scores(law, None, laws, b, t, -1, offsets, mask, tl.float64)
    if law.kind == "mixture":
        return tl.where(combined > 0, tl.log(combined), -float("inf"))
    else:
        return log_mass_of(combined, laws, law.members + 1)


@triton.jit
def log_prob(law, laws, b, t, token):
    """Of one token, which may be none."""
    offsets = token + tl.arange(0, 1)
    values = log_probs(law, laws, b, t, offsets, (offsets >= 0) & (offsets < law.vocab_size))
    return tl.max(values, 0)

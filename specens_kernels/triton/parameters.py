# SPDX-License-Identifier: Apache-2.0
"""What is asked about a row before its logits are read: temperatures, weights, what is known.

`laws` in these files is four tuples over the sources, (tops, inverses, scales, cutoffs): the mass
of a token of value x is scale * exp((x - top) * inverse) if x >= cutoff, else 0. Values are float32
where they are a member's logits and float64 where they are combined; cutoffs compare with their
float32 image.
"""

import triton
import triton.language as tl

from ..law import LEAST_TEMPERATURE, MOST_TEMPERATURE

SUB_TILE = tl.constexpr(1024)
NAN_LOGITS = tl.constexpr(1)
INFINITE_LOGITS = tl.constexpr(2)
EMPTY_LAW = tl.constexpr(4)
LEAST = tl.constexpr(LEAST_TEMPERATURE)
MOST = tl.constexpr(MOST_TEMPERATURE)


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
    bounded = tl.minimum(tl.maximum(temperature, LEAST), MOST)
    return tl.where(soft, bounded, 1.0).to(tl.float32), (greedy == 0) & (soft == 0)


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
        weight = tl.load(at).to(tl.float64)
        counts = weight - weight == 0  # neither NaN nor infinite
        if law.kind != "product":
            counts = counts & (weight > 0)
        return tl.where(counts, weight, 0.0)


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
def by_lse(top, mass, lse, inverse):
    """Top and mass relative to it; by the log-sum-exp, where it is known.

    Where the row was not swept, the top is a float32 near the likely tokens, as logits are.
    """
    known = lse < float("inf")
    near = (lse / inverse).to(tl.float32).to(tl.float64)
    top = tl.where(known & (tl.abs(top) == float("inf")), near, top)
    return top, tl.where(known, tl.exp(lse - top * inverse), mass)

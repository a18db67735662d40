# SPDX-License-Identifier: Apache-2.0
"""Mentored decoding: the law nearest to the draft's that is near enough to the target's."""

import torch
from torch import Tensor

from .gates import kl
from .rules import Judgement, Situation, emit, total

_MOST_B = 2.0**42


def mentored_law(target: Tensor, draft: Tensor, divergence: float) -> Tensor:
    """(V,): the law h nearest to q with KL(p || h) <= divergence, as Mentored decoding has it.

    h = median(p / b, q, p / a) with a <= 1 <= b: b makes it sum to what q sums to, if to anything,
    and a is as small as the divergence allows. Where KL(p || q) <= divergence, h = q; where the
    divergence is 0, h = p.
    """
    if divergence == 0:
        return target
    if total(kl(target, draft)) <= divergence:
        return draft
    ratio = torch.where(target > 0, target / draft, 0.0)  # +inf where q alone is 0
    ratio, order = ratio.sort()

    def upto(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values[order].cumsum(0), (1, 0))

    p, q = upto(target), upto(draft)
    nats = upto(torch.where(target / draft < torch.inf, kl(target, draft), 0.0))

    # A draft that may be withdrawn sums to less; what is nearer to 1 than this is rounding.
    is_less = (q[-1] > 0) & ((q[-1] - 1).abs() > 2.0**-40)
    whole = torch.where(is_less, q[-1], 1.0)

    def bounds(a: Tensor) -> tuple[Tensor, Tensor]:
        """b, and KL(p || h), for this a."""
        i = int(torch.searchsorted(ratio, a, right=True))
        room = whole - p[i] / a + q[i]
        # Were b the ratio at j or above: how much the law would sum to.
        sums = q[i:-1] + (p[-1] - p[i:-1]) / ratio[i:]
        sums = sums.where(ratio[i:] < torch.inf, 0.0)
        j = i + int((sums > room).sum())
        rest = p[-1] - p[j]
        # What a larger b puts above q is less than any residual.
        b = torch.full_like(a, _MOST_B)
        if rest > 0:
            b = (rest / (room - q[j]).clamp(min=0)).clamp(1, _MOST_B)
        return b, p[i] * a.log() + nats[j] - nats[i] + rest * b.log()

    if not bool(ratio[-1] > 0):  # nothing can be made of such a target
        return target
    low, high = ratio[ratio > 0][0].log().clamp(max=0), torch.zeros_like(p[0])  # of a
    for _ in range(60):
        middle = (low + high) / 2
        far = bounds(middle.exp())[1] > divergence
        low, high = (middle, high) if far else (low, middle)
    a = high.exp()
    return torch.maximum(torch.minimum(draft, target / a), target / bounds(a)[0])


def mentored(at: Situation, divergence: float) -> Judgement:
    """h = `mentored_law`, row by row."""
    vocab_size = at.target.shape[-1]
    rows = zip(at.target.reshape(-1, vocab_size), at.draft.reshape(-1, vocab_size), strict=True)
    law = torch.stack([mentored_law(p, q, divergence) for p, q in rows])
    return emit(law.reshape(at.target.shape), at)

# SPDX-License-Identifier: Apache-2.0
"""What a rule is asked and answers, and the rules with a law of their own.

Such a rule keeps min(h, q) and leaves max(h - q, 0), so that the emitted token has exactly the law
h. A rule is a function of the entry's name; what two files share is here.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Situation(NamedTuple):
    """What a rule is asked about.

    target, draft: (..., V) float. p and q, probabilities.
    token: (...,) int64. The drafted token x.
    memory: (...,) float. What `remember` made of the tokens before; 0 at the start of a text.
    candidates: how many tokens are drafted for this position, x included.
    """

    target: Tensor
    draft: Tensor
    token: Tensor
    memory: Tensor
    candidates: int = 1

    def of_token(self, values: Tensor) -> Tensor:
        """(..., 1): what (..., V) values say of x."""
        return values.gather(-1, self.token[..., None])

    def without_token(self, values: Tensor) -> Tensor:
        """(..., V) values with x's set to 0."""
        return values.scatter(-1, self.token[..., None], 0.0)


class Judgement(NamedTuple):
    """A rule's answer.

    kept: (..., V). Mass that a draft token keeps; only x's counts.
    left: (..., V). What replaces x, not normalised.
    trusted: (..., 1) bool or None. Whether x is kept at temperature 0 though it is not the target's
        most probable token.
    vetoed: (..., 1) bool or None. Whether x may not be emitted, not even at temperature 0.
    """

    kept: Tensor
    left: Tensor
    trusted: Tensor | None = None
    vetoed: Tensor | None = None


def total(values: Tensor) -> Tensor:
    """(..., 1) sum."""
    return values.sum(-1, keepdim=True)


def entropy(law: Tensor) -> Tensor:
    """(..., 1) nats."""
    return -total(torch.xlogy(law, law))


def most_probable(law: Tensor, count: float) -> Tensor:
    """(..., V) bool: the `count` most probable tokens, and those that tie with the last of them."""
    count = min(int(count), law.shape[-1])
    return law >= law.topk(count, -1).values[..., -1:]


def emit(law: Tensor, at: Situation, trusted: Tensor | None = None) -> Judgement:
    """Rejection sampling for this law."""
    return Judgement(torch.minimum(law, at.draft), (law - at.draft).clamp(min=0), trusted)


def rejection(at: Situation) -> Judgement:
    """h = p."""
    return emit(at.target, at)


def lenient(at: Situation, lenience: float) -> Judgement:
    """kept = min(p / lenience, q)."""
    # Replaced as `rejection` does: no other residual is as near to the target for what it keeps.
    kept = torch.minimum(at.target / lenience, at.draft)
    return Judgement(kept, (at.target - at.draft).clamp(min=0))


def synthetic(at: Situation, rate: float) -> Judgement:
    """kept = rate q: the coin decides alone. Replaced as `rejection` does."""
    return Judgement(rate * at.draft, (at.target - at.draft).clamp(min=0))


def greedy(at: Situation) -> Judgement:
    """The target as it is: `verify` has collapsed it."""
    return Judgement(at.target, torch.zeros_like(at.target))


def _cascade(at: Situation, defers: Tensor) -> Judgement:
    """q where the row does not defer, p where it does."""
    return emit(torch.where(defers, at.target, at.draft), at, ~defers)


def cascade_chow(at: Situation, alpha: float) -> Judgement:
    """Defers where max q < 1 - alpha."""
    return _cascade(at, at.draft.amax(-1, keepdim=True) < 1 - alpha)


def cascade_diff(at: Situation, alpha: float) -> Judgement:
    """Defers where max q < max p - alpha."""
    best = at.target.amax(-1, keepdim=True)
    return _cascade(at, at.draft.amax(-1, keepdim=True) < best - alpha)


def cascade_opt(at: Situation, alpha: float) -> Judgement:
    """Defers where max q < max p - alpha TV(p, q)."""
    best = at.target.amax(-1, keepdim=True)
    distance = total((at.target - at.draft).abs()) / 2
    return _cascade(at, at.draft.amax(-1, keepdim=True) < best - alpha * distance)


def _token_cascade(at: Situation, defers: Tensor) -> Judgement:
    """Mass of q on tokens that defer goes to p."""
    deferred = total(at.draft * defers)
    law = torch.where(defers, 0.0, at.draft) + at.target * deferred
    return emit(law, at, ~defers.gather(-1, at.token[..., None]))


def cascade_v1(at: Situation, alpha: float) -> Judgement:
    """Tokens defer where q < max p - alpha."""
    return _token_cascade(at, at.draft < at.target.amax(-1, keepdim=True) - alpha)


def cascade_v2(at: Situation, alpha: float) -> Judgement:
    """Tokens defer where p < max p - alpha."""
    return _token_cascade(at, at.target < at.target.amax(-1, keepdim=True) - alpha)


def cascade_v3(at: Situation, alpha: float) -> Judgement:
    """Tokens defer where p < (1 - alpha) max p."""
    return _token_cascade(at, at.target < (1 - alpha) * at.target.amax(-1, keepdim=True))


def cactus(at: Situation, divergence: float) -> Judgement:
    """Raises x's own probability, to the same KL to first order, and lowers the others'."""
    p = at.of_token(at.target)
    spread = (p * (1 - p)).clamp(min=0)
    variance = torch.where(spread > 0, 2 * divergence * spread, 0.0)
    raised = (p + variance.sqrt()).clamp(max=1)
    others = at.target * ((1 - raised) / (1 - p).clamp(min=torch.finfo(p.dtype).tiny))
    kept = torch.minimum(raised, at.draft)
    return Judgement(kept, at.without_token((others - at.draft).clamp(min=0)))

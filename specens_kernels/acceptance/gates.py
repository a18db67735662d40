# SPDX-License-Identifier: Apache-2.0
"""Gates: a draft token is kept for sure where the gate is open, else the target is drawn from.

A gate is a function of the entry's name, or of a divergence's: those are all made by one.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from .rules import Judgement, Situation, entropy, most_probable, rejection, total


def _gate(at: Situation, is_open: Tensor) -> Judgement:
    """Keeps every draft token where the gate is open; else the target is drawn from afresh."""
    return Judgement(torch.where(is_open, at.draft, 0.0), at.target, is_open)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Terms of KL(p || q)."""
    return torch.where(p > 0, torch.xlogy(p, p / q), 0.0)


def _js(p: Tensor, q: Tensor) -> Tensor:
    middle = (p + q) / 2
    return (kl(p, middle) + kl(q, middle)) / 2


def _js_fsd(p: Tensor, q: Tensor) -> Tensor:
    middle = (p + q) / 2
    return (kl(middle, p) + kl(middle, q)) / 2


# Terms that sum to a divergence, in nats; p is the target, q the draft.
DIVERGENCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "js_fsd": _js_fsd,
        "js": _js,
        "kl": kl,
        "reverse_kl": lambda p, q: kl(q, p),
        "tv": lambda p, q: (p - q).abs() / 2,
    }
)

# What a divergence's sum may not exceed, however its terms are rounded; the others have no bound,
# or none that a threshold in single precision meets.
_MOST: Mapping[str, float] = MappingProxyType({"tv": 1.0})


def by_divergence(name: str, at: Situation, threshold: float, top_k: float) -> Judgement:
    """The gates of `DIVERGENCES`; top_k > 0 lumps all but the target's top k into one token."""
    terms = DIVERGENCES[name]
    p, q = at.target, at.draft
    if 0 < top_k < p.shape[-1]:
        inside = most_probable(p, top_k)
        rest = [total(torch.where(inside, 0.0, law)) for law in (p, q)]
        distance = total(torch.where(inside, terms(p, q), 0.0)) + terms(rest[0], rest[1])
    else:
        distance = total(terms(p, q))
    distance = distance.clamp(max=_MOST.get(name, torch.inf))
    return _gate(at, distance <= threshold)


def typical(at: Situation, epsilon: float, delta: float) -> Judgement:
    """p(x) > min(epsilon, delta exp(-H(p)))."""
    least = torch.exp(-entropy(at.target)).mul(delta).clamp(max=epsilon)
    return _gate(at, at.of_token(at.target) > least)


def top_k(at: Situation, k: float) -> Judgement:
    """Fewer than k tokens are more probable to the target."""
    return _gate(at, total((at.target > at.of_token(at.target)).to(at.target.dtype)) < k)


def likelihood(at: Situation, threshold: float, smoothing: float) -> Judgement:
    """The moving average of -log p(x) is at most the threshold."""
    surprise = remember(at.memory[..., None], at.of_token(at.target).log(), smoothing)
    return _gate(at, surprise <= threshold)


_Number = TypeVar("_Number", float, Tensor)


def remember(memory: _Number, log_prob: _Number, smoothing: float) -> _Number:
    """The memory of `likelihood`, a moving average in nats, after one more emitted token."""
    return smoothing * memory - (1 - smoothing) * log_prob


def entropy_veto(
    at: Situation, target_entropy: float, draft_entropy: float, overlap: float, top_n: float
) -> Judgement:
    """Both unsure, and of the same tokens: whatever the draft says, the target says another."""
    common = total(
        (most_probable(at.target, top_n) & most_probable(at.draft, top_n)).to(at.target.dtype)
    )
    vetoed = (
        (entropy(at.target) > target_entropy)
        & (entropy(at.draft) > draft_entropy)
        & (common >= overlap * min(int(top_n), at.target.shape[-1]))
        & (at.of_token(at.target) < 1)
    )
    plain = rejection(at)
    return Judgement(
        torch.where(vetoed, 0.0, plain.kept),
        torch.where(vetoed, at.without_token(at.target), plain.left),
        vetoed=vetoed,
    )

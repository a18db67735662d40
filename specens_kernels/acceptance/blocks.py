# SPDX-License-Identifier: Apache-2.0
"""Rules that look at several drafted tokens at once.

`block` judges a whole chain: the reference walks it, by the two numbers here. `k_seq` judges k
tokens that were drafted for one position.
"""

import torch

from .rules import Judgement, Situation, total


def block_step(reach: float, ratio: float) -> float:
    """How much of the path so far is kept, capped: c_i = min(1, c_{i-1} p(x_i) / q(x_i))."""
    return min(1.0, reach * ratio)


def block_threshold(reach: float, mass_left: float) -> float:
    """Chance that a block ends no earlier than here; `mass_left` = sum max(reach p - q, 0)."""
    return mass_left / (mass_left + (1 - reach)) if mass_left > 0 else float(reach >= 1)


def k_seq(at: Situation) -> Judgement:
    """Keeps min(p / rho, q) of each of k tokens drawn from q; rho balances what is kept."""
    k = at.candidates
    low, high = torch.ones_like(at.target[..., :1]), torch.full_like(at.target[..., :1], float(k))
    # What a law sums to less than 1 is no token's; what is nearer to 1 than this is rounding.
    rests = [1 - total(law) for law in (at.target, at.draft)]
    target_rest, draft_rest = (torch.where(rest.abs() > 2.0**-40, rest, 0.0) for rest in rests)
    for _ in range(60):
        rho = (low + high) / 2
        # What is left of the target, and the chance that all are refused: as sums of differences,
        # for one less what is kept would be rounding where the two laws are nearly equal.
        left = target_rest + total((at.target - rho * at.draft).clamp(min=0))
        refused = draft_rest + total((at.draft - at.target / rho).clamp(min=0))
        short = left >= refused**k
        low, high = torch.where(short, rho, low), torch.where(short, high, rho)
    # A token is kept rho times on average: rho min(p / rho, q) of it is accounted for.
    kept = torch.minimum(at.target / high, at.draft)
    return Judgement(kept, (at.target - high * at.draft).clamp(min=0))

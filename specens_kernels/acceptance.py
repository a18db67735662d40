# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules: how much of a draft law is kept, and so what replaces the rest.

A rule is one elementwise function, `kept(target, draft, lenience)`: the probability mass of each
draft token that is kept. A draft token is kept iff `uniform * draft < kept`, and replaced by a
token drawn from the residual, max(target - kept, 0), when it is not. If kept <= min(target, draft)
everywhere, the emitted token has exactly the target law, whatever the draft; `lossless` claims that
and tests/test_acceptance.py proves it. To add a rule, add an entry to `ACCEPTANCE_RULES`; for
native speed, name it in `csrc/rules.h` too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _rejection(target: Tensor, draft: Tensor, lenience: float) -> Tensor:
    return torch.minimum(target, draft)


def _lenient(target: Tensor, draft: Tensor, lenience: float) -> Tensor:
    return torch.minimum(target / lenience, draft)


def _greedy(target: Tensor, draft: Tensor, lenience: float) -> Tensor:
    return target


@dataclass(frozen=True)
class AcceptanceRule:
    """How much of a draft law to keep.

    name: what users and kernels call it.
    kept: (target, draft, lenience) -> kept mass; probabilities of the same shape.
    lossless: whether the emitted law is the target law, whatever the draft.
    greedy: whether the target first collapses onto its most probable token (lowest id on ties).
        The residual is then empty, which means that the target itself is emitted.
    source: the paper that defines it.
    """

    name: str
    kept: Callable[[Tensor, Tensor, float], Tensor]
    lossless: bool
    greedy: bool
    source: str


ACCEPTANCE_RULES = {
    rule.name: rule
    for rule in (
        AcceptanceRule(
            "rejection", _rejection, True, False, "Leviathan et al. 2023, arXiv:2211.17192"
        ),
        # `lenience` in (0, 1]: 1 is `rejection`; smaller keeps drafts up to 1/lenience too
        # probable.
        AcceptanceRule(
            "lenient", _lenient, False, False, "Leviathan et al. 2023, arXiv:2211.17192, A.5"
        ),
        # Exact for the one-point law on the target's argmax, not for the target itself.
        AcceptanceRule("greedy", _greedy, False, True, "Stern et al. 2018, arXiv:1811.03115"),
    )
}

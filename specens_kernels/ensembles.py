# SPDX-License-Identifier: Apache-2.0
"""Ensembles: how the next-token laws of M members become one.

An ensemble folds the members in one at a time, so a kernel keeps one accumulator per token and
never the stacked (M, V) tensor. Two spaces cover the field:

* `mixture` folds probabilities; weights are >= 0 and sum to 1.
* `product` folds logits and takes one softmax afterwards; weights are any real numbers:

  | method | members | weights |
  |---|---|---|
  | geometric mean | M models | 1/M each |
  | contrastive decoding (arXiv:2210.15097) | expert, amateur | 1 + b, -b; `plausibility` |
  | the same in Fu et al. 2025 (arXiv:2502.01662) | expert, amateur | 1, -mu |
  | DExperts (arXiv:2105.03023) | base, expert, anti-expert | 1, a, -a |
  | proxy tuning (arXiv:2401.08565) | large, tuned, untuned | 1, 1, -1 |
  | classifier-free guidance (arXiv:2306.17806) | prompted, bare | s, 1 - s |

To add an ensemble, add an entry to `ENSEMBLES`; the tests and benchmarks iterate over it. For
native speed, name it in `csrc/rules.h` too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


def weighted_sum(folded: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """Fold one member's value in; operators only, so that kernels can inline it."""
    return folded + weight * value


@dataclass(frozen=True)
class Ensemble:
    """One way of combining laws.

    name: what users and kernels call it.
    fold: (folded, value, weight) -> folded; starts at 0.
    space: what is folded: "probs", or "logits" with the softmax taken afterwards.
    source: the paper that defines it.
    """

    name: str
    fold: Callable[[Tensor, Tensor, Tensor], Tensor]
    space: Literal["probs", "logits"]
    source: str


ENSEMBLES = {
    ensemble.name: ensemble
    for ensemble in (
        Ensemble("mixture", weighted_sum, "probs", "Fu et al. 2025, arXiv:2502.01662"),
        Ensemble("product", weighted_sum, "logits", "Fu et al. 2025, arXiv:2502.01662"),
    )
}

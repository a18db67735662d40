# SPDX-License-Identifier: Apache-2.0
"""Ensembles: how the next-token laws of M members become one.

An ensemble is a space in which members are combined, and a combination. The entries of `ENSEMBLES`
are the weighted sums of the two spaces, which every backend computes:

* `mixture` sums probabilities; weights are >= 0 and sum to 1.
* `product` sums logits and takes one softmax afterwards; weights are any real numbers:

  | method | members | weights |
  |---|---|---|
  | geometric mean | M models | 1/M each |
  | contrastive decoding (arXiv:2210.15097) | expert, amateur | 1 + b, -b; `plausibility` |
  | the same in Fu et al. 2025 (arXiv:2502.01662) | expert, amateur | 1, -mu |
  | DExperts (arXiv:2105.03023) | base, expert, anti-expert | 1, a, -a |
  | proxy tuning (arXiv:2401.08565) | large, tuned, untuned | 1, 1, -1 |
  | classifier-free guidance (arXiv:2306.17806) | prompted, bare | s, 1 - s |

Another combination is a `fold` of one's own, which needs no entry: a `Law` takes the `Ensemble`.
Kernels know the weighted sums alone, refuse any other fold, and the reference obeys it. A further
space is kernel work: `SPACES` here, the reference, csrc/ and triton/.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4
from weakref import WeakValueDictionary

from . import arguments
from .refusal import Refusal, shown

if TYPE_CHECKING:
    from torch import Tensor

    Fold = Callable[[Tensor, Tensor], Tensor]

SPACES = ("probabilities", "logits")
# Ensembles with a fold of their own, for as long as somebody else holds them.
_BY_KEY: WeakValueDictionary[str, "Ensemble"] = WeakValueDictionary()


@dataclass(frozen=True)
class Ensemble:
    """One way of combining the laws of M members.

    A fold is asked about all members at once, and about any number of rows, each for itself:

        `fold(laws: (M, ..., V) float64, weights: (M, ..., 1) float64) -> (..., V)`

    In space "probabilities" `laws` are the members' laws: >= 0, each row with sum 1, or with sum 0
    where a member has no mass. The result is >= 0 and finite, and is divided by its sum. In space
    "logits" `laws` are the members' scores, -inf where a token has no mass, and one softmax of the
    result is the law; NaN counts as -inf. Scope "member" warps the members before the fold, scope
    "ensemble" the result. Weights are any finite numbers, and 0 means what the fold makes of it.

    name: what users and messages call it: letters, digits, "_", "-" and ".".
    space: what is combined: "probabilities", or "logits" with the softmax taken afterwards.
    source: the paper that defines it.
    fold: the combination; None is the weighted sum, in which a member of weight 0 is absent.
    key: what the fold is called where only a string can pass; no other fold has it. Empty for None.
    """

    name: str
    space: Literal["probabilities", "logits"]
    source: str = ""
    fold: "Fold | None" = None
    key: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        """Check the fields, and make the fold known by its key."""
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name):
            expected = "a word of letters, digits, '_', '-' and '.'"
            raise Refusal("ensemble", "name", expected, shown(self.name))
        arguments.name("ensemble", "space", self.space, SPACES)
        if not isinstance(self.source, str):
            raise Refusal("ensemble", "source", "a string", shown(self.source))
        if self.fold is not None and not callable(self.fold):
            raise Refusal("ensemble", "fold", "None or a function", shown(self.fold))
        if self.fold is not None:
            object.__setattr__(self, "key", f"{self.name}@{uuid4().hex}")
            _BY_KEY[self.key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has a key of its own, and so has what another process unpickles."""
        return Ensemble, (self.name, self.space, self.source, self.fold)

    @staticmethod
    def of(given: "Ensemble | str") -> "Ensemble":
        """The ensemble itself, or the entry of that name; raises Refusal for an unknown one."""
        if isinstance(given, Ensemble):
            return given
        return arguments.entry("law", "ensemble", given, ENSEMBLES)

    @staticmethod
    def by_key(key: str) -> "Ensemble":
        """The ensemble whose fold has this key; raises Refusal if this process has none."""
        ensemble = _BY_KEY.get(key)
        if ensemble is None:
            raise Refusal("ensemble", "key", "the key of an ensemble that is in use", repr(key))
        return ensemble


ENSEMBLES: Mapping[str, Ensemble] = MappingProxyType(
    {
        ensemble.name: ensemble
        for ensemble in (
            Ensemble("mixture", "probabilities", "Fu et al. 2025, arXiv:2502.01662"),
            Ensemble("product", "logits", "Fu et al. 2025, arXiv:2502.01662"),
        )
    }
)

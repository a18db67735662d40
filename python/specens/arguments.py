# SPDX-License-Identifier: Apache-2.0
"""The decoder's arguments: how they are checked, and what is said of those that are refused.

`Asked` is what schedules are made of (`schedules.py`). A new argument of theirs is a field there,
and what it may be is a property that each schedule which takes it reads.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """What a schedule is made of: the models, and the decoder's arguments as they were given.

    sizes: parameters of each model, the members' first, then the drafts'.
    weights: of the members.
    rule: name of the ensemble's acceptance rule.
    tokens: `num_speculative_tokens`, or what the schedule takes by default.
    """

    sizes: Sequence[int]
    weights: Sequence[float]
    rule: str
    tokens: Any = None
    proposer: Any = None
    order: Any = None
    stop: Any = None
    ahead: Any = None
    token_cost: Any = None
    cut: Any = None

    @property
    def num_members(self) -> int:
        """How many models make the ensemble; those after them are drafts."""
        return len(self.weights)

    @property
    def token(self) -> int:
        """The number of tokens where there is one proposer."""
        if isinstance(self.tokens, Iterable):
            raise wrong("num_speculative_tokens", "one integer", self.tokens)
        return self.each_token[0]

    @property
    def each_token(self) -> list[int]:
        """The numbers of tokens as they were given, one or several."""
        found = integers(self.tokens)
        if not found or min(found) < 1:
            raise wrong("num_speculative_tokens", "integers >= 1", self.tokens)
        return found

    def tokens_for(self, proposers: int, otherwise: Callable[[int], list[int]]) -> tuple[int, ...]:
        """One number for each proposer; of a single one, `otherwise` makes them."""
        found = self.each_token
        if not isinstance(self.tokens, Iterable):
            found = otherwise(found[0])
        if len(found) != proposers:
            expected = f"1 or {proposers} integers"
            raise wrong("num_speculative_tokens", expected, self.tokens)
        return tuple(found)

    @property
    def cheapest_first(self) -> list[int]:
        """The members."""
        return sorted(range(self.num_members), key=lambda m: self.sizes[m])

    @property
    def the_proposer(self) -> int:
        """The index of the one that drafts: the separate draft, the member given, the cheapest."""
        size = self.num_members
        if self.proposer is None:
            return size if len(self.sizes) > size else self.cheapest_first[0]
        given = self.proposer
        if len(self.sizes) > size or not is_integer(given) or not 0 <= given < size:
            raise wrong("proposer", f"None with a draft, else 0 to {size - 1}", given)
        return int(given)

    @property
    def the_token_cost(self) -> float:
        """Time that a token adds to its verification."""
        given = 0.1 if self.token_cost is None else self.token_cost
        if not isinstance(given, Real) or not 0 <= float(given) < math.inf:
            raise wrong("token_cost", "a number >= 0", repr(given))
        return float(given)


def wrong(argument: str, expected: str, got: object) -> ValueError:
    """What to raise where an argument of the decoder is not as expected."""
    return ValueError(f"decoder: {argument}: expected {expected}, got {got}")


def unknown(argument: str, name: str, known: Iterable[str]) -> ValueError:
    """What to raise where a name is not among those known."""
    names = ", ".join(sorted(known))
    return ValueError(f"decoder: {argument}: unknown name {name!r}; known names: {names}")


def is_integer(value: object) -> bool:
    """Of any library; a bool counts nothing."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def integers(values: Any) -> list[int] | None:
    """Of one integer or several; None if something else is among them."""
    values = values.tolist() if isinstance(values, Tensor) else values
    listed = list(values) if isinstance(values, Iterable) else [values]
    return [int(value) for value in listed] if all(map(is_integer, listed)) else None

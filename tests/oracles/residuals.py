# SPDX-License-Identifier: Apache-2.0
"""What several rejections at one node leave of the target, as a recursion and as a signed mixture.

The recursion is the definition: each rejection takes the sibling's law from the target and
normalises. The signed mixture is what kernels compute: the target less one coefficient times each
law. `emitted` enumerates the law of the token that either of them emits. A mistake that a kernel
could make is a `Mistake`; a test must reject each of them. To add a mistake, name it there and make
it at its place.
"""

import itertools
from collections.abc import Iterator, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Law = NDArray[np.float64]
COINS = 256
POINT = -1  # a sibling that nobody drew


class Mistake(Enum):
    """What a kernel could get wrong."""

    NONE = auto()
    FORGOTTEN_COEFFICIENT = auto()  # every sibling is tried against the target
    WRONG_MASS = auto()  # the mass of earlier siblings is forgotten
    SHARED_COIN = auto()  # all siblings have one coin
    OTHER_DRAWS = auto()  # drawn with replacement and verified as without, or the reverse
    NO_NORMALISER = auto()  # what is left is not normalised
    NOT_STRICT = auto()  # a coin of 0, one of COINS, keeps what has no mass


class Siblings(NamedTuple):
    """Children of one node.

    target: (V,). laws: of proposers, (V,) each.
    proposers: of each sibling, in order: a place in `laws`, or POINT.
    points: tokens of the POINT siblings, in order.
    without: whether siblings of one proposer are drawn without replacement.
    """

    target: Law
    laws: Sequence[Law]
    proposers: tuple[int, ...]
    points: tuple[int, ...] = ()
    without: bool = False

    def proposal(self, place: int, tokens: Sequence[int], without: bool | None = None) -> Law:
        """The law that a sibling is drawn from, after earlier siblings' `tokens`."""
        proposer = self.proposers[place]
        if proposer == POINT:
            before = self.proposers[:place].count(POINT)
            return np.eye(len(self.target))[self.points[before]]
        law = self.laws[proposer].copy()
        if self.without if without is None else without:
            earlier = [t for i, t in enumerate(tokens[:place]) if self.proposers[i] == proposer]
            law[earlier] = 0.0
            law = law / law.sum() if law.sum() > 0 else law
        return law


def positive(values: Law) -> Law:
    return np.maximum(values, 0.0)


class Recursion:
    """What is left of the target, by its definition."""

    def __init__(self, siblings: Siblings) -> None:
        self.siblings, self.law, self.chance = siblings, siblings.target, 1.0

    def kept(self, place: int, tokens: Sequence[int]) -> float:
        """With which probability this sibling is kept."""
        draft = self.siblings.proposal(place, tokens)[tokens[place]]
        return float(min(1.0, self.law[tokens[place]] / draft)) if draft > 0 else 0.0

    def reject(self, place: int, tokens: Sequence[int]) -> None:
        left = positive(self.law - self.siblings.proposal(place, tokens))
        self.chance *= left.sum()
        if left.sum() > 0:
            self.law = left / left.sum()


class SignedMixture:
    """The same by one coefficient for each law, a list of points, and the mass that is left."""

    def __init__(self, siblings: Siblings, mistake: Mistake = Mistake.NONE) -> None:
        self.siblings, self.mistake = siblings, mistake
        self.coefficients = np.zeros(len(siblings.laws))
        self.excluded: list[int] = []
        self.mass = 1.0

    @property
    def _left(self) -> Law:
        left = self.siblings.target.copy()
        for coefficient, law in zip(self.coefficients, self.siblings.laws, strict=True):
            left = left - coefficient * law
        left = positive(left)
        left[self.excluded] = 0.0
        return left

    @property
    def law(self) -> Law:
        return self._left / self.mass

    def _rest(self, place: int, tokens: Sequence[int]) -> float:
        """The mass that the proposer has beside its earlier siblings."""
        proposer = self.siblings.proposers[place]
        without = self.siblings.without != (self.mistake is Mistake.OTHER_DRAWS)
        if not without or self.mistake is Mistake.WRONG_MASS:
            return 1.0
        drawn = zip(self.siblings.proposers, tokens[:place], strict=False)
        earlier = {token for other, token in drawn if other == proposer}
        return 1.0 - sum(float(self.siblings.laws[proposer][t]) for t in earlier)

    def kept(self, place: int, tokens: Sequence[int]) -> float:
        token, proposer = tokens[place], self.siblings.proposers[place]
        left = float(self._left[token])
        if proposer == POINT:
            return min(1.0, left / self.mass)
        draft = float(self.siblings.laws[proposer][token]) / self._rest(place, tokens)
        return min(1.0, left / (draft * self.mass)) if draft > 0 else 0.0

    def reject(self, place: int, tokens: Sequence[int]) -> None:
        proposer = self.siblings.proposers[place]
        if self.mistake is Mistake.FORGOTTEN_COEFFICIENT:
            return
        mass = 1.0 if self.mistake is Mistake.NO_NORMALISER else self.mass
        before = self.coefficients.copy()
        if proposer == POINT:
            self.excluded.append(tokens[place])
        else:
            self.coefficients[proposer] += mass / self._rest(place, tokens)
        if self._left.sum() > 0:
            self.mass = float(self._left.sum())
        else:
            self.coefficients = before


def rejections(siblings: Siblings, dice: Any) -> Iterator[list[int]]:
    """Tokens drawn as they say, one list for each length, while each may really be rejected."""
    recursion, tokens = Recursion(siblings), []
    for place in range(len(siblings.proposers)):
        law = siblings.proposal(place, tokens)
        if law.sum() == 0:
            return
        tokens.append(int(dice.choice(len(law), p=law / law.sum())))
        if recursion.kept(place, tokens) >= 1:
            return
        recursion.reject(place, tokens)
        yield list(tokens)


def emitted(siblings: Siblings, mistake: Mistake = Mistake.NONE) -> Law:
    """(V,) law of the token that follows the node, by enumeration of every sibling's token."""
    size, count = len(siblings.target), len(siblings.proposers)
    law = np.zeros(size)
    for tokens in itertools.product(range(size), repeat=count):
        weight = 1.0
        for place in range(count):
            weight *= siblings.proposal(place, tokens)[tokens[place]]
        if weight == 0:
            continue
        mixture, below = SignedMixture(siblings, mistake), 0.0
        for place in range(count):
            kept = mixture.kept(place, tokens)
            if mistake is Mistake.SHARED_COIN:  # it is known to be `below` or more
                before, below = below, max(kept, below)
                kept = max(kept - before, 0) / (1 - before) if before < 1 else 1.0
            if mistake is Mistake.NOT_STRICT:
                kept = max(kept, 1 / COINS)
            law[tokens[place]] += weight * kept
            weight *= 1 - kept
            if weight == 0:
                break
            mixture.reject(place, tokens)
        if weight > 0:
            law += weight * mixture.law
    return law


def k_seq_ratio(target: Law, draft: Law, count: int) -> float:
    """The rho of `k_seq`, at which what `count` tokens keep is what is taken from the target."""

    def excess(rho: float) -> float:
        once = np.minimum(target / rho, draft).sum()
        return float(1 - (1 - once) ** count - rho * once)

    return float(brentq(excess, 1, count, xtol=1e-15)) if count > 1 and excess(1) > 0 else 1.0


def k_seq_left(target: Law, draft: Law, count: int) -> Law:
    """The residual of `k_seq` by its definition: the target less what was kept of it."""
    rho = k_seq_ratio(target, draft, count)
    once = np.minimum(target / rho, draft)
    return target - once * (1 - (1 - once.sum()) ** count) / once.sum()

# SPDX-License-Identifier: Apache-2.0
"""`Survival`: what a schedule learns of the fate of one row's drafts, and what it does with it.

To learn from something else, add a field to what `ask` notes and `learn` reads. Needs no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# Cells of a `Survival`, along each side; how many outcomes its first estimates weigh; and what an
# outcome still weighs a turn later, so that texts may change.
BINS, _PRIOR, _FADING = 4, 4.0, 0.98


@dataclass
class Survival:
    """How often drafts of one row are kept, given what is known of them before they are verified.

    Of a draft token with a companion, `shared` is the sum over the vocabulary of
    min(P_draft, P_companion), which the prefix decides alone, and `ratio` is
    min(1, P_companion / P_draft) of the token itself, whose mean over the draft's law is `shared`.
    Estimates start there, and outcomes move them, in cells of shared and ratio; the older an
    outcome is, the less. Each row has its own, so that its text does not depend on its batch.

    outcomes: (tested, kept) tokens of each cell.
    asked: (shared, ratio) of the tokens that were last verified; length: committed ones before.
    """

    outcomes: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    asked: Sequence[tuple[float, float]] = ()
    length: int = 0

    def ask(self, said: Sequence[tuple[float, float]], length: int) -> None:
        """Note what is verified after `length` committed tokens."""
        self.asked, self.length = said, length

    def learn(self, length: int) -> None:
        """Note its outcome, after which `length` tokens are committed, the one added among them."""
        self.outcomes = {
            cell: (tested * _FADING, kept * _FADING)
            for cell, (tested, kept) in self.outcomes.items()
        }
        accepted = length - self.length - 1
        # Nothing beyond the first refused token: what the text does not show must not decide what
        # becomes of it, for its numbers are used again.
        for at, (shared, ratio) in enumerate(self.asked[: accepted + 1]):
            cell = _bin(shared), _bin(ratio)
            tested, kept = self.outcomes.get(cell, (0, 0))
            self.outcomes[cell] = tested + 1, kept + (at < accepted)
        self.asked = ()

    def chance(self, shared: float, ratio: float | None = None) -> float:
        """That a token is kept once those before it are; without `ratio`, whatever token it is."""
        columns = range(BINS) if ratio is None else [_bin(ratio)]
        tested, kept = _PRIOR, _PRIOR * (shared if ratio is None else ratio)
        for column in columns:
            more_tested, more_kept = self.outcomes.get((_bin(shared), column), (0, 0))
            tested, kept = tested + more_tested, kept + more_kept
        return kept / tested

    def cut(self, said: Sequence[tuple[float, float]], token_cost: float) -> int:
        """How many of the tokens proposed to verify: while one more raises tokens per time.

        One at least, or nothing would be learned where nothing is expected.

        Whether a token is verified depends on the tokens before it and on the law that it was drawn
        from, never on which token it is nor on later ones. To take back a token because of what it
        is changes the law of the text: what replaces it is drawn as if nothing had been proposed.
        """
        reached = expected = 1.0
        for at, (shared, ratio) in enumerate(said):
            gain = reached * self.chance(shared)
            if at > 0 and gain * (1 + token_cost * at) <= token_cost * expected:
                return at
            expected += gain
            reached *= self.chance(shared, ratio)
        return len(said)

    def withdraw(
        self, said: Sequence[tuple[float, float]], token_cost: float
    ) -> tuple[int, list[list[float]]]:
        """The same, where each token itself has a say, and what any other would have needed.

        Returns:
            How many tokens to verify; and of each of these, and of the one after them that is taken
            back, the ratio above which a token stays: one for each cell of ratios.
        """
        reached = expected = 1.0
        needed: list[list[float]] = []
        for at, (shared, ratio) in enumerate(said):
            worth = reached * (1 + token_cost * at)
            least = token_cost * expected / worth if worth > 0 else math.inf
            cells = [self.outcomes.get((_bin(shared), column), (0, 0)) for column in range(BINS)]
            # `chance` rises with the ratio inside of a cell.
            needed.append([(least * (_PRIOR + n) - kept) / _PRIOR for n, kept in cells])
            if at == 0:
                needed = [[-1.0] * BINS]
            if ratio <= needed[at][_bin(ratio)]:
                return at, needed
            reached *= self.chance(shared, ratio)
            expected += reached
        return len(said), needed


def _bin(share: float) -> int:
    return min(int(share * BINS), BINS - 1)

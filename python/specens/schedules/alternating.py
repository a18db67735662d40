# SPDX-License-Identifier: Apache-2.0
"""Speculative Ensemble: the members take turns to propose and to score."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from specens.loop.named import argument, counts
from specens.loop.profile import (
    FEW,
    Candidate,
    Profile,
    expected_tokens,
    joined,
    steps,
    survival,
)
from specens.loop.schedule import Models, Schedule, Verification, one_each
from specens_kernels import Refusal

if TYPE_CHECKING:
    from specens.loop.rows import Row
    from specens.loop.run import Run


@dataclass(frozen=True)
class Alternating(Schedule):
    """Members take turns, and a scorer's extra law is its next proposal.

    A member that scores the L pending tokens has also its own law for the next position. That law
    is not the ensemble's, so its token is not emitted but proposed. When a block is kept whole, the
    member that scored last completes its own proposal and the next in rotation scores; when a token
    is replaced, everything pending is dropped and the default proposer starts afresh.

    Source: Fu et al. 2025, arXiv:2502.01662, algorithm 2, continued on the text that includes the
    block just kept (the published code continues without it).
    """

    name: ClassVar[str] = "alternating"
    summary: ClassVar[str] = "members take turns to propose; a scorer proposes next"
    tokens: int | tuple[int, ...] = argument(
        1,
        counts(1),
        "Tokens per proposal, one number per member in `order`. A single number is the first "
        "one's; the others propose 1, and 1 then makes no more calls for one sequence than plain.",
    )
    order: tuple[int, ...] | None = argument(
        None, counts(0), "The rotation, default proposer first. None is cheapest first."
    )

    def bind(self, models: Models) -> "Alternating":
        """See `Schedule`."""
        size = models.num_members
        order = models.cheapest_first if self.order is None else one_each(self.order)
        if sorted(order) != list(range(size)):
            raise Refusal(self.name, "order", f"every member 0 to {size - 1} once", self.order)
        tokens = self.tokens
        if isinstance(tokens, int):
            tokens = (tokens, *[1] * (size - 1))
        if len(tokens) != size:
            raise Refusal(self.name, "tokens", f"1 or {size} integers", tokens)
        return replace(self, tokens=tokens, order=tuple(order))

    @property
    def most_pending(self) -> int:
        """Every slot's proposal can be pending at once, and one more."""
        return sum(one_each(self.tokens)) + 1

    def turn(self, run: "Run") -> list[Verification]:
        """Bring every row to the point where all members have scored its next block."""
        assert self.order is not None, "bound"
        fresh = [row for row in run.rows if not row.pending]
        going = [row for row in run.rows if row.pending]
        if fresh:
            run.propose(self.order[0], fresh, [one_each(self.tokens)[0]] * len(fresh))
            for slot in range(1, len(self.order)):
                run.feed(self.order[slot], fresh)
                run.draw(self.order[slot], fresh)
                if slot < len(self.order) - 1:
                    self._extend(run, slot, fresh)
            for row in fresh:
                row.slot = len(self.order) - 1
        by_slot = [[row for row in going if row.slot == s] for s in range(len(self.order))]
        for slot, rows in enumerate(by_slot):
            if rows:
                self._continue(run, slot, rows)
        block = [min(_num_scored(run, row), len(row.pending)) for row in run.rows]
        return [Verification(run.rows, block, bonus=False)]

    def _extend(self, run: "Run", slot: int, rows: "Sequence[Row]") -> None:
        """Complete the slot's proposal, whose first token was drawn when it scored."""
        assert self.order is not None, "bound"
        run.propose(self.order[slot], rows, [one_each(self.tokens)[slot] - 1] * len(rows))

    def _continue(self, run: "Run", slot: int, rows: "Sequence[Row]") -> None:
        """The last scorer completes its proposal; the next in rotation scores what is pending."""
        assert self.order is not None, "bound"
        self._extend(run, slot, rows)
        following = (slot + 1) % len(self.order)
        scorer = self.order[following]
        assert all(run.length(scorer, row) == row.length - 1 for row in rows), "invariant I2"
        run.feed(scorer, rows)
        run.draw(scorer, rows)
        for row in rows:
            row.slot = following

    @staticmethod
    def seconds(profile: Profile, order: Sequence[int], tokens: Sequence[int]) -> float:
        """Per token.

        A renewal at every fresh start: the first one's block is verified, then, as long as every
        block is kept whole, the next in rotation's, whose first token was drawn when it scored.
        """
        size = len(order)
        kept = [profile.kept[m][-1] for m in order]
        whole = [survival(chances, n) for chances, n in zip(kept, tokens, strict=True)]
        # Of a block that is not kept whole, one token is replaced.
        emitted = [expected_tokens(chances, n - 1) for chances, n in zip(kept, tokens, strict=True)]
        rest = [(n - 1) * profile.proposal(m) for m, n in zip(order, tokens, strict=True)]

        def score(slot: int, pending: int) -> float:
            return profile.forward(order[slot], pending + 1) + profile.draw

        seconds = profile.proposal(order[0]) + rest[0] + profile.check(tokens[0])
        for slot in range(1, size):
            seconds += score(slot, sum(tokens[:slot])) + (rest[slot] if slot < size - 1 else 0.0)
        # Of one rotation after the first block; each further one is as long, but rarer.
        more_seconds = more_tokens = 0.0
        going = 1.0
        for turn in range(1, size + 1):
            slot = turn % size
            pending = sum(tokens) - tokens[slot - 1]
            check = profile.check(tokens[slot])
            more_seconds += going * (rest[slot - 2] + score(slot - 1, pending) + check)
            more_tokens += going * emitted[slot]
            going *= whole[slot]
        if going > 1 - 1e-9:  # nothing is ever replaced
            return more_seconds / more_tokens
        rotations = whole[0] / (1 - going)
        return (seconds + rotations * more_seconds) / (emitted[0] + rotations * more_tokens)

    @classmethod
    def candidates(cls, profile: Profile, most: int) -> Iterator[Candidate]:
        """The best order and numbers of tokens: one by one for few members, else some of them."""
        size = len(profile.weights)
        if size < 2:
            return
        orders: list[tuple[int, ...]]
        if size <= FEW:
            orders = list(itertools.permutations(profile.members))
            each = range(1, most + 1) if size < FEW else steps(most)
            numbers = list(itertools.product(each, repeat=size))
        else:
            orders = [tuple(sorted(profile.members, key=lambda m: profile.forward(m, 1)))]
            numbers = [(first, *[1] * (size - 1)) for first in range(1, most + 1)]
        seconds, order, tokens = min(
            (cls.seconds(profile, order, tokens), order, tokens)
            for order in orders
            for tokens in numbers
        )
        name = f"{cls.name} {joined(order)} {joined(tokens)}"
        yield Candidate(name, cls(tokens, order), seconds)


def _num_scored(run: "Run", row: "Row") -> int:
    """Positions after the committed text that every member of the ensemble has a law for."""
    return min(run.length(member, row) for member in run.ensemble) - row.length + 1

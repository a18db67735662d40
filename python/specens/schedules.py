# SPDX-License-Identifier: Apache-2.0
"""Schedules: who proposes, how many tokens, who verifies, turn by turn.

A schedule is asked once a turn, with the run in hand (`run.Run`): it makes members propose and
score, through `run.propose`, `run.feed` and `run.draw`, and returns what is to be verified. It
never looks at a token. To add a schedule, add a class here and its name to `SCHEDULES`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .run import Row, Run


@dataclass(frozen=True)
class Verification:
    """Rows to verify together.

    rows: the rows.
    num_drafts: per row, how many of its pending tokens are verified.
    bonus: whether a row whose drafts are all kept emits one token more.
    members: who the verifying law is made of; None is the whole ensemble.
    """

    rows: "Sequence[Row]"
    num_drafts: Sequence[int]
    bonus: bool
    members: Sequence[int] | None = None


class Schedule(Protocol):
    """One way of taking turns."""

    @property
    def lookahead(self) -> int:
        """Most tokens that can be pending at once."""
        ...

    def turn(self, run: "Run") -> list[Verification]:
        """Propose and score; say what to verify."""
        ...


@dataclass(frozen=True)
class Plain:
    """Every member scores, one token is drawn from the ensemble: the baseline of all."""

    lookahead: int = 0

    def turn(self, run: "Run") -> list[Verification]:
        """Score the last committed token with every member."""
        for member in run.ensemble:
            run.feed(member, run.rows)
        return [Verification(run.rows, [0] * len(run.rows), bonus=True)]


@dataclass(frozen=True)
class Component:
    """Draw a member by its weight, then the token from it alone: one call a token.

    Exact for mixtures of scope "member" at temperature > 0, since which member a token comes from
    does not depend on the text. Members catch up on what they have missed when they are next drawn.

    Source: Mixture-model-like ensemble, arXiv:2605.00419.
    """

    lookahead: int = 0

    def turn(self, run: "Run") -> list[Verification]:
        """Score with the members drawn."""
        drawn: dict[int, list[Row]] = {}
        for row in run.rows:
            drawn.setdefault(run.component(row), []).append(row)
        for member, rows in drawn.items():
            run.feed(member, rows)
        return [
            Verification(rows, [0] * len(rows), bonus=True, members=(member,))
            for member, rows in drawn.items()
        ]


@dataclass(frozen=True)
class Speculative:
    """One fixed proposer, a member or a separate draft; the ensemble verifies and adds a token.

    Source: Leviathan et al. 2023, arXiv:2211.17192, with the ensemble as the target.
    """

    proposer: int
    num_speculative_tokens: int

    @property
    def lookahead(self) -> int:
        """Tokens drafted per turn."""
        return self.num_speculative_tokens

    def turn(self, run: "Run") -> list[Verification]:
        """Draft with the proposer, then score the drafts with every member.

        A proposer that is a member scores its own last draft too, which it would otherwise be fed
        next turn: that makes the bonus token's law the whole ensemble's.
        """
        # The last token of the text is never drafted: a turn emits one token more than it drafts.
        counts = [min(self.num_speculative_tokens, run.room(row) - 1) for row in run.rows]
        run.propose(self.proposer, run.rows, counts)
        for member in run.ensemble:
            run.feed(member, run.rows)
        return [Verification(run.rows, counts, bonus=True)]


@dataclass(frozen=True)
class Alternating:
    """Speculative Ensemble: members take turns, and a scorer's extra law is its next proposal.

    order: the members in rotation, the default proposer first.
    gammas: tokens that each proposes when its turn comes, in that order.

    A member that scores the L pending tokens has also its own law for the next position. That law
    is not the ensemble's, so its token is not emitted but proposed. When a block is kept whole, the
    member that scored last completes its own proposal and the next in rotation scores; when a token
    is replaced, everything pending is dropped and the default proposer starts afresh.

    Source: Fu et al. 2025, arXiv:2502.01662, algorithm 2, continued on the text that includes the
    block just kept (the published code continues without it).
    """

    order: tuple[int, ...]
    gammas: tuple[int, ...]

    @property
    def lookahead(self) -> int:
        """Every slot's proposal can be pending at once, and one more."""
        return sum(self.gammas) + 1

    def turn(self, run: "Run") -> list[Verification]:
        """Bring every row to the point where all members have scored its next block."""
        fresh = [row for row in run.rows if not row.pending]
        going = [row for row in run.rows if row.pending]
        if fresh:
            run.propose(self.order[0], fresh, [self.gammas[0]] * len(fresh))
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
        block = [min(run.num_scored(row), len(row.pending)) for row in run.rows]
        return [Verification(run.rows, block, bonus=False)]

    def _extend(self, run: "Run", slot: int, rows: "Sequence[Row]") -> None:
        """Complete the slot's proposal, whose first token was drawn when it scored."""
        run.propose(self.order[slot], rows, [self.gammas[slot] - 1] * len(rows))

    def _continue(self, run: "Run", slot: int, rows: "Sequence[Row]") -> None:
        """The last scorer completes its proposal; the next in rotation scores what is pending."""
        self._extend(run, slot, rows)
        following = (slot + 1) % len(self.order)
        assert all(run.lag(self.order[following], row) == 1 for row in rows), "invariant I2"
        run.feed(self.order[following], rows)
        run.draw(self.order[following], rows)
        for row in rows:
            row.slot = following


SCHEDULES = ("plain", "component", "speculative", "alternating")

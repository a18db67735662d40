# SPDX-License-Identifier: Apache-2.0
"""Drafts of several sizes: each verifies the next smaller one's, the ensemble the last's."""

import math
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
from specens.loop.schedule import Models, Schedule, Verification, one_each, verify_pending
from specens_kernels import Refusal

if TYPE_CHECKING:
    from specens.loop.rows import Row
    from specens.loop.run import Run

# How many tokens are handed up -> with what chance.
_Chances = dict[int, float]
# What a chain of drafts hands up, and its time.
_Handed = tuple[_Chances, float]
# Drafts, their numbers of tokens, and what they hand up.
_Chain = tuple[tuple[int, ...], tuple[int, ...], _Handed]


@dataclass(frozen=True)
class Hierarchy(Schedule):
    """The smallest draft proposes, each other verifies and adds, the ensemble is the last.

    With lossless rules the text has the ensemble's law, since what a level hands up has the level's
    own law; with gates it is PyramidSD: fuzzy at both stages (F) or at the last (A).

    Source: HSD, arXiv:2510.19705; PyramidSD, arXiv:2510.12966; ML-SpecQD, arXiv:2503.13565.
    """

    name: ClassVar[str] = "hierarchy"
    summary: ClassVar[str] = "drafts of several sizes, each verified by the next larger one"
    fewest_drafts: ClassVar[int] = 1
    most_drafts: ClassVar[float] = math.inf
    drafts_in_words: ClassVar[str] = "one model at least"
    verifies_drafts: ClassVar[bool] = True
    tokens: int | tuple[int, ...] = argument(
        4,
        counts(1),
        "Tokens that the smallest draft proposes at a time, then for each other draft the tokens "
        "that it has kept and added before it hands them up. A single number is the first one's; "
        "the i-th then has i times as many.",
    )

    def bind(self, models: Models) -> "Hierarchy":
        """See `Schedule`."""
        levels, tokens = len(models.drafts), self.tokens
        if isinstance(tokens, int):
            tokens = tuple(tokens * (i + 1) for i in range(levels))
        if len(tokens) != levels:
            raise Refusal(self.name, "tokens", f"1 or {levels} integers", tokens)
        return replace(self, tokens=tokens)

    @property
    def most_pending(self) -> int:
        """Every level's tokens can be pending at once, and one more each."""
        tokens = one_each(self.tokens)
        return sum(tokens) + len(tokens) + 1

    def turn(self, run: "Run") -> list[Verification]:
        """Fill the highest draft's share, then score with every member."""
        self._fill(run, len(run.drafts) - 1, run.rows)
        for member in run.ensemble:
            run.feed(member, run.rows)
        return [verify_pending(run)]

    def _fill(self, run: "Run", level: int, rows: "Sequence[Row]") -> None:
        """Give each row this level's share of tokens, or fewer where its text ends."""
        draft, tokens = run.drafts[level], one_each(self.tokens)[level]
        if level == 0:
            # A turn emits one token more than it proposes.
            run.propose(draft, rows, [min(tokens, run.room(row) - 1) for row in rows])
            return
        while rows := [row for row in rows if _wants(run, row, draft, tokens)]:
            self._fill(run, level - 1, rows)
            verify_level(run, level, rows, tokens)

    @staticmethod
    def seconds(profile: Profile, drafts: Sequence[int], tokens: Sequence[int]) -> float:
        """Per token. How many tokens a level hands up varies: its chances go up the levels.

        Source: arXiv:2510.19705, whose C_i = (N C_{i-1} + t_i) / E_i takes that number as fixed.
        """
        handed = _proposed(profile, drafts[0], tokens[0])
        for below, level, share in zip(drafts, drafts[1:], tokens[1:], strict=False):
            handed = _filled(profile, below, level, share, handed)
        return _verified(profile, drafts[-1], handed)

    @classmethod
    def candidates(cls, profile: Profile, most: int) -> Iterator[Candidate]:
        """Every chain of two drafts or more with its best numbers of tokens."""
        numbers = list(range(1, most + 1)) if len(profile.drafts) <= FEW else steps(most)
        best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        for chain, tokens, handed in _chains(profile, numbers):
            if len(chain) > 1:
                timed = _verified(profile, chain[-1], handed), tokens
                best[chain] = min(best.get(chain, timed), timed)
        for chain, (seconds, tokens) in best.items():
            names = " ".join(profile.names[m] for m in chain)
            drafts = tuple(m - len(profile.weights) for m in chain)
            yield Candidate(f"{cls.name} {names} {joined(tokens)}", cls(tokens), seconds, drafts)


def _wants(run: "Run", row: "Row", draft: int, tokens: int) -> bool:
    return not row.ended and row.pending.count(draft) < tokens and run.room(row) > 1


def verify_level(run: "Run", level: int, rows: "Sequence[Row]", most: int) -> None:
    """A draft verifies the latest proposals and adds a token: they are then its own.

    What it verifies are the pending tokens of smaller drafts, who are listed before it. Where
    blocks are verified it keeps no more than `most` tokens of its own: that a block is longer says
    something about its tokens, whose law would then not be the draft's.
    """
    from specens.loop.run import to_host
    from specens_kernels import Stream, verify

    draft, acceptance = run.drafts[level], run.acceptances[level - 1]
    owned = [sum(owner >= draft for owner in row.pending) for row in rows]
    counts = [len(row.pending) - n for row, n in zip(rows, owned, strict=True)]
    begins = [row.length + n for row, n in zip(rows, owned, strict=True)]
    run.feed(draft, rows)
    before = [begin - 1 for begin in begins]
    verdict = verify(
        [run.laws[draft].take(rows, begins, max(counts) + 1)],
        run.text.take_drafts(rows, begins, counts),
        run.numbers(Stream.VERIFY, level, rows, before, max(counts) + 1),
        run.member_law,
        **run.proposal(rows, counts, begins, ()),
        acceptance=acceptance,
    )
    on_host = zip(rows, owned, *to_host(verdict), strict=True)
    for k, (row, kept_before, tokens, num_accepted, status) in enumerate(on_host):
        place = row.length + kept_before + num_accepted
        run.text.write_one(row, place, verdict.tokens[k], num_accepted)
        row.statistics.test(row.pending[kept_before:], num_accepted)
        row.statistics.drafted[draft] += 1
        row.statistics.status |= status
        new = num_accepted + 1
        if acceptance.rule.block:
            new = min(new, most - row.pending[:kept_before].count(draft))
        row.pending[kept_before:] = [draft] * new
        row.judged += 1
        # Of this level's tokens alone: a level that has refused the end goes on.
        row.ended = not run.stopper.eos.isdisjoint(tokens[:new])
    # What was said after the token just added is about another one.
    run.roll_back(rows, [row.end - 1 for row in rows])


def _proposed(profile: Profile, model: int, tokens: int) -> _Handed:
    """What the lowest level hands up, and its time."""
    return {tokens: 1.0}, tokens * profile.proposal(model)


def _filled(profile: Profile, below: int, level: int, share: int, handed: _Handed) -> _Handed:
    """What a level hands up once it has its share, and the time of all below and of itself.

    handed: of one proposal from below.
    """
    kept = profile.kept[below][level]
    chances, seconds = handed
    gains: _Chances = {}
    for drafts, chance in chances.items():
        seconds += chance * (profile.forward(level, drafts + 1) + profile.check(drafts))
        for k in range(drafts + 1):
            stays = survival(kept, k) - (survival(kept, k + 1) if k < drafts else 0.0)
            gains[k + 1] = gains.get(k + 1, 0.0) + chance * stays
    # Chances that the level ever has so many tokens; once it has its share it asks for no more.
    ever: _Chances = {0: 1.0}
    for have in range(share):
        for gain, chance in gains.items():
            ever[have + gain] = ever.get(have + gain, 0.0) + ever.get(have, 0.0) * chance
    rounds = sum(ever.get(have, 0.0) for have in range(share))
    return {n: chance for n, chance in ever.items() if n >= share}, rounds * seconds


def _verified(profile: Profile, proposer: int, handed: _Handed) -> float:
    """Seconds per token where the ensemble verifies what it is handed and adds a token."""
    kept = profile.kept[proposer][-1]
    chances, seconds = handed
    emitted = 0.0
    for drafts, chance in chances.items():
        seconds += chance * profile.scored(proposer, drafts)
        emitted += chance * expected_tokens(kept, drafts)
    return seconds / emitted


def _chains(profile: Profile, numbers: Sequence[int]) -> Iterator[_Chain]:
    """All chains of drafts with all numbers of tokens; each extends one seen before."""
    chains: list[_Chain] = []
    for level in profile.drafts:
        longer: list[_Chain] = [((level,), (n,), _proposed(profile, level, n)) for n in numbers]
        for chain, tokens, handed in chains:
            for share in numbers:
                filled = _filled(profile, chain[-1], level, share, handed)
                longer.append(((*chain, level), (*tokens, share), filled))
        yield from longer
        chains += longer

# SPDX-License-Identifier: Apache-2.0
"""One fixed proposer, a member or a separate draft; the ensemble verifies."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from specens.loop.named import argument, count
from specens.loop.profile import (
    FEW,
    Candidate,
    Kept,
    Profile,
    Relaxed,
    Stopped,
    expected_tokens,
    of_size,
    steps,
    survival,
)
from specens.loop.schedule import DraftStop, Models, Schedule, Verification, verify_pending
from specens.schedules.stops import STOP

if TYPE_CHECKING:
    from specens.loop.run import Run


@dataclass(frozen=True)
class Speculative(Schedule):
    """One proposer; the ensemble verifies its tokens and adds one.

    Source: Leviathan et al. 2023, arXiv:2211.17192, with the ensemble as the target.
    """

    name: ClassVar[str] = "speculative"
    summary: ClassVar[str] = "one model proposes, the ensemble verifies"
    most_drafts: ClassVar[float] = 1
    drafts_in_words: ClassVar[str] = "one model at most"
    by_position: ClassVar[bool] = True
    tokens: int = argument(4, count(1), "Tokens per proposal.")
    proposer: int | None = argument(
        None, count(0), "The member that drafts. None is the draft, or the cheapest member."
    )
    stop: DraftStop | None = argument(
        None, STOP, "When the proposer ends before its number of tokens. None is never."
    )

    def bind(self, models: Models) -> "Speculative":
        """See `Schedule`."""
        return replace(self, proposer=models.proposer(self.name, self.proposer))

    @property
    def most_pending(self) -> int:
        """Tokens drafted per turn."""
        return self.tokens

    def turn(self, run: "Run") -> list[Verification]:
        """Draft with the proposer, then score the drafts with every member.

        A proposer that is a member scores its own last draft too, which it would otherwise be fed
        next turn: that makes the bonus token's law the whole ensemble's.
        """
        assert self.proposer is not None, "bound"
        # The last token of the text is never drafted: a turn emits one token more than it drafts.
        counts = [min(self.tokens, run.room(row) - 1) for row in run.rows]
        run.propose(self.proposer, run.rows, counts, self.stop)
        for member in run.ensemble:
            run.feed(member, run.rows)
        return [verify_pending(run)]

    @staticmethod
    def seconds(profile: Profile, proposer: int, tokens: int, kept: Kept | None = None) -> float:
        """Per token; `kept` in place of what the profile says of the proposer's drafts."""
        if kept is None:
            sizes = profile.blocks[proposer] if profile.blocks else ()
            kept = of_size(sizes, tokens) or profile.kept[proposer][-1]
        whole = tokens * profile.proposal(proposer) + profile.scored(proposer, tokens)
        return whole / expected_tokens(kept, tokens)

    @staticmethod
    def stopped_seconds(profile: Profile, stopped: Stopped, tokens: int) -> float:
        """Per token, where the proposer stops by itself, after `tokens` at most.

        What it would have gone on with is not counted as refused: its last draft is verified, too.
        """
        seconds, emitted = 0.0, 1.0
        for place in range(1, tokens + 1):
            reached = survival(stopped.going, place - 1)
            more = survival(stopped.going, place) if place < tokens else 0.0
            seconds += reached * profile.proposal(stopped.model)
            # Nobody asks after the last one.
            seconds += reached * stopped.asking if place < tokens else 0.0
            seconds += (reached - more) * profile.scored(stopped.model, place)
            emitted += survival(stopped.kept, place)
        return seconds / emitted

    @classmethod
    def relaxed_seconds(cls, profile: Profile, relaxed: Relaxed, tokens: int) -> float:
        """Per token, with a lossy rule."""
        return cls.seconds(profile, relaxed.model, tokens, of_size(relaxed.kept, tokens))

    @classmethod
    def candidates(cls, profile: Profile, most: int) -> Iterator[Candidate]:
        """For each proposer; for each kind of stop and each rule, whose drafts suit it best."""
        members = profile.members if len(profile.weights) > 1 else range(0)
        tried = range(1, most + 1) if len(profile.drafts) <= FEW else steps(most)
        for model in (*members, *profile.drafts):
            sizes = range(1, most + 1) if model in members else tried
            seconds, tokens = min((cls.seconds(profile, model, n), n) for n in sizes)
            yield cls._of(profile, model, tokens, seconds)
        best: dict[str, Candidate] = {}
        for stopped in profile.stopped:
            seconds, tokens = min(
                (cls.stopped_seconds(profile, stopped, n), n) for n in range(2, max(most, 2) + 1)
            )
            candidate = cls._of(profile, stopped.model, tokens, seconds, stop=stopped.stop)
            candidate = replace(candidate, name=f"{candidate.name} {stopped.stop.name} stop")
            _keep_faster(best, stopped.stop.name, candidate)
        for relaxed in profile.relaxed:
            seconds, tokens = min(
                (cls.relaxed_seconds(profile, relaxed, n), n) for n in range(1, most + 1)
            )
            candidate = cls._of(profile, relaxed.model, tokens, seconds)
            candidate = replace(
                candidate,
                name=f"{candidate.name} {relaxed.acceptance}",
                acceptance=relaxed.acceptance,
                law=relaxed.law,
                divergence=relaxed.divergence,
            )
            _keep_faster(best, relaxed.acceptance, candidate)
        yield from best.values()

    @classmethod
    def _of(
        cls,
        profile: Profile,
        model: int,
        tokens: int,
        seconds: float,
        *,
        stop: DraftStop | None = None,
    ) -> Candidate:
        separate = model - len(profile.weights)
        schedule = cls(tokens, model if separate < 0 else None, stop)
        drafts = () if separate < 0 else (separate,)
        return Candidate(f"{cls.name} {profile.names[model]} {tokens}", schedule, seconds, drafts)


def _keep_faster(best: dict[str, Candidate], key: str, candidate: Candidate) -> None:
    best[key] = min(best.get(key, candidate), candidate, key=lambda each: each.seconds)

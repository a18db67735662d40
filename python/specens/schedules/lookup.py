# SPDX-License-Identifier: Apache-2.0
"""The text is the draft: what followed the last tokens when they occurred before."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from specens.loop.named import argument, count
from specens.loop.profile import Candidate, Profile
from specens.loop.schedule import Schedule, Verification, verify_pending

if TYPE_CHECKING:
    from specens.loop.run import Run


@dataclass(frozen=True)
class Lookup(Schedule):
    """What followed the latest earlier occurrence of the last tokens is verified.

    Source: prompt lookup decoding; Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
    """

    name: ClassVar[str] = "lookup"
    summary: ClassVar[str] = "the text's own repetitions are the draft"
    by_position: ClassVar[bool] = True
    looks_up: ClassVar[bool] = True
    tokens: int = argument(4, count(1), "Tokens proposed at most.")
    longest: int = argument(3, count(1), "Tokens of the text's end that are looked for at most.")

    @property
    def most_pending(self) -> int:
        """Tokens proposed per turn."""
        return self.tokens

    def turn(self, run: "Run") -> list[Verification]:
        """Look up, then score with every member."""
        for row in run.rows:
            most = min(self.tokens, run.room(row) - 1)
            run.write(row, row.occurrences.continuation(row.tokens, self.longest, most))
        for member in run.ensemble:
            run.feed(member, run.rows)
        return [verify_pending(run)]

    @staticmethod
    def seconds(profile: Profile, tokens: int) -> float:
        """Per token."""
        seconds, emitted = profile.look_up, 1.0
        for drafts, share, kept in profile.found[tokens - 1]:
            seconds += share * profile.scored(None, drafts)
            emitted += share * kept
        return seconds / emitted

    @classmethod
    def candidates(cls, profile: Profile, most: int) -> Iterator[Candidate]:
        """The best number of tokens, of those that were tried on the text."""
        if profile.found:
            sizes = range(1, len(profile.found) + 1)
            seconds, tokens = min((cls.seconds(profile, n), n) for n in sizes)
            yield Candidate(f"{cls.name} {tokens}", cls(tokens), seconds)

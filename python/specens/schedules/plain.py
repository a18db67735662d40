# SPDX-License-Identifier: Apache-2.0
"""Plain decoding: every member reads every token. The baseline of all schedules."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from specens.loop.profile import Candidate, Profile
from specens.loop.schedule import Schedule, Verification, verify_pending

if TYPE_CHECKING:
    from specens.loop.run import Run


@dataclass(frozen=True)
class Plain(Schedule):
    """Every member scores, one token is drawn from the ensemble."""

    name: ClassVar[str] = "plain"
    summary: ClassVar[str] = "every member reads every token"
    by_position: ClassVar[bool] = True

    def turn(self, run: "Run") -> list[Verification]:
        """Score the last committed token with every member."""
        for member in run.ensemble:
            run.feed(member, run.rows)
        return [verify_pending(run)]

    @staticmethod
    def seconds(profile: Profile) -> float:
        """Per token."""
        return sum(profile.forward(m, 1) for m in profile.members) + profile.check(0)

    @classmethod
    def candidates(cls, profile: Profile, most: int) -> Iterator[Candidate]:
        """The only one."""
        yield Candidate(cls.name, cls(), cls.seconds(profile))

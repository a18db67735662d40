# SPDX-License-Identifier: Apache-2.0
"""The search: what every schedule proposes for the models, the fastest first.

A schedule's file holds its predicted time and its candidates; nothing here runs a model.
"""

from specens.loop.profile import Candidate, Profile, survival
from specens.schedules import SCHEDULES


def candidates(profile: Profile, *, most: int = 8, components: bool = True) -> list[Candidate]:
    """The best of each kind, the fastest first: of each proposer, and of each chain of drafts.

    All are lossless but those with a rule of `profile.relaxed`.

    Args:
        profile: the models.
        most: highest number of tokens that a model proposes at a time.
        components: whether the law is a sampled mixture of members, each of which can write alone.
    """
    listed = [
        candidate
        for schedule in SCHEDULES.values()
        if components or not schedule.sampled_mixture
        for candidate in schedule.candidates(profile, most)
    ]
    return sorted(listed, key=lambda candidate: candidate.seconds)


def least_chance(profile: Profile, proposer: int, seconds: float) -> float:
    """Below this chance that a draft is kept, the next one is not worth its time.

    The next draft is of use where it and the one before are kept, and saves then what a token takes
    on average.

    Args:
        profile: the models. proposer: who drafts.
        seconds: per token, as things are.
    """
    verifiers = [m for m in profile.members if m != proposer]
    cost = profile.proposal(proposer) + profile.check(5) - profile.check(4)
    cost += sum(profile.forward(m, 6) - profile.forward(m, 5) for m in verifiers)
    gain = survival(profile.kept[proposer][-1], 1) * seconds
    return min(max(cost / gain, 0.05), 0.95) if gain > 0 else 0.95

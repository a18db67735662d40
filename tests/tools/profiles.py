# SPDX-License-Identifier: Apache-2.0
"""A measured profile that nobody measured: three members and three drafts, no two numbers alike."""

from specens.loop.profile import Profile, Stopped
from specens.schedules import ConfidenceStop

# Three members and three drafts. No two numbers are alike, and blocks grow stickier in some curves.
MEMBERS, DRAFTS = 3, 3
CURVES = ((0.8,), (0.7, 0.55, 0.45), (0.9, 0.8), (0.6, 0.3), (0.75, 0.6, 0.5), (0.5,), (0.85,))
# Of one draft: that its proposer goes on, that it is kept, that both are so: the sure are kept.
GOES, KEPT, BOTH = 0.6, 0.7, 0.55
# Drafts that a look-up finds, how often, and how many are kept.
FOUND = ((0, 0.3, 0.0), (1, 0.1, 0.4), (2, 0.6, 1.2))


def profile() -> Profile:
    size = MEMBERS + DRAFTS
    return Profile(
        names=tuple("ABCxyz"),
        weights=(0.5, 0.3, 0.2),
        forwards=tuple(
            ((1, base), (2, base * 1.1), (4, base * 1.3), (8, base * 1.9))
            for base in (1.0, 1.7, 0.6, 0.05, 0.11, 0.23)
        ),
        draw=0.02,
        verify=((0, 0.05), (1, 0.07), (3, 0.1), (7, 0.2)),
        kept=tuple(
            tuple(CURVES[(3 * m + v) % len(CURVES)] for v in range(size + 1)) for m in range(size)
        ),
        found=(((0, 0.5, 0.0), (1, 0.5, 0.7)), FOUND),
        look_up=0.03,
        stopped=tuple(
            Stopped(
                model,
                ConfidenceStop(),
                tuple(GOES**n for n in range(1, 5)),
                tuple(KEPT * BOTH**n for n in range(4)),
                asking=0.04,
            )
            for model in (1, 4)
        ),
    )

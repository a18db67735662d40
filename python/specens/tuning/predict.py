# SPDX-License-Identifier: Apache-2.0
"""Which schedule is the fastest: time per token predicted from forward times and acceptance.

Pure functions of a `Profile`, which `tuner.py` measures: nothing here runs a model. They hold
for one sequence and a text that does not end. Whether a draft is kept, and whether its proposer
stops, is taken to depend on nothing but its place in its block. To add a schedule, add a function
of its time per token, and its candidates in `search.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# (count, seconds), the counts rising: straight lines between, and on beyond the last two.
Times = tuple[tuple[int, float], ...]
# Chances that the first 1, 2, ... drafts of a block are all kept; beyond, the last ratio goes on,
# so that a single number is the chance of each.
Kept = tuple[float, ...]
# Of a look-up: drafts, the share of turns that have so many, and how many of them are kept.
Found = tuple[tuple[int, float, float], ...]
# How many tokens are handed up -> with what chance.
_Counts = dict[int, float]

_MOST_AHEAD = 8


@dataclass(frozen=True)
class Stopped:
    """A proposer that stops by itself.

    model: who proposes. stop: "kind", a name of `stops.STOPS`, and its parameters.
    going: chances that a second, third, ... draft is proposed at all.
    kept: chances that the first 1, 2, ... drafts are proposed and kept.
    asking: seconds to ask it after a draft.
    """

    model: int
    stop: dict[str, Any]
    going: Kept
    kept: Kept
    asking: float = 0.0


@dataclass(frozen=True)
class Relaxed:
    """A proposer whose drafts are judged by a lossy rule.

    model: who proposes. acceptance: the rule as it is written on a command line.
    law: of the text, in words. kept: kept[g - 1]: as in `Profile`, of this rule, in blocks of g.
    divergence: mean total variation between what stands at a draft's place and the law asked for.
    """

    model: int
    acceptance: str
    law: str
    kept: tuple[Kept, ...]
    divergence: float


@dataclass(frozen=True)
class Profile:
    """What predictions are made of. Models are counted: the ensemble's members, then the drafts.

    names: of the models.
    weights: of the ensemble's members.
    forwards: per model, seconds of one forward over 1, 2, ... tokens.
    draw: seconds to draw one token from a model's law.
    verify: seconds of a turn without forwards and draws, for 0, 1, ... drafts.
    kept: kept[m][v]: of model m's drafts, when model v verifies them; the last v is the ensemble.
    blocks: blocks[m][g - 1]: kept[m][-1] where all blocks have g drafts: the longer they are, the
        rarer they begin where drafts are kept. Empty: kept[m][-1] for all.
    found: what is looked up in the text, for at most 1, 2, ... drafts.
    look_up: seconds of a look-up.
    stopped: what is known of proposers that stop by themselves.
    relaxed: of lossy rules, those that were asked for.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    forwards: tuple[Times, ...]
    draw: float
    verify: Times
    kept: tuple[tuple[Kept, ...], ...]
    blocks: tuple[tuple[Kept, ...], ...] = ()
    found: tuple[Found, ...] = ()
    look_up: float = 0.0
    stopped: tuple[Stopped, ...] = ()
    relaxed: tuple[Relaxed, ...] = ()

    @property
    def members(self) -> range:
        """The ensemble's."""
        return range(len(self.weights))

    @property
    def drafts(self) -> range:
        """The models outside the ensemble, the smallest first."""
        return range(len(self.weights), len(self.forwards))

    def forward(self, model: int, tokens: float) -> float:
        """Seconds of one forward over so many tokens."""
        return interpolated(self.forwards[model], tokens)

    def proposal(self, model: int) -> float:
        """Seconds to propose one token."""
        return self.forward(model, 1) + self.draw

    def check(self, drafts: int) -> float:
        """Seconds to verify so many drafts, their forwards not counted."""
        return interpolated(self.verify, drafts)


def interpolated(times: Times, count: float) -> float:
    """The time of `count`, on the straight line through its neighbours."""
    if len(times) == 1 or count <= times[0][0]:
        return times[0][1]
    above = next((i for i, (n, _) in enumerate(times) if n >= count), len(times) - 1)
    (a, low), (b, high) = times[above - 1], times[above]
    return low + (high - low) * (count - a) / (b - a)


def survival(kept: Kept, count: int) -> float:
    """The chance that the first `count` drafts are all kept."""
    if count == 0:
        return 1.0
    if count <= len(kept):
        return kept[count - 1]
    before = kept[-2] if len(kept) > 1 else 1.0
    ratio = kept[-1] / before if before > 0 else 0.0
    return float(kept[-1] * ratio ** (count - len(kept)))


def _expected(kept: Kept, count: int) -> float:
    """1 + how many of `count` drafts are kept on average."""
    return sum(survival(kept, i) for i in range(count + 1))


def plain(profile: Profile) -> float:
    """Every member reads every token."""
    return sum(profile.forward(m, 1) for m in profile.members) + profile.check(0)


def component(profile: Profile) -> float:
    """A member is drawn by its weight, and reads what it has missed since it was last drawn."""
    total = profile.check(0)
    for member, weight in zip(profile.members, profile.weights, strict=True):
        left, missed = weight, 0
        while left > 1e-6:
            chance = weight * weight * (1 - weight) ** missed
            missed += 1
            if (1 - weight) ** missed < 1e-6:
                chance = left
            total += chance * profile.forward(member, missed)
            left -= chance
    return total


def lookahead(profile: Profile, proposer: int, ahead: int, most: int = 16) -> float:
    """Tokens' members are drawn beforehand; `schedules.LookAhead` with one number of `aheads`.

    Another member's token is kept with the mean chance of all of them. Tokens that a member has
    missed while it was not asked are not counted.
    """
    share = profile.weights[proposer]
    others = {m: profile.weights[m] / (1 - share) for m in profile.members if m != proposer}
    kept = sum(part * profile.kept[proposer][m][0] for m, part in others.items())
    tokens = seconds = 0.0

    def end(drafts: int, foreign: int) -> float:
        asked = sum(
            (1 - (1 - part) ** foreign) * profile.forward(m, drafts + 1)
            for m, part in others.items()
        )
        return drafts * profile.proposal(proposer) + asked + profile.check(drafts)

    # Chances that so many of the tokens before this place are other members'.
    going = {0: 1.0}
    for place in range(most + 1):
        tokens += sum(chance * kept**foreign for foreign, chance in going.items())
        following: dict[int, float] = {}
        for foreign, chance in going.items():
            own, other = chance * share, chance * (1 - share)
            if place == most:
                seconds += own * (end(place, foreign) + profile.forward(proposer, 1))
            else:
                following[foreign] = following.get(foreign, 0.0) + own
            if place == most or foreign == ahead:
                seconds += other * end(place, foreign + 1)
            else:
                following[foreign + 1] = following.get(foreign + 1, 0.0) + other
        going = following
    return seconds / tokens


def best_ahead(
    weights: Sequence[float],
    costs: Sequence[float],
    proposer: int,
    token_cost: float,
    acceptance: float,
    most: int,
) -> int:
    """How far `schedules.LookAhead` writes ahead with the least expected time per token.

    Args:
        weights: of the members. costs: time of a forward of each, in any unit.
        proposer: which of them proposes.
        token_cost: time that a proposed token adds to another's forward, relative to it.
        acceptance: chance that a token proposed for another member is kept.
        most: tokens proposed at most.
    """
    if weights[proposer] >= 1:
        return 0
    size = len(weights)
    profile = Profile(
        names=tuple(map(str, range(size))),
        weights=tuple(weights),
        forwards=tuple(((1, cost), (2, cost * (1 + token_cost))) for cost in costs),
        draw=0.0,
        verify=((0, 0.0),),
        kept=(((acceptance,),) * (size + 1),) * size,
    )
    return min(range(_MOST_AHEAD + 1), key=lambda a: lookahead(profile, proposer, a, most))


def speculative(profile: Profile, proposer: int, gamma: int) -> float:
    """One model proposes gamma tokens, and the ensemble verifies them."""
    handed = _proposed(profile, proposer, gamma)
    sizes = profile.blocks[proposer] if profile.blocks else ()
    return _verified(profile, proposer, *handed, kept=_of_size(sizes, gamma))


def relaxing(profile: Profile, one: Relaxed, gamma: int) -> float:
    """As `speculative`, with a lossy rule."""
    handed = _proposed(profile, one.model, gamma)
    return _verified(profile, one.model, *handed, kept=_of_size(one.kept, gamma))


def _of_size(sizes: Sequence[Kept], gamma: int) -> Kept | None:
    """The chances for blocks of gamma drafts, or of the largest size there is."""
    return sizes[min(gamma, len(sizes)) - 1] if sizes else None


def stopping(profile: Profile, one: Stopped, gamma: int) -> float:
    """One model proposes until it stops, gamma tokens at most; `schedules.Speculative` with a stop.

    What it would have gone on with is not counted as refused: its last draft is verified as well.
    """
    seconds, tokens = 0.0, 1.0
    for place in range(1, gamma + 1):
        reached = survival(one.going, place - 1)
        more = survival(one.going, place) if place < gamma else 0.0
        seconds += reached * profile.proposal(one.model)
        # Nobody asks after the last one.
        seconds += reached * one.asking if place < gamma else 0.0
        seconds += (reached - more) * _scored(profile, one.model, place)
        tokens += survival(one.kept, place)
    return seconds / tokens


def lookup(profile: Profile, gamma: int) -> float:
    """What followed the last tokens before is verified, where they have occurred before."""
    seconds, tokens = profile.look_up, 1.0
    for drafts, share, kept in profile.found[gamma - 1]:
        seconds += share * _scored(profile, None, drafts)
        tokens += share * kept
    return seconds / tokens


def hierarchy(profile: Profile, drafts: Sequence[int], gammas: Sequence[int]) -> float:
    """Each draft verifies the one before it, the ensemble the last; `schedules.Hierarchy`.

    How many tokens a level hands up varies: the chances of each number are carried up the levels.

    Source: arXiv:2510.19705, whose C_i = (N C_{i-1} + t_i) / E_i takes that number as fixed.
    """
    counts, seconds = _proposed(profile, drafts[0], gammas[0])
    for below, level, gamma in zip(drafts, drafts[1:], gammas[1:], strict=False):
        counts, seconds = _filled(profile, below, level, gamma, counts, seconds)
    return _verified(profile, drafts[-1], counts, seconds)


def _proposed(profile: Profile, model: int, gamma: int) -> tuple[_Counts, float]:
    """What the lowest level hands up, and its time."""
    return {gamma: 1.0}, gamma * profile.proposal(model)


def _filled(
    profile: Profile, below: int, level: int, gamma: int, counts: _Counts, seconds: float
) -> tuple[_Counts, float]:
    """What a level hands up once it has gamma tokens, and the time of all below and of itself.

    counts, seconds: of one proposal from below.
    """
    kept = profile.kept[below][level]
    gains: _Counts = {}
    for handed, chance in counts.items():
        seconds += chance * (profile.forward(level, handed + 1) + profile.check(handed))
        for k in range(handed + 1):
            stays = survival(kept, k) - (survival(kept, k + 1) if k < handed else 0.0)
            gains[k + 1] = gains.get(k + 1, 0.0) + chance * stays
    # Chances that the level ever has so many tokens; from gamma on it asks for no more.
    ever: _Counts = {0: 1.0}
    for have in range(gamma):
        for gain, chance in gains.items():
            ever[have + gain] = ever.get(have + gain, 0.0) + ever.get(have, 0.0) * chance
    rounds = sum(ever.get(have, 0.0) for have in range(gamma))
    return {n: chance for n, chance in ever.items() if n >= gamma}, rounds * seconds


def _verified(
    profile: Profile, proposer: int, counts: _Counts, seconds: float, kept: Kept | None = None
) -> float:
    """Seconds per token where the ensemble verifies what it is handed and adds a token."""
    kept = profile.kept[proposer][-1] if kept is None else kept
    tokens = 0.0
    for handed, chance in counts.items():
        seconds += chance * _scored(profile, proposer, handed)
        tokens += chance * _expected(kept, handed)
    return seconds / tokens


def _scored(profile: Profile, proposer: int | None, drafts: int) -> float:
    """Seconds for the ensemble to read and verify so many drafts."""
    # A member that proposes has read all but its last draft.
    forwards = sum(profile.forward(m, 1 if m == proposer else drafts + 1) for m in profile.members)
    return forwards + profile.check(drafts)


def alternating(profile: Profile, order: Sequence[int], gammas: Sequence[int]) -> float:
    """Members take turns; `schedules.Alternating`.

    A renewal at every fresh start: the first one's block is verified, then, as long as every block
    is kept whole, the next in rotation's, whose first token was drawn when it scored.
    """
    size = len(order)
    kept = [profile.kept[m][-1] for m in order]
    whole = [survival(one, gamma) for one, gamma in zip(kept, gammas, strict=True)]
    # Of a block that is not kept whole, one token is replaced.
    emitted = [_expected(one, gamma - 1) for one, gamma in zip(kept, gammas, strict=True)]
    rest = [(gamma - 1) * profile.proposal(m) for m, gamma in zip(order, gammas, strict=True)]

    def score(slot: int, pending: int) -> float:
        return profile.forward(order[slot], pending + 1) + profile.draw

    seconds = profile.proposal(order[0]) + rest[0] + profile.check(gammas[0])
    for slot in range(1, size):
        seconds += score(slot, sum(gammas[:slot])) + (rest[slot] if slot < size - 1 else 0.0)
    # Of one rotation after the first block; each further one is as long, but rarer.
    more_seconds = more_tokens = 0.0
    going = 1.0
    for turn in range(1, size + 1):
        slot = turn % size
        pending = sum(gammas) - gammas[slot - 1]
        check = profile.check(gammas[slot])
        more_seconds += going * (rest[slot - 2] + score(slot - 1, pending) + check)
        more_tokens += going * emitted[slot]
        going *= whole[slot]
    if going > 1 - 1e-9:  # nothing is ever replaced
        return more_seconds / more_tokens
    rotations = whole[0] / (1 - going)
    return (seconds + rotations * more_seconds) / (emitted[0] + rotations * more_tokens)


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

# SPDX-License-Identifier: Apache-2.0
"""Predicted times against simulations, which know nothing of the formulas.

A simulation plays turns, with coins for what is kept. To add a schedule, add its turn to
`SIMULATIONS`.
"""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from profiles import BOTH, FOUND, GOES, KEPT, MEMBERS, profile

from specens.loop.profile import Profile, interpolated, survival
from specens.schedules import (
    Alternating,
    Component,
    Hierarchy,
    LookAhead,
    Lookup,
    Plain,
    Speculative,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Turn = tuple[float, int]  # seconds, tokens


class Dice:
    """A profile that is played with."""

    def __init__(self, profile: Profile, seed: int = 0) -> None:
        self.profile, self.random = profile, random.Random(seed)
        self._times = [dict(times) for times in (*profile.forwards, profile.verify)]

    def forward(self, model: int, tokens: int) -> float:
        times = self._times[model]
        if tokens not in times:
            known = [n for n in (0, 1, 2, 3, 4, 7, 8) if n in times]
            low = max((n for n in known[:-1] if n < tokens), default=known[0])
            high = min(n for n in known if n > low)
            slope = (times[high] - times[low]) / (high - low)
            times[tokens] = times[low] + slope * (tokens - low)
        return times[tokens]

    def check(self, drafts: int) -> float:
        return self.forward(-1, drafts)

    def propose(self, model: int, count: int) -> float:
        return count * (self.forward(model, 1) + self.profile.draw)

    def kept(self, proposer: int, verifier: int, count: int) -> int:
        """How many of a block are kept, one coin each."""
        chances = list(self.profile.kept[proposer][verifier])
        ratio = chances[-1] / (chances[-2] if len(chances) > 1 else 1)
        while len(chances) < count:
            chances.append(chances[-1] * ratio)
        for place, (before, now) in enumerate(itertools.pairwise([1.0, *chances[:count]])):
            if self.random.random() * before >= now:
                return place
        return count


def plain_turn(dice: Dice) -> Turn:
    return sum(dice.forward(m, 1) for m in range(MEMBERS)) + dice.check(0), 1


def component_turns(dice: Dice, count: int) -> list[Turn]:
    unread = [1] * MEMBERS
    turns = []
    for _ in range(count):
        member = dice.random.choices(range(MEMBERS), dice.profile.weights)[0]
        turns.append((dice.forward(member, unread[member]) + dice.check(0), 1))
        unread[member] = 0
        unread = [n + 1 for n in unread]
    return turns


def lookahead_turn(dice: Dice, proposer: int, ahead: int, most: int) -> Turn:
    drawn = dice.random.choices(range(MEMBERS), dice.profile.weights, k=most + 1)
    others = [at for at, member in enumerate(drawn) if member != proposer]
    drawn = drawn[: others[ahead] + 1 if len(others) > ahead else most + 1]
    drafts = len(drawn) - 1
    asked = set(drawn) - ({proposer} if drawn[-1] != proposer else set())
    seconds = dice.propose(proposer, drafts) + dice.check(drafts)
    seconds += sum(dice.forward(m, 1 if m == proposer else drafts + 1) for m in asked)
    # The formula takes the mean chance of the others, whichever they are.
    rest = [m for m in range(MEMBERS) if m != proposer]
    weight = sum(dice.profile.weights[m] for m in rest)
    chance = sum(dice.profile.weights[m] / weight * dice.profile.kept[proposer][m][0] for m in rest)
    for place, member in enumerate(drawn[:-1]):
        if member != proposer and dice.random.random() >= chance:
            return seconds, place + 1
    return seconds, drafts + 1


def speculative_turn(dice: Dice, proposer: int, gamma: int) -> Turn:
    seconds = dice.propose(proposer, gamma) + dice.check(gamma)
    seconds += sum(dice.forward(m, 1 if m == proposer else gamma + 1) for m in range(MEMBERS))
    return seconds, dice.kept(proposer, -1, gamma) + 1


def stopping_turn(dice: Dice, proposer: int, gamma: int) -> Turn:
    drafts, kept, refused, going = 0, 0, False, True
    seconds = 0.0
    while going and drafts < gamma:
        drafts += 1
        seconds += dice.propose(proposer, 1) + (0.04 if drafts < gamma else 0.0)
        coin = dice.random.random()
        stays = coin < KEPT
        # As often as it must be, given that the draft is kept or is not.
        given = BOTH / KEPT if stays else (GOES - BOTH) / (1 - KEPT)
        going = dice.random.random() < given
        refused = refused or not stays
        kept += not refused
    forwards = (dice.forward(m, 1 if m == proposer else drafts + 1) for m in range(MEMBERS))
    return seconds + sum(forwards) + dice.check(drafts), kept + 1


def lookup_turn(dice: Dice) -> Turn:
    drafts, _, kept = dice.random.choices(FOUND, [share for _, share, _ in FOUND])[0]
    seconds = 0.03 + sum(dice.forward(m, drafts + 1) for m in range(MEMBERS)) + dice.check(drafts)
    return seconds, 1 + int(kept) + (dice.random.random() < kept - int(kept))


def hierarchy_turn(dice: Dice, drafts: Sequence[int], gammas: Sequence[int]) -> Turn:
    def fill(level: int) -> Turn:
        if level == 0:
            return dice.propose(drafts[0], gammas[0]), gammas[0]
        seconds, have = 0.0, 0
        while have < gammas[level]:
            spent, handed = fill(level - 1)
            seconds += spent + dice.forward(drafts[level], handed + 1) + dice.check(handed)
            have += dice.kept(drafts[level - 1], drafts[level], handed) + 1
        return seconds, have

    seconds, handed = fill(len(drafts) - 1)
    seconds += sum(dice.forward(m, handed + 1) for m in range(MEMBERS)) + dice.check(handed)
    return seconds, dice.kept(drafts[-1], -1, handed) + 1


def alternating_turn(dice: Dice, order: Sequence[int], gammas: Sequence[int]) -> Turn:
    """From one fresh start to the next: the queue holds (member, its pending tokens)."""
    size, draw = len(order), dice.profile.draw
    seconds, tokens = dice.propose(order[0], gammas[0]), 0
    queue = [(0, gammas[0])]
    while True:
        if len(queue) == 1 and tokens == 0:  # fresh: all others read, and propose what they read
            for slot in range(1, size):
                seconds += dice.forward(order[slot], 1 + sum(n for _, n in queue)) + draw
                if slot < size - 1:
                    seconds += dice.propose(order[slot], gammas[slot] - 1)
                queue.append((slot, gammas[slot] if slot < size - 1 else 1))
        else:  # the last one completes its proposal, whoever was just verified reads
            last, _ = queue[-1]
            seconds += dice.propose(order[last], gammas[last] - 1)
            queue[-1] = (last, gammas[last])
            slot = (last + 1) % size
            seconds += dice.forward(order[slot], 1 + sum(n for _, n in queue)) + draw
            queue.append((slot, 1))
        slot, count = queue.pop(0)
        count = gammas[slot]
        seconds += dice.check(count)
        kept = dice.kept(order[slot], -1, count)
        if kept < count:
            return seconds, tokens + kept + 1
        tokens += count


SIMULATIONS: dict[str, tuple[Callable[[Profile], float], Callable[[Dice], Turn]]] = {
    "plain": (Plain.seconds, plain_turn),
    "lookahead 0": (lambda p: LookAhead.seconds(p, 0, 0), lambda d: lookahead_turn(d, 0, 0, 16)),
    "lookahead 3": (lambda p: LookAhead.seconds(p, 2, 3), lambda d: lookahead_turn(d, 2, 3, 16)),
    "lookahead cut": (
        lambda p: LookAhead.seconds(p, 0, 2, 3),
        lambda d: lookahead_turn(d, 0, 2, 3),
    ),
    "member 3": (lambda p: Speculative.seconds(p, 2, 3), lambda d: speculative_turn(d, 2, 3)),
    "draft 6": (lambda p: Speculative.seconds(p, 4, 6), lambda d: speculative_turn(d, 4, 6)),
    "stop of a member": (
        lambda p: Speculative.stopped_seconds(p, p.stopped[0], 6),
        lambda d: stopping_turn(d, 1, 6),
    ),
    "stop of a draft": (
        lambda p: Speculative.stopped_seconds(p, p.stopped[1], 3),
        lambda d: stopping_turn(d, 4, 3),
    ),
    "lookup": (lambda p: Lookup.seconds(p, 2), lookup_turn),
    "hierarchy of 2": (
        lambda p: Hierarchy.seconds(p, (3, 5), (2, 4)),
        lambda d: hierarchy_turn(d, (3, 5), (2, 4)),
    ),
    "hierarchy of 3": (
        lambda p: Hierarchy.seconds(p, (3, 4, 5), (3, 3, 5)),
        lambda d: hierarchy_turn(d, (3, 4, 5), (3, 3, 5)),
    ),
    "alternating of 2": (
        lambda p: Alternating.seconds(p, (1, 0), (4, 2)),
        lambda d: alternating_turn(d, (1, 0), (4, 2)),
    ),
    "alternating of 3": (
        lambda p: Alternating.seconds(p, (2, 0, 1), (3, 1, 2)),
        lambda d: alternating_turn(d, (2, 0, 1), (3, 1, 2)),
    ),
}
TURNS, BATCHES = 6_000, 40


def simulated(turns: Sequence[Turn]) -> tuple[float, float]:
    """Seconds per token, and the standard error of it."""
    size = len(turns) // BATCHES
    parts = [turns[i * size : (i + 1) * size] for i in range(BATCHES)]
    ratios = [sum(t for t, _ in part) / sum(n for _, n in part) for part in parts]
    mean = sum(t for t, _ in turns) / sum(n for _, n in turns)
    return mean, statistics.stdev(ratios) / math.sqrt(BATCHES)


@pytest.mark.parametrize("name", SIMULATIONS)
def test_a_prediction_is_the_mean_of_its_simulation(name: str) -> None:
    predicted, turn = SIMULATIONS[name]
    dice = Dice(profile())
    mean, error = simulated([turn(dice) for _ in range(TURNS)])
    # 4.5 standard errors: one in 150,000. No step of the search is as small as that.
    assert abs(predicted(profile()) - mean) <= 4.5 * error + 1e-12
    assert error < 0.015 * mean


def test_a_component_reads_what_it_has_missed() -> None:
    turns = component_turns(Dice(profile()), 20_000)
    mean, error = simulated(turns)
    assert abs(Component.seconds(profile()) - mean) <= 4.5 * error
    lazy = sum(w * t[0][1] for w, t in zip(profile().weights, profile().forwards, strict=False))
    assert abs(lazy + 0.05 - mean) > 4.5 * error  # as if nothing were missed


def test_the_simulation_rejects_other_formulas() -> None:
    dice, here = Dice(profile()), profile()

    def rejected(formula: float, turn: Callable[[Dice], Turn]) -> bool:
        mean, error = simulated([turn(dice) for _ in range(TURNS)])
        return abs(formula - mean) > 4.5 * error

    # A block whose verification costs one token's forward.
    flat = replace(here, forwards=tuple(times[:1] for times in here.forwards))
    assert rejected(Speculative.seconds(flat, 4, 6), SIMULATIONS["draft 6"][1])
    # Other numbers of tokens.
    assert rejected(Hierarchy.seconds(here, (3, 5), (1, 1)), SIMULATIONS["hierarchy of 2"][1])
    assert rejected(Alternating.seconds(here, (1, 0), (4, 1)), SIMULATIONS["alternating of 2"][1])
    # A stop that knows nothing of what is kept, and one that nobody minds.
    blind = replace(here.stopped[1], kept=tuple(KEPT * (GOES * KEPT) ** n for n in range(4)))
    assert rejected(Speculative.stopped_seconds(here, blind, 3), SIMULATIONS["stop of a draft"][1])
    deaf = replace(here.stopped[1], going=(1.0, 1.0))
    assert rejected(Speculative.stopped_seconds(here, deaf, 3), SIMULATIONS["stop of a draft"][1])
    # Look-ups that always find something.
    always = replace(here, found=(here.found[0], FOUND[2:]))
    assert rejected(Lookup.seconds(always, 2), SIMULATIONS["lookup"][1])
    # Tokens of others that are always kept.
    sure = replace(here, kept=(((1.0,),) * 7,) * 6)
    assert rejected(LookAhead.seconds(sure, 2, 3), SIMULATIONS["lookahead 3"][1])


def test_known_speedups() -> None:
    """n members of one cost and acceptance a, one token each: n / (n - (n - 1) a)."""
    for size, chance in itertools.product((2, 3, 4), (0.0, 0.5, 0.9)):
        free = Profile(
            names=tuple("abcd"[:size]),
            weights=(1 / size,) * size,
            forwards=(((1, 1.0),),) * size,
            draw=0.0,
            verify=((0, 0.0),),
            kept=(((chance,),) * (size + 1),) * size,
        )
        found = Alternating.seconds(free, range(size), (1,) * size)
        assert found == pytest.approx(size - (size - 1) * chance, rel=1e-9)
        # Leviathan et al. 2023, theorem 3.8, with a member of the ensemble as the draft.
        found = Speculative.seconds(free, 0, 3)
        assert found == pytest.approx((3 + size) / sum(chance**i for i in range(4)))


def test_times_are_interpolated_and_go_on() -> None:
    times = ((1, 1.0), (2, 3.0), (4, 4.0))
    assert [interpolated(times, n) for n in (0, 1, 2, 3, 4, 6)] == [
        1.0,
        1.0,
        3.0,
        3.5,
        4.0,
        5.0,
    ]
    assert interpolated(((1, 2.0),), 7) == 2.0


def test_chances_go_on_with_the_last_ratio() -> None:
    assert [survival((0.5,), n) for n in range(4)] == [1, 0.5, 0.25, 0.125]
    assert [survival((0.8, 0.4), n) for n in range(5)] == pytest.approx([1, 0.8, 0.4, 0.2, 0.1])
    assert survival((0.0, 0.0), 3) == 0.0


def test_blocks_that_are_always_kept_take_turns_for_ever() -> None:
    """Where nothing is replaced the start does not count: the time of a rotation per token."""
    here = profile()
    sure = replace(here, kept=(((1.0,),) * 7,) * 6)
    almost = replace(here, kept=(((1 - 1e-8,),) * 7,) * 6)
    order, gammas = (1, 0, 2), (2, 1, 3)
    found = Alternating.seconds(sure, order, gammas)
    assert found == pytest.approx(Alternating.seconds(almost, order, gammas), rel=1e-5)
    assert found > sum(here.forward(m, 1) for m in range(MEMBERS)) / sum(gammas)

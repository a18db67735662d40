# SPDX-License-Identifier: Apache-2.0
"""Tuning: predicted times against simulations, and against the loop itself under a clock of ours.

A schedule's formula is compared with a simulation that knows nothing of it: it plays turns, with
coins for what is kept. The loop's own calls are checked with models whose forwards take exactly
what we say (`clock`), so that measuring is exact and a turn that costs one forward more or less
than predicted is found out. To add a schedule, add its turn to `SIMULATIONS`.
"""

import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import noisy, prompts, toy
from typer.testing import CliRunner

from specens import SpeculativeDecoder, family
from specens.cli import app, loading
from specens.loop.profile import Candidate, Profile, Stopped, interpolated, survival
from specens.members.member import Member
from specens.schedules import (
    SCHEDULES,
    STOPS,
    Alternating,
    Component,
    ConfidenceStop,
    EntropyStop,
    Hierarchy,
    LookAhead,
    Lookup,
    Plain,
    Speculative,
    read_schedule,
)
from specens.schedules.mixture import best_ahead
from specens.schedules.stops import stop_features
from specens.tuning import decoder_of, stops, tune
from specens.tuning.agreement import Agreement, curve, read, starts
from specens.tuning.compare import sampling
from specens.tuning.lookups import LookUps, replayed
from specens.tuning.measure import Sweep
from specens.tuning.search import candidates, least_chance
from specens.tuning.stops import draw, fit_stop
from specens_kernels import Acceptance

pytestmark = pytest.mark.usefixtures("one_thread")

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


# --- simulations ----------------------------------------------------------------------------------

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


# --- the search -----------------------------------------------------------------------------------


def test_no_chain_and_no_number_of_tokens_is_faster_than_the_one_found() -> None:
    here = profile()
    chains = [c for n in (1, 2, 3) for c in itertools.combinations(here.drafts, n)]
    best = {
        chain: min(
            (Hierarchy.seconds(here, chain, gammas), gammas)
            for gammas in itertools.product(range(1, 6), repeat=len(chain))
        )
        for chain in chains
    }
    found = [one for one in candidates(here, most=5) if one.drafts and " stop" not in one.name]
    assert len(found) == len(chains)
    for one in found:
        seconds, gammas = best[tuple(MEMBERS + i for i in one.drafts)]
        assert one.seconds == pytest.approx(seconds)
        assert one.schedule == (Hierarchy(gammas) if len(gammas) > 1 else Speculative(*gammas))
    assert found[0].seconds == min(seconds for seconds, _ in best.values())


def test_candidates_are_sorted_and_of_every_kind() -> None:
    found = candidates(profile())
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    kinds = {*SCHEDULES} - {"companion"}  # as the README says
    assert {one.schedule.name for one in found} == kinds
    (stopped,) = [one for one in found if " stop" in one.name]
    seconds, model, gamma = min(
        (Speculative.stopped_seconds(profile(), one, gamma), one.model, gamma)
        for one in profile().stopped
        for gamma in range(2, 9)
    )
    assert stopped.seconds == seconds
    assert stopped.schedule.tokens == gamma
    assert stopped.drafts == (() if model < MEMBERS else (model - MEMBERS,))
    one_law = candidates(profile(), components=False)
    assert {one.schedule.name for one in one_law} == kinds - {"component", "lookahead"}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_members_are_tried_in_turn(size: int) -> None:
    base = profile()
    here = Profile(
        base.names[:size],
        (1 / size,) * size,
        base.forwards[:size],
        base.draw,
        base.verify,
        tuple(one[: size + 1] for one in base.kept[:size]),
    )
    found = {one.schedule.name: one for one in reversed(candidates(here, most=4))}
    assert ("alternating" in found) == (size > 1)
    if size in (2, 3):
        best = min(
            Alternating.seconds(here, order, gammas)
            for order in itertools.permutations(range(size))
            for gammas in itertools.product(range(1, 5), repeat=size)
        )
        assert found["alternating"].seconds == pytest.approx(best)


def test_blocks_that_are_always_kept_take_turns_for_ever() -> None:
    """Where nothing is replaced the start does not count: the time of a rotation per token."""
    here = profile()
    sure = replace(here, kept=(((1.0,),) * 7,) * 6)
    almost = replace(here, kept=(((1 - 1e-8,),) * 7,) * 6)
    order, gammas = (1, 0, 2), (2, 1, 3)
    found = Alternating.seconds(sure, order, gammas)
    assert found == pytest.approx(Alternating.seconds(almost, order, gammas), rel=1e-5)
    assert found > sum(here.forward(m, 1) for m in range(MEMBERS)) / sum(gammas)


def test_models_of_one_size_need_no_lookahead_and_cheap_ones_do() -> None:
    def best(share: float, cost: float, token_cost: float, kept: float) -> int:
        return best_ahead((share, 1 - share), (cost, 1.0), 0, token_cost, kept, 16)

    assert best(0.5, 1.0, 0.0, 1.0) == 0
    assert best(1.0, 0.1, 0.0, 1.0) == 0
    for found in (
        [best(0.5, cost, 0.1, 0.7) for cost in (0.5, 0.2, 0.05, 0.01)],
        [best(0.5, 0.1, cost, 0.7) for cost in (0.8, 0.4, 0.1, 0.0)],
        [best(0.5, 0.1, 0.1, kept) for kept in (0.1, 0.5, 0.7, 0.9)],
    ):
        assert found == sorted(found)
        assert found[0] < found[-1]
        assert found[-1] > 1


def test_looking_ahead_counts_every_member_that_is_asked() -> None:
    """One cheap member and four dear ones: a second foreign token is mostly another member's."""
    weights, costs = (0.2,) * 5, (0.1, 1.0, 1.0, 1.0, 1.0)
    assert best_ahead(weights, costs, 0, 0.1, 0.7, 16) == 0
    assert best_ahead((0.2, 0.8), (0.1, 1.0), 0, 0.1, 0.7, 16) >= 2


def test_a_draft_is_not_worth_a_time_that_it_cannot_save() -> None:
    here = profile()
    cheap, dear = (least_chance(here, m, 2.0) for m in (3, 1))
    assert 0.05 <= cheap < dear <= 0.95
    useless = replace(here, kept=(((0.0,),) * 7,) * 6)
    assert least_chance(useless, 3, 2.0) == 0.95


# --- the learned stop -----------------------------------------------------------------------------


def regression(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...]]:
    dice = torch.Generator().manual_seed(seed)
    features = torch.randn(20_000, 4, generator=dice, dtype=torch.float64)
    features[:, 0] = 1
    truth = (0.4, 1.0, -0.7, 0.2)
    chances = torch.sigmoid(features @ torch.tensor(truth, dtype=torch.float64))
    return features, torch.bernoulli(chances, generator=dice), truth


def test_the_fit_recovers_the_coefficients() -> None:
    features, kept, truth = regression()
    found = fit_stop(features, kept)
    curvature = (features.T * 0.25) @ features  # no less than the information it stands for
    error = 1 / curvature.diagonal().sqrt()
    assert all(abs(a - b) < 8 * e for a, b, e in zip(found, truth, error.tolist(), strict=True))
    # With the chances themselves nothing is left to chance.
    chances = torch.sigmoid(features @ torch.tensor(truth, dtype=torch.float64))
    assert fit_stop(features, chances) == pytest.approx(truth, abs=1e-5)


def test_the_fit_is_calibrated() -> None:
    """Newton's condition: among all drafts, as many are expected to be kept as are."""
    features, kept, _ = regression(1)
    expected = torch.sigmoid(features @ torch.tensor(fit_stop(features, kept), dtype=torch.float64))
    assert float(expected.mean()) == pytest.approx(float(kept.mean()), abs=1e-5)
    for low in (0.1, 0.3, 0.5, 0.7):
        some = (expected >= low) & (expected < low + 0.2)
        error = math.sqrt(0.25 / int(some.sum()))
        assert abs(float((expected - kept)[some].mean())) < 4.5 * error
        assert abs(float((expected / 2 - kept)[some].mean())) > 4.5 * error  # a wrong one fails


def test_the_fit_survives_what_has_no_answer() -> None:
    always = torch.ones(50, 4)
    assert all(map(math.isfinite, fit_stop(always, torch.ones(50))))
    apart = torch.linspace(-30, 0, 40)[:, None] * torch.tensor([0.0, 1, 1, 0]) + 1
    found = fit_stop(apart, (torch.arange(40) > 20).double())
    assert all(map(math.isfinite, found))


# --- measuring ------------------------------------------------------------------------------------

COSTS = {"0": (5.0, 0.5), "1": (3.0, 0.25), "2": (1.0, 0.125)}
LENGTHS = (4, 6, 3)
# Of these rules, whose acceptance does not jump from all to nothing.
SMOOTH = ("lenient:lenience=0.4", "cactus:divergence=0.5")
LOSSY = (
    "js:threshold=0.1",
    "lenient:lenience=0.4",
    "typical:epsilon=0.02",
    "cactus:divergence=0.5",
)


class Clock:
    """Time passes when a model runs, and only then: a start and a bit for each token."""

    def __init__(self, models: Sequence[Any]) -> None:
        self.now = 0.0
        self.costs = {id(model): COSTS[str(i)] for i, model in enumerate(models)}

    def forward(self, original: Any) -> Any:
        def timed(member: Member, tokens: Any, counts: Any, *rest: Any, **options: Any) -> Any:
            start, each = self.costs[id(member.model)]
            self.now += start + each * max(counts)
            return original(member, tokens, counts, *rest, **options)

        return timed


@pytest.fixture(scope="module")
def models() -> list[Any]:
    first = toy(0, 23, spread=2.0, max_position_embeddings=1024)
    return [first, noisy(first, 0.25, 1), noisy(first, 0.35, 2)]


@pytest.fixture
def clock(models: list[Any], monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(models)
    monkeypatch.setattr(Member, "forward", made.forward(Member.forward))
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    return made


def texts() -> list[torch.Tensor]:
    return [prompts((length,), 23, seed=length)["input_ids"] for length in LENGTHS]


def seconds_per_token(decoder: SpeculativeDecoder, temperature: float, rounds: int) -> float:
    """What the loop takes, by the clock."""
    seconds = tokens = 0.0
    options = sampling(120, temperature=temperature)
    for number in range(rounds):
        for seed, text in enumerate(texts()):
            decoder.generate(text, seed=10 * (number + 1) + seed, **options)
            assert decoder.statistics is not None
            seconds += decoder.statistics.decode_seconds
            tokens += decoder.statistics.num_tokens
    return seconds / tokens


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_what_is_predicted_is_what_the_loop_takes(
    models: list[Any], clock: Clock, temperature: float
) -> None:
    """Every candidate, two members and a draft; the clock leaves nothing but chance."""
    found = tune(
        models[:2],
        texts(),
        sampling(300 if temperature > 0 else 120, temperature=temperature),
        drafts=models[2:],
        weights=(0.6, 0.4),
    )
    for times, (start, each) in zip(found.profile.forwards, COSTS.values(), strict=True):
        assert times == tuple((n, start + each * n) for n in (1, 2, 4, 8))
    assert found.profile.draw == 0
    assert set(dict(found.profile.verify).values()) == {0.0}
    for one in found.candidates:
        if " stop" in one.name:  # see test_long_proposals_are_predicted_too
            continue
        decoder = decoder_of(one, models[:2], drafts=models[2:], weights=(0.6, 0.4))
        # When sampled, another text is written now: of 360 tokens the time varies by up to 7 %.
        expected = seconds_per_token(decoder, temperature, 4 if temperature > 0 else 1)
        tolerance = 1e-9 if one.name == "plain" else 0.06 if temperature > 0 else 0.03
        assert one.seconds == pytest.approx(expected, rel=tolerance), one.name


def test_acceptance_is_the_overlap_of_the_laws(models: list[Any]) -> None:
    """Against full forwards, without a cache."""
    text, drafts = texts()[0], [models[2], models[0]]
    decoder = SpeculativeDecoder(models[:2], schedule="hierarchy", draft=drafts, weights=(0.6, 0.4))
    sweep, agreement = Sweep(), Agreement(4, 2, 8)
    decoder.schedule = sweep
    written = decoder.generate(text, seed=0, **sampling(80, temperature=0.7))
    read(decoder, sweep, agreement, written, text.shape[1])
    with torch.no_grad():
        laws = [
            (model(written[:, :-1]).logits[0, text.shape[1] - 1 :] / 0.7).double().softmax(-1)
            for model in (*models, models[0])
        ]
    laws.append(0.6 * laws[0] + 0.4 * laws[1])
    for (m, one), (v, other) in itertools.product(enumerate(laws[:-1]), enumerate(laws)):
        (found,) = agreement.overlaps[m][v]
        expected = torch.minimum(one, other).sum(-1)
        # Logits of single precision, whose sums have another order.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert (float(expected.mean()) < 0.99) == (m != v and {m, v} != {0, 3})


def test_a_block_begins_where_another_ended() -> None:
    """Greedy drafts, four kept and four refused: five blocks of eight tokens, one kept whole."""

    def begins_of(kept: torch.Tensor, size: int) -> list[float]:
        return starts(kept, kept, size).tolist()

    text = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0] * 6, dtype=torch.float64)
    begins = [1.0, 0, 0, 0, 0, 1, 1, 1] * 6
    assert begins_of(text, 4) == begins
    # Of the texts' last block, what would come next is not known.
    assert curve([text], 8)[:4] == pytest.approx([0.25] * 4, abs=0.02)
    even = torch.full((200,), 0.7, dtype=torch.float64)
    assert curve([even], 8) == pytest.approx([0.7**n for n in range(1, 9)])
    assert curve([even[:3]], 8) == pytest.approx([0.7, 0.49, 0.343])


def test_the_text_that_is_measured_by_is_the_ensembles(models: list[Any]) -> None:
    plain = SpeculativeDecoder(models[:2], schedule="plain")
    swept = SpeculativeDecoder(models[:2], schedule="hierarchy", draft=[models[2]])
    swept.schedule = Sweep()
    for text in texts():
        found, expected = (
            one.generate(text, do_sample=False, max_new_tokens=60) for one in (swept, plain)
        )
        assert found.tolist() == expected.tolist()


def test_too_little_text_is_an_error(models: list[Any]) -> None:
    with pytest.raises(ValueError, match="tune: max_new_tokens: expected enough to time every mod"):
        tune(models[:2], texts()[:1], sampling(2))


def ending(models: list[Any], monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int]) -> None:
    monkeypatch.setattr(models[0].generation_config, "eos_token_id", list(tokens))


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_texts_that_end_at_once_are_measured_by(
    models: list[Any], clock: Clock, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    options = sampling(40, temperature=temperature)
    whole = tune(models[:2], texts(), options, drafts=models[2:])
    ending(models, monkeypatch, range(23))  # every token does
    found = tune(models[:2], texts(), options, drafts=models[2:])
    assert found.num_tokens == 120
    assert found == replace(whole, seconds=found.seconds)
    assert models[0].generation_config.eos_token_id == list(range(23))


def test_acceptance_is_of_the_texts_up_to_their_ends(
    models: list[Any], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending(models, monkeypatch, [20])
    plain = SpeculativeDecoder(models[:2], schedule="plain")
    options = sampling(200, temperature=0.0)
    sizes = [plain.generate(text, **options).shape[1] - text.shape[1] for text in texts()]
    assert 16 <= sum(sizes) < 600  # some do end
    found = tune(models[:2], texts(), options)
    assert found.num_tokens == sum(sizes)
    # What is written beyond the ends is timed all the same.
    assert [n for n, _ in found.profile.forwards[0]] == [1, 2, 4, 8]


def test_few_turns_are_enough(models: list[Any], clock: Clock) -> None:
    """Each model is timed in two sizes at least: a block costs more than its first token."""
    for count in (6, 8, 12):
        found = tune(models[:2], texts()[:1], sampling(count), drafts=models[2:])
        for times, (start, each) in zip(found.profile.forwards, COSTS.values(), strict=True):
            assert len(times) > 1
            assert all(seconds == start + each * n for n, seconds in times)


def test_a_product_has_no_components(models: list[Any]) -> None:
    found = tune(models[:2], texts(), sampling(40), ensemble="product", weights=(1.5, -0.5))
    kinds = {one.schedule.name for one in found.candidates}
    assert kinds == {"plain", "speculative", "alternating", "lookup"}


def test_every_kind_of_stop_is_a_candidate(models: list[Any]) -> None:
    found = tune(models[:2], texts(), sampling(40), drafts=models[2:])
    stopped = {one.schedule.stop.name: one for one in found.candidates if " stop" in one.name}
    assert set(stopped) == set(STOPS)
    for kind, one in stopped.items():
        saved = json.loads(json.dumps(one.as_dict()))
        again = replace(one, schedule=read_schedule(saved["schedule"]))
        assert again == one
        decoder = decoder_of(again, models[:2], drafts=models[2:])
        stop = decoder.schedule.stop  # type: ignore[attr-defined]
        assert type(stop) is STOPS[kind]
        if kind == "learned":
            assert stop == found.stops[2 if one.drafts else one.schedule.proposer]
    assert found.checked()[0].schedule == Plain()
    assert found.best() == found.candidates[0]


def test_a_stop_is_told_the_same_by_the_loop_and_by_measuring(models: list[Any]) -> None:
    """At temperature 0, too, where a draft's law has one token and its log-probability is bare."""
    told: list[torch.Tensor] = []

    class Ears:
        def asks(self, log_probs: torch.Tensor, logits: torch.Tensor) -> list[bool]:
            told.append(stop_features(log_probs, logits))
            return [False] * len(logits)

    decoder = SpeculativeDecoder(models[:1], schedule=Speculative(stop=Ears()), draft=models[2])
    for temperature in (0.0, 0.7):
        told.clear()
        written = decoder.generate(texts()[0], seed=1, **sampling(12, temperature=temperature))
        first = texts()[0].shape[1] - 1
        with torch.no_grad():
            logits = models[2](written).logits[0, first : first + 1]
        law = (logits / (temperature or 1.0)).softmax(-1)
        if temperature == 0:
            law = torch.nn.functional.one_hot(law.argmax(-1), 23).float()
        seen = draw(logits, law, law, greedy=temperature == 0)
        assert bool((seen.chances == 1).all())
        near = (seen.features[0] - told[0].double()).abs().amax(-1)
        assert float(near.min()) < 1e-4  # one of the four draws is the loop's; at 0 all are
        assert temperature > 0 or float(near.max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_long_proposals_are_predicted_too(
    models: list[Any], clock: Clock, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Stops that end some blocks, and look-ups, at sizes that the search would not choose."""
    # No law over 23 tokens is flat enough for the default.
    monkeypatch.setitem(stops.READY, "entropy", EntropyStop(least=0.35))
    size = 300 if temperature > 0 else 120
    options: dict[str, Any] = {"drafts": models[2:], "weights": (0.6, 0.4)}
    found = tune(models[:2], texts(), sampling(size, temperature=temperature), **options)
    here, wrong, ends = found.profile, [], []

    def compare(predicted: float, schedule: Any, draft: bool) -> float:
        one = Candidate("", schedule, 0.0, (0,) if draft else ())
        decoder = decoder_of(one, models[:2], **options)
        expected = seconds_per_token(decoder, temperature, 4 if temperature > 0 else 1)
        assert predicted == pytest.approx(expected, rel=0.08), schedule
        return expected

    for one in here.stopped:
        if one.model == 0:
            continue
        schedule = Speculative(8, None if one.model == 2 else one.model, one.stop)
        predicted = Speculative.stopped_seconds(here, one, 8)
        expected = compare(predicted, schedule, one.model == 2)
        wrong.append(abs(Speculative.seconds(here, one.model, 8) / expected - 1))
        ends.append(one.going[0] < 0.95)
    assert sum(ends) >= 3
    assert temperature > 0 or max(wrong) > 0.5  # as if nothing were stopped
    for gamma in (1, 4):
        predicted = Lookup.seconds(here, gamma)
        expected = compare(predicted, Lookup(gamma), False)
        sure = replace(here, found=(((gamma, 1.0, gamma),),) * gamma)
        assert temperature == 0 or Lookup.seconds(sure, gamma) < 0.9 * expected


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_lossy_rules_are_predicted_and_never_the_best(
    models: list[Any], clock: Clock, temperature: float
) -> None:
    rules = [Acceptance.parse(rule) for rule in LOSSY]
    options: dict[str, Any] = {"drafts": models[2:], "weights": (0.6, 0.4)}
    writing = sampling(120, temperature=temperature)
    found = tune(models[:2], texts(), writing, acceptances=rules, **options)
    lossy = {one.acceptance: one for one in found.candidates if not one.lossless}
    assert list(lossy) == sorted(LOSSY, key=lambda rule: lossy[rule].seconds)
    assert not found.candidates[0].lossless  # or the next line would say nothing
    assert found.best().lossless
    assert all(one in found.checked() for one in lossy.values())
    for rule, one in lossy.items():
        assert one.law == Acceptance.parse(rule).rule.law
        # Greedily a rule may well trust nothing but what the target says, too.
        assert (0 if temperature > 0 else -1) < one.divergence <= 1
    for one in found.profile.relaxed:
        if one.model != 2:
            continue
        for gamma in (2, 8):
            way = Candidate("", Speculative(gamma), 0.0, (0,), one.acceptance)
            decoder = decoder_of(way, models[:2], **options)
            expected = seconds_per_token(decoder, temperature, 3 if temperature > 0 else 1)
            predicted = Speculative.relaxed_seconds(found.profile, one, gamma)
            if temperature == 0:
                assert predicted == pytest.approx(expected, rel=0.03), way
            elif one.acceptance in SMOOTH:
                assert predicted == pytest.approx(expected, rel=0.07), way
            # A gate lets whole stretches pass or none: 360 tokens tell its time within some 20 %.
            if temperature > 0:
                assert Speculative.seconds(found.profile, 2, gamma) > 1.1 * expected, way


@pytest.mark.parametrize("gamma", [1, 2, 4, 8])
def test_long_blocks_begin_more_rarely_where_drafts_are_kept(
    models: list[Any], clock: Clock, gamma: int
) -> None:
    """Greedy texts that repeat themselves: a draft is kept in two of them, never in the third."""
    options: dict[str, Any] = {"drafts": models[2:], "weights": (0.6, 0.4)}
    found = tune(models[:2], texts(), sampling(120, temperature=0.0), **options)
    way = Candidate("", Speculative(gamma), 0.0, (0,))
    expected = seconds_per_token(decoder_of(way, models[:2], **options), 0.0, 1)
    predicted = Speculative.seconds(found.profile, 2, gamma)
    assert predicted == pytest.approx(expected, rel=0.03)
    if gamma != 4:  # the size that one curve for all is made for
        of_all = Speculative.seconds(replace(found.profile, blocks=()), 2, gamma)
        assert abs(of_all / expected - 1) > 0.07


def test_one_model_alone_looks_up(models: list[Any], clock: Clock) -> None:
    found = tune(models[:1], texts(), sampling(40))
    assert {one.schedule.name for one in found.candidates} == {"plain", "lookup"}
    start, each = COSTS["0"]
    (times,) = found.profile.forwards
    assert {1, 2, 4, 8} <= {n for n, _ in times}
    assert all(seconds == start + each * n for n, seconds in times)


def test_what_is_looked_up_is_what_the_loop_looks_up() -> None:
    #        0  1  2  3  4  5  6  7  8  9
    text = [5, 6, 7, 5, 6, 7, 5, 8, 9, 5]
    found = LookUps(text, 3, 4)
    law = torch.full((10,), 0.5)
    for place in range(7):
        found.read(place, law)
    # "7" has not occurred; "5" has, and 6 7 5 is kept; "8" and "9" have not. The law finds each
    # proposal that follows what was written as likely as not.
    assert list(found.turns(4)) == [(0, 0.0), (3, 1.5), (0, 0.0), (0, 0.0)]
    assert replayed([found], 4) == ((0, 0.75, 0.0), (3, 0.25, 1.5))
    # Two at most: of 6 7, which are kept, then of 8, which follows "5" no more than 6 does.
    assert list(found.turns(2)) == [(0, 0.0), (2, 1.0), (2, 0.5), (0, 0.0), (0, 0.0)]


# --- the command line -----------------------------------------------------------------------------

PAIR = ("--model", "family:code", "--model", "family:prose", "--draft", "family:draft")


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_tune_check_and_generate_with_what_it_found(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    result = run(
        "tune", "def f(x):", *PAIR, "--max-new-tokens", "48", "--check", "--repeats", "1",
        "--threads", "1", "--output", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert result.stdout.count("best") == 1
    assert saved["drafts"] == ["family:draft"]
    assert [one["name"] for one in saved["candidates"] if one["measured"]]
    for one in saved["candidates"]:
        assert one["name"].split()[0] in result.stdout
    assert set(saved["stops"]) == {"code", "prose", "draft"}
    result = run("generate", "def f(x):", "--config", file, "--max-new-tokens", "8", "--json")
    assert result.exit_code == 0, result.output
    statistics = json.loads(result.stdout)["statistics"]
    drafts = ["draft"] if saved["best"]["drafts"] else []
    assert statistics["members"] == ["code", "prose", *drafts]


def test_a_lossy_rule_is_reported_and_not_chosen(tmp_path: Path) -> None:
    pair = ("--model", "family:code", "--draft", "family:draft", "--max-new-tokens", "24")
    file = tmp_path / "tuned.json"
    rules = ("--acceptance", "cactus", "--acceptance", "js:threshold=0.3")
    result = run("tune", "def f(x):", *pair, *rules, "--threads", "1", "--output", file)
    assert result.exit_code == 0, result.output
    for rule in ("cactus:divergence=0.75", "js:threshold=0.3"):
        assert f"{rule}: lossy. The text's law is" in result.stdout
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved["best"]["law"] == "target"
    lossy = [one for one in saved["candidates"] if one["law"] != "target"]
    assert {one["acceptance"] for one in lossy} == {
        "cactus:divergence=0.75",
        "js:threshold=0.3",
    }
    assert all(0 < one["divergence"] < 1 for one in lossy)
    exact = run("tune", "def f(x):", *pair, "--threads", "1")
    assert "lossy" not in exact.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--draft", "family:draft", "--acceptance", "block"), "lossy rule that judges each token"),
        (("--draft", "family:draft", "--acceptance", "jss"), "got 'jss'"),
        (("--acceptance", "js"), "--acceptance: expected a draft or a second member to judge"),
        (("--max-new-tokens", "2"), "--max-new-tokens: expected enough to time every model"),
    ],
)
def test_mistakes_of_tune(arguments: tuple[str, ...], words: str) -> None:
    result = run("tune", "x", "--model", "family:draft", *arguments, "--threads", "1")
    assert result.exit_code == 2
    assert words in result.stderr


def test_auto_tunes_where_every_text_ends_at_once(tmp_path: Path) -> None:
    for file in family.path("code").iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    vocab_size = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    ends = json.dumps({"eos_token_id": list(range(vocab_size)), "pad_token_id": 1})
    (tmp_path / "generation_config.json").write_text(ends)
    pair = ("--model", tmp_path, "--draft", "family:draft", "--threads", "1")
    for temperature in ("0", "1"):
        result = run("generate", "x = [", *pair, "--auto", "--temperature", temperature, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["statistics"]["num_tokens"] == 1


def test_auto_says_what_it_took() -> None:
    result = run("generate", "x = [", *PAIR, "--auto", "--max-new-tokens", "8", "--threads", "1")
    assert result.exit_code == 0, result.output
    (line,) = [one for one in result.stderr.splitlines() if one.startswith("auto: ")]
    assert "times as fast as plain; found in" in line


def test_only_the_drafts_of_the_best_candidate_are_loaded(tmp_path: Path) -> None:
    """Of three that were tuned with, two are not there any more."""
    file = tmp_path / "tuned.json"
    listed = {"models": ["family:code"], "drafts": ["/no/such", "family:draft", "/nor/this"]}
    for schedule, drafts in (("plain", []), ("speculative", [1])):
        best = {"name": "x", "schedule": schedule, "drafts": drafts, "seconds": 1}
        file.write_text(json.dumps({**listed, "threads": 1, "law": {}, "best": best}))
        result = run("generate", "x", "--config", file, "--max-new-tokens", "4", "--json")
        assert result.exit_code == 0, result.output
        members = json.loads(result.stdout)["statistics"]["members"]
        assert members == ["code", *["draft" for _ in drafts]]
    file.write_text(
        json.dumps({**listed, "threads": 1, "law": {}, "best": {**best, "drafts": [0]}})
    )
    assert "got '/no/such'" in run("generate", "x", "--config", file).stderr


def test_a_file_that_is_not_of_tune_is_refused(tmp_path: Path) -> None:
    best = {
        "name": "x",
        "schedule": "speculative:tokens=2,stop=confidence(least=0.25)",
        "drafts": [0],
        "seconds": 1.0,
    }
    whole = {"models": ["family:code"], "drafts": ["family:draft"], "threads": 1, "law": {}}
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps(whole | {"best": best}))
    result = run("generate", "x", "--config", file, "--max-new-tokens", "4")
    assert result.exit_code == 0, result.output
    whim = {"schedule": "speculative:stop=whim"}
    for wrong in ({"drafts": [1]}, whim, {"acceptance": "typcal"}, {"extra": 0}):
        file.write_text(json.dumps(whole | {"best": best | wrong}))
        result = run("generate", "x", "--config", file)
        assert result.exit_code == 2
        assert "--config: expected a file that `specens tune --output` wrote" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--auto", "--schedule", "plain"), "--schedule: expected none beside --auto"),
        (("--auto", "--gamma", "2"), "--gamma: expected none beside --auto"),
        (("--config", "/no/such.json"), "--config: expected a file that `specens tune"),
        (("--config", "x", "--auto"), "--auto: expected none beside --config"),
        (("--config", "x", "--weights", "0.5,0.5"), "--weights: expected none beside --config"),
        (("--config", "x", "--scope", "ensemble"), "--scope: expected none beside --config"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], words: str) -> None:
    result = run("generate", "x", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert loading.FAMILY_PREFIX not in result.stderr

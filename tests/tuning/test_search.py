# SPDX-License-Identifier: Apache-2.0
"""The search: no candidate that it leaves out is faster than the one that it finds."""

import itertools
from dataclasses import replace

import pytest
from profiles import MEMBERS, profile

from specens.loop.profile import Profile
from specens.schedules import SCHEDULES, Alternating, Hierarchy, Speculative
from specens.schedules.mixture import best_ahead
from specens.tuning.search import candidates, least_chance

pytestmark = pytest.mark.usefixtures("one_thread")


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
    kinds = {name for name, kind in SCHEDULES.items() if "candidates" in vars(kind)}
    assert len(kinds) >= 7
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

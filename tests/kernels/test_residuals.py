# SPDX-License-Identifier: Apache-2.0
"""Rejections of siblings leave a signed mixture: the theorem that kernels for trees stand on.

`residuals.py` has both sides. Each is enumerated, too, and what a kernel could get wrong is not
lossless.
"""

import numpy as np
import pytest
import residuals
from residuals import POINT, Mistake, Recursion, Siblings, SignedMixture

# Chances of less have lost their digits in the recursion, which divides by each of them.
LEAST = 1e-3


def random_siblings(seed: int, size: int, count: int, without: bool, points: bool) -> Siblings:
    """Members and one separate draft propose; the target is the members' mixture."""
    dice = np.random.default_rng(seed)
    members = int(dice.integers(1, 5))
    laws = dice.dirichlet(np.full(size, 0.4), members + 1)
    target = dice.dirichlet(np.ones(members)) @ laws[:-1]
    proposers = tuple(int(m) for m in dice.integers(-1 if points else 0, members + 1, count))
    tokens = tuple(int(t) for t in dice.integers(0, size, proposers.count(POINT)))
    return Siblings(target, list(laws), proposers, tokens, without)


@pytest.mark.parametrize("points", [False, True], ids=["drawn", "points among them"])
@pytest.mark.parametrize("without", [False, True], ids=["with", "without replacement"])
def test_what_is_left_is_a_signed_mixture(without: bool, points: bool) -> None:
    compared = 0
    for seed in range(500):
        siblings = random_siblings(seed, 4 + seed % 27, 1 + seed % 6, without, points)
        recursion, mixture = Recursion(siblings), SignedMixture(siblings)
        for tokens in residuals.rejections(siblings, np.random.default_rng(seed)):
            place = len(tokens) - 1
            assert abs(recursion.kept(place, tokens) - mixture.kept(place, tokens)) < 1e-12 / LEAST
            recursion.reject(place, tokens)
            mixture.reject(place, tokens)
            if recursion.chance < LEAST:
                break
            assert abs(recursion.chance - mixture.mass) < 1e-12
            assert np.abs(recursion.law - mixture.law).max() < 1e-12
            compared += 1
    assert compared > 300


SMALL = [
    Siblings(
        np.array(target),
        [np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.1, 0.2, 0.3, 0.4])],
        proposers,
        points,
        without,
    )
    for target in ([0.3, 0.25, 0.225, 0.225], [0.1, 0.2, 0.7, 0.0])
    for proposers, points in (((0, 0, 0), ()), ((0, 1, 0), ()), ((1, POINT, 1), (2,)))
    for without in (False, True)
]


@pytest.mark.parametrize("siblings", SMALL, ids=lambda one: f"{one.proposers} {one.without}")
def test_three_siblings_emit_the_target(siblings: Siblings) -> None:
    assert np.abs(residuals.emitted(siblings) - siblings.target).max() < 1e-12


@pytest.mark.parametrize("mistake", [each for each in Mistake if each is not Mistake.NONE])
def test_the_enumeration_rejects_what_a_kernel_could_get_wrong(mistake: Mistake) -> None:
    """In some situation, that is: where siblings are independent no mass can be forgotten."""
    distances = [np.abs(residuals.emitted(each, mistake) - each.target).max() for each in SMALL]
    assert max(distances) > 1e-3


def test_k_seq_leaves_a_signed_mixture() -> None:
    for seed in range(200):
        dice = np.random.default_rng(seed)
        target, draft = dice.dirichlet(np.full(40, 0.3), 2)
        draft = 0.5 * target + 0.5 * draft
        count = int(dice.integers(2, 6))
        rho = residuals.k_seq_ratio(target, draft, count)
        signed = residuals.positive(target - rho * draft)
        once = np.minimum(target / rho, draft).sum()
        # The root is found to 1e-15 of rho, which moves a mass by as much.
        assert np.abs(signed - residuals.k_seq_left(target, draft, count)).max() < 1e-12
        assert abs(signed.sum() - (1 - once) ** count) < 1e-12

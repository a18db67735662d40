# SPDX-License-Identifier: Apache-2.0
"""Random trees over random caches for `attention`, and the oracle that it is compared with.

A cache is poisoned: NaN lies in every slot that nobody may see. To cover one more argument, draw it
in `problem`, and obey it in `expected`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specens_kernels import attention, tree


class Problem(NamedTuple):
    """The arguments of one call of `attention`, and the parents that its words were made of."""

    query: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor
    parents: Tensor
    options: dict[str, Any]

    @property
    def visible(self) -> Tensor:
        return tree.visible(self.parents, self.options.get("window", 0))

    def run(self) -> tuple[Tensor, Tensor]:
        arguments = (self.query, self.keys, self.values, self.lengths, self.visible)
        return attention(*arguments, **self.options)


def random_parents(nodes: int, batch: int = 1) -> Tensor:
    """(B, nodes) int64, now and then a padding node."""
    below = (torch.rand(batch, nodes) * torch.arange(nodes)).long()
    below = torch.maximum(below, torch.arange(nodes) - 7)  # so that long trees are deep ones
    below = below.masked_fill(torch.rand(batch, nodes) < 0.05, -1)
    return below.index_fill(1, torch.tensor([0]), -1)


def problem(
    *,
    batch: int = 1,
    heads: tuple[int, int] = (8, 2),
    nodes: int = 5,
    sizes: tuple[int, int] = (64, 64),
    lengths: tuple[int, ...] = (100,),
    room: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Problem:
    """`nodes` counts the root; rows take the lengths in turn; `room` slots are left behind them."""
    numbers = torch.tensor([lengths[b % len(lengths)] for b in range(batch)], dtype=torch.int64)
    capacity = max(lengths) + nodes + room
    query = torch.randn(batch, nodes, heads[0], sizes[0]).to(dtype).transpose(1, 2)
    keys = torch.randn(batch, heads[1], capacity, sizes[0]).to(dtype)
    values = torch.randn(batch, heads[1], capacity, sizes[1]).to(dtype)
    beyond = torch.arange(capacity) >= numbers[:, None] + nodes
    for cache in (keys, values):
        cache.masked_fill_(beyond[:, None, :, None], math.nan)
    parents = random_parents(nodes, batch)
    if options.get("window", 0) > 0:
        options["depths"] = tree.depths(parents)
    return Problem(query, keys, values, numbers, parents, options)


def seen(one: Problem, b: int, i: int) -> list[int]:
    """The slots that node i of row b sees."""
    length, parents = int(one.lengths[b]), one.parents[b].tolist()
    path = [i]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    window = one.options.get("window", 0)
    first = max(length + len(path) - window, 0) if window else 0
    return [*range(first, length), *(length + node for node in path[: window or None])]


def expected(one: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64, node by node, of the slots that it sees alone."""
    batch, heads, nodes, size = one.query.shape
    group = heads // one.keys.shape[1]
    scale, softcap = one.options.get("scale", size**-0.5), one.options.get("softcap", 0.0)
    sinks = one.options.get("sinks")
    out = torch.empty(batch, nodes, heads, one.values.shape[-1], dtype=torch.float64)
    lse = torch.empty(batch, heads, nodes, dtype=torch.float64)
    for b in range(batch):
        for i in range(nodes):
            slots = seen(one, b, i)
            keys = one.keys[b, :, slots].double().repeat_interleave(group, 0)
            values = one.values[b, :, slots].double().repeat_interleave(group, 0)
            scores = (keys @ one.query[b, :, i, :, None].double())[..., 0] * scale
            if softcap > 0:
                scores = (scores / softcap).tanh() * softcap
            every = scores if sinks is None else torch.cat((scores, sinks[:, None].double()), -1)
            lse[b, :, i] = every.logsumexp(-1)
            out[b, i] = ((scores - lse[b, :, i, None]).exp()[:, None] @ values)[:, 0]
    return out, lse


def paged(one: Problem, page: int) -> Problem:
    """The same cache in pages that lie in any order; pages that no row has are NaN."""
    batch, _, capacity, _ = one.keys.shape
    pages = -(-capacity // page)
    table = torch.randperm(batch * pages + 3)[: batch * pages].view(batch, pages).int()
    caches = []
    for cache in (one.keys, one.values):
        padded = torch.nn.functional.pad(cache, (0, 0, 0, pages * page - capacity), value=math.nan)
        pool = cache.new_full((batch * pages + 3, cache.shape[1], page, cache.shape[3]), math.nan)
        pool[table.long()] = padded.unflatten(2, (pages, page)).transpose(1, 2)
        caches.append(pool)
    options = {**one.options, "block_table": table}
    return one._replace(keys=caches[0], values=caches[1], options=options)

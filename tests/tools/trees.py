# SPDX-License-Identifier: Apache-2.0
"""Random trees over random caches for `attention`, and the oracle that it is compared with.

A cache is poisoned: NaN lies in every slot that nobody may see. To cover one more argument, draw it
in `problem`, and obey it in `expected`.
"""

import math
import random
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
    heads: tuple[int, int] = (4, 2),
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


def random_problem(seed: int) -> Problem:
    """As hard as a model, a cache or a tree may make it."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    key_heads = dice.choice([1, 2, 3])
    heads = key_heads * dice.choice([1, 3, 4, 7])
    size = dice.choice([1, 8, 19, 32, 64, 80, 128])
    options: dict[str, Any] = {}
    if dice.random() < 0.3:
        options["window"] = dice.choice([1, 2, 20, 64, 65, 400])
    if dice.random() < 0.3:
        options["softcap"] = dice.choice([0.5, 3.0, 30.0])
    if dice.random() < 0.3:
        options["sinks"] = 2 * torch.randn(heads)
    if dice.random() < 0.3:
        options["scale"] = dice.choice([0.1, 0.5])
    batch, nodes = dice.choice([1, 1, 2, 3]), dice.choice([1, 2, 3, 5, 16, 40, 64, 65])
    lengths = tuple(dice.choice([0, 1, 63, 64, 65, 200, 255, 300, 513]) for _ in range(3))
    dtype = dice.choice([torch.float32, torch.bfloat16, torch.float16])
    if dice.random() < 0.1:  # splits whose order can show
        batch, nodes, lengths, dtype = 2, 2, (700, 900), torch.float32
    one = problem(
        batch=batch,
        heads=(heads, key_heads),
        nodes=nodes,
        sizes=(size, dice.choice([size, size, 16, 24, 37])),
        lengths=lengths,
        room=dice.choice([0, 0, 1, 100]),
        dtype=dtype,
        **options,
    )
    if "window" in options:  # what it has left behind
        before = torch.arange(one.keys.shape[2]) <= one.lengths[:, None] - options["window"]
        for cache in (one.keys, one.values):
            cache.masked_fill_(before[:, None, :, None], math.nan)
    return paged(one, dice.choice([1, 16, 23, 64])) if dice.random() < 0.3 else one


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


def straight(one: Problem) -> Problem:
    """The same cache without pages."""
    if "block_table" not in one.options:
        return one
    table = one.options["block_table"].long()
    caches = [pool[table].transpose(1, 2).flatten(2, 3) for pool in (one.keys, one.values)]
    options = {name: each for name, each in one.options.items() if name != "block_table"}
    return one._replace(keys=caches[0], values=caches[1], options=options)


# What is allowed beside torch's own error, for values of about 1: a float32's last bit, or, where
# masses are rounded to halves and torch's happen not to be, a fraction of a half's.
SCALE = {torch.float32: 1e-7, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def dense(one: Problem) -> Tensor:
    """(B, N+1, H, F). torch's own attention, of a mask that is written out."""
    nodes, capacity = one.query.shape[2], one.keys.shape[2]
    mask = torch.zeros(len(one.query), 1, nodes, capacity, dtype=torch.bool)
    for b in range(len(mask)):
        for i in range(nodes):
            mask[b, 0, i, seen(one, b, i)] = True
    keys, values = (each.nan_to_num() for each in (one.keys, one.values))
    out = torch.nn.functional.scaled_dot_product_attention(
        one.query, keys, values, mask, enable_gqa=True, scale=one.options.get("scale")
    )
    return out.transpose(1, 2)


def check(one: Problem, run: Problem | None = None) -> None:
    """The 2x rule; where torch has no such attention, its error is that without cap and sinks."""
    judge(one, *(run or one).run())


def rounding_of_scores(one: Problem) -> float:
    """How far a sum of products in float32 may move a result, in whatever order it is summed.

    A score moves by eps times the sum of its products' sizes, at most, and a result by as much
    times its values: of few slots, torch's own error may be a lucky one.
    """
    scale = one.options.get("scale", one.query.shape[-1] ** -0.5)
    keys = one.keys.nan_to_num().double().abs().amax((0, 1, 2))
    sizes = (one.query.double().abs() @ keys).max().item() * abs(scale)
    eps = torch.finfo(torch.float32).eps / 2
    return eps * sizes * one.values.nan_to_num().abs().max().item()


def judge(one: Problem, out: Tensor, lse: Tensor, more: float = 0.0) -> None:
    """What `check` asks of a result: twice torch's distance from float64, and so much more."""
    right, right_lse = expected(one)
    assert (out.dtype, lse.dtype) == (one.query.dtype, torch.float32)
    assert out.is_contiguous()
    simple = one._replace(
        options={k: v for k, v in one.options.items() if k not in ("sinks", "softcap")}
    )
    error = (dense(simple).double() - expected(simple)[0]).abs().max().item()
    # A sink makes of one value, which torch has exactly, a number that has to be rounded.
    error = max(error, torch.finfo(one.query.dtype).eps / 2 * right.abs().max().item())
    allowed = (
        more
        + 2.0 * error
        + SCALE[one.query.dtype] * (1 + one.values.nan_to_num().abs().max().item())
    )
    assert (out.double() - right).abs().max() <= allowed
    assert (lse.double() - right_lse).abs().max() <= 4e-6 * (1 + right_lse.abs().max())

# SPDX-License-Identifier: Apache-2.0
"""The token that three numbers draw from masses, and the most probable one."""

import triton
import triton.language as tl

from .logits import look
from .parameters import SUB_TILE
from .totals import maximum, sub_tile_ids, sub_tile_masses

# The rounding of bounds differs from that of the masses they bound.
BOUND_SLACK = tl.constexpr(1e-12)

_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def pick(masses, number):
    """First index whose cumulative mass exceeds number x total; the last with mass if none does."""
    ids = tl.arange(0, masses.shape[0])
    cumulative = tl.cumsum(masses, 0)
    last = tl.max(tl.where(masses > 0, ids, 0), 0)
    whole = tl.max(cumulative, 0)
    return tl.minimum(tl.sum((cumulative <= number * whole).to(tl.int32), 0), last)


@triton.jit
def pick_sub_tile(law, masses, numbers, word):
    """A tile by the first number, one of its sub-tiles by the second."""
    tile = pick(tl.sum(masses, 1), tl.load(numbers + word).to(tl.float64))
    chosen = tl.arange(0, law.tiles)[:, None] == tile
    within = tl.sum(tl.where(chosen, masses, 0.0), 0)
    return tile * law.width + pick(within, tl.load(numbers + 2 * word).to(tl.float64))


@triton.jit
def sub_tile_tokens(law, sub_tile):
    offsets = sub_tile * SUB_TILE + tl.arange(0, SUB_TILE)
    return offsets, offsets < law.vocab_size


@triton.jit
def most_probable(law, work, row, b, t, laws, greedy):
    """The lowest of the target's most probable tokens; only sub-tiles that can win are read."""
    ids, _exists = sub_tile_ids(law)
    bounds = sub_tile_masses(law, work, row, b, t, laws, greedy, False)
    best = tl.full((), 0.0, tl.float64)
    token = tl.full((), 0, tl.int32)
    bound = maximum(bounds)
    while (bound > 0) & (bound >= best * (1.0 - BOUND_SLACK)):
        sub_tile = tl.min(tl.min(tl.where(bounds == bound, ids, _NOWHERE), 1), 0)
        offsets, mask = sub_tile_tokens(law, sub_tile)
        masses, _drafted = look(law, None, laws, b, t, -1, offsets, mask, tl.float64)
        here = tl.max(masses, 0)
        first = tl.min(tl.where(masses == here, offsets, _NOWHERE), 0)
        better = (here > best) | ((here == best) & (first < token))
        token = tl.where(better, first, token)
        best = tl.where(better, here, best)
        bounds = tl.where(ids == sub_tile, -1.0, bounds)
        bound = maximum(bounds)
    return token

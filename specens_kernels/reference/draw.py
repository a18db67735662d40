# SPDX-License-Identifier: Apache-2.0
"""`draw`: a token from masses, by three numbers. `sample` and `verify` draw with it."""

import torch
from torch import Tensor

PADDING = -1  # no token
TILE = 8192
SUB_TILE = 1024


def draw(mass: Tensor, numbers: Tensor) -> Tensor:
    """Hierarchical inverse CDF: a tile by the first number, a sub-tile, then a token.

    Args:
        mass: (..., V) float64. Non-negative, not necessarily normalised.
        numbers: (..., 3) float in [0, 1).
    Returns:
        (...,) int64 token; 0 where no token has mass.
    """
    numbers = numbers.double()
    vocab_size = mass.shape[-1]
    tiles = -(-vocab_size // TILE)
    grid = torch.nn.functional.pad(mass, (0, tiles * TILE - vocab_size))
    grid = grid.reshape(*mass.shape[:-1], tiles, TILE // SUB_TILE, SUB_TILE)
    tile = _pick(grid.sum((-1, -2)), numbers[..., 0])
    grid = _take(grid, tile)
    sub_tile = _pick(grid.sum(-1), numbers[..., 1])
    token = _pick(_take(grid, sub_tile), numbers[..., 2])
    return (tile * TILE + sub_tile * SUB_TILE + token).masked_fill(mass.sum(-1) <= 0, 0)


def _pick(mass: Tensor, number: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds number x total; the last with mass if none does."""
    cumulative = mass.cumsum(-1)
    index = (cumulative <= number[..., None] * cumulative[..., -1:]).sum(-1)
    ids = torch.arange(mass.shape[-1], device=mass.device)
    return torch.minimum(index, torch.where(mass > 0, ids, 0).amax(-1))


def _take(grid: Tensor, index: Tensor) -> Tensor:
    """grid[..., index, ...] along the first dimension that `index` does not have."""
    dim = index.dim()
    shape = (*index.shape, 1, *grid.shape[dim + 1 :])
    chosen = index.view(*index.shape, *([1] * (grid.dim() - dim))).expand(shape)
    return grid.gather(dim, chosen).squeeze(dim)
